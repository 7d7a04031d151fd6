"""Paired differences: right in known cases, symmetric, honest about few seeds, and quick."""

import time

import numpy as np
import pandas as pd
import pytest
from bridgexfer.statistics import choose_rates, compare, interval, paired_difference, resample, summary, tally

LABELS = np.random.default_rng(9).integers(0, 10, 900)


def runs(accuracy, seed, seeds=3, labels=LABELS):
    right = np.random.default_rng(seed).random((seeds, len(labels))) < accuracy
    return np.where(right, labels, (labels + 1) % 10)


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_a_large_difference_is_seen(metric, seeds):
    d = paired_difference(runs(0.5, 0, seeds), runs(0.9, 1, seeds), LABELS, metric)
    assert d.verdict == "better" and d.low < d.difference < d.high and abs(d.difference - 0.4) < 0.04 and d.n == seeds


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_exchanging_the_two_changes_signs_and_nothing_else(metric):
    a = runs(0.80, 0)
    b = runs(0.83, 1)
    ab = paired_difference(a, b, LABELS, metric)
    ba = paired_difference(b, a, LABELS, metric)
    assert (ba.difference, ba.low, ba.high) == pytest.approx((-ab.difference, -ab.high, -ab.low), abs=1e-12)
    assert {ab.verdict, ba.verdict} in ({"better", "worse"}, {"inconclusive"})


def test_identical_runs_are_inconclusive():
    a = runs(0.8, 0)
    d = paired_difference(a, a, LABELS)
    assert (d.difference, d.low, d.high, d.verdict) == (0, 0, 0, "inconclusive")


def test_one_seed_never_has_a_verdict():
    d = paired_difference(runs(0.1, 0, 1), runs(0.9, 1, 1), LABELS)
    assert d.verdict == "inconclusive" and d.low > 0


def test_seeds_that_disagree_leave_it_open_however_many_images_there_are():
    labels = np.zeros(100_000, int)
    def right(*shares): return np.array([np.arange(100_000) >= s * 100_000 for s in shares]).astype(int)
    d = paired_difference(right(0.5, 0.5, 0.5), right(0.45, 0.58, 0.75), labels)
    assert d.difference > 0.09 and d.verdict == "inconclusive"


def test_pairing_counts():
    "Two pipelines that are right on nearly the same images differ for sure, although each accuracy alone is uncertain."
    a = runs(0.8, 0)
    wrong = np.flatnonzero((a != LABELS).all(0) | (a != LABELS).any(0))[:60]
    b = a.copy()
    b[:, wrong] = LABELS[wrong]
    assert paired_difference(a, b, LABELS).verdict == "better"


def test_the_two_metrics_differ_where_classes_do():
    labels = np.r_[np.zeros(820, int), np.arange(1, 10).repeat(20)]
    def biased(seed, large, small):
        right = np.random.default_rng(seed).random((3, 1000)) < np.where(labels == 0, large, small)
        return np.where(right, labels, -1)
    def mean_per_class(p): return np.mean([(p == labels)[:, labels == c].mean() for c in range(10)])
    a = biased(0, 0.8, 0.8)
    b = biased(1, 0.95, 0.5)
    assert paired_difference(a, b, labels).verdict == "better"
    per_class = paired_difference(a, b, labels, "mean_per_class")
    assert per_class.verdict == "worse"
    assert per_class.difference == pytest.approx(mean_per_class(b) - mean_per_class(a))


@pytest.mark.parametrize("groups", [None, np.arange(150) % 3], ids=["one group", "three groups"])
def test_draws_are_those_of_a_bootstrap_written_out(groups):
    rng = np.random.default_rng(0)
    D = rng.choice([-1.0, 0, 1], p=[0.1, 0.7, 0.2], size=(4, 150))
    parts = [np.arange(150)] if groups is None else [np.flatnonzero(groups == g) for g in range(3)]
    def images(): return np.concatenate([rng.choice(part, len(part)) for part in parts])
    plain = [D[np.ix_(rng.integers(0, 4, 4), images())].mean() for _ in range(4000)]
    quick = resample(D, groups, draws=20_000)
    assert quick.mean() == pytest.approx(np.mean(plain), abs=0.003)
    assert quick.std() == pytest.approx(np.std(plain), rel=0.06)


def test_the_same_seed_gives_the_same_interval():
    def difference(seed): return paired_difference(runs(0.8, 0), runs(0.82, 1), LABELS, seed=seed)
    assert difference(0) == difference(0) != difference(1)


@pytest.mark.parametrize(("luck", "least", "most"), [(0.0, 0.93, 1.0), (0.3, 0.88, 0.99), (1.0, 0.88, 0.99)])
def test_interval_covers_the_truth_about_as_often_as_it_says(luck, least, most):
    "Simulated studies of three seeds; `luck` is how much the seed moves a run."
    from scipy.special import ndtr

    rng = np.random.default_rng(7)
    scale = np.sqrt(2.5**2 + 1 + luck**2)
    truth = ndtr(3.8 / scale) - ndtr(3.5 / scale)
    def covered():
        difficulty = rng.normal(3.5, 2.5, 500)
        a, b = (difficulty + lift + rng.normal(0, luck, (3, 1)) + rng.normal(0, 1, (3, 500)) > 0 for lift in (0, 0.3))
        d = interval(b * 1.0 - a, draws=400)
        return d.low <= truth <= d.high
    assert least <= np.mean([covered() for _ in range(250)]) <= most


