"""Models of the user's that are damaged or lack something: named, with what to do, before anything is made."""
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bridgexfer.artefacts import PACKAGE, read_json, read_tensors
from bridgexfer.cli import main
from bridgexfer.clip_tuning import load_clip
from bridgexfer.finetune import elapsed
from bridgexfer.generation import check_lengths
from bridgexfer.models import LORA_FILE, find_family, load_pipeline, lora_digest, lora_name, opened_from, read_tokens
from bridgexfer.study.settings import load_settings, parse
from bridgexfer.user_prompts import open_captioner

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(model, tmp_path): return Path(shutil.copytree(model, tmp_path/"mine"))


def change(path, **values):
    "JSON with other values; None leaves a key out."
    found = {**read_json(path), **values}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def refused(match, what, *words):
    with pytest.raises(OSError, match=match): what(*words)


# ---- configurations

@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"_class_name": []}', '{"_class_name": 5, "unet": []}'])
def test_a_model_index_that_is_none_is_named(folder, text):
    (folder/"model_index.json").write_text(text)
    refused("mine is not a whole text-to-image model .*: copy it again", load_pipeline, str(folder))
    if "_class_name" not in text: refused("is not a whole text-to-image", find_family, str(folder))


@pytest.mark.parametrize(("file", "values"), [
    ("model_index.json", {"_class_name": "Nonsense"}), ("model_index.json", {"unet": ["diffusers", "Nonsense"]}),
    ("scheduler/scheduler_config.json", {"beta_schedule": "nonsense"}), ("unet/config.json", {"act_fn": "nonsense"}),
    ("text_encoder/config.json", {"hidden_size": 64}), ("text_encoder/config.json", {"hidden_act": "nonsense"})])
def test_whatever_the_libraries_raise_is_one_sentence(folder, file, values):
    change(folder/file, **values)
    with pytest.raises(OSError, match="is not a whole text-to-image model") as e: load_pipeline(str(folder))
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "unet/config.json"])
def test_damage_is_wrong_input_and_no_bug(folder, file, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (folder/file).write_bytes(content)
    words = ["generate", "digits", "--profile", "smoke", "--set", f"runs={tmp_path}/runs", "--model", str(folder)]
    assert main(words) == 2 and not list(tmp_path.rglob("shard-*"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bridgexfer: ")]
    assert len(said) == 1 and str(folder) in said[0] and "delete it and run again" not in said[0]


def test_a_tokenizer_without_a_limit_is_named(folder):
    change(folder/"tokenizer"/"tokenizer_config.json", model_max_length=None)
    with pytest.raises(ValueError, match='tokenizer_config.json, as in "model_max_length": 77'):
        check_lengths(load_pipeline(str(folder)), ["a"])


def test_too_little_memory_is_not_taken_for_damage():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)), opened_from(Path("a"), None, "clip"): raise error


# ---- weights

@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_missing_weights_are_not_random_numbers(folder, part):
    file = next((folder/part).glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[len(weights) // 2]
    save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
    refused(f"weights are missing, {name} among them", load_pipeline, str(folder))


def test_a_clip_that_lacks_weights_or_is_of_another_size(tmp_path):
    folder = shutil.copytree(PACKAGE/"weights"/"clip", tmp_path/"clip")
    change(folder/"config.json", projection_dim=None)
    refused("clip is not a whole CLIP .the weights have not the sizes", load_clip, str(folder))


def test_damaged_tensors_are_named(tmp_path):
    (tmp_path/"state.safetensors").write_bytes(b"torn")
    (tmp_path/"learned_embeds.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=f"{tmp_path}/state.* is not safetensors .*: delete it and run again"):
        read_tensors(tmp_path/"state.safetensors")
    with pytest.raises(ValueError, match="state.safetensors is not the whole state of a training"):
        elapsed(tmp_path/"state.safetensors")
    save_file({}, tmp_path/"state.safetensors") # whole, and of something else
    with pytest.raises(ValueError, match="state.safetensors is not the whole state of a training"):
        elapsed(tmp_path/"state.safetensors")
    with pytest.raises(ValueError, match="learned_embeds.* is not safetensors .*: learn the token again"):
        read_tokens(tmp_path, 96)


def test_a_record_of_a_lora_without_its_hash(tmp_path):
    save_file({}, tmp_path/LORA_FILE)
    found = lora_digest(tmp_path)
    (tmp_path/"lora.json").write_text(json.dumps({"digest": found}))
    assert lora_name(tmp_path) == found


@pytest.mark.parametrize("name", ["/no/such/folder", "me/tiny", "", str(PACKAGE/"weights"/"clip")])
def test_a_captioner_that_is_none_is_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="Cannot open the image-to-text model .*such as BLIP") as e: open_captioner(name)
    assert len(str(e.value).splitlines()) == 1


# ---- settings

@pytest.mark.parametrize(("key", "value"), [("precision", "fp16"), ("format", "gif"), ("offload", "all"),
                                            ("scheduler", "DPM"), ("scheduler", "ddim")])
def test_words_of_settings_are_checked_before_anything_is_planned(key, value, capsys):
    with pytest.raises(ValueError, match=f"{key} is .* or .*, got '{value}'"): load_settings("smoke", **{key: value})
    assert main(["plan", "profile=smoke", f"{key}={value}"]) == 2 and f"got '{value}'" in capsys.readouterr().err


def test_numbers_that_nobody_means_are_rejected():
    with pytest.raises(ValueError, match="images is ten million at most, got '9999"): parse("images", "9" * 30)
    assert parse("seeds", "20261127") == 20261127 and parse("memory", "1e9") == 1e9


def test_settings_know_what_the_library_offers():
    "They are written out where shells complete them, which must not wait for torch."
    from bridgexfer.generation import FORMATS, SCHEDULERS
    from bridgexfer.models import OFFLOADS, PRECISIONS
    from bridgexfer.study.settings import CHOOSE
    known = dict(scheduler=SCHEDULERS, precision=PRECISIONS, format=FORMATS, offload=OFFLOADS)
    assert {k: CHOOSE[k] for k in known} == {k: tuple(v) for k, v in known.items()}
