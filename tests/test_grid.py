"""The grid: every run finds the images that are its own and sees no others; jobs and pages follow from it."""
from dataclasses import replace

import numpy as np
import pytest

from bridgexfer.artefacts import spec_hash
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import few_shot
from bridgexfer.generation import STRENGTHS
from bridgexfer.images import as_images
from bridgexfer.study.costs import Target, work_of
from bridgexfer.study.grid import (FROM_REAL, PAGES, SWEEPS, SetKey, Study, check_each_once, decides, job_command,
                                   job_state, page_of, page_state, resources, set_seed, strength, subset, web_images)
from bridgexfer.synthetic_sets import SyntheticSet, generate
from bridgexfer.transfer import PIPELINES, Pipeline, Run

STUDY = Study("miniature")
S = STUDY.settings


@pytest.fixture(scope="module")
def digits(): return load_dataset("digits")


@pytest.fixture(scope="module")
def tampered(digits):
    "The dataset with every training image changed that is not among the four of a class that seed 0 draws."
    kept = few_shot(digits.train, 4, 0).rows
    pixels = 255 - digits.train.pixels
    pixels[kept] = digits.train.pixels[kept]
    return replace(digits, train=as_images(pixels, digits.train.labels, digits.train.names))


@pytest.mark.parametrize("synthesis", FROM_REAL)
def test_what_a_few_shot_run_is_given_depends_on_its_images_alone(digits, tampered, synthesis):
    "Its spec, and so its token or its first images, does not depend on other images; that of a full-shot run does."
    def address(data, shots): return spec_hash(STUDY.synthesis(data, SetKey(synthesis, 3.5, shots, 0)))
    assert address(digits, 4) == address(tampered, 4)
    assert address(digits, 0) != address(tampered, 0)
    four = few_shot(digits.train, 4, 0)
    assert subset(tampered, 4, 0).digest == subset(digits, 4, 0).digest == four.digest # those that it is trained on
    seen = np.arange(898)[:, None, None, None] == four.rows[7]
    pixels = np.where(seen, 0, digits.train.pixels)
    inside = replace(digits, train=as_images(pixels, digits.train.labels, digits.train.names))
    assert address(digits, 4) != address(inside, 4)


@pytest.mark.parametrize("synthesis", FROM_REAL)
def test_seeds_have_tokens_and_first_images_of_their_own_subsets(digits, synthesis):
    specs = [STUDY.synthesis(digits, SetKey(synthesis, 3.5, k, seed)) for k in (1, 4) for seed in (0, 1)]
    assert len({(s.token_hash, s.init_images, s.weights) for s in specs}) == 4


def test_shared_sets_never_show_a_run_more_than_its_images():
    one = Study("miniature", sets="1")
    two = Study("miniature", sets="2")
    for synthesis in FROM_REAL:
        for seed in (2, 101): # of a result and of the search
            assert {s.set_key(Run("bridged_pp", 4, seed, 40, synthesis)).seed for s in (one, two)} == {seed}
            assert one.set_key(Run("bridged_pp", 0, seed, 40, synthesis)).seed == 0
        assert two.set_key(Run("bridged_pp", 0, 3, 40, synthesis)).seed == 1
    assert one.set_key(Run("bridged_pp", 4, 2, 40)) == one.set_key(Run("bridged_pp", 0, 1, 40))


