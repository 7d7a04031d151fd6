"""What the paper prints is typed right; tables, claims and figures say what the runs say."""

import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from bridgexfer.statistics import false_rate
from bridgexfer.study import plots, report
from bridgexfer.study.report import Claim, agrees, caution, conclude, judge, only, ordered, plus_minus, printed
from bridgexfer.study.report import published, quoted, show_table, standing, wide
from bridgexfer.transfer import CONTROLS, PIPELINES, Pipeline

matplotlib.use("Agg")


# ---- the paper's numbers

def test_printed_values_are_complete_and_marked():
    counts = {"tab1": (20, 1), "tab2": (50, 0), "tab3": (10, 0), "tab4": (40, 10), "tab5": (10, 0), "tab6": (9, 0),
              "tab7": (20, 0)} # Table 4's metrics are words
    for table, (rows, missing) in counts.items():
        frame = published(table)
        assert len(frame) == rows and frame.value.isna().sum() == missing
        assert not frame.duplicated(["dataset", "row"]).any() and frame.note[frame.value.isna()].notna().all()
    assert published("tab2").spread.between(0, 1).all() and set(printed("tab2").index) == set(PIPELINES)
    with pytest.raises(ValueError, match="choose tab1, tab2, tab3, tab4, tab5, tab6, tab7, text"): published("tab9")


def test_printed_values_need_a_clone(tmp_path):
    with pytest.raises(FileNotFoundError, match="run from inside a clone"): published("tab2", tmp_path)


def test_printed_values_agree_with_the_papers_text():
    mean = printed("tab2").T
    assert (mean.bridged_pp > mean.vanilla).all()  # "consistently outperforms vanilla transfer"
    assert 6 <= (mean.vanilla - mean.mixed).mean() <= 10  # "a 6-10% reduction", on average
    said = quoted()
    for d in ("aircraft", "cars"):
        assert round(mean.bridged_pp[d] - mean.vanilla[d], 1) == said[d, "bridged_pp_gain"]
    worse = {d for d in mean.index if mean.bridged[d] < mean.vanilla[d]}
    assert {"dogs", "dtd"} <= worse and "flowers" not in worse  # appendix C says Flowers, the table says otherwise
    leep = printed("tab1").T.dropna()
    assert (leep.synthetic > leep.imagenet).all()


# ---- tables

def record(dataset, shots, pipeline, seed, right): # of ten test images, the first `right` are right
    predictions = [0] * right + [1] * (10 - right)
    return dict(dataset=dataset, arch="net", shots=shots, pipeline=pipeline, seed=seed, metric="top1",
                accuracy=right / 10, predictions=predictions, labels=[0] * 10)


def runs(**right): # pipeline=images that it has right
    return pd.DataFrame([record(d, k, p, seed, n) for d in ("digits", "a/greek") for k in (0, 4)
                         for p, n in right.items() for seed in (0, 1, 2)])


def test_a_pipeline_that_is_added_has_its_label_and_its_look(monkeypatch):
    monkeypatch.setitem(PIPELINES, "half", Pipeline("Half bridged", "#117733", "v", "-.", bridged=True))
    table = report.measured(runs(vanilla=4, half=9))
    assert wide(table).loc[("net", "full-shot", "Half bridged"), "greek"] == "90.0 ± 0.0 +"
    fig, axes = plots.panels([""], ["digits"])
    cell = only(table, dataset="digits", shots=0)
    plots.versus(axes["", "digits"], cell, only(runs(vanilla=4, half=9), dataset="digits", shots=0))
    looks = {(line.get_color(), line.get_marker()) for line in axes["", "digits"].lines}
    assert ("#117733", "v") in looks and [h.get_label() for h in plots.key(["half"])] == ["Half bridged"]
    plots.plt.close(fig)


def test_synthetic_only_is_drawn_unlike_every_other():
    looks = {name: (p.color, p.dash) for name, p in {**PIPELINES, **CONTROLS}.items()}
    assert list(looks.values()).count(looks["synthetic"]) == 1


def test_rows_are_in_the_order_that_is_asked_for():
    table = ordered(report.measured(runs(vanilla=4, mixed=4)), dataset=["a/greek", "digits"], shots=None,
                    pipeline=["mixed", "vanilla"])
    first = table.iloc[0]
    assert (first.dataset, first.shots, first.pipeline) == ("a/greek", 0, "mixed")
    assert list(wide(table, ["shots"], lambda r: r.pipeline if r.pipeline == "mixed" else "")) == ["greek", "digits"]
    with pytest.raises(ValueError, match="'b' is not in list"): ordered(pd.DataFrame({"x": ["a", "b"]}), x=["a"])


