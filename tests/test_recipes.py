"""Other recipes than the paper's: timm's optimiser, schedule, average, soft labels and RandAugment, by setting."""
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bridgexfer.artefacts import read_json, spec_hash
from bridgexfer.backbones import backbone, backbone_digest, create_backbone, input_config, untrained
from bridgexfer.cli import main
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import GLYPHS, Augment, RandAugmented, few_shot, with_recipe
from bridgexfer.finetune import FinetuneSpec, finetune, train_step
from bridgexfer.fixed_features import head_spec
from bridgexfer.images import as_images, file_array, store
from bridgexfer.loading import SEEN, InputConfig, centre_crop, eval_batches, rand_augmented, train_batches
from bridgexfer.recipes import RecipeSpec, smoothed, spec_kinds
from bridgexfer.study.grid import Study
from bridgexfer.transfer import Run

RNG = np.random.default_rng(0)
WHOLE = dict(optimiser="adamw", layer_decay=0.75, warmup=1., ema=0.9, smoothing=0.1)
SMALL = dict(images="4", steps="2", epochs="2", stage1_epochs="2", adamw_lrs="0.003", seeds="0", tuning_seeds="100")


@pytest.fixture(scope="module")
def few(): return few_shot(load_dataset("digits").train, 4, 0)


def trained(few, spec, **how):
    torch.manual_seed(0)
    model = untrained("mini_vit", 10)
    return finetune(model, few, spec, 0, **how), model


def same(a, b): return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# ---- hashes and settings

def test_specs_without_a_recipe_keep_their_hashes():
    "Printed before there was one."
    assert spec_hash(FinetuneSpec(0.1, 3, augment=GLYPHS)) == "6b92bd240870c4a0"
    changed = [RecipeSpec(0.1, 3)] + [RecipeSpec(0.1, 3, **{k: v}) for k, v in WHOLE.items()]
    assert len({spec_hash(s) for s in (FinetuneSpec(0.1, 3), *changed)}) == 7
    info = load_dataset("digits").info
    assert with_recipe(info, randaugment=0) is info
    assert with_recipe(info, randaugment=9, grey=0.1).augment == RandAugmented(*vars(GLYPHS).values(), 0., 0.1, 9)


def test_only_settings_that_ask_for_a_recipe_change_a_spec():
    run = Run("bridged_pp", 4, 0, 20)
    def stages(**settings):
        study = Study("smoke", **settings)
        return study.stages(study.load("digits"), "mini_resnet10", run, study.start("bridged_pp", 4))
    assert [type(s) for s in stages()] == [FinetuneSpec] * 2 and stages() == stages(optimiser="sgd", ema="0")
    both = stages(optimiser="adamw", layer_decay="0.75", adamw_lrs="0.003", epochs="5", lr="tuned", balance="weights",
                  randaugment="5")
    for spec in both:
        assert (spec.optimiser, spec.lr, spec.weight_decay, spec.layer_decay) == ("adamw", 0.003, 0.05, 0.75)
        assert spec.augment.magnitude == 5
    assert [s.balance for s in both] == ["none", "weights"]


def test_rates_of_sgd_are_not_taken_for_those_of_adamw():
    study = Study("miniature", optimiser="adamw")
    assert study.axes("bridged_pp", 4)["lr"].values == study.axes("bridged_pp", 4)["stage1_lr"].values
    assert study.start("vanilla", 4) == dict(lr=0.003)
    with pytest.raises(ValueError, match="has rates of SGD, and the optimiser is adamw: set `lr`"):
        study.choice("digits", "mini_resnet10", Run("vanilla", 4, 0))


def test_heads_alone_are_trained_by_sgd():
    spec = RecipeSpec(0.1, 3, balance="weights", **WHOLE)
    assert type(head_spec(spec)) is FinetuneSpec and head_spec(spec) == head_spec(FinetuneSpec(0.1, 3))


# ---- training

