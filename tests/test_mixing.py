"""Ways of mixing: the ends are vanilla and mixed to the bit, and in between each number does what it says."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bridgexfer.artefacts import spec_hash
from bridgexfer.backbones import create_backbone
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import GLYPHS, Dataset
from bridgexfer.finetune import FinetuneSpec, begin, finetune, load_state, save_state, train_epoch
from bridgexfer.images import SoftImages, as_images
from bridgexfer.miniature.typeset import DIGITS, corpus
from bridgexfer.mixing import MixedCourse, Mixing, epoch_sizes
from bridgexfer.study.costs import PassCounter, Target
from bridgexfer.study.grid import Study
from bridgexfer.study.records import to_frame, write_record
from bridgexfer.transfer import (WAYS, MixedSpec, Run, TransferSpec, image_passes, join, pipeline, shuffle_labels,
                                 transfer, transfer_spec)

ARCH = "mini_resnet10"
STAGES = (FinetuneSpec(0.03, 1, augment=GLYPHS), FinetuneSpec(0.03, 3, batch=32, augment=GLYPHS))


@pytest.fixture(scope="module")
def synthetic():
    pixels, labels, _ = corpus(400, DIGITS, seed=0)
    images = as_images(pixels, labels, DIGITS.values())
    return images.take(np.concatenate([np.flatnonzero(images.labels == c)[:10] for c in range(10)]))


@pytest.fixture(scope="module")
def data():
    digits = load_dataset("digits")
    return Dataset(digits.info, digits.train.take(np.arange(300)), digits.test.take(np.arange(100)))


def run(data, name, synthetic, root, **fields):
    "State of the model and the result of a pipeline at two shots."
    spec = transfer_spec(Run(name, 2, 0, 10), data, ARCH, STAGES, synthetic.digest, **fields)
    model, result = transfer(spec, data, synthetic, root)
    return model.state_dict(), {k: v for k, v in result.items() if k != "seconds"}


def same(one, two):
    "Weights, statistics of batch normalisation, curve and predictions, to the bit."
    weights = all(torch.equal(v, two[0][k]) for k, v in one[0].items())
    return weights and json.dumps(one[1], default=str) == json.dumps(two[1], default=str)


@pytest.mark.parametrize("mixing", [Mixing(weight=0), Mixing(keep=0), Mixing(weight=0, real_share=.5, smoothing=.1)])
def test_without_synthetic_images_mixed_is_vanilla_to_the_bit(data, synthetic, tmp_path, mixing):
    "With three repeats asked for, too: without synthetic images there is nothing to weigh them against."
    vanilla = run(data, "vanilla", synthetic, tmp_path)
    assert same(run(data, "mixed_weighted", synthetic, tmp_path, mixing=mixing, repeats=3), vanilla)


@pytest.mark.parametrize("name", ["mixed_weighted", "mixed_fading"])
def test_at_weight_one_and_without_a_fade_it_is_mixed_to_the_bit(data, synthetic, tmp_path, name):
    mixed = run(data, "mixed", synthetic, tmp_path, repeats=2)
    assert same(run(data, name, synthetic, tmp_path, mixing=Mixing(), repeats=2), mixed)


def test_in_between_every_number_changes_the_training(data, synthetic, tmp_path):
    ways = [Mixing(), Mixing(weight=.5), Mixing(real_share=.5), Mixing(keep=.5), Mixing(smoothing=.1)]
    ends = [run(data, "mixed_weighted", synthetic, tmp_path, mixing=m)[0]["conv1.weight"] for m in ways]
    assert len({float(w.double().sum()) for w in ends}) == len(ways)


def test_a_weight_is_that_of_the_loss(data, synthetic):
    "By hand: one step over everything has the gradient of (Σ real + λ Σ synthetic) / (n_r + λ n_s)."
    real = data.train.take(np.arange(20))
    both = join(real, synthetic)
    spec = FinetuneSpec(1., 1, batch=200, momentum=0., weight_decay=0., augment=GLYPHS)
    course = MixedCourse(both, spec, 20, Mixing(weight=.3), 0)
    rows = torch.arange(120)
    y = torch.from_numpy(both.labels)
    logits = torch.randn(120, 10, generator=torch.Generator().manual_seed(0))
    each = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    by_hand = (each[:20].sum() + .3 * each[20:].sum()) / (20 + .3 * 100)
    loss = torch.nn.functional.cross_entropy(logits, course.targets(0, rows, y))
    assert torch.allclose(loss, by_hand)


def orders(course, epochs, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [course.order(epoch, rng) for epoch in range(epochs)]


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(keep=.5), Mixing(real_share=.3), Mixing(real_share=.9, keep=.7)])
def test_sizes_and_steps_are_known_beforehand(data, synthetic, mixing):
    "They set the length of the cosine, the progress bar and the costs."
    both = join(data.train.take(np.arange(20)), synthetic)
    spec = replace(STAGES[1], epochs=5)
    course = MixedCourse(both, spec, 20, mixing, 0)
    seen = orders(course, 5)
    assert [sum(map(len, order)) for order in seen] == course.sizes() == epoch_sizes(mixing, 20, 100, 5, 32)
    assert [len(order) for order in seen] == course.steps()
    assert max(len(rows) for order in seen for rows in order) <= 33 # a rounded share


def test_every_batch_has_its_share_of_real_images(data, synthetic):
    both = join(data.train.take(np.arange(7)), synthetic)
    [order] = orders(MixedCourse(both, STAGES[1], 7, Mixing(real_share=.25), 0), 1)
    assert [int((rows < 7).sum()) for rows in order] == [round(len(rows) / 4) for rows in order]
    shown = torch.cat(list(order)).bincount(minlength=107)
    assert shown[7:].tolist() == [1] * 100 and max(shown[:7]) - min(shown[:7]) <= 1


def test_a_fade_ends_with_real_images_and_has_its_mean(data, synthetic):
    both = join(data.train.take(np.arange(20)), synthetic)
    spec = replace(STAGES[1], epochs=100)
    for keep in (.2, .5, .8):
        shown = np.array(MixedCourse(both, spec, 20, Mixing(keep=keep), 0).sizes()) - 20
        assert shown[0] == 100 and (np.diff(shown) <= 0).all() and abs(shown.mean() - 100 * keep) < 3
    half = orders(MixedCourse(both, spec, 20, Mixing(keep=.5), 0), 51)[50]
    other = orders(MixedCourse(both, spec, 20, Mixing(keep=.5), 1), 51)[50]
    rows = sorted(torch.cat(list(half)).tolist())
    assert rows[:20] == list(range(20)) and len(set(rows)) == 70 and rows != sorted(torch.cat(list(other)).tolist())


def test_a_fading_training_resumes_to_the_bit(data, synthetic, tmp_path):
    both = join(data.train.take(np.arange(20)), synthetic)
    def training(mixing=Mixing(.5, keep=.5)):
        return begin(create_backbone(ARCH, 10), both, STAGES[1], 0, course=MixedCourse(both, STAGES[1], 20, mixing, 0))
    t = training()
    for _ in range(2): t.curve.append(dict(zip(("loss", "train_accuracy"), train_epoch(t))))
    save_state(tmp_path/"state", t)
    resumed = training()
    load_state(tmp_path/"state", resumed)
    assert train_epoch(t) == train_epoch(resumed)
    with pytest.raises(ValueError, match="another training"): load_state(tmp_path/"state", training(Mixing()))


# ---- soft labels

def softened(images, share):
    others = (images.labels + 1) % 10
    shares = np.full(len(images), share, np.float32)
    return SoftImages(images.pixels, images.labels, images.names, images.rows, others, shares)


def test_soft_labels_reach_every_pipeline(data, synthetic, tmp_path):
    "Without a share of the other class they are the hard ones up to rounding, and with one they are not."
    for name in ("bridged_pp", "mixed", "mixed_balanced"):
        ways = (synthetic, softened(synthetic, 0.), softened(synthetic, .5))
        hard, none, half = (run(data, name, images, tmp_path/f"{name}{i}")[0]["conv1.weight"]
                            for i, images in enumerate(ways))
        assert (none - hard).norm() < (half - hard).norm() / 5, name


def test_real_images_stay_hard_beside_soft_ones(data, synthetic):
    real = data.train.take(np.arange(5))
    both = join(real, softened(synthetic, .25), 2)
    assert isinstance(both, SoftImages) and both.shares.tolist() == [0] * 10 + [.25] * 100
    assert both.others[10:].tolist() == ((synthetic.labels + 1) % 10).tolist()
    shuffled = shuffle_labels(softened(synthetic, .25), 0)
    assert ((shuffled.others - shuffled.labels) % 10 == 1).all()
    assert shuffled.labels.tolist() != synthetic.labels.tolist()


def test_another_share_is_other_images(synthetic):
    assert len({synthetic.digest, softened(synthetic, 0.).digest, softened(synthetic, .5).digest}) == 3


# ---- specs and the study

def test_specs_of_old_pipelines_are_of_the_old_kind(data, synthetic):
    def spec(name, **fields): return transfer_spec(Run(name, 2, 0, 10), data, ARCH, STAGES, "x", **fields)
    for name in ("vanilla", "mixed", "bridged_pp"):
        assert type(spec(name)) is TransferSpec and spec(name, mixing=Mixing(.5)) == spec(name)
    ways = [spec(name) for name in WAYS] + [spec("mixed_weighted", mixing=Mixing(.5))]
    assert {type(s) for s in ways} == {MixedSpec}
    assert len({spec_hash(s) for s in [*ways, spec("mixed")]}) == len(ways) + 1


def test_published_values():
    "Weights of the mean losses of a step's real and synthetic images: 1 to 1, and 0.8 to 0.2."
    def ratio(m): return (1 - m.real_share) * m.weight / m.real_share
    assert ratio(pipeline("mixed_he").mixing) == pytest.approx(1)
    assert ratio(pipeline("mixed_datadream").mixing) == pytest.approx(.2 / .8)
    assert pipeline("mixed_diffmix").mixing == Mixing(real_share=.9)


def test_the_study_runs_ways_that_are_named_and_no_others():
    study = Study("miniature", pipelines="vanilla mixed_weighted mixed_he mixed_fading", lr="0.03")
    assert {r.pipeline for r in study.runs("core", "digits")} == {*study.settings.pipelines}
    assert not {r.pipeline for sweep in ("core", "controls", "shots") for r in Study("miniature").runs(sweep, "digits")
                } & {*WAYS}
    data = study.load("digits")
    spec = study.spec(data, ARCH, Run("mixed_weighted", 4, 0, 20))
    assert spec.mixing == Mixing(study.settings.mix_weights[0]) and spec.finetune.lr == .03
    assert [k for k in study.searched("mixed_weighted", 4, ARCH)] == ["lr", "epochs", "repeats", "weight"]
    assert [k for k in study.searched("mixed_fading", 0, ARCH)] == ["lr", "epochs", "keep"]
    assert [k for k in study.searched("mixed_he", 4, ARCH)] == ["lr", "epochs"]
    assert ("mixed_fading", 4) in study.tuned_cells("digits", ARCH)


def test_the_study_s_weight_of_nothing_is_the_study_s_vanilla():
    "As long, too: mixed transfer has a number of epochs of its own, and at weight 0 it has vanilla's."
    study = Study("miniature", lr="0.03", mix_weights="0 1")
    data = study.load("digits")
    none, vanilla = (study.spec(data, ARCH, Run(name, 4, 0, 20)) for name in ("mixed_weighted", "vanilla"))
    assert none.finetune == vanilla.finetune and (none.synthetic, none.per_class, none.repeats) == ("", 0, 1)


def test_costs_count_what_is_shown():
    study = Study("miniature", lr="0.03")
    data = study.load("digits")
    target = Target("digits", 10, len(data.train), "digits")
    for name in WAYS:
        run = Run(name, 4, 0, 20)
        assert PassCounter(study).passes(run, target, ARCH) == image_passes(study.spec(data, ARCH, run), 40, 10), name


def test_a_record_s_columns_have_its_mixing(data, tmp_path):
    spec = transfer_spec(Run("mixed_datadream", 2, 0, 10), data, ARCH, STAGES, "x")
    write_record(tmp_path, "transfer", spec, {"accuracy": .5}, {})
    [path] = (tmp_path/"records"/"transfer").iterdir()
    row = to_frame([json.loads(path.read_text(encoding="utf-8"))]).iloc[0]
    assert (row.weight, row.real_share, row.keep, row.smoothing) == (.25, .5, 1, 0)


@pytest.mark.parametrize("wrong", [dict(weight=-1.), dict(real_share=1.), dict(keep=2.), dict(smoothing=1.),
                                   dict(weight=float("nan")), dict(weight=float("inf"))])
def test_impossible_mixing_is_rejected(wrong):
    with pytest.raises(ValueError, match="Mixing needs"): Mixing(**wrong)


def test_a_plain_course_is_the_default(data):
    one, two = (create_backbone(ARCH, 10) for _ in range(2))
    real = data.train.take(np.arange(40))
    course = MixedCourse(real, STAGES[1], 40, Mixing(), 0)
    assert finetune(one, real, STAGES[1], 0) == finetune(two, real, STAGES[1], 0, course=course)
