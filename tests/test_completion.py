"""Completion in a shell: commands, options, and values where they are a list, without importing anything heavy."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bridgexfer.backbones import ARCHS
from bridgexfer.cli import COMPLETED, app, main, pair_words, setting_words, words_of
from bridgexfer.study.settings import load_settings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def complete(monkeypatch, capsys):
    "What bash would offer after some words, the last of which is being typed."
    def offered(*words):
        monkeypatch.setenv("_BRIDGEXFER_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(("bridgexfer", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        with pytest.raises(SystemExit) as end: main([])
        assert not end.value.code
        return capsys.readouterr().out.split()
    return offered


def test_commands_and_options(complete):
    assert set(complete("")) == {c.callback.__name__ for c in app.registered_commands}
    assert complete("tr") == ["transfer"] and "--hours" in complete("transfer", "--h")
    assert "--json" in complete("predict", "--")


@pytest.mark.parametrize(("words", "some"), [
    (("transfer", "mine", "--profile", ""), {"miniature", "evening", "paper"}),
    (("transfer", "mine", "--model", ""), {"miniature", "stable-diffusion-v1-5/stable-diffusion-v1-5"}),
    (("transfer", "mine", "--arch", "vit"), {"vit_base", "vit_large"}),
    (("leep", "mine", "--arch", "mini"), {"mini_resnet10", "mini_resnet18", "mini_vit"}),
    (("transfer", "mine", "--device", "c"), {"cpu", "cuda"}),
    (("datasets", "--fetch", "fl"), {"flowers"}),
    (("leep", "digits"), {"digits", "digits-photo"}),
    (("plan", "profile", "=", "ev"), {"evening"}),
    (("plan", "profile", "="), {"evening", "paper"}),
    (("table", "model", "=", "m"), {"miniature"}),
    (("transfer", "mine", "--set", "fl"), {"flip="})])
def test_values_that_are_a_list(words, some, complete):
    assert some <= set(complete(*words))


def test_pipelines_are_all_there_are(complete):
    from bridgexfer.transfer import CONTROLS, PIPELINES, WAYS
    assert set(complete("plan", "pipelines", "=")) == {*PIPELINES, *CONTROLS, *WAYS}


def test_shells_that_do_not_cut_words(monkeypatch):
    for name in ("COMP_WORDS", "COMP_CWORD"): monkeypatch.delenv(name, raising=False)
    assert pair_words("profile=ev") == ["profile=evening"] and pair_words("flip=n") == ["flip=no"]
    assert not pair_words("lr=")


def test_the_lists_are_those_of_the_library():
    assert set(setting_words("archs", "more_archs")) | {"mini_resnet18"} == set(ARCHS)
    assert set(COMPLETED) - {"profile"} <= set(load_settings("paper").values)


def test_folders_are_offered_as_datasets(tmp_path, monkeypatch, complete):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"digitised").mkdir()
    assert {"digits", "digitised/"} <= set(complete("transfer", "digit"))


def test_a_broken_file_of_settings_completes_nothing(tmp_path, monkeypatch):
    (tmp_path/"nbs"/"jobs").mkdir(parents=True)
    (tmp_path/"settings.ini").write_bytes(b"\xff\xfe[")
    monkeypatch.chdir(tmp_path)
    assert words_of("profile")("") == []


def test_nothing_heavy_is_imported():
    env = {**os.environ, "_BRIDGEXFER_COMPLETE": "complete_bash", "COMP_WORDS": "bridgexfer transfer mine --arch ",
           "COMP_CWORD": "4"}
    code = "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); " \
           "from bridgexfer.cli import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert "resnet18" in done.stdout.split() and not {"torch", "timm", "pandas"} & set(done.stderr.split())


def test_a_script_is_shown_and_installed(tmp_path):
    home = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    def typed(*words):
        line = [sys.executable, "-c", "import sys; from bridgexfer.cli import main; sys.exit(main())", *words]
        return subprocess.run(line, env=home, cwd=tmp_path, capture_output=True, text=True)
    script = typed("--show-completion", "bash")
    assert script.returncode == 0 and "_BRIDGEXFER_COMPLETE" in script.stdout
    assert typed("--install-completion", "bash").returncode == 0
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.name for p in files} == {".bashrc", "bridgexfer.sh"}
    bash = shutil.which("bash")
    if bash is None: pytest.skip("there is no bash")
    kept = next(p for p in files if p.name == "bridgexfer.sh")
    bin = Path(sys.executable).parent
    asked = f"source '{kept}'; COMP_WORDS=(bridgexfer transfer mine --profile ev); COMP_CWORD=4; " \
            "_bridgexfer_completion bridgexfer; echo \"${COMPREPLY[@]}\""
    done = subprocess.run([bash, "-c", asked], env={**home, "PATH": f"{bin}:{os.environ['PATH']}"},
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["evening"], done.stderr
