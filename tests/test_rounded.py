"""Images are made in whole files: who asks for two of each class is told that twenty are made, and uses two."""
from pathlib import Path

from bridgexfer.cli import main
from bridgexfer.generation import SynthesisSpec

ROOT = Path(__file__).parents[1]


def generate(tmp_path, images, *words):
    return main(["generate", "digits", "--profile", "smoke", "--set", f"runs={tmp_path}/runs", "--set", "steps=1",
                 "--images", str(images), *words])


def test_more_than_asked_for_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert generate(tmp_path, 2, "--export", str(tmp_path/"out")) == 0
    said = capsys.readouterr()
    assert "Images are made 20 of each class at a time: 20 instead of 2." in said.err and "× 20 images" in said.out
    assert len(list((tmp_path/"out").rglob("*.*g"))) == 2 * 10
    assert generate(tmp_path, 20) == 0 and "instead of" not in capsys.readouterr().err


def test_help_says_it(capsys):
    for command in ("generate", "transfer"):
        assert main([command, "--help"]) == 0
        assert f"made {SynthesisSpec.shard} at a time" in " ".join(capsys.readouterr().out.split())
