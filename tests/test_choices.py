"""Choices: a constant or a default that nobody accounts for fails here, and is named."""
from types import ModuleType

import pytest
from bridgexfer.study import choices
from bridgexfer.study.settings import read_ini


def test_every_constant_and_default_is_accounted_for():
    missing = choices.unlisted()
    advice = ("add them to nbs/study/10_choices.ipynb: as a Choice with source and reason, to FROM_SETTINGS, "
              "or to NO_RESULT with the reason why no result depends on them")
    assert not missing, f"{', '.join(missing)}: {advice}"


def test_a_new_constant_is_noticed(monkeypatch):
    module = ModuleType("bridgexfer.thing")
    module.__all__ = ["SHARE", "Thing"]
    module.SHARE = 0.3
    modules = [*choices.here(), ("thing", module)]
    monkeypatch.setattr(choices, "here", lambda: iter(modules))
    assert choices.unlisted() == ["thing:SHARE"]


def test_a_new_default_is_noticed(monkeypatch):
    from bridgexfer import finetune
    class PaddingSpec(finetune.FinetuneSpec): pass
    PaddingSpec.__module__ = finetune.__name__
    monkeypatch.setattr(finetune, "PaddingSpec", PaddingSpec, raising=False)
    found = choices.unlisted()
    assert "finetune:PaddingSpec.momentum" in found and "finetune:PaddingSpec.version" not in found


def test_settings_that_replace_defaults_exist():
    _, ini, _ = read_ini()
    named = {key for keys in choices.FROM_SETTINGS.values() for key in keys.split()}
    assert named <= set(ini["study"])


def test_each_choice_has_a_value_and_a_reason():
    table = choices.choice_table()
    assert table.choice.is_unique and len(table) > 50
    assert (table.value.str.len() > 0).all() and (table.reason.str.len() > 5).all()
    assert table["where"].str.match(r"^[\w.]+:\w").all()


def test_a_choice_that_is_gone_is_named():
    with pytest.raises(AttributeError, match="GONE"): choices.look_up("search:GONE")
