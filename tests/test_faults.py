"""Kills, full disks, damaged files, two at once: each ends with what an undisturbed run leaves."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgexfer.artefacts import read_json
from bridgexfer.study.workflow import cause
from test_jobs import Clone

SETTINGS = dict(seeds="0", few_seeds="0", sweep_seeds="0", shots="4", style_shots="4", pipelines="vanilla bridged",
                images="40", steps="3", stage1_epochs="8", few_epochs="30", style_steps="300")
TABLE = "runs/figures/smoke/tab2_pipelines.csv"
JOBS = { # their parameters
    "generate": {"group": "single", "key": "digits"},
    "invert": {"kind": "style", "dataset": "digits"},
    "transfer": {"sweep": "core", "dataset": "digits", "arch": "mini_resnet10"}}
CORE = "core/digits-mini_resnet10.json"


def essence(path):
    "What a file says, without when and how fast it was made."
    if path.suffix != ".json": return path.read_bytes()
    value = read_json(path)
    if "result" in value: value["result"].pop("seconds", None)
    return {k: v for k, v in value.items() if k in ("spec", "result", "curve", "words", "records", "sets", "tokens")}


def outcome(runs, *folders):
    "What a job has left, by place."
    files = [p for f in folders for p in (runs/f).rglob("*") if p.is_file() and p.suffix != ".part"]
    return {p.relative_to(runs).as_posix(): essence(p) for p in files}


def job(clone, name, runs, **env):
    "Start a job by its papermill line, in a process group of its own; its notebook and log lie beside its runs."
    papermill = [sys.executable, "-m", "papermill", "--engine", "ipc", "--no-progress-bar"]
    notebooks = [f"nbs/jobs/{name}.ipynb", f"{runs}-{name}.ipynb"]
    overrides = json.dumps({**SETTINGS, "runs": str(runs)})
    parameters = {"profile": "smoke", "overrides": overrides, **JOBS[name]}
    options = [word for k, v in parameters.items() for word in ("-p", k, v)]
    with open(f"{runs}-{name}.txt", "w") as log:
        return subprocess.Popen([*papermill, *notebooks, *options], cwd=clone.folder, env={**clone.env, **env},
                                stdout=log, stderr=log, start_new_session=True)


def finish(process, runs, name):
    assert process.wait(600) == 0, Path(f"{runs}-{name}.txt").read_text()[-3000:]


def until(true, process, seconds=300):
    "Wait for something that a process is about to do."
    end = time.time() + seconds
    while not true():
        assert process.poll() is None and time.time() < end, "it ended before the fault"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "A clone in which a table and a style token were made undisturbed."
    clone = Clone(tmp_path_factory.mktemp("clone"))
    clone.env.update(OMP_NUM_THREADS="1")
    code, said = clone.snakemake("tab2_pipelines", "runs/smoke/invert/style-digits.json", **SETTINGS)
    assert code == 0, said
    return clone


@pytest.fixture
def runs(reference, tmp_path):
    "An empty folder for runs, and a way to give it what a job needs of the undisturbed one."
    folder = tmp_path/"runs"
    def give(*names):
        for name in names: shutil.copytree(reference.folder/"runs/smoke"/name, folder/"smoke"/name)
        return folder
    return give


# ---- SIGKILL in every stage

def some(folder, pattern, n=1): return len(list((folder/"smoke").glob(pattern))) >= n

SHARD = "synthetic/*/shard-*.parquet"
BRIDGE = "bridges/*/bridge.json"
TRANSFERRED = ("bridges", "records", "core") # what the job `transfer` leaves
STAGES = { # job; what it needs; it is in the stage when this is there and that is not; what it leaves
    "generation": ("generate", (), SHARD, SHARD, ("synthetic", "generate")), # one of two
    "style inversion": ("invert", (), "tokens/*/state.safetensors", "tokens/*/inversion.json", ("tokens", "invert")),
    "stage 1": ("transfer", ("synthetic",), "records/transfer/*.json", BRIDGE, TRANSFERRED),
    "stage 2": ("transfer", ("synthetic",), BRIDGE, CORE, TRANSFERRED)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_called_again(reference, runs, stage):
    name, needs, begun, ended, left = STAGES[stage]
    folder = runs(*needs)
    process = job(reference, name, folder)
    until(lambda: some(folder, begun), process)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL) # papermill and its kernel, as when a machine goes down
    process.wait()
    n_at_end = 2 if ended == begun else 1
    assert some(folder, begun) and not some(folder, ended, n_at_end) # it was in that stage
    finished = [p for f in ("generate", "invert", "core") for p in (folder/"smoke"/f).glob("*.json")]
    assert not finished # no manifest, so nothing looks finished
    whole = outcome(reference.folder/"runs/smoke", *left)
    def complete(place): return place.endswith((".parquet", "bridge.json")) or "/transfer/" in place
    before = {k: v for k, v in outcome(folder/"smoke", *left).items() if complete(k)}
    assert before.items() <= whole.items()
    finish(job(reference, name, folder), folder, name)
    assert outcome(folder/"smoke", *left) == whole


# ---- a full disk

FULL = """
import errno, os, pathlib
replace = pathlib.Path.replace
fault = os.environ.get("TEST_FULL")
def full(self, target):
    if fault and pathlib.Path(target).match(fault): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
    return replace(self, target)
