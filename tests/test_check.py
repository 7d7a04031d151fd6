"""Folders of images as people have them: what is odd is read one right way or named; nothing is silently left out."""
import hashlib
import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFile, ImageOps

from bridgexfer.data.registry import dataset_info, load_dataset
from bridgexfer.datasets import folder_files, hold_out
from bridgexfer.images import PIXEL_LIMIT, TooLarge, open_image, read_image, store_file, upright
from bridgexfer.data.check import FINDINGS, check_folder, contact_sheet


def noise(seed, height=40, width=50):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def save(path, image, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **kwargs)
    return path


def png_header(width, height):
    "A PNG that claims a size and has no pixels."
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def whole(path): # upright, at full size
    with open_image(path) as im: return np.asarray(upright(im))


@pytest.fixture
def folder(tmp_path):
    "Split, two classes, nothing wrong."
    for i, (split, name) in enumerate((s, c) for s in ("train", "test") for c in ("owl", "red_fox")):
        for k in range(3): save(tmp_path/"mine"/split/name/f"{k}.png", noise(10 * i + k))
    return tmp_path/"mine"


@pytest.fixture
def unsplit(tmp_path):
    for i, name in enumerate(("owl", "red_fox")):
        for k in range(12): save(tmp_path/"mine"/name/f"{k}.png", noise(100 * i + k))
    return tmp_path/"mine"


def found(folder, **kwargs): # {(kind, file)}
    report = check_folder(folder, progress=False, **kwargs)
    assert report.ok == (not any(FINDINGS[k] == "error" for k in report.findings["kind"]))
    return set(report.findings[["kind", "file"]].itertuples(index=False, name=None))


# ---- one image

@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif", "ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(40, 50), (33, 32), (7, 90)])
def test_ordinary_images_are_read_as_they_always_were(tmp_path, suffix, mode, size):
    path = save(tmp_path/f"a.{suffix}", noise(1, *size).convert(mode))
    with Image.open(path) as im:
        before = np.asarray(ImageOps.fit(ImageOps.exif_transpose(im).convert("RGB"), (32, 32), Image.BICUBIC))
    assert np.array_equal(read_image(path, 32), before)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:8, :8] = 255 # a mark in the first corner of the file
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = whole(save(tmp_path/"a.png", Image.fromarray(pixels), exif=exif))
    assert seen.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    corner = corners[orientation]
    assert seen[corner].tolist() == [255] * 3 and seen.astype(int).sum() == pixels.astype(int).sum()


