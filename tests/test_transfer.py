"""Transfer: what is shared is found again, what has changed is not, and nothing is chosen on test images."""
import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import bridgexfer.finetune as finetune_module
import bridgexfer.transfer as transfer_module
from bridgexfer import backbones
from bridgexfer.artefacts import read_json, spec_hash
from bridgexfer.backbones import ARCHS, backbone_digest, create_backbone
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import Dataset, GLYPHS
from bridgexfer.evaluation import predict
from bridgexfer.finetune import FinetuneSpec, NonFiniteLoss, begin, finetune, load_state, save_state, train_epoch
from bridgexfer.images import as_images
from bridgexfer.miniature.typeset import DIGITS, corpus
from bridgexfer.study.grid import Study
from bridgexfer.transfer import (BridgeSpec, CONTROLS, PIPELINES, Run, image_passes, join, load_bridge, make_bridge,
                                 pipeline, transfer, transfer_spec)
from warm import start_code

ARCH = "mini_resnet10"
STAGES = (FinetuneSpec(0.03, 1, augment=GLYPHS), FinetuneSpec(0.03, 2, augment=GLYPHS))


@pytest.fixture(scope="module")
def synthetic():
    pixels, labels, _ = corpus(200, DIGITS, seed=0)
    return as_images(pixels, labels, DIGITS.values())


@pytest.fixture(scope="module")
def data():
    digits = load_dataset("digits")
    return Dataset(digits.info, digits.train.take(np.arange(300)), digits.test.take(np.arange(100)))


def spec_for(data, name, shots=4, seed=0, per_class=20, synthetic="x", arch=ARCH, stages=STAGES, **fields):
    return transfer_spec(Run(name, shots, seed, per_class), data, arch, stages, synthetic, **fields)


def run(data, name, synthetic, root, **fields):
    return transfer(spec_for(data, name, synthetic=synthetic.digest, **fields), data, synthetic, root)


def one_step(**fields): return replace(STAGES[1], epochs=1, **fields)


def weights(model): return torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.parametrize("arch", [a for a, b in ARCHS.items() if b.shipped])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_runs_with_every_shipped_backbone(data, synthetic, tmp_path, arch, name):
    _, result = run(data, name, synthetic, tmp_path, arch=arch)
    assert 0 <= result["accuracy"] <= 1 and len(result["predictions"]) == 100
    assert [e["epoch"] for e in result["curve"]] == [1, 2]
    json.dumps(result, allow_nan=False)


def test_controls_are_what_they_say(data, synthetic, tmp_path):
    spec = {name: spec_for(data, name, synthetic=synthetic.digest) for name in (*PIPELINES, *CONTROLS)}
    assert all(pipeline(n).tuned_as in PIPELINES for n in CONTROLS) and not any(p.tuned_as for p in PIPELINES.values())
    assert [n for n, s in spec.items() if s.finetune and s.finetune.mixup] == ["vanilla_mixup", "mixed_mixup"]
    assert [n for n, s in spec.items() if s.bridge] == [n for n in spec if pipeline(n).bridged]
    assert spec["bridged_mixup"].bridge == spec["bridged_pp"].bridge
    assert spec["bridged_mixup"].bridge != spec["bridged"].bridge == spec["synthetic"].bridge
    assert [n for n, s in spec.items() if not s.finetune] == ["synthetic"]
    model, result = transfer(spec["synthetic"], data, synthetic, tmp_path)
    bridge = load_bridge(tmp_path/spec_hash(spec["synthetic"].bridge), 10)
    assert result["curve"] == [] and torch.equal(weights(model), weights(bridge)) # no real image was trained on


def test_the_same_compute_is_as_many_images_to_a_batch():
    "Vanilla with the same compute sees as many images as both stages of bridged transfer together."
    study = Study("smoke", stage1_epochs="3", few_epochs="2")
    digits = load_dataset("digits")
    specs = {n: study.spec(digits, ARCH, Run(n, 4, 0, 30)) for n in ("vanilla_long", "bridged_pp")}
    stage1 = 30 * 10 * specs["bridged_pp"].bridge.finetune.epochs # images
    both = stage1 + image_passes(specs["bridged_pp"], 40, 10)
    assert (stage1, both) == (900, 980) and 0 <= image_passes(specs["vanilla_long"], 40, 10) - both < 40


