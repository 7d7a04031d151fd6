"""Curation: wrong labels are found, blank images go, copies are named, and no test image is looked at."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from bridgexfer import curation
from bridgexfer.alignment import balanced
from bridgexfer.clip_tuning import load_clip
from bridgexfer.cli import main
from bridgexfer.curation import curate, keep, score_set, shows_nothing, useless
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import Dataset
from bridgexfer.images import as_images, file_array, store
from bridgexfer.imported_sets import import_set
from bridgexfer.miniature.typeset import DIGITS, corpus


class Unseen:
    "Test images that nobody may look at."
    def __getattribute__(self, name): raise AssertionError(f"somebody asked the test images for {name}")


@pytest.fixture(scope="module")
def data():
    digits = load_dataset("digits")
    return Dataset(digits.info, balanced(digits.train, 100), Unseen())


@pytest.fixture(scope="module")
def clip(): return load_clip("miniature")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    "A set of 100 typeset digits; a fifth have a wrong label, the second is black, the third a training image."
    home = tmp_path_factory.mktemp("set")
    pixels, labels, _ = corpus(100, DIGITS, seed=0)
    wrong = np.arange(100) % 5 == 0
    labels = np.where(wrong, (labels + 1 + np.arange(100) % 9) % 10, labels)
    pixels[1], pixels[2], labels[2] = 0, data.train.pixels[33], data.train.labels[33]
    for k, (image, label) in enumerate(zip(pixels, labels)):
        place = home/"made"/data.info.names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place/f"{'wrong' if wrong[k] else 'right'}-{k:03}.png")
    return import_set(home/"made", data.info.names, home/"imported")


def rows_named(made, part): return np.array([part in file for file in made.index["file"].to_pylist()])


def test_wrong_labels_are_found(made, data, clip):
    _, scores = score_set(made, data.train, clip)
    usual = ~scores.useless & (scores.similarity < 0.99999)
    wrong = rows_named(made, "wrong-")
    assert wrong.sum() == 20 and roc_auc_score(~wrong[usual], scores.probability[usual]) > 0.9
    assert wrong[keep(scores, share=0.7)].mean() < wrong.mean() / 2


def test_a_black_image_goes_and_a_copy_is_named(made, data, clip):
    black, copy = (int(np.flatnonzero(rows_named(made, f"right-00{k}"))[0]) for k in (1, 2))
    for rule in (dict(share=1.), dict(threshold=0.)):
        kept = curate(made, data, clip, **rule)
        assert black not in kept.rows and len(kept.rows) == 99
    row = kept.scores.loc[copy]
    assert row.copied and row.nearest == data.train.rows[33] and row.similarity > 0.9999
    label = data.info.names[kept.scores.label[copy]]
    assert f"image {copy}, {label}: like training image {row.nearest}" in kept.summary()
    assert "100 images of 10 classes were scored" in kept.summary()
    assert "1 were discarded, 1 of them blank" in kept.summary()


def test_scores_are_made_once_and_lie_beside_the_set(made, data, clip, monkeypatch):
    spec, scores = score_set(made, data.train, clip)
    [path] = made.folder.glob("scores-*.parquet")
    assert json.loads(pq.read_schema(path).metadata[b"bridgexfer"])["data"] == data.train.digest
    monkeypatch.setattr(curation, "score_images", None) # found, not made
    assert score_set(made, data.train, clip)[1].equals(scores)
    with pytest.raises(TypeError): score_set(made, data.train.take(np.arange(50)), clip) # other scores
    assert len(made.index) == 100 and import_set(made.spec.source, made.spec.names, made.folder.parent).per_class


def test_what_is_kept_trains_like_any_set(made, data, clip, tmp_path):
    kept = curate(made, data, clip, share=0.5)
    images = kept.images()
    n = kept.per_class
    assert images.names == made.spec.names and images.labels.tolist() == n * list(range(10)) and n > 1
    files = import_set(kept.export(tmp_path/"kept"), made.spec.names, tmp_path/"imported")
    assert np.array_equal(files.images().pixels, images.pixels)
    assert "training image" in (tmp_path/"kept"/"README.md").read_text()
    with pytest.raises(ValueError, match="were kept, and 99 of each class are asked for"): kept.images(99)
    with pytest.raises(FileExistsError, match="not an empty folder"): kept.export(tmp_path/"kept")
    assert kept.spec != replace(kept.spec, share=0.4)


SCORES = pd.DataFrame(dict(label=[0, 0, 0, 0, 1, 1], probability=[.9, .1, .5, .7, .2, .3],
                           useless=[False, False, False, True, False, False]))


@pytest.mark.parametrize(("rule", "rows"), [
    (dict(share=.5), [0, 2, 5]), (dict(share=1), [0, 1, 2, 4, 5]), (dict(share=.01), [0, 5]),
    (dict(threshold=.3), [0, 2, 5]), (dict(threshold=.95), []), (dict(threshold=0), [0, 1, 2, 4, 5])])
def test_rules(rule, rows): assert keep(SCORES, **rule).tolist() == rows


@pytest.mark.parametrize(("rule", "said"), [
    ({}, "a share or a threshold"), (dict(share=.5, threshold=.5), "a share or a threshold"),
    (dict(share=0), "share to keep is 0"), (dict(share=float("nan")), "share to keep is nan"),
    (dict(threshold=2), "threshold is 2")])
def test_wrong_rules_are_a_sentence(rule, said):
    with pytest.raises(ValueError, match=said): keep(SCORES, **rule)


def test_broken_files_are_useless():
    noise = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    noise[1] = 140
    files = [store(Image.fromarray(image), 96, "png") for image in noise]
    files[2] = files[2][:300]
    assert useless(as_images(file_array(files), [0, 0, 0], ("a",))).tolist() == [False, True, True]
    assert shows_nothing(np.zeros((8, 8, 3), np.uint8)) and not shows_nothing(noise[0])


def test_the_command_writes_what_it_keeps(made, tmp_path, capsys):
    line = ["curate", "digits", made.spec.source, "--profile", "smoke", "--set", f"runs={tmp_path/'runs'}"]
    assert main([*line, "--share", "0.5", "--out", str(tmp_path/"kept"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 100 and found["useless"] == 1 and 40 <= found["kept"] <= 60
    assert sum(p.suffix == ".png" for p in (tmp_path/"kept").rglob("*")) == found["kept"]
    assert main([*line, "--share", "0.5", "--out", str(tmp_path/"kept")]) == 2
    assert main([*line, "--out", str(tmp_path/"other")]) == 2
    assert "Give a share or a threshold" in capsys.readouterr().err and not (tmp_path/"other").exists()
