"""Ctrl-C, kills, full disks and two commands at once: nothing that was made is lost, and nothing half-made is kept."""
import ast
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from bridgexfer import artefacts, synthetic_sets
from bridgexfer.artefacts import PACKAGE, atomic, write_json
from bridgexfer.cli import main
from bridgexfer.data.archives import fetch
from bridgexfer.generation import synthesis_spec
from bridgexfer.synthetic_sets import begun_path, build_shard, find_damage, generate, read_begun, save_begun, shard_path
from bridgexfer.synthetic_sets import shard_columns, shard_rows, shard_schema, shard_table, write_shard

ROOT = Path(__file__).parents[1]
# A shell's background jobs ignore Ctrl-C, and so would their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- a shard that is being made

@pytest.fixture
def spec(model): return synthesis_spec(model, ("one", "three", "seven"), steps=2, size=32, batch=2, shard=3)


def stops_after(batches, monkeypatch):
    "Sampling that is interrupted, and the prompts that it was asked for."
    asked = []
    def sample(pipe, prompts, *rest):
        if len(asked) == batches: raise KeyboardInterrupt
        asked.append(prompts)
        return original(pipe, prompts, *rest)
    original = synthetic_sets.sample_later
    monkeypatch.setattr(synthetic_sets, "sample_later", sample)
    monkeypatch.setattr(synthetic_sets, "SAVE_EVERY", 0)
    return asked


def test_an_interrupted_shard_goes_on_where_it_was(spec, pipe, tmp_path, monkeypatch, one_thread):
    whole = shard_path(generate(spec, tmp_path/"whole", 3, pipe=pipe, progress=False).folder, 0).read_bytes()
    path = shard_path(tmp_path, 0)
    with monkeypatch.context() as patch:
        stops_after(3, patch)
        with pytest.raises(KeyboardInterrupt): build_shard(spec, path, 0, pipe, tqdm(disable=True))
    assert len(read_begun(path, spec, 0)) == 6 and not path.exists() # three batches of two
    with monkeypatch.context() as patch:
        asked = stops_after(None, patch)
        build_shard(spec, path, 0, pipe, tqdm(disable=True))
    assert sum(map(len, asked)) == 3 and path.read_bytes() == whole and not begun_path(path).exists()
    assert artefacts.read_json(path.with_suffix(".json"))["images"] == 3 # those of the speed that it notes


def test_what_is_left_of_another_shard_is_not_used(spec, tmp_path):
    path = shard_path(tmp_path, 0)
    save_begun(path, spec, 0, [b"a", b"b"])
    assert read_begun(path, spec, 0) == [b"a", b"b"] and not read_begun(path, spec, 1)
    other = synthesis_spec("miniature", ("one", "two", "seven"), steps=2, size=32, batch=2, shard=3)
    assert not read_begun(path, other, 0)
    begun_path(path).write_bytes(begun_path(path).read_bytes()[:-9])
    assert not read_begun(path, spec, 0) and not read_begun(tmp_path/"none", spec, 0)


def in_one_piece(spec, files):
    "A shard as it was put together before there were pieces."
    rows = shard_rows(spec, 0)
    table = shard_table(spec, 0, files)
    images = [{"bytes": f, "path": p["path"]} for f, p in zip(files, table["image"].to_pylist(), strict=True)]
    return pa.table([images, *shard_columns(rows), table["sha256"].to_pylist()], shard_schema(spec, 0))


@pytest.mark.parametrize("shard", [1, 33, 34, 100])
def test_pieces_do_not_change_a_file(model, tmp_path, shard):
    spec = synthesis_spec(model, ("one", "three", "seven"), shard=shard)
    files = [np.random.default_rng(i).bytes(20_000 + 97 * i) for i in range(3 * shard)]
    for name, table in (("now", shard_table(spec, 0, files)), ("then", in_one_piece(spec, files))):
        write_shard(tmp_path/name, table)
    assert (tmp_path/"now").read_bytes() == (tmp_path/"then").read_bytes()
    assert find_damage(tmp_path/"now", spec, 0) is None