def test_shuffled_labels_are_the_same_labels_in_another_order(data, synthetic, tmp_path, monkeypatch):
    "The control's bridge sees the images and the counts of bridged++'s, and no other pipeline shares it."
    specs = {n: spec_for(data, n, synthetic=synthetic.digest) for n in (*PIPELINES, *CONTROLS)}
    assert [n for n, s in specs.items() if s.bridge == specs["shuffled"].bridge] == ["shuffled"]
    assert replace(specs["shuffled"].bridge, shuffled=False) == specs["bridged_pp"].bridge
    seen = []
    def spy(model, images, *args): seen.append(images) or finetune(model, images, *args)
    monkeypatch.setattr(transfer_module, "finetune", lambda model, images, *args: spy(model, images, *args) or [])
    for name in ("bridged_pp", "shuffled"): make_bridge(specs[name].bridge, synthetic, tmp_path)
    make_bridge(replace(specs["shuffled"].bridge, seed=1), synthetic, tmp_path)
    ordered, shuffled, other = seen
    assert np.array_equal(ordered.labels, synthetic.labels)
    for images in (shuffled, other):
        assert np.array_equal(images.pixels, synthetic.pixels) and images.names == synthetic.names
        assert np.bincount(images.labels).tolist() == np.bincount(synthetic.labels).tolist()
        assert np.mean(images.labels == synthetic.labels) < 0.25 # a tenth by chance
    assert not np.array_equal(shuffled.labels, other.labels)
    bridges = [load_bridge(tmp_path/spec_hash(specs[n].bridge), 10) for n in ("bridged_pp", "shuffled")]
    assert not torch.equal(*map(weights, bridges))


def test_mixed_images_repeat_the_real_ones(data, synthetic):
    "By hand: 3 repeats of 5 real images, then 200 synthetic ones; an epoch shows each real image thrice."
    real = data.train.take(np.arange(5))
    joined = join(real, synthetic, 3)
    assert len(joined) == 3 * 5 + 200 and joined.names == real.names
    assert joined.labels.tolist() == [*real.labels] * 3 + [*synthetic.labels]
    assert joined.rows.tolist() == [*real.rows] * 3 + [-1] * 200
    pixels = np.concatenate([real.pixels, real.pixels, real.pixels, synthetic.pixels])
    assert np.array_equal(joined.pixels[np.arange(len(joined))], pixels)
    assert join(real, synthetic).digest == join(real, synthetic, 1).digest != joined.digest
    spec = spec_for(data, "mixed", repeats=3)
    assert image_passes(spec, 40, 10) == 2 * (3 * 40 + 200) and spec.repeats == 3
    assert all(spec_for(data, n, repeats=3).repeats == 1 for n in PIPELINES if n != "mixed") # their addresses stay


def test_vision_transformers_have_a_batch_and_a_weight_decay_of_their_own():
    paper = Study("paper", lr="0.01")
    digits = load_dataset("digits")
    for arch, expected in (("resnet50", (64, 5e-4)), ("vit_base", (128, 0))): # appendix A
        stages = paper.stages(digits, arch, Run("bridged", 0, 0, 20), dict(lr=0.01))
        assert [(s.batch, s.weight_decay) for s in stages] == [expected] * 2


