"""A folder of 100,000 images: memory for names and thumbnails, and none that grows with the pixels or the files."""
import tracemalloc
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from bridgexfer import layouts
from bridgexfer.data import check
from bridgexfer.data.check import Entry, check_folder, closest, near_copies
from bridgexfer.images import files_of, mapped_files
from bridgexfer.layouts import find_layout, load_layout

RNG = np.random.default_rng(0)


def traced(work):
    "What some work returns, and the most bytes that Python and NumPy held during it."
    tracemalloc.start()
    try: return work(), tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


# ---- files that are mapped

def test_mapped_files_are_pieces_of_the_file_and_not_copies(tmp_path):
    files = [RNG.bytes(1000 + k) for k in range(600)] # in several batches
    found = mapped_files(tmp_path/"kept.arrow", lambda: files)
    assert [f.to_pybytes() for f in found] == files
    ends = [f.address + f.size for f in found]
    assert sum(a == b.address for a, b in zip(ends, found[1:])) >= 597 # but from batch to batch
    assert pa.total_allocated_bytes() < sum(map(len, files)) / 10


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_files_of_any_piece_of_an_array(kind):
    array = pa.array([b"one", b"", b"three", b"four"], kind)
    assert [bytes(f) for f in files_of(array)] == [b"one", b"", b"three", b"four"]
    assert [bytes(f) for f in files_of(array[1:3])] == [b"", b"three"]
    assert not list(files_of(array[:0])) and not list(files_of(pa.array([], kind)))


# ---- folders of many files

def folder_of(count, home):
    "A folder of small images, each with a content of its own."
    for k in range(count):
        place = home/("test" if k % 5 == 0 else "train")/f"class {'ab'[k // 5 % 2]}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((66, 66), Image.BICUBIC)
        image.save(place/f"an image of a user {k:06}.jpg", quality=20)
    return home


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A small folder and a larger one, and how many more images that has."
    home = tmp_path_factory.mktemp("large")
    few, many = folder_of(200, home/"few"), folder_of(1400, home/"many")
    check_folder(few, progress=False) # imports are paid for
    return few, many, 1200


def bytes_an_image(folders, work):
    few, many, more = folders
    def once(): return (traced(lambda: work(many))[1] - traced(lambda: work(few))[1]) / more
    return min(once(), once()) # what other threads of this process allocate meanwhile is counted, too


def test_a_layout_holds_a_few_hundred_bytes_an_image(folders):
    assert bytes_an_image(folders, find_layout) < 700


def test_a_check_holds_names_and_thumbnails(folders, monkeypatch):
    monkeypatch.setattr(check, "closest", partial(closest, block=64)) # the small folder fills a block, too
    assert bytes_an_image(folders, lambda folder: check_folder(folder, progress=False)) < 2500


@pytest.mark.parametrize("size", [32, 96])
def test_loading_holds_names(size, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "MAPPED_FROM", 0)
    def fresh(): return Path(mkdtemp(dir=tmp_path)) # nothing is found again
    assert bytes_an_image(folders, lambda folder: load_layout(folder, size, fresh())) < 1200


def test_a_folder_is_listed_once_when_it_is_loaded(folders, monkeypatch):
    calls = []
    monkeypatch.setattr(layouts, "find_layout", lambda *how: calls.append(how) or find_layout(*how))
    load_layout(folders[0], 32)
    assert len(calls) == 1


# ---- near copies

def entries(count, split, rng):
    thumbs = rng.integers(0, 256, (count, 16 * 16 * 3), dtype=np.uint8)
    names = [f"{split}{k}" for k in range(count)]
    return [Entry(None, n, "image", "a", split, k, n, t.tobytes()) for k, (n, t) in enumerate(zip(names, thumbs))]


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_the_most_similar_image_is_found_in_any_block(block, monkeypatch):
    train, test = entries(90, "train", RNG), entries(40, "test", RNG)
    monkeypatch.setattr(check, "ALIKE", .02)
    products = check._centred(train) @ check._centred(test).T
    for found, p in zip(closest(train, test, block=block), (products, products.T)):
        assert found.tolist() == [int(row.argmax()) if row.max() > .02 else -1 for row in p]


def test_images_are_compared_a_block_at_a_time():
    def peak(count): return traced(lambda: list(near_copies(train + entries(count, "test", RNG))))[1]
    train = entries(1024, "train", RNG)
    assert (peak(6000) - peak(2000)) / 4000 < 1500 # of which a thumbnail has 801; 7 kB when all were compared at once