@pytest.mark.slow
def test_a_shard_may_have_more_than_2_gib(model, tmp_path):
    spec = synthesis_spec(model, tuple(f"class {i}" for i in range(200)), shard=11)
    noise = np.random.default_rng(0).bytes(10**6) # nothing that compresses, and no file like another
    files = [b"%d" % i + noise for i in range(2200)]
    write_shard(shard_path(tmp_path, 0), shard_table(spec, 0, files))
    assert shard_path(tmp_path, 0).stat().st_size > 2**31
    assert find_damage(shard_path(tmp_path, 0), spec, 0) is None


# ---- Ctrl-C

PRESSED = """
import os, signal, sys
from bridgexfer.data import check
look = check.look
def pressed(*how):
    os.kill(os.getpid(), signal.SIGINT)
    return look(*how)
check.look = pressed
from bridgexfer.cli import main
sys.exit(main(sys.argv[1:]))
"""


def small_folder(folder):
    for i, name in enumerate(("one", "three")):
        (folder/name).mkdir(parents=True)
        for k in range(3): Image.new("RGB", (40, 40), (9 * k, 99 * i, 0)).save(folder/name/f"{k}.png")
    return folder


def test_ctrl_c_is_one_sentence(tmp_path):
    words = [sys.executable, "-c", PRESSED, "check", small_folder(tmp_path/"my"), "--csv", tmp_path/"found.csv"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and not done.stdout and os.listdir(tmp_path) == ["my"]
    assert done.stderr.strip() == "Interrupted: nothing was changed; run the same command again."


def test_ctrl_c_under_make(tmp_path):
    printing = f'include Makefile\nslow:\n\t@$(RUN) python -c "$$CODE" check "{small_folder(tmp_path/"my")}"\n'
    make = ["make", "--no-print-directory", "-o", ".venv/.complete", "-f", "-", "slow"]
    done = subprocess.run(make, cwd=ROOT, input=printing, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "CODE": PRESSED})
    assert done.returncode and "Interrupted: nothing was changed" in done.stderr and "Traceback" not in done.stderr


