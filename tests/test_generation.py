"""Generation under stress: kills, damaged files, mixed specs, batch sizes, strange names, absent models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from bridgexfer.artefacts import spec_hash, write_json
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import few_shot
from bridgexfer.images import as_images
from bridgexfer.generation import SCHEDULERS, SynthesisSpec, embed, encode, make_scheduler, plan, sample, sample_later
from bridgexfer.generation import synthesis_spec
from bridgexfer.models import find_weights, load_pipeline, load_token
from bridgexfer.synthetic_sets import SyntheticSet, bind, card, find_damage, generate, init_images_of, make_shards
from bridgexfer.synthetic_sets import read_spec, shard_path, shard_rows, shard_schema, write_shard
from diffusers.utils import torch_utils
from PIL import Image
from safetensors.torch import save_file
from warm import PROCESSES, spent, start_code

DIGITS = "zero one two three four five six seven eight nine".split()


@pytest.fixture
def spec(model):
    return synthesis_spec(model, DIGITS, steps=2, size=32, batch=16, shard=2)


@pytest.fixture
def made(spec, pipe, tmp_path):
    "A set of three shards."
    return generate(spec, tmp_path / "sets", 6, pipe=pipe, progress=False)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).glob("shard-*.parquet")}


def draw(pipe, rows, spec, **kwargs):
    return sample(pipe, [r.prompt for r in rows], [r.seed for r in rows], spec, **kwargs)


# ---- crash and resume

WORKER = """
import json, sys, torch
torch.set_num_threads(1)
from bridgexfer.generation import synthesis_spec
from bridgexfer.synthetic_sets import generate
model, names, root, fields = json.loads(sys.argv[1])
generate(synthesis_spec(model, names, **fields), root, 8, progress=False)
"""


def test_kill_and_resume(model, pipe, tmp_path, one_thread):
    fields = dict(steps=5, size=32, batch=16, shard=2)
    spec = synthesis_spec(model, DIGITS, **fields)
    given = json.dumps([model, DIGITS, str(tmp_path / "killed"), fields])
    worker = start_code(WORKER, given, log=tmp_path / "log")
    folder = tmp_path / "killed" / spec_hash(spec)
    until = time.time() + 300
    while not contents(folder) and worker.is_alive() and time.time() < until:
        time.sleep(0.01)
    time.sleep(0.05)  # into the next shard
    worker.kill()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    left = contents(folder)
    assert 1 <= len(left) < 4
    resumed = generate(spec, tmp_path / "killed", 8, pipe=pipe, progress=False)
    undisturbed = generate(spec, tmp_path / "whole", 8, pipe=pipe, progress=False)
    assert contents(resumed.folder) == contents(undisturbed.folder)
    assert left.items() <= contents(resumed.folder).items()  # what the killed process had made was kept
    assert len(contents(resumed.folder)) == 4 and resumed.verify() == []


SHARER = """
import json, sys, torch
torch.set_num_threads(1)
from bridgexfer.generation import synthesis_spec
from bridgexfer.models import load_pipeline
from bridgexfer.synthetic_sets import generate
model, names, root, fields = json.loads(sys.argv[1])
pipe, spec = load_pipeline(model), synthesis_spec(model, names, **fields)
start.wait(300)
print(generate(spec, root, 16, pipe=pipe, progress=False).new)
"""


def test_jobs_make_a_set_at_once(model, pipe, tmp_path, one_thread, record_property):
    "Three processes started together: each ends well, with the files that one process makes."
    fields = dict(steps=3, size=32, batch=10, shard=1)
    spec = synthesis_spec(model, DIGITS, **fields)
    given = json.dumps([model, DIGITS, str(tmp_path / "shared"), fields])
    logs = [tmp_path / f"log{k}" for k in range(3)]
    start = PROCESSES.Barrier(3)
    jobs = [start_code(SHARER, given, log=log, start=start) for log in logs]
    for job in jobs: job.join(300)
    record_property("elsewhere", spent(*logs))
    assert [job.exitcode for job in jobs] == [0] * 3
    new = [json.loads(log.read_text()) for log in logs]
    alone = generate(spec, tmp_path / "alone", 16, pipe=pipe, progress=False)
    shared = SyntheticSet(tmp_path / "shared" / spec_hash(spec))
    assert contents(shared.folder) == contents(alone.folder) and len(contents(alone.folder)) == 16
    assert shared.verify(per_class=16) == [] and not list(shared.folder.glob("*.part"))
    assert sorted({k for made in new for k in made}) == alone.new == list(range(16))
    assert all(made == sorted(made) for made in new)
    assert generate(spec, tmp_path / "shared", 16, pipe=pipe, progress=False).new == []


def test_ranges_of_shards_make_a_set(made, spec, pipe, tmp_path):
    for numbers in (range(2, 3), range(0, 2)):
        assert make_shards(spec, tmp_path / "ranges", numbers, pipe=pipe, progress=False) == list(numbers)
    assert contents(tmp_path / "ranges") == contents(made.folder)


def test_a_shard_that_appears_meanwhile_is_skipped(made, spec, pipe, tmp_path, monkeypatch):
    "While the first shard is being sampled, another job leaves the second."
    def slow(*args):
        shutil.copy(shard_path(made.folder, 1), tmp_path / "sets")
        return sample_later(*args)

    whole = contents(made.folder)
    made.folder.rename(tmp_path / "elsewhere")
    made.folder = tmp_path / "elsewhere"
    monkeypatch.setattr("bridgexfer.synthetic_sets.sample_later", slow)
    assert make_shards(spec, tmp_path / "sets", range(3), pipe=pipe, progress=False) == [0, 2]
    assert contents(tmp_path / "sets") == whole


def test_nothing_is_made_twice(made, spec, monkeypatch):
    monkeypatch.setattr("bridgexfer.synthetic_sets.sample_later", lambda *a: pytest.fail("sampled again"))
    assert generate(spec, made.folder.parent, 5, progress=False).per_class == 6


def test_prefix(made, spec, pipe):
    before, six = contents(made.folder), made.images(6)
    grown = generate(spec, made.folder.parent, 9, pipe=pipe, progress=False)
    assert grown.per_class == 10 and before.items() < contents(grown.folder).items()
    for n in (1, 3, 6):
        assert np.array_equal(grown.images(n).pixels, six.pixels[: 10 * n])
        assert np.bincount(grown.images(n).labels).tolist() == [n] * 10


# ---- find_damage


def test_truncated_shard(made, spec, pipe):
    whole, path = contents(made.folder), shard_path(made.folder, 1)
    path.write_bytes(path.read_bytes()[:-50])
    assert made.per_class == 2  # nothing behind the hole is handed out
    assert [name for name, _ in made.verify()] == ["shard-00001.parquet"]
    assert generate(spec, made.folder.parent, 6, pipe=pipe, progress=False).verify() == []  # resuming remakes it, too
    path.write_bytes(path.read_bytes()[:100])
    shard_path(made.folder, 0).unlink()
    repaired = made.verify(repair=True, pipe=pipe, progress=False)
    assert [name for name, _ in repaired] == ["shard-00000.parquet", "shard-00001.parquet"]
    assert contents(made.folder) == whole and made.verify() == []


def test_verify_knows_how_many_there_should_be(made):
    shard_path(made.folder, 2).unlink()
    assert made.verify() == [] and made.verify(per_class=6) == [("shard-00002.parquet", "missing")]


def test_flipped_bytes(made, spec):
    "Wherever a byte is flipped, either it is noticed or every value that is read is the right one."
    path = shard_path(made.folder, 0)
    whole, table = path.read_bytes(), made.table(2)
    noticed = 0
    for at in np.random.default_rng(0).permutation(len(whole))[:150]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        reason = find_damage(path, spec, 0)
        noticed += bool(reason)
        assert reason or made.table(2).equals(table), f"byte {at} of {len(whole)}"
    assert noticed > 140


def test_image_that_matches_its_own_page(made, spec, pipe):
    "An image that was replaced, page checksum and all, is not the one that was written."
    import pyarrow as pa

    table = made.table(2)
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = rows[4]["image"]["bytes"]
    write_shard(shard_path(made.folder, 0), pa.Table.from_pylist(rows, schema=shard_schema(spec, 0)))
    assert made.verify() == [("shard-00000.parquet", "1 of its images are not those that were written")]
    assert made.verify(repair=True, pipe=pipe, progress=False) and made.verify() == []  # though its footer was whole
    shutil.copy(shard_path(made.folder, 2), shard_path(made.folder, 0))
    assert made.verify() == [("shard-00000.parquet", "not this shard's rows")]


# ---- specs never mix


def test_another_spec_is_rejected(made, spec, pipe, tmp_path):
    other = replace(spec, guidance=8)
    with pytest.raises(ValueError, match=r"belongs to another spec \(guidance 3.5, not 8.0\)"):
        bind(made.folder, other)
    there = tmp_path / "sets" / spec_hash(other)
    shutil.copytree(made.folder, there)  # by hand, under the other's name
    with pytest.raises(ValueError, match="belongs to another spec"):
        generate(other, tmp_path / "sets", 6, pipe=pipe, progress=False)
    shutil.copy(generate(other, tmp_path / "elsewhere", 2, pipe=pipe, progress=False).folder / "spec.json", there)
    with pytest.raises(ValueError, match="made by another spec"):
        generate(other, tmp_path / "sets", 6, pipe=pipe, progress=False)
    assert contents(there) == contents(made.folder) and SyntheticSet(there).per_class == 0


@pytest.mark.parametrize(
    "field, value",
    [("weights", "x"), ("steps", 3), ("guidance", 2), ("size", 64), ("stored_size", 16), ("format", "jpeg"),
     ("seed", 1), ("version", 2), ("precision", "bfloat16"), ("scheduler", "DDIM"), ("names", DIGITS[::-1]),
     ("shard", 3), ("templates", "style"), ("class_words", [f"<{n}>" for n in DIGITS]), ("token_hash", "1a2b"),
     ("init_images", "3c4d")],
)  # fmt: skip
def test_changed_spec_is_another_folder(spec, field, value):
    extra = {"templates": {"style": "chalk"}, "init_images": {"strength": 0.5}}.get(field, {})
    assert spec_hash(replace(spec, **{field: value}, **extra)) != spec_hash(spec)


def test_retrained_weights_are_another_set(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    old = synthesis_spec(str(folder), DIGITS, steps=2, size=32)
    assert spec_hash(old) == spec_hash(synthesis_spec(model, DIGITS, steps=2, size=32))  # a copy is the same model
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert spec_hash(synthesis_spec(str(folder), DIGITS, steps=2, size=32)) != spec_hash(old)
    with pytest.raises(ValueError, match="are not those of this spec"):
        generate(old, tmp_path / "sets", 1, progress=False)
    assert not list((tmp_path / "sets").rglob("*.parquet"))


def test_spec_survives_the_disk(made, spec):
    assert read_spec(made.folder) == spec and hash(read_spec(made.folder)) == hash(spec)
    write_json(made.folder / "spec.json", {"colour": "red"})
    with pytest.raises(ValueError, match="spec.json is not the spec of a synthetic set"):
        SyntheticSet(made.folder)


def test_spec_with_tokens_and_init_images_survives_the_disk(spec, tmp_path):
    words = [f"<w{k}>" for k in range(10)]
    full = replace(spec, class_words=words, token_hash="1a2b", token_folder="there", init_images="3c4d", strength=1)
    bind(tmp_path, full)
    assert read_spec(tmp_path) == full and hash(read_spec(tmp_path)) == hash(full) and type(full.strength) is float


# ---- noise


@pytest.fixture
def noise(monkeypatch):
    "Every normal number that sampling draws, by call and by seed."
    drawn, original = defaultdict(list), torch_utils.randn_tensor

    def record(shape, generator=None, device=None, dtype=None, **kwargs):
        out = original(shape, generator=generator, device=device, dtype=dtype, **kwargs)
        for g, x in zip(generator, out, strict=True):
            drawn[g.initial_seed()].append(x.numpy().copy())
        return out

    monkeypatch.setattr(torch_utils, "randn_tensor", record)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", record)
    return drawn


def test_noise_does_not_depend_on_the_batch(pipe, spec, noise):
    rows = plan(spec, 0, 7)[:64]
    spec = replace(spec, steps=3)
    pictures, numbers = {}, {}
    shuffled = np.random.default_rng(0).permutation(64)
    for name, order, batch in [("64", np.arange(64), 64), ("7", np.arange(64), 7), ("shuffled", shuffled, 7)]:
        noise.clear()
        images = draw(pipe, [rows[i] for i in order], replace(spec, batch=batch))
        pictures[name] = images[np.argsort(order)].astype(int)
        numbers[name] = np.stack([np.stack(noise[r.seed]) for r in rows])  # (image, draw, channel, h, w)
    draws = numbers["64"].shape[1]
    assert draws >= 3  # the first latents and the steps; whether the last one draws is the scheduler's business
    assert len(np.unique(numbers["64"].reshape(64 * draws, -1), axis=0)) == 64 * draws  # no two alike
    for name in ("7", "shuffled"):
        assert np.array_equal(numbers[name], numbers["64"])  # to the bit
        assert np.abs(pictures[name] - pictures["64"]).max() <= 1  # to rounding


def test_noise_does_not_depend_on_precision(model, pipe, spec, noise):
    draw(pipe, rows := plan(spec, 0, 1), spec)
    exact = {r.seed: np.stack(noise[r.seed]) for r in rows}
    noise.clear()
    images = draw(load_pipeline(model, "bfloat16"), rows, replace(spec, precision="bfloat16"))
    assert all(np.array_equal(np.stack(noise[seed]), x) for seed, x in exact.items())
    assert np.abs(images.astype(int) - draw(pipe, rows, spec)).mean() < 8


def test_same_noise_for_every_guidance(spec):
    rows, others = plan(spec, 0, 5), plan(replace(spec, guidance=8, steps=7, weights="x"), 0, 5)
    assert rows == others and not {r.seed for r in rows} & {r.seed for r in plan(replace(spec, seed=1), 0, 5)}


# ---- against diffusers


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_same_images_as_diffusers(model, spec, scheduler):
    pipe = load_pipeline(model)
    spec = replace(spec, scheduler=scheduler, steps=5)
    rows = plan(spec, 0, 1)
    ours = draw(pipe, rows, spec).astype(int)
    pipe.scheduler = make_scheduler(pipe, scheduler)
    generators = [torch.Generator().manual_seed(r.seed) for r in rows]
    theirs = pipe([r.prompt for r in rows], num_inference_steps=5, guidance_scale=3.5, height=32, width=32,
                  generator=generators, output_type="np").images  # fmt: skip
    assert np.abs(ours - (theirs * 255).round()).max() <= 1


def test_guidance_is_equation_one(pipe, spec, monkeypatch):
    "With a stub that answers 2 with a prompt and 1 without one, the prediction is 2w + (1 - w)."
    predictions, calls = [], []
    step = diffusers.DDPMScheduler.step

    def recording(self, eps, *args, **kwargs):
        predictions.append(eps)
        return step(self, eps, *args, **kwargs)

    monkeypatch.setattr(diffusers.DDPMScheduler, "step", recording)

    def unet(x, t, condition, return_dict):
        calls.append(len(x))
        return (torch.ones_like(x) * (1 + (condition[:, 1:2, :1, None] != empty[:, 1:2, :1, None])),)

    with torch.inference_mode():
        empty = embed(pipe, [""], {})
    monkeypatch.setattr(pipe.unet, "forward", unet)
    for w in (0.5, 1.0, 3.5):
        draw(pipe, plan(spec, 0, 1), replace(spec, guidance=w, steps=1))
        assert torch.allclose(predictions.pop(), torch.tensor(2 * w + (1 - w)))
    assert calls == [20, 10, 20]  # w = 1 needs no empty prompt


def test_another_pipeline(model, pipe, spec, tmp_path):
    "Any text-to-image pipeline: here a Stable Diffusion XL of a few random weights."
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    text = CLIPTextConfig.from_dict({**pipe.text_encoder.config.to_dict(), "num_hidden_layers": 2})
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2, norm_num_groups=8,
        cross_attention_dim=2 * text.hidden_size, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + text.projection_dim,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    encoders = dict(text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text))
    tokenizers = dict(tokenizer=pipe.tokenizer, tokenizer_2=pipe.tokenizer)
    networks = dict(vae=pipe.vae, unet=unet, scheduler=scheduler, **encoders, **tokenizers)
    diffusers.StableDiffusionXLPipeline(**networks, add_watermarker=False).save_pretrained(tmp_path / "xl")
    spec = synthesis_spec(str(tmp_path / "xl"), DIGITS[:3], steps=2, size=32, batch=4, shard=1, seed=3)
    xl = load_pipeline(str(tmp_path / "xl"))
    made = generate(spec, tmp_path / "sets", 2, pipe=xl, progress=False)
    assert type(xl).__name__ == "StableDiffusionXLPipeline" and type(xl.scheduler).__name__ == "EulerDiscreteScheduler"
    assert made.verify() == [] and made.images().pixels.shape == (6, 32, 32, 3)
    one = draw(xl, plan(spec, 0, 1), replace(spec, batch=1))
    assert np.abs(one.astype(int) - made.images(1).pixels).max() <= 2


# ---- Real Guidance


@pytest.fixture(scope="module")
def train():
    return load_dataset("digits", size=32).train


@pytest.fixture
def guided(spec, train):
    "A spec that starts from two scans of each digit, and the scans."
    two = few_shot(train, 2, seed=0)
    return replace(spec, steps=6, init_images=two.digest, strength=0.5), two


def test_ends_of_real_guidance(pipe, guided, monkeypatch):
    spec, two = guided
    rows = plan(spec, 0, 1)
    real = two.pixels[:10]
    mean = encode(pipe, real).chunk(2, dim=1)[0]
    assert torch.equal(mean, pipe.vae.encode(torch.from_numpy(real).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean)

    def sample_of(**fields):
        return draw(pipe, rows, replace(spec, **fields), init_images=real)

    from_noise = draw(pipe, rows, replace(spec, init_images="", strength=None))
    assert np.array_equal(sample_of(strength=1), from_noise)
    assert not np.array_equal(sample_of(strength=0.99), from_noise)
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("the UNet was asked"))
    with torch.inference_mode():
        copy = pipe.vae.decode(mean).sample
    copy = ((copy / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(sample_of(strength=0).astype(int) - copy).max() <= 1
    assert np.array_equal(sample_of(strength=0.1), sample_of(strength=0))  # less than one step of six


@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM", "DPM++", "Euler", "Euler a", "UniPC", "PNDM"])
def test_same_images_as_img2img(model, guided, scheduler):
    pipe = load_pipeline(model)
    spec, two = guided
    spec = replace(spec, scheduler=scheduler, steps=8, strength=0.4)
    rows = plan(spec, 0, 1)
    real = two.pixels[::2]
    ours = draw(pipe, rows, spec, init_images=real).astype(int)
    components = pipe.components | {"scheduler": make_scheduler(pipe, scheduler)}
    img2img = diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(r.seed) for r in rows]
    theirs = img2img([r.prompt for r in rows], [Image.fromarray(p) for p in real], strength=0.4, num_inference_steps=8,
                     guidance_scale=3.5, generator=generators, output_type="np").images  # fmt: skip
    assert np.abs(ours - (theirs * 255).round()).max() <= 1


def test_init_images_are_of_the_class_and_of_the_run(pipe, spec, train, monkeypatch, tmp_path):
    two = few_shot(train, 2, seed=0)
    spec = replace(spec, steps=1, init_images=two.digest, strength=0, shard=4)
    seen, original = [], sample_later

    def spy(pipe, prompts, seeds, spec, cache, init_images, fits):
        seen.extend(zip(prompts, init_images, strict=True))
        return original(pipe, prompts, seeds, spec, cache, init_images)

    monkeypatch.setattr("bridgexfer.synthetic_sets.sample_later", spy)
    made = generate(spec, tmp_path, 8, pipe=pipe, progress=False, init_images=two)
    rows = [r for k in made.new for r in shard_rows(spec, k)]
    assert len(rows) == 80 and [prompt for prompt, _ in seen] == [r.prompt for r in rows]
    passed = {p.tobytes(): label for p, label in zip(two.pixels, two.labels, strict=True)}
    # a KeyError would be an image from elsewhere
    assert [passed[p.tobytes()] for _, p in seen] == [r.label for r in rows]
    assert len({p.tobytes() for _, p in seen}) == 20  # each of them is used
    halves = [init_images_of(spec, some, two) for some in (rows[:9], rows[9:])]
    assert np.array_equal(init_images_of(spec, rows, two), np.concatenate(halves))
    order = np.random.default_rng(0).permutation(10)  # the same classes under other labels
    other = as_images(two.pixels, np.argsort(order)[two.labels], [two.names[k] for k in order])
    relabelled = replace(spec, init_images=other.digest)
    assert np.array_equal(init_images_of(relabelled, rows, other), init_images_of(spec, rows, two))
    whole = contents(made.folder)
    shard_path(made.folder, 0).unlink()
    with pytest.raises(ValueError, match="pass them as init_images"):
        made.verify(repair=True, pipe=pipe, progress=False, per_class=8)
    repaired = made.verify(True, 8, pipe=pipe, progress=False, init_images=two)
    assert repaired == [("shard-00000.parquet", "missing")]
    assert contents(made.folder) == whole and made.verify() == []


def test_wrong_init_images(pipe, guided, train, tmp_path):
    spec, two = guided
    with pytest.raises(ValueError, match=f"starts from the real images {two.digest}: pass them"):
        generate(spec, tmp_path, 1, pipe=pipe, progress=False)
    with pytest.raises(ValueError, match=f"the spec starts from {two.digest}"):
        generate(spec, tmp_path, 1, pipe=pipe, progress=False, init_images=few_shot(train, 2, seed=1))
    with pytest.raises(ValueError, match="the spec starts from noise"):
        generate(replace(spec, init_images="", strength=None), tmp_path, 1, pipe=pipe, progress=False, init_images=two)
    some = two.take(np.flatnonzero(two.labels < 8))
    with pytest.raises(ValueError, match="nothing of eight, nine"):
        generate(replace(spec, init_images=some.digest), tmp_path, 1, pipe=pipe, progress=False, init_images=some)
    assert not list(tmp_path.rglob("*.parquet"))
    with pytest.raises(ValueError, match="no init_images were given"):
        sample(pipe, ["a"], [0], spec)
    with pytest.raises(ValueError, match="the spec has no strength"):
        sample(pipe, ["a"], [0], replace(spec, init_images="", strength=None), init_images=two.pixels[:1])
    with pytest.raises(ValueError, match="One init image per prompt, got 2 for 1"):
        sample(pipe, ["a"], [0], spec, init_images=two.pixels[:2])
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="no pipeline beside StableDiffusionImg2ImgPipeline"):
        sample(other, ["a"], [0], spec, init_images=two.pixels[:1])


def test_real_guidance_does_not_depend_on_the_batch(pipe, guided, train):
    spec, two = guided
    rows = plan(spec, 0, 2)
    real = two.pixels[init_images_of(spec, rows, two)]
    whole = draw(pipe, rows, spec, init_images=real)
    parts = draw(pipe, rows[::-1], replace(spec, batch=7), init_images=real[::-1])
    assert np.abs(whole.astype(int) - parts[::-1]).max() <= 1


# ---- words and tokens


def test_class_words_are_in_prompts_and_nowhere_else(spec):
    words = [f"<abc{k}>" for k in range(10)]
    rows = plan(replace(spec, class_words=words), 0, 20)
    plain = plan(spec, 0, 20)
    assert "a photo of a <abc0>." in {r.prompt for r in plan(replace(spec, class_words=words), 0, 200)}
    assert [r._replace(prompt="") for r in rows] == [r._replace(prompt="") for r in plain]
    assert replace(spec, class_words=DIGITS) == spec  # a name that stands for itself
    assert spec_hash(replace(spec, class_words=words)) != spec_hash(spec) == spec_hash(replace(spec, class_words=None))


@pytest.fixture
def token(pipe, tmp_path):
    "A folder with two learned tokens."
    vectors = torch.randn(2, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    (folder := tmp_path / "token").mkdir()
    save_file({"<abc0>": vectors[0].clone(), "<abc1>": vectors[1].clone()}, folder / "learned_embeds.safetensors")
    return folder, vectors


def test_load_token(model, token, tmp_path):
    folder, vectors = token
    pipe = load_pipeline(model)
    size = len(pipe.tokenizer)
    state = torch.get_rng_state()
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    for _ in range(2):
        assert load_token(pipe, folder) == ("<abc0>", "<abc1>")
        after = pipe.text_encoder.get_input_embeddings().weight
        assert len(pipe.tokenizer) == len(after) == size + 2
        assert torch.equal(after[:size], before) and torch.equal(after[size:], vectors)
    assert pipe.tokenizer("a <abc1>.").input_ids[2] == size + 1 and torch.equal(torch.get_rng_state(), state)
    zero = torch.zeros(len(before[0]))
    save_file({"<abc0>": zero, "<abc2>": zero.clone()}, folder / "learned_embeds.safetensors")
    load_token(pipe, folder)  # one is new
    after = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(after[size : size + 2], vectors) and not after[size + 2].any()
    save_file({"<abc3>": torch.zeros(7)}, folder / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match="<abc3> in .* has 7 numbers"):
        load_token(pipe, folder)
    with pytest.raises(FileNotFoundError, match="nowhere holds no learned token.*run the inversion"):
        load_token(pipe, tmp_path / "nowhere")


def test_sets_with_learned_tokens(model, token, spec, tmp_path):
    folder, _ = token
    style = replace(spec, steps=1, shard=1, templates="style", style="<abc0>", token_hash="1a2b")
    with pytest.raises(ValueError, match="lacks the learned tokens 1a2b"):
        generate(style, tmp_path / "sets", 1, progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere holds no learned token.*run the inversion"):
        generate(replace(style, token_folder="nowhere"), tmp_path / "sets", 1, progress=False)
    with pytest.raises(ValueError, match="teaches <abc0>, <abc1>, which are neither"):
        generate(replace(style, style="<abc7>", token_folder=str(folder)), tmp_path / "sets", 1, progress=False)
    opened = load_pipeline(model)
    with_folder = replace(style, token_folder=str(folder))
    made = generate(with_folder, tmp_path / "sets", 1, pipe=opened, progress=False)  # the open one is taught
    assert "<abc0>" in opened.tokenizer.get_vocab()
    again = generate(style, tmp_path / "again", 1, pipe=opened, progress=False)  # it has them: no folder is needed
    itself = generate(with_folder, tmp_path / "itself", 1, progress=False)  # opens and teaches its own
    assert contents(made.folder) == contents(again.folder) == contents(itself.folder)
    unknown = generate(replace(style, token_hash=""), tmp_path / "unknown", 1, progress=False)
    # a pipeline that was not taught reads the letters
    assert not np.array_equal(unknown.images().pixels, made.images().pixels)
    classes = replace(with_folder, templates="single", style=None, names=DIGITS[:2], class_words=("<abc0>", "<abc1>"))
    assert len(generate(classes, tmp_path / "sets", 1, progress=False).images()) == 2
    assert shard_rows(classes, 0)[1].prompt.count("<abc1>") == 1


# ---- names and formats


STRANGE = ("F/A-18", "../../etc", "$(touch hacked); rm -rf ~", "Königsberger Klöpse", "三", "a\\b:c*?", ".hidden",
           "line\nbreak", "x" * 20, "{0} {}")  # fmt: skip


def test_strange_names_stay_inside(model, pipe, tmp_path):
    from torchvision.datasets import ImageFolder

    spec = synthesis_spec(model, STRANGE, steps=1, size=32, shard=1, batch=10)
    made = generate(spec, tmp_path / "sets", 1, pipe=pipe, progress=False)
    rows = made.table().to_pylist()
    assert "F/A-18" in rows[0]["prompt"] and "{0} {}" in rows[9]["prompt"]
    made.export(tmp_path / "export")
    names = [row["image"]["path"] for row in rows]
    paths = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] + names
    parts = [part for path in paths for part in path.split("/")]
    assert all(part.replace("-", "").replace(".", "").isalnum() and part.isascii() for part in parts)
    assert len(list((tmp_path / "export").iterdir())) == 10 and not any("/" in name for name in names)
    assert [label for _, label in ImageFolder(tmp_path / "export").samples] == list(range(10))
    assert made.images().names == STRANGE and read_spec(made.folder) == spec
    with pytest.raises(ValueError, match="longer than the 32 tokens"):
        generate(synthesis_spec(model, ("x" * 300,), steps=1, size=32), tmp_path/"long", 1, pipe=pipe, progress=False)


def test_hugging_face_datasets(model, pipe, tmp_path):
    from datasets import ClassLabel, load_dataset
    from PIL.Image import Image

    names = ("F/A-18", "Königin", "三")
    spec = synthesis_spec(model, names, steps=1, size=32, shard=2)
    made = generate(spec, tmp_path / "sets", 4, pipe=pipe, progress=False)
    files = str(made.folder / "shard-*.parquet")
    there = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(there.features["label"], ClassLabel) and there.features["label"].names == list(names)
    assert all(isinstance(i, Image) for i in there["image"]) and there["label"] == [0, 1, 2] * 4
    assert np.array_equal(np.stack([np.asarray(i) for i in there["image"]]), made.images().pixels)


def test_export(made, tmp_path):
    from torchvision.datasets import ImageFolder

    images = made.images(3)
    folders = ImageFolder(made.export(tmp_path / "export", 3))
    assert folders.classes[:2] == ["000-zero", "001-one"]
    for c in range(10):
        theirs = [np.asarray(folders[i][0]) for i, label in enumerate(folders.targets) if label == c]
        assert np.array_equal(theirs, images.pixels[images.labels == c])
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        made.export(tmp_path / "export", 3)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


WRITER = r"""
import sys
from bridgexfer.generation import SynthesisSpec
from bridgexfer.synthetic_sets import card
card(SynthesisSpec(["K\u00f6nigin", "\u4e09"], "x", "miniature"), 4, "\u201cquoted\u201d").save(sys.argv[1])
"""


def test_the_card_is_one_of_the_hub(made, tmp_path):
    "Metadata that the hub reads, and text that does not depend on the machine's encoding."
    from huggingface_hub import DatasetCard

    data = DatasetCard.load(made.folder / "README.md").data
    assert data.license == "unknown" and data.tags == ["synthetic"]  # the model is a folder without a card
    assert data.configs == [{"config_name": "default", "data_files": "shard-*.parquet"}]
    ascii_alone = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "README.md")], env=ascii_alone, check=True)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == str(card(SynthesisSpec(["Königin", "三"], "x", "miniature"), 4, "“quoted”")) and "Königin" in text
    assert DatasetCard(text).data.license == "apache-2.0"


def test_smaller_jpegs(model, pipe, spec, tmp_path):
    small = generate(replace(spec, format="jpeg", stored_size=16), tmp_path, 2, pipe=pipe, progress=False)
    assert small.images().pixels.shape == (20, 16, 16, 3) and small.verify() == []
    assert small.table()["image"][0].as_py()["bytes"][:2] == b"\xff\xd8"


# ---- what is rejected


@pytest.mark.parametrize(
    "wrong, says",
    [({"steps": 0}, "steps is a whole number of at least 1"), ({"guidance": -1}, "guidance is a positive number"),
     ({"guidance": float("nan")}, "guidance"), ({"size": 0}, "size"), ({"stored_size": -1}, "stored_size"),
     ({"scheduler": "LMS"}, "choose DDPM, DDIM"), ({"precision": "int8"}, "choose float32, bfloat16"),
     ({"format": "webp"}, "choose png, jpeg"), ({"names": []}, "at least one class name"),
     ({"names": ["cat", ""]}, "labels 1 are empty"), ({"names": ["cat", "dog", "cat"]}, "more than once: cat"),
     ({"names": ["a  cat", "a cat "]}, "more than once: a cat"), ({"names": "cat"}, "list of class names"),
     ({"class_words": ["a"] * 9}, "One word for each of the 10 classes, got 9"),
     ({"class_words": ["a"] * 10}, "Words for classes must differ.*: a"),
     ({"class_words": [" ", *DIGITS[1:]]}, "Words for classes are words; those of the labels 0"),
     ({"class_words": "0123456789"}, "class_words is a list of words"), ({"strength": 0.5}, "needs both init_images"),
     ({"init_images": "x"}, "needs both init_images"), ({"strength": 1.1, "init_images": "x"}, r"in \[0, 1\]"),
     ({"strength": float("nan"), "init_images": "x"}, "strength"),
     ({"token_folder": "there"}, "token_hash is the hash of the tokens learned in there"),
     ({"templates": "fancy"}, "choose 'single' or 'style'"), ({"templates": "style"}, "needs the word")],
)  # fmt: skip
def test_wrong_specs(wrong, says):
    with pytest.raises(ValueError, match=says):
        SynthesisSpec(**{"names": DIGITS, "weights": "x", **wrong})


def test_wrong_requests(made, spec, pipe, tmp_path):
    with pytest.raises(ValueError, match="has 6 images per class, asked for 7"):
        made.images(7)
    with pytest.raises(ValueError, match="per_class is a whole number"):
        generate(spec, tmp_path, 0)
    with pytest.raises(ValueError, match="size is a multiple of 4"):
        draw(pipe, plan(spec, 0, 1), replace(spec, size=30))
    with pytest.raises(FileNotFoundError, match="it has no spec.json: give"):
        SyntheticSet(tmp_path)


def test_scheduler_that_does_not_fit(pipe, spec, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="DDPM does not fit StableDiffusionPipeline.* choose default"):
        draw(pipe, plan(spec, 0, 1), spec)


def test_absent_models(model, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="No text-to-image model at '/no/such/folder'"):
        load_pipeline("/no/such/folder")
    with pytest.raises(FileNotFoundError, match="has no model_index.json"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match="choose float32, bfloat16, float16"):
        load_pipeline(model, "half")
    shutil.copytree(model, tmp_path / "torn", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(OSError, match="torn is not a whole text-to-image model"):
        load_pipeline(str(tmp_path / "torn"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="someone/something.* cache .*HF_HUB_OFFLINE is set") as e:
        load_pipeline("someone/something@v1")
    assert len(str(e.value).splitlines()) == 1


def test_a_branch_is_recorded_as_its_commit(tmp_path, monkeypatch):
    cache = tmp_path/"models--someone--something"
    old, new = "0" * 39 + "a", "0" * 39 + "b"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for commit in (old, new):
        (cache/"snapshots"/commit).mkdir(parents=True)
        for file in ("model_index.json", "config.json"): (cache/"snapshots"/commit/file).write_text("{}")
    (cache/"refs").mkdir()
    for commit in (old, new):
        (cache/"refs"/"main").write_text(commit)
        for name in ("someone/something", "someone/something@main"):
            for kind in ("pipeline", "clip"): assert find_weights(name, kind) == f"someone/something@{commit}"
        assert synthesis_spec("someone/something", DIGITS).weights.endswith(commit)
    assert find_weights(f"someone/something@{old}") == f"someone/something@{old}"
    with pytest.raises(OSError, match="which commit someone/something@v1 is: .*name the commit, someone") as e:
        find_weights("someone/something@v1")
    assert len(str(e.value).splitlines()) == 1


def test_a_large_plan_takes_seconds():
    spec = SynthesisSpec([f"class number {i}" for i in range(400)], "x")
    started = time.process_time()
    rows = plan(spec, 0, 3000)
    assert time.process_time() - started < 30
    assert len(rows) == 1_200_000 and rows[:8000] == plan(spec, 0, 20) and rows[-8000:] == plan(spec, 2980, 3000)


# ---- memory

def test_images_do_not_depend_on_the_memory(pipe, spec, monkeypatch):
    "A device that holds two images at a time draws those of batches of two, and says so."
    rows = plan(spec, 0, 1)[:6]
    network = pipe.unet.forward
    def small(z, *args, **kwargs):
        if len(z) > 2 * (1 + (spec.guidance != 1)): raise torch.OutOfMemoryError("CUDA out of memory")
        return network(z, *args, **kwargs)

    two = draw(pipe, rows, replace(spec, batch=2))
    monkeypatch.setattr(pipe.unet, "forward", small)
    with pytest.warns(UserWarning, match="too small for 6 at a time: trying 3"):
        assert np.abs(draw(pipe, rows, replace(spec, batch=6)).astype(int) - two).max() <= 1


def test_memory_that_holds_no_image_is_an_error(pipe, spec, monkeypatch):
    def none(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(pipe.unet, "forward", none)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        draw(pipe, plan(spec, 0, 1)[:4], spec)
