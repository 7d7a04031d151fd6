"""Sets made elsewhere: four layouts of one content, classes by name, and the same training as ours to the bit."""
import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridgexfer.artefacts import read_json, spec_hash
from bridgexfer.cli import main
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import Dataset, few_shot
from bridgexfer.finetune import FinetuneSpec
from bridgexfer.generation import synthesis_spec
from bridgexfer.imported_sets import ImportedSet, import_set, match_class, match_classes, open_set
from bridgexfer.synthetic_sets import SyntheticSet, generate
from bridgexfer.transfer import Run, transfer, transfer_spec

NAMES = ("golden retriever", "F/A-18", "three")
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
LABELS = [k % 3 for k in range(12)]


def png(pixels):
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


FILES = [png(p) for p in PIXELS]


def class_folders(top, names=("Golden_Retriever", "f/a-18", "three"), order=range(12)):
    for place, k in enumerate(order):
        path = top/names[LABELS[k]].replace("/", "")/f"{place:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[k])
    (top/"names.json").write_text(json.dumps({names[1].replace("/", ""): NAMES[1]}))


def image_folder(top, suffix):
    (top/"images").mkdir(parents=True)
    for k, file in enumerate(FILES): (top/"images"/f"{k}.png").write_bytes(file)
    rows = [{"file_name": f"images/{k}.png", "label": NAMES[l].upper(), "text": "a"} for k, l in enumerate(LABELS)]
    with open(top/f"metadata.{suffix}", "w", newline="") as f:
        if suffix == "jsonl": f.write("\n".join(map(json.dumps, rows)))
        else:
            table = csv.DictWriter(f, rows[0])
            table.writeheader()
            table.writerows(rows)


def parquet(top, words):
    import datasets
    top.mkdir(parents=True)
    label = datasets.Value("string") if words else datasets.ClassLabel(names=list(NAMES[::-1]))
    values = [NAMES[l] if words else 2 - l for l in LABELS]
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [{"bytes": f, "path": None} for f in FILES], "label": values}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(top/"train-00000-of-00001.parquet")


