"""Splits and subsets: nothing overlaps, few-shot subsets nest, errors name the choices."""
import errno
import os

import numpy as np
import pytest
from archives_fixture import write_archive
from PIL import Image

from bridgexfer import images
from bridgexfer.data.registry import dataset_info, load_dataset, train_size
from bridgexfer.data.targets import TARGETS
from bridgexfer.datasets import few_shot, hold_out
from bridgexfer.evaluation import accuracy
from bridgexfer.images import as_images, decoded, open_file, read_image, store_file


@pytest.mark.parametrize("name", TARGETS)
def test_train_validation_and_test_do_not_overlap(name):
    data = load_dataset(name)
    fit, validation = hold_out(data.train, 0.2, seed=3)
    assert sorted([*fit.rows, *validation.rows]) == list(range(len(data.train)))
    train, test = ({i.tobytes() for i in part.pixels} for part in (data.train, data.test))
    assert len(train & test) <= 1  # the scans hold one pair of equal images at most


def test_scans_of_test_are_not_in_train_of_the_photo_variant():
    plain = load_dataset("digits")
    photo = load_dataset("digits-photo")
    assert np.array_equal(plain.train.labels, photo.train.labels)
    assert np.array_equal(plain.test.labels, photo.test.labels)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_few_shot_subsets_nest_and_are_balanced(name, seed):
    train = load_dataset(name).train
    subsets = [few_shot(train, k, seed) for k in (1, 2, 4, 8, 16)]
    for small, large in zip(subsets, subsets[1:]): assert set(small.rows) < set(large.rows)
    for k, subset in zip((1, 2, 4, 8, 16), subsets): assert (np.bincount(subset.labels) == k).all()
    assert set(subsets[2].rows) != set(few_shot(train, 4, seed + 7).rows)


def test_the_same_images_every_time():
    for name in TARGETS: assert load_dataset(name).test.digest == load_dataset(name).test.digest
    assert len({load_dataset(n).train.digest for n in TARGETS}) == len(TARGETS)


def test_held_out_share_is_kept_in_every_class():
    whole = as_images(np.zeros((103, 2, 2, 3)), [0] * 100 + [1] * 2 + [2], "abc")
    fit, validation = hold_out(whole, 0.2, seed=0)
    assert np.bincount(validation.labels, minlength=3).tolist() == [20, 1, 0]
    assert np.bincount(fit.labels).tolist() == [80, 1, 1]


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match="digits, digits-photo, greek"): dataset_info("mnist")
    with pytest.raises(ValueError, match="choose 1 to 40"): few_shot(load_dataset("greek").train, 41, 0)
    with pytest.raises(ValueError, match="choose 1 to"): few_shot(load_dataset("greek").train, 0, 0)
    with pytest.raises(ValueError, match="top1, mean_per_class"): accuracy(np.zeros(2), np.zeros(2), "f1")


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for name in ("red_fox", "owl"):
            (tmp_path/split/name).mkdir(parents=True)
            for i in range(3): Image.new("RGB", (20 + i, 30), (i * 40, 0, 0)).save(tmp_path/split/name/f"{i}.png")
    return tmp_path


def test_a_folder_of_images(folder):
    data = load_dataset(str(folder), size=16)
    assert data.info.names == ("owl", "red fox") and data.train.pixels.shape == (6, 16, 16, 3)


def test_large_images_are_stored_whole_and_small_files_as_they_are(folder):
    for i in range(3): Image.new("RGB", (300 + i, 150)).save(folder/"train"/"owl"/f"{i}.png")
    data = load_dataset(str(folder), size=100)
    sizes = [open_file(f).size for f in data.train.pixels[:3]]
    assert data.train.are_files and sizes == [(200, 100), (201, 100), (201, 100)]
    assert data.train.pixels[3] == (folder/"train"/"red_fox"/"0.png").read_bytes()
    assert data.train.squares(64).shape == (6, 64, 64, 3)
    (folder/"test"/"owl"/"0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png cannot be read"): load_dataset(str(folder), size=100)


