"""The ten archives: official counts, official splits, the same order everywhere; the network is not trusted."""
import functools
import hashlib
import http.server
import io
import os
import random
import re
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.io import loadmat, savemat

from archives_fixture import write_archive
from bridgexfer.data.archives import ARCHIVES, CALTECH_SHOTS, File, LISTERS, archive_table, archive_text, class_names
from bridgexfer.data.archives import class_sources, download, extract, fetch, find_archive, how_to_get, list_archive

ANT = [3, 6, 8, 10, 12, 13, 18, 24, 32, 34, 37, 42] # the images of `ant` that the draw leaves for test, if there are 42
PUBLISHED = { # classes, train, test
    "aircraft": (100, 6667, 3333), "caltech101": (101, 3030, 5647), "cars": (196, 8144, 8041), "cub": (200, 5994, 5794),
    "dtd": (47, 3760, 1880), "dogs": (120, 12000, 8580), "flowers": (102, 2040, 6149), "food": (101, 75750, 25250),
    "pets": (37, 3680, 3669), "sun397": (397, 19850, 19850)}
MEAN_PER_CLASS = {"aircraft", "caltech101", "flowers", "pets"}


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    "All ten at full size: what was written, by name, and the data root."
    root = tmp_path_factory.mktemp("full")
    return {name: write_archive(name, root) for name in ARCHIVES}, root


@pytest.fixture
def small(tmp_path):
    "Writes one archive with few images in each class, as empty files."
    return lambda name, per_class=(2, 2), images="empty": write_archive(name, tmp_path, images, per_class)


def rewrite(path, change):
    "Change the lines of a file."
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


# ---- listing

@pytest.mark.parametrize("name", PUBLISHED)
def test_every_archive_is_listed_as_published(full, name):
    written, root = full[0][name], full[1]
    listing = list_archive(name, root, check_files=name == "caltech101")
    assert (len(listing.names), len(listing.train), len(listing.test)) == PUBLISHED[name]
    for part in (listing.train, listing.test):
        assert {y for _, y in part} == set(range(PUBLISHED[name][0])) and list(part) == sorted(part)
    assert not {p for p, _ in listing.train} & {p for p, _ in listing.test}
    if name == "caltech101": assert set(listing.train + listing.test) == written.train | written.test
    else: assert (set(listing.train), set(listing.test)) == (written.train, written.test)
    assert listing.names == class_names(name) and find_archive(name, root, check_files=False).found


def test_metrics_are_the_papers():
    assert {n for n, a in ARCHIVES.items() if a.metric == "mean_per_class"} == MEAN_PER_CLASS
    assert {a.metric for a in ARCHIVES.values()} == {"top1", "mean_per_class"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_image_is_looked_for_and_the_order_of_the_disk_does_not_matter(small, tmp_path, monkeypatch, name):
    written = small(name)
    before = list_archive(written.archive, tmp_path)
    real, scan, iterdir = os.listdir, os.scandir, Path.iterdir
    calls = []

    class Shuffled(list):
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def close(self): pass

    def shuffled(entries):
        calls.append(entries := list(entries))
        random.Random(len(calls)).shuffle(entries)
        return entries

    monkeypatch.setattr(os, "listdir", lambda *a: shuffled(real(*a)))
    monkeypatch.setattr(os, "scandir", lambda *a: Shuffled(shuffled(scan(*a))))
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(shuffled(iterdir(self))))
    after = list_archive(written.archive, tmp_path)
    assert calls and before == after
    gone = tmp_path/after.test[-1][0]
    gone.unlink()
    if name == "caltech101": # listed from its files: one less is a wrong count
        with pytest.raises(ValueError, match="201 images for test of caltech101, officially 202"):
            list_archive(written.archive, tmp_path)
    else:
        said = rf"1 of the \d+ images of {name} are missing, the first is {re.escape(str(gone))}"
        with pytest.raises(FileNotFoundError, match=said):
            list_archive(written.archive, tmp_path)
        assert list_archive(written.archive, tmp_path, check_files=False) == before