@pytest.mark.parametrize("optimiser", ("sgd", "adamw"))
def test_a_recipe_resumes_to_the_bit(few, optimiser, tmp_path):
    spec = RecipeSpec(0.003, 4, batch=16, mixup=0.2, augment=GLYPHS, **dict(WHOLE, optimiser=optimiser))
    whole, model = trained(few, spec)
    class Stop(Exception): pass
    def stop(t, step):
        if len(t.curve) == 2: raise Stop
    with pytest.raises(Stop): trained(few, spec, state=tmp_path/"state", every=0, on_step=stop)
    resumed, again = trained(few, spec, state=tmp_path/"state", every=0)
    assert resumed == whole and same(model, again)


def test_a_state_from_before_there_were_recipes_is_read(few, tmp_path):
    "Names of tensors in a state of SGD are what they were."
    from safetensors import safe_open
    spec = FinetuneSpec(0.03, 3, batch=16, augment=GLYPHS)
    trained(few, spec, state=tmp_path/"state", every=0)
    with safe_open(tmp_path/"state", "pt") as f: kinds = {k.partition(".")[0] for k in f.keys()}
    assert kinds == {"model", "momentum", "order"}


def test_the_result_is_the_average(few):
    kept = []
    spec = RecipeSpec(0.003, 2, batch=16, augment=GLYPHS, ema=0.5, optimiser="adamw")
    def watch(t, step): kept.append({k: v.clone() for k, v in t.model.state_dict().items()})
    _, model = trained(few, spec, on_step=watch)
    by_hand = kept[0]
    for step, weights in enumerate(kept[1:], 2):
        lam = min(0.5, 1 - step**(-2 / 3))
        by_hand = {k: lam * v + (1 - lam) * weights[k] for k, v in by_hand.items()}
    for k, v in model.state_dict().items(): assert torch.allclose(v, by_hand[k], atol=1e-5), k
    assert not same(model, trained(few, replace(spec, ema=0.))[1])


def test_a_warm_up_begins_low_and_ends_at_the_rate(few):
    rates = []
    spec = RecipeSpec(0.01, 4, batch=10, augment=GLYPHS, warmup=1.)
    trained(few, spec, on_step=lambda t, step: rates.append(t.opt.param_groups[0]["lr"]))
    assert rates[0] == pytest.approx(0.004) and max(rates) == rates[3] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0., abs=1e-9) and rates[4:] == sorted(rates[4:], reverse=True)


def test_soft_labels_keep_weights_and_the_right_class(few):
    t = torch.tensor([[0., 3., 0., 0.], [0.5, 0., 0., 0.]])
    soft = smoothed(t, 4, 0.2)
    assert torch.allclose(soft.sum(1), t.sum(1)) and torch.equal(soft.argmax(1), t.argmax(1))
    model = untrained("mini_resnet10", 10).train()
    opt = torch.optim.SGD(model.parameters(), 0.)
    x, y = next(train_batches(few, 8, input_config(model), GLYPHS, torch.Generator().manual_seed(0)))
    spec = RecipeSpec(0.1, 1, smoothing=0.2)
    steps = [train_step(model, opt, x, y, 0.5, np.random.default_rng(0), s.soften)
             for s in (FinetuneSpec(0.1, 1), spec)]
    assert steps[0].right == steps[1].right and steps[0].loss != steps[1].loss


def test_a_convolutional_network_has_layers_too(few):
    spec = RecipeSpec(0.003, 1, optimiser="adamw", layer_decay=0.5)
    opt = spec.make_optimiser(untrained("mini_resnet10", 10))
    scales = {g["lr_scale"] for g in opt.param_groups}
    assert max(scales) == 1 and len(scales) > 3 and min(scales) == 0.5**(len(scales) - 1)


# ---- RandAugment

def test_randaugment_draws_the_same_everywhere_and_disturbs_nobody():
    crops = RNG.integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    first = rand_augmented(crops, 9, 3)
    assert (random.random(), np.random.random()) == expected
    assert np.array_equal(first, rand_augmented(crops, 9, 3)) and not np.array_equal(first, rand_augmented(crops, 9, 4))