def test_an_archive_of_files_is_read_once(tmp_path, monkeypatch):
    written = write_archive("dtd", tmp_path, images="tiny")
    data = load_dataset("dtd", 128, tmp_path)
    first = min(path for path, _ in written.test)
    assert data.test.are_files and len(data.train) == 3760
    assert data.test.pixels[0].to_pybytes() == store_file(tmp_path/first, 128)
    monkeypatch.setattr(images, "store_file", None)
    again = load_dataset("dtd", 128, tmp_path)
    assert again.train.digest == data.train.digest and again.train.take([5]).digest == data.train.take([5]).digest


def test_damaged_and_missing_images_are_named(folder):
    good = folder/"train"/"owl"/"1.png"
    good.write_bytes(good.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1\.png cannot be read"): load_dataset(str(folder))
    for image in (folder/"test"/"owl").iterdir(): image.unlink()
    good.unlink()
    with pytest.raises(ValueError, match="no images for owl"): load_dataset(str(folder))
    (folder/"test"/"owl").rmdir()
    with pytest.raises(ValueError, match="differ in the classes owl"): load_dataset(str(folder))
    (folder/"test"/"red_fox").rename(folder/"elsewhere")
    (folder/"test").rmdir()
    with pytest.raises(FileNotFoundError, match="test is missing"): load_dataset(str(folder))


def test_upright_by_exif(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste((255, 0, 0), (0, 0, 8, 4)) # red above
    exif = Image.Exif()
    exif[0x0112] = 3 # to be shown upside down
    image.save(tmp_path/"a.png", exif=exif)
    assert read_image(tmp_path/"a.png", 8)[7, 0].tolist() == [255, 0, 0]


def test_an_archive_of_full_size_becomes_a_dataset(tmp_path, monkeypatch):
    "DTD, because public code tests it on train."
    written = write_archive("dtd", tmp_path, images="tiny")
    data = load_dataset("dtd", 16, tmp_path)
    assert (len(data.train), len(data.test)) == data.info.counts == (3760, 1880)
    assert len(data.info.names) == 47 and data.info.metric == "top1"
    first = min(path for path, _ in written.test)
    assert np.array_equal(data.test.pixels[0], read_image(tmp_path/first, 16)) # test is test, in the listing's order
    assert set(np.bincount(data.test.labels)) == {40}
    assert isinstance(data.train.pixels.base, np.memmap) # mapped, not read
    monkeypatch.setattr(images, "read_image", None) # decoded once: no second load reads an image
    again = load_dataset("dtd", 16, tmp_path)
    assert again.train.digest == data.train.digest and again.test.digest == data.test.digest
    again.train.pixels[0] = 0 # what a process writes stays its own
    assert load_dataset("dtd", 16, tmp_path).train.digest == data.train.digest


def test_a_full_disk_is_found_before_the_first_image_is_decoded(tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(images, "read_image", None)
    with pytest.raises(OSError, match="No space left"):
        decoded([tmp_path/"a.png"] * 9, 16, tmp_path/"kept.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["aircraft", "pets", "sun397"])
def test_an_absent_archive_says_what_to_do(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing: ") as e: load_dataset(name, 32, tmp_path)
    assert str(tmp_path) in str(e.value) and ("download(" in str(e.value))


def test_sizes_are_known_without_images(tmp_path):
    assert train_size("sun397") == 19850 and train_size("digits") == len(load_dataset("digits").train)
    for name in TARGETS:
        data = load_dataset(name)
        assert data.info.counts == (len(data.train), len(data.test))


def test_every_class_is_dealt_in_an_order_of_its_own():
    "Or the same image of every class would be in a subset: in an archive, one photographer's or one font's."
    whole = as_images(np.zeros((8 * 20, 2, 2, 3)), np.repeat(range(8), 20), "abcdefgh")
    for part in (few_shot(whole, 3, seed=0), hold_out(whole, 0.2, seed=0)[1]):
        assert len({tuple(part.rows[part.labels == c] % 20) for c in range(8)}) > 4