def test_caltechs_draw_never_changes_and_leaves_the_background_out(full, small, tmp_path):
    listing = list_archive("caltech101", full[1])
    assert not [p for p, _ in listing.train + listing.test if "BACKGROUND" in p]
    assert {sum(y == c for _, y in listing.train) for c in range(101)} == {CALTECH_SHOTS}
    written = small("caltech101", (30, 1))
    images = tmp_path/"caltech101"/"101_ObjectCategories"
    drawn = list_archive(written.archive, tmp_path).train
    (images/"BACKGROUND_Google").rename(images/"BACKGROUND")
    with pytest.raises(ValueError, match="101 official classes, but BACKGROUND is"):
        list_archive(written.archive, tmp_path)
    (images/"BACKGROUND").rename(tmp_path/"elsewhere")
    assert list_archive(written.archive, tmp_path).train == drawn
    (images/"ant").rename(tmp_path/"ant")
    with pytest.raises(ValueError, match="101 official classes, but ant is"): list_archive(written.archive, tmp_path)


def test_caltechs_draw_is_pinned(tmp_path):
    (ant := tmp_path/"101_ObjectCategories"/"ant").mkdir(parents=True)
    for i in range(1, 43): (ant/f"image_{i:04}.jpg").touch()
    train, test = LISTERS["caltech101"](tmp_path, {"ant": 0})
    assert (len(train), len(test)) == (30, 12)
    assert sorted(int(p[-8:-4]) for p, _ in test) == ANT


def test_dtds_test_is_test(full, small, tmp_path):
    listing = list_archive("dtd", full[1], check_files=False)
    def lines(root, name):
        text = (root/"dtd/dtd/labels"/f"{name}.txt").read_text()
        return {f"dtd/dtd/images/{line}" for line in text.split()}
    assert {p for p, _ in listing.test} == lines(full[1], "test1")
    assert {p for p, _ in listing.train} == lines(full[1], "train1") | lines(full[1], "val1")
    written, labels = small("dtd"), tmp_path/"dtd"/"dtd"/"labels"
    (labels/"test1.txt").write_text((labels/"train1.txt").read_text() + (labels/"val1.txt").read_text())
    with pytest.raises(ValueError, match="94 images of dtd are in train and in test"):
        list_archive(written.archive, tmp_path)
    with pytest.raises(ValueError, match="train1.txt and labels/val1.txt: 94 images for train of dtd, officially 3760"):
        list_archive("dtd", tmp_path)


def test_flowers_large_part_is_test(full, small, tmp_path):
    ids = loadmat(full[1]/"flowers-102"/"setid.mat", squeeze_me=True)
    listing = list_archive("flowers", full[1], check_files=False)
    assert {int(p[-9:-4]) for p, _ in listing.test} == set(ids["tstid"])
    assert len(ids["trnid"]) == len(ids["valid"]) == 1020
    written, path = small("flowers", (2, 6)), tmp_path/"flowers-102"/"setid.mat"
    ids = {k: v for k, v in loadmat(path).items() if not k.startswith("_")}
    savemat(path, {"trnid": ids["tstid"], "valid": ids["valid"], "tstid": ids["trnid"]})
    with pytest.raises(ValueError, match=r"setid.mat: 714 images for train of flowers, officially 204"):
        list_archive(written.archive, tmp_path)


def test_cub_has_all_classes_in_both_parts(small, tmp_path):
    written, folder = small("cub"), tmp_path/"CUB_200_2011"
    label = dict(line.split() for line in (folder/"image_class_labels.txt").read_text().splitlines())
    rewrite(folder/"train_test_split.txt", lambda lines: [f"{i} {int(int(label[i]) <= 100)}" for i in label])
    with pytest.raises(ValueError, match="train of cub has no image of 100 classes, the first is '101"):
        list_archive(written.archive, tmp_path)


