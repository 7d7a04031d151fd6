"""Paired differences: right in known cases, symmetric, honest about few seeds, and quick."""

import time

import numpy as np
import pandas as pd
import pytest
from bridgexfer.statistics import compare, detectable, false_rate, holm, interval, over_datasets, p_value
from bridgexfer.statistics import paired_difference, sets_of, shared_sets, summary, tally
from scipy.stats import t as student
from scipy.stats import ttest_1samp

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


# ---- known answers

def normal_study(rng, seeds=3, images=60, seed=0.0, image=0.0):
    "Differences with given standard deviations of seeds and images, and 1 for the rest."
    return rng.normal(0, seed, (seeds, 1)) + rng.normal(0, image, images) + rng.normal(0, 1, (seeds, images))


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_one_column_is_students_t(level):
    column = np.array([0.3, 1.2, -0.4, 0.9])
    d = interval(column[:, None], level=level)
    theirs = ttest_1samp(column, 0).confidence_interval(level)
    assert (d.low, d.high) == pytest.approx(tuple(theirs), abs=1e-12) and d.df == 3
    assert p_value(d.difference, d.se, d.df) == pytest.approx(ttest_1samp(column, 0).pvalue)


def test_two_crossed_factors_are_the_analysis_of_variance():
    "Mean squares by sums, row by row and column by column."
    D = normal_study(np.random.default_rng(3), 4, 30, seed=2.0, image=1.0)
    S, n = D.shape
    mean = sum(map(sum, D)) / (S * n)
    rows = [sum(row) / n for row in D]
    columns = [sum(column) / S for column in D.T]
    seeds = n * sum((r - mean)**2 for r in rows) / (S - 1)
    images = S * sum((c - mean)**2 for c in columns) / (n - 1)
    rest = sum((D[s, i] - rows[s] - columns[i] + mean)**2 for s in range(S) for i in range(n)) / ((S - 1) * (n - 1))
    total = seeds + images - rest
    df = total**2 / (seeds**2 / (S - 1) + images**2 / (n - 1) + rest**2 / ((S - 1) * (n - 1)))
    d = interval(D)
    assert seeds > rest < images and d.se**2 == pytest.approx(total / (S * n)) and d.df == pytest.approx(df)
    assert d.high - d.low == pytest.approx(2 * student.ppf(0.975, df) * d.se)
    assert d.detectable == pytest.approx((student.ppf(0.975, df) + student.ppf(0.8, df)) * d.se)


def test_a_variance_is_not_negative():
    "Seeds whose means are equal say nothing against the variance of the rest."
    D = np.array([[1.0, -1], [-1, 1], [0, 0]])
    rest = (D**2).sum() / 2 # all means are 0, so are the other two variances
    d = interval(D)
    assert d.difference == 0 and d.se**2 == pytest.approx(rest / 6) and d.df == pytest.approx(2)


def test_seeds_of_a_set_count_as_one():
    D = normal_study(np.random.default_rng(4), 6, 40, seed=1.0)
    sets = ["p", "q", "r", "r", "q", "p"]
    by_set = np.stack([D[[0, 5]].mean(0), D[[1, 4]].mean(0), D[[2, 3]].mean(0)])
    nested = interval(D, sets=sets)
    plain = interval(by_set)
    assert (nested.difference, nested.se, nested.df) == pytest.approx((plain.difference, plain.se, plain.df))
    assert (nested.n, nested.draws, plain.n) == (6, 3, 3)
    column = D.mean(1)[:, None]
    assert interval(column, sets=sets).df == 2


def test_sets_with_unequal_numbers_of_seeds():
    "The difference is the mean over seeds, and its variance that of a sum over sets."
    column = np.array([1.0, 2, 6, 9, 12])
    d = interval(column[:, None], sets=[0, 0, 1, 1, 1])
    sums = [(1 - 6) + (2 - 6), (6 - 6) + (9 - 6) + (12 - 6)]
    assert d.difference == 6 and d.se**2 == pytest.approx(sum(x**2 for x in sums) / 25 * 2 / 1)