@pytest.mark.parametrize("damage", [b"no TIFF", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01", b""], ids=repr)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_is_no_damage(tmp_path, damage, suffix):
    path = save(tmp_path/f"a.{suffix}", noise(1), exif=b"Exif\0\0" + damage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert whole(path).shape == (40, 50, 3) and store_file(path, 512)
        assert read_image(path, 32).shape == (32, 32, 3)


def display_p3(): # as telephones embed it, from its primaries
    from PIL import ImageCms
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, xyz in ((b"rXYZ", (0.51512, 0.24120, -0.00105)), (b"gXYZ", (0.29198, 0.69225, 0.04189)),
                     (b"bXYZ", (0.15710, 0.06657, 0.78407))):
        at = struct.unpack(">I", srgb[srgb.index(tag) + 4:][:4])[0] + 8
        srgb[at:at + 12] = struct.pack(">3i", *(round(v * 65536) for v in xyz))
    return bytes(srgb).replace("sRGB".encode("utf-16-be"), "P3 D".encode("utf-16-be")).replace(b"sRGB", b"P3 D")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_colour_profiles_are_converted(tmp_path, suffix):
    from PIL import ImageCms
    colour = (200, 60, 60)
    lossless = {"png": {}, "jpg": dict(quality=100), "tif": {}, "webp": dict(lossless=True)}[suffix]
    image = Image.new("RGB", (16, 16), colour)
    path = save(tmp_path/f"p3.{suffix}", image, icc_profile=display_p3(), **lossless)
    seen = whole(path)[8, 8].astype(int)
    assert seen[0] > 205 and seen[1] < 58 # more saturated in sRGB, where Display P3 is wider
    with Image.open(io.BytesIO(store_file(path, 512))) as stored:
        assert np.abs(np.asarray(stored)[8, 8] - seen).max() <= 2 and not stored.info.get("icc_profile")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for k, profile in enumerate((srgb, b"no profile", display_p3()[:200])):
        same = whole(save(tmp_path/f"{k}.{suffix}", image, icc_profile=profile, **lossless))[8, 8]
        assert np.abs(same.astype(int) - colour).max() <= 2
    clear = Image.new("RGBA", (2, 1), (*colour, 0))
    if suffix != "jpg":
        seen = whole(save(tmp_path/f"clear.{suffix}", clear, icc_profile=display_p3(), **lossless))
        assert (seen == 255).all()


RAMP = np.linspace(0, 65535, 64).reshape(8, 8)
SHADES = np.linspace(0, 255, 64).reshape(8, 8)


DEEP = {
    "png": ("png", RAMP.astype(np.uint16)),
    "tif": ("tif", RAMP.astype(np.uint16)),
    "tif, big end first": ("tif", RAMP.astype(">u2")),
    "ppm": ("pgm.ppm", RAMP.astype(np.uint16)),
    "32 bits": ("tif", RAMP.astype(np.int32)),
    "float to 1": ("tif", (RAMP / 65535).astype(np.float32)),
    "float to 255": ("tif", SHADES.astype(np.float32)),
    "large": ("tif", (RAMP * 1000).astype(np.int32)),
    "negative": ("tif", (RAMP - 30000).astype(np.int32)),
    "float, negative": ("tif", (RAMP - 7).astype(np.float32))}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_are_scaled_and_not_clipped(tmp_path, kind):
    suffix, values = DEEP[kind]
    seen = whole(save(tmp_path/f"a.{suffix}", Image.fromarray(values)))
    assert np.abs(seen - SHADES[..., None]).max() <= 0.51 and (seen == seen[..., :1]).all()


def test_a_part_of_the_range_stays_a_part(tmp_path):
    seen = whole(save(tmp_path/"a.png", Image.fromarray((RAMP / 4).astype(np.uint16))))
    assert np.abs(seen[..., 0] - SHADES / 4).max() <= 0.51
    assert (whole(save(tmp_path/"b.tif", Image.fromarray(np.full((8, 8), -5, np.int32)))) == 0).all()
    with pytest.raises(ValueError, match="c.tif cannot be read .*finite"):
        whole(save(tmp_path/"c.tif", Image.fromarray(np.full((8, 8), np.nan, np.float32))))


def test_transparent_parts_are_laid_on_white(tmp_path):
    solid, clear, half = (90, 20, 10, 255), (90, 20, 10, 0), (100, 0, 0, 128)
    image = Image.new("RGBA", (3, 1))
    for x, c in enumerate((solid, clear, half)): image.putpixel((x, 0), c)
    for suffix in ("png", "tif"):
        seen = whole(save(tmp_path/f"a.{suffix}", image))[0]
        assert seen[:2].tolist() == [[90, 20, 10], [255, 255, 255]]
        assert np.abs(seen[2].astype(int) - [177, 127, 127]).max() <= 1
    assert whole(save(tmp_path/"b.png", Image.merge("LA", image.split()[::3])))[0, 1].tolist() == [255] * 3
    for name in ("c.png", "c.gif"): # a key colour in the palette
        palette = Image.new("P", (2, 1))
        palette.putpalette([200, 0, 0, 0, 0, 200])
        palette.putpixel((1, 0), 1)
        assert whole(save(tmp_path/name, palette, transparency=1))[0].tolist() == [[200, 0, 0], [255, 255, 255]]
    key = Image.new("RGB", (2, 1), (1, 2, 3))
    key.putpixel((1, 0), (9, 9, 9))
    assert whole(save(tmp_path/"d.png", key, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [9, 9, 9]]
    opaque = noise(3)
    assert np.array_equal(whole(save(tmp_path/"e.png", opaque.convert("RGBA"))), np.asarray(opaque))


def test_colours_of_print(tmp_path):
    path = save(tmp_path/"a.jpg", Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK"), quality=100)
    assert np.abs(whole(path)[8, 8].astype(int) - [200, 100, 50]).max() <= 4


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 0, 255))]
    lossless = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path/f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **lossless)
    assert (whole(path) == [255, 0, 0]).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif", "gif", "ppm"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.9])
def test_damaged_files_are_named(tmp_path, suffix, share):
    path = save(tmp_path/f"a.{suffix}", noise(0))
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"a\.{suffix} cannot be read as an image \(.*: repair or remove it"):
        read_image(path, 32)


