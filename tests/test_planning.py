"""A plan counts what is made, not what is asked for, and says where its hours come from."""

from dataclasses import replace

import pytest
from bridgexfer.planning import (H100, SD15, Epochs, Grid, Rate, Rates, Target, Use, Work, count_images, count_passes, from_settings,
                                 inversion_work, last_stage, paper_targets, plan, show_plan, uses_of, works)
from bridgexfer.settings import load_settings

CATS, DOGS = Target("cats", 3, 30), Target("dogs", 4, 80)
EPOCHS = Epochs(epochs=2, few_epochs=5, mixed_epochs=3, stage1_epochs=7)
GRID = Grid(archs=("net",), pipelines=("vanilla", "mixed", "bridged", "bridged_pp"), images=10, sweep_images=10)


def images(grid, *args, targets=(CATS, DOGS), **kwargs):
    return count_images(uses_of(grid, targets), *args, **kwargs).set_index("sweep").images.to_dict()


def test_a_sweep_pays_for_what_it_adds():
    assert images(GRID) == {"core": 70}
    assert images(replace(GRID, volumes=(5, 10), volume_datasets=("cats",))) == {"core": 70, "volume": 0}
    assert images(replace(GRID, volumes=(5, 25), volume_datasets=("cats",))) == {"core": 70, "volume": 15 * 3}
    assert images(replace(GRID, guidances=(2.0, 3.5), guidance_datasets=("dogs",))) == {"core": 70, "guidance": 40}
    assert images(replace(GRID, few_shots=(1, 2))) == {"core": 70, "shots": 0}
    assert images(replace(GRID, lrs=(0.1, 0.01))) == {"tuning": 70, "core": 70}


def test_order_moves_costs_and_keeps_the_sum():
    uses = uses_of(replace(GRID, volumes=(5, 25), volume_datasets=("cats",), style_datasets=("cats",)), (CATS, DOGS))
    forwards, backwards = count_images(uses, 3), count_images(uses[::-1], 3)
    assert forwards.images.sum() == backwards.images.sum() and forwards.images.tolist() != backwards.images.tolist()
    assert count_passes(uses, EPOCHS).passes.sum() == count_passes(uses[::-1], EPOCHS).passes.sum()


def test_seeds_multiply_sets_only_if_they_own_them():
    assert images(GRID, 3) == {"core": 210} and images(GRID, 3, own_sets=False) == {"core": 70}
    assert images(replace(GRID, lrs=(0.1, 0.01)), 3)["tuning"] == 70
    few = replace(GRID, clip_datasets=("cats",), clip_shots=(1, 8))
    assert images(few, 3, own_sets=False)["clip"] == 3 * 2 * 30 == images(few, 3)["clip"] # it has seen the seed's own images


def test_architectures_see_a_token_of_their_own_shots():
    grid = replace(GRID, more_images=20, more_archs=("wide", "deep"), arch_style_datasets=("cats",), shots=(0, 4))
    made = [u for u in uses_of(grid, (CATS, DOGS)) if u.sweep == "architectures"]
    assert {(u.target.name, u.synthesis, u.seen, u.shots) for u in made} == {
        ("dogs", "single", 0, (0, 4)), ("cats", "style", 0, (0,)), ("cats", "style", 4, (4,))}
    assert images(grid)["architectures"] == 2 * 60 + 10 * 4 # two styles for cats; ten more of each dog, once for both networks
    assert [(w.jobs, w.steps) for w in inversion_work(made, "sd", style_steps=9)] == [(2, 18)]


def test_class_wise_inversion_has_a_token_for_each_class():
    uses = [Use("class", DOGS, 10, synthesis="class"), Use("class", DOGS, 20, synthesis="class"), Use("style", DOGS, 10, synthesis="style")]
    assert [(w.sweep, w.jobs, w.steps) for w in inversion_work(uses, "sd", 2)] == [("class", 1, 2 * 4 * 5000), ("style", 1, 2 * 20000)]


@pytest.mark.parametrize(("name", "shots", "passes"), [
    ("vanilla", 0, 30 * 2), ("vanilla", 4, 12 * 5), ("vanilla", 16, 30 * 5), ("mixed", 0, 60 * 3), ("mixed", 4, 42 * 3), ("bridged_pp", 4, 12 * 5)])
def test_passes_of_the_last_stage(name, shots, passes):
    assert last_stage(Use("core", CATS, 10, "net", (name,)), name, shots, EPOCHS) == passes


def test_bridges_are_trained_once_for_each_kind():
    def total(*pipelines, shots=(0,)): return count_passes([Use("core", CATS, 10, "net", pipelines, shots)], EPOCHS).passes.item()
    assert total("bridged") == 30 * 7 + 60 and total("bridged", "bridged_fc") == 30 * 7 + 120
    assert total("bridged", "bridged_fc", "bridged_pp") == 2 * 30 * 7 + 180
    assert total("bridged", shots=(0, 4)) == 30 * 7 + 60 + 60 # the same bridge


def test_vanilla_is_not_run_again_for_another_set():
    uses = [Use("guidance", CATS, 10, "net", ("vanilla",), guidance=w) for w in (2.0, 5.0)]
    assert count_passes(uses, EPOCHS).passes.item() == 60
    assert count_passes([uses[0], replace(uses[1], arch="other")], EPOCHS).passes.tolist() == [60, 60]


def test_learning_rates_repeat_the_last_stage_only():
    use = Use("tuning", CATS, 10, "net", ("bridged",), rates=5, tuning=True)
    assert count_passes([use], EPOCHS, seeds=3).passes.item() == 30 * 7 + 5 * 60


def test_hours_are_amount_over_rate():
    table = plan([Work("core", "generate", 1, SD15, images=4700), Work("core", "transfer", 1, "resnet18", passes=36_000_000)], H100)
    assert table.hours.tolist() == pytest.approx([1000 / 3600, 1.0]) and table.gigabytes.tolist() == pytest.approx([4700 * 32e3 / 1e9, 0])
    assert table.source.str.match("measured|projected|assumed").all()


def test_what_has_no_rate_is_named():
    work = works(uses_of(GRID, (CATS,)), EPOCHS, "sd")
    rates = Rates("box", (Rate("generate", "sd", 2.0, "measured"),), 1e3, "measured")
    text = show_plan(plan(work, rates), rates)
    assert "Without transfer with net: there is no rate for it" in text and "2 /s, measured" in text
    whole = replace(rates, rates=(*rates.rates, Rate("transfer", "", 9.0, "measured")))
    assert "Without" not in show_plan(plan(work, whole), whole)


def test_the_settings_of_the_paper_give_six_million_images():
    settings = load_settings("paper")
    grid = from_settings(Grid, settings)
    assert grid.shots == (0, 4) and len(grid.lrs) == 5 and from_settings(Epochs, settings).stage1_epochs == settings.stage1_epochs
    once = [replace(u, seen=0) if u.synthesis == "style" else u for u in uses_of(replace(grid, lrs=(), class_datasets=()), paper_targets())]
    assert count_images(once).images.sum() == 6_231_000


def test_the_papers_targets():
    ten = {t.name: t for t in paper_targets()}
    assert len(ten) == 10 and ten["cars"].classes == 196 and ten["dogs"].classes == 120 and ten["sun397"].train == 19850
    core = works([Use("core", t, 1000) for t in ten.values()], EPOCHS, SD15)
    assert plan(core, H100).hours.item() == pytest.approx(83, abs=1) and core[0].images == 1_401_000
