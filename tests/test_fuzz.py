"""Odd folders, odd settings, odd words: a command ends in a sentence and a documented exit code, and loses nothing.

Examples are drawn from a seed and their number. `make fuzz MINUTES=60` goes on for as long as it is told,
with commands
that make images and train among them; a failure names the example,
and BRIDGEXFER_FUZZ_FIRST=<number> begins there."""
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgexfer.cli import app, main

ROOT = Path(__file__).parents[1]
MINUTES = float(os.environ.get("BRIDGEXFER_FUZZ_MINUTES") or 0) # 0: the examples of the suite
FIRST = int(os.environ.get("BRIDGEXFER_FUZZ_FIRST") or 0)
EXAMPLES = 100 # of the suite
LONGEST = 120 # seconds of a command, after which it is interrupted as by Ctrl-C
COMMANDS = tuple(c.callback.__name__ for c in app.registered_commands)
CODES = {0, 1, 2, 130}


# ---- odd folders

CLASSES = ("one", "three", "0", "n01440764", "{}", "{0}", "%s", "it's", 'a "b"', "owl 🦉", "x" * 200, ".hidden",
           "-rf", " one", "two ", "a\nb", "train", "test", "val", "__MACOSX", "@eaDir", "ONE", "Ünï",
           "$(touch pwned)", "names", "a\\b", "<b>", "é", "e\u0301", "one.png", "\udcff", "\u202eeno", "CON", "~",
           "*")


def picture(rng, size=(40, 40), mode="RGB"):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(rng.randrange(10**6)).integers(0, 256, shape, np.uint8))


def saved(image, format, **how):
    image.save(out := io.BytesIO(), format, **how)
    return out.getvalue()


