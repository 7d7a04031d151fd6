"""Writes the ten archives as their makers lay them out: true structure and annotation files, without the photographs.

At full size the lists have the official counts; which class has how many images is made up where it is not the same
for all. Stray files that the real archives or an operating system leave behind are written too.
"""
import io
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from bridgexfer.data.archives import ARCHIVES, Archive, CALTECH_SHOTS, class_sources

EVEN = {"dtd", "food", "sun397"}  # as many images in each class
EVEN_TRAIN = {"caltech101", "dogs", "flowers"}  # the same, of train alone
STRAY = (".DS_Store", "Thumbs.db")


@dataclass(frozen=True)
class Written:
    "What was written, and what a listing of it has to find."
    archive: Archive  # with the counts of what was written
    train: frozenset  # (path below the data root, label)
    test: frozenset


def write_archive(name, root, images="none", per_class=None):
    """Write an archive below a data root.

    images: "none", "empty" (files of no bytes) or "tiny" (JPEGs of 12 pixels).
        Caltech101 is listed from its files, so it has empty ones at least.
    per_class: None for the official counts, or (train, test) images for each class; Caltech101's train is always 30.
    """
    archive = ARCHIVES[name]
    rng = random.Random(name)
    counts = (archive.train, archive.test) if per_class is None else (n * archive.classes for n in per_class)
    train_count, test_count = counts
    if name == "caltech101": train_count = CALTECH_SHOTS * archive.classes
    small = per_class is not None
    train = _labels(train_count, archive.classes, small or name in EVEN | EVEN_TRAIN, rng)
    test = _labels(test_count, archive.classes, small or name in EVEN, rng)
    folder = Path(root)/archive.folder
    folder.mkdir(parents=True)
    train, test = WRITERS[name](folder, class_sources(name), train, test, rng)
    for path, label in [*train, *test] if images != "none" or name == "caltech101" else []:
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/path).write_bytes(_jpeg(label) if images == "tiny" else b"")
    for stray in STRAY: (folder/stray).write_bytes(b"\0")
    def listed(part): return frozenset((f"{archive.folder}/{path}", label) for path, label in part)
    return Written(replace(archive, train=len(train), test=len(test)), listed(train), listed(test))


