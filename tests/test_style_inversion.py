"""Style inversion: what may change, what may be read, and what a stop may cost (nothing)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bridgexfer import style_inversion
from bridgexfer.artefacts import read_json, spec_hash
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import few_shot
from bridgexfer.images import as_images
from bridgexfer.models import find_weights, load_pipeline, load_token
from bridgexfer.style_inversion import InversionSpec, denoising_loss, draw, first_row, frozen, inversion_spec, invert
from bridgexfer.style_inversion import latent_moments, step_loss, token_task, token_words
from safetensors.torch import load_file

NETWORKS = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def few(digits):
    return few_shot(digits.train, 2, seed=0)


def spec_of(model, images, **fields):
    return inversion_spec(model, images, "digits", **dict(steps=6, lr=1e-2, batch=2, size=32) | fields)


def rows(folder):
    return load_file(folder / "learned_embeds.safetensors")


def state_of(pipe):
    "All that a pipeline holds which a careless loop would change."
    weights = {(n, k): v.clone() for n in NETWORKS for k, v in getattr(pipe, n).state_dict().items()}
    flags = [(p.requires_grad, p.grad is None) for n in NETWORKS for p in getattr(pipe, n).parameters()]
    modes = [getattr(pipe, n).training for n in NETWORKS]
    return weights, (flags, modes, len(pipe.tokenizer), dict(pipe.scheduler.config), type(pipe.scheduler))


@pytest.mark.parametrize("kind", ["style", "class"])
def test_the_pipeline_is_left_as_it_was(model, few, tmp_path, kind):
    pipe = load_pipeline(model)
    pipe.unet.requires_grad_(False)  # a mix of flags, to be found again
    weights, rest = state_of(pipe)
    folder = invert(spec_of(model, few, kind=kind, steps=2), few, tmp_path, pipe=pipe)
    after, rest_after = state_of(pipe)
    assert rest == rest_after and weights.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in weights.items())
    assert all(not torch.equal(r, first_row(pipe, "photo")) for r in rows(folder).values())


def test_flags_come_back_after_an_error(model, few, tmp_path, monkeypatch):
    pipe = load_pipeline(model)
    monkeypatch.setattr(style_inversion, "step_loss", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        invert(spec_of(model, few), few, tmp_path, pipe=pipe)
    assert all(p.requires_grad for n in NETWORKS for p in getattr(pipe, n).parameters())


def test_gradient_reaches_the_row_alone(model, pipe, few, tmp_path):
    spec = spec_of(model, few)
    task = token_task(spec, 0, pipe, latent_moments(pipe, few, tmp_path, spec.weights), few.labels)
    row = first_row(pipe, "photo").requires_grad_()
    with frozen(pipe.text_encoder, pipe.unet):
        step_loss(task, 0, row).backward()
    assert row.grad.abs().min() > 0
    assert all(p.grad is None for n in NETWORKS for p in getattr(pipe, n).parameters())


def test_the_loss_falls_along_the_gradient(model, pipe, few, tmp_path):
    "The gradient is that of the loss: a difference quotient agrees with it."
    spec = spec_of(model, few)
    task = token_task(spec, 0, pipe, latent_moments(pipe, few, tmp_path, spec.weights), few.labels)
    row = first_row(pipe, "photo").requires_grad_()
    with frozen(pipe.text_encoder, pipe.unet):
        step_loss(task, 0, row).backward()
        way = row.grad / row.grad.norm()
        with torch.no_grad():
            up, down = (step_loss(task, 0, row + s * way).item() for s in (0.05, -0.05))
    assert (up - down) / 0.1 == pytest.approx(row.grad.norm().item(), rel=0.1)


def test_others_open_the_folder(model, few, tmp_path):
    pipe = load_pipeline(model)
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    spec = spec_of(model, few)
    folder = invert(spec, few, tmp_path, pipe=pipe)
    pipe.load_textual_inversion(str(folder))
    after = pipe.text_encoder.get_input_embeddings().weight.detach()
    [word] = token_words(spec)
    assert len(after) == len(before) + 1 and torch.equal(after[:-1], before)
    assert torch.equal(after[pipe.tokenizer.convert_tokens_to_ids(word)], rows(folder)[word])
    assert len(pipe.tokenizer.tokenize(f"a three photo in the style of {word}")) == 8
    classes = replace(spec, kind="class", steps=1)
    assert load_token(pipe, invert(classes, few, tmp_path, pipe=pipe)) == token_words(classes)


def test_a_pipeline_that_knows_other_tokens(model, pipe, few, tmp_path):
    "Tokens that were loaded before are in the same table and change nothing."
    other = load_pipeline(model)
    spec = spec_of(model, few)
    load_token(other, invert(spec_of(model, few, steps=0), few, tmp_path, pipe=pipe))
    a = rows(invert(spec, few, tmp_path / "a", pipe=pipe))
    b = rows(invert(spec, few, tmp_path / "b", pipe=other))
    [word] = token_words(spec)
    assert torch.equal(a[word], b[word])


def test_bfloat16_learns_what_float32_learns(model, pipe, few, tmp_path):
    "Networks compute in bfloat16; token and losses are float32, and near those of float32."
    specs = [spec_of(model, few, steps=20, batch=8, precision=p) for p in ("float32", "bfloat16")]
    folders = [invert(spec, few, tmp_path, pipe=pipe) for spec in specs]
    exact, rounded = (next(iter(rows(folder).values())) for folder in folders)
    curves = [next(iter(read_json(folder / "inversion.json")["curve"]["loss"].values())) for folder in folders]
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert curves[1] == pytest.approx(curves[0], rel=0.05)
    start = first_row(pipe, "photo")
    assert torch.cosine_similarity(exact - start, rounded - start, 0) > 0.9


# ---- stops


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind,stop", [("style", 4), ("class", 9)])
def test_a_stopped_run_ends_as_an_unbroken_one(
    model, pipe, few, tmp_path, monkeypatch, one_thread, kind, stop, precision
):
    spec = spec_of(model, few, kind=kind, steps=6 if kind == "style" else 2, precision=precision)
    whole = invert(spec, few, tmp_path / "whole", pipe=pipe, every=2)
    seen = []

    def stopping(task, step, row, part=slice(None)):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(step)
        return step_loss(task, step, row, part)

    monkeypatch.setattr(style_inversion, "step_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        invert(spec, few, tmp_path / "stopped", pipe=pipe, every=2)
    folder = tmp_path / "stopped" / spec_hash(spec)
    assert [p.name for p in folder.iterdir()] == ["state.safetensors"]
    done = int(load_file(folder / "state.safetensors")["done"])
    assert done == stop - stop % 2 > 0
    stop, seen = 10**9, []
    assert invert(spec, few, tmp_path / "stopped", pipe=pipe, every=2) == folder
    assert len(seen) == spec.steps * len(token_words(spec)) - done  # what was saved was not learned again
    assert (folder / "learned_embeds.safetensors").read_bytes() == (whole / "learned_embeds.safetensors").read_bytes()
    assert read_json(folder / "inversion.json")["curve"] == read_json(whole / "inversion.json")["curve"]
    assert not (folder / "state.safetensors").exists()


def test_nothing_is_learned_twice(model, pipe, few, tmp_path, monkeypatch):
    spec = spec_of(model, few, steps=1)
    folder = invert(spec, few, tmp_path, pipe=pipe)
    monkeypatch.setattr(style_inversion, "step_loss", lambda *a: pytest.fail("learned again"))
    assert invert(spec, few, tmp_path) == folder


# ---- what is read


def test_only_the_given_images_are_encoded_and_only_once(model, pipe, digits, few, tmp_path, monkeypatch):
    seen = []
    encode = style_inversion.encode

    def recording(pipe, pixels, *args):
        seen.append(pixels.copy())
        return encode(pipe, pixels, *args)

    monkeypatch.setattr(style_inversion, "encode", recording)
    for kind in ("style", "class"):
        invert(spec_of(model, few, kind=kind, steps=1), few, tmp_path, pipe=pipe)
    assert np.array_equal(np.concatenate(seen), few.pixels)  # two runs, one encoding
    assert isinstance(latent_moments(pipe, few, tmp_path / "moments", find_weights(model)), np.memmap)
    assert len(list((tmp_path / "moments").iterdir())) == 1
    with pytest.raises(ValueError, match="not those of the spec"):
        invert(spec_of(model, few), digits.train, tmp_path, pipe=pipe)


def test_moments_depend_on_images_and_weights(pipe, digits, tmp_path):
    a = digits.train.take([0, 1])
    b = digits.train.take([2, 3])
    first = latent_moments(pipe, a, tmp_path, "one")
    assert not np.array_equal(first, latent_moments(pipe, b, tmp_path, "one"))
    latent_moments(pipe, a, tmp_path, "two")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_encoding_leaves_nothing(pipe, few, tmp_path, monkeypatch):
    monkeypatch.setattr(style_inversion, "encode", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latent_moments(pipe, few, tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


def test_every_step_has_one_class_and_its_prompt(model, pipe, few):
    task = token_task(spec_of(model, few, batch=8), 0, pipe, None, few.labels)
    drawn = []
    for step in range(300):
        prompt, at, _ = draw(task, step)
        [label] = set(few.labels[at])
        assert prompt == f"a {few.names[label]} photo in the style of {task.word}"
        drawn.append(label)
    assert np.bincount(drawn, minlength=10).min() > 10  # 30 are expected


@pytest.mark.parametrize("kind,same", [("class", True), ("style", False)])
def test_the_token_of_a_class_depends_on_its_images_alone(model, pipe, few, tmp_path, one_thread, kind, same):
    "With the images of the other classes replaced by noise, class three learns the same bits; a style token does not."
    pixels = np.random.default_rng(0).integers(0, 256, few.pixels.shape, np.uint8)
    pixels[few.labels == 3] = few.pixels[few.labels == 3]
    spoilt = as_images(pixels, few.labels, few.names)
    specs = [spec_of(model, i, kind=kind, steps=3) for i in (few, spoilt)]
    by_word = [rows(invert(s, i, tmp_path, pipe=pipe)) for s, i in zip(specs, (few, spoilt))]
    token = 3 if kind == "class" else 0
    a, b = (r[token_words(s)[token]] for r, s in zip(by_word, specs))
    assert torch.equal(a, b) is same
    if kind == "class":
        assert not torch.equal(*(r[token_words(s)[4]] for r, s in zip(by_word, specs)))


# ---- specs and mistakes


def test_untrained_is_the_word_it_starts_from(model, pipe, few, tmp_path, monkeypatch):
    monkeypatch.setattr(style_inversion, "encode", lambda *a: pytest.fail("needs no image"))
    spec = spec_of(model, few, steps=0, init="chalk")
    folder = invert(spec, few, tmp_path, pipe=pipe)
    assert torch.equal(rows(folder)[token_words(spec)[0]], first_row(pipe, "chalk"))
    assert read_json(folder / "inversion.json")["curve"]["loss"] == {token_words(spec)[0]: []}


def test_spec_survives_json_and_says_what_it_is(model, pipe, few, tmp_path):
    spec = spec_of(model, few, shots=2, steps=1)
    assert InversionSpec(**read_json(invert(spec, few, tmp_path, pipe=pipe) / "inversion.json")["spec"]) == spec
    others = dict(kind="class", dataset="x", images="y", names=("a",), weights="w", shots=3, seed=1, steps=9, lr=1.0,
                  batch=3, init="chalk", size=64, precision="bfloat16")
    hashes = {spec_hash(replace(spec, **{k: v})) for k, v in others.items()}
    assert len(hashes | {spec_hash(spec)}) == len(others) + 1


def test_mistakes_are_named(model, pipe, few, digits, tmp_path):
    spec = spec_of(model, few)
    with pytest.raises(ValueError, match="choose another init"):
        invert(replace(spec, init="zwieback"), few, tmp_path, pipe=pipe)
    with pytest.raises(ValueError, match="weights"):
        invert(replace(spec, weights="another"), few, tmp_path, model=model)
    part = few.take(np.flatnonzero(few.labels != 7))
    with pytest.raises(ValueError, match="no images of seven"):
        invert(spec_of(model, part, kind="class"), part, tmp_path, pipe=pipe)
    with pytest.raises(ArithmeticError, match="not finite"):
        invert(replace(spec, lr=1e30), few, tmp_path, pipe=pipe)
    with pytest.raises(ValueError, match="One prompt per image"):
        denoising_loss(pipe, few, ["a"])
    assert not list(tmp_path.glob("*/inversion.json"))


# ---- denoising loss


def test_denoising_loss_is_paired(pipe, few):
    prompts = [f"a photo of a {few.names[c]}." for c in few.labels]
    whole = denoising_loss(pipe, few, prompts, draws=2)
    assert whole.shape == (20,) and not np.allclose(whole, denoising_loss(pipe, few, prompts, draws=2, seed=1))
    at = [3, 11, 17]  # a part of the images, other batches: the same noise and timesteps
    part = denoising_loss(pipe, few.take(at), [prompts[i] for i in at], draws=2, batch=2)
    assert np.allclose(whole[at], part, rtol=1e-4)
    wrong = [f"a photo of a {few.names[(c + 5) % 10]}." for c in few.labels]
    assert denoising_loss(pipe, few, wrong, draws=8).mean() > denoising_loss(pipe, few, prompts, draws=8).mean()


def test_timesteps_are_spread_over_the_schedule(pipe, few, monkeypatch):
    seen = []

    def recording(pipe, z_t, eps, t, c, precision):
        seen.append(t)
        return torch.zeros(len(t))

    monkeypatch.setattr(style_inversion, "noise_error", recording)
    denoising_loss(pipe, few, [""] * len(few), draws=5)
    assert all(((t >= 200 * k) & (t < 200 * (k + 1))).all() for k, t in enumerate(seen)) and len(seen) == 5
    assert len(torch.cat(seen).unique()) > 50


def test_a_model_that_predicts_neither_noise_nor_velocity_is_rejected(model, few):
    pipe = load_pipeline(model)
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="predicts sample"):
        denoising_loss(pipe, few, [""] * len(few))