def test_seeds_take_sets_in_turn_and_the_search_has_its_own():
    "By hand: with four sets, seeds 0, 4 and 8 share the first and seeds 100 and 104 the first of the search."
    four = Study("miniature", sets="4", seeds="0 1 2 3", few_seeds="0 1 2 3 4 5 6 7 8 9", tuning_seeds="100 101 102",
                 few_tuning_seeds="100 101 102 103 104").settings
    assert [set_seed(four, seed) for seed in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert [set_seed(four, seed) for seed in range(100, 105)] == [100, 101, 102, 103, 100]
    one = Study("miniature", sets="1", seeds="5 6").settings
    assert {set_seed(one, seed) for seed in (5, 6, 7, 100, 104)} == {5}
    many = Study("miniature", sets="50").settings
    assert all(set_seed(many, seed) == seed for seed in (0, 11, 100, 103))


@pytest.mark.parametrize("profile", ["miniature", "evening", "paper", "smoke"])
def test_the_search_shares_no_set_and_no_seed_with_a_result(profile):
    "Unless there is one set for all; whose images no real image has gone into."
    study = Study(profile)
    s = study.settings
    searched = {*study.tuning_seeds(0), *study.tuning_seeds(4)}
    used = {seed for sweep in SWEEPS for shots in (0, 4) for seed in study.seeds_of(sweep, shots)}
    assert not searched & used
    if s.sets > 1: assert not {set_seed(s, seed) for seed in searched} & {set_seed(s, seed) for seed in used}


def test_a_search_at_a_seed_of_the_study_is_rejected():
    with pytest.raises(ValueError, match="Seed 100 is one of the study's: choose other tuning_seeds"):
        Study("smoke", few_seeds="0 100").tuning_seeds(0)


def test_few_shot_runs_have_the_seeds_of_their_regime():
    study = Study("smoke", seeds="0 1", few_seeds="0 1 2 3", sweep_seeds="0 1 2")
    def seeds_at(sweep, shots): return {r.seed for r in study.runs(sweep, "digits") if r.shots == shots}
    seeds = {sweep: {k: seeds_at(sweep, k) for k in (0, 4)} for sweep in SWEEPS}
    assert seeds["core"] == {0: {0, 1}, 4: {0, 1, 2, 3}}
    assert seeds["controls"] == seeds["volume"] == seeds["style"] == {0: {0, 1}, 4: {0, 1, 2}}
    core = study.runs("core", "digits")
    assert [r.seed for r in core] == sorted(r.seed for r in core) # by seed
    paper = Study("paper") # none of their own
    assert {r.seed for r in paper.runs("core", "pets")} == set(paper.settings.seeds)


def test_a_page_of_full_shot_runs_needs_them():
    def pages(**settings): return {p.name for p in Study("smoke", **settings).pages()}
    assert "fig03_convergence" in pages(shots="full 4")
    assert "fig03_convergence" not in pages(shots="4") | pages(pipelines="vanilla mixed")
    assert "tab2_pipelines" in pages(shots="4") & pages(pipelines="vanilla mixed")


def test_a_narrowed_study_is_a_part_of_the_whole():
    "`make study SEEDS=` narrows every list of seeds; the runs that are left, and their sets, are those of the whole."
    narrow = Study("miniature", **dict.fromkeys(("seeds", "few_seeds", "sweep_seeds", "beyond_seeds"), "0 1"))
    for sweep in SWEEPS:
        whole = set(STUDY.runs(sweep, "digits"))
        runs = narrow.runs(sweep, "digits")
        assert set(runs) == {r for r in whole if r.seed in (0, 1)}
        assert all(narrow.set_key(r) == STUDY.set_key(r) for r in runs)


@pytest.mark.parametrize("profile", ["miniature", "smoke"])
def test_every_run_has_a_group_that_makes_its_set(profile):
    study = Study(profile)
    for sweep in SWEEPS:
        for d in study.datasets_of(sweep):
            for run in study.runs(sweep, d):
                if key := study.set_key(run): assert study.all_sets[study.group(run, d)][key] >= run.per_class


def test_volume_sets_are_prefixes(tmp_path, digits):
    "All volumes of a seed are taken from one set, and the first images of the larger are those of the smaller."
    runs = [r for r in STUDY.runs("volume", "digits") if r.seed == 0 and r.uses]
    assert len({STUDY.synthetic_hash(digits, r) for r in runs}) == 1
    assert len({r.per_class for r in runs}) == len(S.volumes)
    study = Study("smoke", runs=str(tmp_path), volumes="10 20 40")
    spec = study.synthesis(digits, SetKey("single", 3.5, 0, 0))
    generate(spec, study.runs_dir/"synthetic", 20, progress=False)
    small = study.images(digits, Run("bridged_pp", 0, 0, 20)).pixels
    generate(spec, study.runs_dir/"synthetic", 40, progress=False) # grows
    large = study.images(digits, Run("bridged_pp", 0, 0, 40)).pixels
    assert np.array_equal(large[:200], small)
    assert np.array_equal(study.images(digits, Run("bridged_pp", 0, 0, 10)).pixels, small[:100])
    assert SyntheticSet(study.runs_dir/"synthetic"/spec_hash(spec)).per_class == 40


def test_sweeps_vary_what_they_say():
    def varied(sweep, field, **of):
        runs = [r for r in STUDY.runs(sweep, "digits") if r.uses]
        return {getattr(r, field) for r in runs if all(getattr(r, k) == v for k, v in of.items())}
    assert varied("shots", "shots") == set(S.few_shots) and varied("volume", "per_class") == set(S.volumes)
    assert varied("guidance", "guidance") == set(S.guidances)
    assert varied("style", "synthesis", shots=0) == {"single", "untrained", "style", "class"}
    assert varied("controls", "per_class", pipeline="mixed", synthesis="single") == {*S.mixed_images, S.images}
    assert STUDY.archs_of("architectures") == S.more_archs
    for sweep in SWEEPS:
        runs = STUDY.runs(sweep, "digits")
        compared = {r.shots for r in runs if r.pipeline == "vanilla"} | ({0} if sweep == "controls" else set())
        for k in {r.shots for r in runs}: assert {r.seed for r in runs if r.shots == k} == {*STUDY.seeds_of(sweep, k)}
        assert {r.shots for r in runs} <= compared


def test_same_compute_is_that_of_the_core():
    run = next(r for r in STUDY.runs("controls", "digits") if r.pipeline == "vanilla_long")
    assert run.per_class == S.images and STUDY.set_key(run) is None # it counts the images and uses none


def test_a_profile_without_datasets_for_a_sweep_has_no_runs_of_it():
    evening = Study("evening")
    assert evening.datasets_of("guidance") == () and evening.datasets_of("style") == ("pets",)
    assert not evening.archs_of("architectures") and "fig06_guidance" not in {p.name for p in evening.pages()}


def test_strengths_for_other_shots_are_those_of_the_next_number_below():
    assert [strength(k) for k in (1, 3, 8, 10, 16, 50, 0)] == [STRENGTHS[k] for k in (1, 2, 8, 8, 16, 16, 16)]


def test_web_renders_are_of_their_classes_and_of_the_seed():
    a, b, c = (web_images(("three", "alpha"), n, seed, 32) for n, seed in ((5, 0), (5, 0), (5, 1)))
    assert np.array_equal(a.pixels, b.pixels) and not np.array_equal(a.pixels, c.pixels)
    assert a.labels.tolist() == [0] * 5 + [1] * 5
    with pytest.raises(ValueError, match="has no cat"): web_images(("three", "cat"), 1, 0, 32)


def test_sets_of_other_classes_have_other_names():
    data = {name: load_dataset(name) for name in ("digits", "digits-photo", "greek")}
    for synthesis in ("single", "web"):
        name = {d: STUDY.synthetic_hash(data[d], Run("bridged_pp", 0, 0, 20, synthesis)) for d in data}
        assert name["digits"] == name["digits-photo"] != name["greek"]
    web = [STUDY.synthetic_hash(data["greek"], Run("mixed", 0, seed, 20, "web")) for seed in (0, 1)]
    assert web[0] != web[1]


def test_a_dataset_under_two_names_is_counted_once(tmp_path, monkeypatch):
    (tmp_path/"mine").mkdir()
    (tmp_path/"link").symlink_to("mine")
    monkeypatch.chdir(tmp_path)
    for twice in (["digits", "registry:digits"], ["mine", "./mine/"], ["mine", "digits", "link"]):
        with pytest.raises(ValueError, match="are the same dataset: list it once"): check_each_once(twice)
    check_each_once(["mine", "digits", "digits-photo"])
    with pytest.raises(ValueError, match="digits and registry:digits are the same"):
        Study("miniature", datasets="digits registry:digits").check()


def test_mistakes_name_what_to_do(digits, tmp_path):
    study = Study("smoke", runs=str(tmp_path))
    with pytest.raises(ValueError, match="Unknown sweep 'few': choose core, shots"): study.datasets_of("few")
    with pytest.raises(FileNotFoundError, match="run the job `generate` for the group 'single' of 'digits'"):
        study.images(digits, Run("mixed", 0, 0, 20))
    with pytest.raises(ValueError, match="No page makes the table tab9"): page_of("tab9")
    assert study.groups("core", "digits") == [("single", "digits")]
    assert study.inversion(digits, "style", 4, 0).shots == 4


# ---- jobs and pages

def test_a_new_pipeline_takes_one_entry(monkeypatch):
    "It is in the grid, in the plan, in a table and in a figure, with its label, colour and marker."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd
    from bridgexfer.study import plots, report

    monkeypatch.setitem(PIPELINES, "half", Pipeline("Half bridged", "#117733", "v", "-.", bridged=True))
    study = Study("smoke", pipelines="vanilla half")
    assert {r.pipeline for r in study.runs("core", "digits")} == {"vanilla", "half"}
    target = {"digits": Target("digits", 10, 898, "digits")}
    def passes(study): return sum(w.passes for w in work_of(study, target) if w.sweep == "core")
    assert passes(study) > passes(Study("smoke", pipelines="vanilla"))
    task = dict(dataset="digits", arch="net", shots=0, metric="top1", labels=[0, 1, 0, 1])
    runs = [task | dict(pipeline=p, seed=seed, accuracy=(seed + k) / 4, predictions=[0, 1, k, 1])
            for k, p in enumerate(("vanilla", "half")) for seed in (0, 1)]
    table = report.measured(pd.DataFrame(runs), ["dataset", "arch", "shots"])
    wide = report.wide(table, {"pipeline": ("pipeline", report.label)})
    assert "Half bridged" in wide.reset_index().to_string()
    fig, ax = plt.subplots()
    plots.band(ax, [1, 2], [.5, .6], [.1, .1], "half")
    assert ax.lines[0].get_color() == "#117733" and ax.lines[0].get_marker() == "v"
    assert [h.get_label() for h in plots.key(["vanilla", "half"])] == ["Vanilla", "Half bridged"]
    plt.close(fig)


def test_jobs_come_after_what_they_read():
    for study in (STUDY, Study("paper"), Study("evening")):
        jobs = study.jobs()
        place = {job.manifest: i for i, job in enumerate(jobs)}
        assert len({job.key for job in jobs}) == len(jobs)
        assert all(place[name] < place[job.manifest] for job in jobs for name in job.inputs)
        assert all(study.manifests(word) for page in study.pages() for word in page.reads)
    assert {p.name for p in PAGES} == {p.name for p in STUDY.pages()}


def test_parts_share_a_manifest():
    paper = Study("paper")
    parts = [job for job in paper.jobs() if job.manifest == "core/pets-resnet18"]
    assert len(parts) > 1 and len({job.key for job in parts}) == len(parts)
    runs = [r for job in parts for r in paper.parts(paper.runs("core", "pets"))[job.part]]
    assert sorted(map(repr, runs)) == sorted(map(repr, paper.runs("core", "pets")))


def test_the_miniature_keeps_two_cores_busy():
    "Two jobs of the core for each dataset, with as many runs each; what they leave is where it was."
    one = Study("miniature", jobs_per_sweep="1")
    for place in (job.manifest for job in one.jobs() if job.folder == "core"):
        parts = [job for job in STUDY.jobs() if job.manifest == place]
        assert len(parts) == 2
    for dataset in STUDY.datasets:
        runs = STUDY.runs("core", dataset)
        a, b = STUDY.parts(runs).values()
        assert len(a) == len(b) and sorted(map(repr, a + b)) == sorted(map(repr, runs))


def test_a_state_changes_with_what_decides_a_result_and_with_nothing_else():
    def states(**settings):
        study = Study("smoke", **settings)
        return {job.key: job_state(study, job) for job in study.jobs()}
    before = states()
    assert states(memory="3") == states(figures="elsewhere") == before
    assert all(states(guidance="5")[key] != state for key, state in before.items())
    volume = states(volumes="10 50")
    changed = {key for key in before if volume[key] != before[key]}
    assert changed == {"volume/digits-mini_resnet10", "generate/volume-digits"}
    assert decides("lr") and not decides("generate_hours") and not decides("style_datasets")


def test_pages_depend_on_what_they_list():
    one, other = Study("smoke"), Study("smoke", steps="3")
    assert page_state(one, page_of("tab4_datasets")) != page_state(other, page_of("tab4_datasets"))
    assert page_state(one, page_of("hyperparameters")) == page_state(Study("smoke"), page_of("hyperparameters"))


def test_resources_of_a_sweep_override_those_of_its_rule():
    paper = Study("paper")
    hours = paper.settings.values
    assert resources(paper, "transfer", "architectures")["runtime"] == 60 * hours["architectures_hours"]
    assert resources(paper, "transfer", "core")["runtime"] == 60 * hours["hours"]
    assert resources(paper, "generate")["mem_mb"] == 1000 * hours["generate_memory"]
    assert resources(paper, "table")["gpu"] == 0


def test_commands_can_be_typed():
    study = Study("smoke", seeds="0 1", runs="my runs", memory="9")
    job = next(job for job in study.jobs() if job.rule == "transfer")
    command = job_command(study, job)
    assert command.startswith("papermill --engine ipc --no-progress-bar nbs/jobs/transfer.ipynb ")
    assert '"seeds": "0 1"' in command and "memory" not in command
