"""The practitioner's path: commands, exit codes, and what must not be looked at."""
import json
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, constants
from PIL import Image

from bridgexfer.artefacts import PACKAGE
from bridgexfer.cli import app, main
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import Dataset
from bridgexfer.generation import synthesis_spec
from bridgexfer.images import as_images
from bridgexfer.own_images import own_choices, own_images, own_runs, own_study
from bridgexfer.synthetic_sets import SyntheticSet, card, generate

ROOT = Path(__file__).parents[1]
COMMANDS = {c.callback.__name__: c.callback for c in app.registered_commands}
SMALL = dict(images="8", steps="2", epochs="1", stage1_epochs="1", lrs="0.1 0.01", stage1_lrs="0.03", seeds="0 1",
             tuning_seeds="100 101")


def write(folder, per_class=(6, 4), names=("one", "three")): # train, test
    digits = load_dataset("digits")
    for split, images, count in (("train", digits.train, per_class[0]), ("test", digits.test, per_class[1])):
        for name in names:
            (folder/split/name).mkdir(parents=True)
            at = np.flatnonzero(images.labels == digits.info.names.index(name))[:count]
            for i in at: Image.fromarray(images.pixels[i]).save(folder/split/name/f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path): return write(tmp_path/"my digits")


@pytest.fixture
def study(folder, tmp_path): return own_study(str(folder), "miniature", runs=str(tmp_path/"runs"), **SMALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([command, "--help"]) == 0
    assert COMMANDS[command].__doc__ in " ".join(capsys.readouterr().out.split())


def cpu_seconds(): # of processes that have ended
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_does_not_wait_for_torch():
    code = ("import sys; from bridgexfer.cli import main; main(['--help']); "
            "print(sorted({'torch', 'numpy', 'pandas', 'diffusers', 'matplotlib'} & set(sys.modules)))")
    before = cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "transfer" in done.stdout
    assert cpu_seconds() - before < 0.5


def test_an_interrupted_command_says_that_it_can_be_resumed(monkeypatch, capsys):
    def interrupt(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr("bridgexfer.data.check.check_folder", interrupt)
    assert main(["check", "."]) == 130
    out, err = capsys.readouterr()
    assert not out and "run the same command again" in err and len(err.strip().splitlines()) == 1


def test_what_the_study_costs_and_found(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert main(["plan", "profile=smoke", "seeds=0"]) == 0
    assert "core" in capsys.readouterr().out
    assert main(["table", "profile=miniature"]) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1] == "Tables and figures: figures/miniature" and any("Bridged++" in line for line in said)
    assert main(["table", "profile=smoke", "seeds=0", f"runs={tmp_path}"]) == 2
    assert f"{tmp_path.name}/figures/smoke/tab2_pipelines.csv is missing" in capsys.readouterr().err
    assert main(["provenance", "no_such_table digits", "--profile", "miniature"]) == 2
    assert "no_such_table" in capsys.readouterr().err


def test_check_is_for_scripts(folder, capsys, tmp_path):
    assert main(["check", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (folder/"train"/"one"/"broken.png").write_bytes(b"no image")
    assert main(["check", str(folder), "--json", "--csv", str(tmp_path/"found.csv")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and [f["file"] for f in report["findings"]] == ["train/one/broken.png"]
    assert "train/one/broken.png" in (tmp_path/"found.csv").read_text()


@pytest.mark.parametrize(("argv", "said"), [
    (["check", "no such folder"], "no such folder"),
    (["generate", "digits", "--set", "guidance"], "key=value"),
    (["generate", "digits", "--set", "guidanse=3"], "Unknown setting guidanse"),
    (["generate", "digits", "--profile", "tiny"], "Unknown profile 'tiny'"),
    (["verify", "."], "not a synthetic set"),
    (["generate", "pets", "--profile", "miniature"], "draws letters and digits and knows no 'Abyssinian'"),
    (["leep", "digits", "--arch", "resnet19"], "Unknown architecture 'resnet19'"),
    (["transfer", "digits", "--out", "nbs"], "nbs is not an empty folder"),
    (["generate"], "Missing argument"),
    (["leep", "digits", "--arch"], "requires an argument"),
    (["genrate", "digits"], "Did you mean 'generate'"),
    (["check", ".", "--style"], "No such option: --style"),
    (["plan", "seeds"], "key=value"),
    ([], "Missing command")])
def test_wrong_input_is_one_line_on_standard_error_and_exit_code_2(argv, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err and len(err.strip().splitlines()) == 1 and not out


def test_an_unreachable_hub_is_one_sentence_after_the_licence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["generate", "digits", "--profile", "evening", "--set", f"runs={tmp_path}/runs"]) == 2
    notice, error = capsys.readouterr().err.strip().splitlines()
    assert "creativeml-openrail-m" in notice and "Attachment A" in notice and "No safety checker" in notice
    for word in ("stable-diffusion-v1-5/stable-diffusion-v1-5@", str(tmp_path), "HF_HUB_OFFLINE"): assert word in error


def test_nothing_is_trained_while_the_folder_has_errors(folder, tmp_path, capsys):
    (folder/"test"/"one"/"copy.png").write_bytes(next((folder/"train"/"one").glob("*.png")).read_bytes())
    out, runs = tmp_path/"out", tmp_path/"runs"
    assert main(["transfer", str(folder), "--profile", "miniature", "--out", str(out), "--set", f"runs={runs}"]) == 1
    assert "leak" in capsys.readouterr().out and not out.exists() and not runs.exists()


def test_hyper_parameters_are_chosen_without_the_test_images(study, folder, tmp_path):
    data = study.load(str(folder))
    chosen = own_choices(study, data, "mini_resnet10")
    assert {"vanilla", "bridged_pp"} == set(chosen)
    pixels = np.random.default_rng(0).integers(256, size=data.test.pixels.shape)
    noise = as_images(pixels, data.test.labels, data.info.names)
    other = own_study(str(folder), "miniature", runs=str(tmp_path/"other"), **SMALL)
    assert own_choices(other, Dataset(data.info, data.train, noise), "mini_resnet10") == chosen


def ones_and_sevens(root, shard, **how):
    spec = synthesis_spec("miniature", ("one", "seven"), steps=2, size=32, stored_size=32, format="png", shard=shard)
    return generate(spec, root, shard, progress=False, **how)


def test_a_set_of_other_classes_is_rejected(study, folder, tmp_path):
    data = study.load(str(folder))
    other = ones_and_sevens(tmp_path/"sets", 8)
    with pytest.raises(ValueError, match="one, seven.*one, three.*must agree"):
        own_images(study, data, own_runs(study)[1], given=other)


def test_a_set_travels(tmp_path): # to a machine without its model, and the card says what to beware of
    made = ones_and_sevens(tmp_path/"here", 4, remark="all images come from ImageNet")
    there = tmp_path/"there"
    made.folder.rename(there)
    spec = json.loads((there/"spec.json").read_text())
    (there/"spec.json").write_text(json.dumps({**spec, "model": "/a/model/that/is/gone"}))
    moved = SyntheticSet(there)
    assert not moved.verify() and len(moved.images(4)) == 8
    text = (there/"README.md").read_text(encoding="utf-8")
    head = DatasetCard(text).data
    assert head.license == "apache-2.0" and "synthetic" in head.tags
    said = ("repeated pictures", "No safety checker", "all images come from ImageNet", "what the prompt asked for")
    for word in (*said, made.spec.weights): assert word in text
    assert card(moved.spec, 4).data.license == "unknown" # a model that is not at hand


WEIRD = ("a;touch pwned", "$(touch pwned)", "it's `touch pwned`", "-rf", "two  words")

@pytest.mark.parametrize("name", WEIRD)
def test_names_reach_no_shell(name, tmp_path, monkeypatch):
    folder = write(tmp_path/name, (2, 1), ("one", "three"))
    monkeypatch.chdir(ROOT)
    assert own_study(str(folder), "smoke", runs=str(tmp_path/"runs")).datasets == (str(folder),)
    small = ["--profile", "smoke", "--images", "20", "--set", f"runs={tmp_path}/runs"]
    assert main(["generate", str(folder), *small, "--export", str(tmp_path/"out")]) == 0
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == ["000-one", "001-three"]
    assert not list(ROOT.glob("pwned")) and not list(tmp_path.glob("**/pwned"))


def test_papermill_lines_quote_a_datasets_name(tmp_path): # as far as settings.ini can name it: without blanks
    folder = write(tmp_path/"a;b'c$(d)&e", (2, 1))
    config = ["profile=smoke", f"datasets={folder}", f"runs={tmp_path}/runs", f"figures={tmp_path}/figures"]
    snakemake = [Path(sys.executable).with_name("snakemake"), "--profile", "profiles/local", "study"]
    line = [*snakemake, "--dry-run", "--printshellcmds", "--config", *config]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^Shell command: (papermill .*/transfer\.ipynb.*)$", done.stdout + done.stderr, re.M)
    assert lines and all(str(folder) in shlex.split(l) for l in lines)


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    code = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py")).replace(".eval()", "")
    unsafe = r"torch\.load\b|\bpickle\b|allow_pickle=True|trust_remote_code|\beval\(|\bos\.system|shell=True"
    assert not re.findall(unsafe, code)
