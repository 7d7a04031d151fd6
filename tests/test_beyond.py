"""The comparison beyond the paper: one registry, sets that see no more than their run may, nothing added to it."""
from dataclasses import replace
import numpy as np
import pytest
from bridgexfer.artefacts import spec_hash
from bridgexfer.images import Images
from bridgexfer.study.grid import FROM_REAL, SetKey, Study, subset
from bridgexfer.study.records import SYNTHESES
from bridgexfer.transfer import PIPELINES, WAYS, Run

STUDY = Study("miniature")
DIGITS = STUDY.load("digits")
ARCH = "mini_resnet10"

def with_pixels(data, rows): # a dataset in which these training images are others
    pixels = np.array(data.train.pixels[np.arange(len(data.train))])
    pixels[rows] = 255 - pixels[rows]
    return replace(data, train=Images(pixels, data.train.labels, data.train.names, data.train.rows))

def hashes(data, shots): # of each way's set
    made = [way for way in SYNTHESES if way not in ("web", "filtered")]
    return {way: spec_hash(STUDY.synthesis(data, SetKey(way, 3.5, shots, 0))) for way in made}

@pytest.mark.parametrize("shots", [1, 4])
def test_a_way_sees_no_real_image_but_those_of_its_shots(shots):
    "Changing any other training image changes no set; one of the shots, those that rest on real images."
    seen = subset(DIGITS, shots, 0).rows
    before = hashes(DIGITS, shots)
    others = np.setdiff1d(np.arange(len(DIGITS.train)), seen)
    assert hashes(with_pixels(DIGITS, others), shots) == before
    after = hashes(with_pixels(DIGITS, seen[:1]), shots)
    assert {way for way in before if after[way] != before[way]} == {way for way in before if SYNTHESES[way].real}

def test_every_way_has_one_entry_and_is_compared():
    runs = STUDY.runs("beyond_generation", "digits-photo")
    assert {r.synthesis for r in runs if r.uses} == set(SYNTHESES)
    assert {r.shots for r in runs} == {1, 4, 16, 0}
    assert len({way.label for way in SYNTHESES.values()}) == len(SYNTHESES)
    assert all(way.source for way in SYNTHESES.values())
    assert {r.pipeline for r in STUDY.runs("beyond_use", "greek")} >= {"vanilla", "mixed", "bridged_pp", *WAYS}
    assert {w for w in SYNTHESES if SYNTHESES[w].real} == set(FROM_REAL)

def test_the_comparison_adds_nothing_to_the_paper():
    "Sets, jobs and searches of `make paper` are the same with and without it."
    settings = STUDY.settings
    without = Study(replace(settings, values=settings.values | dict(beyond_datasets=())))
    mine = {g: sets for g, sets in STUDY.all_sets.items() if not g[0].startswith("beyond_")}
    assert mine == without.all_sets and len(mine) < len(STUDY.all_sets)
    assert STUDY.tuned_cells("digits", ARCH) == without.tuned_cells("digits", ARCH)
    keys = {job.key for job in without.jobs()}
    assert keys < {job.key for job in STUDY.jobs()}
    others = {"tab5_learning_rates", "beyond_checkpoints"} # which have targets of their own
    assert {p.name for p in STUDY.pages_of("paper")} == {p.name for p in without.pages()} - others

def test_its_search_takes_what_the_papers_does_not():
    cells = STUDY.tuned_cells("digits", ARCH, "beyond")
    assert not set(cells) & set(STUDY.tuned_cells("digits", ARCH)) and {name for name, _ in cells} == {"bridged", *WAYS}
    assert list(STUDY.searched("mixed_weighted", 4, ARCH, "beyond")) == ["lr", "weight"]
    assert list(STUDY.searched("mixed_weighted", 1, ARCH, "beyond")) == ["lr"]
    kin = STUDY.choice("digits", ARCH, Run("mixed", 4, 0))
    begun = STUDY.begun("digits", ARCH, "mixed_weighted", 4)
    assert {k: begun[k] for k in ("lr", "epochs", "repeats")} == {k: kin[k] for k in ("lr", "epochs", "repeats")}
    assert all(STUDY.choice_path("digits", ARCH, p, 0) == STUDY.tuned_path for p in PIPELINES)
    assert STUDY.choice_path("digits", ARCH, "mixed_he", 0).parent.name == "beyond_tune"

def test_filtered_images_are_the_more_probable_half(monkeypatch):
    "A CLIP's word for each image decides, within each class, among twice as many as are kept."
    run = Run("bridged_pp", 4, 0, 2, "filtered")
    assert STUDY.set_key(run) == STUDY.set_key(replace(run, synthesis="single")) and STUDY.drawn(run) == 4
    assert STUDY.synthetic_hash(DIGITS, run) != STUDY.synthetic_hash(DIGITS, replace(run, synthesis="single"))
    from bridgexfer.curation import score_images
    from bridgexfer.clip_tuning import load_clip
    given = STUDY.images(DIGITS, Run("bridged_pp", 4, 0, 4, "web"))
    kept = STUDY._filtered(given, DIGITS, run, "cpu")
    scores = score_images(given, subset(DIGITS, 4, 0), load_clip("miniature")).probability.to_numpy()
    assert np.bincount(kept.labels).tolist() == [2] * 10
    for c in range(10):
        best = np.sort(scores[given.labels == c])[-2:]
        mine = score_images(kept, subset(DIGITS, 4, 0), load_clip("miniature")).probability[kept.labels == c]
        assert np.allclose(np.sort(mine), best, atol=1e-4)
