"""Faults of the known kinds that nobody had listed: each was tried as an outsider would, and fixed or seen to hold."""
import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bridgexfer import artefacts
from bridgexfer.artefacts import atomic, check_writable
from bridgexfer.cli import main
from bridgexfer.data import check as check_module
from bridgexfer.data.check import check_folder
from bridgexfer.data.registry import dataset_info, load_dataset
from bridgexfer.datasets import hold_out, listed
from bridgexfer.generation import check_images
from bridgexfer.images import as_images
from bridgexfer.layouts import find_layout
from bridgexfer.models import load_pipeline
from bridgexfer.own_images import given_set, own_study, warn_of_names
from bridgexfer.prompts import name_of_folder
from bridgexfer.study.costs import require_baseline
from bridgexfer.study.grid import Study, job_command
from bridgexfer.study.plots import around_zero
from bridgexfer.study.settings import load_settings, parse_setting
from bridgexfer.user_prompts import read_table

ROOT = Path(__file__).parents[1]
CODE = "import sys; from bridgexfer.entry import main; sys.exit(main())"
NFC, NFD = "é", "e\u0301"


def picture(seed, size=40): return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def write_folder(folder, classes=("one", "three"), tops=(".",), count=3):
    "Class folders of noise, no image twice."
    for t, top in enumerate(tops):
        for c, name in enumerate(classes):
            (folder/top/name).mkdir(parents=True)
            for i in range(count): Image.fromarray(picture([t, c, i])).save(folder/top/name/f"{i}.png")
    return folder


def sentence(capsys, *words):
    "What a command that is given wrong words says."
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("bridgexfer: ") == 1 and "Traceback" not in err
    return err


# ---- where a table is written