def test_a_contrast_is_the_sum_of_its_differences():
    frame = only(runs(vanilla=4, mixed=5, bridged=7, bridged_pp=9), dataset="digits", shots=0)
    both = report.contrast(frame, {"bridged_pp": 1, "bridged": -1, "mixed": -1, "vanilla": 1})
    assert math.isclose(both.difference, .2 - .1) and both.verdict == "inconclusive" and both.n == 3
    one = report.contrast(frame, {"bridged_pp": 1, "vanilla": -1})
    assert 100 * one.difference == only(report.differences(frame), pipeline="bridged_pp").difference.item()
    with pytest.raises(ValueError, match="the same seeds of mixed, vanilla"):
        report.contrast(frame.drop(frame.index[0]), {"mixed": 1, "vanilla": -1})


def test_show_table(tmp_path):
    verdicts = {"vanilla": None, "mixed": "worse", "bridged": "inconclusive"}
    rows = [dict(dataset=d, arch="net", shots=k, pipeline=p, mean=81.25, sd=0.5, n=3, verdict=v)
            for k in (0, 4) for d in "abcdefg" for p, v in verdicts.items()]
    pd.DataFrame(rows).to_csv(tmp_path/"t.csv", index=False)
    text = show_table(tmp_path/"t.csv")
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("Vanilla") == 4 and text.count("81.2 ± 0.5 −") == 14
    assert "net, full-shot" in text and "net, 4-shot" in text and "over 3 seeds" in text
    pd.DataFrame({"x": [1.5], "y": ["word"]}).to_csv(tmp_path/"other.csv", index=False)
    assert "word" in show_table(tmp_path/"other.csv")


def test_plus_minus():
    assert plus_minus(1, 0.25, 2) == "1.00 ± 0.25" and plus_minus(99.96, math.nan) == "100.0"


# ---- claims

def test_claims_are_judged_by_case_and_beside_the_paper():
    table = report.measured(runs(vanilla=4, mixed=0, bridged_pp=9))
    paper = printed("tab2").loc["mixed"] - printed("tab2").loc["vanilla"]
    claims = [Claim("1. worse", only(table, pipeline="mixed"), "worse", {0: paper}),
              Claim("2. better", only(table, pipeline="mixed")), Claim("3. all", table)]
    judged = judge(claims)
    assert judged.supported.tolist() == [2, 2, 0, 0, 2, 2] and judged.contradicted.tolist() == [0, 0, 2, 2, 2, 2]
    assert judged["paper: supported"].tolist() == ["10 of 10", "", "", "", "", ""]
    said = conclude(judged).splitlines()
    assert "**supported** (supported in 4 of 4" in said[0] and "**contradicted** (supported in 0 of 4" in said[1]
    assert "**supported in part** and **contradicted in part**" in said[2]


def case(dataset, difference, shots=0, **more):
    verdict = "inconclusive" if abs(difference) < 2 else "better" if difference > 0 else "worse"
    return dict(dataset=dataset, arch="net", shots=shots, difference=difference, se=1., df=8., verdict=verdict, n=3,
                draws=3) | more


def test_an_inconclusive_case_is_compatible_if_its_sign_is_as_predicted():
    cases = pd.DataFrame([case("a", 1), case("b", -1), case("c", 3), case("d", -3), case("e", 1, draws=1)])
    words = ["compatible", "open", "supported", "contradicted", "open"]
    assert Claim("x", cases).judged().standing.tolist() == words
    assert Claim("x", cases, "worse").judged().standing.tolist() == ["open", "compatible", *words[:1:-1][1:], "open"]
    assert Claim("x", cases.drop(columns="difference")).judged().standing[0] == "open"


def test_a_claim_over_datasets_is_corrected_for_the_claims_beside_it():
    gains = {"a": 10., "b": 11., "c": 12., "d": 10.5}
    good = pd.DataFrame([case(d, g) for d, g in gains.items()])
    weak = good.assign(difference=[10., 2., 3., 12.])
    alone = judge([Claim("weak", weak)])
    assert alone["on average"].tolist() == ["compatible"] or float(alone["p (Holm)"][0]) < .05
    both = judge([Claim("weak", weak), Claim("good", good), Claim("opposite", good, "worse"), Claim("one", good[:1])])
    assert both["on average"].tolist() == ["compatible", "supported", "contradicted", ""]
    assert float(both["p (Holm)"][0]) >= float(alone["p (Holm)"][0])
    assert "By the mean over datasets: supported (net, full-shot: p = " in conclude(both).splitlines()[1]
    assert "By the mean" not in conclude(both).splitlines()[3]


def test_cases_of_one_dataset_count_once_in_the_mean_over_datasets():
    cases = pd.DataFrame([case("a", 1), case("a", 3), case("b", 6)])
    mean = report.average(cases)
    assert mean.difference == 4 and mean.n == 2 and report.average(cases.drop(columns="se")) is None


