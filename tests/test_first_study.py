"""The ten-minute tutorial: what it tells the reader to type is typed, in a fresh clone."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from test_project import ROOT, cells, source

TUTORIAL = "nbs/tutorials/first_study.ipynb"
VENV = Path(sys.executable).parent.parent


def commands(notebook):
    "The lines of the blocks marked `sh`."
    prose = "\n".join(source(c) for c in cells(notebook, "markdown"))
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", prose, re.M | re.S))
    return [line for line in blocks.splitlines() if line.strip()]


def fresh_clone(folder):
    "The last commit in a folder of its own, with this environment, and nothing else of this folder."
    done = subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"not a clone: {done.stderr.strip()}")
    (folder/".venv").mkdir()
    for entry in VENV.iterdir():
        if entry.name != ".complete": (folder/".venv"/entry.name).symlink_to(entry)
    (folder/".venv/.complete").touch() # newer than the lock: `make` takes the environment as it is
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = fresh_clone(tmp_path_factory.mktemp("fresh")/"bridgexfer")
    yield folder
    shutil.rmtree(folder)


def typed(line, folder, **environment):
    "What a command line prints; it has to succeed."
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")}
    env |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    words = shlex.split(line)
    if words[0] == "make": words[1:1] = ["-o", ".venv/.complete"] # whatever its age: this environment is borrowed
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def runs(folder):
    "Path -> pipeline, of the records of transfer."
    records = folder.glob("runs/miniature/records/transfer/*.json")
    return {p.name: json.loads(p.read_text())["spec"]["pipeline"] for p in records}


def each(count, *pipelines): return dict.fromkeys(pipelines, count)


@pytest.mark.slow
def test_the_commands_of_the_page(clone):
    plan, study, change = commands(ROOT/TUTORIAL)
    where = typed(".venv/bin/python -c 'import bridgexfer; print(bridgexfer.__file__)'", clone)
    assert "bridgexfer/__init__.py" in where.removeprefix(str(clone))
    assert "core" in typed(plan, clone) and not (clone/"runs").exists() # nothing has run

    said = typed(study, clone).strip().splitlines()
    first = runs(clone)
    bridges = ("bridged", "bridged_fc", "bridged_pp")
    assert Counter(first.values()) == each(4, "vanilla", "mixed", *bridges) # two seeds, all images and four
    assert said[-1] == "Tables and figures: runs/figures/miniature"
    assert any("+" in line or "±" in line for line in said[-30:])
    assert (clone/"runs/figures/miniature/tab2_pipelines.csv").exists()

    typed(change, clone)
    new = {name: p for name, p in runs(clone).items() if name not in first}
    assert first.keys() <= runs(clone).keys() and Counter(new.values()) == each(4, "mixed", *bridges) # not vanilla
    status = typed("git status --porcelain", clone)
    assert status in ("", "?? .venv\n"), status # committed figures are as they were

    page = nbformat.read(clone/TUTORIAL, as_version=4)
    last = "\n\n".join(c.source for c in page.cells if c.cell_type == "code")
    (clone/"page.py").write_text(last + "\nassert sum(Counter(r['pipeline'] for r in records).values()) == 36")
    inside = 'import os, sys; os.chdir("nbs/tutorials"); exec(open(sys.argv[1]).read())'
    typed(f"{clone}/.venv/bin/python -c '{inside}' {clone}/page.py", clone)
