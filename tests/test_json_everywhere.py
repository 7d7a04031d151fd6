"""Every command that prints a result prints it as one JSON document with --json, and nothing else."""
import inspect
from pathlib import Path

import pytest
from test_manners import strict

from bridgexfer import classifier
from bridgexfer.cli import app, main

ROOT = Path(__file__).parents[1]
COMMANDS = {c.callback.__name__ for c in app.registered_commands}
QUICK = [word for setting in ("runs=runs", "images=2", "steps=2", "seeds=0 1", "lr=.05", "epochs=1", "stage1_epochs=1",
                              "style_steps=2", "lora_steps=2") for word in ("--set", setting)]
MINE = ["--profile", "smoke", *QUICK]
LINES = { # command -> words after it, in the order in which they are run
    "example": ["mine", "--train", "3", "--test", "2"],
    "check": ["mine"],
    "invert": ["mine", *MINE],
    "lora": ["mine", *MINE],
    "generate": ["mine", *MINE, "--export", "drawn"],
    "verify": ["SET"],
    "compare": ["mine", "SET", "--profile", "smoke"],
    "curate": ["mine", "SET", "--share", ".5", "--profile", "smoke"],
    "leep": ["mine", *MINE, "--arch", "mini_resnet10", "mini_vit"],
    "transfer": ["mine", *MINE],
    "predict": ["better", "mine/test/one", "missing.png"],
    "export": ["better", "--onnx"],
    "push": ["better", "me/mine"],
    "plan": ["profile=evening"],
    "table": ["profile=miniature"],
    "provenance": ["figures/miniature/tab2_pipelines.csv:2", "--profile", "miniature"],
    "datasets": ["--profile", "evening"]}


def test_every_command_has_it():
    assert set(LINES) == COMMANDS
    for command in app.registered_commands: assert "as_json" in inspect.signature(command.callback).parameters


@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("command", LINES)
def test_one_document_and_nothing_else(command, home, capfd, monkeypatch):
    monkeypatch.chdir(ROOT if command in ("table", "provenance") else home)
    monkeypatch.setattr(classifier, "push_classifier", lambda *words: "https://example.org/me/mine")
    if command == "export": pytest.importorskip("onnxruntime")
    made = next((home/"runs").glob("*/synthetic/*/spec.json"), Path()).parent
    code = main([command, *(str(made) if word == "SET" else word for word in LINES[command]), "--json"])
    out, err = capfd.readouterr()
    assert code == (1 if command == "predict" else 0), err
    value = strict(out)
    assert value and out.count("\n") == 1 and isinstance(value, list | dict)


@pytest.mark.parametrize("command", sorted(COMMANDS - {"datasets", "plan", "table", "provenance", "push", "example"}))
def test_an_error_leaves_standard_output_empty(command, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["nowhere" if word in ("mine", "SET", "better") else word for word in LINES[command]]
    assert main([command, *words, "--json"]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("bridgexfer: ") and "Traceback" not in err


def test_a_check_that_finds_errors_is_a_document_too(home, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["example", "broken", "--train", "2", "--test", "1"])
    (tmp_path/"broken"/"train"/"one"/"000.png").write_bytes(b"no image")
    capfd.readouterr()
    assert main(["transfer", "broken", *MINE, "--json"]) == 1
    value = strict(capfd.readouterr().out)
    assert not value["check"]["ok"] and not (tmp_path/"better").exists()


def test_an_example_is_written_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["example", "mine", "--train", "1", "--test", "1"]) == 0
    assert sum(1 for _ in (tmp_path/"mine").rglob("*.png")) == 20 and "bridgexfer check mine" in capsys.readouterr().out
    assert main(["example", "mine"]) == 2 and "give a new folder" in capsys.readouterr().err
    assert main(["example", "other", "--train", "0"]) == 2 and not (tmp_path/"other").exists()
    assert main(["example", "no/such/place"]) == 2
