"""LEEP, LogME and H-score against independent forms, their bounds and symmetries, and what they reject."""

import math
import subprocess
import sys

import numpy as np
import pytest
from bridgexfer.study.records import to_frame
from bridgexfer.scores import LeepSpec, h_score, label_entropy, leep, log_me, rank_correlation
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf


def slow(theta, y, classes):
    "The definition of Nguyen et al. (2020), an image and a class at a time."
    n = len(theta)
    total = 0.0
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


def test_scores_need_no_torch():
    code = """
import sys
import numpy as np
from bridgexfer.scores import rank_correlation, score
print(score(np.eye(3), np.eye(3), np.arange(3), 3), rank_correlation([1, 2, 3], [1, 3, 2]))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "logme" in done.stdout, done.stderr


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
    balanced = np.arange(100) % 10
    skewed = np.r_[np.zeros(90, int), np.arange(1, 11)]
    assert leep(np.ones((100, 1)), balanced, 10) == pytest.approx(-math.log(10))
    share = np.array([0.9] + [0.01] * 10)
    assert leep(np.full((100, 7), 1 / 7), skewed, 11) == pytest.approx((share * np.log(share)).sum())


def test_perfect_source_scores_zero_whatever_it_calls_the_classes():
    y = np.random.default_rng(0).integers(0, 5, 200)
    assert leep(np.eye(9)[np.array([8, 0, 3, 4, 7])[y]], y, 5) == 0
    assert leep(np.eye(9)[y].astype(np.float32), y, 5) == 0


def test_names_of_classes_and_order_of_images_do_not_matter():
    theta, y = case(1, n=50)
    rng = np.random.default_rng(2)
    value = leep(theta, y, 4)
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


GOOD = np.full((4, 3), 1 / 3)
Y = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(("theta", "y", "said"), [
    (np.array([[2.0, -1.0, 0.0]] * 4), Y, "not logits"),
    (GOOD * 0.9, Y, "not logits"),
    (np.where(np.eye(4, 3) == 1, np.nan, GOOD), Y, "image 0 are not finite"),
    (np.where(np.eye(4, 3) == 1, np.inf, GOOD), Y, "not finite"),
    (GOOD, Y + 1, r"0\.\.1, found 1\.\.2"),
    (GOOD, Y - 1, "found -1"),
    (GOOD, Y / 1, "integer labels"),
    (GOOD[:0], Y[:0], "at least one image"),
    (GOOD[:, :0], Y, "at least one image"),
    (GOOD, Y[:3], r"\(4, 3\) and \(3,\)"),
    (GOOD[0], Y, "LEEP needs probabilities"),
])
def test_rejects(theta, y, said):
    with pytest.raises(ValueError, match=said): leep(theta, y, 2)


def test_spec_names_its_heads():
    with pytest.raises(ValueError, match="choose one of source, fresh, synthetic, constant"):
        LeepSpec("digits", "mini_vit", "imagenet", 0, "", "")


# ---- LogME and H-score

def cloud(seed, n=40, d=6, classes=3, signal=1.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return rng.normal(size=(n, d)) + signal * rng.normal(size=(classes, d))[y], y


def log_evidence(F, y, u, v):
    "Log density of labels per image under log precisions u of weights and v of noise; none where it would overflow."
    if 2 * np.log(np.linalg.norm(F, 2)) - u + v >= 18: return -np.inf
    n = len(F)
    return multivariate_normal.logpdf(y, np.zeros(n), np.eye(n) / np.exp(v) + F @ F.T / np.exp(u)) / n


def best_on_a_grid(F, labels, classes):
    "LogME from the density at every point of a grid over the two precisions, refined around the best point."
    values = []
    for c in np.unique(labels):
        y = (labels == c) * 1.0
        a = 2 * np.log(np.linalg.norm(F, 2))
        b = 4.0
        for width, count in ((10, 31), (0.7, 9), (0.2, 9)):
            steps = np.linspace(-width, width, count)
            best, a, b = max((log_evidence(F, y, u, v), u, v) for u in a + steps for v in b + steps)
        values.append(best)
    return np.mean(values)


@pytest.mark.parametrize(("n", "d", "signal"), [(20, 4, 0.3), (20, 4, 2), (12, 20, 1)])
def test_log_me_is_the_greatest_density_of_the_labels(n, d, signal):
    F, y = cloud(n + d, n, d, 2, signal)
    assert log_me(F, y, 2) == pytest.approx(best_on_a_grid(F, y, 2), abs=1e-3)


def test_log_me_finds_the_higher_of_two_peaks():
    "A large feature says a little, a small one nearly all: from equal precisions the iteration stops at the first."
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    F = np.c_[y - 0.5 + rng.normal(0, 0.7, 40), 1e-3 * (y - 0.5 + rng.normal(0, 0.1, 40)), np.full(40, 1e-3)]
    assert log_me(F, y, 2) > log_me(F[:, :1], y, 2) + 1


def floor(y):
    p = np.bincount(y) / len(y)
    return np.mean([-0.5 * (math.log(2 * math.pi * q) + 1) for q in p if q > 0])


def h_shrunk(*args): return h_score(*args, shrink=True)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("score", [log_me, h_score, h_shrunk])
def test_no_nan_and_within_bounds_in_awkward_cases(score, seed):
    rng = np.random.default_rng(seed)
    n, d, classes = (rng.integers(1, most) for most in (30, 40, 5))
    F, y = cloud(seed, n, d, classes, rng.choice([0, 1, 100]))
    rank_one = F @ rng.normal(size=(d, 1)) @ rng.normal(size=(1, d))
    F = [F, F * 0, F * 0 + 0.1, rank_one, np.repeat(F, 2, 1), F * 1e-20 + 1, F.astype(np.float32)][seed % 7]
    value = score(F, y, classes + 2)
    assert math.isfinite(value)
    if score is log_me:
        assert floor(y) - 1e-7 <= value
    else:
        assert -1e-9 <= value <= min(len(np.unique(y)) - 1, F.shape[1]) + 1e-6


@pytest.mark.parametrize("score", [log_me, h_score, h_shrunk])
def test_order_scale_and_rotation_do_not_matter(score):
    F, y = cloud(0)
    rng = np.random.default_rng(1)
    value = score(F, y, 3)
    at = rng.permutation(len(y))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    renamed = np.array([2, 0, 1])[y]
    for features, labels in ((F[at], y[at]), (F, renamed), (1e5 * F, y), (1e-5 * F, y), (F @ rotation, y)):
        assert score(features, labels, 3) == pytest.approx(value, abs=1e-6)
    assert score(F, y, 8) == pytest.approx(value, abs=1e-12)


def test_useless_features_score_the_floor_and_better_ones_more():
    y = np.random.default_rng(0).integers(0, 3, 200)
    for score in (log_me, h_score):
        a, b, c = (score(*cloud(0, 200, 5, signal=s), 3) for s in (0, 0.5, 2))
        assert a < b < c
    useless = np.zeros((200, 4))
    assert log_me(useless, y, 3) == pytest.approx(floor(y), abs=1e-7) and h_score(useless, y, 3) == 0


def test_h_score_by_covariances():
    F, y = cloud(3, 60, 5, 4)
    means = np.stack([F[y == c].mean(0) for c in range(4)])[y]
    between = np.cov(means.T, bias=True)
    shrunk, a = ledoit_wolf(F)
    assert h_score(F, y, 4) == pytest.approx(np.trace(np.linalg.inv(np.cov(F.T, bias=True)) @ between), abs=1e-9)
    assert h_shrunk(F, y, 4) == pytest.approx(np.trace(np.linalg.inv(shrunk) @ between) * (1 - a), abs=1e-9)
    mapped = F @ np.random.default_rng(0).normal(size=(5, 5)) - 3
    assert h_score(mapped, y, 4) == pytest.approx(h_score(F, y, 4), abs=1e-8)


def test_h_score_of_noise_is_full_with_few_images_unless_shrunk():
    F = np.random.default_rng(0).normal(size=(50, 80))
    y = np.arange(50) % 5
    assert h_score(F, y, 5) == pytest.approx(4) and h_shrunk(F, y, 5) < 1


def test_what_may_be_rounding_of_float32_counts_for_nothing():
    y = np.arange(60) % 3
    offset = (1000 + 1e-7 * y[:, None] + np.zeros((1, 4))).astype(np.float64)
    assert h_score(offset, y, 3) == 0 and h_score(np.c_[y * 1.0, offset], y, 3) == pytest.approx(1)


@pytest.mark.parametrize(("score", "name"), [(log_me, "LogME"), (h_score, "H-score")])
@pytest.mark.parametrize(("features", "y", "said"), [
    (np.where(np.eye(4, 3) == 1, np.nan, GOOD), Y, "the features of image 0 are not finite"),
    (GOOD, Y + 1, r"0\.\.1, found 1\.\.2"),
    (GOOD, Y / 1, "integer labels"),
    (GOOD[:0], Y[:0], "at least one image"),
    (GOOD[:, :0], Y, "at least one image"),
    (GOOD, Y[:3], r"\(4, 3\) and \(3,\)"),
    (GOOD[0], Y, "needs features"),
])
def test_scores_of_features_reject(score, name, features, y, said):
    with pytest.raises(ValueError, match=said) as e: score(features, y, 2)
    assert str(e.value).startswith(name)


# ---- ranks

def test_rank_correlation_of_few_models():
    r = rank_correlation([1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3])
    assert (r.tau, r.n) == (pytest.approx(2 / 3), 4)
    assert r.p == pytest.approx(8 / 24) # 4 of 24 orders have at most one discordant pair
    reversed_ = rank_correlation([3, 2, 1], [1, 2, 3])
    assert reversed_.tau == -1 and reversed_.p == pytest.approx(1 / 3)
    low, top = (rank_correlation([1, 2, 3, 4], other).weighted for other in ([2, 1, 3, 4], [1, 2, 4, 3]))
    assert low > top # an exchange among the last ranks costs less than one among the first


def test_rank_correlation_of_many_models():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    assert rank_correlation(x, x + rng.normal(size=40)).p < 0.05 < rank_correlation(x, rng.normal(size=40)).p
    assert rank_correlation(x, 2 + np.exp(x)).tau == pytest.approx(1)


@pytest.mark.parametrize("scores", [[], [1], [2, 2, 2]])
def test_rank_correlation_that_cannot_be_told_is_nan(scores):
    r = rank_correlation(scores, range(len(scores)))
    assert np.isnan([r.tau, r.weighted, r.p]).all() and r.n == len(scores)


@pytest.mark.parametrize(("scores", "accuracies"), [
    ([1, 2], [1, 2, 3]), ([1, math.nan], [1, 2]), ([[1, 2]], [[1, 2]])])
def test_rank_correlation_rejects(scores, accuracies):
    with pytest.raises(ValueError, match="a score and an accuracy for each model"):
        rank_correlation(scores, accuracies)


def test_a_record_without_features_leaves_their_scores_empty():
    results = {"constant": {"leep": -2.3}, "source": {"leep": -1.2, "logme": 0.1, "h_score": 3.0}}
    records = [{"kind": "leep", "hash": h, "spec": {"head": h}, "result": result} for h, result in results.items()]
    table = to_frame(records).set_index("head")
    assert np.isnan(table.logme["constant"]) and np.isnan(table.h_score["constant"]) and table.logme["source"] == 0.1
