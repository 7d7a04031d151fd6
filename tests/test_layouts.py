"""Layouts: one dataset however it arrives, what is no part of it, and memory that does not grow with its pixels."""
import csv
import hashlib
import io
import json
import shutil
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridgexfer import layouts
from bridgexfer.cli import main
from bridgexfer.data.check import check_folder
from bridgexfer.data.registry import dataset_info, load_dataset, train_size
from bridgexfer.datasets import FOLLOW, folder_files, prompt_names
from bridgexfer.imported_sets import find_items

CLASSES = ("owl", "red fox")
RNG = np.random.default_rng(0)
FILES = {c: [RNG.integers(0, 256, (33, 40, 3), dtype=np.uint8) for _ in range(20)] for c in CLASSES}


def png(pixels):
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def images(): # 40 of them: class, part, file
    found = [(c, png(pixels)) for c, of_class in FILES.items() for pixels in of_class]
    numbers = {data: int(hashlib.sha256(data).hexdigest()[:16], 16) for _, data in found}
    return [(c, "test" if numbers[data] < 2**64 // 5 else "train", data) for c, data in found]


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# ---- writers of layouts

def class_folders(top, images):
    for k, (c, _, data) in enumerate(images): put(top/c/f"{k}.png", data)

def train_and_test(top, images, test="test", val=None):
    for k, (c, part, data) in enumerate(images):
        split = test if part == "test" else val if val and k % 3 == 0 else "train"
        put(top/split/c/f"{999 - k}.png", data) # in the other order

def train_and_val(top, images): train_and_test(top, images, test="val")

def three_splits(top, images): train_and_test(top, images, val="valid")

def table(top, images, name="labels.csv", columns=("file", "label", "split")):
    top.mkdir(parents=True, exist_ok=True)
    with open(top/name, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerow(columns)
        for k, (c, part, data) in enumerate(images[::-1]):
            put(top/"images"/f"{k}.png", data)
            csv.writer(f).writerow([f"images/{k}.png", c, part][:len(columns)])

def table_without_splits(top, images): table(top, images, "metadata.csv", ("file_name", "label"))

def hugging_face(top, images):
    for k, (c, part, data) in enumerate(images):
        put(top/part/f"{k}.png", data)
        with open(top/part/"metadata.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"file_name": f"{k}.png", "label": c}) + "\n")

def parquet(top, images):
    top.mkdir()
    noted = {"info": {"features": {"label": {"names": ["red fox", "owl"], "_type": "ClassLabel"}}}} # in another order
    kinds = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    schema = pa.schema(kinds, metadata={"huggingface": json.dumps(noted)})
    for split in ("train", "test"):
        rows = [(c, data) for c, part, data in images[::-1] if part == split]
        columns = [[{"bytes": data, "path": None} for _, data in rows], [1 - CLASSES.index(c) for c, _ in rows]]
        pq.write_table(pa.table(columns, schema), top/f"{split}-00000-of-00001.parquet", row_group_size=7)

def webdataset(top, images):
    for split in ("train", "test"):
        (top/split).mkdir(parents=True)
        with tarfile.open(top/split/"shard-0.tar", "w") as tar:
            for k in RNG.permutation(len(images)):
                c, part, data = images[k]
                if part != split: continue
                for name, content in ((f"{k:05}.png", data), (f"{k:05}.cls", c.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

def links(top, images):
    class_folders(top.parent/"elsewhere", images)
    for c in CLASSES:
        (top/c).mkdir(parents=True)
        for path in (top.parent/"elsewhere"/c).iterdir(): (top/c/path.name).symlink_to(path)
    (top/FOLLOW).touch()


LAYOUTS = [class_folders, train_and_test, train_and_val, three_splits, table, table_without_splits, hugging_face,
           parquet, webdataset, links]


@pytest.mark.parametrize("size", (16, 96))
def test_the_same_40_images_have_one_digest_in_every_layout(images, tmp_path, size):
    digests = {}
    for write in LAYOUTS:
        write(tmp_path/write.__name__, images)
        data = load_dataset(str(tmp_path/write.__name__), size)
        digests[write.__name__] = (data.train.digest, data.test.digest, data.info.names)
        assert len(data.train) == train_size(str(tmp_path/write.__name__))
    assert len(images) == 40 and len(digests) >= 7 and len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_is_checked_and_litter_is_counted(write, images, tmp_path, capsys):
    folder = tmp_path/"mine"
    write(folder, images)
    assert main(["check", str(folder)]) == 0
    before = capsys.readouterr().out
    assert "training images 32, test images 8" in before.replace(*_counts(images))
    for litter in ("@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/0.png", "#recycle/0.tar", "Thumbs.db", "._0.parquet",
                   "lost+found/a.parquet", ".AppleDouble/0.png"):
        put(folder/litter, images[0][2])
    report = check_folder(folder)
    ignored = report.findings[report.findings.text.str.contains("left by a NAS")]
    assert report.ok and len(ignored) == 7 and report.counts[["train", "test"]].to_numpy().sum() == 40
    again = load_dataset(str(folder), 16)
    assert len(again.train) + len(again.test) == 40


def _counts(images): # what the seed of this file happens to hold out, as 32 and 8
    test = sum(part == "test" for _, part, _ in images)
    return f"training images {40 - test}, test images {test}", "training images 32, test images 8"


def test_order_of_files_and_names_change_nothing_that_a_seed_draws(images, tmp_path):
    class_folders(tmp_path/"a", images)
    class_folders(tmp_path/"b", images[::-1])
    a, b = (load_dataset(str(tmp_path/name), 16) for name in "ab")
    assert a.train.digest == b.train.digest and folder_files(tmp_path/"a").keys() == {"train", "test"}


def test_val_beside_train_and_test_is_trained_on_and_beside_train_alone_is_tested_on(images, tmp_path):
    three_splits(tmp_path/"three", images)
    train_and_val(tmp_path/"two", images)
    assert dataset_info(str(tmp_path/"three")).remark == "" != dataset_info(str(tmp_path/"two")).remark
    report = check_folder(tmp_path/"three")
    assert report.split and report.counts.train.sum() == sum(part == "train" for _, part, _ in images)


# ---- what is wrong

def test_a_table_beside_archives_and_class_folders(images, tmp_path):
    class_folders(tmp_path/"mine", images)
    plain = load_dataset(str(tmp_path/"mine"), 16).train.digest
    webdataset(tmp_path/"mine"/"old", images) # the archives that the folders came from
    shutil.move(tmp_path/"mine"/"old"/"train"/"shard-0.tar", tmp_path/"mine"/"images.tar")
    shutil.rmtree(tmp_path/"mine"/"old")
    (tmp_path/"mine"/"metadata.csv").write_text("photographer,camera\nme,mine\n") # names no files
    assert load_dataset(str(tmp_path/"mine"), 16).train.digest == plain


@pytest.mark.parametrize(("rows", "said"), (
    (["file,label,split", "gone.png,owl,train"], "row 1: file is 'gone.png', which is no file"),
    (["file,label,split", "../out.png,owl,train"], "which is no file"),
    (["file,label,split", "0.png,,train"], "has no class"),
    (["file,label,split", "0.png,owl,train", "1.png,owl,fold 3"], "call splits train, val and test"),
    (["file,label,split", "0.png,owl,train", "1.png,owl,"], "images in a split and images in none"),
    (["file,label,split", "0.png,owl,val", "1.png,owl,test"], "has no training images"),
    (["file,label,split", "0.png,owl,train", "1.png,fox,test"], "has no image for test"),
    (["file,label"], "lists no images: give it the columns file_name and label")))
def test_a_wrong_table_is_one_sentence(rows, said, tmp_path, capsys):
    put(tmp_path/"out.png", png(FILES["owl"][0]))
    for k in range(2): put(tmp_path/"mine"/f"{k}.png", png(FILES["owl"][k]))
    (tmp_path/"mine"/"metadata.csv").write_text("\n".join(rows))
    code = main(["transfer", str(tmp_path/"mine"), "--profile", "smoke", "--out", str(tmp_path/"better")])
    out, err = capsys.readouterr()
    assert code in (1, 2) and said in " ".join((out + err).split()) and "Traceback" not in err
    assert not (tmp_path/"better").exists()


def test_links_out_of_the_folder_need_the_marker(images, tmp_path):
    table(tmp_path/"mine", images)
    shutil.move(tmp_path/"mine"/"images", tmp_path/"elsewhere")
    (tmp_path/"mine"/"images").mkdir()
    for path in (tmp_path/"elsewhere").iterdir(): (tmp_path/"mine"/"images"/path.name).symlink_to(path)
    with pytest.raises(ValueError, match="which is no file of"): load_dataset(str(tmp_path/"mine"))
    (tmp_path/"mine"/FOLLOW).touch()
    data = load_dataset(str(tmp_path/"mine"), 16)
    assert len(data.train) + len(data.test) == 40


def test_a_damaged_image_in_an_archive_is_named(images, tmp_path):
    (c, part, data), *rest = images
    parquet(tmp_path/"mine", [(c, part, data[:400]), *rest])
    with pytest.raises(ValueError, match=r"parquet, row group \d, row \d cannot be read as an image"):
        load_dataset(str(tmp_path/"mine"), 16)
    report = check_folder(tmp_path/"mine")
    assert not report.ok and report.findings.kind.tolist() == ["unreadable"]


# ---- names, copies

def test_class_names_that_name_nothing_are_warned_of_in_every_layout(images, tmp_path):
    numbered = [(str(CLASSES.index(c)), part, data) for c, part, data in images]
    webdataset(tmp_path/"numbers", numbered)
    table(tmp_path/"table", numbered)
    for folder in (tmp_path/"numbers", tmp_path/"table"):
        assert check_folder(folder).findings.kind.tolist() == ["nameless"] * 2
        (folder/"names.json").write_text('{"0": "owl", "1": "red fox"}')
        assert check_folder(folder).ok and dataset_info(str(folder)).names == CLASSES


def test_wordnet_identifiers_have_names(images, tmp_path):
    ids = {"owl": "n01440764", "red fox": "n02086240"}
    class_folders(tmp_path/"mine", [(ids[c], part, data) for c, part, data in images])
    assert dataset_info(str(tmp_path/"mine")).names == ("tench", "Shih-Tzu") and check_folder(tmp_path/"mine").ok
    (tmp_path/"mine"/"names.json").write_text('{"n01440764": "fish"}')
    assert dataset_info(str(tmp_path/"mine")).names == ("fish", "Shih-Tzu")


def test_all_classes_of_imagenet_have_a_name_of_their_own_but_the_cranes(tmp_path):
    from timm.data import ImageNetInfo
    wnids = sorted(ImageNetInfo().label_names())
    with pytest.raises(ValueError, match="n02012849, n03126707 have the same name 'crane'"):
        prompt_names(tmp_path, wnids)
    assert len(set(prompt_names(tmp_path, [w for w in wnids if w != "n03126707"]))) == 999


def test_a_resized_copy_across_parts_is_found_in_an_archive(images, tmp_path):
    smooth = Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64), Image.BICUBIC)
    copies = [("owl", "train", png(np.asarray(smooth))), ("owl", "test", png(np.asarray(smooth.resize((90, 90)))))]
    parquet(tmp_path/"mine", [*images, *copies])
    findings = check_folder(tmp_path/"mine").findings
    assert findings.kind.tolist() == ["leak", "leak"] and findings.text.str.contains("resized or saved again").all()


def test_a_synthetic_set_may_be_a_labels_csv(images, tmp_path):
    table(tmp_path/"mine", images)
    assert {i.label for i in find_items(tmp_path/"mine")} == set(CLASSES)


# ---- large

def peak(folder, root, size): # bytes that Python and NumPy allocate
    tracemalloc.start()
    data = layouts.load_layout(folder, size, root)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return used, data


@pytest.mark.parametrize("size", (64, 96))
def test_a_large_dataset_is_mapped_and_memory_is_flat(size, tmp_path, monkeypatch):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for k in range(1200):
        noise[0, 0] = [k % 256, k // 256, 0] # each has a content of its own
        name = tmp_path/("few" if k < 400 else "many")/f"{k % 2}"/f"{k}.png"
        put(name, png(noise))
    plain = layouts.load_layout(tmp_path/"few", size)[0].digest
    monkeypatch.setattr(layouts, "MAPPED_FROM", 0)
    layouts.load_layout(tmp_path/"few", size, tmp_path/"warm") # imports are paid for
    few, data = peak(tmp_path/"few", tmp_path/"data", size)
    assert data[0].digest == plain and len(list((tmp_path/"data"/"decoded").iterdir())) == 2
    many, (train, test) = peak(tmp_path/"many", tmp_path/"data", size)
    assert len(train) + len(test) == 800
    assert (many - few) / 400 < 3000, "bytes an image; its pixels, and its file, have 12,288"
    monkeypatch.setattr(layouts.Reading, "__iter__", lambda self: 1 / 0) # found, not read again
    assert layouts.load_layout(tmp_path/"few", size, tmp_path/"data")[0].digest == plain


def test_the_switch_for_links_is_remembered(images, tmp_path, capsys):
    train_and_test(tmp_path/"here", images)
    moved = tmp_path/"here/train/owl/away.png"
    put(tmp_path/"elsewhere.png", png(np.zeros((8, 8, 3), np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None]))
    moved.symlink_to(tmp_path/"elsewhere.png")
    folder = str(tmp_path/"here")
    assert main(["check", folder]) == 1 and "away.png" in capsys.readouterr().out
    assert main(["check", folder, "--follow-links"]) == 0 and (tmp_path/"here"/FOLLOW).exists()
    assert main(["check", folder]) == 0 # from now on
    capsys.readouterr()
    assert main(["transfer", "digits", "--follow-links", "--out", str(tmp_path/"out")]) == 2
    assert "--follow-links is for a folder of images" in capsys.readouterr().err
