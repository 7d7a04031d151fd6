"""`transfer`, `predict`, `export` and `push` under Ctrl-C and faults: one sentence, its exit code, and nothing lost."""
import resource
import sys

import pytest
import torch
from huggingface_hub import HfApi

from bridgexfer import classifier, own_images
from bridgexfer.cli import main

def quick(lr=".05"):
    settings = ("runs=runs", "images=2", "steps=2", "seeds=0 1", f"lr={lr}", "epochs=1", "stage1_epochs=1")
    return ["--profile", "smoke", *(f"--set={setting}" for setting in settings)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with images, and the classifier that `transfer` left."
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["example", "mine", "--train", "3", "--test", "2"]) == 0
        assert main(["transfer", "mine", *quick()]) == 0
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    "Exit code and standard error of a command, whose standard output has to be empty if it fails."
    monkeypatch.chdir(home)
    def run(*words):
        code = main(list(map(str, words)))
        out, err = capsys.readouterr()
        assert not out or code == 0
        return code, err
    return run


def raises(error):
    def fail(*_, **__): raise error
    return fail


PREDICT = ("predict", "better", "mine/test/one", "--csv", "found.csv")
EXPORT = ("export", "better", "--onnx", "--out", "new.onnx")


# ---- Ctrl-C

def test_transfer_says_what_is_kept_and_goes_on(run, home, monkeypatch):
    begun = []
    transfer = own_images.transfer
    def pressed(*how):
        begun.append(how)
        if len(begun) == 3: raise KeyboardInterrupt
        return transfer(*how)
    monkeypatch.setattr(own_images, "transfer", pressed)
    words = ("transfer", "mine", *quick(".04"), "--out", "second")
    code, said = run(*words)
    assert code == 130 and "finished trainings" in said and "run the same command again to resume" in said
    assert not (home/"second").exists()
    assert run(*words)[0] == 0 and (home/"second"/"report.html").exists()
    assert len(begun) <= 3 + 2 + 1 # the two that were left, and the winner's weights


@pytest.mark.parametrize(("words", "where", "left"), [
    (PREDICT, "probabilities", "found.csv"), (EXPORT, "onnx_difference", "new.onnx")])
def test_short_commands_leave_nothing(words, where, left, run, home, monkeypatch):
    if "--onnx" in words: pytest.importorskip("onnxruntime")
    monkeypatch.setattr(classifier, where, raises(KeyboardInterrupt))
    code, said = run(*words)
    assert code == 130 and said == "Interrupted: nothing was changed; run the same command again.\n"
    assert not [p for p in home.iterdir() if left in p.name]


def test_push_may_have_made_a_repository(run, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", raises(KeyboardInterrupt))
    code, said = run("push", "better", "me/mine")
    assert code == 130 and "the repository may be there already" in said


# ---- faults

@pytest.mark.parametrize("words", [("transfer", "mine", *quick(), "--out", "third"), PREDICT])
@pytest.mark.parametrize("device", ["cuda:7", "abacus"])
def test_no_such_device(words, device, run):
    code, said = run(*words, "--device", device)
    assert code == 2 and f"The device '{device}' cannot be used" in said and "Traceback" not in said


@pytest.mark.parametrize(("words", "module", "where", "advice"), [
    (("transfer", "mine", *quick(".03"), "--out", "third"), own_images, "transfer", "generate_batch"),
    (PREDICT, classifier, "predict", "a smaller --batch"), (EXPORT, classifier, "to_onnx", "another machine")])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), MemoryError()])
def test_too_little_memory(words, module, where, advice, error, run, home, monkeypatch):
    if "--onnx" in words: pytest.importorskip("onnxruntime")
    monkeypatch.setattr(module, where, raises(error))
    code, said = run(*words)
    assert code == 2 and "too little memory" in said and advice in said
    assert sum(line.startswith("bridgexfer: ") for line in said.splitlines()) == 1 and "Traceback" not in said
    assert not {p.name for p in home.iterdir()} & {"third", "found.csv", "new.onnx"}


def test_a_loss_that_is_not_finite(run, home):
    code, said = run("transfer", "mine", *quick("1e30"), "--out", "third")
    assert code == 2 and "is nan in epoch 1" in said and "Traceback" not in said and not (home/"third").exists()


@pytest.fixture
def room(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True) # the limit would cut it
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("words", "left"), [
    (("transfer", "mine", *quick(), "--out", "third"), "third"), (PREDICT, "found.csv"), (EXPORT, "new.onnx")])
def test_a_full_disk(words, left, run, home, room):
    if "--onnx" in words: pytest.importorskip("onnxruntime")
    room(50)
    code, said = run(*words)
    room(resource.RLIM_INFINITY)
    assert code == 2 and "File too large" in said and "Traceback" not in said, said
    assert not [p for p in home.iterdir() if left in p.name]
    assert run(*words)[0] == 0 and (home/left).exists()
