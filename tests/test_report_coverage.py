"""Coverage in the report: of training images, in features that no one has trained, in words that numbers decide."""
import re

import numpy as np
import pandas as pd
import pytest
from test_own_report import COST, Tags, imagine

from bridgexfer import report
from bridgexfer.data.registry import load_dataset
from bridgexfer.report import coverage_of, coverage_words, course_of, report_html, some_of
from bridgexfer.set_metrics import Comparison


@pytest.fixture(scope="module")
def digits(): return load_dataset("digits").train


def test_real_images_cover_themselves_and_noise_covers_nothing(digits):
    some = digits.take(np.arange(300))
    noise = some.__class__(np.random.default_rng(0).integers(0, 256, some.pixels.shape, np.uint8), some.labels,
                           some.names, some.rows)
    same, other = (coverage_of(some, made, "mini_resnet10").values.synthetic for made in (some, noise))
    assert same["coverage"] == same["precision"] == same["copies"] == 1
    assert other["coverage"] < .1 and other["copies"] == 0


def test_large_sets_are_sampled_and_small_ones_left_alone(digits):
    assert some_of(digits, 10**6) is digits
    assert len(some := some_of(digits, 50)) == 50 and len(np.unique(some.labels)) > 5
    assert np.array_equal(some.rows, some_of(digits, 50).rows) and (np.diff(some.rows) > 0).all()


def test_too_few_images_are_no_section(digits):
    assert coverage_of(digits, None, "mini_resnet10") is None
    assert coverage_of(digits.take([0, 1, 2]), digits.take([3, 4, 5]), "mini_resnet10") is None
    found = imagine(("cat", "dog"))
    assert 'id="coverage"' not in report_html(found, None, course_of(found.runs), COST)


@pytest.mark.parametrize(("share", "advised"), [(.1, True), (.6, False)])
def test_the_page_says_it(share, advised):
    rows = dict(coverage=(share, .8), precision=(.5, .9), copies=(.02, .01))
    values = pd.DataFrame(rows, index=["synthetic", "real"]).T
    covered = Comparison(values, 1200, 900, "resnet18 as it was pre-trained")
    found = imagine(("cat", "dog"))
    page = report_html(found, found.data.train, course_of(found.runs), COST, covered=covered)
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    assert f"have a synthetic one near them {100 * share:.0f} % 80 %" in text and "1,200 real training images" in text
    assert ("--style" in coverage_words(covered)["coverage_text"]) == advised
    styled = coverage_words(covered, plain=False)["coverage_text"] # is not told to do what was done
    assert "--style" not in styled and ("miss much" in styled) == advised
    tags = Tags(page)
    assert len(tags.of("caption")) == len(tags.of("table")) and {"href": "#coverage"} in tags.of("a")
    assert coverage_words(None)["coverage"] == [] and set(report.MEASURES) <= set(rows)
