"""Other people's files and read-only ones: a sentence that names the cause, nothing half-made, nothing lost."""
import ctypes
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from bridgexfer.artefacts import check_readable, check_writable, read_tensors, said_by_system
from bridgexfer.cli import main
from bridgexfer.data.check import check_folder
from bridgexfer.images import open_image, read_image
from bridgexfer.own_images import write_example
from bridgexfer.synthetic_sets import find_damage, read_spec
from test_phrases import sentence, write_folder

ROOT = Path(__file__).parents[1]
OVERRIDES = (1, 2, 3) # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER: by these root opens what others may not


class Header(ctypes.Structure): _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
class Data(ctypes.Structure): _fields_ = [(k, ctypes.c_uint32) for k in ("effective", "permitted", "inheritable")]


@contextmanager
def as_anyone():
    "This thread, and those that it starts, without root's power over files."
    if os.getuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = Header(0x20080522, 0)
    data = (Data * 2)()
    if libc.capget(ctypes.byref(header), data): pytest.skip("root cannot give up its power here")
    before = data[0].effective
    try:
        for k in OVERRIDES: data[0].effective &= ~(1 << k)
        assert not libc.capset(ctypes.byref(header), data)
        yield
    finally:
        data[0].effective = before
        assert not libc.capset(ctypes.byref(header), data)


@contextmanager
def closed(path, mode=0o000):
    "A file or folder with another mode, for anyone."
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with as_anyone(): yield
    finally: path.chmod(before)


