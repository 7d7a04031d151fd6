"""Metrics of sets: answers that are known beforehand, and one command."""
import json

import numpy as np
import pytest
from PIL import Image

from bridgexfer.cli import main
from bridgexfer.set_metrics import compare_sets, copied, copy_threshold, density_coverage, diversity, frechet_distance
from bridgexfer.set_metrics import gaussian_distance, halves, nearest, precision_recall, radii, set_metrics

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(400, 5))
LABELS = np.arange(400) % 4


def by_the_definition(real, fake, k): # with loops, as the papers write it
    def distance(a, b): return np.sqrt(((a - b)**2).sum())
    def radius(x, i): return sorted(distance(x[i], b) for j, b in enumerate(x) if j != i)[k - 1]
    r = [radius(real, i) for i in range(len(real))]
    f = [radius(fake, j) for j in range(len(fake))]
    inside = np.array([[distance(a, b) <= r[i] for i, a in enumerate(real)] for b in fake])
    recalled = np.mean([any(distance(a, b) <= f[j] for j, b in enumerate(fake)) for a in real])
    return inside.any(1).mean(), recalled, inside.sum() / (k * len(fake)), inside.any(0).mean()


@pytest.mark.parametrize("k", [1, 3])
def test_neighbourhoods_are_the_papers(k):
    real, fake = REAL[:30], RNG.normal(size=(25, 5)) * 0.7
    ours = (*precision_recall(real, fake, k), *density_coverage(real, fake, k))
    assert np.allclose(ours, by_the_definition(real, fake, k))


def test_a_set_against_itself():
    assert precision_recall(REAL, REAL) == (1, 1) and density_coverage(REAL, REAL)[1] == 1
    assert np.isclose(density_coverage(REAL, REAL, 5)[0], 6 / 5) and frechet_distance(REAL, REAL) < 1e-9
    found = set_metrics(REAL, REAL, LABELS)
    assert found["copies"] == 1 and found["kernel distance"] < 0 # unbiased: pairs of an image with itself count across


def test_one_image_repeated():
    found = set_metrics(REAL, np.repeat(REAL[7:8], 300, 0), np.arange(300) % 4)
    assert found["precision"] == 1 and found["recall"] <= 1 / 400 and found["coverage"] < 0.05
    assert found["diversity within a class"] == 0 and found["copies"] == 1


def test_half_of_the_classes_missing():
    centres = 30 * np.eye(4)[LABELS]
    real, fake = RNG.normal(size=(400, 4)) + centres, RNG.normal(size=(400, 4)) + centres
    half = fake[LABELS < 2]
    assert precision_recall(real, half)[0] > 0.6 and precision_recall(real, half)[1] < 0.55
    assert density_coverage(real, fake)[1] > 0.9 and 0.4 < density_coverage(real, half)[1] < 0.5
    assert frechet_distance(real, half) > 20 * frechet_distance(real, fake)


def test_order_and_blocks_change_nothing(monkeypatch):
    fake, labels = RNG.normal(size=(150, 5)), np.arange(150) % 3
    at, back = RNG.permutation(400), RNG.permutation(150)
    a, b = set_metrics(REAL, fake, labels), set_metrics(REAL[at], fake[back], labels[back])
    assert a.keys() == b.keys() and np.allclose(list(a.values()), list(b.values()))
    from bridgexfer import set_metrics as module
    monkeypatch.setattr(module.blocks, "__defaults__", (7,))
    assert np.allclose(list(set_metrics(REAL, fake, labels).values()), list(a.values()))


def test_gaussians_of_known_distance():
    assert np.isclose(gaussian_distance(([0, 0], [3, 4]), (np.eye(2), 4 * np.eye(2))), 25 + 2)
    q, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    a, b = (q @ np.diag(d) @ q.T for d in ([1, 4, 9, 0, 1, 1], [4, 4, 1, 1, 0, 1])) # they commute; both singular
    assert np.isclose(gaussian_distance((np.zeros(6), np.zeros(6)), (a, b)), 1 + 0 + 4 + 1 + 1 + 0)
    x, y = RNG.normal(size=(40_000, 3)), RNG.normal(size=(40_000, 3)) * 3 + [1, 0, 0]
    assert abs(frechet_distance(x, y) - (1 + 3 * 4)) < 0.3


def test_copies_are_found_and_independent_images_are_not():
    fresh = RNG.normal(size=(300, 5))
    assert copied(fresh, REAL).mean() < 0.03 and copied(REAL[:50] + 1e-6, REAL).all()
    assert np.isclose((radii(REAL, 1) <= copy_threshold(REAL, 0.05)).mean(), 0.05, atol=0.01)
    distance, row = nearest(REAL[[5, 9]] + 1e-6, REAL)
    assert row.tolist() == [5, 9] and (distance < 1e-5).all()
    twice = np.concatenate([REAL, REAL[:100]]) # with duplicates among the real ones, copies are still found
    assert copied(REAL[:10] + 1e-6, twice).all()


def test_diversity_is_within_classes():
    x = np.array([[0.], [2.], [100.], [103.], [7.]])
    assert diversity(x, [0, 0, 1, 1, 2]) == 2.5


@pytest.mark.parametrize(("call", "said"), [
    (lambda: precision_recall(REAL, REAL[:3]), "need 4 images"),
    (lambda: density_coverage(REAL, REAL[:, :3]), "of one width"),
    (lambda: frechet_distance(REAL, REAL[:1]), "need 2 images"),
    (lambda: frechet_distance(REAL, REAL[:9] * np.nan), "not finite"),
    (lambda: diversity(REAL[:3], [0, 1, 2]), "No class has two images"),
    (lambda: compare_sets((REAL[:11], LABELS[:11]), (REAL, LABELS)), "needs 12 real images"),
    (lambda: compare_sets((REAL, LABELS), (REAL[:3], LABELS[:3])), "needs 4 synthetic images")])
def test_what_cannot_be_measured_is_a_sentence(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_halves_are_of_every_class():
    first, second = halves(LABELS)
    assert sorted([*first, *second]) == list(range(400))
    assert np.bincount(LABELS[first]).tolist() == np.bincount(LABELS[second]).tolist() == [50] * 4


def test_the_command_compares_two_folders(tmp_path, capsys):
    def write(place, seed, n):
        place.mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        for k, image in enumerate(pixels): Image.fromarray(image).save(place/f"{k}.png")
    for seed, c in enumerate(("cat", "dog")):
        write(tmp_path/"real"/"train"/c, seed, 8)
        (tmp_path/"real"/"test"/c).mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), 9 * seed, np.uint8)).save(tmp_path/"real"/"test"/c/"x.png")
    write(tmp_path/"made"/"Cat", 0, 8) # the training images, and no dog
    line = ["compare", str(tmp_path/"real"), str(tmp_path/"made"), "--profile", "smoke"]
    line += ["--set", f"runs={tmp_path}/runs"]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["real"], found["synthetic"]) == (16, 8) and "CLIP" in found["features"]
    assert found["metrics"]["synthetic"]["copies"] == 1 and found["metrics"]["synthetic"]["precision"] == 1
    assert set(found["metrics"]) == {"synthetic", "real"}
    assert main([*line, "--arch", "mini_resnet10"]) == 0
    assert "Fréchet distance" in (out := capsys.readouterr().out) and "backbone mini_resnet10" in out
    assert main(["compare", str(tmp_path/"real"), str(tmp_path/"gone"), "--profile", "smoke"]) == 2
    assert "is not a folder" in capsys.readouterr().err
