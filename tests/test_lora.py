"""LoRA of the generator: what it may see, what a stop may cost (nothing), who opens it, and when it changes nothing."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from bridgexfer import lora as module
from bridgexfer.artefacts import read_json, spec_hash
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import few_shot
from bridgexfer.generation import plan, sample, synthesis_spec, with_lora
from bridgexfer.images import as_images
from bridgexfer.lora import LoraSpec, adapt, lora_spec
from bridgexfer.models import LORA_FILE, LORA_RECORD, adapted, load_pipeline, lora_files, lora_name
from bridgexfer.study.grid import SetKey, Study
from bridgexfer.synthetic_sets import generate
from safetensors.torch import load_file, save_file

NETWORKS = ("text_encoder", "unet", "vae")
STUDY = Study("smoke")


@pytest.fixture(scope="module")
def digits(): return load_dataset("digits")


@pytest.fixture(scope="module")
def few(digits): return few_shot(digits.train, 2, seed=0)


def spec_of(images, **fields):
    return lora_spec("miniature", images, "digits", **dict(steps=4, lr=1e-2, batch=2, rank=2, size=32) | fields)


def set_of(names): return synthesis_spec("miniature", names, steps=2, size=32, batch=7, shard=2)


def pixels_of(spec, root, pipe): return generate(spec, root, 2, pipe=pipe, progress=False).images().pixels


@pytest.fixture(scope="module")
def learned(pipe, few, tmp_path_factory):
    "A LoRA of the UNet and of the text encoder."
    return adapt(spec_of(few, text_encoder=True), few, tmp_path_factory.mktemp("loras"), pipe=pipe)


def state_of(pipe):
    weights = {(n, k): v.clone() for n in NETWORKS for k, v in getattr(pipe, n).state_dict().items()}
    flags = [(p.requires_grad, p.grad is None) for n in NETWORKS for p in getattr(pipe, n).parameters()]
    return weights, flags, [getattr(getattr(pipe, n), "peft_config", None) for n in NETWORKS]


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_pipeline_is_left_as_it_was(model, few, tmp_path, text_encoder):
    pipe = load_pipeline(model)
    pipe.unet.requires_grad_(False)
    weights, flags, adapters = state_of(pipe)
    folder = adapt(spec_of(few, steps=2, text_encoder=text_encoder), few, tmp_path, pipe=pipe)
    with adapted(pipe, lora_files(folder)[0]): assert pipe.unet.peft_config
    after, flags_after, adapters_after = state_of(pipe)
    assert flags == flags_after and adapters == adapters_after == [None] * 3 and weights.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in weights.items())


def test_diffusers_opens_it_and_draws_the_same_images(model, pipe, few, learned, tmp_path):
    spec = set_of(few.names)
    ours = pixels_of(with_lora(spec, learned), tmp_path, pipe)
    theirs = load_pipeline(model)
    theirs.load_lora_weights(str(learned))
    rows = plan(spec, 0, 2)
    assert np.array_equal(ours, sample(theirs, [r.prompt for r in rows], [r.seed for r in rows], spec))
    assert not np.array_equal(ours, pixels_of(spec, tmp_path, pipe))
    assert any(key.startswith("text_encoder.") for key in load_file(learned/LORA_FILE))
    how = dict(num_inference_steps=2, guidance_scale=3.5, height=32, width=32, output_type="np")
    def by_pipeline(p): return p("a photo of a one", generator=torch.Generator().manual_seed(0), **how).images
    with adapted(pipe, lora_files(learned)[0]): inside = by_pipeline(pipe)
    assert np.allclose(inside, by_pipeline(theirs), atol=1e-5)


def test_what_changes_nothing_changes_no_bit(pipe, few, learned, tmp_path):
    "B = 0, rank 0, scale 0; and a set without a LoRA that is made after one with it."
    spec = set_of(few.names)
    without = pixels_of(spec, tmp_path/"before", pipe)
    for untrained in (spec_of(few, steps=0), spec_of(few, rank=0)):
        folder = adapt(untrained, few, tmp_path, pipe=pipe)
        assert np.array_equal(without, pixels_of(with_lora(spec, folder), tmp_path, pipe))
    assert np.array_equal(without, pixels_of(with_lora(spec, learned, 0.), tmp_path, pipe))
    assert not np.array_equal(without, pixels_of(with_lora(spec, learned, .5), tmp_path, pipe))
    assert np.array_equal(without, pixels_of(spec, tmp_path/"after", pipe))


@pytest.mark.parametrize("per_class,stop", [(False, 3), (True, 5)])
def test_a_stopped_run_ends_as_an_unbroken_one(pipe, few, tmp_path, monkeypatch, one_thread, per_class, stop):
    images = few.take(np.flatnonzero(few.labels < 3))
    images = as_images(images.pixels, images.labels, few.names[:3])
    spec = spec_of(images, per_class=per_class, steps=2 if per_class else 4)
    whole = adapt(spec, images, tmp_path/"whole", pipe=pipe, every=2)
    seen, lora_loss = [], module.lora_loss

    def stopping(task, step, part=slice(None)):
        if len(seen) == stop: raise KeyboardInterrupt
        seen.append(step)
        return lora_loss(task, step, part)

    monkeypatch.setattr(module, "lora_loss", stopping)
    with pytest.raises(KeyboardInterrupt): adapt(spec, images, tmp_path/"stopped", pipe=pipe, every=2)
    folder = tmp_path/"stopped"/spec_hash(spec)
    assert (folder/"state.safetensors").exists() and not (folder/LORA_RECORD).exists()
    assert not getattr(pipe.unet, "peft_config", None)
    stop, seen = 10**9, []
    assert adapt(spec, images, tmp_path/"stopped", pipe=pipe, every=2) == folder
    assert len(seen) == 2 # what was saved was not learned again
    for file, other in zip(lora_files(folder), lora_files(whole), strict=True):
        assert file.read_bytes() == other.read_bytes()
    assert read_json(folder/LORA_RECORD)["curve"] == read_json(whole/LORA_RECORD)["curve"]
    assert not (folder/"state.safetensors").exists()


def test_the_lora_of_a_class_depends_on_its_images_alone_and_draws_its_class(pipe, few, tmp_path, one_thread):
    def part(pixels):
        some = few.labels < 2
        return as_images(pixels[some], few.labels[some], few.names[:2])
    pixels = np.random.default_rng(0).integers(0, 256, few.pixels.shape, np.uint8)
    pixels[few.labels == 1] = few.pixels[few.labels == 1]
    parts = [part(few.pixels), part(pixels)]
    folders = [adapt(spec_of(i, per_class=True, steps=2), i, tmp_path, pipe=pipe) for i in parts]
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(*map(lora_files, folders), strict=True)]
    assert same == [False, True]
    spec = set_of(few.names[:2])
    labels = np.tile([0, 1], 2)
    both = pixels_of(with_lora(spec, folders[0]), tmp_path, pipe)
    for label, file in enumerate(lora_files(folders[0])):
        alone = pixels_of(with_lora(spec, file), tmp_path, pipe)
        near = np.abs(both[labels == label].astype(int) - alone[labels == label]).max()
        assert near <= 1 # batches of other sizes round differently
    with pytest.raises(ValueError, match="LoRAs for 2 classes, the set has 3"):
        pixels_of(with_lora(set_of(few.names[:3]), folders[0]), tmp_path, pipe)


@pytest.mark.parametrize("synthesis", ["lora", "lora_class"])
def test_other_test_images_change_nothing(digits, synthesis):
    "A set's address follows from its training images: those of its shots, and of the part that is not held out."
    def address(data, shots=0): return spec_hash(STUDY.synthesis(data, SetKey(synthesis, 3.5, shots, 0)))
    test = as_images(255 - digits.test.pixels, digits.test.labels, digits.info.names)
    assert address(replace(digits, test=test)) == address(digits)
    part = STUDY.held_out(digits, 100)
    other = replace(part, test=as_images(255 - part.test.pixels, part.test.labels, part.test.names))
    assert address(other) == address(part) != address(digits)
    assert len({address(digits), address(digits, 4), address(digits, 1)}) == 3


def test_only_the_given_images_are_encoded(pipe, digits, few, tmp_path):
    with pytest.raises(ValueError, match="not those of the spec"):
        adapt(spec_of(few), digits.train, tmp_path, pipe=pipe)
    part = few.take(np.flatnonzero(few.labels != 7))
    with pytest.raises(ValueError, match="no images of seven"):
        adapt(spec_of(part, per_class=True), part, tmp_path, pipe=pipe)
    with pytest.raises(ValueError, match="weights"): adapt(replace(spec_of(few), weights="x"), few, tmp_path)


def test_specs(few, learned):
    spec = spec_of(few)
    assert LoraSpec(**read_json(learned/LORA_RECORD)["spec"]) == spec_of(few, text_encoder=True)
    others = dict(per_class=True, dataset="x", images="y", weights="w", shots=3, seed=1, steps=9, lr=1.0, batch=3,
                  rank=3, alpha=1.0, text_encoder=True, template="{}", size=64, precision="bfloat16")
    assert len({spec_hash(replace(spec, **{k: v})) for k, v in others.items()} | {spec_hash(spec)}) == len(others) + 1
    plain = set_of(few.names)
    assert spec_hash(plain) == spec_hash(replace(plain, lora="")) and "+" not in plain.weights
    assert len({spec_hash(s) for s in (plain, with_lora(plain, learned), with_lora(plain, learned, .5))}) == 3


def test_a_lora_is_known_by_what_it_contains(pipe, few, learned, tmp_path):
    file = tmp_path/"mine.safetensors"
    file.write_bytes((learned/LORA_FILE).read_bytes())
    assert lora_name(learned) == spec_hash(spec_of(few, text_encoder=True)) != lora_name(file)
    spec = with_lora(set_of(few.names), file)
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="is not that of this spec"): pixels_of(spec, tmp_path, pipe)
    (tmp_path/LORA_RECORD).write_text((learned/LORA_RECORD).read_text())
    file.rename(tmp_path/LORA_FILE)
    with pytest.raises(ValueError, match="not the one that its lora.json describes"): lora_name(tmp_path)


@pytest.mark.parametrize("spoil,said", [
    (lambda t: {k.replace("mid_block", "mid_blocks"): v for k, v in t.items()}, "no place"),
    (lambda t: {k: v[:, :1].contiguous() for k, v in t.items()}, "is no LoRA for this"),
    (lambda t: {"x": torch.ones(1)}, "is no LoRA for this")])
def test_foreign_files_are_named(pipe, learned, tmp_path, spoil, said):
    save_file(spoil(load_file(learned/LORA_FILE)), tmp_path/"foreign.safetensors")
    with pytest.raises(ValueError, match=said):
        with adapted(pipe, tmp_path/"foreign.safetensors"): pass
    assert state_of(pipe)[2] == [None] * 3


def test_commands(tmp_path, capsys):
    from bridgexfer.cli import main
    small = ["digits", "--profile", "smoke", "--device", "cpu", "--set", f"runs={tmp_path}"]
    assert main(["lora", *small, "--json"]) == 0
    import json
    folder = json.loads(capsys.readouterr().out.splitlines()[-1])["folder"]
    assert main(["generate", *small, "--images", "1", "--lora", folder, "--lora-scale", "0.5", "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])["folder"]
    assert read_json(f"{made}/spec.json")["weights"].endswith(f"+{folder.split('/')[-1]}*0.5")
    assert main(["generate", *small, "--images", "1", "--lora", "nowhere"]) == 2
    assert "There is no LoRA at nowhere" in capsys.readouterr().err