def file(rng):
    "The name and content of a file that may be an image."
    whole = saved(picture(rng), "PNG")
    return rng.choice([
        ("a.png", whole), ("b.jpg", saved(picture(rng), "JPEG")), ("c.PNG", saved(picture(rng, mode="L"), "PNG")),
        ("d.png", whole[:len(whole) // 2]), ("e.png", b""), ("f.jpg", b"no image"), ("g.heic", b"from a telephone"),
        ("h.png", saved(picture(rng, (1, 1)), "PNG")), ("i.png", saved(picture(rng, (300, 2)), "PNG")),
        ("j.gif", saved(picture(rng).convert("P"), "GIF")), ("k.webp", saved(picture(rng), "WEBP")),
        ("l.jpg", saved(picture(rng).convert("CMYK"), "JPEG")), ("m.png", saved(Image.new("I;16", (9, 9)), "PNG")),
        ("n.tiff", saved(Image.new("F", (9, 9), float("nan")), "TIFF")), ("._o.png", whole), (".p.png", whole),
        ("q", whole), ("r.png", whole[:16] + b"\xff\xff\xff\xff" * 2 + whole[24:]), ("Thumbs.db", b"\0"),
        ("s.svg", b"<svg/>"), ("t.jpg", saved(picture(rng), "JPEG", exif=b"Exif\0\0" + bytes(9))),
        ("u.png", saved(Image.new("RGBA", (9, 9)), "PNG")), ("v\n.png", whole), ("names.json", b"{}")])


NAMES = (b"{}", b"[]", b"{", b"\xff\xfe", b"[" * 10**5, b'{"one": 1}', b'{"one": ""}', b'{"one": "three"}',
         b'{"no": "x"}', b'{"one": "{}"}', b'{"one": "a\\nb"}', b'{"one": "\\ud800"}', b'{"one": "x", "one": "y"}',
         b"1" * 5000, b"", json.dumps({"one": "very " * 100}).encode(), b'{"0": "tench"}')


def write_class(rng, folder):
    "A class folder with plain images and odd ones, links and folders among them."
    try: folder.mkdir(parents=True)
    except OSError: return # such a name cannot be here, or is there
    for i in range(rng.choice((0, 1, 2, 4, 4, 4))): picture(rng).save(folder/f"{i}.png")
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        name, content = file(rng)
        (folder/name).write_bytes(content)
    odd = rng.random()
    if odd < 0.04: (folder/"pipe.png").symlink_to("/dev/zero")
    elif odd < 0.08: (folder/"gone.png").symlink_to("nowhere")
    elif odd < 0.12: (folder/"circle").symlink_to(folder.parent)
    elif odd < 0.16: (folder/"deep.png").mkdir()
    elif odd < 0.20: os.mkfifo(folder/"fifo.png")
    elif odd < 0.24: (folder/"self.png").symlink_to("self.png")


def write_folder(rng, folder):
    "A user's folder, in one of the ways in which people have them."
    plain = rng.random() < 0.5
    classes = ["one", "three"] if plain else rng.sample(CLASSES, rng.choice((0, 1, 2, 2, 3, 5)))
    tops = rng.choice(((".",), (".",), ("train", "test"), ("train", "test"), ("train",), ("train", "val", "test"),
                       ("training", "testing"), ("a", "b")))
    folder.mkdir()
    for top in tops:
        for c in classes: write_class(rng, folder/top/c)
    if rng.random() < 0.25: (folder/"names.json").write_bytes(rng.choice(NAMES))
    if rng.random() < 0.10: (folder/".follow-links").touch()
    if rng.random() < 0.15:
        name, content = file(rng)
        (folder/name).write_bytes(content)
    return folder


SPEC = dict(names=["one", "three"], weights="0" * 16, model="miniature", steps=2, size=32, shard=2, guidance=3.5,
            seed=0,
            stored_size=32, format="png", prompts=None, init_images="", strength=None, templates="single")
VALUES = (None, [], {}, "", "x", -1, 0, 1.5, 10**30, True, [None], [[]], {"sentences": 1}, ["one", "one"],
          "between-", "given-")


def write_set(rng, folder):
    "A folder that may once have been a synthetic set or a classifier."
    folder.mkdir()
    for name, value in (("spec.json", SPEC), ("import.json", {"spec": SPEC}), ("config.json",
                                                                               {"label_names": ["one", "three"]})):
        changed = {**value, rng.choice([*value]): rng.choice(VALUES)} if rng.random() < 0.8 else rng.choice(VALUES)
        content = json.dumps(changed).encode() if rng.random() < 0.8 else rng.choice(NAMES)
        if rng.random() < 0.6: (folder/name).write_bytes(content)
    for name in ("shard-00000.parquet", "metadata.jsonl", "metadata.csv", "a.parquet", "a.tar", "model.safetensors"):
        if rng.random() < 0.2: (folder/name).write_bytes(rng.choice((*NAMES, b"PAR1", b"file_name,label\nx,y\n",
                                                                     bytes(9))))
    return folder


def state(folder):
    "All that is in a folder: links, folders, and the bytes of files."
    def of(path):
        if path.is_symlink(): return os.readlink(path)
        return path.read_bytes() if path.is_file() else path.is_dir()
    return {path: of(path) for path in folder.rglob("*")}


# ---- odd words

ODD = ("", " ", "-1", "0", "1", "2", "3.5", "1e9", "nan", "inf", "∞", "٣", "1_0", "9" * 30, "9" * 5000, "None",
       "true", "\0", "a" * 5000, "../..", "~", "~nobody/x", "/dev/null", "/proc/self/mem", "me/tiny", "me/tiny@",
       "a/b/c", "\udcff", "🦉", "{}", "%s", "a=b", "=", "|", "full", "tuned", "digits", "registry:digits",
       "registry:", "./digits", "a\nb", "-", "--", "cpu", "cuda", "cuda:99", "meta", "mps", "evening", "smoke",
       "paper", "study", "resnet18", "mini_vit", "png", "0 1", "1 | paper", "1 | nobody | no", "DPM++", "fp16",
       "single", "vanilla", "bridged_pp mixed", "http://localhost:1/a")
KEYS = ("images", "steps", "lr", "lrs", "seeds", "epochs", "stage1_epochs", "guidance", "size", "stored_size",
        "format", "batch", "precision", "scheduler", "generate_batch", "validation", "mixup", "sets", "pipelines",
        "archs", "model", "revision", "clip", "runs", "figures", "data", "shots", "momentum", "tuning_seeds",
        "profile", "dataset", "path", "self", "gpu", "inversion_init", "style_steps", "memory", "nonsense", "",
        "few_seeds", "stage1_lrs", "datasets", "cores")
OPTIONS = { # command -> options with a value; all are tried with others, too
    "check": ("--csv",), "datasets": ("--profile",),
    "invert": ("--images", "--seeds", "--model", "--device", "--profile"),
    "generate": ("--images", "--seeds", "--model", "--device", "--export", "--templates", "--table", "--captions",
                 "--domain", "--prefix", "--suffix", "--negative", "--from-real", "--between", "--strength",
                 "--profile"),
    "compare": ("--arch", "--device"), "leep": ("--arch", "--images"), "curate": ("--share", "--threshold", "--out"),
    "transfer": ("--arch", "--out", "--synthetic", "--images", "--seeds"), "predict": ("--top", "--batch", "--csv"),
    "export": ("--out",), "provenance": ("--profile",)}
FLAGS = ("--json", "--style", "--all", "--repair", "--onnx", "--no-images", "--help", "--nonsense")
OF_SETTINGS = ("plan", "table") # commands that take settings as they are
OF_STUDY = ("invert", "generate", "compare", "leep", "curate", "transfer")
SLOW = ("invert", "compare", "leep", "curate", "transfer") # when nothing is wrong, they compute


def setting(rng, runs):
    key = rng.choice(KEYS)
    value = str(runs) if key == "runs" else rng.choice(ODD)
    return f"{key}={value}" if rng.random() < 0.97 else rng.choice(ODD)


def words(rng, folder, tmp):
    "A command line."
    command = rng.choice(COMMANDS if MINUTES else [c for c in COMMANDS if c not in SLOW])
    if rng.random() < 0.02: command = rng.choice(ODD)
    place = str(folder) if rng.random() < 0.7 else rng.choice(ODD)
    if command in ("verify", "predict", "export"): place = rng.choice((str(tmp/"made"), str(tmp/"made"), place))
    line = [command]
    if command in OF_SETTINGS:
        line += ["profile=smoke", f"runs={tmp/'runs'}"]
        line += [setting(rng, tmp/"runs") for _ in range(rng.choice((0, 1, 1, 2)))]
    elif command != "datasets": line += [place]
    if command in ("compare", "curate", "predict"): line += [rng.choice((str(folder), str(tmp/"made"),
                                                                         rng.choice(ODD)))]
    if command in OF_STUDY:
        line += ["--profile", "smoke", "--set", f"runs={tmp/'runs'}", "--set", "images=4"]
        line += [w for _ in range(rng.choice((0, 0, 1, 2))) for w in ("--set", setting(rng, tmp/"runs"))]
    if command in ("transfer", "curate"): line += ["--out", str(tmp/"out")]
    for option in OPTIONS.get(command, ()):
        if rng.random() < 0.12: line += [option, value_of(rng, option, tmp)]
    line += [flag for flag in FLAGS if rng.random() < (0.3 if flag == "--json" else 0.03)]
    return line


def value_of(rng, option, tmp):
    "What an option is given; what is written goes where nothing of the user's is."
    if option in ("--csv", "--out", "--export"):
        return rng.choice((str(tmp/"new"), str(tmp/"a"/"new"), str(tmp/("n" * 300)), "/dev/full/x",
                           str(tmp/"user"/"names.json"/"x")))
    if option in ("--templates", "--table") and rng.random() < 0.7:
        path = tmp/rng.choice(("given.txt", "given.csv", "given.json"))
        path.write_bytes(rng.choice((*NAMES, b"a photo of a {}.", b"class,prompt\none,a one\nthree,a three\n",
                                     b"\0")))
        return str(path)
    return rng.choice(ODD)


# ---- what has to hold

class Problem(AssertionError): "What is wrong with an example."


def ring(*_): raise KeyboardInterrupt


def call(line, seconds=LONGEST):
    "A command in this process: its exit code and what it prints."
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with redirect_stdout(out), redirect_stderr(err): code = main(line)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return code, out.getvalue(), err.getvalue()


def strict(text):
    def reject(word): raise Problem(f"{word} is not JSON")
    return json.loads(text, parse_constant=reject)


def judge(line, code, out, err):
    "Raise unless a command ended as documented."
    if "Traceback" in out + err: raise Problem("a traceback")
    if code not in CODES: raise Problem(f"exit code {code}")
    if code in (2, 130) and (out or not err.strip()): raise Problem("no sentence on standard error, or an output")
    if code == 2 and len([text for text in err.splitlines() if text.startswith("bridgexfer: ")]) != 1:
        raise Problem("not one sentence")
    if code in (0, 1) and "--json" in line and "--help" not in line and line[0] != "provenance": strict(out)


def example(number, tmp):
    "One command on one folder."
    rng = random.Random(f"bridgexfer {number}")
    user = write_folder(rng, tmp/"user")
    write_set(rng, tmp/"made")
    before = {**state(user), **state(tmp/"made")}
    line = words(rng, user, tmp)
    seconds = rng.uniform(0.1, 20) if MINUTES and rng.random() < 0.2 else LONGEST
    try: judge(line, *(said := call(line, seconds)))
    except BaseException as e:
        shown = [word if len(word) < 200 else f"{word[:20]}…" for word in line]
        kept = said[1:] if "said" in locals() else ()
        raise Problem(f"example {number}: {type(e).__name__}: {e}\n{shown}\n{kept}") from e
    after = {**state(user), **state(tmp/"made")}
    if changed := [str(path) for path, content in before.items() if after.get(path) != content]:
        raise Problem(f"example {number}: {changed} changed: {line}")
    if left := [*tmp.rglob("*.part")]: raise Problem(f"example {number}: {left} were left by {line}")


def numbers():
    "The examples that are tried."
    end = time.monotonic() + 60 * MINUTES
    for number in count(FIRST):
        if MINUTES and time.monotonic() > end or not MINUTES and number >= FIRST + EXAMPLES: return
        yield number


def import_everything():
    "An interrupted import breaks a module for the rest of a process, which a command does not live to see."
    for path in sorted((ROOT/"bridgexfer").rglob("*.py")):
        import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for line in ("generate digits", "leep digits", "compare digits nowhere"): main([*line.split(), "--profile", "none"])
    for name in ("diffusers", "transformers", "timm", "sklearn.metrics", "seaborn", "matplotlib.pyplot",
                 "scipy.stats"):
        import_module(name)


def problems(folder):
    "What is wrong with the first few examples that fail."
    found = []
    for number in numbers():
        (folder/str(number)).mkdir()
        try: example(number, folder/str(number))
        except Problem as e:
            print(e, flush=True)
            found.append(str(e))
        shutil.rmtree(folder/str(number))
        if len(found) == 20: break
    return found


def test_odd_folders_and_odd_words(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("BRIDGEXFER_DEBUG", raising=False)
    before = {*os.listdir(ROOT)}
    if MINUTES: import_everything()
    found = problems(tmp_path)
    assert not found, "\n\n".join(found)
    assert {*os.listdir(ROOT)} <= before | {"runs", "data"}


# ---- odd surroundings

CODE = 'import sys; from bridgexfer.cli import main; sys.exit(main())'
SURROUNDINGS = { # variables, and what a shell does first
    "a locale without UTF-8": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ""),
    "no standard error": ({}, "exec 2>&-;"), "no streams": ({}, "exec 0<&- 1>&- 2>&-;"),
    "no home": ({"HOME": None}, ""), "a folder that is gone": ({}, "mkdir gone; cd gone; rmdir ../gone;"),
    "a narrow terminal": ({"COLUMNS": "1", "TERM": "dumb"}, ""),
    "no folder for temporary files": ({"TMPDIR": "/nowhere"}, "")}


@pytest.mark.parametrize("where", SURROUNDINGS)
def test_odd_surroundings(where, tmp_path):
    user = write_folder(random.Random("surroundings"), tmp_path/"user 🦉")
    before = state(user)
    variables, first = SURROUNDINGS[where]
    env = {k: v for k, v in {**os.environ, "PYTHONPATH": str(ROOT), **variables}.items() if v is not None}
    words = [sys.executable, "-c", CODE, "check", str(user), "--json"]
    done = subprocess.run(["bash", "-c", f'{first} exec "$@"', "bash", *words], cwd=tmp_path, env=env,
                          capture_output=True)
    err = done.stderr.decode(errors="replace")
    assert done.returncode in (0, 1, 2) and "Traceback" not in err, err
    if done.returncode < 2 and where != "no streams": strict(done.stdout)
    assert state(user) == before