def test_sun397_is_one_partition_with_nested_names(full, small, tmp_path):
    listing = list_archive("sun397", full[1], check_files=False)
    assert len(listing.train) + len(listing.test) == 39700
    church = [p for p, y in listing.test if y == class_sources("sun397").index("/c/church/indoor")]
    assert len(church) == 50 and all(p.startswith("SUN397/c/church/indoor/sun_") for p in church)
    assert "SUN397/a/abbey/sun_aaaaaaaaaaaaaaaa.jpg" not in {p for p, _ in listing.train + listing.test}
    written, folder = small("sun397", images="none"), tmp_path/"SUN397"
    expected = list_archive(written.archive, tmp_path, check_files=False)
    (folder/"Partitions").mkdir()
    for p in [*folder.glob("*_0?.txt"), folder/"ClassName.txt"]: p.rename(folder/"Partitions"/p.name)
    assert list_archive(written.archive, tmp_path, check_files=False) == expected
    rewrite(folder/"Partitions"/"Testing_01.txt", lambda lines: [*lines, "/a/abbey/sun_aaaaaaaaaaaaaaaa.jpg"])
    with pytest.raises(ValueError, match="Testing_01.txt: 795 images for test of sun397, officially 794"):
        list_archive(written.archive, tmp_path, check_files=False)


def test_names_with_a_slash_are_names(small, tmp_path):
    written = small("aircraft")
    listing = list_archive(written.archive, tmp_path)
    assert {"F/A-18", "F-16A/B"} <= set(class_sources("aircraft"))
    for part in (listing.train, listing.test):
        assert sum(y == class_sources("aircraft").index("F/A-18") for _, y in part) == 2
    assert all(re.fullmatch(r"fgvc-aircraft-2013b/data/images/\d{7}\.jpg", p) for p, _ in listing.train + listing.test)


# ---- damage

ANNOTATIONS = {
    "aircraft": ("data/variants.txt", "data/images_variant_trainval.txt", "data/images_variant_test.txt"),
    "caltech101": ("101_ObjectCategories",),
    "cars": ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
    "cub": ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"),
    "dtd": ("labels/train1.txt", "labels/val1.txt", "labels/test1.txt"),
    "dogs": ("train_list.mat", "test_list.mat"),
    "flowers": ("imagelabels.mat", "setid.mat"),
    "food": ("meta/train.txt", "meta/test.txt"),
    "pets": ("annotations/trainval.txt", "annotations/test.txt"),
    "sun397": ("ClassName.txt", "Training_01.txt", "Testing_01.txt")}


