"""Transfer: what is shared is found again, what has changed is not, and nothing is chosen on test images."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import bridgexfer.finetune as finetune_module
from bridgexfer import backbones
from bridgexfer.artefacts import read_json, spec_hash
from bridgexfer.backbones import ARCHS, backbone_digest, create_backbone
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import GLYPHS, hold_out
from bridgexfer.evaluation import predict
from bridgexfer.finetune import FinetuneSpec, NonFiniteLoss, begin, finetune, load_state, save_state, train_epoch
from bridgexfer.images import as_images
from bridgexfer.miniature.typeset import DIGITS, corpus
from bridgexfer.study.grid import Study
from bridgexfer.transfer import BridgeSpec, CONTROLS, PIPELINES, Recipe, Run, Task, load_bridge, make_bridge
from bridgexfer.transfer import pipeline, run_task

ARCH = "mini_resnet10"
RECIPE = Recipe(epochs=1, few_epochs=2, mixed_epochs=1, stage1_epochs=1, stage1_lr=0.03, mixup=0.2,
                batch=64, momentum=0.9, weight_decay=5e-4)


@pytest.fixture(scope="module")
def synthetic():
    pixels, labels, _ = corpus(200, DIGITS, seed=0)
    return as_images(pixels, labels, DIGITS.values())


@pytest.fixture(scope="module")
def task():
    data = load_dataset("digits")
    return Task(data.info, data.train.take(np.arange(300)), data.test.take(np.arange(100)), ARCH, RECIPE)


def run(task, name, synthetic, root, shots=4, seed=0, lr=0.03):
    return run_task(task, Run(name, shots, seed, 20), lr, (synthetic.digest, synthetic), root)


def weights(model): return torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.parametrize("arch", [a for a, b in ARCHS.items() if b.shipped])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_runs_with_every_shipped_backbone(task, synthetic, tmp_path, arch, name):
    _, result = run(replace(task, arch=arch), name, synthetic, tmp_path)
    assert 0 <= result["accuracy"] <= 1 and len(result["predictions"]) == 100
    assert [e["epoch"] for e in result["curve"]] == list(range(1, (1 if name == "mixed" else 2) + 1))
    json.dumps(result, allow_nan=False)


def test_controls_are_what_they_say(task, synthetic, tmp_path):
    point = {name: Run(name, 4, 0, 20) for name in (*PIPELINES, *CONTROLS)}
    spec = {name: task.spec(p, 0.03, "x") for name, p in point.items()}
    assert all(pipeline(n).lr_from in PIPELINES or n == "synthetic" for n in CONTROLS)
    # vanilla with the same compute sees as many images as both stages of bridged transfer together, to a batch
    assert 0 <= 40 * spec["vanilla_long"].epochs - (40 * spec["bridged"].epochs + 200 * RECIPE.stage1_epochs) < 40
    assert [n for n, s in spec.items() if s.mixup] == ["vanilla_mixup", "mixed_mixup"]
    assert spec["bridged_mixup"].bridge == spec["bridged_pp"].bridge
    assert spec["bridged_mixup"].bridge != spec["bridged"].bridge == spec["synthetic"].bridge
    model, result = run(task, "synthetic", synthetic, tmp_path)
    bridge = load_bridge(next(tmp_path.iterdir()), 10)
    assert result["curve"] == [] and torch.equal(weights(model), weights(bridge)) # no real image was trained on
    assert spec["synthetic"].epochs == spec["synthetic"].lr == 0


def test_vision_transformers_have_a_batch_and_a_weight_decay_of_their_own():
    paper = Study("paper")
    conv = paper.recipe("resnet50")
    vit = paper.recipe("vit_base")
    assert (conv.batch, conv.weight_decay) == (64, 5e-4) and (vit.batch, vit.weight_decay) == (128, 0) # appendix A


def test_bridges_are_shared_by_shots_rates_and_fc_reinit(task, synthetic, tmp_path):
    for name, shots, lr in (("bridged", 4, 0.03), ("bridged", 0, 0.03), ("bridged_fc", 4, 0.01)):
        run(task, name, synthetic, tmp_path, shots, lr=lr)
    assert len(list(tmp_path.iterdir())) == 1
    run(task, "bridged_pp", synthetic, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    run(task, "bridged", synthetic, tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 3


def test_anything_that_changes_makes_another_bridge_and_another_record(task, synthetic, monkeypatch, tmp_path):
    def addresses(t, hash_="a", **other):
        point = Run("bridged", **{"shots": 0, "seed": 0, "per_class": 20, **other})
        return spec_hash(t.bridge(point, hash_)), spec_hash(t.spec(point, 0.03, hash_))
    base = addresses(task)
    assert base == addresses(task)
    others = dict(stage1_epochs=2, stage1_lr=0.1, momentum=0.8, batch=32, weight_decay=0.)
    changed = [addresses(replace(task, recipe=replace(RECIPE, **{k: v}))) for k, v in others.items()]
    changed += [addresses(task, "b"), addresses(task, per_class=10), addresses(task, seed=1)]
    flipped = replace(task.info, augment=replace(GLYPHS, flip=True))
    changed.append(addresses(replace(task, info=flipped)))
    retrained = (backbones.SHIPPED/f"{ARCH}.safetensors").read_bytes()
    (tmp_path/f"{ARCH}.safetensors").write_bytes(retrained[:-1] + bytes([retrained[-1] ^ 1]))
    with monkeypatch.context() as m:
        m.setattr(backbones, "SHIPPED", tmp_path)
        changed.append(addresses(task))
    assert len(set(changed) | {base}) == len(changed) + 1
    assert all(b != base[0] and r != base[1] for b, r in changed)


def test_the_result_does_not_depend_on_the_test_images(task, synthetic, tmp_path):
    "No epoch and no rate is chosen on test: with other test images and labels the trained weights are the same bits."
    other = replace(task, test=as_images(255 - task.test.pixels, np.roll(task.test.labels, 7), task.test.names))
    for name in ("vanilla", "bridged_pp"):
        a, _ = run(task, name, synthetic, tmp_path)
        b, _ = run(other, name, synthetic, tmp_path)
        assert torch.equal(weights(a), weights(b))


def test_what_is_reported_is_the_model_after_its_last_epoch(task, synthetic, tmp_path):
    model, result = run(task, "mixed", synthetic, tmp_path)
    guesses = predict(model, task.test).argmax(1)
    assert guesses.tolist() == result["predictions"] and result["accuracy"] == np.mean(guesses == task.test.labels)


def test_the_tuning_job_never_measures_on_test(tmp_path):
    "Its records say so, and their labels are those of the validation part."
    from bridgexfer.study.settings import find_settings
    root = find_settings().parent
    settings = json.dumps(dict(runs=str(tmp_path), pipelines="vanilla bridged", images="20"))
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "nbs/jobs/tune.ipynb", str(tmp_path/"out.ipynb"),
               "-p", "overrides", settings]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(p.read_text()) for p in (tmp_path/"smoke"/"records"/"tune").glob("*.json")]
    fit, validation = hold_out(load_dataset("digits").train, 0.2, seed=100)
    assert len(records) == 4
    for r in records:
        assert r["spec"]["split"] == "validation" and r["spec"]["data"] == f"{fit.digest}-{validation.digest}"
        assert r["result"]["labels"] == validation.labels.tolist()


def test_the_same_seed_gives_the_same_bits(task, synthetic, tmp_path):
    def model(root, seed): return run(task, "bridged_pp", synthetic, tmp_path/root, seed=seed)[0]
    a, b, c = (model(*at) for at in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))


def test_a_loss_that_is_not_finite_leaves_nothing(task, synthetic, tmp_path):
    wild = replace(task, recipe=replace(RECIPE, stage1_lr=1e20, stage1_epochs=3))
    with pytest.raises(NonFiniteLoss, match="choose a smaller one"): run(wild, "bridged", synthetic, tmp_path)
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.safetensors"))


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
    child = subprocess.Popen([sys.executable, "-c", CHILD, os.path.dirname(__file__), str(tmp_path/"killed")])
    while not (folder/"state.safetensors").exists():
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.2) # into some epoch
    child.send_signal(signal.SIGKILL)
    child.wait()
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


def test_mistakes_name_the_choices(task, synthetic):
    with pytest.raises(ValueError, match="vanilla, mixed, bridged, bridged_fc, bridged_pp"): pipeline("bridge")
    known = "mini_resnet10, mini_resnet18, mini_vit, resnet18"
    with pytest.raises(ValueError, match=known): create_backbone("resnet99")
    with pytest.raises(ValueError, match="choose 1 to"): run(task, "vanilla", synthetic, "unused", shots=999)
    with pytest.raises(ValueError, match="needs synthetic images"):
        run_task(task, Run("mixed", 4, 0, 20), 0.03, ("", None), "unused")
    with pytest.raises(ValueError, match="asks for 10 synthetic images of each of 10 classes, got 200"):
        run_task(task, Run("mixed", 4, 0, 10), 0.03, ("x", synthetic), "unused")
    with pytest.raises(ValueError, match="class names, their order"):
        run(task, "mixed", as_images(synthetic.pixels, synthetic.labels, tuple("abcdefghij")), "unused")
    with pytest.raises(ValueError, match="lr > 0"): FinetuneSpec(lr=0, epochs=1)


def test_backbone_digests_differ():
    assert len({backbone_digest(a) for a in ARCHS}) == len(ARCHS)
