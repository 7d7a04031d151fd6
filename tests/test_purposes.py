"""The environment by purpose: what `make` installs for a command, what that weighs, and a PyTorch that the user has."""
import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from test_project import ROOT, cells, locked, source

WEIGHED = runpy.run_path(str(ROOT/"docs/packages.py"))


def name(package): return re.sub("[-_.]+", "-", package).lower()


# ---- what a command installs

@pytest.fixture
def bare(tmp_path):
    "A clone without an environment, in which uv is played by a script that writes down what it is asked."
    for path in ("Makefile", "requirements.lock", "pyproject.toml", ".ci/uv.txt", ".ci/kept.py"):
        (tmp_path/path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/path, tmp_path/path)
    shutil.copytree(ROOT/"profiles", tmp_path/"profiles")
    (tmp_path/".uv/bin").mkdir(parents=True)
    shutil.copy(ROOT/".ci/uv.txt", tmp_path/".uv/uv.txt")
    uv = tmp_path/".uv/bin/uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked"\n'
                  f'if [ "$1" = venv ]; then "{sys.executable}" -m venv --without-pip .venv; fi\n', encoding="utf-8")
    uv.chmod(0o755)
    return tmp_path


def make(folder, *words, ok=True):
    "What make prints; then `asked` has what uv was asked, a line a call."
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHONPATH")}
    done = subprocess.run(["make", "--no-print-directory", *words], cwd=folder, env=env, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def extras(folder): return [re.findall(r"--extra (\w+)", line) for line in (folder/"asked").read_text().splitlines()
                            if "--extra" in line]


@pytest.mark.parametrize(("command", "needs"), [
    ("study", []), ("paper", []), ("plan", []), ("bench", []), ("test", ["test"]), ("check", ["test"]),
    ("docs", ["docs"]), ("lab", ["lab"]), ("test-all", ["test", "docs"])])
def test_a_command_installs_its_purpose_and_no_other(bare, command, needs):
    planned = make(bare, "-n", command)
    assert re.findall(r"--extra (\w+)", planned) == ["study", *needs]


def test_purposes_are_added_and_kept(bare):
    make(bare, "env")
    make(bare, "env")
    assert extras(bare) == [["study"]] # the second finds it
    make(bare, "env", "FOR=study docs lab")
    assert extras(bare)[1:] == [["docs"], ["lab"]]
    (bare/"asked").unlink()
    os.utime(bare/"requirements.lock") # a new lock: everything that was there, in one go
    make(bare, "env")
    assert extras(bare) == [["study", "docs", "lab"]] and "--exact" in (bare/"asked").read_text()


def test_everything_is_hashed_and_locked(bare):
    make(bare, "env", "FOR=test docs lab")
    calls = [line for line in (bare/"asked").read_text().splitlines() if line.startswith("pip install")]
    assert all("--require-hashes" in line and "-c requirements.lock" in line for line in calls if "--extra" in line)
    others = [line for line in calls if "--extra" not in line]
    assert len(others) == 1 and others[0].endswith("--no-deps --no-build-isolation --python .venv/bin/python -e .")


# ---- a PyTorch that is there

TORCH, = re.findall(r"^torch==(\S+)", (ROOT/"requirements.lock").read_text(), re.M)


def python_with(folder, torch):
    "A Python with a torch of this version, or with none."
    site = folder/"mine"
    for package in ("torch", "torchvision"):
        (site/package).mkdir(parents=True)
        version = torch if package == "torch" else locked()["torchvision"][0]
        code = f"__version__ = '{version}'" if torch else "raise ImportError('no torch')"
        (site/package/"__init__.py").write_text(code, encoding="utf-8")
    python = folder/"python-with"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return site, f"PYTHON={python}"


@pytest.mark.parametrize("version", [f"{TORCH}+cpu", "1.0"])
def test_a_torch_of_the_users_is_kept(bare, version):
    site, python = python_with(bare, version)
    said = make(bare, "env", "TORCH=keep", python)
    assert ("torch 1.0 is kept, the lock has" in said) == (version == "1.0")
    assert (bare/".venv/.kept").read_text().split() == ["torch", "torchvision"]
    found = subprocess.check_output([bare/".venv/bin/python", "-c", "import torch; print(torch.__file__)"],
                                    encoding="utf-8", env={}, cwd=bare)
    assert found.strip() == str(site/"torch/__init__.py")
    make(bare, "env", "FOR=test") # later, and without being told again
    asked = (bare/"asked").read_text()
    assert asked.count("--extra") == asked.count("--excludes .venv/.kept") == 2 and "torch-backend" not in asked
    assert (bare/".venv/.kept").read_text().split() == ["torch", "torchvision"]


def test_a_python_without_torch_is_told_before_anything_is_made(bare):
    _, python = python_with(bare, None)
    said = make(bare, "env", "TORCH=keep", python, ok=False)
    assert "cannot import torch and torchvision (no torch): install them there, or name a Python that has them" in said
    assert not (bare/".venv").exists() and "Traceback" not in said


def test_torch_without_cuda_is_asked_of_its_own_index(bare):
    make(bare, "env", "TORCH=cpu")
    asked = (bare/"asked").read_text().splitlines()
    assert (bare/".venv/.kept").read_text().split() == ["torch", "torchvision"]
    assert sum(line.endswith("-c requirements.lock --no-verify-hashes --torch-backend cpu torch torchvision")
               for line in asked) == 1


def test_another_word_for_torch_is_rejected(bare):
    assert "TORCH is keep, cpu or nothing" in make(bare, "env", "TORCH=gpu", ok=False)
    assert not (bare/".venv").exists()


def test_nothing_is_kept_unless_it_is_said(bare):
    make(bare, "env")
    assert not (bare/".venv/.kept").read_text().split() and "torch" not in (bare/"asked").read_text()


# ---- what a purpose has is what its code imports

@cache
def purposes():
    "Package -> the purposes that need it."
    frame = pd.read_csv(ROOT/"figures/packages.csv")
    return dict(zip(frame.package.map(name), frame.purpose.str.split()))


def imported(code):
    "The top modules that code imports, but for those that it can do without."
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): yield from (a.name.partition(".")[0] for a in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.partition(".")[0]


def beyond(sources, allowed):
    "Modules that no allowed purpose installs, and where they are imported."
    where = packages_distributions()
    found = {(module, str(place)) for place, code in sources.items() for module in imported(code)}
    def have(module): return {x for p in where.get(module, ["ours"]) for x in purposes().get(name(p), ["ours"])}
    return {(module, place) for module, place in found if not have(module) & {*allowed, "ours"}}


def notebooks(*wings):
    magic = re.compile(r"^\s*[%!].*$", re.M)
    found = [p for wing in wings for p in ROOT.glob(f"nbs/{wing}/*.ipynb")]
    return {p: magic.sub("", "\n".join(source(c) for c in cells(p))) for p in found}


def test_the_study_imports_what_it_installs():
    modules = {p.relative_to(ROOT): p.read_text(encoding="utf-8") for p in (ROOT/"bridgexfer").rglob("*.py")}
    found = beyond(modules | notebooks("jobs", "paper", "benchmarks", "miniature"), ["library", "study"])
    assert {module for module, _ in found} <= {"onnx", "onnxruntime"}, found # named by the export that needs them


def test_the_site_imports_what_it_installs():
    scripts = {p: (ROOT/"docs"/p).read_text(encoding="utf-8") for p in ("conf.py", "pages.py")}
    assert not beyond(scripts, ["library", "study", "docs"])


def test_an_import_from_another_purpose_is_noticed():
    assert beyond({"x": "def f():\n    import pytest"}, ["library", "study"]) == {("pytest", "x")}


# ---- what it weighs

def test_the_table_by_purpose_is_that_by_package():
    summary = WEIGHED["by_purpose"](pd.read_csv(ROOT/"figures/packages.csv"))
    numbers = [c for c in summary if c != "what"]
    whole = summary.round(0).astype(dict.fromkeys(numbers, int))
    assert_frame_equal(whole, pd.read_csv(ROOT/"figures/environment.csv"))
    rows = summary.set_index("what").download_Linux_mb
    assert rows["make study TORCH=keep"] < rows["everything"] / 2 < rows["make study"] # CUDA alone is more than half
    parts = rows.index[:list(rows.index).index("make study")]
    assert rows[parts].sum() == pytest.approx(rows["everything"])


def test_every_package_is_weighed():
    unlisted = {name(p) for p in locked()} - set(purposes())
    assert len(unlisted) < 20, f"run docs/packages.py: {unlisted}" # for another Python or platform
    assert not set(purposes()) - {name(p) for p in locked()}, "run docs/packages.py"