@pytest.mark.parametrize(("cases", "word"), [
    ((3, 0, 0, 0), "**supported**"), ((0, 3, 0, 0), "**contradicted**"), ((0, 0, 0, 3), "**open**"),
    ((0, 0, 3, 0), "**compatible**"), ((0, 0, 1, 2), "**compatible or open**"),
    ((1, 0, 0, 2), "**supported in part**, for the rest open"),
    ((0, 1, 1, 2), "**contradicted in part**, for the rest compatible or open"),
    ((1, 1, 0, 0), "**supported in part** and **contradicted in part**"),
    ((1, 1, 0, 1), "**supported in part** and **contradicted in part**, for the rest open")])
def test_a_claim_has_no_threshold_of_its_own(cases, word):
    assert standing(*cases) == word


def test_a_printed_number_is_open_with_one_seed_or_one_set():
    row = pd.Series(dict(low=4., high=8., n=1))
    assert agrees(row, 5) == agrees(row, 9) == agrees(row, 1, over=True) == "open"
    assert agrees(row.replace(1, 3), 8, over=True) == "compatible"
    assert agrees(row.replace(1, 3), 9, over=True) == "contradicted"
    assert agrees(pd.Series(dict(low=4., high=8., n=3, draws=1)), 5) == "open"


def test_a_wide_interval_supports_no_number():
    assert agrees(pd.Series(dict(low=-4., high=60., n=3)), 53) == "compatible"
    assert agrees(pd.Series(dict(low=40., high=60., n=3)), 53) == "supported"


def test_caution_counts_every_comparison_of_a_page():
    table = report.measured(runs(vanilla=4, mixed=4))
    twice = table.assign(verdict_web=table.verdict)
    assert "There are 4 comparisons" in caution(table) and "There are 8 comparisons" in caution(twice)
    assert "There are 12 comparisons" in caution(table, twice)
    assert "no refutation" in caution(table) and "no refutation" not in caution(table.assign(dataset="cars"))


def test_caution_says_what_chance_gives_and_what_would_have_been_missed():
    table = pd.DataFrame([case("digits", 1., detectable=d) for d in (2., 3., 7.)])
    said = caution(table, pd.DataFrame([case("digits", 1., verdict_web="worse")]))
    assert f"up to {5 * false_rate(3):.1f} would" in said and f"({false_rate(3):.1%} at 3 independent" in said
    assert "smaller than ± 3.0 points" in said and "2.0 to 7.0 points" in said
    blocked = caution(table.assign(draws=[1, 12, 4], n=12))
    assert f"{false_rate(4):.1%} at 4 independent" in blocked and "1 comparison between synthetic sets" in blocked
    assert "one seed" in caution(table.assign(n=1, draws=1, detectable=np.nan))


def test_a_contrast_has_the_metric_of_its_runs_and_knows_their_sets():
    "A class of eight images and two classes of one: mean per-class accuracy weighs them alike."
    frame = only(runs(vanilla=0, mixed=8), dataset="digits", shots=0)
    labels = [0] * 8 + [1, 2]
    per_class = frame.assign(metric="mean_per_class", labels=[labels] * 6,
                             predictions=[[0] * 10 if p == "mixed" else [9] * 10 for p in frame.pipeline])
    found = report.contrast(per_class, {"mixed": 1, "vanilla": -1})
    assert math.isclose(found.difference, 1 / 3)
    sets = np.where(frame.pipeline == "mixed", "set " + (frame.seed % 2).astype(str), "")
    assert report.contrast(frame.assign(synthetic=sets), {"mixed": 1, "vanilla": -1}).draws == 2


# ---- figures

def test_a_forest_has_one_axis_for_each_block():
    cell = pd.DataFrame([("digits", 2., 1., 3., "better")], columns=["dataset", "difference", "low", "high", "verdict"])
    cells = {(block, title): cell.assign(high=high) for block, high in (("a", 3.), ("b", 30.)) for title in ("x", "y")}
    fig = plots.forests(cells, {"x": "mixed", "y": "bridged"})
    limits = [ax.get_xlim() for ax in fig.axes]
    assert limits[0] == limits[1] != limits[2] == limits[3]
    assert [bool(ax.get_yticklabels()[0].get_text()) for ax in fig.axes] == [True, False, True, False]
    plots.plt.close(fig)


def test_no_band_with_one_seed():
    fig, axes = plots.panels([""], ["digits"])
    plots.band(axes["", "digits"], [1, 2], [50, 60], [np.nan, np.nan], "vanilla")
    [area] = axes["", "digits"].collections
    assert area.get_paths()[0].get_extents().height == 10 # the span of the means
    plots.plt.close(fig)
