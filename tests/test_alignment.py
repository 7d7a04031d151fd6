"""The kernel distance against an independent form, and what has no distance and no description."""
import itertools

import numpy as np
import pytest
from bridgexfer.alignment import AlignmentSpec, across, balanced, descriptions, kernel_distance, nearer, within
from bridgexfer.images import as_images
from bridgexfer.generation import SynthesisSpec


def slow(x, y, gamma):
    "The estimate of Gretton et al. (2012), by exact sums over pairs."
    def k(a, b): return float(1 + gamma * np.dot(a, b))**3
    def inside(z): return np.mean([k(a, b) for a, b in itertools.permutations(z, 2)])
    return inside(x) + inside(y) - 2 * np.mean([k(a, b) for a, b in itertools.product(x, y)])


@pytest.mark.parametrize("seed", range(10))
def test_agrees_with_the_slow_form(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 + seed, 4))
    y = rng.normal(.5, 2, size=(12 - seed, 4))
    for gamma in (1., .25): assert kernel_distance(x, y, gamma) == pytest.approx(slow(x, y, gamma), abs=1e-9)


def test_symmetric_and_blind_to_order_and_rotation():
    rng = np.random.default_rng(0)
    x, y, z = (rng.normal(size=(n, 4)) for n in (9, 7, 4))
    q, _ = np.linalg.qr(z)
    value = kernel_distance(x, y)
    for a, b in ((y, x), (x[::-1], y), (x @ q, y @ q)): assert kernel_distance(a, b) == pytest.approx(value, abs=1e-9)


def test_a_set_and_itself_are_nearer_than_any_two_draws():
    "The pairs of an image with itself are in the term across, but not in the terms within."
    x = np.random.default_rng(0).normal(size=(20, 4))
    assert kernel_distance(x, x) < 0


def test_nearer_is_the_difference_of_distances():
    rng = np.random.default_rng(1)
    real, near, far = (rng.normal(shift, 1, size=(30, 3)) for shift in (0, .2, 2))
    parts = [dict(within=within(z), across=across(real, z)) for z in (far, near)]
    gain = nearer(*parts)
    assert gain.shape == (30,) and gain.mean() > 0
    assert gain.mean() == pytest.approx(kernel_distance(real, far) - kernel_distance(real, near), abs=1e-9)
    shorter = {**parts[1], "across": parts[1]["across"][:29]}
    with pytest.raises(ValueError, match="with 30 and 29 images"): nearer(parts[0], shorter)


def test_what_cannot_be_compared_is_rejected():
    x = np.eye(3)
    with pytest.raises(ValueError, match="one width"): kernel_distance(x, np.eye(4))
    with pytest.raises(ValueError, match="two images"): kernel_distance(x, x[:1])


def pictures(labels):
    pixels = np.arange(len(labels) * 12, dtype=np.uint8).reshape(-1, 2, 2, 3)
    return as_images(pixels, labels, ("a", "b"))


def test_balanced_takes_the_same_number_of_each_class():
    skewed = pictures([0] * 9 + [1] * 3)
    assert np.bincount(balanced(skewed, 100).labels).tolist() == [3, 3]
    assert len(balanced(skewed, 5)) == 4 and len(balanced(skewed, 1)) == 2
    assert balanced(skewed, 4).digest == balanced(skewed, 4).digest
    with pytest.raises(ValueError, match="no image of 'b'"): balanced(pictures([0, 0]), 2)


def test_images_are_described_by_the_prompts_of_their_set():
    images = pictures([0, 1, 1])
    how = SynthesisSpec(("a", "b"), "w", templates="style", style="<s>")
    assert descriptions(how, images, 0) == ["a a photo in the style of <s>", *["a b photo in the style of <s>"] * 2]
    plain = SynthesisSpec(("a", "b"), "w", class_words=("<x>", "<y>"))
    prompts = descriptions(plain, images, 0)
    assert [("<x>" in p, "<y>" in p) for p in prompts] == [(True, False), (False, True), (False, True)]
    assert descriptions(plain, images.take(np.array([1])), 0) == prompts[1:2]  # depends on the row, not on the position
    with pytest.raises(ValueError, match="those of one dataset"):
        descriptions(SynthesisSpec(("c", "d"), "w"), images, 0)


@pytest.mark.parametrize("wrong", [
    dict(synthesis="real", synthetic="f00"),
    dict(synthesis="style"),
    dict(synthesis="web", synthetic="web-0", draws=8),
    dict(synthesis="style", synthetic="f00", weights="w"),
])
def test_a_spec_names_what_it_needs_and_no_more(wrong):
    with pytest.raises(ValueError): AlignmentSpec("digits", "d", "c", **wrong)