def test_ten_thousand_draws_take_well_under_a_second():
    labels = np.random.default_rng(0).integers(0, 100, 1000)
    for metric in ("top1", "mean_per_class"):
        started = time.process_time()
        paired_difference(runs(0.8, 0, labels=labels), runs(0.9, 1, labels=labels), labels, metric)
        assert time.process_time() - started < 1


@pytest.mark.parametrize(("a", "b", "labels", "metric", "said"), [
    (runs(0.5, 0), runs(0.5, 0, 2), LABELS, "top1", "Paired predictions"),
    (runs(0.5, 0), runs(0.5, 1), LABELS[:5], "top1", "Paired predictions"),
    (runs(0.5, 0), runs(0.5, 1), LABELS, "f1", "choose top1 or mean_per_class"),
    (np.zeros((0, 900)), np.zeros((0, 900)), LABELS, "top1", "finite numbers"),
])
def test_rejects(a, b, labels, metric, said):
    with pytest.raises(ValueError, match=said): paired_difference(a, b, labels, metric)


# ---- tables

def records(**accuracy):
    common = dict(dataset="d", shots=0, metric="top1", labels=LABELS.tolist())
    def record(p, s, row):
        return dict(**common, pipeline=p, seed=s, predictions=row.tolist(), accuracy=float((row == LABELS).mean()))
    return pd.DataFrame([record(p, s, row) for i, (p, share) in enumerate(accuracy.items())
                         for s, row in enumerate(runs(share, i))])


def test_compare_pairs_by_seed_not_by_row():
    frame = records(vanilla=0.7, bridged=0.9, mixed=0.5)
    verdicts = compare(frame, ["dataset", "shots"]).set_index("pipeline")
    assert verdicts.verdict.to_dict() == {"bridged": "better", "mixed": "worse"}
    shuffled = compare(frame.sample(frac=1, random_state=0), ["dataset", "shots"]).set_index("pipeline")
    pd.testing.assert_frame_equal(verdicts, shuffled.loc[verdicts.index])
    assert compare(frame, ["dataset", "shots"], baseline="mixed").set_index("pipeline").verdict["vanilla"] == "better"


def test_compare_rejects_what_is_not_paired():
    frame = records(vanilla=0.7, bridged=0.9)
    other_labels = frame.assign(labels=[*frame.labels[:-1], [0] * 900])
    mistakes = [
        (frame.drop(index=5), r"bridged against vanilla: seeds \[0, 1\] against \[0, 1, 2\]"),
        (pd.concat([frame, frame.tail(1)]), "seed 2 occurs twice"),
        (frame[frame.pipeline == "bridged"], "no runs of vanilla"),
        (other_labels, "different test labels"),
    ]
    for wrong, words in mistakes:
        with pytest.raises(ValueError, match=words): compare(wrong, ["dataset", "shots"])


def test_summary():
    table = summary(records(vanilla=0.7, bridged=0.9), ["dataset", "pipeline"]).set_index("pipeline")
    assert list(table.columns) == ["dataset", "mean", "sd", "n"] and table.n.tolist() == [3, 3]
    assert table["sd"]["vanilla"] == pytest.approx(np.std(records(vanilla=0.7).accuracy, ddof=1))
    with pytest.raises(ValueError, match="1 rows have no accuracy"):
        summary(pd.DataFrame({"p": ["a"], "accuracy": [np.nan]}), ["p"])


def test_tally():
    said = tally(["worse", "better"], "things", "mixed")
    assert said == "better than mixed on 1 of 2 things, worse on 1, inconclusive on 0"
    with pytest.raises(ValueError, match="got good"): tally(["good"])


def grid(**rates):
    return pd.DataFrame([dict(dataset="d", arch="a", pipeline=p, lr=lr, accuracy=v)
                         for p, row in rates.items() for lr, v in row.items()])


def test_learning_rate_ties_go_to_the_smaller():
    cells = grid(vanilla={0.1: 0.9, 0.03: 0.9, 0.01: 0.8}, mixed={0.1: 0.5, 0.03: 0.7, 0.01: 0.6})
    chosen = choose_rates(cells).set_index("pipeline")
    assert chosen.lr.to_dict() == {"vanilla": 0.03, "mixed": 0.03}
    assert set(chosen.edge) == {""} and set(chosen.origin) == {"tuned"}


def test_learning_rates_are_chosen_by_the_mean_over_seeds_and_a_failed_one_cannot_win():
    cells = pd.concat([grid(vanilla={0.1: 0.99, 0.03: 0.8, 0.01: 0.7}), grid(vanilla={0.03: 0.6, 0.01: 0.9})])
    chosen = choose_rates(cells).iloc[0]
    assert chosen.lr == 0.01 and chosen.validation_accuracy == pytest.approx(0.8) and chosen.edge == "smallest"