def test_classes_have_equal_weights():
    "Images are drawn within their class; a class of one image takes the average variance."
    rng = np.random.default_rng(5)
    groups = np.r_[np.zeros(8, int), np.ones(3, int), 2]
    D = rng.normal(size=(1, 12))
    squares = [((D[0, groups == c] - D[0, groups == c].mean())**2).sum() for c in (0, 1)]
    variance = (squares[0] / 7 / 8 + squares[1] / 2 / 3 + sum(squares) / 9) / 9
    d = interval(D, groups)
    assert d.difference == pytest.approx(np.mean([D[0, groups == c].mean() for c in range(3)]))
    assert d.se**2 == pytest.approx(variance) and d.df == 9 and d.verdict == "inconclusive"
    assert interval(D, np.arange(12)).se == pytest.approx(interval(D).se) # an image per class


@pytest.mark.parametrize("sets", [None, [0, 1, 2, 2, 1, 0]])
def test_the_order_of_seeds_images_and_names_does_not_matter(sets):
    rng = np.random.default_rng(6)
    D = normal_study(rng, 6, 50, seed=0.5)
    groups = rng.integers(0, 4, 50)
    seeds = rng.permutation(6)
    images = rng.permutation(50)
    moved = None if sets is None else [f"set {sets[s]}" for s in seeds]
    one = interval(D, groups, sets)
    other = interval(D[seeds][:, images], 9 - groups[images], moved)
    def numbers(d): return d.difference, d.low, d.high, d.df, d.detectable
    assert numbers(one) == pytest.approx(numbers(other))


def test_nothing_is_known_from_a_single_number():
    d = interval([[0.3]])
    assert (d.low, d.high, d.verdict) == (-np.inf, np.inf, "inconclusive") and np.isnan(d.detectable)


# ---- promises

@pytest.mark.parametrize(("seeds", "sets", "seed"), [
    (3, None, 0.0), (3, None, 0.1), (3, None, 1.0), (5, None, 0.3), (10, None, 0.0), (12, 4, 0.3)])
def test_false_verdicts_stay_within_what_pages_say(seeds, sets, seed):
    "Nothing differs, and a seed or a set moves all images."
    rng = np.random.default_rng(7)
    of = None if sets is None else np.arange(seeds) % sets
    def verdict():
        D = normal_study(rng, seeds, 100, seed, 0.3)
        if sets: D = D + rng.normal(0, seed, sets)[of][:, None]
        return interval(D, sets=of).verdict
    rate = np.mean([verdict() != "inconclusive" for _ in range(1000)])
    assert rate < false_rate(sets or seeds) + 0.02


def test_seeds_that_share_sets_are_not_independent():
    "Without the sets, a difference between sets is taken for one of pipelines."
    rng = np.random.default_rng(8)
    of = np.arange(12) % 4
    def wrong(sets): return np.mean([interval(D, sets=sets).verdict != "inconclusive" for D in studies])
    studies = [normal_study(rng, 12, 50, 0.1) + rng.normal(0, 0.5, 4)[of][:, None] for _ in range(400)]
    assert wrong(None) > 0.2 > 0.1 > wrong(of)


@pytest.mark.parametrize(("luck", "least", "most"), [(0.0, 0.93, 1.0), (0.3, 0.9, 0.99), (1.0, 0.9, 0.99)])
def test_interval_covers_the_truth_about_as_often_as_it_says(luck, least, most):
    "Simulated studies of three seeds; `luck` is how much the seed moves a run."
    from scipy.special import ndtr

    rng = np.random.default_rng(7)
    scale = np.sqrt(2.5**2 + 1 + luck**2)
    truth = ndtr(3.8 / scale) - ndtr(3.5 / scale)
    def covered():
        difficulty = rng.normal(3.5, 2.5, 500)
        a, b = (difficulty + lift + rng.normal(0, luck, (3, 1)) + rng.normal(0, 1, (3, 500)) > 0 for lift in (0, 0.3))
        d = interval(b * 1.0 - a)
        return d.low <= truth <= d.high
    assert least <= np.mean([covered() for _ in range(400)]) <= most