def shards(top, suffix):
    top.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(top/f"{shard:05}.tar", "w") as tar:
            for k in range(shard * 6, shard * 6 + 6):
                name = NAMES[LABELS[k]]
                text = json.dumps({"class": name, "seed": 3}) if suffix == "json" else name
                for end, data in (("png", FILES[k]), (suffix, text.encode())):
                    info = tarfile.TarInfo(f"{k:06}.{end}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


LAYOUTS = {
    "folders": class_folders, "csv": lambda t: image_folder(t, "csv"), "jsonl": lambda t: image_folder(t, "jsonl"),
    "ClassLabel": lambda t: parquet(t, False), "words": lambda t: parquet(t, True),
    **{s: lambda t, s=s: shards(t, s) for s in ("cls", "txt", "json")}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_images(layout, tmp_path):
    LAYOUTS[layout](tmp_path/"set")
    made = import_set(tmp_path/"set", NAMES, tmp_path/"imported")
    images = made.images()
    assert np.array_equal(images.pixels, PIXELS) and images.labels.tolist() == LABELS and images.names == NAMES


def test_one_digest_whatever_the_layout_names_and_order(tmp_path):
    for layout, write in LAYOUTS.items(): write(tmp_path/layout)
    class_folders(tmp_path/"shuffled", order=np.random.default_rng(1).permutation(12))
    made = [import_set(tmp_path/f, NAMES, tmp_path/f"in {f}") for f in (*LAYOUTS, "shuffled")]
    assert len({m.spec.digest for m in made}) == 1 and len({spec_hash(m.spec) for m in made}) == 1
    found = import_set(tmp_path/"shuffled", NAMES, tmp_path/"in cls") # the first import settles the order
    assert np.array_equal(found.images().pixels, PIXELS)


def test_another_image_or_class_is_another_digest(tmp_path):
    class_folders(tmp_path/"a")
    digest = import_set(tmp_path/"a", NAMES, tmp_path/"imported").spec.digest
    (tmp_path/"a"/"three"/"002.png").write_bytes(FILES[0])
    assert import_set(tmp_path/"a", NAMES, tmp_path/"imported").spec.digest != digest
    class_folders(tmp_path/"b")
    (tmp_path/"b"/"three"/"002.png").rename(tmp_path/"b"/"Golden_Retriever"/"moved.png")
    assert import_set(tmp_path/"b", NAMES, tmp_path/"imported").spec.digest != digest


def test_what_is_exported_trains_alike_to_the_bit(tmp_path, model, one_thread):
    digits = load_dataset("digits")
    names = digits.info.names
    spec = synthesis_spec(model, names, steps=2, size=32, stored_size=32, format="png", shard=2, batch=20)
    native = generate(spec, tmp_path, 2, progress=False)
    theirs = open_set(native.export(tmp_path/"out"), names, tmp_path/"imported")
    assert isinstance(theirs, ImportedSet) and isinstance(open_set(native.folder, names, tmp_path), SyntheticSet)
    assert theirs.images().digest == native.images().digest and theirs.images(1).digest == native.images(1).digest
    as_files = import_set(tmp_path/"out", names, tmp_path/"imported", 96)
    assert np.array_equal(as_files.images().squares(32), native.images().pixels)
    data = Dataset(digits.info, few_shot(digits.train, 2, 0), few_shot(digits.test, 4, 0))
    run = Run("bridged_pp", 0, 0, 2)
    stages = (FinetuneSpec(0.1, 1), FinetuneSpec(0.1, 1))
    def result(given):
        how = transfer_spec(run, data, "mini_resnet10", stages, spec_hash(given.spec))
        return transfer(how, data, given.images(2), tmp_path/"bridges")[1]
    ours, others = result(native), result(theirs)
    same = ("accuracy", "loss", "predictions", "curve")
    assert [ours[k] for k in same] == [others[k] for k in same]
    assert len(list((tmp_path/"bridges").iterdir())) == 2 # two bridges: each set has its own name


def test_class_names_are_matched_as_datasets_compare_them():
    names = ("golden retriever", "F/A-18", "C", "c++", "Ibis", "ibis")
    matched = {"Golden-Retriever": 0, "golden__retriever": 0, "001-f-a-18": 1, "f/a 18": 1, "c": 2, "C++": 3,
               "IBIS": None}
    assert {found: match_class(found, names) for found in matched} == matched
    m = match_classes(("Golden_Retriever", "fa18", "tree"), ("golden retriever", "F/A-18", "three"))
    assert m.missing == ["F/A-18", "three"] and m.extra == ["fa18", "tree"] and list(m.renamed) == ["Golden_Retriever"]


def test_missing_extra_and_renamed_classes_are_one_sentence_each(tmp_path, caplog):
    class_folders(tmp_path/"set", ("Golden_Retriever", "dog", "tree"))
    (tmp_path/"set"/"names.json").unlink()
    with pytest.raises(ValueError) as e: import_set(tmp_path/"set", NAMES, tmp_path/"imported")
    assert "no images of F/A-18, three (perhaps it has tree for three)" in str(e.value) and "names.json" in str(e.value)
    assert "\n" not in str(e.value) and not (tmp_path/"imported").exists()
    (tmp_path/"set"/"names.json").write_text(json.dumps({"tree": "three", "dog": "Dog"}))
    import_set(tmp_path/"set", ("golden retriever", "three"), tmp_path/"imported")
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "images of Dog, which are no classes" in said[0]
    assert "Golden_Retriever for golden retriever" in said[1]


def test_numbers_without_names_are_not_guessed(tmp_path):
    class_folders(tmp_path/"set", ("0", "1", "2"))
    (tmp_path/"set"/"names.json").unlink()
    with pytest.raises(ValueError, match="its labels are numbers, so name them in names.json"):
        import_set(tmp_path/"set", NAMES, tmp_path/"imported")
    (tmp_path/"set"/"names.json").write_text(json.dumps(dict(zip("012", NAMES))))
    assert np.array_equal(import_set(tmp_path/"set", NAMES, tmp_path/"imported").images().pixels, PIXELS)


def test_damaged_and_small_images_are_named_and_nothing_is_kept(tmp_path, caplog):
    class_folders(tmp_path/"set")
    (tmp_path/"set"/"three"/"002.png").write_bytes(FILES[2][:200])
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be used.*three/002\.png cannot be read as an image"):
        import_set(tmp_path/"set", NAMES, tmp_path/"imported")
    assert not list((tmp_path/"imported").rglob("i*.*"))
    (tmp_path/"set"/"three"/"002.png").write_bytes(png(PIXELS[2][:20, :20]))
    import_set(tmp_path/"set", NAMES, tmp_path/"imported")
    assert "1 of 12 images are smaller than 32 pixels" in caplog.text


@pytest.mark.parametrize(("write", "said"), [
    (lambda t: (t/"x.parquet").write_bytes(b"PAR1 no"), "cannot be read as Parquet"),
    (lambda t: (t/"x.tar").write_bytes(b"no tar" * 200), "cannot be read as a .tar"),
    (lambda t: (t/"metadata.jsonl").write_text("{"), "cannot be read"),
    (lambda t: (t/"metadata.csv").write_text("file_name,label\ngone.png,three\n"), "row 1: file_name is 'gone.png'"),
    (lambda t: pq.write_table(pa.table({"image": [b"x"]}), t/"x.parquet"), "has the columns image"),
    (lambda t: (t/"train").mkdir() or (t/"test").mkdir(), "holds test, train: give one of them"),
    (lambda t: (shards(t/"a", "cls"), parquet(t/"b", True)), "a set as Parquet and as WebDataset"),
    (lambda t: None, "holds no images")])
def test_folders_that_are_no_set_are_a_sentence(write, said, tmp_path):
    (tmp_path/"set").mkdir()
    write(tmp_path/"set")
    with pytest.raises(ValueError, match=said): import_set(tmp_path/"set", NAMES, tmp_path/"imported")


@pytest.mark.parametrize("names", [5, {"one": 1}, [1, None], "ab"])
def test_names_of_classes_that_are_no_words_are_a_sentence(names, tmp_path):
    "The text `ab` would be read as two classes."
    info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
    images = [{"bytes": FILES[0], "path": "a.png"}] * 2
    table = pa.table({"image": images, "label": [0, 1]}).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path/"x.parquet")
    with pytest.raises(ValueError, match="where the names of its classes belong, and not a list of words"):
        import_set(tmp_path, NAMES, tmp_path/"imported")


def test_an_import_that_was_stopped_is_not_mistaken(tmp_path, monkeypatch):
    from bridgexfer import imported_sets
    class_folders(tmp_path/"set")
    with monkeypatch.context() as m:
        m.setattr(imported_sets.pq, "write_table", lambda *_: 1 / 0) # killed between images and index
        with pytest.raises(ZeroDivisionError): import_set(tmp_path/"set", NAMES, tmp_path/"imported", 96)
    class_folders(tmp_path/"again", order=range(11, -1, -1))
    made = import_set(tmp_path/"again", NAMES, tmp_path/"imported", 96)
    of_file = {f: l for f, l in zip(FILES, LABELS)}
    images = made.every()
    assert [of_file[bytes(f)] for f in images.pixels] == images.labels.tolist()


def test_the_command_takes_a_folder_and_needs_no_generator(tmp_path, capsys, caplog):
    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("test", 3), ("", 2)):
        for c in ("cat", "dog"):
            place = tmp_path/"made"/c.title() if not split else tmp_path/"animals"/split/c
            place.mkdir(parents=True)
            for k in range(n): (place/f"{k}.png").write_bytes(png(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    line = ["transfer", str(tmp_path/"animals"), "--profile", "smoke", "--synthetic", str(tmp_path/"made"), "--json",
            "--set", f"runs={tmp_path/'runs'}", "--out", str(tmp_path/"better")]
    assert main(line) == 2
    assert "has 2 images of cat, its smallest class, and 20 of each class are asked for" in capsys.readouterr().err
    assert main([*line, "--images", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2 and "Cat for cat, Dog for dog" in caplog.text
    specs = [read_json(p)["spec"] for p in (tmp_path/"runs").rglob("records/transfer/*.json")]
    named = {(s["synthetic"], s["synthesis"], s["guidance"]) for s in specs if s["pipeline"] == "bridged_pp"}
    [made] = (p for p in (tmp_path/"runs").rglob("import.json"))
    assert named == {(made.parent.name, "imported", 0.)}
