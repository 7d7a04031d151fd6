"""What a machine computes in, and how much of it at once: fakes stand for GPUs and for memory that is exhausted."""
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bridgexfer import evaluation, finetune as finetuning, generation, models, style_inversion
from bridgexfer import images as images_module
from bridgexfer.artefacts import read_json
from bridgexfer.backbones import create_backbone
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import GLYPHS, few_shot
from bridgexfer.evaluation import autocast, predict
from bridgexfer.finetune import FinetuneSpec, begin, finetune
from bridgexfer.generation import sample, synthesis_spec
from bridgexfer.models import AtOnce, cpu_precision, gpu_precision, gradient_scaler, load_pipeline, native_precision
from bridgexfer.models import precision_on
from bridgexfer.style_inversion import denoising_loss, inversion_spec, invert
from bridgexfer.synthetic_sets import generate

SPEC = FinetuneSpec(0.03, 3, augment=GLYPHS)


@pytest.fixture(scope="module")
def few(): return few_shot(load_dataset("digits").train, 8, 0)


@pytest.fixture
def machine(monkeypatch): # of another precision
    def set_to(precision):
        monkeypatch.setattr(models, "native_precision", lambda device: precision)
    return set_to


@pytest.fixture(scope="module")
def tiny(): # a set's spec
    return synthesis_spec("miniature", ("zero", "one"), steps=2, size=32, stored_size=32, precision="bfloat16", shard=2,
                          batch=8)


# ---- which precision

@pytest.mark.parametrize(("capability", "amd", "expected"), (
    ((5, 2), False, "float32"), ((6, 1), False, "float32"), ((7, 0), False, "float16"), ((7, 5), False, "float16"),
    ((8, 0), False, "bfloat16"), ((8, 9), False, "bfloat16"), ((12, 0), False, "bfloat16"), ((7, 0), True, "bfloat16")))
def test_a_gpu_computes_in_what_it_is_fast_in(capability, amd, expected, monkeypatch):
    assert gpu_precision(capability, amd) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", "6.0" if amd else None)
    with warnings.catch_warnings(action="ignore"): assert native_precision("cuda:1") == expected
    assert precision_on("cuda", "float32") == "float32"


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_it_once(monkeypatch):
    assert cpu_precision({}) == "float32" and cpu_precision(dict(amx_bf16=True)) == cpu_precision(dict(bf16=1))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx2=True, avx512_bf16=False))
    models._say_precision.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [precision_on("cpu") for _ in range(3)] == ["float32"] * 3
    assert [str(w.message) for w in said] == [
        "The cpu of this machine has no bfloat16: it computes in float32 where that is asked for."]
    models._say_precision.cache_clear()
    with warnings.catch_warnings(action="ignore"), autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_precision_that_is_asked_for_outright_is_kept(machine):
    machine("float16")
    assert [precision_on("cpu", p) for p in ("float32", "bfloat16", "float16")] == ["float32", "float16", "float16"]
    with pytest.raises(ValueError, match="Unknown precision 'int8'"): precision_on("cpu", "int8")


# ---- training and evaluation

@pytest.mark.parametrize("precision", ("float16", "float32"))
def test_other_precisions_train_as_bfloat16_does(few, precision, machine):
    def trained():
        model = create_backbone("mini_vit", 10, 0)
        return [c["loss"] for c in finetune(model, few.take(np.arange(0, 80, 5)), SPEC, 0)]
    usual = trained()
    machine(precision)
    assert np.abs(np.subtract(trained(), usual)).max() < 0.05


def test_a_step_that_overflows_is_left_out(few, machine):
    machine("float16")
    t = begin(create_backbone("mini_resnet10", 10, 0), few, replace(SPEC, lr=1e-6), 0)
    assert t.scaler.is_enabled() and t.scaler.get_scale() == 2**10
    scaler = torch.amp.GradScaler("cpu", init_scale=2.**60) # beyond float16
    before = [p.detach().clone() for p in t.model.parameters()]
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    finetuning.train_step(t.model, t.opt, x, y, 0., None, t.spec.soften, scaler)
    assert all(map(torch.equal, before, t.model.parameters())) and scaler.get_scale() == 2**59