def test_a_detectable_effect_is_found_four_times_in_five():
    rng = np.random.default_rng(9)
    effect = detectable(1 / np.sqrt(8), 7)
    found = [interval(effect + rng.normal(size=(8, 1))).verdict == "better" for _ in range(1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_an_interval_takes_milliseconds():
    labels = np.random.default_rng(0).integers(0, 100, 1000)
    for metric in ("top1", "mean_per_class"):
        started = time.process_time()
        for _ in range(10): paired_difference(runs(0.8, 0, labels=labels), runs(0.9, 1, labels=labels), labels, metric)
        assert time.process_time() - started < 1


# ---- sets

@pytest.mark.parametrize(("a", "b", "together"), [
    (["", "", ""], ["", "", ""], [0, 1, 2]),
    (["", "", "", ""], ["p", "q", "p", "q"], [0, 1, 0, 1]),
    (["p", "q", "p"], ["p", "q", "p"], [0, 1, 0]),
    (["p", "p", "q", "q"], ["r", "s", "s", "t"], [0, 0, 0, 0]),
    (["p", "p", "p"], ["r", "s", "t"], [0, 0, 0]),
    (["", ""], ["p", "p"], None),
    (["p", "p"], ["p", "p"], None)])
def test_seeds_that_share_a_set_of_either_kind_belong_together(a, b, together):
    found = shared_sets(a, b)
    assert found is together if together is None else found.tolist() == together


def test_one_set_of_each_kind_has_no_verdict_and_two_may():
    frame = records(single=0.5, style=0.9).rename(columns={"pipeline": "way"})
    def verdict(sets): return compare(frame.assign(synthetic=frame.way + sets), ["dataset"], "single", "way").iloc[0]
    one = verdict("")
    assert (one.verdict, one.n, one.draws) == ("inconclusive", 3, 1) and one.low > 0 and np.isnan(one.detectable)
    two = verdict((frame.seed % 2).astype(str))
    assert (two.n, two.draws) == (3, 2) and two.verdict == "better"
    same = compare(frame.assign(synthetic="p"), ["dataset"], "single", "way").iloc[0]
    assert (same.verdict, same.draws) == ("better", 3) # about this set
    missing = frame.assign(synthetic=np.where(frame.way == "single", None, "p"))
    assert compare(missing, ["dataset"], "single", "way").verdict.item() == "better"
    assert sets_of(frame).tolist() == list(range(6))


# ---- claims

def test_the_mean_over_datasets():
    gains = [1.0, 4, 2, 5]
    general = over_datasets(gains, [0.1] * 4, [2] * 4)
    theirs = ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (general.low, general.high, general.df, general.n) == pytest.approx((theirs.low, theirs.high, 3, 4))
    alike = over_datasets([2.0, 2, 2], [1.0, 2, 2], [5, 5, 5]) # not more certain than seeds and images allow
    assert alike.se == pytest.approx(1.0) and alike.df == 2
    these = over_datasets([2.0, 2, 2], [1.0, 2, 2], [5, 5, 5], random=False)
    assert these.se == pytest.approx(1.0) and these.df == pytest.approx(81 / (33 / 5))
    single = over_datasets([9.0], [1.0], [5])
    assert single.verdict == "inconclusive" and single.low > 0


def test_holm():
    "Sorted, the p values are multiplied by 4, 3, 2 and 1, and do not decrease."
    assert holm([0.02, 0.01, 0.9, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.7, 0.6]).tolist() == [1, 1] and holm([0.03]).tolist() == [0.03] and len(holm([])) == 0


def test_p_values():
    assert p_value([2.0, 0.0], [1.0, 0.0], [7, 7]).tolist() == pytest.approx([2 * student.sf(2, 7), 1])
    assert p_value(2.0, 0.0, 7) == 0


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