def content(folder): return {p: sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def denied(path): return f"bridgexfer: {path}: Permission denied. Change its permissions, or give another path.\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Runs with a synthetic set and a classifier, and the images that it was trained on."
    folder = tmp_path_factory.mktemp("made")
    write_example(folder/"my", 3, 2)
    words = ["transfer", str(folder/"my"), "--profile", "smoke", "--seeds", "0", "--out", str(folder/"better")]
    for setting in (f"runs={folder/'runs'}", "images=2", "steps=2"): words += ["--set", setting]
    where = os.getcwd()
    os.chdir(ROOT)
    try: assert main(words) == 0
    finally: os.chdir(where)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    "A copy of all of it."
    monkeypatch.chdir(ROOT)
    shutil.copytree(made, tmp_path/"made")
    return tmp_path/"made"


def settings(place):
    changes = (f"runs={place/'runs'}", "images=2", "steps=2")
    return ["--profile", "smoke", *(word for change in changes for word in ("--set", change))]


# ---- what the system says

def test_the_folder_that_is_closed_is_named(tmp_path):
    (tmp_path/"a"/"b").mkdir(parents=True)
    with closed(tmp_path/"a"), pytest.raises(PermissionError) as e: check_readable(tmp_path/"a"/"b"/"no such file")
    with closed(tmp_path/"a"): assert said_by_system(e.value).startswith(f"{tmp_path/'a'}: Permission denied")


def test_a_file_of_others_is_not_missing_and_not_damaged(tmp_path, place):
    weights = place/"better"/"model.safetensors"
    with closed(weights), pytest.raises(PermissionError): read_tensors(weights)
    image = next((place/"my").rglob("*.png"))
    with closed(image), pytest.raises(PermissionError): read_image(image, 8)


def test_too_little_memory_is_no_broken_image(tmp_path):
    write_folder(tmp_path/"my")
    with pytest.raises(MemoryError):
        with open_image(tmp_path/"my"/"one"/"0.png"): raise MemoryError


def test_a_read_only_table_is_not_replaced(tmp_path):
    (tmp_path/"a.csv").write_text("mine")
    with closed(tmp_path/"a.csv", 0o444), pytest.raises(PermissionError) as e: check_writable(tmp_path/"a.csv")
    assert e.value.filename == str(tmp_path/"a.csv") and (tmp_path/"a.csv").read_text() == "mine"


# ---- a folder of images

def test_images_that_may_not_be_read(place, capsys):
    my = place/"my"
    image = my/"train"/"three"/"000.png"
    with closed(image):
        found = check_folder(my).findings
        assert [tuple(row) for row in found[["file", "kind", "text"]].values] == [
            ("train/three/000.png", "unreadable", "Permission denied. Change its permissions, or give another path.")]
        assert main(["transfer", str(my), *settings(place), "--out", str(place/"new")]) == 1
        assert sentence(capsys, "leep", my, *settings(place)) == denied(image)
    for folder in (my/"train"/"three", my/"train", my):
        with closed(folder):
            assert sentence(capsys, "check", folder if folder == my else my) == denied(folder)
            assert sentence(capsys, "transfer", my, *settings(place), "--out", place/"new") == denied(folder)
    with closed(my/"train"/"three", 0o444): assert sentence(capsys, "check", my) == denied(my/"train"/"three")
    assert not (place/"new").exists()


def test_another_file_that_may_not_be_read_is_only_left_out(place):
    (place/"my"/"notes").write_text("mine")
    with closed(place/"my"/"notes"): found = check_folder(place/"my").findings
    assert found[["file", "kind"]].values.tolist() == [["notes", "ignored"]]


def test_what_is_beside_images(place, capsys):
    my = place/"my"
    for name in ("names.json", "bridgexfer.ini"):
        (my/name).write_text("")
        with closed(my/name): assert sentence(capsys, "generate", my, *settings(place)) == denied(my/name)
        (my/name).unlink()
    with closed(my, 0o555): assert sentence(capsys, "check", my, "--follow-links") == denied(my/".follow-links")
    assert sorted(os.listdir(my)) == ["test", "train"]


# ---- runs of others

@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_runs_that_cannot_be_written(place, mode, capsys):
    before = content(place)
    folders = [place/"runs", *(p for p in (place/"runs").rglob("*") if p.is_dir())]
    for folder in folders[::-1] if mode else folders[:1]: folder.chmod(mode)
    with as_anyone():
        for words in (["generate", "digits", "--set", "guidance=2"], ["invert", "digits"], ["lora", "digits"]):
            said = sentence(capsys, *words, *settings(place))
            assert f"{place/'runs'}" in said and "Permission denied. Change its permissions" in said
        said = sentence(capsys, "transfer", place/"my", *settings(place), "--set", "lr=0.02", "--out", place/"new")
        assert f"{place/'runs'}" in said and "Permission denied" in said
    for folder in folders: folder.chmod(0o755)
    assert content(place) == before and not (place/"new").exists()


def test_a_shard_that_may_not_be_read_is_not_made_again(place, capsys):
    shard = next((place/"runs").rglob("shard-*.parquet"))
    spec = read_spec(shard.parent)
    with closed(shard):
        with pytest.raises(PermissionError): find_damage(shard, spec, 0)
        for words in (["verify", shard.parent], ["verify", "--repair", shard.parent],
                      ["transfer", place/"my", *settings(place), "--synthetic", shard.parent, "--out", place/"new"],
                      ["generate", place/"my", *settings(place)]):
            assert sentence(capsys, *words).endswith(denied(shard))
        assert shard.stat().st_mode & 0o777 == 0
    assert find_damage(shard, spec, 0) is None and not (place/"new").exists()


def test_a_set_that_may_not_be_read(place, capsys):
    given = place/"given"
    shutil.copytree(place/"my"/"train", given)
    for path in (given/"three"/"000.png", given/"three", given):
        with closed(path):
            words = ["transfer", place/"my", *settings(place), "--synthetic", given]
            assert sentence(capsys, *words, "--out", place/"new") == denied(path)
    assert not (place/"new").exists()


# ---- models, classifiers, images

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("part", [".", "model_index.json", "unet", UNET, "scheduler"])
def test_a_model_that_may_not_be_read(place, part, capsys):
    model = place/"model"
    shutil.copytree(ROOT/"bridgexfer"/"weights"/"pipeline", model)
    with closed(model/part):
        assert sentence(capsys, "generate", "digits", *settings(place), "--model", model).endswith(denied(model/part))


@pytest.mark.parametrize("part", [".", "config.json", "model.safetensors", "outcome.json"])
def test_a_classifier_that_may_not_be_read(place, part, capsys):
    image = next((place/"my"/"test").rglob("*.png"))
    with closed(place/"better"/part):
        assert sentence(capsys, "predict", place/"better", image) == denied(place/"better"/part)


def test_an_image_that_may_not_be_read_is_reported_and_the_rest_is_done(place, capsys):
    first, second = sorted((place/"my"/"test"/"three").glob("*.png"))
    with closed(first): assert main(["predict", str(place/"better"), str(first.parent)]) == 1
    out = capsys.readouterr().out
    assert str(second) in out and f"  {denied(first).removeprefix('bridgexfer: ')}" in out
    with closed(first.parent): assert sentence(capsys, "predict", place/"better", first.parent) == denied(first.parent)


# ---- where results go

def test_results_with_nowhere_to_go(place, capsys):
    locked = place/"locked"
    locked.mkdir()
    (locked/"old.csv").write_text("old")
    image = next((place/"my"/"test").rglob("*.png"))
    synthetic = next((place/"runs").rglob("spec.json")).parent
    with closed(locked, 0o555):
        for words in (["check", place/"my", "--csv"], ["predict", place/"better", image, "--csv"],
                      ["transfer", place/"my", *settings(place), "--out"], ["example"],
                      ["generate", "digits", *settings(place), "--export"],
                      ["curate", "digits", synthetic, "--share", "0.5", *settings(place), "--out"],
                      ["export", place/"better", "--onnx", "--out"]):
            assert sentence(capsys, *words, locked/"new").endswith(denied(locked/"new"))
    with closed(place/"better", 0o555):
        assert sentence(capsys, "export", place/"better", "--onnx") == denied(place/"better"/"model.onnx")
    with closed(locked/"old.csv", 0o444):
        assert sentence(capsys, "check", place/"my", "--csv", locked/"old.csv") == denied(locked/"old.csv")
    assert {p: p.read_text() for p in locked.iterdir()} == {locked/"old.csv": "old"}


def test_an_example_names_the_folder_that_is_missing(tmp_path, capsys):
    said = sentence(capsys, "example", tmp_path/"no"/"my")
    assert said == f"bridgexfer: {tmp_path/'no'}: No such file or directory. Check the path.\n"
    assert sentence(capsys, "example", "/proc/my").startswith("bridgexfer: /proc/my: ")


# ---- the study

SAID = {"runs": "{0}/runs/smoke/notebooks: Permission denied. Change its permissions, or give another path.",
        "figures": "{0}/figures/smoke/notebooks: Permission denied. Change its permissions, or give another path.",
        "rates": "tab5_learning_rates.csv is missing: run `make tune PROFILE=smoke` first"}


@pytest.mark.slow
@pytest.mark.parametrize("what", SAID)
def test_a_study_that_cannot_begin_says_so_in_a_sentence(what, tmp_path):
    folders = [tmp_path/name for name in ("runs", "figures")]
    for folder in folders: folder.mkdir()
    more = ["lr=tuned"] if what == "rates" else []
    words = [Path(sys.executable).with_name("snakemake"), "--profile", "profiles/local", "study", "--config",
             "profile=smoke", *(f"{folder.name}={folder}" for folder in folders), *more]
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    if not os.getuid(): words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", *words]
    for folder in folders: folder.chmod(0o555 if folder.name == what else 0o755)
    done = subprocess.run(words, cwd=ROOT, env=env, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for folder in folders: folder.chmod(0o755)
    lines = done.stdout.splitlines()
    assert done.returncode and [line for line in lines if SAID[what].format(tmp_path) in line]
    assert not [line for line in lines if line.startswith("  File ")]
    assert not [p for folder in folders for p in folder.iterdir()]
