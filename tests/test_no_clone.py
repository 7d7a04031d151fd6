"""An installed package in any folder: what is in the archives, whose settings count, and the whole path of a user."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgexfer.artefacts import read_json
from bridgexfer.cli import _own_study, main
from bridgexfer.data.check import check_folder
from bridgexfer.data.registry import load_dataset
from bridgexfer.own_images import own_study
from bridgexfer.study.grid import Study
from bridgexfer.study.settings import SHIPPED_INI, find_settings, load_settings

ROOT = Path(__file__).parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
QUICK = ["--profile", "miniature", "--images", "8", "--seeds", "0 1"] + [word for setting in (
    "steps=4", "epochs=2", "stage1_epochs=1", "lrs=0.1", "stage1_lrs=0.03", "tuning_seeds=100 101")
    for word in ("--set", setting)]


def write_folder(folder):
    "A user's images: three classes of scanned digits, without a split."
    digits = load_dataset("digits")
    for name in ("one", "three", "seven"):
        (folder/name).mkdir(parents=True)
        at = np.flatnonzero(digits.train.labels == digits.info.names.index(name))[:15]
        for i in at: Image.fromarray(digits.train.pixels[i]).save(folder/name/f"{i}.png")
    return folder


# ---- whose settings

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A folder of another project, whose settings would be noticed."
    (tmp_path/"settings.ini").write_text("[study]\nprofile = theirs\n[theirs]\nimages = 3\n", encoding="utf-8")
    (tmp_path/"mine").mkdir()
    monkeypatch.chdir(tmp_path/"mine")
    return tmp_path/"mine"


def test_settings_of_another_project_are_not_even_opened(elsewhere, monkeypatch):
    opened = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: opened.append(path.resolve()) or read(path, *a, **k))
    assert load_settings().profile == "evening" and find_settings() == SHIPPED_INI
    assert opened and not [path for path in opened if path.is_relative_to(elsewhere.parent)]


def test_an_unreadable_file_of_another_project_is_no_matter(elsewhere):
    (elsewhere/"settings.ini").write_bytes(b"\xff\xfe")
    assert load_settings("miniature").model == "miniature"


def test_runs_go_into_the_working_folder_or_where_told(elsewhere):
    assert Study("miniature").runs_dir == elsewhere/"bridgexfer-runs"/"miniature"
    assert Study("miniature", runs="kept").runs_dir == elsewhere/"kept"/"miniature"
    assert Study("evening").data_dir == elsewhere/"data" and not list(elsewhere.iterdir())


def test_a_clone_is_as_before(monkeypatch):
    monkeypatch.chdir(ROOT/"nbs"/"apps")
    study = Study()
    assert study.settings.profile == "miniature" and study.runs_dir == ROOT/"runs"/"miniature"
    assert find_settings() == ROOT/"settings.ini"


def test_profiles_are_the_same_in_and_out_of_a_clone():
    for profile in ("miniature", "evening", "paper", "smoke"):
        inside, outside = load_settings(profile, ROOT/"settings.ini"), load_settings(profile, SHIPPED_INI)
        assert {k for k, v in inside.values.items() if v != outside.values[k]} <= {"runs"}


# ---- a user's file

def test_a_users_file_beside_the_images_or_in_the_working_folder(elsewhere):
    folder = write_folder(elsewhere/"scans")
    def images(**how): return own_study("scans", **how).settings.images
    (elsewhere/"bridgexfer.ini").write_text("profile = miniature\nimages = 5\nruns = kept\n", encoding="utf-8")
    assert images() == 5 and own_study("scans").runs_dir == elsewhere/"kept"/"miniature"
    (folder/"bridgexfer.ini").write_text("profile = miniature\n[miniature]\nimages = 6\n", encoding="utf-8")
    assert images() == 6 and images(images="7") == 7
    assert own_study("scans", "smoke").settings.images == 20 # the section is another profile's
    assert not len(check_folder("scans").findings)


@pytest.mark.parametrize(("text", "said"), [
    ("images", "cannot be read: write each setting once"), ("images = 5\nimages = 6", "cannot be read"),
    ("[tiny]", "has a section [tiny], which is no profile"), ("imagse = 5", "has an unknown setting 'imagse'"),
    ("images = 0", "images is a whole number above 0, got '0'"), ("profile = tiny", "Unknown profile 'tiny'")])
def test_a_wrong_file_is_one_sentence(elsewhere, text, said, capsys):
    write_folder(elsewhere/"scans")
    (elsewhere/"scans"/"bridgexfer.ini").write_text(text, encoding="utf-8")
    assert main(["transfer", "scans"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bridgexfer: scans/bridgexfer.ini") and said in error


def test_the_file_that_holds_is_named(elsewhere, capsys):
    write_folder(elsewhere/"scans")
    (elsewhere/"bridgexfer.ini").write_text("profile = miniature\n", encoding="utf-8")
    assert _own_study("scans", None, None).settings.model == "miniature"
    assert capsys.readouterr() == ("", "Settings of bridgexfer.ini hold.\n")


# ---- the archives

def backend(call, folder):
    "Call the build backend of pyproject.toml."
    code = f"from setuptools import build_meta\nbuild_meta.{call}('..')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from the sdist alone."
    home = tmp_path_factory.mktemp("build")
    (home/"source").mkdir()
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT/"bridgexfer", home/"source"/"bridgexfer", symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE", "settings.ini"): shutil.copy(ROOT/name, home/"source")
    backend("build_sdist", home/"source")
    [sdist] = home.glob("*.tar.gz")
    with tarfile.open(sdist) as archive: archive.extractall(home/"unpacked", filter="data")
    [unpacked] = (home/"unpacked").iterdir()
    unpacked.rename(home/"sdist")
    backend("build_wheel", home/"sdist")
    [path] = home.glob("*.whl")
    return path


def test_the_wheel_has_all_that_the_package_reads(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
        assert archive.read("bridgexfer/settings.ini") == (ROOT/"settings.ini").read_bytes()
    files = [p for p in (ROOT/"bridgexfer").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    missing = {p.relative_to(ROOT).as_posix() for p in files} - found
    assert not missing, missing
    assert {name.split("/")[0].partition("-")[0] for name in found} == {"bridgexfer"}


# ---- the whole path

def alone(): # `make` sets PYTHONPATH to the clone
    "The variables of a user who has no clone."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | OFFLINE


class Machine:
    "An environment that has the wheel, and an empty folder to work in."
    def __init__(self, home, wheel):
        subprocess.run([sys.executable, "-m", "venv", home/"env"], check=True)
        self.python = home/"env"/"bin"/"python"
        site = next((home/"env").glob("lib/python*/site-packages"))
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, env=alone())
        (site/"dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        self.folder = home/"empty"
        self.folder.mkdir()

    def run(self, *words):
        "What a command prints, and what it says besides."
        done = subprocess.run([self.python.with_name("bridgexfer"), *words], cwd=self.folder, env=alone(),
                              capture_output=True, encoding="utf-8")
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.mark.slow
def test_from_images_to_a_report_predictions_and_onnx(wheel, tmp_path):
    machine = Machine(tmp_path, wheel)
    code = "import bridgexfer; print(bridgexfer.__file__)"
    where = subprocess.check_output([machine.python, "-c", code], cwd=machine.folder, env=alone(), encoding="utf-8")
    assert where.startswith(str(tmp_path))
    scans = write_folder(machine.folder/"my scans")
    assert "class" in machine.run("check", "my scans")
    said = json.loads(machine.run("transfer", "my scans", *QUICK, "--json"))
    assert {p.name for p in machine.folder.iterdir()} == {"my scans", "better", "bridgexfer-runs"}
    page = (machine.folder/said["report"]).read_text(encoding="utf-8")
    assert "<html" in page and "src=\"http" not in page
    record = read_json(machine.folder/"better"/"outcome.json")
    assert record["run"]["made"]["commit"] is None # of no clone, whatever the folder is in
    found = json.loads(machine.run("predict", "better", "my scans", "--json"))
    assert len(found) == sum(1 for _ in scans.rglob("*.png"))
    pytest.importorskip("onnxruntime")
    checked = json.loads(machine.run("export", "better", "--onnx", "--json"))
    assert (machine.folder/checked["file"]).exists() and checked["difference"] < 1e-4