class Slow(BaseHTTPRequestHandler):
    "A server that stops in the middle."
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(bytes(500))
        self.wfile.flush()
        threading.Timer(.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        self.server.released.wait(60)

    def log_message(self, *_): pass


@pytest.fixture
def slow_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/file.tgz"
    server.released.set()
    server.shutdown()


def test_ctrl_c_during_a_download(slow_server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    def download(name, root): fetch(slow_server, tmp_path/name, 1000, "md5:0")
    monkeypatch.setattr("bridgexfer.data.archives.download", download)
    assert main(["datasets", "--fetch", "pets"]) == 130
    assert "what was downloaded is kept; run the same command again to resume" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["pets.part"]


def test_two_commands_do_not_download_into_one_file(tmp_path):
    (tmp_path/"pets.part").write_bytes(b"of the other")
    said = "Another command is downloading .*pets: wait"
    with FileLock(tmp_path/".pets.lock"), pytest.raises(FileExistsError, match=said):
        fetch("http://localhost:1/pets", tmp_path/"pets", 1000, "md5:0")
    assert (tmp_path/"pets.part").read_bytes() == b"of the other"


# ---- a full disk

WRITERS = {"write_text", "write_bytes", "to_csv", "save_file", "write_table", "open_memmap", "OSFile"}


def loose_writers(tree):
    "Functions of a module that write a file, and neither take a temporary path nor make one."
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    functions += [n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body if isinstance(n, ast.FunctionDef)]
    for f in functions:
        names = {n.id for n in ast.walk(f) if isinstance(n, ast.Name)} | {a.arg for a in f.args.args}
        calls = [n.func for n in ast.walk(f) if isinstance(n, ast.Call)]
        called = {c.attr if isinstance(c, ast.Attribute) else getattr(c, "id", "") for c in calls}
        if called & WRITERS and not names & {"part", "atomic", "TemporaryDirectory"}: yield f.name


def test_every_file_is_written_under_a_temporary_name():
    sources = {p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in PACKAGE.rglob("*.py")}
    found = {f"{module}.{name}" for module, tree in sources.items() for name in loose_writers(tree)}
    assert found <= {"benchmarks.write_sd15"}, found # a model for a benchmark, in a folder that goes
    assert list(loose_writers(ast.parse("def f(p): p.write_text('')"))) == ["f"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_leaves_the_old_file(tmp_path, monkeypatch, error):
    write_json(tmp_path/"a.json", 1)
    def fail(*_): raise OSError(error, os.strerror(error))
    monkeypatch.setattr(artefacts.os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(error)): write_json(tmp_path/"a.json", 2)
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path/"a.json").read_text() == "1\n"


@pytest.fixture
def room(monkeypatch):
    "A way to allow files of so many bytes and no more."
    monkeypatch.setattr(sys, "dont_write_bytecode", True) # the limit would cut it
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_set_that_does_not_fit_is_made_later(spec, pipe, tmp_path, room):
    make = partial(generate, spec, tmp_path, 3, pipe=pipe, progress=False)
    room(4000) # enough for the spec, too little for the shard
    with pytest.raises(OSError): make()
    room(resource.RLIM_INFINITY)
    assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("shard-*.parquet")]
    assert make().verify() == []


def test_a_table_that_does_not_fit_is_one_sentence(tmp_path, room, capsys):
    folder = small_folder(tmp_path/"my")
    (tmp_path/"found.csv").write_text("old")
    (folder/"one"/"broken.png").write_bytes(b"")
    room(10)
    code = main(["check", str(folder), "--csv", str(tmp_path/"found.csv")])
    room(resource.RLIM_INFINITY) # before pytest writes what it captured
    assert code == 2
    assert "File too large" in capsys.readouterr().err
    assert (tmp_path/"found.csv").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["found.csv", "my"]


# ---- whose file it is

def test_a_table_is_written_where_a_link_points(tmp_path, capsys):
    (tmp_path/"shared").mkdir()
    (tmp_path/"found.csv").symlink_to("shared/table.csv")
    assert main(["check", str(small_folder(tmp_path/"my")), "--csv", str(tmp_path/"found.csv")]) in (0, 1)
    assert (tmp_path/"found.csv").is_symlink() and (tmp_path/"shared"/"table.csv").read_text().startswith("file,class")


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_safetensors_have_the_mode_of_all_others(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with atomic(tmp_path/"a.safetensors") as part: save_file({}, part)
    finally: os.umask(before)
    assert (tmp_path/"a.safetensors").stat().st_mode & 0o777 == mode


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_of_the_clone_and_of_no_other(tmp_path, monkeypatch):
    (tmp_path/"copy").mkdir() # such as of a tarball, inside another repository
    assert artefacts._commit(tmp_path/"copy") is None
    git(tmp_path, "init")
    assert artefacts._commit(tmp_path) is None # nothing is committed yet
    (tmp_path/"a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    commit = artefacts._commit(tmp_path)
    assert len(commit) == 12 and artefacts._commit(tmp_path/"copy") is None
    (tmp_path/"a").write_text("2")
    assert artefacts._commit(tmp_path) == f"{commit}+"
    monkeypatch.setenv("GIT_DIR", str(tmp_path/".git")) # as in a hook
    assert artefacts._commit(tmp_path/"copy") is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert artefacts._commit(tmp_path) is None


def test_opening_models_is_silent(model, capfd, recwarn):
    from bridgexfer.clip_tuning import load_clip
    from bridgexfer.models import load_pipeline
    load_pipeline(model)
    load_clip("miniature")
    assert capfd.readouterr() == ("", "") and not [str(w.message) for w in recwarn]