def _labels(count, classes, even, rng):
    "As many labels as asked for, each class at least once, in random order."
    sizes = [count // classes + (i < count % classes) for i in range(classes)]
    for i in range(0, 0 if even else classes - 1, 2):
        moved = rng.randrange(sizes[i + 1])  # at least one is left
        sizes[i], sizes[i + 1] = sizes[i] + moved, sizes[i + 1] - moved
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(labels)
    return labels


@lru_cache(maxsize=None)
def _jpeg(label):
    from PIL import Image
    Image.new("RGB", (12, 12), (label % 256, 40 * (label // 256), 90)).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def _numbered(parts, form, start=1):
    "Paths from labels: form gets the label and the image's number in its class, which goes on from part to part."
    seen, out = Counter(), []
    for labels in parts:
        rows = []
        for y in labels:
            rows.append((form(y, start + seen[y]), y))
            seen[y] += 1
        out.append(rows)
    return out


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _savemat(path, values):
    from scipy.io import savemat
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values, do_compression=True)


def _cells(values):  # MATLAB's cell array, one column
    out = np.empty((len(values), 1), object)
    out[:, 0] = values
    return out


def _aircraft(folder, sources, train, test, rng):
    ids = iter(rng.sample(range(10**5, 10**7), len(train) + len(test)))
    train, test = ([(f"data/images/{next(ids):07}.jpg", y) for y in part] for part in (train, test))
    cut = len(train) // 2
    for split, rows in dict(train=train[:cut], val=train[cut:], trainval=train, test=test).items():
        _write(folder/"data"/f"images_variant_{split}.txt", (f"{Path(p).stem} {sources[y]}" for p, y in rows))
        _write(folder/"data"/f"images_family_{split}.txt", (f"{Path(p).stem} Boeing 707" for p, _ in rows))
    _write(folder/"data"/"variants.txt", sources)
    _write(folder/"data"/"families.txt", ["Boeing 707"])
    return train, test


def _caltech101(folder, sources, train, test, rng):
    train, test = _numbered((train, test), lambda y, i: f"101_ObjectCategories/{sources[y]}/image_{i:04}.jpg")
    for source in (*sources, "BACKGROUND_Google"):
        (folder/"101_ObjectCategories"/source).mkdir(parents=True)
        (folder/"101_ObjectCategories"/source/STRAY[0]).touch()
    for i in range(1, 468): (folder/"101_ObjectCategories"/"BACKGROUND_Google"/f"image_{i:04}.jpg").touch()
    (folder/"101_ObjectCategories"/"BACKGROUND_Google"/"tmp").touch()
    (folder/"101_ObjectCategories"/".DS_Store").touch()
    (folder/"Annotations").mkdir()
    return train, test


def _cars(folder, sources, train, test, rng):
    kinds = [(n, object) for n in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    def row(i, y): return (30, 52, 246, 147, np.uint8(y + 1), f"{i:05}.jpg")
    def rows(labels): return np.array([[row(i, y) for i, y in enumerate(labels, 1)]], kinds)
    def listed(split, labels): return [(f"cars_{split}/{i:05}.jpg", y) for i, y in enumerate(labels, 1)]
    without_class = rows(test)[[n for n, _ in kinds if n != "class"]].astype(kinds[:4] + kinds[5:])
    _savemat(folder/"devkit"/"cars_train_annos.mat", {"annotations": rows(train)})
    _savemat(folder/"cars_test_annos_withlabels.mat", {"annotations": rows(test)})
    _savemat(folder/"devkit"/"cars_test_annos.mat", {"annotations": without_class})
    _savemat(folder/"devkit"/"cars_meta.mat", {"class_names": _cells(sources).T})
    _write(folder/"devkit"/"train_perfect_preds.txt", [y + 1 for y in train])
    return listed("train", train), listed("test", test)


def _cub(folder, sources, train, test, rng):
    train, test = _numbered((train, test), lambda y, i: f"{sources[y]}/{sources[y][4:]}_{i:04}_{796000 + i}.jpg")
    rows = sorted([(y, p, 1) for p, y in train] + [(y, p, 0) for p, y in test])
    _write(folder/"classes.txt", (f"{i} {s}" for i, s in enumerate(sources, 1)))
    _write(folder/"images.txt", (f"{i} {p}" for i, (_, p, _) in enumerate(rows, 1)))
    _write(folder/"image_class_labels.txt", (f"{i} {y + 1}" for i, (y, _, _) in enumerate(rows, 1)))
    _write(folder/"train_test_split.txt", (f"{i} {t}" for i, (_, _, t) in enumerate(rows, 1)))
    _write(folder/"attributes"/"class_attribute_labels_continuous.txt", ["0.0 1.0"])
    _write(folder.parent/"attributes.txt", ["1 has_bill_shape::curved_(up_or_down)"])
    return tuple([(f"images/{p}", y) for p, y in part] for part in (train, test))


def _dtd(folder, sources, train, test, rng):
    train, test = _numbered((train, test), lambda y, i: f"{sources[y]}/{sources[y]}_{i:04}.jpg")
    cut = len(train) // 2
    first = dict(train=train[:cut], val=train[cut:], test=test)
    second = dict(train=test, val=train[cut:], test=train[:cut])
    for partition, parts in ((1, first), (2, second)):
        for split, rows in parts.items(): _write(folder/"labels"/f"{split}{partition}.txt", (p for p, _ in rows))
    _write(folder/"labels"/"labels_joint_anno.txt", ["banded/banded_0001.jpg banded"])
    (folder/"imdb").mkdir()
    return tuple([(f"images/{p}", y) for p, y in part] for part in (train, test))


def _dogs(folder, sources, train, test, rng):
    parts = _numbered((train, test), lambda y, i: f"{sources[y]}/{sources[y].partition('-')[0]}_{i * 7}.jpg")
    for split, rows in zip(("train", "test", "file"), (*parts, sum(parts, []))):
        names = [p for p, _ in rows]
        labels = np.array([[y + 1] for _, y in rows], np.uint8)
        annotations = _cells([n[:-4] for n in names])
        lists = {"file_list": _cells(names), "annotation_list": annotations, "labels": labels}
        _savemat(folder/f"{split}_list.mat", lists)
    return tuple([(f"Images/{p}", y) for p, y in part] for part in parts)


def _flowers(folder, sources, train, test, rng):
    labels = [*train, *test]
    ids = rng.sample(range(1, len(labels) + 1), len(labels))
    in_order = np.empty((1, len(labels)), np.uint8)
    in_order[0, np.array(ids) - 1] = np.array(labels) + 1
    cut, end = len(train) // 2, len(train)
    _savemat(folder/"imagelabels.mat", {"labels": in_order})
    parts = dict(trnid=ids[:cut], valid=ids[cut:end], tstid=ids[end:])
    _savemat(folder/"setid.mat", {n: np.array([part], np.uint16) for n, part in parts.items()})
    rows = [(f"jpg/image_{i:05}.jpg", y) for i, y in zip(ids, labels)]
    return rows[:end], rows[end:]


def _food(folder, sources, train, test, rng):
    train, test = _numbered((train, test), lambda y, i: f"{sources[y]}/{1000 + 3 * i}")
    for split, rows in (("train", train), ("test", test)):
        _write(folder/"meta"/f"{split}.txt", (p for p, _ in rows))
        by_class = {s: [] for s in sources}
        for p, y in rows: by_class[sources[y]].append(p)
        (folder/"meta"/f"{split}.json").write_text(json.dumps(by_class))
    _write(folder/"meta"/"classes.txt", sources)
    return tuple([(f"images/{p}.jpg", y) for p, y in part] for part in (train, test))


def _pets(folder, sources, train, test, rng):
    train, test = _numbered((train, test), lambda y, i: f"{sources[y]}_{i}")
    def line(p, y): return f"{p} {y + 1} {1 if sources[y][0].isupper() else 2} {y % 12 + 1}"
    for split, rows in (("trainval", train), ("test", test)):
        _write(folder/"annotations"/f"{split}.txt", (line(p, y) for p, y in rows))
        (folder/"annotations"/f"._{split}.txt").write_bytes(b"\0\5\x16\7")
    lines = [line(p, y) for p, y in [*train, *test]]
    _write(folder/"annotations"/"list.txt", ["#Image CLASS-ID SPECIES BREED ID", *lines])
    for name in ("Abyssinian_104.jpg", *(f"Abyssinian_{i}.mat" for i in range(100, 103))):
        _write(folder/"images"/name, [])
    return tuple([(f"images/{p}.jpg", y) for p, y in part] for part in (train, test))


def _sun397(folder, sources, train, test, rng):
    train, test = _numbered((train, test), lambda y, i: f"{sources[y]}/sun_a{i:03}{y:03}.jpg")
    _write(folder/"ClassName.txt", sources)
    for partition, (a, b) in ((1, (train, test)), (2, (test, train))):
        _write(folder/f"Training_{partition:02}.txt", (p for p, _ in a))
        _write(folder/f"Testing_{partition:02}.txt", (p for p, _ in b))
    _write(folder/sources[0][1:]/"sun_aaaaaaaaaaaaaaaa.jpg", [])  # in neither part, as most of the 108,754
    return tuple([(p[1:], y) for p, y in part] for part in (train, test))


WRITERS = {
    "aircraft": _aircraft, "caltech101": _caltech101, "cars": _cars, "cub": _cub, "dtd": _dtd, "dogs": _dogs,
    "flowers": _flowers, "food": _food, "pets": _pets, "sun397": _sun397}
