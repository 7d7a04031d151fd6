"""LEEP against an independent form, its bounds and symmetries, and what it refuses."""

import math

import numpy as np
import pytest
from bridgexfer.transferability import LeepSpec, label_entropy, leep


def slow(theta, y, classes):
    "The definition of Nguyen et al. (2020), an image and a class at a time."
    n, total = len(theta), 0.0
    for i in range(n):
        p = 0.0
        for z in range(len(theta[0])):
            joint = sum(theta[j][z] for j in range(n) if y[j] == y[i]) / n
            marginal = sum(theta[j][z] for j in range(n)) / n
            if marginal > 0: p += joint / marginal * theta[i][z]
        total += math.log(p)
    return total / n


def case(seed, n=30, sources=6, classes=4, dead=0, sharpness=0.3):
    rng = np.random.default_rng(seed)
    theta = np.zeros((n, sources))
    theta[:, dead:] = rng.dirichlet(np.full(sources - dead, sharpness), n)
    return theta, rng.integers(0, classes, n)


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_the_slow_form(seed):
    theta, y = case(seed, dead=seed % 6)
    assert leep(theta, y, 4) == pytest.approx(slow(theta.tolist(), y.tolist(), 4), abs=1e-12)


@pytest.mark.parametrize("dead", [1, 5])
def test_dead_source_classes_change_nothing(dead):
    theta, y = case(0, dead=dead)
    value = leep(theta, y, 4)
    assert math.isfinite(value)
    assert value == pytest.approx(leep(theta[:, dead:], y, 4), abs=1e-12)


def test_a_source_class_that_underflows_is_no_trouble():
    theta = np.tile([1.0, 1e-300], (6, 1))
    assert leep(theta, np.arange(6) % 2, 2) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("seed", range(30))
def test_lies_between_the_label_entropy_and_zero(seed):
    theta, y = case(seed, n=1 + seed, sharpness=0.02 if seed % 2 else 3)
    assert -label_entropy(y) - 1e-9 <= leep(theta, y, 4) <= 1e-12


def test_constant_predictor_scores_minus_the_label_entropy():
    balanced, skewed = np.arange(100) % 10, np.r_[np.zeros(90, int), np.arange(1, 11)]
    assert leep(np.ones((100, 1)), balanced, 10) == pytest.approx(-math.log(10))
    share = np.array([0.9] + [0.01] * 10)
    assert leep(np.full((100, 7), 1 / 7), skewed, 11) == pytest.approx((share * np.log(share)).sum())


def test_perfect_source_scores_zero_whatever_it_calls_the_classes():
    y = np.random.default_rng(0).integers(0, 5, 200)
    assert leep(np.eye(9)[np.array([8, 0, 3, 4, 7])[y]], y, 5) == 0
    assert leep(np.eye(9)[y].astype(np.float32), y, 5) == 0


def test_names_of_classes_and_order_of_images_do_not_matter():
    theta, y = case(1, n=50)
    rng, value = np.random.default_rng(2), leep(theta, y, 4)
    at = rng.permutation(50)
    assert leep(theta[at], y[at], 4) == pytest.approx(value, abs=1e-12)
    assert leep(theta[:, rng.permutation(6)], rng.permutation(4)[y], 4) == pytest.approx(value, abs=1e-12)
    assert leep(np.r_[theta, theta], np.r_[y, y], 4) == pytest.approx(value, abs=1e-12)


def test_single_precision_is_enough():
    theta, y = case(3, n=5000, sources=100)
    assert leep(theta.astype(np.float32), y, 4) == pytest.approx(leep(theta, y, 4), abs=1e-6)


def test_splitting_a_source_class_in_two_cannot_help():
    theta, y = case(4)
    halves = np.repeat(theta / 2, 2, axis=1)
    assert leep(halves, y, 4) == pytest.approx(leep(theta, y, 4), abs=1e-12)


GOOD, Y = np.full((4, 3), 1 / 3), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(("theta", "y", "said"), [
    (np.array([[2.0, -1.0, 0.0]] * 4), Y, "not logits"),
    (GOOD * 0.9, Y, "not logits"),
    (np.where(np.eye(4, 3) == 1, np.nan, GOOD), Y, "image 0 are not finite"),
    (np.where(np.eye(4, 3) == 1, np.inf, GOOD), Y, "not finite"),
    (GOOD, Y + 1, r"0\.\.1, found 1\.\.2"),
    (GOOD, Y - 1, "found -1"),
    (GOOD, Y / 1, "integer labels"),
    (GOOD[:0], Y[:0], "nothing"),
    (GOOD[:, :0], Y, "nothing"),
    (GOOD, Y[:3], r"\(4, 3\) and \(3,\)"),
    (GOOD[0], Y, "LEEP needs probabilities"),
])
def test_refuses(theta, y, said):
    with pytest.raises(ValueError, match=said): leep(theta, y, 2)


def test_spec_names_its_heads():
    with pytest.raises(ValueError, match="choose one of source, fresh, synthetic, constant"): LeepSpec("digits", "mini_vit", "imagenet", 0, "", "")