def test_only_image_formats_are_tried(tmp_path):
    (tmp_path/"a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="a.jpg cannot be read as an image .it is none of JPEG, PNG"):
        read_image(tmp_path/"a.jpg", 32)
    with pytest.raises(ValueError, match="no.jpg cannot be read"): read_image(tmp_path/"no.jpg", 32)


@pytest.mark.parametrize("edge", [9000, 10000, 50000]) # within Pillow's own limit, where it warns, where it raises
def test_the_header_is_enough_to_reject_a_huge_image(tmp_path, edge):
    (tmp_path/"a.png").write_bytes(png_header(edge, edge)) # read as an image it would be called damaged
    flags = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = rf"a\.png has {edge * edge:,} pixels, more than the limit of {PIXEL_LIMIT:,}"
        with pytest.raises(TooLarge, match=said):
            read_image(tmp_path/"a.png", 32)
    assert flags == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) and flags[0] is not None
    small = save(tmp_path/"b.png", noise(0))
    with pytest.raises(TooLarge, match="2,000 pixels, more than the limit of 1,999"): read_image(small, 32, limit=1999)
    assert read_image(small, 32, limit=2000).shape == (32, 32, 3)


# ---- the split

def splits(folder): # {file: split}
    found = {}
    for split, classes in folder_files(folder).items():
        for files in classes.values(): found |= {f.relative_to(folder).as_posix(): split for f in files}
    return found


def lowest_fifth(path): return int(hashlib.sha256(path.read_bytes()).hexdigest()[:16], 16) < 2**64 / 5


def test_the_content_determines_the_split(unsplit):
    split = splits(unsplit)
    assert len(split) == 24
    for name in ("owl", "red_fox"):
        files = list((unsplit/name).iterdir())
        expected = {f.relative_to(unsplit).as_posix(): "test" if lowest_fifth(f) else "train" for f in files}
        assert set(expected.values()) == {"train", "test"} and expected.items() <= split.items()
    data = load_dataset(str(unsplit), size=16)
    assert data.info.names == ("owl", "red fox")
    assert len(data.test) == sum(s == "test" for s in split.values())
    assert len(data.train) + len(data.test) == 24
    assert "a fifth" in data.info.remark


def test_names_order_and_other_files_change_nothing(unsplit, monkeypatch):
    before = splits(unsplit)
    content = {(unsplit/f).read_bytes(): s for f, s in before.items()}
    listed = Path.iterdir
    with monkeypatch.context() as m:
        m.setattr(Path, "iterdir", lambda self: reversed(sorted(listed(self))))
        assert list(splits(unsplit).items()) == list(before.items())
    for i, f in enumerate(sorted((unsplit/"owl").iterdir())): f.rename(f.with_name(f"renamed {99 - i}.png"))
    for k in range(20): save(unsplit/"owl"/"more"/f"{k}.png", noise(1000 + k))
    after = {(unsplit/f).read_bytes(): s for f, s in splits(unsplit).items()}
    assert len(after) == 44 and content.items() <= after.items()
    moved = unsplit.rename(unsplit.with_name("moved"))
    assert {(moved/f).read_bytes(): s for f, s in splits(moved).items()} == after


def test_copies_are_in_the_same_split(unsplit):
    for f in list((unsplit/"owl").iterdir()): (f.with_name(f"a copy of {f.name}")).write_bytes(f.read_bytes())
    split = splits(unsplit)
    assert all(split[f"owl/{k}.png"] == split[f"owl/a copy of {k}.png"] for k in range(12))


@pytest.mark.parametrize("low", [True, False], ids=["all in the lowest fifth", "none"])
def test_two_different_images_are_enough_and_one_is_not(unsplit, low):
    for f in (unsplit/"owl").iterdir(): f.unlink()
    seeds = (s for s in range(10**6) if lowest_fifth(save(unsplit.parent/"candidate.png", noise(s, 33, 33))) == low)
    save(unsplit/"owl"/"one.png", noise(next(seeds), 33, 33))
    (unsplit/"owl"/"copy.png").write_bytes((unsplit/"owl"/"one.png").read_bytes())
    with pytest.raises(ValueError, match="test part of .* two different images. has no images for owl"):
        load_dataset(str(unsplit))
    assert ("missing", "owl") in found(unsplit)
    save(unsplit/"owl"/"two.png", noise(next(seeds), 33, 33))
    split = splits(unsplit)
    assert split["owl/one.png"] == split["owl/copy.png"] != split["owl/two.png"]
    assert load_dataset(str(unsplit)).info.names == ("owl", "red fox") and ("missing", "owl") not in found(unsplit)