def test_a_training_in_float16_resumes(few, machine, tmp_path):
    machine("float16")
    def trained(**how):
        model = create_backbone("mini_vit", 10, 0)
        return finetune(model, few.take(np.arange(0, 80, 5)), SPEC, 0, **how)
    whole = trained(state=tmp_path/"state", every=0)
    assert trained(state=tmp_path/"state", every=0) == whole


def test_what_overflows_in_float16_is_evaluated_in_float32(few, machine):
    model = create_backbone("mini_resnet10", 10, 0)
    model.conv1.weight.data *= 1e7 # normalisation undoes it, from a range that float16 has not
    model.bn1.running_mean *= 1e7
    model.bn1.running_var *= 1e14
    usual = predict(model, few)
    machine("float16")
    with autocast("cpu"), torch.inference_mode():
        assert not model(torch.rand(2, 3, 32, 32)).isfinite().all()
    assert np.allclose(predict(model, few), usual, atol=0.02)


# ---- generation

def test_a_set_says_what_it_was_computed_in(tiny, machine, tmp_path):
    machine("float16")
    made = generate(tiny, tmp_path, 2, progress=False)
    assert read_json(made.folder/"shard-00000.json")["precision"] == "float16"
    assert made.spec.precision == "bfloat16" # what was asked for


def test_a_model_that_overflows_in_float16_is_opened_in_float32(machine, monkeypatch):
    machine("float16")
    assert load_pipeline("miniature", "bfloat16").dtype == torch.float16
    opened = models._open
    def wide(folder, dtype): # a model with a large activation
        pipe = opened(folder, dtype)
        if dtype == torch.float16: pipe.vae.decoder.conv_out.weight.data += torch.inf
        return pipe
    monkeypatch.setattr(models, "_open", wide)
    with pytest.warns(UserWarning, match="miniature overflows in float16: it computes in float32"):
        assert load_pipeline("miniature", "bfloat16").dtype == torch.float32
    assert load_pipeline("miniature", "float16").dtype == torch.float16 # asked for outright: a set of it stops


@pytest.mark.parametrize("value", (torch.nan, -1.))
def test_nan_and_black_images_stop_their_shard(value, tiny, tmp_path, monkeypatch):
    pipe = load_pipeline("miniature")
    monkeypatch.setattr(pipe.vae, "decode", lambda z, return_dict: (torch.full((len(z), 3, 32, 32), value),))
    with pytest.raises(ValueError, match="none of this shard is stored. Its weights are damaged") as e:
        generate(tiny, tmp_path, 2, pipe=pipe, progress=False)
    assert len(str(e.value).splitlines()) == 1 and not list(tmp_path.rglob("*.parquet"))


def test_black_images_of_any_pipeline_are_rejected(tiny, monkeypatch):
    def black(**how): return SimpleNamespace(images=np.zeros((2, 32, 32, 3)))
    pipe = load_pipeline("miniature")
    monkeypatch.setattr(type(pipe), "__call__", lambda self, **how: black())
    monkeypatch.setattr(generation, "takes_loop", lambda pipe: False)
    with pytest.raises(ValueError, match="2 of 2 images that are black"): sample(pipe, ["a", "b"], [0, 1], tiny)


# ---- memory

def test_what_fits_is_found_once_for_a_shard(tiny, tmp_path, monkeypatch):
    tried = []
    decoded = generation.decode_later
    def small(pipe, z):
        tried.append(len(z))
        if len(z) > 2: raise torch.OutOfMemoryError
        return decoded(pipe, z)
    usual = generate(tiny, tmp_path/"usual", 4, progress=False)
    monkeypatch.setattr(generation, "decode_later", small)
    with pytest.warns(UserWarning, match="too small for 4 at a time: trying 2") as said:
        made = generate(replace(tiny, shard=4, batch=4), tmp_path/"small", 4, progress=False)
    assert tried == [4, 2, 2, 2, 2] and len([w for w in said if "too small" in str(w.message)]) == 1
    near = np.abs(made.images(4).pixels.astype(int) - usual.images(4).pixels.astype(int))
    assert near.mean() < 2 # rounding of bfloat16


