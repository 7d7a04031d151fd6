"""A plan counts what is made, not what is asked for, and says where its hours come from."""
import time

import pytest

from bridgexfer.rates import H100, SD15, Rate, Rates
from bridgexfer.study.costs import PassCounter, Target, Work, costs, show_plan, targets_of, work_of
from bridgexfer.study.grid import FROM_REAL, Study
from bridgexfer.transfer import Run

TARGETS = {"digits": Target("digits", 10, 898, "digits"), "digits-photo": Target("digits-photo", 10, 898, "digits"),
           "greek": Target("greek", 24, 960, "greek")}


def images(work): return {w.sweep: w.images for w in work if w.images}


def test_images_are_those_that_the_jobs_will_make():
    "Counted run by run, and summed over the sets that the generate jobs are asked for."
    study, made = Study("miniature", lr="0.1"), {}
    for (group, key), sets in study.all_sets.items():
        place = key if group in FROM_REAL else f"vocabulary {key}"
        classes = 24 if key == "greek" else 10
        for w, n in sets.items(): made[place, w] = max(made.get((place, w), 0), n * classes)
    assert sum(images(work_of(study, TARGETS, beyond=True)).values()) == sum(made.values())



def test_datasets_with_the_same_class_names_share_their_images():
    s = Study("miniature", lr="0.1", datasets="digits digits-photo")
    sets = s.settings.sets
    assert images(work_of(s, TARGETS))["core"] == sets * 10 * 60
    apart = {n: Target(n, t.classes, t.train) for n, t in TARGETS.items()}
    assert images(work_of(s, apart))["core"] == 2 * sets * 10 * 60


def test_sets_are_as_many_as_the_setting_says():
    one, three = (images(work_of(Study("miniature", lr="0.1", sets=n), TARGETS)) for n in "13")
    assert three["core"] == 3 * one["core"] and three["volume"] == 3 * one["volume"]
    assert three["clip"] == one["clip"] # made from the seed's own images


def test_the_search_has_a_set_for_each_of_its_seeds():
    s = Study("miniature")
    seeds = {*s.settings.tuning_seeds, *s.settings.few_tuning_seeds}
    assert images(work_of(s, TARGETS))["tuning"] == len(seeds) * 34 * s.settings.images
    passes = {(w.sweep, w.of): w.passes for w in work_of(s, TARGETS) if w.passes}
    assert 0 < passes["tuning", "mini_vit"] < passes["tuning", "mini_resnet10"]


@pytest.mark.parametrize(("pipeline", "shots", "passes"), [
    ("vanilla", 0, 898 * 15), ("vanilla", 4, 40 * 60), ("mixed", 4, 640 * 10), ("bridged_pp", 4, 600 * 10 + 40 * 60),
    ("synthetic", 0, 600 * 10), ("vanilla_long", 4, 40 * (60 + 150))])
def test_passes_of_a_run(pipeline, shots, passes):
    count = PassCounter(Study("miniature", lr="0.1"))
    run = Run(pipeline, shots, 0, 0 if pipeline == "vanilla" else 60)
    assert count.passes(run, TARGETS["digits"], "mini_resnet10") == passes
    assert count.passes(run, TARGETS["digits"], "mini_resnet10") == 0 # it is recorded


def test_passes_are_those_of_the_values_that_were_chosen(tmp_path):
    "Not of those at which the search begins: the chosen ones can be several times as long."
    table = tmp_path/"miniature/tab5_learning_rates.csv"
    table.parent.mkdir()
    table.write_text("dataset,arch,pipeline,shots,lr,stage1_lr,stage1_epochs,epochs,repeats\n"
                     "digits,mini_resnet10,mixed,4,0.1,,,20,3\n"
                     "digits,mini_resnet10,bridged_pp,4,0.1,0.03,30,,\n")
    count, digits = PassCounter(Study("miniature", figures=str(tmp_path))), TARGETS["digits"]
    def passes(name): return count.passes(Run(name, 4, 0, 60), digits, "mini_resnet10")
    assert passes("mixed") == (40 * 3 + 600) * 20
    assert passes("bridged_pp") == 600 * 30 + 40 * 60
    assert passes("vanilla_long") == 40 * (60 + 30 * 15) # as much compute as bridged++ has
    assert passes("bridged") == 600 * 10 + 40 * 60 # has no row there: the committed one
    unsearched = Study("evening") # has no table: a plan counts with where the search begins
    assert unsearched.expected("pets", "resnet18", Run("mixed", 4, 0)) == unsearched.start("mixed", 4)


def test_bridges_are_trained_once_for_each_kind():
    count, digits = PassCounter(Study("miniature", lr="0.1")), TARGETS["digits"]
    runs = [Run(p, k, 0, 60) for p, k in (("bridged", 0), ("bridged_fc", 0), ("bridged_pp", 0), ("bridged", 4))]
    first, other_head, mixup, fewer = (count.passes(run, digits, "mini_resnet10") for run in runs)
    assert first == mixup == 6000 + 898 * 15 and other_head == 898 * 15 and fewer == 40 * 60


def test_hours_are_amount_over_rate():
    work = [Work("core", "generate", SD15, images=4700), Work("core", "transfer", "resnet18", passes=36_000_000)]
    table = costs(work, H100)
    assert table.hours.tolist() == pytest.approx([1000 / 3600, 1.0])
    assert table.gigabytes.tolist() == pytest.approx([4700 * 144e3 / 1e9, 0])
    assert table.source.str.match("measured|projected|assumed").all()


def test_what_has_no_rate_is_named():
    work = [Work("core", "generate", "sd", images=10), Work("core", "transfer", "net", passes=10)]
    rates = Rates("box", (Rate("generate", "sd", 2.0, "measured"),), 1e3, "measured")
    assert "Without transfer with net: there is no rate for it" in show_plan(costs(work, rates), rates)


def test_the_plan_of_the_paper_is_made_in_seconds():
    s, started = Study("paper"), time.time()
    targets = targets_of(s)
    total = sum(images(work_of(s, targets)).values())
    assert time.time() - started < 20 # it takes less than one; whatever lists images takes minutes
    assert 6e6 < total < 10e6 and len(targets) == 10


def test_the_papers_targets():
    ten = targets_of(Study("paper"))
    assert len(ten) == 10 and ten["cars"].classes == 196 and ten["dogs"].classes == 120 and ten["sun397"].train == 19850
    core = 1000 * sum(t.classes for t in ten.values())
    hours = costs([Work("core", "generate", SD15, images=core)], H100).hours.item()
    assert core == 1_401_000 and hours == pytest.approx(83, abs=1)
    s = Study("paper")
    assert {r.per_class for r in s.runs("volume", "aircraft") if r.uses} == {500, 1000, 1500, 2000, 2500, 3000}
