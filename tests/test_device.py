"""What runs on a GPU, as far as a CPU can tell: compiling, what is on its way, what leaves the device when."""
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from bridgexfer import synthetic_sets
from bridgexfer.artefacts import device_name
from bridgexfer.evaluation import _one_behind
from bridgexfer.generation import (compile_denoiser, denoiser, plan, predict_noise, sample, sample_later,
                                   synthesis_spec, to_host, try_compiled, uncompile)
from bridgexfer.models import load_pipeline
from bridgexfer.rates import H100, SD15, measured
from bridgexfer.study.costs import plan_text
from bridgexfer.study.grid import Study
from bridgexfer.synthetic_sets import COMPILE_FROM, image_files, make_shard, make_shards, pays_to_compile
import families

DIGITS = tuple("zero one two three four five six seven eight nine".split())
SPEC = synthesis_spec("miniature", DIGITS, steps=2, size=32, batch=8, shard=2)


def drawn(pipe, spec=SPEC, n=8):
    rows = plan(spec, 0, 1)[:n]
    return sample(pipe, [r.prompt for r in rows], [r.seed for r in rows], spec)


def compiled_modules(pipe): return [m for m in denoiser(pipe).modules() if m._compiled_call_impl is not None]


# ---- compiling

@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_compiling_changes_no_image_and_can_be_undone(pipe, family):
    model = getattr(families, family)(pipe.tokenizer)
    model.set_progress_bar_config(disable=True)
    spec = replace(SPEC, size=16, stored_size=16, batch=2, scheduler="default")
    plain = drawn(model, spec, 2)
    assert try_compiled(model, spec, "a photo of a one.", backend="eager")
    found = compiled_modules(model)
    if family == "stable_diffusion": assert found == [model.unet] # whole
    else: assert {type(m).__name__ for m in found} <= {*model.transformer._repeated_blocks} and found
    assert np.abs(drawn(model, spec, 2).astype(int) - plain).max() <= 2 # it rounds, as FLUX does from call to call
    uncompile(model)
    assert not compiled_modules(model) and np.abs(drawn(model, spec, 2).astype(int) - plain).max() <= 2


def test_what_has_no_blocks_is_compiled_whole(pipe):
    model = families.three(pipe.tokenizer)
    compile_denoiser(model, backend="eager")
    assert compiled_modules(model) == [model.transformer]


def test_cuda_graphs_are_asked_for_and_shapes_are_fixed(monkeypatch):
    pipe = load_pipeline("miniature")
    asked = {}
    monkeypatch.setattr(type(pipe.unet), "compile", lambda self, **how: asked.update(how))
    compile_denoiser(pipe)
    assert asked == dict(backend="inductor", fullgraph=True, dynamic=False, mode="reduce-overhead")


def test_a_machine_that_cannot_compile_draws_as_before():
    pipe = load_pipeline("miniature")
    plain = drawn(pipe)
    with pytest.warns(UserWarning, match="cannot be compiled here .*: it is used as it is"):
        assert not try_compiled(pipe, SPEC, "a photo of a one.", backend="no such backend")
    assert not compiled_modules(pipe) and np.array_equal(drawn(pipe), plain)


CASES = [("cuda", COMPILE_FROM, {}, True), ("cuda", COMPILE_FROM - 1, {}, False), ("cpu", 10**6, {}, False),
         ("cuda", 10**6, dict(lora="a-lora"), False), ("cuda", 10**6, dict(offload="model"), False)]


@pytest.mark.parametrize(("device", "images", "how", "pays"), CASES)
def test_when_compiling_pays(device, images, how, pays):
    spec = SimpleNamespace(**dict(lora="", offload="none") | how)
    assert pays_to_compile(spec, torch.device(device), images) == pays


@pytest.mark.parametrize("given", [False, True])
def test_a_pipeline_is_compiled_once_for_all_shards_and_only_if_it_is_ours(tmp_path, monkeypatch, given):
    tried = []
    monkeypatch.setattr(synthetic_sets, "pays_to_compile", lambda spec, device, images: images == 2 * 2 * 10)
    monkeypatch.setattr(synthetic_sets, "try_compiled", lambda pipe, spec, prompt: tried.append(prompt))
    made = make_shards(SPEC, tmp_path, [0, 1], progress=False, pipe=load_pipeline("miniature") if given else None)
    assert made == [0, 1] and len(tried) == (0 if given else 1)


# ---- on the way to the host

