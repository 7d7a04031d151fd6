"""Sweeps: every run finds the images that are its own, and sees none that it must not see."""
from dataclasses import replace

import numpy as np
import pytest

from bridgexfer.artefacts import spec_hash
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import few_shot
from bridgexfer.images import as_images
from bridgexfer.generation import STRENGTHS
from bridgexfer.study.settings import load_settings
from bridgexfer.study.grid import FROM_REAL, SWEEPS, Wanted, archs_of, datasets_of, group_of, groups_of, inversion_of
from bridgexfer.study.grid import real_of, runs_of, sets_of, strength, synthesis_for, synthesis_hash, synthetic_of
from bridgexfer.study.grid import wanted, web_images
from bridgexfer.synthetic_sets import SyntheticSet, generate
from bridgexfer.transfer import Run

S = load_settings("miniature")


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
    "Its spec, and so its token or its references, is the same whatever the other images are; that of a full-shot run is not."
    def address(data, shots): return spec_hash(synthesis_for(S, data, Wanted(synthesis, 3.5, shots, 0)))
    assert address(digits, 4) == address(tampered, 4)
    assert address(digits, 0) != address(tampered, 0)
    assert real_of(tampered, 4, 0).digest == real_of(digits, 4, 0).digest == few_shot(digits.train, 4, 0).digest # those that it is trained on
    inside = replace(digits, train=as_images(np.where(np.arange(898)[:, None, None, None] == few_shot(digits.train, 4, 0).rows[7], 0, digits.train.pixels), digits.train.labels, digits.train.names))
    assert address(digits, 4) != address(inside, 4)


@pytest.mark.parametrize("synthesis", FROM_REAL)
def test_seeds_have_tokens_and_references_of_their_own_subsets(digits, synthesis):
    specs = {(k, seed): synthesis_for(S, digits, Wanted(synthesis, 3.5, k, seed)) for k in (1, 4) for seed in (0, 1)}
    assert len({(s.token_hash, s.init_images) for s in specs.values()}) == 4


def test_shared_sets_never_show_a_run_more_than_its_images():
    one = load_settings("miniature", set_per_seed="0")
    for synthesis in FROM_REAL:
        assert wanted(one, Run("bridged_pp", 4, 2, 40, synthesis)).seed == 2
        assert wanted(one, Run("bridged_pp", 0, 2, 40, synthesis)).seed == 0
    assert wanted(one, Run("bridged_pp", 4, 2, 40)) == wanted(one, Run("bridged_pp", 0, 1, 40))


def test_every_run_has_a_group_that_makes_its_set():
    for profile in ("miniature", "smoke"):
        s = load_settings(profile)
        for sweep in SWEEPS:
            for d in datasets_of(s, sweep):
                for run in runs_of(s, sweep, d):
                    if wanted(s, run): assert sets_of(s, *group_of(s, run, d))[wanted(s, run)] >= run.per_class


def test_volume_sets_are_prefixes(tmp_path, digits):
    "All volumes of a seed are taken from one set, and the first images of the larger are those of the smaller."
    runs = [r for r in runs_of(S, "volume", "digits") if r.seed == 0 and r.uses]
    assert len({synthesis_hash(S, digits, r) for r in runs}) == 1 and len({r.per_class for r in runs}) == len(S.volumes)
    s = load_settings("smoke", runs=str(tmp_path), volumes="10 20 40")
    spec = synthesis_for(s, digits, Wanted("single", 3.5, 0, 0))
    generate(spec, s.runs_dir/"synthetic", 20, progress=False)
    small = synthetic_of(s, digits, Run("bridged_pp", 0, 0, 20))[1].pixels
    generate(spec, s.runs_dir/"synthetic", 40, progress=False) # grows
    large = synthetic_of(s, digits, Run("bridged_pp", 0, 0, 40))[1].pixels
    assert np.array_equal(large[:200], small) and np.array_equal(synthetic_of(s, digits, Run("bridged_pp", 0, 0, 10))[1].pixels, small[:100])
    assert SyntheticSet(s.runs_dir/"synthetic"/spec_hash(spec)).per_class == 40


def test_sweeps_vary_what_they_say():
    def varied(sweep, field, **of): return {getattr(r, field) for r in runs_of(S, sweep, "digits") if r.uses and all(getattr(r, k) == v for k, v in of.items())}
    assert varied("shots", "shots") == set(S.few_shots) and varied("volume", "per_class") == set(S.volumes)
    assert varied("guidance", "guidance") == set(S.guidances) and varied("style", "synthesis", shots=0) == {"single", "untrained", "style", "class"}
    assert varied("controls", "per_class", pipeline="mixed", synthesis="single") == {*S.mixed_images, S.images}
    assert archs_of(S, "architectures") == S.more_archs
    for sweep in SWEEPS: assert {r.seed for r in runs_of(S, sweep, "digits")} == set(S.seeds)
    for sweep in SWEEPS: assert {r.shots for r in runs_of(S, sweep, "digits")} <= {r.shots for r in runs_of(S, sweep, "digits") if r.pipeline == "vanilla"} | ({0} if sweep == "controls" else set())


def test_same_compute_is_that_of_the_core():
    run = next(r for r in runs_of(S, "controls", "digits") if r.pipeline == "vanilla_long")
    assert run.per_class == S.images and wanted(S, run) is None # it counts the images and uses none


def test_a_profile_without_datasets_for_a_sweep_has_no_runs_of_it():
    evening = load_settings("evening")
    assert datasets_of(evening, "guidance") == () and datasets_of(evening, "style") == ("pets",)
    assert not archs_of(evening, "architectures")


def test_strengths_for_other_shots_are_those_of_the_next_number_below():
    assert [strength(k) for k in (1, 3, 8, 10, 16, 50, 0)] == [STRENGTHS[k] for k in (1, 2, 8, 8, 16, 16, 16)]


def test_web_renders_are_of_their_classes_and_of_the_seed():
    a, b, c = (web_images(("three", "alpha"), n, seed, 32) for n, seed in ((5, 0), (5, 0), (5, 1)))
    assert np.array_equal(a.pixels, b.pixels) and not np.array_equal(a.pixels, c.pixels) and a.labels.tolist() == [0] * 5 + [1] * 5
    with pytest.raises(ValueError, match="has no cat"): web_images(("three", "cat"), 1, 0, 32)


def test_sets_of_other_classes_have_other_names():
    greek, photo = load_dataset("greek"), load_dataset("digits-photo")
    for synthesis in ("single", "web"):
        name = {d.info.name: synthesis_hash(S, d, Run("bridged_pp", 0, 0, 20, synthesis)) for d in (load_dataset("digits"), photo, greek)}
        assert name["digits"] == name["digits-photo"] != name["greek"]
    assert synthesis_hash(S, greek, Run("mixed", 0, 0, 20, "web")) != synthesis_hash(S, greek, Run("mixed", 0, 1, 20, "web"))


def test_mistakes_name_what_to_do(digits, tmp_path):
    s = load_settings("smoke", runs=str(tmp_path))
    with pytest.raises(ValueError, match="Unknown sweep 'few': choose core, shots"): datasets_of(s, "few")
    with pytest.raises(ValueError, match="No run of the profile 'smoke' needs the group 'single' of 'greek'"): sets_of(s, "single", "greek")
    with pytest.raises(FileNotFoundError, match="run the job `generate` for the group 'single' of 'digits'"): synthetic_of(s, digits, Run("mixed", 0, 0, 20))
    assert groups_of(s, "core", "digits") == [("single", "digits")]
    assert inversion_of(s, digits, "style", 4, 0).shots == 4
