"""What a user can cause ends in one sentence and a documented exit code; the rest is a bug and says so."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from httpx2 import ConnectError
from PIL import Image
from safetensors import SafetensorError

from bridgexfer.cli import BROKEN_PIPE, BUG, explain, main
from bridgexfer.data.registry import dataset_info, load_dataset
from bridgexfer.finetune import NonFiniteLoss
from bridgexfer.generation import check_images, check_lengths, sample, synthesis_spec
from bridgexfer.hub import said_by_hub
from bridgexfer.study.settings import load_settings
from bridgexfer.synthetic_sets import generate

ROOT = Path(__file__).parents[1]
SMALL = ["--profile", "smoke", "--set", "steps=2", "--set", "images=4"]


# ---- one place for errors

def raises(monkeypatch, error):
    def fail(*_, **__): raise error
    monkeypatch.setattr("bridgexfer.data.check.check_folder", fail)


@pytest.mark.parametrize(("error", "said"), [
    (NonFiniteLoss("The loss of vanilla is nan."), "The loss of vanilla is nan."),
    (MemoryError(), "MemoryError: MemoryError. There is too little memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"), "too little memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "too little memory"),
    (RuntimeError("Found no NVIDIA driver on your system. Please"), "The GPU cannot be used: --device cpu"),
    (AssertionError("Torch not compiled with CUDA enabled"), "--device cpu"),
    (ConnectError("[Errno -2] Name or service not known"), "Name or service not known. Run the same command again"),
    (SafetensorError("Error while deserializing header: HeaderTooLarge"), "HeaderTooLarge"),
    (ModuleNotFoundError("No module named 'onnx'"), "No module named 'onnx'"),
    (TimeoutError(), "TimeoutError"),
    (OSError(28, "No space left on device", "a.part"), "a.part: No space left on device. Free some space"),
    (ValueError("two\nlines"), "two lines")])
def test_what_a_user_can_cause_is_a_sentence(error, said, monkeypatch, capsys):
    raises(monkeypatch, error)
    assert main(["check", "."]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("lr"), RuntimeError("shapes differ"), IndexError("3"), ZeroDivisionError()])
def test_the_rest_is_a_bug_and_says_how_to_report_it(error, monkeypatch, capsys):
    raises(monkeypatch, error)
    monkeypatch.delenv("BRIDGEXFER_DEBUG", raising=False)
    assert main(["check", "."]) == BUG and explain(error) is None
    err = capsys.readouterr().err
    assert "a bug" in err and "BRIDGEXFER_DEBUG=1" in err and type(error).__name__ in err and "Traceback" not in err
    monkeypatch.setenv("BRIDGEXFER_DEBUG", "1")
    assert main(["check", "."]) == BUG and "Traceback" in capsys.readouterr().err


def command(*argv, **how):
    code = 'import sys; sys.argv[0] = "bridgexfer"; from bridgexfer.cli import main; sys.exit(main())'
    return subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True, **how)


def test_a_reader_that_stops_reading_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    process = command("--help", stdout=writing)
    os.close(writing)
    assert (process.communicate()[1], process.returncode) == ("", BROKEN_PIPE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_is_full_is_named():
    with open("/dev/full", "w") as full: process = command("--help", stdout=full)
    said = process.communicate()[1]
    assert process.returncode == 2 and "No space left" in said and "Traceback" not in said


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta", "xpu"])
def test_a_device_that_is_not_there_is_wrong_input(device, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    assert main(["generate", "digits", *SMALL, "--set", f"runs={tmp_path}", "--device", device]) == 2
    assert f"The device {device!r} cannot be used" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_hubs_answer_is_passed_on():
    def chained(cause):
        try: raise OSError("Can't load the model") from cause
        except OSError as e: return e
    assert "licence" in said_by_hub(chained(GatedRepoError.__new__(GatedRepoError)))
    assert "Name or service not known" in said_by_hub(chained(ConnectError("Name or service not known")))


# ---- settings

@pytest.mark.parametrize(("argv", "said"), [
    (["images=many"], "images is a whole number above 0, got 'many'"),
    (["images=0"], "images is a whole number above 0"),
    (["steps=2.5"], "steps is a whole number"),
    (["guidance=nan"], "guidance is a number from 0 on, got 'nan'"),
    (["lr=fast"], "lr is a number above 0 or tuned, got 'fast'"),
    (["seeds=-1"], "seeds is a whole number from 0 on"),
    (["shots=all"], "shots is a whole number above 0 or full"),
    (["path=elsewhere"], "Unknown setting 'path'")])
def test_settings_of_the_wrong_kind_are_named(argv, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["plan", "profile=smoke", *argv]) == 2
    assert said in capsys.readouterr().err


def test_an_option_and_a_setting_may_not_differ(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["generate", "digits", "--images", "3", "--set", "images=4"]) == 2
    assert "--images 3 and --set images=4 differ" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "said"), [
    ("[study]\nprofile = a\n[a]\nimages = 3\n", "lacks adamw_lrs, "),
    ("[study]\nprofile = b\n", "Unknown profile 'b'"),
    ("[study]\n", "Unknown profile ''"),
    ("[study]\nprofile\n", "cannot be read as a settings.ini"),
    ("[study]\na = 1\na = 2\n", "cannot be read as a settings.ini"),
    ("\xff\xfe[study]", "cannot be read as a settings.ini")])
def test_a_damaged_settings_ini_is_named(text, said, tmp_path):
    (tmp_path/"settings.ini").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said.replace("[", r"\[")): load_settings(path=tmp_path/"settings.ini")


def test_a_missing_key_is_named(tmp_path):
    text = (ROOT/"settings.ini").read_text().replace("momentum       =", "# momentum =")
    (tmp_path/"settings.ini").write_text(text)
    with pytest.raises(ValueError, match=r"lacks momentum: add them to \[study\] or \[smoke\]"):
        load_settings("smoke", tmp_path/"settings.ini")


def test_a_model_has_its_own_revision():
    def named(**how):
        settings = load_settings("evening", ROOT/"settings.ini", **how)
        return settings.model, settings.revision
    known = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    commit = named()[1]
    assert len(commit) == 40 and named(model=known) == (known, commit)
    assert named(model="me/tiny") == ("me/tiny", "main") and named(model="me/tiny@v2") == ("me/tiny", "v2")
    assert named(model="me/tiny", revision="1234567") == ("me/tiny", "1234567") # text, though it is made of digits
    with pytest.raises(ValueError, match="differ: give the revision once"): named(model="me/tiny@v2", revision="v1")


# ---- datasets by name

@pytest.mark.parametrize("name", ["digits", "flowers", "cars", "pets"])
def test_a_folder_with_a_registered_name_is_not_guessed_at(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, c in enumerate(("one", "three")):
        for k in range(3):
            path = tmp_path/name/c/f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(10 * i + k).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    for read in (dataset_info, load_dataset):
        with pytest.raises(ValueError, match=rf"\./{name} for the folder's images, or registry:{name}"): read(name)
    assert dataset_info(f"./{name}").names == ("one", "three") and dataset_info(f"./{name}").name == f"./{name}"
    assert dataset_info(f"{name}/").names == load_dataset(f"./{name}").info.names == ("one", "three")
    assert dataset_info(f"registry:{name}").name == name and len(dataset_info(f"registry:{name}").names) > 2
    assert main(["transfer", name]) == 2 and f"./{name}" in capsys.readouterr().err


# ---- images and prompts

def broken(pipe, value):
    "The pipeline with a decoder that gives a value."
    import copy
    vae = copy.deepcopy(pipe.vae)
    with torch.no_grad(): vae.decoder.conv_out.weight.fill_(value)
    other = copy.copy(pipe)
    other.vae = vae
    return other


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_of_nan_are_not_stored(pipe, model, value, tmp_path):
    spec = synthesis_spec(model, ("one", "two"), steps=2, size=32, stored_size=32, shard=2)
    with pytest.raises(ValueError, match="4 of 4 images of values that are not finite"):
        generate(spec, tmp_path, 2, pipe=broken(pipe, value), progress=False)
    assert not list(tmp_path.rglob("shard-*.parquet"))
    check_images(np.array([True]), torch.float32)


def test_a_prompt_that_would_be_cut_is_named(pipe, model, tmp_path):
    long = "very " * 40 + "large owl"
    with pytest.raises(ValueError, match="longer than the 32 tokens.*large owl.*would be cut off"):
        check_lengths(pipe, ["a photo of a one.", f"a photo of a {long}."])
    spec = synthesis_spec(model, ("one", long), steps=2, size=32, stored_size=32)
    with pytest.raises(ValueError, match="would be cut off"): sample(pipe, [long], [0], spec)
    with pytest.raises(ValueError, match="would be cut off"): generate(spec, tmp_path, 2, pipe=pipe, progress=False)
    assert not list(tmp_path.rglob("shard-*"))


# ---- the list of all texts

def test_the_list_of_messages_has_every_kind_of_text():
    done = subprocess.run([sys.executable, ROOT/"docs/messages.py"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for text in ("ValueError: {path} is not JSON ({e}): {remedy}.", # an error, joined from its parts
                 "_option: seeds, separated by blanks (default: profile's)", # help
                 "text: Check a folder of labelled images.", # of a command
                 "text: was left by a NAS, an archive or a desktop, and is not read.", # a finding
                 "Fault: the hub has disabled the model"):
        assert any(line.startswith("- ") and line.endswith(f", {text}") for line in lines), text
    assert len(lines) > 500 and not [line for line in lines if "The metadata of an image" in line] # a docstring


@pytest.mark.parametrize(("error", "said"), [
    (FileNotFoundError(2, "No such file or directory", "a b"), "a b: No such file or directory. Check the path."),
    (PermissionError(13, "Denied", "a"), "a: Denied. Change its permissions, or give another path."),
    (OSError(36, "File name too long", "aaa"), "aaa: File name too long. Give a shorter name."),
    (OSError(5, "Input/output error"), "Input/output error."), (OSError("ours: do this."), "ours: do this.")])
def test_the_operating_systems_errors_say_where_and_what_to_do(error, said): assert explain(error) == said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(("words", "ends"), [(["generate", "digits", *SMALL], 0), (["check", "no such folder"], 2)])
def test_notes_that_cannot_be_written_end_no_work(words, ends, tmp_path):
    "The disk of a log is full, or its reader is gone: exit code 1 would say that a check has found errors."
    if words[0] == "generate": words = [*words, "--set", f"runs={tmp_path}"]
    code = 'import sys; sys.argv[0] = "bridgexfer"; from bridgexfer.cli import main; sys.exit(main())'
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(writing, "w") as unread:
        for errors in (full, unread):
            how = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
            done = subprocess.run([sys.executable, "-c", code, *words], **how)
            assert done.returncode == ends and done.stdout.startswith("" if ends else "SyntheticSet")


def test_a_damaged_compiled_file_is_named_and_no_bug(monkeypatch, capsys):
    "A full disk cuts what Python compiles, and typer takes that for the end of a user's input."
    raises(monkeypatch, EOFError("marshal data too short"))
    assert main(["check", "."]) == 2
    said = capsys.readouterr().err
    assert "marshal data too short" in said and "delete the folders __pycache__" in said and "Abort" not in said