def test_what_a_graph_returns_is_copied_before_it_is_overwritten():
    "CUDA graphs return the same memory at each call."
    out = torch.ones(2, 4, 4, 4)
    class Graph(torch.nn.Module):
        dtype = torch.float32
        def forward(self, x, t, c, return_dict): return (out.repeat(len(x) // 2, 1, 1, 1) if len(x) > 2 else out,)
    c = torch.zeros(2, 1, 1)
    for w in (0, 1, 3.5):
        found = predict_noise(Graph(), torch.zeros(2, 4, 4, 4), torch.tensor(1), c, c[:1], w)
        assert found.data_ptr() != out.data_ptr()


def test_images_that_are_on_their_way_are_those_that_are_waited_for(pipe):
    rows = plan(SPEC, 0, 2)
    wanted = [r.prompt for r in rows], [r.seed for r in rows], SPEC
    wait = sample_later(pipe, *wanted)
    assert np.array_equal(wait(), sample(pipe, *wanted)) and np.array_equal(wait(), wait())
    [x] = to_host(torch.arange(6).reshape(2, 3).T)()
    assert x.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_device_is_one_batch_ahead_of_the_host(pipe, monkeypatch):
    "A batch is begun before the one before it has arrived, and no two are."
    events = []
    def later(pipe, prompts, seeds, spec, cache, real, fits):
        number = sum(kind == "begun" for kind, _ in events)
        events.append(("begun", number))
        def wait():
            events.append(("arrived", number))
            return np.zeros((len(prompts), 32, 32, 3), np.uint8)
        return wait
    monkeypatch.setattr(synthetic_sets, "sample_later", later)
    table = make_shard(SPEC, 0, pipe, tqdm(disable=True))
    assert len(list(image_files(table))) == 20 and len(events) == 6
    at = {event: place for place, event in enumerate(events)}
    assert at["arrived", 0] < at["begun", 2]
    assert [n for kind, n in events if kind == "arrived"] == [0, 1, 2]


def test_an_error_on_the_way_ends_the_shard_a_batch_later(pipe, monkeypatch):
    begun = []
    def later(pipe, prompts, *_):
        begun.append(len(prompts))
        def wait(): raise ValueError("values that are not finite")
        return wait
    monkeypatch.setattr(synthetic_sets, "sample_later", later)
    with pytest.raises(ValueError, match="not finite"): make_shard(replace(SPEC, batch=2), 0, pipe, tqdm(disable=True))
    assert len(begun) == 2


def test_results_are_fetched_one_behind():
    order = []
    class Part:
        def __init__(self, n): self.n = n
        def cpu(self): return order.append(("fetched", self.n)) or self.n
    def work():
        for n in range(3):
            order.append(("queued", n))
            yield Part(n)
    assert list(_one_behind(work())) == [0, 1, 2] and list(_one_behind([])) == []
    assert order == [("queued", 0), ("queued", 1), ("fetched", 0), ("queued", 2), ("fetched", 1), ("fetched", 2)]


def test_a_record_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    assert device_name("cpu") == "cpu" and device_name(torch.device("cuda", 1)) == "cuda:1 (A Card)"


# ---- measuring a card

HIDDEN = ("papermill", "IPython", "datasets", "nbformat", "nbclient", "snakemake", "typer", "sklearn", "matplotlib",
          "seaborn", "peft", "accelerate", "nbdev", "onnx") # which a GPU machine may lack
MEASURE = f"""
import sys
class Without: # what a finder finds, but for some packages
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {HIDDEN} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
from bridgexfer.study.device import main
main("cpu", sys.argv[1], "small")
"""


def test_a_card_is_measured_without_what_runs_notebooks(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 and "of the matrix rate" in done.stdout
    found = measured(tmp_path/"device.csv", H100)
    for job, of in (("generate", "miniature"), ("invert", "miniature"), ("transfer", "mini_resnet10")):
        rate = found.find(job, of)
        assert rate.per_second > 0 and rate.source.startswith("measured: ") and "matrix rate" in rate.source
    left = found.find("transfer", "vit_large")
    assert left.per_second == H100.find("transfer", "vit_large").per_second
    assert left.source.startswith("assumed") and left.source.endswith("of an H100") and "no GPU" in found.device


def test_the_plan_takes_measured_rates_and_marks_the_others(tmp_path, monkeypatch):
    study = Study("paper", datasets="pets")
    (tmp_path/"figures").mkdir()
    table = f"device,job,of,per_second,share\nA card,generate,{SD15},9.4,0.45\nA card,transfer,resnet18,20000,0.3\n"
    (tmp_path/"figures"/"device.csv").write_text(table, encoding="utf-8")
    before = len([job for job in study.jobs() if job.rule == "generate"])
    fast = Study("paper", datasets="pets")
    fast.root = tmp_path
    text = plan_text(fast)
    assert "A card-hours" in text and "9.4 /s, measured: 45% of the card's matrix rate" in text
    assert "5,600 /s, measured: 16 cores read so many" in text # what a card is fed with
    assert "650 /s, assumed: 370 GFLOP an image at 240 TFLOP/s, of an H100" in text
    assert before > len([job for job in fast.jobs() if job.rule == "generate"]) # twice as fast: half as many parts