# ---- layouts

def test_train_and_test_are_a_split(folder):
    assert len(splits(folder)) == 12 and all(f.startswith(f"{s}/") for f, s in splits(folder).items())
    assert dataset_info(str(folder)).remark == ""


def test_a_class_may_be_called_train(unsplit):
    (unsplit/"owl").rename(unsplit/"train")
    assert dataset_info(str(unsplit)).names == ("red fox", "train")


def test_half_a_split_and_other_words_for_it_are_named(folder):
    (folder/"test").rename(folder/"Testing")
    with pytest.raises(FileNotFoundError, match="test is missing"): dataset_info(str(folder))
    (folder/"train").rename(folder/"Training")
    with pytest.raises(ValueError, match="Testing, Training and no classes"): dataset_info(str(folder))
    (folder/"empty").mkdir()
    with pytest.raises(ValueError, match="holds no class folders"): dataset_info(str(folder/"empty"))
    with pytest.raises(ValueError, match="holds no class folders"): check_folder(folder/"empty")


# ---- names

def test_names_of_prompts_may_be_given(folder):
    (folder/"names.json").write_text('\ufeff{"owl": " tawny  owl "}', encoding="utf-8") # as Windows writes it
    info = dataset_info(str(folder))
    assert info.names == ("tawny owl", "red fox") == load_dataset(str(folder)).train.names
    assert check_folder(folder).counts["name"].tolist() == ["tawny owl", "red fox"] and not found(folder)
    (folder/"names.json").unlink()
    assert dataset_info(str(folder)).vocabulary != info.vocabulary


@pytest.mark.parametrize(("text", "said"), [
    ('{"cat": "cat"}', "'cat', and there is no such class folder: choose among owl, red_fox"),
    ('{"../owl": "cat"}', "'../owl', and there is no such class folder"),
    ('{"owl": ""}', "'owl' has the name ''"),
    ('{"owl": "a\\u0007b"}', "has the name 'a.x07b'"),
    ('{"owl": "red fox"}', "owl, red_fox have the same name 'red fox'"),
    ('{"owl": "a", "owl": "b"}', "a folder is named twice"),
    ('{"owl": 3}', "does not map folders to names"),
    ('["owl"]', "does not map folders to names"),
    ("owl = cat", "names.json cannot be read"),
    ("", "names.json cannot be read")])
def test_errors_in_names_are_named(folder, text, said):
    (folder/"names.json").write_text(text)
    with pytest.raises(ValueError, match=said): dataset_info(str(folder))
    with pytest.raises(ValueError, match=said): load_dataset(str(folder))
    report = check_folder(folder)
    assert not report.ok and report.findings["kind"].tolist() == ["prompt names"]
    assert report.counts["train"].tolist() == [3, 3]


def test_folders_of_one_name_are_rejected(folder):
    for split in ("train", "test"): (folder/split/"owl").rename(folder/split/"red-fox")
    with pytest.raises(ValueError, match="red-fox, red_fox have the same name 'red fox'.*names.json"):
        dataset_info(str(folder))
    for split in ("train", "test"): (folder/split/"red-fox").rename(folder/split/"Red fox")
    assert {k for k, _ in found(folder)} == {"similar names"}


ODD = ["{}", "a{}b{0}", "🦉", "x" * 200,
       "-rf", "a b", "it's; rm -rf ~", 'say "x"', "$(touch x)", "{0}", "%s", "猫", "été", "a\nb", " space", "..hidden",
       "a\x07b", "-", "caf\udce9"]
READ = {"-rf": "rf", "it's; rm -rf ~": "it's; rm rf ~", "a\nb": "a b", " space": "space"} # others are read as they are