ADVICE = "(extract the official archive again|`make datasets|its makers)" # the last two where a file never arrived


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_each_missing_or_damaged_annotation_file_is_named(small, tmp_path, name):
    written = small(name, images="none")
    def listed(): return list_archive(written.archive, tmp_path, check_files=False)
    listed()
    for file in ANNOTATIONS[name]:
        path = tmp_path/ARCHIVES[name].folder/file
        path.rename(tmp_path/"aside")
        with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(path))} is missing: {ADVICE}"): listed()
        if name == "caltech101": break
        whole = (tmp_path/"aside").read_bytes()
        cut_off = whole[:len(whole) * 2 // 3]
        path.write_bytes(cut_off if path.suffix == ".mat" else b"\xff\xfe\0" + whole) # or not text
        said = rf"{re.escape(str(path))} (cannot be read|is not a text file|holds no|calls class)"
        with pytest.raises(ValueError, match=said): listed()
        path.write_bytes(whole)
        (tmp_path/"aside").unlink()
        listed()


@pytest.mark.parametrize("name, file", [
    ("aircraft", "data/images_variant_test.txt"), ("dtd", "labels/val1.txt"), ("food", "meta/train.txt"),
    ("pets", "annotations/test.txt"), ("sun397", "Training_01.txt")])
def test_a_line_too_few_or_twice_is_noticed(full, tmp_path, name, file):
    archive = ARCHIVES[name]
    for p in (full[1]/archive.folder).rglob("*.txt"):
        if "family" in p.name: continue
        (to := tmp_path/p.relative_to(full[1])).parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(p.read_bytes())
    split = "test" if "test" in file.lower() else "train"
    count = getattr(archive, split)
    rewrite(tmp_path/archive.folder/file, lambda lines: lines[:-1])
    with pytest.raises(ValueError, match=rf"{count - 1} images for {split} of {name}, officially {count}: extract"):
        list_archive(name, tmp_path, check_files=False)
    rewrite(tmp_path/archive.folder/file, lambda lines: [*lines, lines[0]])
    with pytest.raises(ValueError, match=f"{split} of {name} names an image twice"):
        list_archive(name, tmp_path, check_files=False)


def first_line(old, new):
    return lambda path: rewrite(path, lambda lines: [re.sub(old, new, lines[0]), *lines[1:]])


def matlab(name, change):
    def edit(path):
        values = {k: v for k, v in loadmat(path).items() if not k.startswith("_")}
        change(values[name])
        savemat(path, values)
    return edit


def set_first(value):
    def change(a): a.flat[0] = value
    return change


def set_class(value):
    def change(a): a["class"].flat[0] = value
    return change


def edited(change): return lambda path: rewrite(path, change)


@pytest.mark.parametrize("name, file, damage, message", [
    ("aircraft", "data/images_variant_test.txt", first_line(" .*", " Concorde"), "'Concorde', which is none of the"),
    ("aircraft", "data/images_variant_test.txt", first_line(" .*", ""), "where two words were expected"),
    ("aircraft", "data/images_variant_test.txt", first_line(r"^\d+", "../../x"), "leaves the archive's folder"),
    ("aircraft", "data/variants.txt", edited(lambda all: all[1::-1] + all[2:]), "0 '727-200', expected '707-320'"),
    ("cub", "image_class_labels.txt", first_line(" .*", " 201"), "with number 201"),
    ("cub", "image_class_labels.txt", first_line(" .*", " 2"), "'001.Black_footed_Albatross' with number 2"),
    ("cub", "images.txt", edited(lambda all: all[1:]), "do not list the same images"),
    ("cub", "classes.txt", edited(lambda all: all[:-1]), "calls class 199 'nothing'"),
    ("dtd", "labels/test1.txt", first_line("^[a-z-]+/", "plain/"), "a class 'plain'"),
    ("food", "meta/test.txt", first_line("^[a-z_]+/", "gruel/"), "a class 'gruel'"),
    ("pets", "annotations/trainval.txt", first_line(r" \d+", " 38"), "with number 38"),
    ("pets", "annotations/trainval.txt", first_line(r" \d+", " 0"), "with number 0"),
    ("sun397", "Testing_01.txt", first_line("^/./", "/q/"), "a class '/q/"),
    ("cars", "devkit/cars_train_annos.mat", matlab("annotations", set_class(197)), "a class with number 197"),
    ("dogs", "test_list.mat", matlab("labels", set_first(121)), "with number 121"),
    ("flowers", "imagelabels.mat", matlab("labels", set_first(0)), "a class with number 0"),
    ("flowers", "imagelabels.mat", matlab("labels", set_first(103)), "a class with number 103"),
    ("flowers", "setid.mat", matlab("tstid", set_first(409)), "names images 1 to 409"),
    ("flowers", "setid.mat", matlab("tstid", set_first(0)), "names images 0 to"),
])
def test_labels_out_of_range_are_named(small, tmp_path, name, file, damage, message):
    written = small(name, images="none")
    list_archive(written.archive, tmp_path, check_files=False)
    path = tmp_path/ARCHIVES[name].folder/file
    damage(path)
    with pytest.raises(ValueError, match=message) as e: list_archive(written.archive, tmp_path, check_files=False)
    assert str(tmp_path/ARCHIVES[name].folder) in str(e.value) and path.name in str(e.value)
    assert "extract the official archive again" in str(e.value)


def test_cars_test_file_without_labels_is_told_apart(small, tmp_path):
    written, folder = small("cars", images="none"), tmp_path/"stanford_cars"
    (folder/"devkit"/"cars_test_annos.mat").replace(folder/"cars_test_annos_withlabels.mat")
    with pytest.raises(ValueError, match="holds no labels: take the official cars_test_annos_withlabels.mat"):
        list_archive(written.archive, tmp_path, check_files=False)


def test_an_image_in_both_parts_is_noticed(small, tmp_path):
    written = small("food", images="none")
    meta = tmp_path/"food-101"/"meta"
    first = (meta/"train.txt").read_text().splitlines()[0]
    listed = (meta/"test.txt").read_text().splitlines()
    same = next(line for line in listed if line.split("/")[0] == first.split("/")[0])
    rewrite(meta/"test.txt", lambda lines: [first if line == same else line for line in lines])
    with pytest.raises(ValueError, match="1 images of food are in train and in test"):
        list_archive(written.archive, tmp_path, check_files=False)


# ---- what is there

def test_after_a_failed_download_the_advice_is_to_fetch_again(tmp_path):
    folder = tmp_path/ARCHIVES["pets"].folder
    folder.mkdir(parents=True)
    (tmp_path/f"{ARCHIVES['pets'].files[0].path}.part").write_bytes(b"half")
    todo = find_archive("pets", tmp_path).todo
    assert "make datasets FETCH=pets" in todo and "extract the official archive again" not in todo


def test_finding_never_raises_and_says_what_to_do(small, tmp_path):
    written = small("dtd", images="tiny")
    assert find_archive(written.archive, tmp_path).found
    status = find_archive("dtd", tmp_path)
    assert not status.found and "officially 3760" in status.todo
    rows = archive_table(tmp_path)
    assert [r["dataset"] for r in rows] == sorted(PUBLISHED) and not any(r["found"] == "yes" for r in rows)
    assert all(r["todo"] for r in rows)
    text = archive_text(tmp_path)
    assert all(f"\n{name}: " in text for name in PUBLISHED) and "download('pets'" in text
    for f in ARCHIVES["cars"].files: assert f.name in text and f.checksum in text
    with pytest.raises(ValueError, match="choose aircraft, caltech101"): find_archive("mnist", tmp_path)


def test_the_table_says_yes_to_what_is_complete(full):
    rows = {r["dataset"]: r for r in archive_table(full[1], check_files=False)}
    assert {r["found"] for r in rows.values()} == {"yes"} and rows["flowers"]["test"] == 6149
    assert archive_text(full[1], check_files=False).count("\n") == 10


def test_the_module_is_light():
    heavy = {"torch", "torchvision", "numpy", "scipy", "pandas", "PIL"}
    code = f"import sys, bridgexfer.data.archives; print(sorted({heavy} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[]", done.stderr


# ---- extracting

def tar_entry(name, kind, link=""):
    "A member of a tar that is no plain file."
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    return info


def tar(path, *members):
    "A tar of members of `tar_entry`, or of (name, bytes)."
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as t:
        for member in members:
            special = isinstance(member, tarfile.TarInfo)
            info = member if special else tarfile.TarInfo(member[0])
            content = b"" if special else member[1]
            info.size = len(content)
            info.mode = 0o4755
            t.addfile(info, io.BytesIO(content))
    return path


def zipped(path, *members):
    "A zip of (name or ZipInfo, bytes)."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members: z.writestr(name, content)
    return path


def zip_link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


BAD_NAMES = {"absolute": "/evil", "up": "../evil", "deep": "a/../../evil", "backslash": "..\\evil", "drive": "C:/evil"}
BAD_TARS = {
    **{kind: [(name, b"x")] for kind, name in BAD_NAMES.items()},
    "symlink": [tar_entry("a", tarfile.SYMTYPE, "../"), ("a/evil", b"x")],
    "inner symlink": [tar_entry("a", tarfile.SYMTYPE, "good")],
    "hardlink": [tar_entry("a", tarfile.LNKTYPE, "../outside")],
    "fifo": [tar_entry("a", tarfile.FIFOTYPE)],
    "device": [tar_entry("a", tarfile.CHRTYPE)]}
BAD_ZIPS = {
    **{kind: [(name, b"x")] for kind, name in BAD_NAMES.items()},
    "symlink": [(zip_link("a"), b"../"), ("a/evil", b"x")]}
HOSTILE = {f"tar {kind}": (tar, "a.tar", members) for kind, members in BAD_TARS.items()}
HOSTILE |= {f"zip {kind}": (zipped, "a.zip", members) for kind, members in BAD_ZIPS.items()}


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_lands_outside_its_folder(tmp_path, what):
    make, file, members = HOSTILE[what]
    (tmp_path/"outside").write_text("mine")
    before = Path("/evil").exists()
    archive = make(tmp_path/file, ("good", b"xx"), *members)
    with pytest.raises(ValueError, match="leaves its folder|is neither a plain file nor a folder"):
        extract(archive, tmp_path/"out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted([file, "out", "outside"])
    assert (tmp_path/"outside").stat().st_nlink == 1
    assert Path("/evil").exists() == before


@pytest.mark.parametrize("make, file", [(tar, "a.tgz"), (zipped, "a.zip")])
def test_bombs_are_stopped_and_leave_nothing(tmp_path, make, file):
    archive = make(tmp_path/file, ("a", bytes(10**6)), ("b", bytes(10**6)))
    assert archive.stat().st_size < 10**4
    with pytest.raises(ValueError, match="more than 1000000 files or 1999999 bytes"):
        extract(archive, tmp_path/"out", limit_bytes=2 * 10**6 - 1)
    with pytest.raises(ValueError, match="more than 1 files"): extract(archive, tmp_path/"out", limit_files=1)
    assert os.listdir(tmp_path/"out") == []
    assert extract(archive, tmp_path/"out", limit_bytes=2 * 10**6, limit_files=2) == tmp_path/"out"
    assert sorted(os.listdir(tmp_path/"out")) == ["a", "b"]


def test_a_member_larger_than_it_claims_is_not_written(tmp_path):
    "In a tar, a sparse member's pieces may be larger than the member; in a zip, the header may say what it likes."
    sparse = tarfile.TarInfo("a")
    sparse.size = 10**6
    sparse.pax_headers = {"GNU.sparse.map": "0,1000000", "GNU.sparse.size": "10"}
    with tarfile.open(tmp_path/"a.tgz", "w:gz", format=tarfile.PAX_FORMAT) as t:
        t.addfile(sparse, io.BytesIO(bytes(10**6)))
    with tarfile.open(tmp_path/"a.tgz") as t: assert t.next().size == 10
    with pytest.raises(ValueError, match="neither a plain file nor a folder"): extract(tmp_path/"a.tgz", tmp_path/"out")
    archive = zipped(tmp_path/"a.zip", ("a", bytes(10**6)))
    archive.write_bytes(archive.read_bytes().replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with zipfile.ZipFile(archive) as z: assert z.infolist()[0].file_size == 10
    with pytest.raises(ValueError, match="a.zip is damaged"): extract(archive, tmp_path/"out", limit_bytes=10)
    assert os.listdir(tmp_path/"out") == []


def test_a_python_that_cannot_extract_safely_does_not(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    archive = tar(tmp_path/"a.tar", ("a", b"a"))
    with pytest.raises(OSError, match="3.11.4 or newer.*make env"): extract(archive, tmp_path/"out")
    assert os.listdir(tmp_path/"out") == []


def test_empty_members_count_too(tmp_path):
    archive = tar(tmp_path/"a.tar", *(tar_entry(f"d{i}", tarfile.DIRTYPE) for i in range(3)), ("empty", b""))
    with pytest.raises(ValueError, match="more than 3 files"): extract(archive, tmp_path/"out", limit_files=3)
    assert len(os.listdir(extract(archive, tmp_path/"out", limit_files=4))) == 4


def test_extracting_joins_folders_and_ignores_modes(tmp_path):
    (tmp_path/"out"/"a").mkdir(parents=True)
    (tmp_path/"out"/"a"/"old").write_text("old")
    extract(tar(tmp_path/"a.tgz", ("./a/new", b"new"), tar_entry("a/sub", tarfile.DIRTYPE)), tmp_path/"out")
    assert sorted(os.listdir(tmp_path/"out"/"a")) == ["new", "old", "sub"]
    assert not (tmp_path/"out"/"a"/"new").stat().st_mode & 0o4111


@pytest.mark.parametrize("make, file", [(tar, "a.tgz"), (tar, "a.tar"), (zipped, "a.zip")])
def test_cut_off_archives_are_named(tmp_path, make, file):
    archive = make(tmp_path/file, ("good", b"good"), ("a", random.Random(0).randbytes(10**5)))
    archive.write_bytes(archive.read_bytes()[:10**5 // 2])
    with pytest.raises(ValueError, match=f"{file} is damaged"): extract(archive, tmp_path/"out")
    assert os.listdir(tmp_path/"out") == []


# ---- downloading

class Server(http.server.BaseHTTPRequestHandler):
    "Serves one file; `faults` are sizes after which it hangs up, `ranges` says whether it can resume."
    def do_GET(self):
        s = self.server
        s.asked.append(self.headers.get("Range"))
        if self.path != "/file.tgz": return self.send_error(404)
        start = int(self.headers["Range"][6:-1]) if s.ranges and self.headers.get("Range") else 0
        if start >= len(s.content): return self.send_error(416)
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(s.content) - 1}/{len(s.content)}")
        self.send_header("Content-Length", str(len(s.content) - start))
        self.end_headers()
        cut = s.faults.pop(0) if s.faults else None
        self.wfile.write(s.content[start:][:cut])

    def log_message(self, *_): pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    s.asked, s.faults, s.ranges, s.content = [], [], True, random.Random(0).randbytes(10**6)
    s.url = f"http://127.0.0.1:{s.server_port}/file.tgz"
    thread = threading.Thread(target=functools.partial(s.serve_forever, poll_interval=0.01))
    thread.start()
    yield s
    s.shutdown()
    thread.join()
    s.server_close()


def facts(content): return {"size": len(content), "checksum": f"md5:{hashlib.md5(content).hexdigest()}"}


def get(server, path, **more): return fetch(server.url, path, **{**facts(server.content), "wait": 0., **more})


def test_a_broken_download_is_resumed(server, tmp_path):
    server.faults = [300_000, 200_000]
    assert get(server, tmp_path/"x"/"file.tgz").read_bytes() == server.content
    assert server.asked == [None, "bytes=300000-", "bytes=500000-"] and os.listdir(tmp_path/"x") == ["file.tgz"]


def test_the_next_call_resumes_too(server, tmp_path):
    server.faults = [300_000, 0]
    said = r"broke off 2 times .*300000 of 1000000.*run the same command again, and it resumes"
    with pytest.raises(ConnectionError, match=said):
        get(server, tmp_path/"file.tgz", tries=2)
    assert os.listdir(tmp_path) == ["file.tgz.part"]
    assert get(server, tmp_path/"file.tgz", tries=1).read_bytes() == server.content
    assert server.asked[-1] == "bytes=300000-"


def test_a_source_that_cannot_resume_sends_all_again(server, tmp_path):
    server.faults, server.ranges = [300_000], False
    assert get(server, tmp_path/"file.tgz").read_bytes() == server.content and server.asked == [None, "bytes=300000-"]


def test_a_wrong_checksum_or_size_is_never_kept(server, tmp_path):
    with pytest.raises(ValueError, match="has the sha256 .*, the official file 00"):
        get(server, tmp_path/"file.tgz", checksum="sha256:00")
    assert os.listdir(tmp_path) == [] and len(server.asked) == 1
    with pytest.raises(ValueError, match="has 1000000 bytes, the official file 999: the source has changed"):
        get(server, tmp_path/"file.tgz", size=999)
    assert os.listdir(tmp_path) == []
    (tmp_path/"file.tgz.part").write_bytes(b"?" * 1000)  # of another file
    with pytest.raises(ValueError, match="has the md5"): get(server, tmp_path/"file.tgz")
    assert get(server, tmp_path/"file.tgz").read_bytes() == server.content


def test_a_gone_source_is_not_tried_again(server, tmp_path):
    server.url = server.url.replace("file", "gone")
    with pytest.raises(FileNotFoundError, match=r"is gone \(404 .*find a copy with md5:.* and put it at"):
        get(server, tmp_path/"file.tgz")
    assert len(server.asked) == 1


def test_a_dataset_is_downloaded_extracted_and_left_alone(server, tmp_path):
    inner = tar(tmp_path/"inner.tgz", ("101_ObjectCategories/ant/image_0001.jpg", b"ant"))
    members = ("caltech-101/inner.tgz", inner.read_bytes()), ("__MACOSX/._x", b"junk")
    server.content = zipped(tmp_path/"outer.zip", *members).read_bytes()
    file = File("file.tgz", "caltech101", **facts(server.content), holds=("caltech101/101_ObjectCategories",),
                url=server.url, inner="caltech-101/inner.tgz")
    plain = replace(file, name="labels.mat", holds=("caltech101/labels.mat",), inner="")
    archive = replace(ARCHIVES["caltech101"], files=(file, plain))
    root = tmp_path/"data"
    assert download(archive, root, wait=0.) == root/"caltech101"
    assert sorted(os.listdir(root/"caltech101")) == ["101_ObjectCategories", "file.tgz", "labels.mat"]
    assert (root/"caltech101/101_ObjectCategories/ant/image_0001.jpg").read_bytes() == b"ant"
    (root/"caltech101/file.tgz").unlink()
    download(archive, root)
    assert len(server.asked) == 2
    (root/"caltech101/labels.mat").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="labels.mat has 7 bytes, the official file"): download(archive, root)
    with pytest.raises(ValueError, match="0002.jpg is not there"):
        download(replace(archive, files=(replace(file, holds=("caltech101/0002.jpg",)),)), root)


def test_a_gone_archive_says_what_to_find_and_takes_it(server, tmp_path):
    image = tar(tmp_path/"a.tgz", ("cars_train/00001.jpg", b"car")).read_bytes()
    server.content = tar(tmp_path/"b.tgz", ("devkit/cars_meta.mat", b"mat")).read_bytes()
    gone = replace(ARCHIVES["cars"].files[0], **facts(image))
    kept = replace(ARCHIVES["cars"].files[2], **facts(server.content), url=server.url)
    archive = replace(ARCHIVES["cars"], files=(gone, kept))
    root = tmp_path/"data"
    with pytest.raises(FileNotFoundError) as e: download(archive, root)
    for part in ("cars_train.tgz", f"{len(image)}B", gone.checksum, str(root/"stanford_cars"), archive.homepage):
        assert part in str(e.value)
    assert (root/"stanford_cars/devkit/cars_meta.mat").exists()  # what could be had is there
    (root/"stanford_cars/cars_train.tgz").write_bytes(image[:-1] + b"?")
    with pytest.raises(ValueError, match="cars_train.tgz has the md5"): download(archive, root)
    (root/"stanford_cars/cars_train.tgz").write_bytes(image)
    download(archive, root)
    assert (root/"stanford_cars/cars_train/00001.jpg").read_bytes() == b"car"


def test_the_facts_of_the_files_are_well_formed():
    files = [f for a in ARCHIVES.values() for f in a.files]
    assert all(re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", f.checksum) and f.size > 0 for f in files)
    assert len({f.checksum for f in files}) == len(files)
    assert {a.name for a in ARCHIVES.values() if any(not f.url for f in a.files)} == {"cars", "sun397"}
    assert all(h.startswith(a.folder) for a in ARCHIVES.values() for f in a.files for h in f.holds)
    assert "download(" in how_to_get(ARCHIVES["food"], "data")
