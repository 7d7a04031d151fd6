"""The report of a comparison: one safe, self-contained page that says what the numbers say."""
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from test_site import CUT_OFF, MISSING, WIDE, browser, complaints # noqa: F401 (a fixture)

from bridgexfer.datasets import Dataset, DatasetInfo
from bridgexfer.images import as_images
from bridgexfer.own_images import Outcome, own_difference, own_table
from bridgexfer.report import (Work, class_changes, class_rows, classes_sentence, cost_of, course_of, examples_of,
                               extremes, report_html, seconds_text, thumbs)

EVIL = "<script>alert(1)</script>"


def imagine(names, seeds=2, per_class=4, gain=1):
    "An outcome without a training: vanilla errs on the first image of each class, bridged++ on that of `gain` fewer."
    truth = np.repeat(np.arange(len(names)), per_class)
    first = np.arange(len(names)) * per_class
    def run(name, seed):
        guesses = truth.copy()
        wrong = first if name == "vanilla" else first[gain:]
        guesses[wrong] = (guesses[wrong] + 1) % len(names)
        right = guesses == truth
        curve = [dict(epoch=e, loss=1 / e, train_accuracy=1 - .5 / e) for e in (1, 2, 3)]
        return dict(pipeline=name, seed=seed, dataset="/home/me/pets & co", arch="resnet18", labels=truth.tolist(),
                    predictions=guesses.tolist(), accuracy=right.mean(), metric="top1", curve=curve, hash="h",
                    synthetic="5e7" if name != "vanilla" else "", bridge="b")
    runs = pd.DataFrame([run(name, seed) for seed in range(seeds) for name in ("vanilla", "bridged_pp")])
    rng = np.random.default_rng(0)
    images = as_images(rng.integers(256, size=(len(truth), 32, 32, 3)), truth, names)
    table = own_table(runs, {"vanilla": dict(lr=.1), "bridged_pp": dict(lr=.03, stage1_lr=.01)})
    record = dict(hash="c0ffee", spec=dict(backbone="b05c", seed=0, synthetic=""), made=dict(seconds=3, device="cpu"))
    data = Dataset(DatasetInfo("/home/me/pets & co", tuple(names)), images, images)
    return Outcome(data, "resnet18", runs, table, own_difference(runs), "vanilla", None, record)


@pytest.fixture(scope="module")
def outcome(): return imagine((EVIL, "cat", "dog"))


COST = [Work("generating synthetic images", "12 images", 61)]


@pytest.fixture(scope="module")
def page(outcome): return report_html(outcome, outcome.data.train, course_of(outcome.runs), COST, "my better")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

    def of(self, name): return [a for tag, a in self.tags if tag == name]


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(page):
    tags = Tags(page)
    assert not tags.of("script") and not tags.of("link") and EVIL not in page and "&lt;script&gt;" in page
    sources = [i["src"] for i in tags.of("img")] + [s["srcset"] for s in tags.of("source")]
    assert len(sources) > 15 and all(s.startswith("data:image/") for s in sources)
    assert all(a["href"].startswith("#") for a in tags.of("a"))
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page


def test_the_page_is_semantic(page):
    tags = Tags(page)
    assert tags.of("html")[0]["lang"] == "en" and len(tags.of("h1")) == len(tags.of("main")) == 1
    ids = {a["id"] for _, a in tags.tags if "id" in a}
    assert {a["href"][1:] for a in tags.of("a")} <= ids
    assert all(len(i.get("alt", "")) > 8 for i in tags.of("img"))
    assert len(tags.of("caption")) == len(tags.of("table")) and all("scope" in th for th in tags.of("th"))


def test_the_page_says_what_the_numbers_say(page, outcome):
    assert "+8.3" in page and "75.0 %" in page and "83.3 %" in page and "1 min" in page
    assert "bridgexfer predict &#39;my better&#39; my_images" in page
    assert "Not told apart" in page or "Synthetic images help" in page


