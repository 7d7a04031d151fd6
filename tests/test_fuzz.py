"""Odd folders, odd settings, odd words: a command ends in a sentence and a documented exit code, and loses nothing.

Examples are drawn from a seed and their number. `make fuzz MINUTES=60` goes on for as long as it is told,
with commands
that make images and train among them; a failure names the example,
and BRIDGEXFER_FUZZ_FIRST=<number> begins there."""
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from timm.models import save_for_hf

from bridgexfer.artefacts import PACKAGE, write_json
from bridgexfer.backbones import create_backbone
from bridgexfer.cli import app, main
from bridgexfer.clip_tuning import load_clip
from bridgexfer.own_images import timm_config

ROOT = Path(__file__).parents[1]
MINUTES = float(os.environ.get("BRIDGEXFER_FUZZ_MINUTES") or 0) # 0: the examples of the suite
FIRST = int(os.environ.get("BRIDGEXFER_FUZZ_FIRST") or 0)
EXAMPLES = 100 # of the suite
LONGEST = 120 # seconds of a command, after which it is interrupted as by Ctrl-C
COMMANDS = tuple(c.callback.__name__ for c in app.registered_commands)
CODES = {0, 1, 2, 130}
CODE = 'import sys; from bridgexfer.entry import main; sys.exit(main())'


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


# ---- the same in other layouts

LABELS = ("one", "three", "one", "three", "", " ", "0", 0, 1, None, 7.5, "a/b", "..", "x" * 300, "\ud800", [1],
          {"a": 1}, True, "owl 🦉", "\0")
FILE_NAMES = ("a.png", "one/b.png", "../a.png", "/etc/passwd", "", "no.png", "\0", "\ud800.png", "n" * 300 + ".png",
              "one", None, 5)


def listing(rng, rows, folder):
    "A table of metadata that names files and classes."
    name = rng.choice(("metadata.csv", "metadata.jsonl", "labels.csv"))
    keys = (rng.choice(("file_name", "file", "image", "nonsense")), rng.choice(("label", "class", "nonsense")), "split")
    values = [dict(zip(keys, (file, label, rng.choice(("train", "test"))))) for file, _, label in rows]
    if rng.random() < 0.5: values = [{k: v for k, v in row.items() if k != "split"} for row in values]
    if rng.random() < 0.2: values[0][keys[0]] = rng.choice(FILE_NAMES)
    lines = [json.dumps(row) for row in values]
    if name.endswith(".csv"): lines = [",".join(values[0]), *(",".join(map(str, row.values())) for row in values)]
    (folder/name).write_text("\n".join(lines), encoding="utf-8", errors="replace")


def parquet(rng, rows, folder):
    "A Parquet file of images, as the `datasets` library writes it or nearly so."
    images = [{"bytes": content, "path": file} for file, content, _ in rows]
    if rng.random() < 0.1: images[-1] = rng.choice((None, {"bytes": None, "path": "a.png"}, {"bytes": b"", "path": ""}))
    labels = [label for *_, label in rows]
    feature = {"_type": "ClassLabel", "names": rng.choice((["one", "three"], ["one"], None, 5, {}, [1, None], "ab"))}
    features = json.dumps({"info": {"features": {"label": rng.choice((feature, feature, 5, None))}}})
    if rng.random() < 0.5: labels = [rng.choice((0, 1, 0, 1, 2, -1)) for _ in rows]
    if rng.random() < 0.1: images = [str(image) for image in images]
    try: table = pa.table({"image": images, rng.choice(("label", "label", "class", "other")): labels})
    except (pa.ArrowException, UnicodeError, OverflowError): return # such columns cannot be
    if rng.random() < 0.6: table = table.replace_schema_metadata({"huggingface": features})
    pq.write_table(table, folder/rng.choice(("a.parquet", "train-0.parquet")), row_group_size=rng.choice((1, 3, 100)))


