"""Options and settings that are numbers: nan and inf are rejected in a sentence, wherever they are given."""
from typing import get_args, get_type_hints

import pytest

from bridgexfer.cli import app, main
from bridgexfer.study.settings import DECIMALS, LISTS, parse_setting

FLOATS = [(c.callback.__name__, f"--{name.replace('_', '-')}") for c in app.registered_commands
          for name, kind in get_type_hints(c.callback).items() if float in (kind, *get_args(kind))]
WORDS = {"curate": ["my", "made"], "generate": ["my"], "transfer": ["my"]} # arguments of a command


def test_the_options_that_are_numbers():
    assert {option for _, option in FLOATS} >= {"--lora-scale", "--strength", "--hours", "--share"}


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("command", "option"), FLOATS)
def test_an_option_is_a_finite_number(command, option, number, capsys):
    assert main([command, *WORDS.get(command, ["my"]), f"{option}={number}"]) == 2
    said = capsys.readouterr().err
    assert said == f"bridgexfer: {option} is a finite number, got {number}: give another.\n"


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("key", [*DECIMALS, *LISTS, "images", "steps", "part_hours", "generate_memory"])
def test_a_setting_is_a_finite_number(key, number):
    if key.endswith(("datasets", "archs", "pipelines", "styles")): return # names
    with pytest.raises(ValueError, match=f"^{key} is a"): parse_setting(key, number)


def test_a_scale_without_a_lora_is_no_silence(capsys):
    assert main(["generate", "digits", "--profile", "smoke", "--lora-scale", "0.5"]) == 2
    assert "give --lora with it" in capsys.readouterr().err
