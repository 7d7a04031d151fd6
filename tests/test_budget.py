"""A budget of hours: a plan is a pure function of rates and hours, more hours buy no less, and the end is kept."""
import signal
import time
from functools import cache

import numpy as np
import pytest

from bridgexfer.budget import (DISAGREE, LADDER, LUCK, PLANNED, Amounts, Budget, Clock, choose, hours_of, own_work,
                               planned, until, visible_effect, with_amounts)
from bridgexfer.cli import _fixed, main
from bridgexfer.own_images import OutOfTime, best_so_far, whole_seeds
from bridgexfer.study.costs import Rate, Rates, Target
from bridgexfer.study.grid import Study
from bridgexfer.transfer import Run

PETS = Target("mine", 37, 3680)
STUDY = Study("evening", sets="1", datasets="pets")


def rates(images, passes): # a second
    both = Rate("generate", "", images, "measured"), Rate("transfer", "", passes, "measured")
    return Rates("machine", both, 0., "")


def cost(speed, study=STUDY, fixed=frozenset(), target=PETS):
    return cache(lambda amounts: hours_of(own_work(with_amounts(study, amounts, fixed), target, "resnet18"), speed))


# ---- the plan

@pytest.mark.parametrize("speed", [rates(1, 500), rates(.1, 5000), rates(50, 100), rates(5, 10_000)])
def test_more_hours_never_choose_less(speed):
    price = cost(speed)
    hours = [h for h in 2.**np.arange(-4, 12) if price(LADDER[0]) <= PLANNED * h]
    chosen = [choose(h, price) for h in hours]
    for few, many in zip(chosen, chosen[1:]): assert all(a <= b for a, b in zip(few, many))
    for h, amounts in zip(hours, chosen): assert price(amounts) <= PLANNED * h
    assert chosen[-1] == LADDER[-1] and len(set(chosen)) > 3


def test_a_faster_machine_never_does_less():
    slow, fast = (choose(24, cost(speed)) for speed in (rates(1, 1000), rates(2, 3000)))
    assert all(a <= b for a, b in zip(slow, fast)) and slow != fast


def test_known_hours():
    fixed = Study("miniature", sets="1", lr="0.1")
    target = Target("mine", 3, 100)
    study = with_amounts(fixed, Amounts(20, 2, 1.)) # 15 epochs, and 10 of stage 1
    work = own_work(study, target, "mini_resnet10")
    passes = 2 * (2 * 100 * 15 + 60 * 10)
    assert sum(w.images for w in work) == 60 and sum(w.passes for w in work) == passes
    assert hours_of(work, rates(2, 10)) == pytest.approx((60 / 2 + passes / 10) / 3600)


def test_the_search_is_in_the_plan():
    study = Study("miniature", sets="1", lrs="0.1 0.01", stage1_lrs="0.1", stage1_epochs="10", tuning_seeds="100 101")
    searched = own_work(study, Target("mine", 3, 100), "mini_resnet10")[1].passes
    per_class = study.settings.images
    assert searched == 2 * (2 * 80 * 15 + 2 * 80 * 15 + 3 * per_class * 10) # each seed has one bridge for both rates


@pytest.mark.parametrize("speed", [rates(1, 500), rates(.02, 15), rates(1e-4, 1)])
def test_too_few_hours_say_how_many_would_do(speed):
    price = cost(speed)
    with pytest.raises(ValueError, match="are too few") as error: choose(1e-3, price)
    said = str(error.value)
    needed = float(said.rsplit("--hours ", 1)[1].rstrip("."))
    assert choose(needed, price) == LADDER[0] and len(said.splitlines()) == 1
    with pytest.raises(ValueError): choose(.85 * needed, price)


def test_what_the_user_has_set_stays():
    fixed = frozenset({"images", "seeds"})
    for amounts in (LADDER[0], LADDER[-1]):
        s = with_amounts(STUDY, amounts, fixed).settings
        assert s.images == STUDY.settings.images and s.seeds == STUDY.settings.seeds
    (epochs, more) = (with_amounts(STUDY, a, fixed).settings.epochs for a in (LADDER[0], LADDER[-1]))
    assert epochs < more == STUDY.settings.epochs


def test_what_the_user_has_set_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"bridgexfer.ini").write_text("seeds = 0 1\n", encoding="utf-8")
    assert _fixed("digits", "miniature", ["epochs=3"], images="5", seeds=None) >= {"images", "epochs", "seeds"}
    assert "images" not in _fixed("digits", "miniature", None, images=None)


def test_a_given_set_costs_no_generation():
    given = object()
    assert [w.images for w in own_work(STUDY, PETS, "resnet18", given)] == [0, 0, 0]


# ---- what it can show

def test_the_visible_effect():
    many = visible_effect(2000, 10**6) # nothing but test images
    assert many == pytest.approx((1.9600 + .8416) * (DISAGREE / 2000)**.5, rel=2e-3)
    few = visible_effect(10**9, 3) # nothing but seeds: Student's t with two degrees of freedom
    assert few == pytest.approx((4.3027 + 1.0607) * LUCK / 3**.5, rel=1e-3)
    assert visible_effect(100, 3) > visible_effect(400, 3) > visible_effect(400, 6)


# ---- in time

def test_a_run_that_would_pass_the_limit_is_not_begun(capsys):
    clock = Clock(time.time() + 100, 10., lambda run, values: values["passes"])
    run = Run("vanilla", 0, 0)
    clock(run, dict(passes=900))
    assert capsys.readouterr().err.endswith("left\n")
    with pytest.raises(OutOfTime): clock(run, dict(passes=1100))
    with pytest.raises(OutOfTime): Clock(time.time() - 1, 10., lambda *_: 1)(run, {})


