"""CLIP tuning: the head starts as transformers' own zero-shot classifier, and nothing else is trained."""
import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from bridgexfer import clip_tuning
from bridgexfer.artefacts import PACKAGE, spec_hash, stable_hash
from bridgexfer.clip_tuning import CLIP_PIPELINES, ClipSpec, clip_transfer, deal, embed_images, image_embeddings
from bridgexfer.clip_tuning import load_clip, synthetic_loss, tune, zero_shot_head
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import few_shot
from bridgexfer.images import as_images
from bridgexfer.finetune import NonFiniteLoss
from bridgexfer.fixed_features import Head, head_predict
from bridgexfer.miniature.typeset import DIGITS, corpus
from bridgexfer.prompts import SINGLE_TEMPLATE
from bridgexfer.study.records import json_values

FOLDER = PACKAGE/"weights"/"clip"


@pytest.fixture(scope="module")
def clip(): return load_clip("miniature")


@pytest.fixture(scope="module")
def data():
    digits = load_dataset("digits")
    pixels, labels, _ = corpus(200, DIGITS, seed=0)
    synthetic = few_shot(as_images(pixels, labels, DIGITS.values()), 8, seed=0)
    return few_shot(digits.train, 4, seed=0), digits.test.take(np.arange(60)), synthetic


@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("embeddings")


@pytest.fixture
def spec(clip, data):
    return ClipSpec("digits", data=f"all-{data[1].digest}", weights=clip.weights, pipeline="vanilla", shots=4, seed=0,
                    arch="miniature", epochs=3)


@pytest.fixture
def toy():
    rng = np.random.default_rng(0)
    def part(n):
        x = torch.from_numpy(rng.normal(size=(n, 6)).astype(np.float32))
        return F.normalize(x, dim=1).numpy(), rng.integers(0, 4, n)
    return Head(rng.normal(size=(4, 6)).astype(np.float32), np.zeros(4, np.float32)), part(64), part(1024)


def with_synthetic(spec, name, images):
    return replace(spec, pipeline=name, synthesis="single", synthetic=images.digest, per_class=8)


def state(model): return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


@pytest.mark.parametrize("template", ["a photo of a {}.", SINGLE_TEMPLATE[7]])
def test_the_untuned_head_is_zero_shot_classification_by_transformers(clip, data, template):
    "logits_per_image of a CLIPModel opened here, on pixels scaled here."
    test = data[1]
    model = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER)
    ids = tokenizer([template.format(n) for n in test.names], padding=True, return_tensors="pt")
    pixels = torch.from_numpy(test.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad(): logits = model(pixel_values=pixels, **ids).logits_per_image
    z = embed_images(clip, test, batch=17)
    head = zero_shot_head(clip, test.names, (template,))
    assert abs(torch.from_numpy(z @ head.weight.T) - logits).max() < 1e-4 and not head.bias.any()
    assert np.allclose(head_predict(z, head), logits.softmax(1), atol=1e-4)


def test_several_templates_are_averaged_as_directions(clip):
    def unit(w): return w / np.linalg.norm(w, axis=1, keepdims=True)
    names = ("three", "four")
    mean = np.mean([unit(zero_shot_head(clip, names, (t,)).weight) for t in SINGLE_TEMPLATE], 0)
    scale = clip.model.logit_scale.exp().item()
    assert np.allclose(zero_shot_head(clip, names).weight, scale * unit(mean), atol=1e-4)


def test_images_of_another_size_are_resized(clip, data):
    "A photograph of 64 pixels is seen whole: nearly the same as the one of 32."
    large = load_dataset("digits", size=64).test.take(np.arange(60))
    z, other = (embed_images(clip, images) for images in (data[1], large))
    assert (z * other).sum(1).mean() > 0.95 > (z * other[::-1]).sum(1).mean()


def test_embeddings_are_computed_once(clip, data, tmp_path, monkeypatch):
    first = image_embeddings(clip, data[1], tmp_path)
    monkeypatch.setattr(clip_tuning, "embed_images", lambda *args: 1 / 0)
    assert np.array_equal(first, image_embeddings(clip, data[1], tmp_path))
    with pytest.raises(ZeroDivisionError): image_embeddings(clip, data[0], tmp_path)
    with pytest.raises(ZeroDivisionError): image_embeddings(replace(clip, weights="other"), data[1], tmp_path)


def test_the_synthetic_loss_against_a_slow_form():
    rng = np.random.default_rng(0)
    def softmax(v): return np.exp(v) / np.exp(v).sum()
    logits, teacher = 3 * rng.normal(size=(2, 20, 5))
    y = rng.integers(0, 5, 20)
    for T in (1., 2., 4.):
        slow = 0.
        for l, t, c in zip(logits, teacher, y):
            p, q = (softmax(v) for v in (l, t / T))
            slow += (-np.log(p[c]) / 2 - sum(q[k] * np.log(p[k]) for k in range(5)) / 2) / 20
        assert synthetic_loss(*map(torch.from_numpy, (logits, y, teacher)), T).item() == pytest.approx(slow, abs=1e-9)


def test_mixed_tuning_is_separate_batches_with_equal_weights(toy, spec):
    "Against a loop with torch's own parts."
    head, real, made = toy
    [ours, curve] = tune(head, dict(real=real, synthetic=made), replace(spec, epochs=2), seed=3)
    w, b = (torch.from_numpy(p.copy()).requires_grad_() for p in head)
    opt = torch.optim.AdamW([w, b], 1e-3, weight_decay=0.1)
    orders = {k: torch.Generator().manual_seed(stable_hash(3, "order", k)) for k in ("real", "synthetic")}
    def dealt(k, n, size): return torch.randperm(n, generator=orders[k]).split(size)
    x, y, X, Y = (torch.from_numpy(a) for a in (*real, *made))
    losses = []
    for step in range(4):  # 1,024 synthetic rows: two steps an epoch, each with one of the two batches of 64 real rows
        if step % 2 == 0:
            r = dealt("real", 64, 32)
            s = dealt("synthetic", 1024, 512)
        opt.param_groups[0]["lr"] = 1e-3 * (1 + np.cos(np.pi * step / 4)) / 2
        i, j = r[step % 2], s[step % 2]
        logits = X[j] @ w.T + b
        soft = -((X[j] @ torch.from_numpy(head.weight).T / 2).softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss = F.cross_entropy(x[i] @ w.T + b, y[i]) + F.cross_entropy(logits, Y[j]) / 2 + soft / 2
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w, b], 1.)
        opt.step()
        losses.append(loss.item())
    assert np.allclose(ours.weight, w.detach(), atol=1e-6) and np.allclose(ours.bias, b.detach(), atol=1e-6)
    assert [e["loss"] for e in curve] == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:])], abs=1e-5)