def archive(rng, rows, folder):
    "A shard of WebDataset, or nearly so."
    with tarfile.open(folder/rng.choice(("a.tar", "train-0.tar")), "w") as tar:
        for i, (file, content, label) in enumerate(rows):
            parts = {Path(file).suffix: content}
            kind = rng.choice((".cls", ".cls", ".json", ".txt", ""))
            text = json.dumps({"label": label}) if kind == ".json" else str(label)
            if kind: parts[kind] = text.encode(errors="replace")
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{rng.choice(('', '', 'a/', '../'))}{i:04d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_layout(rng, folder):
    "A user's images in a table, Parquet or archive."
    folder.mkdir()
    rows = []
    for i in range(rng.choice((0, 1, 8, 8, 8))):
        label = ("one", "three")[i % 2] if rng.random() < 0.9 else rng.choice(LABELS)
        name, content = (f"{i}.png", saved(picture(rng), "PNG")) if rng.random() < 0.9 else file(rng)
        (folder/name).write_bytes(content)
        rows.append((name, content, label))
    writer = rng.choice((listing, parquet, archive))
    if rows: writer(rng, rows, folder)
    if writer is not listing:
        for name, *_ in rows: (folder/name).unlink(missing_ok=True)
    if rng.random() < 0.3: damage(rng, folder)
    return folder


SETTINGS_FILES = (b"images = 4", b"images = many", b"[evening]\nimages = 4", b"[nobody]\na = 1", b"\xff", b"=",
                  b"images", b"profile = smoke\nflip = yes", b"profile = nobody", b"runs = /proc/x",
                  b"images = 4\nimages = 5",
                  b"crop = 0.5 | paper | why", b"nonsense = 1", b"\0", b"[smoke]\nbalance = weights\nmetric = top2")

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


# ---- what a command has made, and something has damaged since

HERE = ("--profile", "smoke", "--set", "images=4", "--set", "steps=2")


@cache
def whole(kind):
    "An undamaged folder of a kind, made once."
    folder = Path(mkdtemp(prefix="bridgexfer-fuzz-"))/kind
    if kind in ("pipeline", "clip"): shutil.copytree(PACKAGE/"weights"/kind, folder)
    if kind == "clip": load_clip("miniature").processor.save_pretrained(folder)
    if folder.exists(): return folder
    if kind == "classifier": return write_classifier(folder)
    runs = ("--set", f"runs={folder}")
    commands = {"set": ["generate digits"], "lora": ["lora digits"], "token": ["invert digits"],
                "runs": ["generate digits", "lora digits", "invert digits", "generate digits --style"]}
    for command in commands[kind]: assert call([*command.split(), *HERE, *runs], 3600)[0] == 0
    markers = {"set": "spec.json", "lora": "lora.json", "token": "inversion.json"}
    return next(folder.rglob(markers[kind])).parent if kind in markers else folder


def write_classifier(folder):
    "What `transfer` keeps of a classifier."
    model = create_backbone("mini_resnet10", 2)
    labels = dict(label_names=["one", "three"])
    save_for_hf(model, folder, model_config=labels, data_config=timm_config(model, 32), safe_serialization=True)
    write_json(folder/"outcome.json", {"stored_size": 32})
    return folder


def another(rng, value):
    "JSON with a key or a value changed, somewhere inside."
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        keys = list(value if isinstance(value, dict) else range(len(value)))
        key = rng.choice(keys)
        if rng.random() < 0.3: return type(value)(v for v in value.items() if v[0] != key) if isinstance(
            value, dict) else value[1:]
        changed = another(rng, value[key])
        return {**value, key: changed} if isinstance(value, dict) else [*value[:key], changed, *value[key + 1:]]
    return rng.choice(VALUES)


def damage(rng, folder):
    "Damage one file in some way."
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if not files: return
    path = rng.choice(files)
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    if path.suffix == ".json" and rng.random() < 0.7:
        try: return path.write_text(json.dumps(another(rng, json.loads(data))))
        except (ValueError, RecursionError): pass # it is damaged already
    if (done := rng.random()) < 0.15: return path.unlink()
    if done < 0.25: return path.write_bytes(rng.choice(NAMES))
    if done < 0.5: return path.write_bytes(data[:at])
    if done < 0.75: return path.write_bytes(data[:at] + rng.randbytes(9) + data[at + 9:])
    if done < 0.9: return path.write_bytes(data[:min(at, 500)] + rng.randbytes(9) + data[min(at, 500) + 9:]) # a header
    path.unlink()
    path.mkdir()


KINDS = ("set", "classifier", "classifier", "lora", "token", "pipeline", "clip")


def write_made(rng, folder):
    "A folder that a command has made, most often damaged."
    if rng.random() < 0.3: return write_set(rng, folder)
    shutil.copytree(whole(rng.choice(KINDS)), folder)
    for _ in range(rng.choice((0, 1, 1, 1, 2))): damage(rng, folder)
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
        "few_seeds", "stage1_lrs", "datasets", "cores", "flip", "crop", "rotation", "grey", "balance", "metric",
        "fill", "lora_steps", "lora_rank", "lora_lr", "lora_batch", "lora_datasets", "repeats", "mix_weights",
        "real_shares", "keeps", "inversion_lr", "inversion_batch", "weight_decay", "hours", "offload", "style_steps",
        "arch_pipelines", "more_archs", "volume_datasets", "volumes", "style_shots", "jobs_per_sweep", "table_gpu")