def test_evaluation_is_bounded_by_pixels_and_halves(few, monkeypatch):
    model = create_backbone("mini_resnet10", 10, 0)
    usual = predict(model, few)
    sizes = []
    computed = evaluation._computed
    def recording(compute, x):
        sizes.append(len(x))
        if len(x) > 20: raise torch.OutOfMemoryError
        return computed(compute, x)
    monkeypatch.setattr(evaluation, "_computed", recording)
    monkeypatch.setattr(evaluation, "EVALUATED", 40 * 32**2)
    with pytest.warns(UserWarning, match="too small for 40 at a time: trying 20"): p = predict(model, few)
    assert sizes == [40, 20, 20, 20, 20] and np.allclose(p, usual, atol=1e-2)


def test_guesses_are_bounded_by_pixels_and_the_loss_is_the_same(few, monkeypatch):
    pipe = load_pipeline("miniature")
    some = few.take(np.arange(6))
    prompts = ["a photo"] * 6
    usual = denoising_loss(pipe, some, prompts, draws=2)
    sizes = []
    error = style_inversion.noise_error
    def recording(pipe, z_t, *rest):
        sizes.append(len(z_t))
        return error(pipe, z_t, *rest)
    monkeypatch.setattr(style_inversion, "noise_error", recording)
    monkeypatch.setattr(style_inversion, "AT_ONCE", 4 * 32**2)
    assert np.allclose(denoising_loss(pipe, some, prompts, draws=2), usual, rtol=1e-4) and sizes == [4, 4, 2, 2]


@pytest.mark.parametrize("precision", ("float32", "float16"))
def test_a_step_of_inversion_that_does_not_fit_is_taken_in_parts(few, precision, machine, tmp_path, monkeypatch):
    def learned(name):
        asked = "float32" if precision == "float32" else "bfloat16"
        spec = inversion_spec("miniature", few, "digits", "style", steps=3, batch=5, size=32, precision=asked, lr=0.01)
        made = read_json(invert(spec, few, tmp_path/name)/"inversion.json")
        assert made["precision"] == precision
        return made["curve"]["loss"]
    machine(precision)
    usual = learned("usual")
    sizes = []
    error = style_inversion.noise_error
    def small(pipe, z_t, *rest):
        sizes.append(len(z_t))
        if len(z_t) > 3: raise torch.OutOfMemoryError
        return error(pipe, z_t, *rest)
    monkeypatch.setattr(style_inversion, "noise_error", small)
    with pytest.warns(UserWarning, match="too small for 5 at a time: trying 3"): parts = learned("small")
    assert sizes == [5, *[3, 2] * 3]
    assert np.allclose(*(list(c.values()) for c in (parts, usual)), rtol=1e-3)


def test_one_that_does_not_fit_alone_is_an_error():
    def never(part): raise torch.OutOfMemoryError("CUDA out of memory")
    w = torch.zeros(1, requires_grad=True)
    opt = torch.optim.SGD([w], 0.1)
    with warnings.catch_warnings(action="ignore"), pytest.raises(torch.OutOfMemoryError):
        models.gradients_in_parts(never, 4, AtOnce(4), opt, gradient_scaler("cpu", "float32"))


# ---- processors

@pytest.mark.parametrize(("own", "files", "cores"), (
    ("0::/", {"cpu.max": "200000 100000"}, 2),
    ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, .5),
    ("0::/a", {"cpu.max": "max 100000"}, np.inf), ("", {"cpu.max": "300000 100000"}, 3),
    ("5:memory:/m\n4:cpu,cpuacct:/job", {"cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
                                         "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 1.5),
    ("4:cpu:/docker/1", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, np.inf),
    ("nonsense", {"cpu.max": "nonsense"}, np.inf)))
def test_the_smallest_quota_of_all_groups_holds(own, files, cores, tmp_path, monkeypatch):
    (tmp_path/"own").write_text(own)
    for name, text in files.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text + "\n")
    assert images_module._quota(top=tmp_path, own=tmp_path/"own") == cores
    monkeypatch.setattr(images_module, "_quota", lambda: cores)
    monkeypatch.setattr(images_module.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert images_module.available_cores() == max(1, min(8, int(min(cores, 8))))


def test_a_command_takes_no_more_threads_than_its_quota_has_cores(monkeypatch):
    from bridgexfer import cli
    taken = []
    monkeypatch.setattr(images_module, "_quota", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    assert cli._device("cpu") == "cpu" and taken == [1]