def test_bridges_are_shared_by_shots_rates_and_fc_reinit(data, synthetic, tmp_path):
    slower = STAGES[0], replace(STAGES[1], lr=0.01)
    for name, shots, stages in (("bridged", 4, STAGES), ("bridged", 0, STAGES), ("bridged_fc", 4, slower)):
        run(data, name, synthetic, tmp_path, shots=shots, stages=stages)
    assert len(list(tmp_path.iterdir())) == 1
    run(data, "bridged_pp", synthetic, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    run(data, "bridged", synthetic, tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 3


def test_anything_that_changes_makes_another_bridge_and_another_record(data, monkeypatch, tmp_path):
    def addresses(data=data, **fields):
        spec = spec_for(data, "bridged", **{"shots": 0, **fields})
        return spec_hash(spec.bridge), spec_hash(spec)
    base = addresses()
    assert base == addresses()
    others = dict(epochs=5, lr=0.1, momentum=0.8, batch=32, weight_decay=0., augment=replace(GLYPHS, flip=True))
    changed = [addresses(stages=(replace(STAGES[0], **{k: v}), STAGES[1])) for k, v in others.items()]
    changed += [addresses(synthetic="b"), addresses(per_class=10), addresses(seed=1)]
    retrained = (backbones.SHIPPED/f"{ARCH}.safetensors").read_bytes()
    (tmp_path/f"{ARCH}.safetensors").write_bytes(retrained[:-1] + bytes([retrained[-1] ^ 1]))
    with monkeypatch.context() as m:
        m.setattr(backbones, "SHIPPED", tmp_path)
        changed.append(addresses())
    assert len(set(changed) | {base}) == len(changed) + 1
    assert all(b != base[0] and r != base[1] for b, r in changed)
    last = [addresses(stages=(STAGES[0], replace(STAGES[1], **{k: v}))) for k, v in others.items()]
    last += [addresses(shots=4), addresses(split="validation")]
    last.append(addresses(replace(data, test=data.test.take(np.arange(50)))))
    assert all(b == base[0] for b, _ in last) and len({r for _, r in last} | {base[1]}) == len(last) + 1


def test_the_result_does_not_depend_on_the_test_images(data, synthetic, tmp_path):
    "No epoch and no rate is chosen on test: with other test images and labels the trained weights are the same bits."
    noise = as_images(255 - data.test.pixels, np.roll(data.test.labels, 7), data.test.names)
    other = replace(data, test=noise)
    for name in ("vanilla", "bridged_pp"):
        a, _ = run(data, name, synthetic, tmp_path)
        b, _ = run(other, name, synthetic, tmp_path)
        assert torch.equal(weights(a), weights(b))


def test_what_is_reported_is_the_model_after_its_last_epoch(data, synthetic, tmp_path):
    model, result = run(data, "mixed", synthetic, tmp_path)
    p = predict(model, data.test)
    guesses = p.argmax(1)
    assert guesses.tolist() == result["predictions"] and result["accuracy"] == np.mean(guesses == data.test.labels)
    by_hand = -np.log(p[np.arange(100), data.test.labels]).mean()
    assert result["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_the_same_seed_gives_the_same_bits(data, synthetic, tmp_path):
    def model(root, seed): return run(data, "bridged_pp", synthetic, tmp_path/root, seed=seed)[0]
    a, b, c = (model(*at) for at in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))


def test_a_loss_that_is_not_finite_leaves_nothing(data, synthetic, tmp_path):
    wild = replace(STAGES[0], lr=1e20, epochs=3), STAGES[1]
    with pytest.raises(NonFiniteLoss, match="choose a smaller one"):
        run(data, "bridged", synthetic, tmp_path, stages=wild)
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.safetensors"))


def test_a_last_step_that_diverges_has_no_result(data, synthetic, tmp_path):
    "An epoch of one step has the loss from before it, which is finite."
    wild = {"vanilla": (STAGES[0], one_step(lr=1e38)), "synthetic": (one_step(lr=1e38, batch=200), STAGES[1])}
    for name, stages in wild.items():
        with pytest.raises(NonFiniteLoss, match=f"{name} on test images is nan in epoch 1 of 1 at learning rate 1e.38"):
            run(data, name, synthetic, tmp_path, stages=stages)


CHILD = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import test_transfer as t
from bridgexfer.images import as_images
from bridgexfer.miniature.typeset import DIGITS, corpus
pixels, labels, _ = corpus(200, DIGITS, seed=0)
t.make_bridge(*t.long_bridge(as_images(pixels, labels, DIGITS.values())), sys.argv[2], every=0)
"""


def long_bridge(synthetic): # its spec and its images: many epochs, and mixup
    training = FinetuneSpec(0.03, 60, mixup=0.2, augment=GLYPHS)
    return BridgeSpec(ARCH, backbone_digest(ARCH), synthetic.digest, 20, 0, training), synthetic


def test_a_killed_stage_1_resumes_where_it_was(synthetic, monkeypatch, tmp_path, one_thread):
    "SIGKILL while the bridge trains leaves no bridge, and the next call ends with the bits of an undisturbed run."
    spec, _ = long_bridge(synthetic)
    folder = tmp_path/"killed"/spec_hash(spec)
    child = start_code(CHILD, os.path.dirname(__file__), str(tmp_path/"killed"), log=tmp_path/"log")
    while not (folder/"state.safetensors").exists():
        assert child.is_alive(), (tmp_path/"log.errors").read_text()
        time.sleep(0.01)
    time.sleep(0.2) # into some epoch
    child.kill()
    child.join()
    with safe_open(folder/"state.safetensors", "pt") as f: done = len(json.loads(f.metadata()["training"])["curve"])
    assert 1 <= done < 60 and not (folder/"bridge.json").exists()
    (folder/"model.safetensors").write_bytes(b"half")
    steps = []
    step = finetune_module.train_step
    monkeypatch.setattr(finetune_module, "train_step", lambda *a: steps.append(1) or step(*a))
    resumed = make_bridge(*long_bridge(synthetic), tmp_path/"killed")
    assert len(steps) == (60 - done) * 4 # four batches in an epoch
    undisturbed = make_bridge(*long_bridge(synthetic), tmp_path/"undisturbed")
    assert (resumed/"model.safetensors").read_bytes() == (undisturbed/"model.safetensors").read_bytes()
    assert read_json(resumed/"bridge.json")["curve"] == read_json(undisturbed/"bridge.json")["curve"]
    assert sorted(p.name for p in resumed.iterdir() if p.suffix != ".part") == ["bridge.json", "model.safetensors"]


def test_mixup_zero_is_no_mixup_and_mixup_changes_training(synthetic):
    def end(alpha):
        model = create_backbone(ARCH, 10)
        finetune(model, synthetic, FinetuneSpec(0.03, 1, mixup=alpha, augment=GLYPHS), seed=0)
        return weights(model)
    assert torch.equal(end(0.), end(0.)) and not torch.equal(end(0.), end(0.2))


def test_odd_batches_are_trained_on(synthetic):
    for n in (2, 63, 65):
        few = synthetic.take(np.arange(n))
        assert len(finetune(create_backbone(ARCH, 10), few, FinetuneSpec(0.01, 2, augment=GLYPHS), seed=0)) == 2


def test_a_watched_training_is_the_training(synthetic):
    "`on_step` sees every step with its gradients, may evaluate the model and changes no bit; no gradient is left over."
    spec = FinetuneSpec(0.03, 2, mixup=0.2, augment=GLYPHS)
    seen = []
    def watch(t, step):
        assert all(p.grad is not None for p in t.model.parameters())
        predict(t.model, synthetic.take(np.arange(5)))
        seen.append((len(t.curve), t.sched.last_epoch, step.n))
    plain = create_backbone(ARCH, 10)
    watched = create_backbone(ARCH, 10)
    predict(watched, synthetic.take(np.arange(5))) # before any training, as whoever scores it first does
    assert finetune(plain, synthetic, spec, 0) == finetune(watched, synthetic, spec, 0, on_step=watch)
    assert torch.equal(weights(plain), weights(watched))
    assert seen == [(0, 1, 50), (0, 2, 50), (0, 3, 50), (0, 4, 50), (1, 5, 50), (1, 6, 50), (1, 7, 50), (1, 8, 50)]
    assert all(p.grad is None for p in watched.parameters())


@pytest.mark.parametrize("momentum", [0., 0.9])
def test_a_state_holds_all_that_changes(synthetic, tmp_path, momentum):
    spec = FinetuneSpec(0.03, 3, momentum=momentum, mixup=0.2, augment=GLYPHS)
    def training(seed=0): return begin(create_backbone(ARCH, 10), synthetic, spec, seed)
    t = training()
    train_epoch(t)
    save_state(tmp_path/"state", t)
    resumed = training()
    load_state(tmp_path/"state", resumed)
    assert train_epoch(t) == train_epoch(resumed) and torch.equal(weights(t.model), weights(resumed.model))
    with pytest.raises(ValueError, match="another training.*seed 0.*not .*seed 1.*delete it"):
        load_state(tmp_path/"state", training(seed=1))


def test_mistakes_name_the_choices(data, synthetic):
    with pytest.raises(ValueError, match="vanilla, mixed, bridged, bridged_fc, bridged_pp"): pipeline("bridge")
    known = "mini_resnet10, mini_resnet18, mini_vit, resnet18"
    with pytest.raises(ValueError, match=known): create_backbone("resnet99")
    with pytest.raises(ValueError, match="choose 1 to"): run(data, "vanilla", synthetic, "unused", shots=999)
    with pytest.raises(ValueError, match="needs synthetic images"):
        transfer(spec_for(data, "mixed"), data, None, "unused")
    with pytest.raises(ValueError, match="asks for 10 synthetic images of each of 10 classes, got 200"):
        run(data, "mixed", synthetic, "unused", per_class=10)
    with pytest.raises(ValueError, match="class names, their order"):
        run(data, "mixed", as_images(synthetic.pixels, synthetic.labels, tuple("abcdefghij")), "unused")
    with pytest.raises(ValueError, match="The spec names the images .*, those given are"):
        transfer(spec_for(data, "vanilla"), load_dataset("digits"), None, "unused")
    with pytest.raises(ValueError, match="lr > 0"): FinetuneSpec(lr=0, epochs=1)


def test_backbone_digests_differ():
    assert len({backbone_digest(a) for a in ARCHS}) == len(ARCHS)
