"""Prompts of the user's: order changes nothing, old sets keep their hashes, and captions see training images alone."""
import json
from dataclasses import replace

import numpy as np
import pytest

from bridgexfer import user_prompts as module
from bridgexfer.artefacts import PACKAGE, address, read_json, spec_hash
from bridgexfer.cli import main
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import few_shot
from bridgexfer.generation import SynthesisSpec, plan
from bridgexfer.images import as_images
from bridgexfer.synthetic_sets import SyntheticSet, all_prompts, facts, generate, read_spec
from bridgexfer.user_prompts import UserPrompts, caption, caption_table, read_table, read_templates, user_prompts

NAMES = ("cat", "dog")


def command(folder):
    "`bridgexfer generate`, as small as it goes, into a folder."
    small = ["--profile", "smoke", "--images", "1", "--device", "cpu"]
    return ["generate", "digits", *small, "--set", f"runs={folder}"]


def spec_of(prompts=None, **fields):
    return SynthesisSpec(NAMES, "w", steps=2, size=32, shard=2, prompts=prompts, **fields)


def test_a_spec_without_prompts_has_the_hash_it_always_had():
    "The address of the fields that there were before, by name."
    before = ("names", "weights", "templates", "style", "scheduler", "steps", "guidance", "size", "stored_size",
              "format", "precision", "seed", "shard", "version", "class_words", "token_hash", "init_images", "strength")
    spec = spec_of()
    assert spec_hash(spec) == address("SynthesisSpec", {k: getattr(spec, k) for k in before})


def test_the_order_of_lines_changes_nothing(tmp_path):
    lines = ["a {} in the snow", "a {} at night", "a {}, blurred"]
    sets = []
    for some in (lines, lines[::-1], [*lines, lines[0], "", "# winter"]):
        (tmp_path/"t.txt").write_text("\n".join(some), encoding="utf-8")
        sets.append(spec_of(user_prompts(NAMES, read_templates(tmp_path/"t.txt"))))
    assert len({spec_hash(s) for s in sets}) == 1 and plan(sets[0], 0, 50) == plan(sets[1], 0, 50)
    assert {r.prompt for r in plan(sets[0], 0, 50) if not r.label} == {s.format("cat") for s in lines}
    rows = [("dog", "a dog"), ("cat", "x"), ("cat", "y")]
    tables = []
    for some in (rows, rows[::-1]):
        (tmp_path/"t.csv").write_text("class,prompt\n" + "".join(f"{c},{p}\n" for c, p in some), encoding="utf-8")
        tables.append(spec_of(UserPrompts(read_table(tmp_path/"t.csv", NAMES))))
    (tmp_path/"t.json").write_text(json.dumps({"dog": ["a dog"], "cat": ["y", "x"]}), encoding="utf-8")
    tables.append(spec_of(UserPrompts(read_table(tmp_path/"t.json", NAMES))))
    assert len({spec_hash(s) for s in tables}) == 1


def test_every_part_of_the_prompts_is_in_the_hash():
    ways = [{}, dict(sentences=["a {}"]), dict(domain="an animal"), dict(prefix="x"), dict(suffix="x"),
            dict(negative="text"), dict(table=[["a {}"], ["b"]]), dict(table=[["b"], ["a {}"]])]
    hashes = [spec_hash(spec_of(user_prompts(NAMES, **way))) for way in ways]
    assert len({*hashes, spec_hash(spec_of())}) == len(ways) + 1


def test_learned_words_fill_the_holes():
    given = spec_of(user_prompts(NAMES, ["a {} in ink"]), class_words=("<a>", "<b>"), token_hash="5d")
    assert {r.prompt for r in plan(given, 0, 3)} == {"a <a> in ink", "a <b> in ink"}


def test_a_set_is_made_and_found_again(pipe, model, tmp_path):
    "A negative prompt and prompts change the images; the set's own file gives the spec back."
    from bridgexfer.generation import synthesis_spec
    plain = synthesis_spec(model, ["three", "seven"], steps=2, size=32, shard=1)
    sets = [replace(plain, prompts=user_prompts(plain.names, ["a {}"], negative=away)) for away in ("", "colours")]
    made = [generate(s, tmp_path, 1, pipe=pipe, progress=False) for s in sets]
    assert not np.array_equal(made[0].images().pixels, made[1].images().pixels)
    assert read_spec(made[1].folder) == sets[1] and SyntheticSet(made[1].folder).verify() == []
    assert all_prompts(sets[1]) == ["a three", "a seven", "colours"] and "not “colours”" in facts(sets[1], 1)["Prompts"]
    long = replace(plain, prompts=user_prompts(plain.names, ["a {}"], negative="very " * 90))
    with pytest.raises(ValueError, match="longer than the"): generate(long, tmp_path, 1, pipe=pipe, progress=False)