def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path/"pipe")
    (tmp_path/"link").symlink_to("pipe")
    for name in ("pipe", "link"):
        read = []
        reader = threading.Thread(target=lambda: read.append((tmp_path/"pipe").read_text()), daemon=True)
        reader.start()
        with atomic(tmp_path/name) as part: part.write_text("whole")
        reader.join(20)
        assert read == ["whole"] and stat.S_ISFIFO((tmp_path/"pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.skipif(not Path("/dev/null").is_char_device() or os.getuid() != 0, reason="root alone could replace it")
def test_a_device_is_written_to_and_not_replaced():
    with atomic("/dev/null") as part: part.write_text("for nobody")
    assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout here")
def test_standard_output_may_be_the_table(tmp_path):
    folder = write_folder(tmp_path/"my")
    (folder/"one"/"broken.png").touch()
    words = [sys.executable, "-c", CODE, "check", str(folder), "--csv", "/dev/stdout"]
    with open(tmp_path/"out", "w") as out: done = subprocess.run(words, cwd=ROOT, stdout=out, stderr=subprocess.PIPE)
    said = (tmp_path/"out").read_text()
    assert done.returncode == 1, done.stderr
    assert said.startswith("file,class,split") and "classes 2, training images" in said and "unreadable (1)" in said


def test_an_error_names_the_path_and_not_its_temporary_file(tmp_path):
    for path in (tmp_path, tmp_path/("n" * 250)):
        with pytest.raises(OSError) as e:
            with atomic(path) as part: part.write_text("")
        assert e.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_whether_a_table_can_be_written_is_asked_before_the_work(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path/"my")
    def look(*_): raise AssertionError("an image was read")
    monkeypatch.setattr(check_module, "look", look)
    for wrong in (folder, folder/"one"/"0.png"/"table.csv", "/proc/no/table.csv"):
        assert str(wrong) in sentence(capsys, "check", folder, "--csv", wrong)
    check_writable(tmp_path/"a"/"b.csv")
    assert os.listdir(tmp_path) == ["my"]


def test_whether_a_folder_can_be_made_is_asked_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    full = write_folder(tmp_path/"full")
    runs = ["--profile", "smoke", "--set", f"runs={tmp_path}/runs"]
    assert "give a new one with --export" in sentence(capsys, "generate", "digits", *runs, "--export", full)
    for command in (["generate", "digits", "--export"], ["transfer", "digits", "--out"]):
        assert "/proc/no/new" in sentence(capsys, *command, "/proc/no/new", *runs)
    assert os.listdir(tmp_path) == ["full"]


def test_asking_for_the_commit_locks_nothing(tmp_path):
    "Where the disk is full, git would leave its lock, and the user could commit nothing."
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)
    git("init")
    (tmp_path/"a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    index = tmp_path/".git"/"index"
    os.utime(tmp_path/"a", (1, 1)) # so that `git status` would write the index again
    before = index.read_bytes(), index.stat().st_mtime_ns
    assert not artefacts._commit(tmp_path).endswith("+")
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before


# ---- words that are not there, or there twice

@pytest.mark.parametrize(("words", "said"), [
    (["check", ""], "FOLDER is empty: give class folders"), (["transfer", ""], "DATASET is empty"),
    (["check", ".", "--csv", ""], "--csv is empty: give it a value, or leave it out"),
    (["predict", "", "a.png"], "MODEL is empty"), (["predict", "better", ""], "IMAGES... is empty"),
    (["leep", "digits", "--arch", ""], "--arch is empty"), (["provenance", ""], "RESULT is empty: give a row")])
def test_an_empty_word_is_not_the_working_folder(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path/"my"))
    assert said in sentence(capsys, *words)


def test_a_text_may_be_empty(capsys):
    assert "no such folder" in sentence(capsys, "generate", "no such folder", "--domain", "", "--negative", "")


def test_a_setting_is_given_once(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "images=4 and images=5 differ" in sentence(capsys, "plan", "profile=smoke", "images=4", "images=5")
    assert "Unknown setting ''" in sentence(capsys, "plan", "=4")
    assert main(["plan", "profile=smoke", "images=4", "images=4"]) == 0


@pytest.mark.parametrize(("key", "value"), [("seeds", "0 1 0"), ("lrs", "0.1 0.10"), ("datasets", "pets dtd pets")])
def test_a_run_counts_once(key, value):
    "The same seed thrice would be an interval of no width."
    with pytest.raises(ValueError, match=f"{key} lists .* more than once"): parse_setting(key, value)


# ---- tables as spreadsheets write them

@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_may_be_separated_as_a_spreadsheet_does(separator, tmp_path, capsys):
    folder = tmp_path/"my"
    folder.mkdir()
    rows = [("file_name", "label")]
    for i in range(8):
        Image.fromarray(picture(i)).save(folder/f"{i}.png")
        rows.append((f"{i}.png", ("one", "three")[i % 2]))
    text = "\r\n".join(separator.join(row) for row in rows)
    (folder/"metadata.csv").write_text(f"\ufeff{text}\r\n", encoding="utf-8", newline="")
    assert main(["check", str(folder)]) == 0 and "classes 2" in capsys.readouterr().out
    (tmp_path/"p.csv").write_text(f"class{separator}prompt\none{separator}a one\n", encoding="utf-8")
    assert read_table(tmp_path/"p.csv", ["one"]) == (("a one",),)


@pytest.mark.parametrize(("table", "said"), [
    (b"name|kind\n0.png|one\n", "lists no images: give it the columns file_name and label"), (b"", "lists no images"),
    ("file_name,label\n0.png,stra\xdfe\n".encode("latin-1"), "is not UTF-8 text .*: save it as UTF-8")])
def test_a_table_that_is_none_is_named(table, said, tmp_path, capsys):
    flat = tmp_path/"flat"
    flat.mkdir()
    Image.fromarray(picture(0)).save(flat/"0.png")
    (flat/"metadata.csv").write_bytes(table)
    assert re.search(f"metadata.csv {said}", sentence(capsys, "check", flat))


def test_a_table_beside_class_folders_that_lists_nothing_is_a_warning(tmp_path):
    folder = write_folder(tmp_path/"my")
    (folder/"labels.csv").write_text("id,name\n1,one\n")
    found = check_folder(folder).findings
    assert found[["file", "kind"]].values.tolist() == [["labels.csv", "not read"]]


# ---- names that look the same

def test_names_that_look_the_same_are_told_apart(tmp_path, capsys):
    assert listed([NFC, "owl"]) == "é, owl" and listed([NFC, NFD]) == r"'\xe9', 'e\u0301'"
    folder = tmp_path/"my"
    for split, name in (("train", NFC), ("test", NFD)): write_folder(folder, ("one", name), (split,))
    with pytest.raises(ValueError, match=r"differ in the classes 'e\\u0301', '\\xe9'"): dataset_info(str(folder))
    assert main(["check", str(folder)]) == 1
    assert r"'e\u0301', '\xe9' have the same name 'é': rename one like the other" in capsys.readouterr().out


# ---- files that are none, or odd

def test_odd_files_are_named_and_the_rest_is_read(tmp_path):
    folder = write_folder(tmp_path/"my", count=4)
    odd = folder/"one"
    frames = [Image.fromarray(picture(100 + i)) for i in range(3)]
    frames[0].save(odd/"pages.tiff", save_all=True, append_images=frames[1:])
    frames[1].convert("P").save(odd/"moves.gif", save_all=True, append_images=[frames[2].convert("P")])
    frames[2].convert("P").save(odd/"clear.png", transparency=0)
    Image.fromarray(picture(200, 1)).save(odd/"dot.png")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(odd/"deep.png")
    (odd/"a\nb.png").write_bytes((odd/"pages.tiff").read_bytes())
    (odd/"zero.png").touch()
    (odd/"loop.png").symlink_to("loop.png")
    (odd/"gone.png").symlink_to("nowhere.png")
    os.mkfifo(odd/"fifo.png")
    where = os.getcwd()
    os.chdir(odd) # the path of a socket is 107 bytes at most
    try: socket.socket(socket.AF_UNIX).bind("socket.png")
    finally: os.chdir(where)
    found = check_folder(folder).findings
    kinds = {(Path(f).name, k) for f, k in zip(found["file"], found["kind"])}
    assert kinds >= {("pages.tiff", "frames"), ("moves.gif", "frames"), ("clear.png", "transparent"),
                     ("dot.png", "small"), ("deep.png", "16 bits"), ("zero.png", "unreadable"),
                     ("loop.png", "link"), ("fifo.png", "ignored"), ("socket.png", "ignored"),
                     (r"a\nb.png", "odd name"), ("gone.png", "link")}
    links = found[found["kind"] == "link"]
    assert set(links["text"]) == {"is a link that leads nowhere: bring back what it points to, or remove it."}
    with pytest.raises(ValueError, match="gone.png is a link that leads nowhere"): find_layout(folder)


def test_the_reader_of_json_may_stop(tmp_path):
    folder = write_folder(tmp_path/"my", count=200)
    for path in folder.rglob("*.png"): path.write_bytes(b"")
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(CODE)} check {shlex.quote(str(folder))} --json | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=ROOT, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    assert done.stdout == "{" and done.returncode in (1, 141) and not done.stderr


# ---- words that make alone reads

@pytest.mark.parametrize(("words", "said"), [
    (["study", "ON=nowhere"], "ON is one of local slurm, got 'nowhere'"),
    (["env", "FOR=test doc"], "FOR is one of study test docs lab, got 'test doc'"),
    (["bench", "DEVICE=gpu"], "DEVICE is one of cpu cuda, got 'gpu'")])
def test_a_word_that_make_does_not_know_is_rejected(words, said):
    "A device of no name was measured with the parameters of a test, and took the place of the committed table."
    make = ["make", "-n", "--no-print-directory", "-o", ".venv/.complete"]
    done = subprocess.run([*make, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and not done.stdout
    known = [re.sub("=.*", "=" + said.split()[4], word) for word in words] # the second one that is listed
    assert subprocess.run([*make, *known], cwd=ROOT, capture_output=True).returncode == 0


# ---- every narrowing that `make help` offers

NARROWINGS = { # variables of make -> what they are as settings
    "SHOTS=4": dict(shots="4"), "SHOTS=full": dict(shots="full"), "SHOTS='1 16'": dict(shots="1 16"),
    "SEEDS=7": {k: "7" for k in ("seeds", "few_seeds", "sweep_seeds", "beyond_seeds")}, "IMAGES=3": dict(images="3"),
    "DATASETS=greek": dict(datasets="greek"), "ARCHS=mini_vit": dict(archs="mini_vit"),
    "PIPELINES=vanilla": dict(pipelines="vanilla"), "SET=runs=elsewhere": dict(runs="elsewhere"),
    "SET='lr=0.01 guidance=5'": dict(lr="0.01", guidance="5")}


def recipe(*words):
    "What make would run."
    make = ["make", "-n", "--no-print-directory", "-o", ".venv/.complete"]
    done = subprocess.run([*make, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return [shlex.split(line.lstrip("@")) for line in done.stdout.splitlines() if line.strip()]


@pytest.mark.parametrize("narrowing", NARROWINGS)
def test_the_table_is_looked_for_where_the_study_leaves_it(narrowing):
    workflow, table = recipe("study", "PROFILE=smoke", *shlex.split(narrowing))
    config = workflow[workflow.index("--config") + 1:]
    assert config == table[table.index("table") + 1:]
    given = dict(word.split("=", 1) for word in config)
    assert given == {"profile": "smoke", **NARROWINGS[narrowing]}
    study = Study(**given)
    assert study.jobs() and "tab2_pipelines" in {page.name for page in study.pages_of("study")}


@pytest.mark.parametrize("place", ["my runs", "elsewhere"])
def test_the_last_line_of_make_study(place, tmp_path, capsys, monkeypatch):
    "It prints the table, wherever it is; and where there is none, says so."
    monkeypatch.chdir(ROOT)
    settings = ["profile=smoke", f"figures={tmp_path}/{place}", "shots=4"]
    assert "tab2_pipelines.csv is missing: run `make study`" in sentence(capsys, "table", *settings)
    (tmp_path/place/"smoke").mkdir(parents=True)
    row = "digits,mini_resnet10,4,vanilla,50.0,1.0,3,"
    (tmp_path/place/"smoke"/"tab2_pipelines.csv").write_text(f"dataset,arch,shots,pipeline,mean,sd,n,verdict\n{row}\n")
    assert main(["table", *settings]) == 0
    out = capsys.readouterr().out
    assert "50.0" in out and place in out


def test_a_narrowing_without_the_baseline_is_rejected_before_the_work():
    for pipelines in ("vanilla", "mixed vanilla"): require_baseline(Study("smoke", pipelines=pipelines))
    with pytest.raises(ValueError, match='lacks: add it, as in PIPELINES="vanilla mixed bridged"'):
        require_baseline(Study("smoke", pipelines="mixed bridged"))
    assert "said(lambda: require_baseline(study))" in (ROOT/"Snakefile").read_text()


@pytest.mark.slow
def test_a_narrowing_without_bridges_ends_well(tmp_path):
    "Table 1 has then no bridges to score."
    words = [Path(sys.executable).with_name("snakemake"), "--profile", "profiles/local", "study", "--config",
             "profile=smoke", "pipelines=vanilla", "seeds=0", "few_seeds=0", "shots=4", "images=2",
             *(f"{k}={tmp_path/k}" for k in ("runs", "figures"))]
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(words, cwd=ROOT, env=env, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {f"{name}.csv" for name in ("tab1_leep", "tab2_pipelines")} <= {*os.listdir(tmp_path/"figures"/"smoke")}


@pytest.mark.slow
def test_the_paper_of_few_shots_ends_well(tmp_path):
    "The controls train on synthetic images alone, full-shot, where only vanilla is beside them."
    pages = ["control_compute", "control_labels", "control_mixing", "control_regularisers", "control_retrieval",
             "control_synthetic", "fig04_few_shot"]
    config = ["profile=smoke", "shots=4", "images=2", *(f"{k}={tmp_path/k}" for k in ("runs", "figures"))]
    config += [f"{k}=0" for k in ("seeds", "few_seeds", "sweep_seeds")]
    words = [Path(sys.executable).with_name("snakemake"), "--profile", "profiles/local", *pages, "--config", *config]
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(words, cwd=ROOT, env=env, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {f"{page}.png" for page in pages} <= {*os.listdir(tmp_path/"figures"/"smoke")}


def test_bars_of_nothing_have_limits():
    low, high = around_zero([], [])
    assert low < 0 < high


def test_help_offers_what_is_narrowed():
    offered = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {word.partition("=")[0] for word in NARROWINGS} | {"PROFILE", "ON", "RESULT", "FETCH", "PAPER", "PORT"}
    assert set(re.findall(r"\b([A-Z]+)=", offered)) <= names | {"MINUTES", "DEVICE"}


# ---- settings.ini as people save it

@pytest.mark.parametrize("change", [
    lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: text.replace(b"sd-legacy", b"100%")])
def test_settings_ini_as_editors_save_it(change, tmp_path):
    (tmp_path/"settings.ini").write_bytes(change((ROOT/"settings.ini").read_bytes()))
    ours, theirs = (load_settings("smoke", path/"settings.ini").values for path in (ROOT, tmp_path))
    assert dict(ours) == dict(theirs)


@pytest.mark.parametrize(("words", "said"), [
    (["seeds=18446744073709551616"], None), (["images=99999999999999999999"], "ten million at most"),
    (["guidance=1e400"], "guidance is a number"), (["profile=a/b"], "Unknown profile 'a/b'"),
    (["profile=../smoke"], "Unknown profile"), (["profile=DEFAULT"], "Unknown profile 'DEFAULT'"),
    (["images=20 # ten"], "images is a whole number"), (["seeds=0,1"], "seeds is a whole number")])
def test_values_that_nobody_listed(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = [] if words[0].startswith("profile") else ["profile=smoke"]
    if said: assert said in sentence(capsys, "plan", *first, *words)
    else: assert main(["plan", *first, *words]) == 0


# ---- wrong things that nobody is told of

@pytest.mark.parametrize(("classes", "doubtful"), [
    (("001.Black_footed_Albatross", "owl"), ["001.Black_footed_Albatross"]), (("1_cat", "2_dog"), ["1_cat", "2_dog"]),
    (("n02085620-Chihuahua", "owl"), ["n02085620-Chihuahua"]), (("2012 BMW", "owl"), [])])
def test_numbers_before_class_names_are_not_drawn_without_a_word(classes, doubtful, tmp_path, caplog):
    folder = write_folder(tmp_path/"my", classes)
    found = check_folder(folder).findings
    found = found[found["kind"] == "nameless"]
    assert list(found["class"]) == doubtful
    if doubtful: assert f'"a photo of a {name_of_folder(doubtful[0])}."' in found["text"].iloc[0]
    warn_of_names(tuple(map(name_of_folder, classes)))
    assert ("begin with" in caplog.text) == bool(doubtful)


def test_classes_one_folder_too_deep_are_pointed_out(tmp_path, capsys):
    folder = write_folder(tmp_path/"my", ("cat", "dog"), ("animal", "thing"))
    shutil.move(folder/"thing"/"dog", folder/"plant")
    found = check_folder(folder).findings
    found = found[found["kind"] == "nested"]
    assert list(found["class"]) == ["animal"] and "(cat, dog), which count as one class" in found["text"].iloc[0]
    assert main(["check", str(write_folder(tmp_path/"deep", tops=("data",)))]) == 1
    assert "if they are classes, move them up" in capsys.readouterr().out


def test_doubts_about_a_folder_are_said_where_it_is_trained_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = write_folder(tmp_path/"my folder", tops=("train", "test"))
    words = ["transfer", str(folder), "--profile", "smoke", "--set", f"runs={tmp_path/'runs'}"]
    Image.fromarray(picture(7)).save(folder/"train"/"loose.png")
    def stop(*_): raise ValueError("enough")
    monkeypatch.setattr("bridgexfer.cli._warn_of_cpu", stop)
    said = sentence(capsys, *words)
    assert f"Warning: a check of {folder} warns (not read); bridgexfer check '{folder}' says more." in said
    (folder/"train"/"loose.png").unlink()
    assert "doubts" not in sentence(capsys, *words)


def test_a_given_set_holds_no_test_image(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = write_folder(tmp_path/"my", tops=("train", "test"))
    given = write_folder(tmp_path/"given", tops=("new",))/"new"
    for path in given.rglob("*.png"): Image.fromarray(picture([9, *map(ord, str(path))])).save(path)
    study = own_study(str(folder), "smoke", generates=False, runs=str(tmp_path/"runs"))
    def take(): return given_set(study, load_dataset(str(folder)), given)
    take()
    assert not caplog.text
    shutil.copy(folder/"train"/"one"/"0.png", given/"one"/"copy.png")
    take()
    assert f"1 of the images in {given} are training images of {folder}, and not synthetic" in caplog.text
    shutil.copy(folder/"test"/"one"/"0.png", given/"one"/"other name.png")
    with pytest.raises(ValueError, match=f"1 of the images in {given} are test images of {folder}"): take()
    words = ["transfer", folder, "--profile", "smoke", "--synthetic", folder/"test", "--out", tmp_path/"new"]
    assert "6 of the images" in sentence(capsys, *words, "--set", f"runs={tmp_path/'runs'}")
    assert not (tmp_path/"new").exists()


@pytest.mark.parametrize("name", ["2024", "1e5", "None", "nan", "-7"])
def test_a_folder_called_like_a_number_stays_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path/name)
    study = Study("smoke", ROOT/"settings.ini", datasets=name)
    job = next(job for job in study.jobs() if job.rule == "transfer")
    words = shlex.split(job_command(study, job))
    assert words[words.index("dataset") - 1:][:3] == ["-r", "dataset", name] and words[words.index("sweep") - 1] == "-p"


@pytest.mark.parametrize("key", ["shots", "few_shots", "beyond_shots"])
def test_more_shots_than_there_are_images_are_rejected_before_the_work(key, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = sentence(capsys, "plan", "profile=smoke", f"{key}=10000")
    assert f"{key} asks for 10000 images of each class, and digits has 898 training images of 10 classes" in said


@pytest.mark.parametrize("setting", ["shots=1", "datasets=pets", "pipelines=mixed"])
def test_settings_that_a_command_would_ignore_are_rejected(setting, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = sentence(capsys, "generate", "digits", "--profile", "smoke", "--set", setting)
    assert f"{setting.partition('=')[0]} says what the study varies" in said
    folder = write_folder(tmp_path/"my")
    (folder/"bridgexfer.ini").write_text(setting)
    assert str(folder/"bridgexfer.ini") in sentence(capsys, "leep", folder, "--profile", "smoke")


def test_settings_of_sweeps_that_a_command_ignores_are_said(capsys, caplog, monkeypatch):
    monkeypatch.chdir(ROOT)
    sentence(capsys, "generate", "digits", "--profile", "smoke", "--set", "few_shots=1", "--set", "shots=1")
    assert not caplog.messages # an error says enough
    sentence(capsys, "generate", "digits", "--profile", "smoke", "--set", "few_shots=1", "--set", "guidance=nan")
    assert caplog.messages == ["Warning: few_shots says what the study varies, and a command for one dataset has no "
                               "use for it."]


def test_a_large_validation_part_leaves_something_to_fit():
    train = as_images(np.zeros((6, 8, 8, 3)), [0, 0, 0, 1, 1, 2], "abc")
    fit, validation = hold_out(train, 0.99, 0)
    assert fit.labels.tolist() == [0, 1, 2] and validation.labels.tolist() == [0, 0, 1]


def test_an_example_counts_what_it_wrote(tmp_path, capsys):
    assert main(["example", str(tmp_path/"my"), "--train", "100000", "--test", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["train"] == len(list((tmp_path/"my"/"train").rglob("*.png"))) == 898 and made["test"] == 10


def test_a_threshold_that_nothing_reaches(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = write_folder(tmp_path/"my")
    words = ["curate", "digits", folder, "--profile", "smoke", "--set", f"runs={tmp_path/'runs'}", "--threshold", "1"]
    assert "No image reaches the threshold" in sentence(capsys, *words, "--out", tmp_path/"kept")
    assert sorted(os.listdir(tmp_path)) == ["my", "runs"]


def test_a_revision_of_a_folder_is_rejected(tmp_path, capsys, monkeypatch):
    "The folder would be taken, and the revision forgotten."
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT/"bridgexfer"/"weights"/"pipeline", tmp_path/"me"/"tiny")
    words = ["generate", "digits", "--profile", "smoke", "--set", f"runs={tmp_path/'runs'}", "--model", "me/tiny@main"]
    assert "me/tiny is a folder here: give ./me/tiny for the folder" in sentence(capsys, *words)


@pytest.mark.parametrize(("dtype", "said"), [
    ("float32", "damaged, or guidance is too large."), ("bfloat16", "or it needs the precision float32.")])
def test_images_of_nan_name_what_may_be_the_cause(dtype, said):
    with pytest.raises(ValueError, match=said): check_images(np.array([False]), getattr(torch, dtype))


def test_opening_a_model_is_silent(capfd, caplog):
    load_pipeline("miniature", "float16", "cpu")
    assert capfd.readouterr() == ("", "") and not caplog.text


def test_a_model_that_is_not_there_is_named_before_the_work(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "No text-to-image model at 'nonsense'" in sentence(capsys, "plan", "profile=smoke", "model=nonsense")
    with pytest.raises(FileNotFoundError, match="at 'nonsense'"): Study("smoke", model="nonsense").jobs()