@pytest.mark.parametrize("name", ODD, ids=ascii)
@pytest.mark.parametrize("split", [True, False])
def test_odd_class_names_are_read_or_reported(tmp_path, name, split):
    folder = tmp_path/"mine"
    for i, top in enumerate([folder/"train", folder/"test"] if split else [folder]):
        for j, c in enumerate((name, "owl")):
            for k in range(2): save(top/c/f"{k}.png", noise(100 * i + 10 * j + k))
    before = sorted(tmp_path.rglob("*"))
    report = check_folder(folder, write=tmp_path/"findings.csv")
    rows = set(report.findings[["kind", "file"]].itertuples(index=False, name=None))
    if name == "..hidden":
        assert dataset_info(str(folder)).names == ("owl",)
        assert {k for k, _ in rows if k != "single"} == {"not read", "one class"}
    elif name in ("-", "a\x07b", "caf\udce9"): # no name for a prompt
        assert not report.ok and "prompt names" in {k for k, _ in rows}
        with pytest.raises(ValueError, match="which no prompt can use"): dataset_info(str(folder))
        (folder/"names.json").write_text(json.dumps({name: "coffee"}))
        assert set(load_dataset(str(folder)).info.names) == {"coffee", "owl"}
        (folder/"names.json").unlink()
    else:
        data = load_dataset(str(folder), size=16)
        assert report.ok and set(data.info.names) == {"owl", READ.get(name, name)}
        assert len(data.train) + len(data.test) == (8 if split else 4)
    plain = name in ("{}", "a{}b{0}", "🦉", "x" * 200,
                     "a b", 'say "x"', "it's; rm -rf ~", "$(touch x)", "{0}", "%s", "猫", "été", "..hidden")
    assert any(k == "odd name" for k, _ in rows) != plain
    assert report.text().isascii() or name in ("猫", "été", "🦉") # nothing that does not print
    assert all(line == "".join(c if c.isprintable() else "?" for c in line) for line in report.text(None).split("\n"))
    json.dumps(report.to_dict()).encode()
    assert len(pd.read_csv(tmp_path/"findings.csv")) == len(report.findings)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path/"findings.csv"])


# ---- the check

def test_nothing_to_report(folder):
    report = check_folder(folder)
    assert report.ok and len(report.findings) == 0 and "nothing to report" in report.text()
    assert report.counts.to_dict("index")["owl"] == {"name": "owl", "train": 3, "test": 3}


def exif(orientation):
    e = Image.Exif()
    e[0x0112] = orientation
    return e


def save_array(path, array): Image.fromarray(array).save(path)


def save_cut(path): # in the middle
    noise(77).save(path)
    path.write_bytes(path.read_bytes()[:900])