def test_a_clock_learns_from_trainings_that_were_slower(capsys):
    clock = Clock(time.time() + 100, 1000., lambda run, values: 900)
    run = Run("vanilla", 0, 0)
    clock(run, {})
    assert clock.rate() == pytest.approx(1000.) # no time has passed: never faster than measured
    clock.first -= 90 # 10 images/s
    assert clock.rate() == pytest.approx(10., rel=.01)
    clock(run, {}) # takes 90 s of 100
    late = Clock(time.time() + 80, 1000., clock.counted, done=900, first=time.time() - 90)
    with pytest.raises(OutOfTime): late(run, {})


def test_the_search_leaves_time_to_compare():
    clock = Clock(time.time() + 100, 10., lambda run, values: 300, reserved=80.)
    with pytest.raises(OutOfTime): clock.searching(Run("vanilla", 0, 0), {})
    clock(Run("vanilla", 0, 0), {})


def test_an_alarm_ends_what_runs_too_long_and_no_more():
    began = time.time()
    with pytest.raises(OutOfTime), until(time.time() + .2):
        while time.time() < began + 20: pass
    assert time.time() - began < 5
    with until(time.time() + 30): pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0., 0.) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_training_that_is_stopped_is_resumed(tmp_path, monkeypatch):
    from bridgexfer.data.registry import load_dataset
    from bridgexfer.datasets import Dataset, few_shot
    from bridgexfer.own_images import compare_own, own_runs
    digits = load_dataset("digits")
    data = Dataset(digits.info, few_shot(digits.train, 2, 0), few_shot(digits.test, 2, 0))
    study = Study("smoke", sets="1", datasets="digits", runs=str(tmp_path), lr=".05", images="2", steps="2",
                  epochs="2", stage1_epochs="1", seeds="0 1 2")
    chosen = {run.pipeline: study.start(run.pipeline, 0) for run in own_runs(study)[:2]}
    def ends_in(count): # trainings, the last of which the alarm ends
        begun = []
        def before(run, values): return begun.append(run) or until(time.time() + (60 if len(begun) < count else 1e-3))
        return before
    first = compare_own(study, data, "mini_resnet10", chosen, before=ends_in(4))
    assert first.difference["n"] == 1 # the second seed lacks a pipeline
    whole = compare_own(study, data, "mini_resnet10", chosen, before=ends_in(9))
    assert whole.difference["n"] == 3
    for name in ("vanilla", "bridged_pp"):
        accuracies = [o.runs[o.runs.pipeline == name].accuracy.iloc[0] for o in (first, whole)]
        assert accuracies[0] == accuracies[1]


def test_a_style_is_in_the_plan():
    plain, styled = (own_work(STUDY, PETS, "resnet18", style=style) for style in (False, True))
    [work] = [w for w in styled if w not in plain]
    assert (work.job, work.steps) == ("invert", STUDY.settings.style_steps + -(-3680 // STUDY.settings.inversion_batch))
    share = LADDER[0].share
    assert with_amounts(STUDY, LADDER[0]).settings.style_steps == round(share * STUDY.settings.style_steps)


def test_an_unfinished_search_gives_the_best_it_has():
    assert best_so_far([(dict(lr=.1), .4), (dict(lr=.01), .6), (dict(lr=.01), .2)])["lr"] in (.1, .01)
    assert best_so_far([(dict(lr=.1), .5), (dict(lr=.01), .6), (dict(lr=.01), .2)])["lr"] == .1 # means
    with pytest.raises(ValueError, match="give more --hours"): best_so_far([])


def test_only_whole_seeds_are_compared_and_it_is_said_how_many(caplog):
    runs = list("abcdef")
    assert whole_seeds([1, 2, 3], runs) == ([1, 2], ["a", "b"])
    [said] = caplog.messages
    assert said == "Warning: the time was over after 2 of 6 runs: the same command with a new --out resumes."
    caplog.clear()
    assert whole_seeds([1, 2, 3, 4, 5, 6], runs)[1] == runs and not caplog.messages
    with pytest.raises(ValueError, match="give more --hours"): whole_seeds([1], runs)


def test_the_next_call_goes_on_with_the_same_plan(tmp_path, monkeypatch):
    from bridgexfer.data.registry import load_dataset
    study = Study("miniature", sets="1", datasets="digits", runs=str(tmp_path))
    data = load_dataset("digits")
    measured = []
    monkeypatch.setattr("bridgexfer.budget.measure", lambda *a: measured.append(1) or rates(40., 4000. * len(measured)))
    def ask(hours): return planned(Budget(study, data, "mini_resnet10", hours))
    first, again = ask(.5), ask(.5)
    assert len(measured) == 1 and first[0].settings.values == again[0].settings.values and first[1:] == again[1:]
    assert ask(.6)[0].settings.images >= first[0].settings.images and len(measured) == 2


@pytest.mark.parametrize(("options", "said"), [
    (["--hours", "0"], "a number of hours above 0"), (["--hours", "nan"], "a finite number, got nan"),
    (["--hours", "inf"], "a finite number, got inf"), (["--hours", "1e9"], "above 0, up to 100,000"),
    (["--hours", "soon"], "a valid number")])
def test_wrong_budgets_are_one_sentence(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["transfer", "digits", "--profile", "miniature", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and error.startswith("bridgexfer: ")
