"""The recipe for images of one's own: settings that change the augmentation, the balance, the metric and the set."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bridgexfer.artefacts import read_json, spec_hash
from bridgexfer.backbones import input_config, untrained
from bridgexfer.cli import main
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import GLYPHS, Augment, Varied, with_recipe
from bridgexfer.finetune import BalancedCourse, BalancedSpec, Course, FinetuneSpec, begin, finetune
from bridgexfer.filling import fill_counts
from bridgexfer.images import as_images, file_array, store
from bridgexfer.loading import InputConfig, train_batches
from bridgexfer.own_images import own_images, own_runs, own_study
from bridgexfer.study.grid import Study
from bridgexfer.transfer import Run

RNG = np.random.default_rng(0)
SMALL = dict(images="4", steps="2", epochs="1", stage1_epochs="1", lrs="0.1", stage1_lrs="0.03", seeds="0",
             tuning_seeds="100")


@pytest.fixture(scope="module")
def tail(): # 20 images of one, 4 of two, 2 of three
    labels = np.repeat([0, 1, 2], [20, 4, 2])
    return as_images(RNG.integers(0, 256, (26, 32, 32, 3)), labels, ("one", "two", "three"))


def one_pass(images, augment, seed=0, size=32):
    return list(train_batches(images, 8, InputConfig(size), augment, torch.Generator().manual_seed(seed)))


# ---- hashes

def test_old_specs_keep_their_hashes():
    "Printed before there was a recipe."
    assert spec_hash(FinetuneSpec(0.1, 3, augment=GLYPHS)) == "6b92bd240870c4a0"
    plain = FinetuneSpec(0.1, 3)
    balanced = BalancedSpec(0.1, 3)
    varied = replace(plain, augment=Varied(grey=0.1))
    found = {spec_hash(s) for s in (plain, balanced, replace(balanced, balance="sampling"), varied,
                                    replace(plain, augment=Varied(grey=0.2)))}
    assert len(found) == 5


def test_default_settings_change_no_spec():
    study = Study("smoke")
    digits = study.load("digits")
    assert digits.info is load_dataset("digits").info
    _, last = study.stages(digits, "mini_resnet10", Run("vanilla", 4, 0), dict(lr=0.1))
    assert type(last) is FinetuneSpec and type(last.augment) is Augment


# ---- augmentation

def test_plain_augmentation_draws_as_ever_and_a_turn_of_nothing_only_reorders_random_numbers(tail):
    batches = one_pass(tail, Augment())
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(len(tail), generator=rng)
    assert torch.equal(torch.cat([y for _, y in batches]), torch.from_numpy(tail.labels)[order])
    varied = one_pass(tail, Varied(scale=(1., 1.), ratio=(1., 1.), flip=False, rotation=1e-6))
    plain = one_pass(tail, Augment(scale=(1., 1.), ratio=(1., 1.), flip=False))
    assert all(torch.allclose(a, b, atol=1e-3) for (a, _), (b, _) in zip(varied, plain))


@pytest.mark.parametrize("files", (False, True))
def test_grey_and_turned_for_pixels_and_files(tail, files):
    images = tail
    if files:
        stored = file_array(store(Image.fromarray(image), 96, "png") for image in tail.pixels)
        images = as_images(stored, tail.labels, tail.names)
    whole = dict(scale=(1., 1.), ratio=(1., 1.), flip=False)
    for x, _ in one_pass(images, Varied(**whole, grey=1.)): assert (x[:, 0] - x[:, 2]).abs().max() < 1e-5
    half = torch.cat([x for x, _ in one_pass(images, Varied(**whole, grey=0.5))])
    assert 3 < ((half[:, 0] - half[:, 2]).abs().amax((1, 2)) < 1e-5).sum() < 23
    turned = one_pass(images, Varied(**whole, rotation=180.))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(turned, one_pass(images, Varied(**whole, rotation=180.))))
    assert not torch.allclose(turned[0][0], one_pass(images, Augment(**whole))[0][0], atol=0.1)


@pytest.mark.parametrize("wrong", (dict(crop=0.), dict(crop=2.), dict(rotation=200.), dict(grey=1.5)))
def test_shares_out_of_range_are_rejected(wrong):
    with pytest.raises(ValueError, match="crop is a share|rotation is 0 to 180"):
        with_recipe(load_dataset("digits").info, **wrong)


# ---- balance

def test_weights_and_sampling_give_each_class_the_same_share(tail):
    weighted = BalancedCourse(tail, BalancedSpec(0.1, 1, batch=8))
    targets = weighted.targets(0, torch.arange(26), torch.from_numpy(tail.labels))
    assert torch.allclose(targets.sum(0), torch.full((3,), 26 / 3)) and torch.equal(
        torch.cat(weighted.order(0, torch.Generator().manual_seed(1))),
        torch.cat(Course(tail, FinetuneSpec(0.1, 1, batch=8)).order(0, torch.Generator().manual_seed(1))))
    sampled = BalancedCourse(tail, BalancedSpec(0.1, 1, batch=8, balance="sampling"))
    rng = torch.Generator().manual_seed(0)
    rows = torch.cat([r for _ in range(60) for r in sampled.order(0, rng)])
    shares = np.bincount(tail.labels[rows.numpy()]) / len(rows)
    assert np.abs(shares - 1 / 3).max() < 0.04 and len(rows) == 60 * 26 == 60 * sampled.sizes()[0]


@pytest.mark.parametrize("balance", ("weights", "sampling"))
def test_a_balanced_training_resumes_to_the_bit(tail, balance, tmp_path):
    spec = BalancedSpec(0.05, 3, batch=8, mixup=0.2, balance=balance)
    def trained(**how):
        torch.manual_seed(0)
        model = untrained("mini_resnet10", 3)
        return finetune(model, tail, spec, 0, **how), model
    whole, model = trained()
    trained(state=tmp_path/"state", every=0)
    resumed, again = trained(state=tmp_path/"state", every=0)
    assert resumed == whole and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert isinstance(begin(untrained("mini_resnet10", 3), tail, spec, 0).course, BalancedCourse)
    assert input_config(model).size == 32


def test_balance_is_for_the_stage_that_sees_real_images_and_not_for_ways_of_mixing():
    study = Study("smoke", balance="sampling")
    digits = study.load("digits")
    first, last = study.stages(digits, "mini_resnet10", Run("bridged_pp", 4, 0, 20), dict(lr=0.1, stage1_lr=0.1))
    assert type(first) is FinetuneSpec and last.balance == "sampling"
    with pytest.raises(ValueError, match="does not go with mixed_weighted"):
        study.stages(digits, "mini_resnet10", Run("mixed_weighted", 4, 0, 20), study.start("mixed_weighted", 4))


# ---- fill up

@pytest.mark.parametrize(("real", "images", "most", "counts"), (
    ([50, 50], 10, 10, [10, 10]), ([50, 10], 10, 500, [10, 50]), ([50, 10], 10, 30, [10, 30]),
    ([1, 2, 4], 3, 9, [6, 5, 3]), ([9], 5, 5, [5])))
def test_counts_of_a_filled_set(real, images, most, counts):
    found = fill_counts(real, images, most)
    assert found.tolist() == counts
    if found.max() < most: assert len({*(np.array(real) + found)}) == 1


def test_a_bound_below_the_images_is_rejected():
    with pytest.raises(ValueError, match="fill is 5, less than the 10 images"): fill_counts([3, 2], 10, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): # a long tail
    top = tmp_path_factory.mktemp("tail")/"my digits"
    digits = load_dataset("digits")
    for split, images, rare in (("train", digits.train, 3), ("test", digits.test, 4)):
        for name, count in {"one": rare + 6, "three": rare}.items():
            (top/split/name).mkdir(parents=True)
            for i in np.flatnonzero(images.labels == digits.info.names.index(name))[:count]:
                Image.fromarray(images.pixels[i]).save(top/split/name/f"{i}.png")
    return top


def test_a_rare_class_is_filled_up_with_images_of_the_same_set(folder, tmp_path):
    study = own_study(str(folder), "miniature", runs=str(tmp_path/"runs"), **SMALL, fill="9")
    data = study.load(str(folder))
    run = own_runs(study)[1]
    name, images = own_images(study, data, run)
    assert np.bincount(images.labels).tolist() == [4, 9] # up to the bound; 10 would be as many
    plain = own_study(str(folder), "miniature", runs=str(tmp_path/"runs"), **SMALL)
    other, whole = own_images(plain, data, run)
    assert name != other and np.bincount(whole.labels).tolist() == [4, 4]
    first = images.take(np.flatnonzero(images.labels == 0))
    assert np.array_equal(first.pixels, whole.pixels[whole.labels == 0])


def test_transfer_takes_the_whole_recipe(folder, tmp_path, capsys):
    options = [f"--set={k}={v}" for k, v in dict(SMALL, runs=tmp_path/"runs", fill=9, flip="no", crop=0.6, rotation=10,
                                                 grey=0.2, balance="weights", metric="mean_per_class").items()]
    line = ["transfer", str(folder), "--profile", "miniature", *options, "--out", str(tmp_path/"better"), "--json"]
    code = main(line)
    out, err = capsys.readouterr()
    assert code == 0, err
    spec = read_json(tmp_path/"better"/"outcome.json")["run"]["spec"]
    assert spec["metric"] == "mean_per_class" and spec["finetune"]["balance"] == "weights"
    crops = dict(scale=[0.6, 1.0], ratio=[3 / 4, 4 / 3])
    assert spec["finetune"]["augment"] == dict(crops, flip=False, rotation=10, grey=0.2)


@pytest.mark.parametrize(("setting", "said"), (
    ("flip=maybe", "flip is dataset or yes or no"), ("balance=luck", "balance is none or weights or sampling"),
    ("metric=f1", "metric is dataset or top1 or mean_per_class"), ("crop=2", "crop is a share"),
    ("rotation=999", "rotation is 0 to 180"), ("fill=2", "fill is 2, less than the 4 images")))
def test_a_wrong_recipe_is_one_sentence(setting, said, folder, tmp_path, capsys):
    options = [f"--set={k}={v}" for k, v in dict(SMALL, runs=tmp_path/"runs").items()]
    code = main(["transfer", str(folder), "--profile", "miniature", *options, f"--set={setting}", "--out",
                 str(tmp_path/"b")])
    _, err = capsys.readouterr()
    assert code == 2 and said in err and "Traceback" not in err and not (tmp_path/"b").exists()