@pytest.mark.parametrize(("name", "text", "said"), [
    ("t.txt", "", "has no template"), ("t.txt", "a photo", "needs one {}"), ("t.txt", "{} {}", "needs one {}"),
    ("t.json", "[", "is not JSON"), ("t.json", '{"cat": 3}', "does not map"), ("t.json", "3", "does not map"),
    ("t.json", "[1, 2]", "does not map"),
    ("t.json", '{"cat": "a"}', "no prompt for dog"), ("t.json", '{"cow": "a"}', "is no class: cat, dog"),
    ("t.csv", "a,b\n", "needs the columns"), ("t.csv", "", "needs the columns"),
    ("t.csv", "class,prompt\ncat,\n", "no prompt"),
    ("t.xls", "", "neither .json nor .csv")])
def test_files_with_mistakes_are_one_sentence(tmp_path, name, text, said):
    (tmp_path/name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said.replace("{", "\\{").replace("}", "\\}")) as e:
        read_templates(tmp_path/name) if name.endswith("txt") else read_table(tmp_path/name, NAMES)
    assert str(tmp_path/name) in str(e.value) and "\n" not in str(e.value)


def test_specs_that_contradict_themselves():
    prompts = user_prompts(NAMES, ["a {}"])
    with pytest.raises(ValueError, match="and not both"): spec_of(prompts, templates="style", style="chalk")
    with pytest.raises(ValueError, match="and lacks them"): spec_of(templates="given-0123")
    with pytest.raises(ValueError, match="for 2 classes, the set has 1"): SynthesisSpec(["cat"], "w", prompts=prompts)


# ---- captions

@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    "A tiny image-to-text model with random weights."
    from transformers import AutoTokenizer, CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor
    folder = tmp_path_factory.mktemp("captioner")
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE/"weights/pipeline/tokenizer")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    vision = dict(small, image_size=32, patch_size=16)
    config = GitConfig(vision_config=vision, vocab_size=len(tokenizer), **small, **ends)
    GitForCausalLM(config).save_pretrained(folder)
    sizes = dict(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    GitProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_any_image_to_text_model_captions(captioner):
    images = load_dataset("digits").train.take(np.arange(3))
    said = caption(images, captioner, batch=2)
    assert len(said) == 3 and said == caption(images, captioner, batch=2)
    table = caption_table(images, said)
    assert sum(map(len, table)) == 3 and all(s.startswith("{}") for some in table for s in some)


def test_captions_are_of_training_images_of_the_shots_alone(monkeypatch, tmp_path):
    "The command captions the images of its run: all of train, or the k of --from-real; never one of test."
    digits = load_dataset("digits")
    seen = []
    monkeypatch.setattr(module, "caption", lambda images, model, **how: seen.append(images) or ["grey"] * len(images))
    fixed = command(tmp_path)
    assert main([*fixed, "--captions", "some/model", "--json"]) == 0
    assert main([*fixed, "--captions", "some/model", "--from-real", "2"]) == 0
    assert seen[0].digest == digits.train.digest and seen[1].digest == few_shot(digits.train, 2, 0).digest


def test_the_command_takes_prompts(tmp_path, capsys):
    (tmp_path/"t.txt").write_text("a {} in ink\n", encoding="utf-8")
    fixed = command(tmp_path)
    given = ["--templates", str(tmp_path/"t.txt"), "--domain", "a digit", "--negative", "text"]
    assert main([*fixed, *given, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["folder"]
    spec = read_json(f"{made}/spec.json")
    assert spec["prompts"] == {"sentences": [["a {} in ink, a digit"]] * 10, "negative": "text"}
    assert main([*fixed, "--templates", "t.txt", "--table", "t.csv"]) == 2
    assert main([*fixed, "--templates", str(tmp_path/"none.txt")]) == 2
    assert main([*fixed, "--style", "--domain", "a digit", "--set", "style_steps=1"]) == 2


def test_captions_of_nothing_leave_the_name():
    images = as_images(np.zeros((2, 8, 8, 3)), [0, 1], NAMES)
    assert caption_table(images, ["", "at play"]) == (("{}",), ("{}: at play",))
