"""Sets that start from real images: the k of the run, never one of test; between classes, labels are the formula's."""
import json
from dataclasses import replace

import numpy as np
import pytest

from bridgexfer.artefacts import spec_hash
from bridgexfer.cli import main
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import few_shot
from bridgexfer.generation import BETWEEN, BETWEEN_STRENGTH, STRENGTHS, SynthesisSpec, synthesis_spec
from bridgexfer.images import SoftImages, as_images
from bridgexfer.study.grid import SetKey, Study
from bridgexfer.synthetic_sets import (SyntheticSet, check_init_images, generate, init_images_of, shard_rows,
                                       soft_labelled, start_class)

STUDY = Study("smoke")


def command(folder):
    "`bridgexfer generate`, as small as it goes, into a folder."
    small = ["--profile", "smoke", "--images", "1", "--device", "cpu"]
    return ["generate", "digits", *small, "--set", f"runs={folder}"]


@pytest.fixture(scope="module")
def digits(): return load_dataset("digits")


@pytest.mark.parametrize("synthesis", ["real_guidance", "between"])
@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_other_test_images_change_nothing(digits, synthesis, shots):
    "A set's address does not depend on test images, nor on training images outside its k; on its k it does."
    def address(data): return spec_hash(STUDY.synthesis(data, SetKey(synthesis, 3.5, shots, 0)))
    test = as_images(255 - digits.test.pixels, digits.test.labels, digits.info.names)
    assert address(replace(digits, test=test)) == address(digits)
    kept = few_shot(digits.train, shots, 0).rows
    pixels = 255 - digits.train.pixels
    pixels[kept] = digits.train.pixels[kept]
    assert address(replace(digits, train=as_images(pixels, digits.train.labels, digits.train.names))) == address(digits)
    pixels[kept[0]] = 0
    assert address(replace(digits, train=as_images(pixels, digits.train.labels, digits.train.names))) != address(digits)


def test_a_set_takes_its_own_references_and_no_others(digits):
    for synthesis in ("real_guidance", "between"):
        spec = STUDY.synthesis(digits, SetKey(synthesis, 3.5, 4, 0))
        check_init_images(spec, few_shot(digits.train, 4, 0))
        for others in (few_shot(digits.train, 4, 1), digits.test, digits.train):
            with pytest.raises(ValueError, match="pass the images of the spec"): check_init_images(spec, others)


def test_strengths(digits):
    "He et al.'s by the number of shots; Diff-Mix's between classes."
    found = {k: STUDY.synthesis(digits, SetKey("real_guidance", 3.5, k, 0)).strength for k in STRENGTHS}
    assert found == STRENGTHS
    assert STUDY.synthesis(digits, SetKey("between", 3.5, 4, 0)).strength == BETWEEN_STRENGTH == .7


@pytest.mark.parametrize("shots", [1, 16])
def test_between_classes_the_reference_is_of_another_class(digits, shots):
    real = few_shot(digits.train, shots, 0)
    spec = STUDY.synthesis(digits, SetKey("between", 3.5, shots, 0))
    rows = [row for k in range(5) for row in shard_rows(spec, k)]
    used = real.labels[init_images_of(spec, rows, real)]
    assert used.tolist() == [start_class(spec, r.label, r.index) for r in rows]
    pairs = {(r.label, c) for r, c in zip(rows, used.tolist())}
    assert all(a != b for a, b in pairs) and len(pairs) > 80 # of 90


@pytest.mark.parametrize("strength", [0., .3, .7, 1.])
def test_soft_labels_are_diff_mix_s(digits, strength):
    "(1 − s^γ) of the class that an image started from and s^γ of the one that it shows, γ = 0.8; by hand."
    spec = replace(STUDY.synthesis(digits, SetKey("between", 3.5, 4, 0)), strength=strength)
    images = as_images(np.zeros((30, 8, 8, 3)), np.tile(np.arange(10), 3), spec.names)
    soft = soft_labelled(images, spec)
    expected = {0.: 1., .3: 1 - .3**.8, .7: 1 - .7**.8, 1.: 0.}[strength]
    assert np.allclose(soft.shares, expected) and soft.labels.tolist() == images.labels.tolist()
    assert soft.others.tolist() == [start_class(spec, c, i) for i in range(3) for c in range(10)]


def test_a_set_between_classes_on_disk(digits, pipe, model, tmp_path):
    "It is made, opened without the real images, and a part of it has the labels of the whole."
    real = few_shot(digits.train, 1, 0)
    how = dict(steps=4, size=32, shard=1)
    spec = synthesis_spec(model, digits.info.names, init_images=BETWEEN + real.digest, strength=.5, **how)
    made = generate(spec, tmp_path, 2, pipe=pipe, progress=False, init_images=real)
    two, one = (SyntheticSet(made.folder).images(n) for n in (2, 1))
    assert isinstance(two, SoftImages) and two.others[:10].tolist() == one.others.tolist() and made.verify() == []
    own = replace(spec, init_images=real.digest)
    assert not isinstance(generate(own, tmp_path, 1, pipe=pipe, progress=False, init_images=real).images(), SoftImages)
    assert spec_hash(own) != spec_hash(spec)


def test_one_class_has_nothing_between():
    with pytest.raises(ValueError, match="at least two classes"):
        SynthesisSpec(["cat"], "w", init_images=f"{BETWEEN}1a", strength=.5)


def test_the_command_starts_from_training_images(digits, tmp_path, capsys):
    fixed = command(tmp_path)
    for option, prefix, strength in (("--from-real", "", STRENGTHS[2]), ("--between", BETWEEN, BETWEEN_STRENGTH)):
        assert main([*fixed, option, "2", "--json"]) == 0
        spec = SyntheticSet(json.loads(capsys.readouterr().out)["folder"]).spec
        assert spec.init_images == prefix + few_shot(digits.train, 2, 0).digest and spec.strength == strength
    assert main([*fixed, "--from-real", "2", "--strength", "0.5"]) == 0
    for wrong in (["--from-real", "2", "--between", "2"], ["--strength", "0.5"], ["--from-real", "-1"],
                  ["--from-real", "2", "--strength", "2"], ["--from-real", "9999"], ["--style", "--between", "1"]):
        assert main([*fixed, *wrong]) == 2, wrong