@pytest.mark.parametrize(("kinds", "sizes"), [
    (("real", "synthetic"), dict(real=32, synthetic=512)),
    (("synthetic",), dict(synthetic=512)),
    (("real",), dict(real=32)),
])
def test_batches_hold_32_real_and_512_synthetic_images(toy, spec, monkeypatch, kinds, sizes):
    head, real, made = toy
    found, step = [], clip_tuning._step
    def spy(fc, opt, teacher, batches, spec):
        found.append({kind: len(y) for kind, (_, y) in batches.items()})
        return step(fc, opt, teacher, batches, spec)
    monkeypatch.setattr(clip_tuning, "_step", spy)
    parts = dict(real=real, synthetic=made)
    _, curve = tune(head, {kind: parts[kind] for kind in kinds}, spec, 0)
    assert found == [sizes] * 6 and [e["epoch"] for e in curve] == [1, 2, 3]


def test_dealing_passes_over_all_images_before_it_repeats_one():
    stream = deal(100, 32, torch.Generator().manual_seed(0))
    for _ in range(3): assert sorted(torch.cat([next(stream) for _ in range(4)]).tolist()) == list(range(100))


def test_the_gradient_is_clipped(toy, spec, monkeypatch):
    norms, clip_ = [], torch.nn.utils.clip_grad_norm_
    def spy(params, norm):
        clip_(params := list(params), norm)
        norms.append(float(torch.cat([p.grad.flatten() for p in params]).norm()))
    monkeypatch.setattr(clip_tuning.nn.utils, "clip_grad_norm_", spy)
    tune(Head(50 * toy[0].weight, toy[0].bias), dict(real=toy[1]), replace(spec, clip_norm=0.05), 0)
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("name", CLIP_PIPELINES)
def test_only_the_head_trains_and_a_result_has_what_statistics_need(clip, data, spec, root, name):
    real, test, synthetic = data
    if name != "vanilla": spec = with_synthetic(spec, name, synthetic)
    before = state(clip.model)
    result = clip_transfer(spec, clip, real, test, root, synthetic)
    assert state(clip.model) == before
    assert not any(p.requires_grad or p.grad is not None for p in clip.model.parameters())
    assert result["labels"] == test.labels.tolist()
    assert result["accuracy"] == np.mean(np.equal(result["predictions"], result["labels"]))
    zero_shot = head_predict(embed_images(clip, test), zero_shot_head(clip, test.names)).argmax(1)
    assert result["zero_shot"] == np.mean(zero_shot == test.labels)
    assert 0 < result["loss"] < 10
    assert len(result["curve"]) == 3 and ("stage1" in result) == (name == "bridged")
    assert json.loads(json.dumps(json_values(result), allow_nan=False)) == result