@pytest.mark.parametrize("files", (False, True))
def test_randaugment_for_pixels_and_files(few, files):
    images = few
    stored = file_array(store(Image.fromarray(p), 96, "png") for p in few.pixels)
    if files: images = as_images(stored, few.labels, few.names)
    def one_pass(augment):
        return list(train_batches(images, 8, InputConfig(32), augment, torch.Generator().manual_seed(0)))
    whole = dict(scale=(1., 1.), ratio=(1., 1.), flip=False)
    ours = one_pass(RandAugmented(**whole, magnitude=9))
    again = one_pass(RandAugmented(**whole, magnitude=9))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(ours, again))
    plain = one_pass(Augment(**whole))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, plain)) # the same images in the same order
    differing = [(a - b).abs().amax((1, 2, 3)) > 0.02 for (a, _), (b, _) in zip(ours, plain)]
    assert 0.5 < torch.cat(differing).float().mean() < 1 # an operation is done half of the time
    assert ours[0][0].shape == plain[0][0].shape and ours[0][0].abs().max() <= 1


# ---- what a network expects

def test_the_crop_is_the_networks():
    assert backbone("vit_small_patch14_dinov2.lvd142m").seen == 1 and backbone("vit_base").seen == SEEN
    assert input_config(untrained("vit_small_patch14_dinov2.lvd142m", 2)).seen == 1
    assert backbone_digest("vit_small_patch14_dinov2.lvd142m").endswith(" seen 1")
    assert backbone_digest("resnet18") == "timm:timm/resnet18.tv_in1k@bbd144b3e5565108aad885f145491d11bc6ce807"
    ring = np.zeros((96, 96, 3), np.uint8)
    ring[4:-4, 4:-4] = 255 # a frame that only a whole crop sees
    file = store(Image.fromarray(ring), 96, "png")
    assert centre_crop(file, 48, 1.)[0].max() < 50 and centre_crop(file, 48, 0.5).min() == 255
    images = as_images(file_array([file]), [0], ("a",))
    whole, middle = (next(eval_batches(images, 1, InputConfig(48, seen=seen))) for seen in (1., 0.5))
    assert whole.min() < -0.5 and middle.min() > 0.9


def test_every_backbone_of_ours_keeps_its_crop():
    assert {input_config(create_backbone(a)).seen for a in ("mini_resnet10", "mini_vit")} == {SEEN}
    assert {input_config(untrained(a, 2)).seen for a in ("resnet18", "vit_base")} == {SEEN}


# ---- the command line

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("own")/"my digits"
    digits = load_dataset("digits")
    for split, images in (("train", digits.train), ("test", digits.test)):
        for name in ("one", "three"):
            (top/split/name).mkdir(parents=True)
            for i in np.flatnonzero(images.labels == digits.info.names.index(name))[:5]:
                Image.fromarray(images.pixels[i]).save(top/split/name/f"{i}.png")
    return top


def run(folder, tmp_path, settings):
    options = [f"--set={k}={v}" for k, v in {**SMALL, "runs": tmp_path/"runs", **settings}.items()]
    out = ["--out", str(tmp_path/"better"), "--json"]
    return main(["transfer", str(folder), "--profile", "miniature", *options, *out])


def test_transfer_takes_a_recipe(folder, tmp_path, capsys):
    code = run(folder, tmp_path, dict(WHOLE, randaugment=9))
    assert code == 0, capsys.readouterr().err
    spec = read_json(tmp_path/"better"/"outcome.json")["run"]["spec"]["finetune"]
    assert {k: spec[k] for k in WHOLE} == WHOLE and spec["lr"] == 0.003 and spec["augment"]["magnitude"] == 9


@pytest.mark.parametrize(("setting", "said"), (
    (dict(optimiser="lion"), "optimiser is sgd or adamw, got 'lion'"),
    (dict(layer_decay="2"), "layer_decay is above 0"), (dict(warmup="2"), "warmup is from 0 to less than the 2 epochs"),
    (dict(ema="1"), "ema is from 0 to less than 1"), (dict(smoothing="-1"), "smoothing is a number from 0 on"),
    (dict(randaugment="11"), "randaugment is a whole number"),
    (dict(randaugment="0.5"), "randaugment is a whole number from 0 on")))
def test_a_wrong_value_is_one_sentence_before_any_work(setting, said, folder, tmp_path, capsys):
    code = run(folder, tmp_path, setting)
    err = capsys.readouterr().err
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.parquet"))


def test_kinds_are_plain_where_nothing_is_asked():
    assert spec_kinds() == (FinetuneSpec, FinetuneSpec) == spec_kinds("none", "sgd", ema=0, layer_decay=1)
