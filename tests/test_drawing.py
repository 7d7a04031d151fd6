"""A model of the user's that opens and does not draw is wrong input; failures of ours or of the machine are not."""
import json
import shutil
from pathlib import Path

import pytest

from bridgexfer.artefacts import read_json
from bridgexfer.cli import main
from bridgexfer.models import SHIPPED, drawing
from bridgexfer.own_images import OutOfTime

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("file", "values"), [
    ("vae/config.json", {"scaling_factor": "0.18215"}),
    ("unet/config.json", {"flip_sin_to_cos": "no", "freq_shift": "x"}),
    ("unet/config.json", {"norm_eps": "x"})])
def test_a_model_that_opens_and_does_not_draw(model, file, values, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = Path(shutil.copytree(model, tmp_path/"mine"))
    (folder/file).write_text(json.dumps({**read_json(folder/file), **values}))
    words = ["generate", "digits", "--profile", "smoke", "--set", f"runs={tmp_path}/runs", "--set", "steps=2",
             "--model", str(folder)]
    assert main(words) == 2 and not list(tmp_path.rglob("shard-*.parquet"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bridgexfer: ")]
    assert len(said) == 1 and f"{folder} opens but does not draw (TypeError: " in said[0]


@pytest.mark.parametrize("command", ["invert", "lora"])
def test_a_model_that_opens_and_does_not_learn(model, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = Path(shutil.copytree(model, tmp_path/"mine"))
    config = folder/"vae/config.json"
    config.write_text(json.dumps({**read_json(config), "scaling_factor": "0.18215"}))
    small = ["digits", "--profile", "smoke", "--set", f"runs={tmp_path}/runs"]
    assert main([command, *small, "--model", str(folder)]) == 2
    assert f"{folder} opens but does not draw (" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), ValueError("ours"), FloatingPointError("not finite"),
    KeyboardInterrupt(), OutOfTime("The time is over.")])
def test_what_is_not_the_models_stays(error):
    with pytest.raises(type(error)) as e, drawing("mine"): raise error
    assert e.value is error


def test_the_miniatures_failure_is_a_bug():
    error = KeyError("x")
    with pytest.raises(KeyError), drawing(SHIPPED): raise error
    said = "mine opens but does not draw .KeyError: 'x'.: compare"
    with pytest.raises(OSError, match=said), drawing("mine"): raise error