def test_the_second_stage_goes_on_from_the_first(clip, data, spec, root, monkeypatch):
    calls = []
    def spy(start, seen, *args):
        result = tune(start, seen, *args)
        calls.append((start, list(seen), result))
        return result
    monkeypatch.setattr(clip_tuning, "tune", spy)
    clip_transfer(with_synthetic(spec, "bridged", data[2]), clip, data[0], data[1], root, data[2])
    (first, kinds1, (between, _)), (second, kinds2, _) = calls
    assert kinds1 == ["synthetic"] and kinds2 == ["real"] and second is between
    assert np.array_equal(first.weight, zero_shot_head(clip, data[1].names).weight)
    assert not np.array_equal(first.weight, between.weight)


def test_the_seed_decides_the_order(clip, data, spec, root):
    def run(seed): return clip_transfer(replace(spec, seed=seed), clip, *data[:2], root)["curve"]
    assert run(0) == run(0) != run(1)


def test_tuning_learns(clip, data, spec, root):
    "Forty images of handwriting, learned by heart: far better on them than zero-shot."
    real = data[0]
    seen = dict(real=(image_embeddings(clip, real, root), real.labels))
    head, curve = tune(zero_shot_head(clip, real.names), seen, replace(spec, epochs=200, lr=0.05), 0)
    assert curve[-1]["train_accuracy"] > 0.95 and curve[-1]["loss"] < 0.5 * curve[0]["loss"]


def test_every_field_that_matters_is_another_record(spec):
    changes = dict(weights="x", seed=1, shots=8, lr=1., epochs=9, batch=8, synthetic_batch=8, weight_decay=0.,
                   temperature=1., clip_norm=2., templates="x", split="validation", data="x")
    hashes = {spec_hash(replace(spec, **{k: v})) for k, v in changes.items()}
    assert len(hashes | {spec_hash(spec)}) == len(changes) + 1
    assert spec_hash(spec) == spec_hash(replace(spec, arch="/elsewhere"))


def test_absent_and_damaged_clips(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="No CLIP at '/no/such/folder'"): load_clip("/no/such/folder")
    with pytest.raises(FileNotFoundError, match="has no config.json"): load_clip(str(tmp_path))
    with pytest.raises(OSError, match="text_encoder is not a whole CLIP .*'clip_text_model'"):
        load_clip(str(PACKAGE/"weights"/"pipeline"/"text_encoder"))
    shutil.copytree(FOLDER, tmp_path/"torn", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(OSError, match="torn is not a whole CLIP"): load_clip(str(tmp_path/"torn"))
    with pytest.raises(OSError, match="is not a whole CLIP .*image processor"):
        load_clip(str(FOLDER))  # only under the name "miniature" is it known how its images are prepared
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="someone/something.* cache .*HF_HUB_OFFLINE is set") as e:
        load_clip("someone/something@v1")
    assert len(str(e.value).splitlines()) == 1


def test_a_folder_with_an_image_processor_is_opened(clip, data, tmp_path):
    shutil.copytree(FOLDER, tmp_path/"mine")
    clip.processor.save_pretrained(tmp_path/"mine")
    mine = load_clip(str(tmp_path/"mine"))
    assert np.array_equal(embed_images(mine, data[1]), embed_images(clip, data[1]))
    assert mine.weights != clip.weights


def test_mistakes_name_what_is_wrong(clip, data, spec, toy, root):
    real, test, synthetic = data
    mixed = with_synthetic(spec, "mixed", synthetic)
    other = as_images(synthetic.pixels, synthetic.labels, tuple("abcdefghij"))
    def run(spec, clip=clip, real=real, test=test, synthetic=None):
        return clip_transfer(spec, clip, real, test, root, synthetic)
    mistakes = [
        (lambda: replace(spec, pipeline="bridged_fc"), "choose vanilla, mixed, bridged"),
        (lambda: replace(spec, pipeline="mixed"), "needs synthesis"),
        (lambda: replace(spec, per_class=3), "takes no synthesis"),
        (lambda: replace(spec, epochs=0), "epochs > 0"),
        (lambda: run(mixed), "needs synthetic images"),
        (lambda: run(mixed, synthetic=other), "different classes"),
        (lambda: run(replace(mixed, per_class=9), synthetic=synthetic), "asks for 9 synthetic images"),
        (lambda: run(replace(spec, shots=8)), "asks for 8 real images"),
        (lambda: run(spec, test=real), "the test images given"),
        (lambda: run(spec, clip=replace(clip, weights="x")), "names the CLIP"),
    ]
    for wrong, words in mistakes:
        with pytest.raises(ValueError, match=words) as e: wrong()
        assert len(str(e.value).splitlines()) == 1
    with pytest.raises(NonFiniteLoss, match="CLIP tuning is .*choose a smaller one"):
        tune(toy[0], dict(real=toy[1]), replace(spec, lr=1e30), 0)
