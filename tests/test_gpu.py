"""A study that asks for a GPU stops before any work where there is none, and says why."""
import warnings
from types import SimpleNamespace

import pytest
import torch

from bridgexfer.cli import main
from bridgexfer.study.costs import memory_text, no_gpu, require_gpu
from bridgexfer.study.grid import Study
from test_jobs import Clone


def without(monkeypatch, cuda, why=""):
    "A PyTorch that sees no GPU."
    def init():
        if why: raise RuntimeError(why)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)


CASES = [ # the CUDA that PyTorch was built with; what it says; what the study says
    (None, "", "is a build for CPUs alone"),
    ("13.0", "Found no NVIDIA driver on your system. Please check that you have one.", "Found no NVIDIA driver"),
    ("13.0", "The NVIDIA driver on your system is too old (found version 11040). Please update", "too old"),
    ("13.0", "No CUDA GPUs are available", "No CUDA GPUs are available"),
    ("13.0", "", "none is visible")]


@pytest.mark.parametrize(("cuda", "why", "said"), CASES)
def test_why_there_is_no_gpu_is_one_sentence(cuda, why, said, monkeypatch):
    without(monkeypatch, cuda, why)
    match = "The profile evening asks for a GPU .*SET=gpu=0"
    with pytest.raises(OSError, match=match) as e: require_gpu(Study("evening"))
    assert said in str(e.value) and "Please" not in str(e.value) and len(str(e.value).splitlines()) == 1


def test_a_profile_that_asks_for_none_or_is_told_to_do_without_runs(monkeypatch):
    without(monkeypatch, None)
    for study in (Study("miniature"), Study("smoke"), Study("evening", gpu="0")): require_gpu(study)


def with_memory(monkeypatch, gigabytes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(total_memory=gigabytes * 1e9))


@pytest.mark.parametrize(("profile", "gigabytes"), (("paper", 80), ("evening", 12), ("evening", 16)))
def test_a_gpu_satisfies(profile, gigabytes, monkeypatch):
    with_memory(monkeypatch, gigabytes)
    assert no_gpu() == ""
    with warnings.catch_warnings(action="error"): require_gpu(Study(profile, lr="0.01"))


def test_a_gpu_with_too_little_memory_is_said_beforehand(monkeypatch):
    with_memory(monkeypatch, 12)
    with pytest.warns(UserWarning) as said: require_gpu(Study("paper", lr="0.01"))
    text, = {str(w.message) for w in said}
    assert text == ("transfer with vit_large takes about 28 GB of a GPU's memory (counted, at the batch of the paper), "
                    "and this one has 12: leave it out.")


def test_the_plan_says_which_gpu(capsys):
    assert memory_text(Study("evening", lr="0.01")) == (
        "GPU memory: generate 7 GB, style 9 GB, alignment 9 GB, resnet18 2 GB: a GPU of 12 GB")
    assert memory_text(Study("paper", lr="0.01")).endswith("vit_large 28 GB: a GPU of 32 GB")
    assert memory_text(Study("miniature")) == "" == memory_text(Study("evening", lr="0.01", gpu="0"))
    assert main(["plan", "profile=evening", "lr=0.01"]) == 0
    assert "a GPU of 12 GB\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_stops_before_its_first_job(tmp_path):
    clone = Clone(tmp_path/"clone")
    clone.env.update(CUDA_VISIBLE_DEVICES="")
    code, said = clone.snakemake("tab2_pipelines", gpu=1, seeds="0", few_seeds="0", shots="4", pipelines="vanilla")
    assert code and "The profile smoke asks for a GPU (gpu in settings.ini)" in said and "SET=gpu=0" in said
    assert "Traceback" not in said and not list((clone.folder/"runs").rglob("*.ipynb"))
