"""What the paper prints is typed right; tables, claims and figures say what the runs say."""

import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
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
    table = report.measured(runs(vanilla=4, mixed=2, bridged_pp=9))
    paper = printed("tab2").loc["mixed"] - printed("tab2").loc["vanilla"]
    claims = [Claim("1. worse", only(table, pipeline="mixed"), "worse", {0: paper}),
              Claim("2. better", only(table, pipeline="mixed")), Claim("3. all", table)]
    judged = judge(claims)
    assert judged.supported.tolist() == [2, 2, 0, 0, 2, 2] and judged.contradicted.tolist() == [0, 0, 2, 2, 2, 2]
    assert judged["paper: supported"].tolist() == ["10 of 10", "", "", "", "", ""]
    said = conclude(judged).splitlines()
    assert "**supported** (supported in 4 of 4" in said[0] and "**contradicted** (supported in 0 of 4" in said[1]
    assert "**supported in part and contradicted in part**" in said[2]


@pytest.mark.parametrize(("cases", "word"), [
    ((3, 0, 0), "**supported**"), ((0, 3, 0), "**contradicted**"), ((0, 0, 3), "**open**"),
    ((1, 0, 2), "**supported in part**, for the rest open"), ((0, 1, 2), "**contradicted in part**, for the rest open"),
    ((1, 1, 1), "**supported in part and contradicted in part**")])
def test_a_claim_has_no_threshold_of_its_own(cases, word):
    assert standing(*cases) == word


def test_a_printed_number_is_open_with_one_seed():
    row = pd.Series(dict(low=4., high=8., n=1))
    assert agrees(row, 5) == agrees(row, 9) == agrees(row, 1, over=True) == "open"
    assert agrees(row.replace(1, 3), 8, over=True) == "contradicted"


def test_caution_counts_every_comparison_of_a_page():
    table = report.measured(runs(vanilla=4, mixed=4))
    twice = table.assign(verdict_web=table.verdict)
    assert "There are 4 comparisons" in caution(table) and "There are 8 comparisons" in caution(twice)
    assert "There are 12 comparisons" in caution(table, twice)
    assert "no refutation" in caution(table) and "no refutation" not in caution(table.assign(dataset="cars"))


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
