"""After `transfer`: predictions of files are those of the test images, and what cannot be read is reported."""
import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from test_own_images import write

from bridgexfer import classifier
from bridgexfer.classifier import export_onnx, image_paths, open_classifier, predict_files
from bridgexfer.cli import main
from bridgexfer.datasets import folder_files

ROOT = Path(__file__).parents[1]
TINY = ["--profile", "smoke", "--images", "20", "--seeds", "0 1", "--arch", "mini_resnet10", "--set", "lr=0.05"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder of images, and the classifier that `transfer` leaves: (folder, kept)."
    home = tmp_path_factory.mktemp("made")
    folder = write(home/"my digits", (8, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        code = main(["transfer", str(folder), *TINY, "--set", f"runs={home}/runs", "--out", str(home/"better")])
    assert code == 0
    return folder, home/"better"


def said_by(capsys, *argv):
    code = main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, err


def test_test_images_get_the_predictions_of_the_comparison(made):
    folder, kept = made
    runs = kept.parent/"runs"/"smoke"/"records"/"transfer"
    recorded = json.loads((runs/f"{json.loads((kept/'outcome.json').read_text())['run']['hash']}.json").read_text())
    paths = [p for of_class in folder_files(folder)["test"].values() for p in of_class]
    opened = open_classifier(kept)
    found = [opened.names.index(p.classes[0]) for p in predict_files(opened, paths, batch=5)]
    assert found == recorded["result"]["predictions"] and len(set(found)) > 1


def test_images_above_the_stored_size_are_read_as_a_dataset_reads_them(made, tmp_path):
    opened = open_classifier(made[1])
    assert opened.stored_size == 32
    large = Image.fromarray(np.random.default_rng(0).integers(256, size=(300, 200, 3), dtype=np.uint8))
    large.save(tmp_path/"large.png")
    turned = large.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6 # the viewer turns it by 90° clockwise
    turned.save(tmp_path/"turned.png", exif=exif)
    upright, same = predict_files(opened, [tmp_path/"large.png", tmp_path/"turned.png"], top=2)
    assert upright.classes == same.classes and np.allclose(upright.probabilities, same.probabilities, atol=1e-3)


def test_unreadable_files_are_reported_and_the_rest_is_done(made, tmp_path, capsys):
    folder, kept = made
    (tmp_path/"broken.png").write_bytes(b"no image")
    files = [tmp_path/"gone.png", *sorted((folder/"test"/"one").iterdir()), tmp_path]
    code, out, _ = said_by(capsys, "predict", kept, *files, "--json", "--csv", tmp_path/"found.csv")
    rows = json.loads(out)
    errors = [r["error"] for r in rows if "error" in r]
    assert code == 1 and len(rows) == 8 and len(errors) == 2
    assert "is missing" in errors[0] and "cannot be read as an image" in errors[1]
    with open(tmp_path/"found.csv", newline="") as f: table = list(csv.DictReader(f))
    assert [bool(r["error"]) for r in table] == ["error" in r for r in rows]
    assert [r["class"] for r in table] == [r.get("class", "") for r in rows]
    code, out, _ = said_by(capsys, "predict", kept, *files)
    assert code == 1 and "2 of 8 files could not be read" in out and "probability" in out


def test_a_list_on_standard_input(made, monkeypatch, capsys):
    folder, kept = made
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{folder}/test/one\n{folder}/test/thr*/*.png\n"))
    code, out, _ = said_by(capsys, "predict", kept, "-", "--top", 2, "--batch", 5, "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 12 and all(len(r["top"]) == 2 for r in rows)
    assert all(np.isclose(sum(t["probability"] for t in r["top"]), 1, atol=1e-5) for r in rows)


def test_odd_names_are_files_and_not_patterns(tmp_path):
    for name in ("a[1].png", "b.PNG", ".hidden.png", "._a.png"): (tmp_path/name).write_bytes(b"")
    assert image_paths([str(tmp_path/"a[1].png")]) == [tmp_path/"a[1].png"]
    assert image_paths([str(tmp_path)]) == [tmp_path/"a[1].png", tmp_path/"b.PNG"]


@pytest.mark.parametrize(("argv", "said"), [
    (["predict", "no such folder", "a.png"], "There is no folder no such folder"),
    (["predict", "nbs", "a.png"], "config.json is missing"),
    (["predict", "{kept}", "-"], "No images were given"),
    (["predict", "{kept}", "a.png", "--top", "0"], "top and batch are 1 or more"),
    (["predict", "{kept}"], "Missing argument"),
    (["export", "{kept}"], "give --onnx"),
    (["export", "{kept}", "--onnx", "--out", "README.md"], "README.md exists already")])
def test_wrong_input_is_one_sentence_and_exit_code_2(argv, said, made, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(classifier, "check_onnx", lambda: None)
    code, out, err = said_by(capsys, *[a.format(kept=made[1]) for a in argv])
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1 and not out


@pytest.mark.parametrize(("name", "content", "said"), [
    ("config.json", "{", "is not JSON"),
    ("config.json", '{"architecture": "resnet1800", "label_names": ["a"]}', "cannot be opened as a timm model"),
    ("config.json", '{"architecture": "resnet18"}', "has no label_names"),
    ("model.safetensors", "damaged", "SafetensorError")])
def test_a_damaged_classifier_is_one_sentence(name, content, said, made, tmp_path, capsys):
    broken = tmp_path/"broken"
    broken.mkdir()
    for needed in classifier.NEEDED: (broken/needed).write_bytes((made[1]/needed).read_bytes())
    (broken/name).write_text(content)
    code, out, err = said_by(capsys, "predict", broken, "a.png")
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1 and not out


def test_missing_onnx_is_one_sentence(made, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "find_spec", lambda name: None)
    code, _, err = said_by(capsys, "export", made[1], "--onnx")
    assert code == 2 and "pip install 'bridgexfer[onnx]'" in err and len(err.strip().splitlines()) == 1
    assert not list(made[1].glob("*.onnx"))


def test_a_wrong_export_is_not_kept(made, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(classifier, "to_onnx", lambda *_: type("Graph", (), {"SerializeToString": lambda _: b""})())
    monkeypatch.setattr(classifier, "onnx_difference", lambda *_: float("nan"))
    with pytest.raises(ArithmeticError, match="was not kept"): export_onnx(open_classifier(made[1]), tmp_path/"m.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_agrees_with_torch(made, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, kept = made
    code, out, _ = said_by(capsys, "export", kept, "--onnx", "--out", tmp_path/"m.onnx", "--json")
    assert code == 0 and json.loads(out)["difference"] < 1e-4
    session = onnxruntime.InferenceSession(tmp_path/"m.onnx")
    paths = sorted((folder/"test"/"three").iterdir())
    x = np.stack([np.asarray(Image.open(p).convert("RGB"), np.float32) for p in paths]).transpose(0, 3, 1, 2) / 255
    [p] = session.run(None, {"images": x})
    ours = [r.probabilities for r in predict_files(open_classifier(kept), paths, top=1)]
    assert np.allclose(p.max(1), [o[0] for o in ours], atol=.02) # predictions are computed in bfloat16


def test_transfer_leaves_a_report(made):
    text = (made[1]/"report.html").read_text(encoding="utf-8")
    outcome = json.loads((made[1]/"outcome.json").read_text())
    assert outcome["verdict"] in text and "generating synthetic images" in text and "training and testing" in text
    assert "Stage 1, on synthetic images" in text and text.count("image/jpeg") == 2 * 2 * 3


def test_the_card_is_as_the_hub_reads_it(made):
    card = ModelCard.load(made[1]/"README.md")
    assert card.data.library_name == "timm" and card.data.pipeline_tag == "image-classification"
    outcome = json.loads((made[1]/"outcome.json").read_text())
    mean = next(p["mean"] for p in outcome["pipelines"] if p["pipeline"] == outcome["winner"])
    assert abs(card.data.eval_results[0].metric_value - mean) < 1e-4
    assert outcome["verdict"] in card.text and "bridgexfer predict better" in card.text
