"""Fixed features: computed once, never confused, and only heads are trained on them."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridgexfer import fixed_features
from bridgexfer.artefacts import spec_hash, stable_hash
from bridgexfer.backbones import backbone_digest, create_backbone, reset_head
from bridgexfer.evaluation import features, predict
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import Dataset, GLYPHS, few_shot
from bridgexfer.images import as_images
from bridgexfer.finetune import FinetuneSpec, NonFiniteLoss
from bridgexfer.fixed_features import FIXED_PIPELINES, FeatureSpec, Head, cached_features, fixed_spec
from bridgexfer.fixed_features import PLAIN, fixed_transfer, head_of, head_predict, head_spec, train_heads
from bridgexfer.miniature.typeset import DIGITS, corpus
from bridgexfer.study.records import json_values
from bridgexfer.transfer import BridgeSpec, Run, load_bridge, make_bridge, start_of, transfer_spec

ARCH = "mini_resnet10"
STAGE1 = FinetuneSpec(0.03, 2, augment=GLYPHS)


def heads_spec(lr, epochs, **fields): return head_spec(FinetuneSpec(lr, epochs, **fields))


def trained(spec, **changes): # a run's spec, its head trained otherwise
    return replace(spec, finetune=replace(spec.finetune, **changes))


@pytest.fixture(scope="module")
def data():
    digits = load_dataset("digits")
    return few_shot(digits.train, 10, seed=0), digits.test.take(np.arange(150))


@pytest.fixture(scope="module")
def synthetic():
    pixels, labels, _ = corpus(200, DIGITS, seed=0)
    return as_images(pixels, labels, DIGITS.values())


@pytest.fixture(scope="module")
def bridge_spec(synthetic): return BridgeSpec(ARCH, backbone_digest(ARCH), synthetic.digest, 20, 4, STAGE1)


@pytest.fixture(scope="module")
def bridge(synthetic, bridge_spec, tmp_path_factory):
    return make_bridge(bridge_spec, synthetic, tmp_path_factory.mktemp("bridges"))


def spec_for(data, name, seed=4, synthetic=""):
    stages = STAGE1, FinetuneSpec(0.03, 5, mixup=0.2, augment=GLYPHS)
    dataset = Dataset(load_dataset("digits").info, *data)
    return fixed_spec(transfer_spec(Run(name, 0, seed, 20), dataset, ARCH, stages, synthetic), 0.1)


@pytest.fixture(scope="module")
def spec(data): return spec_for(data, "vanilla")


@pytest.fixture(scope="module")
def bridged(data, synthetic): return [spec_for(data, p, synthetic=synthetic.digest) for p in FIXED_PIPELINES[1:]]


@pytest.fixture
def toy():
    rng = np.random.default_rng(0)
    def normal(*shape): return rng.normal(size=shape).astype(np.float32)
    x = normal(101, 7)
    y = rng.integers(0, 4, 101)
    return x, y, [Head(normal(4, 7), normal(4)) for _ in range(3)]


def arrays(heads): return np.concatenate([np.concatenate([p.ravel() for p in h]) for h in heads])


def test_features_are_computed_once_and_found_again(tmp_path):
    calls = []
    def make():
        calls.append(1)
        return np.arange(6.).reshape(3, 2)
    spec = FeatureSpec("a", "w", "i")
    for _ in range(2):
        x = cached_features(tmp_path, spec, make)
        assert x.tolist() == [[0, 1], [2, 3], [4, 5]] and x.dtype == np.float32 and isinstance(x, np.memmap)
    assert len(calls) == 1
    with pytest.raises(ValueError): x[0] = 1  # read-only
    for change in (dict(arch="b"), dict(weights="v"), dict(images="j"), dict(version=2)):
        cached_features(tmp_path, replace(spec, **change), make)
    assert len(calls) == 5 and len(list(tmp_path.iterdir())) == 5


def test_features_that_were_half_made_are_made_again(tmp_path):
    spec = FeatureSpec("a", "w", "i")
    with pytest.raises(ZeroDivisionError): cached_features(tmp_path, spec, lambda: 1 / 0)
    assert not list(tmp_path.rglob("*.json"))
    folder = tmp_path/spec_hash(spec)
    folder.mkdir()
    (folder/"features.npy").write_bytes(b"half")
    assert cached_features(tmp_path, spec, lambda: np.ones((2, 2))).sum() == 4
    (folder/"features.npy").write_bytes((folder/"features.npy").read_bytes()[:-4])
    with pytest.raises(ValueError, match="delete it and run again"): cached_features(tmp_path, spec, lambda: 1 / 0)
    for wrong in (np.ones(3), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="finite table"):
            cached_features(tmp_path, replace(spec, weights="x"), lambda: wrong)


def test_heads_that_train_together_are_those_that_train_alone(toy):
    x, y, starts = toy
    specs = [heads_spec(lr, 4, batch=16) for lr in (0.3, 0.1, 0.01)]
    seeds = [0, 1, 1]
    together, curves = train_heads(x, y, specs, seeds, starts)
    for i in range(3):
        [alone], [curve] = train_heads(x, y, specs[i:i + 1], seeds[i:i + 1], starts[i:i + 1])
        assert np.allclose(arrays([together[i]]), arrays([alone]), atol=1e-5)
        assert [e["epoch"] for e in curve] == [1, 2, 3, 4]
        for a, b in zip(curve, curves[i]):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["train_accuracy"] == b["train_accuracy"]


def test_a_head_is_that_of_plain_sgd(toy):
    "torch's own layer, optimiser and schedule, on the batches that fine-tuning would deal."
    x, y, starts = toy
    [ours], _ = train_heads(x, y, [heads_spec(0.1, 3, batch=25, momentum=0.8, weight_decay=0.01)], [5], starts[:1])
    fc = nn.Linear(7, 4)
    fc.load_state_dict({k: torch.from_numpy(v) for k, v in starts[0]._asdict().items()})
    opt = torch.optim.SGD(fc.parameters(), 0.1, 0.8, weight_decay=0.01)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 3 * 5)
    order = torch.Generator().manual_seed(stable_hash(5, "order"))
    for _ in range(3):
        for at in torch.randperm(101, generator=order).tensor_split(5):
            opt.zero_grad()
            F.cross_entropy(fc(torch.from_numpy(x)[at]), torch.from_numpy(y)[at]).backward()
            opt.step()
            sched.step()
    assert np.allclose(ours.weight, fc.weight.detach(), atol=1e-6)
    assert np.allclose(ours.bias, fc.bias.detach(), atol=1e-6)


def test_the_seed_decides_the_order_and_the_start_is_not_changed(toy):
    x, y, starts = toy
    before = arrays(starts)
    def end(seed): return arrays(train_heads(x, y, [heads_spec(0.1, 2, batch=16)], [seed], starts[:1])[0])
    a, b, c = (end(seed) for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and np.array_equal(before, arrays(starts))


@pytest.mark.parametrize("arch", ["mini_resnet10", "mini_vit"])
def test_a_bridge_predicts_with_its_own_head_before_any_step(data, bridge, arch):
    model = load_bridge(bridge, 10) if arch == ARCH else create_backbone(arch, 10)
    x = features(model, data[1])
    p = head_predict(x, head_of(model))
    q = predict(model, data[1])
    top = np.sort(q, 1)
    clear = top[:, -1] - top[:, -2] > 0.05  # the model multiplies in bfloat16
    assert abs(p - q).max() < 0.05 and clear.mean() > 0.2 and (p.argmax(1) == q.argmax(1))[clear].all()
    fresh = head_predict(x, head_of(reset_head(model, 10, 3)))
    assert abs(p - fresh).max() > 0.05


def test_the_three_cases_start_where_fine_tuning_starts(data, spec, bridged, bridge, tmp_path, monkeypatch):
    seen = []
    def spy(x, y, specs, seeds, starts, *args):
        seen.extend(starts)
        return train_heads(x, y, specs, seeds, starts, *args)
    monkeypatch.setattr(fixed_features, "train_heads", spy)
    fixed_transfer([spec], *data, tmp_path)
    fixed_transfer(bridged, *data, tmp_path, bridge)
    for head, of in zip(seen, [spec, *bridged], strict=True):
        model, _ = start_of(of, data[0], None, bridge)
        assert all(np.array_equal(a, b) for a, b in zip(head, head_of(model)))
    assert len(list(tmp_path.iterdir())) == 4  # train and test, with and without a bridge


def test_only_the_head_trains_and_features_are_shared(data, bridged, bridge, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(fixed_features, "features", lambda *args, **kw: calls.append(1) or features(*args, **kw))
    stored = {p: p.read_bytes() for p in bridge.iterdir()}
    specs = [trained(s, lr=lr) for s in bridged for lr in (0.1, 0.01)]
    first = fixed_transfer(specs, *data, tmp_path, bridge)
    for s, r in zip(specs, first):
        [again] = fixed_transfer([s], *data, tmp_path, bridge)
        assert np.mean(np.equal(again["predictions"], r["predictions"])) > 0.98  # equal up to rounding
    assert len(calls) == 2 and stored == {p: p.read_bytes() for p in bridge.iterdir()}


def test_a_result_has_what_the_statistics_need(data, spec, tmp_path):
    results = fixed_transfer([trained(replace(spec, seed=s), epochs=20) for s in (0, 1)], *data, tmp_path)
    for r in results:
        assert r["labels"] == data[1].labels.tolist()
        assert r["accuracy"] == np.mean(np.equal(r["predictions"], r["labels"])) > 0.5
        assert 0 < r["loss"] < np.log(10) # better than chance
        assert json.loads(json.dumps(json_values(r), allow_nan=False)) == r
    assert results[0]["curve"] != results[1]["curve"]
    [per_class] = fixed_transfer([replace(spec, metric="mean_per_class")], *data, tmp_path)
    labels = data[1].labels
    right = np.array(per_class["predictions"]) == labels
    assert per_class["accuracy"] == pytest.approx(np.mean([right[labels == c].mean() for c in range(10)]))


def test_the_result_does_not_depend_on_the_test_images(data, spec, tmp_path):
    train, test = data
    other = as_images(255 - test.pixels, np.roll(test.labels, 7), test.names)
    [a] = fixed_transfer([spec], train, test, tmp_path)
    [b] = fixed_transfer([replace(spec, data=f"{train.digest}-{other.digest}")], train, other, tmp_path)
    assert a["curve"] == b["curve"] and a["predictions"] != b["predictions"]


def test_a_spec_follows_from_that_of_a_fine_tuning(data, synthetic, bridge_spec):
    "Only the training differs: the head alone, at its own rate, on images as they are."
    dataset = Dataset(load_dataset("digits").info, *data)
    stages = STAGE1, FinetuneSpec(0.03, 150, 32, 0.8, 1e-3, 0.2, GLYPHS)
    whole = transfer_spec(Run("bridged_fc", 0, 4, 20), dataset, ARCH, stages, synthetic.digest)
    fixed = fixed_spec(whole, lr=0.1)
    assert replace(fixed, finetune=whole.finetune) == whole and fixed.bridge == bridge_spec
    assert fixed.finetune == FinetuneSpec(0.1, 150, 32, 0.8, 1e-3, 0., PLAIN, frozen=True)
    assert spec_hash(fixed) != spec_hash(fixed_spec(whole, lr=0.3)) != spec_hash(whole)


def test_every_field_that_matters_is_another_record(spec):
    changes = dict(lr=1., epochs=2, batch=3, momentum=0., weight_decay=0.)
    specs = [spec, replace(spec, seed=1), replace(spec, data="x")]
    specs += [trained(spec, **{k: v}) for k, v in changes.items()]
    assert len(set(map(spec_hash, specs))) == 8


def test_a_last_step_that_diverges_has_no_result(data, spec, tmp_path):
    "An epoch of one step has the loss from before it, which is finite."
    with pytest.raises(NonFiniteLoss, match="a head on test images is .* in epoch 1 of 1"):
        fixed_transfer([trained(spec, lr=1e38, epochs=1, batch=100)], *data, tmp_path)


def test_mistakes_name_what_is_wrong(data, spec, bridged, toy, tmp_path):
    x, y, starts = toy
    once = [heads_spec(0.1, 1)]
    mistakes = [
        (lambda: spec_for(data, "mixed"), "choose vanilla, bridged, bridged_fc"),
        (lambda: heads_spec(0.1, 0), "epochs ≥ 1"),
        (lambda: train_heads(x[0], y, once, [0], starts[:1]), r"features \(n, d\)"),
        (lambda: train_heads(x, y[1:], once, [0], starts[:1]), r"labels \(n,\)"),
        (lambda: train_heads(x, y - 1, once, [0], starts[:1]), r"must be in 0\.\.3, found -1\.\.2"),
        (lambda: train_heads(x[:, 1:], y, once, [0], starts[:1]), "width 6"),
        (lambda: train_heads(x, y, [*once, heads_spec(0.1, 2)], [0, 0], starts[:2]), "differ in learning rate"),
        (lambda: fixed_transfer([spec, bridged[0]], *data, tmp_path), "differ in bridge"),
        (lambda: fixed_transfer(bridged, *data, tmp_path, tmp_path), "name the bridge"),
        (lambda: fixed_transfer([spec], data[1], data[0], tmp_path), "name the images"),
    ]
    for wrong, words in mistakes:
        with pytest.raises(ValueError, match=words) as e: wrong()
        assert len(str(e.value).splitlines()) == 1
    with pytest.raises(NonFiniteLoss, match="a head is .*choose a smaller one"):
        train_heads(x, y, [heads_spec(1e30, 3)], [0], starts[:1])