def test_users_images_can_be_left_out(outcome):
    changes = class_changes(outcome)
    real = thumbs(outcome.data.train, 1)
    hidden = report_html(outcome, None, course_of(outcome.runs), [], images=False)
    assert len(real) == 3 and real[0] not in hidden and "image/jpeg" not in hidden and "were left out" in hidden
    assert examples_of(changes, None, None) == [] and len(examples_of(changes, outcome.data.train, None)) == 3


def test_the_same_outcome_gives_the_same_bytes(outcome, page):
    assert report_html(outcome, outcome.data.train, course_of(outcome.runs), COST, "my better") == page


def test_classes_that_gained_and_lost():
    found = imagine(("a", "b", "c", "d"), per_class=5, gain=2)
    changes = class_changes(found)
    assert changes["change"].round(6).tolist() == [20, 20, 0, 0] and changes["name"].tolist() == ["a", "b", "c", "d"]
    assert "2 gained, 0 lost and 2 stayed the same" in classes_sentence(changes, 2)
    rows = class_rows(changes)
    assert rows[0]["change"] == "+20" and rows[0]["kind"] == "gain" and rows[0]["width"] == 50
    assert rows[3]["change"] == "0" and rows[3]["width"] == 0


def test_many_classes_one_seed_and_nothing_recorded():
    found = imagine([f"class {i}" for i in range(40)], seeds=1, per_class=2)
    text = report_html(found, None, course_of(found.runs.drop(columns="curve")), [], images=False)
    assert "40 classes, the 30 that are recognised least" in text and "28 classes in between" in text
    assert 'id="training"' not in text and "class 39" in text
    assert sorted(extremes(list(range(40)))) == list(range(40))


def test_a_verdict_has_its_tone():
    found = imagine(("a", "b", "c"))
    for verdict, badge in (("worse", "Synthetic images hurt"), ("better", "Synthetic images help")):
        told = replace(found, difference={**found.difference, "verdict": verdict})
        assert f'class="verdict {verdict}"' in (text := report_html(told, None, course_of(found.runs), []))
        assert badge in text


def test_costs_are_those_that_were_noted(tmp_path):
    from bridgexfer.artefacts import write_json
    found = imagine(("a", "b"))
    made = tmp_path/"synthetic"/"5e7"
    for k in range(2): write_json(made/f"shard-{k:05}.json", dict(images=10, seconds=5.))
    for kind, count in (("tune", 3), ("transfer", 1)):
        for i in range(count):
            spec = dict(dataset="/home/me/pets & co" if i < 2 else "others", arch="resnet18")
            write_json(tmp_path/"records"/kind/f"{i}.json", dict(hash="h", spec=spec, made=dict(seconds=7)))
    work = {w.work: (w.amount, w.seconds) for w in cost_of(found, tmp_path, made)}
    assert work["generating synthetic images"] == ("20 images", 10)
    assert work["choosing hyper-parameters"] == ("2 trainings", 14)
    assert work["training and testing, Vanilla"] == ("1 training", 7)
    assert seconds_text(3599) == "1 h 0 min" and seconds_text(59.7) == "1 min"


@pytest.mark.slow
@pytest.mark.site
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_the_page_in_a_browser(page, browser, tmp_path, width, scheme): # noqa: F811
    (tmp_path/"report.html").write_text(page, encoding="utf-8")
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    address = (tmp_path/"report.html").as_uri()
    found = complaints(tab, address)
    tab.goto(address)
    assert not found and tab.evaluate(WIDE) <= width and not tab.evaluate(CUT_OFF)
    tab.evaluate("[...document.images].forEach(i => i.loading = 'eager')")
    assert not tab.evaluate(MISSING)
    shown = tab.evaluate("document.querySelector('.interval img').currentSrc")
    [light] = re.findall(r'class="interval">.*?<img src="(.*?)"', page, re.S)
    assert (shown == light) == (scheme == "light")
    tab.close()