OPTIONS = { # command -> options with a value; all are tried with others, too
    "check": ("--csv",), "datasets": ("--profile",), "lora": ("--seeds", "--model", "--device"),
    "invert": ("--images", "--seeds", "--model", "--device", "--profile"),
    "generate": ("--images", "--seeds", "--model", "--device", "--export", "--templates", "--table", "--captions",
                 "--domain", "--prefix", "--suffix", "--negative", "--from-real", "--between", "--strength",
                 "--lora", "--lora", "--lora-scale", "--profile"),
    "compare": ("--arch", "--device"), "leep": ("--arch", "--images"), "curate": ("--share", "--threshold", "--out"),
    "transfer": ("--arch", "--out", "--synthetic", "--synthetic", "--images", "--seeds", "--hours", "--model"),
    "predict": ("--top", "--batch", "--csv"),
    "export": ("--out",), "provenance": ("--profile",)}
FLAGS = ("--json", "--style", "--all", "--repair", "--onnx", "--no-images", "--per-class", "--public", "--help",
         "--nonsense")
OF_SETTINGS = ("plan", "table") # commands that take settings as they are
OF_STUDY = ("invert", "lora", "generate", "compare", "leep", "curate", "transfer")
SLOW = ("invert", "lora", "compare", "leep", "curate", "transfer") # when nothing is wrong, they compute


def setting(rng, runs):
    key = rng.choice(KEYS)
    value = str(runs) if key == "runs" else rng.choice(ODD)
    if key in ("model", "clip") and rng.random() < 0.5: value = str(runs.parent/"made")
    return f"{key}={value}" if rng.random() < 0.97 else rng.choice(ODD)


def words(rng, folder, tmp):
    "A command line."
    command = rng.choice(COMMANDS if MINUTES else [c for c in COMMANDS if c not in SLOW])
    if rng.random() < 0.02: command = rng.choice(ODD)
    place = str(folder) if rng.random() < 0.7 else rng.choice(ODD)
    if command in ("verify", "predict", "export", "push"): place = rng.choice((str(tmp/"made"), str(tmp/"made"), place))
    if command == "example": place = str(rng.choice((tmp/"new", folder))) # it writes where it is told
    line = [command]
    if command in OF_SETTINGS:
        line += ["profile=smoke", f"runs={tmp/'runs'}"]
        line += [setting(rng, tmp/"runs") for _ in range(rng.choice((0, 1, 1, 2)))]
    elif command != "datasets": line += [place]
    if command in ("compare", "curate", "predict"): line += [rng.choice((str(folder), str(tmp/"made"),
                                                                         rng.choice(ODD)))]
    if command == "push": line += [rng.choice(("me/tiny", "me/tiny", rng.choice(ODD)))]
    if command == "export" and rng.random() < 0.8: line += ["--onnx"]
    if command in ("compare", "curate") and rng.random() < 0.7:
        line += {"compare": [], "curate": ["--share", "0.5"]}[command]
    if command in OF_STUDY:
        line += ["--profile", "smoke", "--set", f"runs={tmp/'runs'}", "--set", "images=4"]
        line += [w for _ in range(rng.choice((0, 0, 1, 2))) for w in ("--set", setting(rng, tmp/"runs"))]
    if command in ("transfer", "curate"): line += ["--out", str(tmp/"out")]
    for option in OPTIONS.get(command, ()):
        if rng.random() < (0.3 if option in TAKES_MADE else 0.12): line += [option, value_of(rng, option, tmp)]
    line += [flag for flag in FLAGS if rng.random() < (0.3 if flag == "--json" else 0.03)]
    return line