RNG = np.random.default_rng
FILES = { # kind: a file that is found for it
    "unreadable": ("a.jpg", save_cut),
    "too large": ("a.png", lambda p: p.write_bytes(png_header(50000, 50000))),
    "small": ("a.png", lambda p: noise(77, 1, 1).save(p)),
    "dark": ("a.png", lambda p: save_array(p, RNG(0).integers(0, 4096, (40, 40)).astype(np.uint16))),
    "CMYK": ("a.jpg", lambda p: noise(77).convert("CMYK").save(p)),
    "16 bits": ("a.tif", lambda p: save_array(p, RNG(0).random((40, 40)).astype(np.float32))),
    "palette": ("a.png", lambda p: noise(77).quantize(16).save(p)),
    "transparent": ("a.webp", lambda p: noise(77).convert("RGBA").rotate(45).save(p)),
    "frames": ("a.gif", lambda p: noise(77).save(p, save_all=True, append_images=[noise(78)])),
    "turned": ("a.jpg", lambda p: noise(77).save(p, exif=exif(6))),
    "not read": ("a.heic", lambda p: p.write_bytes(b"from a telephone")),
    "ignored": ("a.txt", lambda p: p.write_text("seen on Tuesday")),
    "odd name": ("-a.png", lambda p: noise(77).save(p)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_each_kind(folder, kind):
    name, write = FILES[kind]
    write(folder/"train"/"owl"/name)
    rows = check_folder(folder).findings
    row = rows[rows["kind"] == kind].iloc[0]
    assert row[["file", "class", "split", "level"]].tolist() == [f"train/owl/{name}", "owl", "train", FINDINGS[kind]]
    assert str(folder) not in row["text"]
    assert set(rows["kind"]) <= {kind, {"frames": "palette", "dark": "16 bits"}.get(kind, kind)}
    if kind in ("unreadable", "too large"): # the loader agrees
        with pytest.raises(ValueError, match=name): load_dataset(str(folder))
    else: assert len(load_dataset(str(folder)).train) == (6 if kind in ("not read", "ignored") else 7)


def test_greyscale_is_nothing_to_report(folder):
    save(folder/"train"/"owl"/"grey.png", noise(77).convert("L"))
    assert not found(folder)


@pytest.mark.parametrize("suffix", ["png", "bmp"], ids=["the same file", "the same pixels"])
def test_copies_in_train_and_test_are_a_leak(folder, suffix):
    with Image.open(folder/"train"/"owl"/"1.png") as im: im.save(folder/"test"/"owl"/f"renamed.{suffix}")
    assert found(folder) == {("leak", "train/owl/1.png"), ("leak", f"test/owl/renamed.{suffix}")}


def test_copies_in_two_classes_contradict(folder):
    (folder/"train"/"owl"/"fox.png").write_bytes((folder/"train"/"red_fox"/"0.png").read_bytes())
    assert found(folder) == {("contradiction", "train/owl/fox.png"), ("contradiction", "train/red_fox/0.png")}
    (folder/"train"/"owl"/"fox.png").rename(folder/"test"/"owl"/"fox.png")
    files = ("test/owl/fox.png", "train/red_fox/0.png")
    assert found(folder) == {(k, f) for k in ("contradiction", "leak") for f in files}


def test_copies_within_a_class_are_a_warning(folder):
    for name in ("3.png", "4.png"): (folder/"train"/"owl"/name).write_bytes((folder/"train"/"owl"/"0.png").read_bytes())
    assert found(folder) == {("duplicate", "train/owl/3.png"), ("duplicate", "train/owl/4.png")}
    assert check_folder(folder).ok


def test_lone_and_missing_classes(folder):
    for k in (1, 2): (folder/"train"/"owl"/f"{k}.png").unlink()
    assert found(folder) == {("single", "owl")} and check_folder(folder).ok
    for k in range(3): (folder/"test"/"owl"/f"{k}.png").unlink()
    assert found(folder) == {("missing", "owl")}
    (folder/"test"/"owl").rmdir()
    assert found(folder) == {("missing", "owl")} and "no image for test" in check_folder(folder).text()
    (folder/"train"/"none").mkdir()
    assert found(folder) == {("missing", "owl"), ("missing", "none")}


def test_files_outside_the_classes_are_reported(folder):
    save(folder/"spare"/"owl"/"0.png", noise(70))
    save(folder/"train"/"loose.png", noise(71))
    save(folder/"train"/"owl"/"left.jfif", noise(72), format="JPEG")
    save(folder/"train"/"owl"/"no suffix", noise(73), format="PNG")
    save(folder/"train"/".hidden"/"0.png", noise(74))
    save(folder/"train"/"owl"/".a.png", noise(75))
    (folder/"train"/".cache").mkdir()
    (folder/"train"/"owl"/"._0.png").write_bytes(b"macOS")
    (folder/"README").write_text("mine")
    save(folder/"train"/"owl"/"deeper"/"0.PNG", noise(76))
    not_read = {"spare/owl/0.png", "train/loose.png", "train/owl/no suffix", "train/.hidden", "train/owl/.a.png"}
    ignored = {"train/.cache", "train/owl/._0.png", "README"}
    assert found(folder) == {("not read", f) for f in not_read} | {("ignored", f) for f in ignored}
    assert len(load_dataset(str(folder)).train) == 8 == check_folder(folder).counts["train"].sum() # .jfif is JPEG


LITTER = ["@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/0.png", "#recycle/gone.png", ".AppleDouble/0.png",
          "lost+found/#1.png", "Thumbs.db", ".@__thumb/default0.png", "$RECYCLE.BIN/x.png", "._1.png", "desktop.ini"]


@pytest.mark.parametrize("name", LITTER)
@pytest.mark.parametrize("where", ["", "train", "train/owl"])
def test_what_systems_leave_is_ignored_and_counted(folder, name, where):
    path = folder/where/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x") if path.suffix in (".db", ".ini") else noise(99, 33, 33).save(path)
    assert {kind for kind, _ in found(folder)} == {"ignored"}
    data = load_dataset(str(folder))
    assert data.info.names == ("owl", "red fox") and len(data.train) == 6 and check_folder(folder).ok


@pytest.mark.parametrize("name", ["0", "12", "n99999999", "class_7", "Label-3", "3f2a9c01de"])
def test_classes_that_name_nothing_are_a_warning(folder, name):
    for split in ("train", "test"): (folder/split/"owl").rename(folder/split/name)
    report = check_folder(folder)
    row = report.findings.iloc[0]
    assert report.ok and (row["kind"], row["level"], row["class"]) == ("nameless", "warning", name)
    assert "prompts would read" in row["text"] and "names.json" in row["text"]
    (folder/"names.json").write_text(json.dumps({name: "tawny owl"}))
    assert not found(folder)


def test_identifiers_of_wordnet_are_named_and_a_warning_says_how(folder):
    for split in ("train", "test"): (folder/split/"owl").rename(folder/split/"n01440764")
    assert "tench" in load_dataset(str(folder)).info.names
    [row] = check_folder(folder).findings.to_dict("records")
    assert (row["kind"], row["level"]) == ("WordNet", "warning") and 'read "a photo of a tench.".' in row["text"]
    (folder/"names.json").write_text(json.dumps({"n01440764": "tinca tinca"}))
    assert not found(folder)


def photo(seed): # smooth, as photographs are
    return noise(seed, 6, 8).resize((160, 120), Image.BICUBIC)


@pytest.mark.parametrize("copy", ["smaller", "larger", "squeezed", "jpeg", "palette"])
def test_copies_that_were_resized_or_saved_again_are_a_leak(folder, copy):
    for k in range(20): save(folder/"train"/"owl"/f"photo{k}.png", photo(200 + k))
    for k in range(20): save(folder/"test"/"owl"/f"photo{k}.png", photo(300 + k))
    assert not found(folder)
    changed = {"smaller": lambda im: im.resize((80, 60), Image.LANCZOS), "larger": lambda im: im.resize((320, 240)),
               "squeezed": lambda im: im.resize((96, 96)), "jpeg": lambda im: im,
               "palette": lambda im: im.quantize(256)}[copy](photo(205))
    how = dict(quality=60) if copy == "jpeg" else {}
    save(folder/"test"/"owl"/f"again.{'jpg' if copy == 'jpeg' else 'png'}", changed, **how)
    leaks = {f for kind, f in found(folder) if kind == "leak"}
    assert leaks == {"train/owl/photo5.png", f"test/owl/again.{'jpg' if copy == 'jpeg' else 'png'}"}
    assert "resized or saved again" in check_folder(folder).text()


def test_blank_images_are_no_copies_of_each_other(folder):
    for split, grey in (("train", 200), ("test", 201)):
        save(folder/split/"owl"/"blank.png", Image.new("RGB", (50, 40), (grey,) * 3))
    assert not found(folder)


def test_scanned_digits_are_told_apart(tmp_path): # as alike as different images get
    digits = load_dataset("digits")
    for split, images in (("train", digits.train), ("test", digits.test)):
        for i in range(200):
            file = tmp_path/"d"/split/f"c{images.labels[i]}x"/f"{i}.png"
            save(file, Image.fromarray(images.pixels[i]))
    assert not {kind for kind, _ in found(tmp_path/"d")} & {"leak", "contradiction"}


def test_a_single_class_is_an_error(folder):
    for split in ("train", "test"):
        for f in (folder/split/"owl").iterdir(): f.unlink()
        (folder/split/"owl").rmdir()
    assert found(folder) == {("one class", "red_fox")}


def test_links_are_reported_and_not_followed(folder, tmp_path):
    inside = folder/"train"/"owl"/"link.png"
    inside.symlink_to(folder/"train"/"owl"/"0.png")
    assert found(folder) == {("duplicate", "train/owl/link.png")} and len(load_dataset(str(folder)).train) == 7
    inside.unlink()
    away = save(tmp_path/"away"/"a.png", noise(50))
    for link, target in (("a.png", away), ("gone.png", tmp_path/"gone.png"), ("more", away.parent), ("loop", folder)):
        (folder/"train"/"owl"/link).symlink_to(target)
        assert found(folder) == {("link", f"train/owl/{link}")}
        with pytest.raises(ValueError, match=f"{link} is a link"): load_dataset(str(folder))
        (folder/"train"/"owl"/link).unlink()
    (folder/"train"/"zoo").symlink_to(away.parent)
    assert found(folder) == {("link", "train/zoo")}
    with pytest.raises(ValueError, match="zoo is a link"): dataset_info(str(folder))
    (folder/"train"/"zoo").unlink()
    (folder/"test").rename(tmp_path/"elsewhere")
    (folder/"test").symlink_to(tmp_path/"elsewhere")
    with pytest.raises(ValueError, match="test is a link"): check_folder(folder)
    (tmp_path/"by link").symlink_to(folder/"train")
    assert load_dataset(str(tmp_path/"by link")).info.names == ("owl", "red fox") # the dataset itself may be a link


@pytest.mark.parametrize("what", ["file", "class", "split"])
def test_links_are_followed_where_the_folder_says_so(folder, tmp_path, what):
    before = load_dataset(str(folder))
    moved = {"file": folder/"train"/"owl"/"0.png", "class": folder/"train"/"owl", "split": folder/"train"}[what]
    blob = tmp_path/"blobs"/"1f3a" # without a suffix, as in a cache
    blob.parent.mkdir()
    moved.rename(blob)
    moved.symlink_to(blob)
    with pytest.raises(ValueError, match="link"): load_dataset(str(folder))
    (folder/".follow-links").touch()
    assert not found(folder) and load_dataset(str(folder)).train.digest == before.train.digest
    (folder/"train"/"owl"/"gone.png").symlink_to(tmp_path/"gone.png")
    (folder/"test"/"owl"/"circle").symlink_to(folder)
    assert found(folder) == {("link", "train/owl/gone.png"), ("link", "test/owl/circle")}


def test_one_image_of_each_class_leaves_none_to_validate(folder):
    for split in ("train", "test"):
        for f in folder.glob(f"{split}/*/[12].png"): f.unlink()
    train = load_dataset(str(folder)).train
    assert len(train) == 2 and {k for k, _ in found(folder)} == {"single"}
    with pytest.raises(ValueError, match="No class has two training images.*give the learning rate, lr"):
        hold_out(train, 0.2, 0)


def test_pipes_are_not_opened(folder):
    os.mkfifo(folder/"train"/"owl"/"a.png")
    assert found(folder) == {("ignored", "train/owl/a.png")} and len(load_dataset(str(folder)).train) == 6


def test_without_a_split_the_report_has_the_loaders(unsplit):
    (unsplit/"owl"/"damaged.png").write_bytes(b"x")
    report = check_folder(unsplit)
    assert "held out by content" in report.text() and report.findings["kind"].tolist() == ["unreadable"]
    (unsplit/"owl"/"damaged.png").unlink()
    data = load_dataset(str(unsplit))
    for s, part in (("train", data.train), ("test", data.test)):
        assert report.counts[s].tolist() == np.bincount(part.labels).tolist()


def test_the_report_as_text_table_and_json(folder, tmp_path):
    for k in range(5): (folder/"train"/"owl"/f"bad{k}.png").write_bytes(b"x" * (k + 1))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    report = check_folder(folder, write=tmp_path/"out"/"findings.csv")
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "bad2.png" in report.text() and "bad3.png" not in report.text() and "… and 2 more" in report.text()
    assert "5 errors" in report.text()
    assert "bad4.png" in report.text(few=None) and "more" not in report.text(few=None)
    assert report.findings.equals(pd.read_csv(tmp_path/"out"/"findings.csv", keep_default_na=False))
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert not values["ok"] and len(values["findings"]) == 5
    assert values["classes"][0] == {"folder": "owl", "name": "owl", "train": 3, "test": 3}
    assert [*FINDINGS] == sorted(FINDINGS, key=lambda k: ("error", "warning", "note").index(FINDINGS[k]))


def test_progress_says_how_fast(folder, capsys, monkeypatch):
    from bridgexfer.data import check
    from tqdm import tqdm
    monkeypatch.setattr(check, "tqdm", lambda *a, **k: tqdm(*a, **{**k, "delay": 0}))
    check_folder(folder)
    said = capsys.readouterr().err
    assert "Checking mine" in said and "12/12" in said and "image/s" in said
    check_folder(folder, progress=False)
    assert not capsys.readouterr().err


def test_a_contact_sheet_of_a_messy_folder(folder):
    import matplotlib.pyplot as plt
    (folder/"train"/"owl"/"0.png").write_bytes(b"x")
    for split in ("train", "test"): (folder/split/"owl").rename(folder/split/"$\\frac$")
    fig = contact_sheet(folder, columns=4, size=32)
    fig.canvas.draw()
    assert [ax.texts[0].get_text() for ax in fig.axes] == ["$\\frac$", "red_fox"]
    shown = fig.axes[0].images[0].get_array()
    assert shown.shape == (32, 4 * 34, 3) and (shown[:, :32] == 128).all()
    assert np.array_equal(shown[:, 34:66], read_image(folder/"train"/"$\\frac$"/"1.png", 32))
    plt.close(fig)