pathlib.Path.replace = full
"""
DISKS = { # job; what it needs; KiB on the disk: enough for what comes before, too little for this; this; what it leaves
    "shard": ("generate", (), 100, "shard-*.parquet", ("synthetic", "generate")),
    "checkpoint": ("transfer", ("synthetic",), 200, "model.safetensors", TRANSFERRED),
    "record": ("transfer", ("synthetic", "bridges"), 8, "transfer/*.json", TRANSFERRED)}


@pytest.fixture
def full_disk(runs, tmp_path):
    "Runs on a disk with little room: a tmpfs where it can be mounted, or else one that rejects a file."
    disk = tmp_path/"runs"
    site = tmp_path/"site"
    mounted = []
    def make(needs, room, refused):
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
        if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
            mounted.append(disk)
            runs(*needs)
            now = os.statvfs(disk)
            free = now.f_bavail * now.f_frsize
            (disk/"filler").write_bytes(bytes(free - room * 1024))
            return {}
        runs(*needs)
        site.mkdir()
        (site/"sitecustomize.py").write_text(FULL)
        path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
        return {"PYTHONPATH": path, "TEST_FULL": refused}
    yield make
    for folder in mounted: subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", DISKS)
def test_no_space_left(reference, full_disk, tmp_path, what):
    name, needs, room, refused, left = DISKS[what]
    env = full_disk(needs, room, refused)
    folder = tmp_path/"runs"
    if env: env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(reference.folder)])
    process = job(reference, name, folder, **env)
    assert process.wait(600) != 0
    why = cause(Path(f"{folder}-{name}.ipynb"), Path(f"{folder}-{name}.txt"))
    assert "Error: " in why and os.strerror(errno.ENOSPC) in why
    assert not list(folder.rglob("*.part"))
    assert not list(folder.glob(f"smoke/**/{refused}"))
    for manifests in ("core", "generate"): assert not list(folder.glob(f"smoke/{manifests}/*"))
    (folder/"filler").unlink(missing_ok=True)
    finish(job(reference, name, folder), folder, name)
    assert outcome(folder/"smoke", *left) == outcome(reference.folder/"runs/smoke", *left)


# ---- damage, and two at once

@pytest.mark.slow
def test_a_shard_damaged_afterwards_is_made_again(reference, runs):
    folder = runs("synthetic")
    victim, gone = sorted((folder/"smoke/synthetic").glob("*/shard-*.parquet"))
    whole = victim.read_bytes()
    at = len(whole) // 2
    victim.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]) # one bit of an image; the footer is whole
    gone.write_bytes(gone.read_bytes()[:-100])
    finish(job(reference, "transfer", folder), folder, "transfer")
    assert victim.read_bytes() == whole
    left = ("synthetic", "bridges", "records", "core")
    assert outcome(folder/"smoke", *left) == outcome(reference.folder/"runs/smoke", *left)
    assert "Made again: shard-00000.parquet" in Path(f"{folder}-transfer.ipynb").read_text()


@pytest.mark.slow
def test_two_jobs_make_the_same_shards_at_once(reference, runs, tmp_path):
    folder = runs()
    folder.mkdir()
    other = tmp_path/"other"
    other.symlink_to(folder, target_is_directory=True) # the same runs, another notebook
    both = {name: job(reference, "generate", name) for name in (folder, other)}
    for name, process in both.items(): finish(process, name, "generate")
    left = ("synthetic", "generate")
    assert outcome(folder/"smoke", *left) == outcome(reference.folder/"runs/smoke", *left)


# ---- the orchestrator

@pytest.mark.slow
def test_a_killed_study_is_taken_up_again_and_a_second_one_is_refused(reference, tmp_path):
    clone = reference
    folder = tmp_path/"runs"
    command = clone.command("tab2_pipelines", **SETTINGS, runs=folder)
    first = subprocess.Popen(command, cwd=clone.folder, env=clone.env, start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: some(folder, SHARD), first)
    code, said = clone.snakemake("tab2_pipelines", **SETTINGS, runs=folder)
    assert code and f"Another study is running in {clone.folder}: wait" in said
    assert "Traceback" not in said
    assert clone.would_run("tab2_pipelines", **SETTINGS)[0] == set() # a dry run is welcome
    first.send_signal(signal.SIGKILL)
    first.wait()
    code, said = clone.snakemake("tab2_pipelines", **SETTINGS, runs=folder) # while the job of the first lives on
    assert code == 0, said
    assert (folder/"figures/smoke/tab2_pipelines.csv").read_bytes() == (clone.folder/TABLE).read_bytes()
    left = ("synthetic", "generate", "bridges", "records", "core")
    assert outcome(folder/"smoke", *left) == outcome(clone.folder/"runs/smoke", *left)


@pytest.mark.slow
def test_a_job_fails_the_others_go_on_and_only_it_is_repeated(reference, tmp_path):
    "An image that cannot be read, in a second dataset; the synthetic images of its classes are made all the same."
    clone = reference
    table = (clone.folder/TABLE).read_bytes()
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 3)):
        for name in ("three", "eight"):
            folder = tmp_path/"mine"/split/name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder/f"{i}.png")
    victim = tmp_path/"mine/train/three/3.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:len(whole) // 2])
    settings = {**SETTINGS, "datasets": f"digits {tmp_path/'mine'}"}
    code, said = clone.snakemake("tab2_pipelines", **settings)
    ending = said[said.index("One job failed"):]
    summary = [line for line in ending.splitlines() if line.startswith("  ")]
    assert code and len(summary) == 1
    assert "core-" in summary[0] and victim.name in summary[0]
    notebook = Path(clone.folder, summary[0].rsplit("[", 1)[1].rstrip("]"))
    outputs = [o for c in read_json(notebook)["cells"] for o in c.get("outputs", [])]
    assert any(o["output_type"] == "error" for o in outputs)
    assert (clone.folder/TABLE).read_bytes() == table
    assert not list((clone.folder/"runs/smoke/core").glob("*mine*"))
    assert list((clone.folder/"runs/smoke/generate").glob("*mine*"))
    assert clone.would_run("tab2_pipelines", **settings)[0] == {"transfer"}
    victim.write_bytes(whole)
    code, said = clone.snakemake("tab2_pipelines", **settings)
    assert code == 0 and "failed" not in said, said
    rows = (clone.folder/TABLE).read_text().splitlines()
    assert set(table.decode().splitlines()) < set(rows) # those of digits are as they were