TAKES_MADE = ("--lora", "--synthetic", "--model") # a folder of ours


def value_of(rng, option, tmp):
    "What an option is given; what is written goes where nothing of the user's is."
    if option in ("--csv", "--out", "--export"):
        return rng.choice((str(tmp/"new"), str(tmp/"a"/"new"), str(tmp/("n" * 300)), "/dev/full/x",
                           str(tmp/"user"/"names.json"/"x")))
    if option in TAKES_MADE and rng.random() < 0.7: return str(tmp/"made")
    if option == "--hours" and rng.random() < 0.5: return rng.choice(("0.01", "1e-9", "1e300", "-inf"))
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


def write_example(rng, tmp):
    "A user's folder, one that a command has made, and at times one of earlier runs; those that nothing may change."
    user = (write_folder if rng.random() < 0.7 else write_layout)(rng, tmp/"user")
    if rng.random() < 0.08: (user/"bridgexfer.ini").write_bytes(rng.choice(SETTINGS_FILES))
    write_made(rng, tmp/"made")
    if MINUTES and rng.random() < 0.15:
        shutil.copytree(whole("runs"), tmp/"runs")
        for _ in range(rng.choice((1, 1, 5))): damage(rng, tmp/"runs")
    return user


LONG = "t" * 60
PLACES = ( # variables of the environment, and limits of the process
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}), ({"HOME": ""}, {}), ({"HOME": "/proc"}, {}),
    ({"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}, {}), ({"TMPDIR": "/nowhere"}, {}), ({"PATH": "/nowhere"}, {}),
    ({"TMPDIR": f"/tmp/{LONG}/{LONG}"}, {}), ({}, {resource.RLIMIT_FSIZE: 5000}), ({}, {resource.RLIMIT_NOFILE: 40}),
    ({"OMP_NUM_THREADS": "x"}, {}), ({"HF_HOME": "/proc/x", "XDG_CACHE_HOME": "/proc/x"}, {}), ({"COLUMNS": "x"}, {}))


def elsewhere(rng, line, seconds):
    "A command in a process of its own, in an odd environment: its exit code and what it prints."
    variables, limits = rng.choice(PLACES)
    def start():
        signal.signal(signal.SIGINT, signal.default_int_handler) # which a shell's background job ignores
        for limit, number in limits.items(): resource.setrlimit(limit, (number, number))
    Path(f"/tmp/{LONG}/{LONG}").mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", CODE, *line]
    if any("\0" in word for word in line): return call(line, seconds)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables, "PYTHONDONTWRITEBYTECODE": "1"} # a limit would cut it
    done = subprocess.Popen(words, cwd=ROOT, env=env, preexec_fn=start,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try: out, err = done.communicate(timeout=max(seconds, 2)) # until Python has started, nothing of ours runs
    except subprocess.TimeoutExpired:
        done.send_signal(signal.SIGINT)
        out, err = done.communicate()
    code = done.returncode
    if code == -signal.SIGINT: code = 0 if out else 130 # the command had ended, and Python was ending
    return code, out.decode(errors="replace"), f"{err.decode(errors='replace')}"


def example(number, tmp):
    "One command on one folder."
    rng = random.Random(f"bridgexfer {number}")
    user = write_example(rng, tmp)
    before = {**state(user), **state(tmp/"made")}
    line = words(rng, user, tmp)
    seconds = rng.uniform(0.1, 20) if MINUTES and rng.random() < 0.2 else LONGEST
    where = (lambda *how: elsewhere(rng, *how)) if MINUTES and rng.random() < 0.06 else call
    try: judge(line, *(said := where(line, seconds)))
    except BaseException as e:
        shown = [word if len(word) < 200 else f"{word[:20]}…" for word in line]
        kept = said[1:] if "said" in locals() else ()
        raise Problem(f"example {number}: {type(e).__name__}: {e}\n{shown}\n{kept}") from e
    after = {**state(user), **state(tmp/"made")}
    repaired = said[1] if "--repair" in line else "" # names what was damaged
    changed = [str(p) for p, content in before.items() if after.get(p) != content and p.stem not in repaired]
    if changed: raise Problem(f"example {number}: {changed} changed: {line}")
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
        if MINUTES: print(f"{time.monotonic():.0f} {number}", end=" ", flush=True)
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
