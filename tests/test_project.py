"""The project: files that agree with each other, notebooks that are clean, exported and run."""
import ast
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pytest
import yaml
from nbformat.v4 import new_output
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from warm import run_notebook, spent, start_code

ROOT = Path(__file__).parent.parent
WINGS = ("library", "data", "study", "apps") # whose notebooks export; each imports only what comes before it
LIBRARY = [p for wing in WINGS for p in sorted((ROOT/"nbs"/wing).glob("*.ipynb"))]
MINIATURE = sorted((ROOT/"nbs/miniature").glob("*.ipynb"))
BENCHMARKS = sorted((ROOT/"nbs/benchmarks").glob("*.ipynb"))
TUTORIALS = sorted((ROOT/"nbs/tutorials").glob("*.ipynb"))
INDEX = ROOT/"nbs/index.ipynb"
TOUR = ROOT/"nbs/00_tour.ipynb"
JOBS = sorted((ROOT/"nbs/jobs").glob("*.ipynb"))
PAPER = sorted((ROOT/"nbs/paper").glob("*.ipynb"))
NOTEBOOKS = [TOUR, INDEX, *LIBRARY, *MINIATURE, *JOBS, *PAPER, *BENCHMARKS, *TUTORIALS]
REGISTRY = re.compile(r"(pypi|pythonhosted|npmjs|conda|crates)\.(org|com|io)|[/-]simple/")
MACHINE = re.compile(r"(?<![\w.~-])/(root|work|mnt|Users|home/(?!me/))\b[/\w]|/tmp/\w")
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def name(path): return path.relative_to(ROOT/"nbs").as_posix()


def run(*command, cwd=ROOT, env=ENV, **kwargs):
    options = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, **options, **kwargs)


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell): return "".join(cell["source"])


# ---- files

@pytest.fixture(scope="module")
def files():
    "All files that are, or would be, under version control."
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed.returncode: pytest.skip("not a clone")
    return [p for p in (ROOT/line for line in listed.stdout.splitlines()) if p.is_file()]


def test_no_registry_and_no_machine_is_named(files):
    for path in files:
        try: text = path.read_text()
        except UnicodeDecodeError: continue
        if path.name == "LICENSE": continue
        for pattern in (REGISTRY, MACHINE):
            found = pattern.search(text)
            if not found: continue
            around = text[max(0, found.start() - 40):found.end() + 40]
            raise AssertionError(f"{path.relative_to(ROOT)} names {around!r}")


def test_weights_are_small_and_hold_no_code(files):
    weights = [p for p in files if p.is_relative_to(ROOT/"bridgexfer/weights")]
    assert weights
    assert sum(p.stat().st_size for p in weights) <= 12 * 2**20
    assert {p.suffix for p in weights} <= {".safetensors", ".json", ".txt"}


def test_no_large_files(files):
    assert not [p for p in files if p.stat().st_size > 8 * 2**20]


def package_version(): return re.search(r'__version__ = "(.+)"', (ROOT/"bridgexfer/__init__.py").read_text())[1]


def test_license_and_citation():
    assert "Apache License" in (ROOT/"LICENSE").read_text()
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert cff["version"] == package_version() and cff["license"] == "Apache-2.0"
    assert cff["references"][0]["identifiers"][0]["value"] == "arXiv:2403.19866"


# ---- environment

def locked():
    "name -> version, hashes of requirements.lock"
    pins, lines = {}, re.sub(r"^ *#.*\n", "", (ROOT/"requirements.lock").read_text(), flags=re.M).strip()
    for block in re.split(r"\n(?=[a-z0-9])", lines):
        pin = re.match(r"([a-z0-9._-]+)(?:\[[\w,]+\])?==([^ ;\\]+)", block)
        pins[pin[1]] = (Version(pin[2]), re.findall(r"--hash=sha256:[0-9a-f]{64}", block))
    return pins


def test_lock_pins_with_hashes_and_names_no_place():
    text = (ROOT/"requirements.lock").read_text()
    assert "://" not in text and "index-url" not in text and "find-links" not in text
    assert len(locked()) > 100 and all(hashes for _, hashes in locked().values())
    uv = (ROOT/".ci/uv.txt").read_text()
    assert re.search(r"^uv==[\d.]+ \\$", uv, re.M) and "--hash=sha256:" in uv and "://" not in uv


def test_lock_agrees_with_pyproject():
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    pins = locked()
    for text in [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]:
        wanted = Requirement(text)
        if wanted.name == project["name"]: continue # another of its extras
        assert wanted.name in pins, f"{wanted.name} is not in requirements.lock: compile it as its first lines say"
        version = pins[wanted.name][0]
        assert version in wanted.specifier, f"requirements.lock has {wanted.name} {version}, not {text}"


# ---- commands

def targets(): return re.search(r"^\.PHONY: (.+)$", (ROOT/"Makefile").read_text(), re.M)[1].split()


def test_make_help_lists_every_target():
    listed = run("make", "help", check=True).stdout
    assert re.findall(r"^make ([a-z-]+) ", listed, re.M) == targets()
    assert run("make", check=True).stdout == listed


def test_documented_commands_exist():
    texts = [(ROOT/"README.md").read_text(), (ROOT/"settings.ini").read_text(), (ROOT/"Snakefile").read_text()]
    texts += [source(c) for path in NOTEBOOKS for kind in ("markdown", "code") for c in cells(path, kind)]
    named = {t for text in texts for t in re.findall(r"(?:`|^ {4}\$? ?)make ([a-z][a-z-]*)", text, re.M)}
    assert named <= set(targets())


TOO_OLD = "Python 3.11 or newer is needed and was not found: install it"
NO_VENV = "python3 has no venv module: install it (Debian, Ubuntu: apt install python3-venv)."


@pytest.mark.parametrize(("python", "said"), [
    (None, TOO_OLD),
    ('case "$2" in *version_info*) exit 1;; esac', TOO_OLD),
    ('case "$2" in *ensurepip*) exit 1;; esac', NO_VENV)], ids=["no Python", "old Python", "no venv"])
def test_make_says_what_to_install(tmp_path, python, said):
    for path in ("Makefile", "requirements.lock", "pyproject.toml", ".ci/uv.txt"):
        (tmp_path/path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/path, tmp_path/path)
    tools = tmp_path/"bin"
    tools.mkdir()
    for tool in ("make", "sh", "cmp", "rm"): (tools/tool).symlink_to(shutil.which(tool))
    if python:
        (tools/"python3").write_text(f'#!{shutil.which("sh")}\n{python}\nexec {sys.executable} "$@"\n')
        (tools/"python3").chmod(0o755)
    done = run("make", "env", cwd=tmp_path, env={"PATH": str(tools)})
    assert done.returncode and said in done.stderr and len(done.stderr.splitlines()) == 2
    assert not (tmp_path/".venv").exists()


def test_ci_runs_the_tests():
    script = (ROOT/".ci/run").read_text()
    assert re.search(r"^bash .ci/extras$\n^make test ", script, re.M) and os.access(ROOT/".ci/run", os.X_OK)
    marks = re.search(r"-m \"(.*?)\"", script)[1] # which tests it runs, besides those of `make test`
    files = [f"tests/test_{name}.py" for name in ("slurm", "site", "sd15")]
    done = run(sys.executable, "-m", "pytest", "--collect-only", "-m", marks, *files)
    collected = done.stdout
    assert "test_slurm_and_this_machine" in collected and "test_every_page_in_a_browser" in collected, collected
    assert "test_sd15" not in collected, collected
    for workflow in (ROOT/".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(workflow.read_text())["jobs"]
        commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert commands[0] == ("make docs" if workflow.stem == "site" else "bash .ci/run")
        others = [c for c in commands[1:] if not c.startswith("python -m pip install ")] # of the job on the wheel
        assert others == ([] if workflow.stem == "site" else
                          ["make study PROFILE=smoke PYTHON=python", "python -m pytest tests/test_no_clone.py"])
        matrices = [job.get("strategy", {}).get("matrix", {}) for job in jobs.values()]
        tried = {version for matrix in matrices for version in matrix.get("python-version", [])}
        assert workflow.stem == "site" or tried == {"3.11", "3.12", "3.13", "3.14"}


# ---- notebooks

def python_files(top): return {p.relative_to(top).as_posix(): p.read_text() for p in (top/"bridgexfer").rglob("*.py")}


def test_modules_are_what_the_notebooks_export(tmp_path):
    left_out = shutil.ignore_patterns("weights", "__pycache__", ".*")
    for folder in ("nbs", "bridgexfer"): shutil.copytree(ROOT/folder, tmp_path/folder, ignore=left_out)
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    for module in (tmp_path/"bridgexfer").rglob("*.py"):
        if "AUTOGENERATED" in module.read_text(): module.unlink()
    done = run("nbdev-export", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here, exported = python_files(ROOT), python_files(tmp_path)
    assert sorted(here) == sorted(exported)
    differing = [p for p in here if here[p] != exported[p]]
    assert not differing, f"run nbdev-export: {', '.join(differing)} differ from their notebooks"


def test_notebooks_are_clean(tmp_path):
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    done = run("nbdev-clean", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dirty = [name(p) for p in NOTEBOOKS if p.read_text() != (tmp_path/"nbs"/name(p)).read_text()]
    assert not dirty, f"run nbdev-clean: {', '.join(dirty)}"


def test_every_notebook_is_in_a_list():
    there = {p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert there == set(NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_stored_outputs_are_small_and_portable(notebook):
    "As docs/outputs.py leaves them: 30 KB a cell, no warnings, no folder of a machine."
    for number, cell in enumerate(cells(notebook)):
        outputs = cell["outputs"]
        where = f"code cell {number}: run docs/outputs.py {notebook.relative_to(ROOT)}"
        assert len(json.dumps(outputs, ensure_ascii=False).encode()) <= 30 * 1024, where
        assert not [o for o in outputs if o.get("name") == "stderr" or o["output_type"] == "error"], where
        written = [o.get("text", "") for o in outputs]
        written += [v for o in outputs for kind, v in o.get("data", {}).items() if kind.startswith("text")]
        text = "\n".join("".join(w) for w in written)
        found = MACHINE.search(text)
        assert not found, f"{where}: {found[0]}"


def test_outputs_are_tidied_before_they_are_stored():
    outputs = runpy.run_path(str(ROOT/"docs/outputs.py"))
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer := BytesIO(), "PNG")
    picture = {"image/png": b64encode(buffer.getvalue()).decode(), "text/plain": "<Figure>"}
    tidied = outputs["tidy"]([
        new_output("stream", name="stdout", text="a"),
        new_output("stream", name="stderr", text="a warning"),
        new_output("stream", name="stdout", text=f"b {gettempdir()}/tmpx3/file {ROOT}/nbs"),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "100%"}),
        new_output("display_data", picture)])
    assert [o.output_type for o in tidied] == ["stream", "display_data"]
    assert tidied[0].text == "ab tmp/file ./nbs"
    assert list(tidied[1].data) == ["image/jpeg"] and 0 < outputs["stored_size"](tidied) <= outputs["LIMIT"]


def test_the_tour_shows_its_outputs():
    "A reader on GitHub sees them; those of the notebooks that export are stored by the same `make outputs`."
    shown = [kind for cell in cells(TOUR) for o in cell["outputs"] for kind in o.get("data", {"text": ""})]
    pictures = [kind for kind in shown if kind.startswith("image/")]
    assert len(pictures) >= 2 and "text/html" in shown and "text" in shown


@pytest.mark.parametrize("notebook", [*LIBRARY, *(p for p in TUTORIALS if not p.stem.startswith("playing"))], ids=name)
def test_notebooks_show_outputs(notebook):
    "Its pages of the site are not executed: they show what is stored."
    shown = [cell for cell in cells(notebook) if cell["outputs"]]
    assert shown, f"run docs/outputs.py {notebook.relative_to(ROOT)}"


def slug(heading): return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def prose(path):
    "The Markdown of a page or a notebook, without blocks of code."
    text = "\n\n".join(map(source, cells(path, "markdown"))) if path.suffix == ".ipynb" else path.read_text()
    return re.sub(r"^( *)(```|:::).*?^\1\2", "", text, flags=re.M | re.S)


def headings(path): return {slug(h) for h in re.findall(r"^#+ (.+)$", prose(path), re.M)}


def is_address(link): return re.fullmatch(r"(https?://[\w.-]+\.\w+([/?#]\S*)?|mailto:\S+@\S+)", link)


def broken_links(path, tops=()):
    "Links and pictures that lead nowhere; `tops` are other folders that a relative link may start from."
    for link in re.findall(r"\]\(([^)\s]*)", re.sub(r"`[^`\n]+`", "", prose(path))):
        if re.match(r"\w+:", link):
            if not is_address(link): yield f"{path.name}: {link} is no address"
            continue
        place, _, anchor = link.partition("#")
        targets = [t for top in (path.parent, *tops) if (t := top/place).exists()] if place else [path]
        if not link or not targets: yield f"{path.name}: {link!r} leads nowhere"
        elif anchor and targets[0].suffix in (".md", ".ipynb") and anchor not in headings(targets[0]):
            yield f"{path.name}: {link} has no such heading"


def test_links_lead_somewhere(files):
    pages = [p for p in files if p.suffix in (".md", ".ipynb")]
    def tops(path): return [ROOT/"nbs"] if path.is_relative_to(ROOT/"docs") else []
    broken = [b for p in pages for b in broken_links(p, tops(p))]
    assert len(pages) > 60 and not broken, "\n".join(broken)


def test_broken_links_are_noticed(tmp_path):
    (tmp_path/"there.md").write_text("# A heading: of `code`, too\n")
    (tmp_path/"page.md").write_text("""
[a](there.md) [b](there.md#a-heading-of-code-too) ![c](https://example.org/x.png) [d](#own)
# Own
`[code](is-no.link)`
```
[code](is-no.link)
```
[1](gone.md) ![2](gone.png) [3](there.md#gone) [4](https:/example) [5](#gone) [![6](gone.png)](there.md) [7]()
""")
    found = list(broken_links(tmp_path/"page.md"))
    assert len(found) == 7, found


SLOW = {"diffusers", "transformers", "timm", "accelerate", "torchvision", "pandas", "matplotlib", "scipy", "sklearn",
        "datasets", "huggingface_hub.hf_api"} # to import
DRAW = {"bridgexfer.study.plots", "bridgexfer.statistics"} # with these some jobs draw


@pytest.fixture(scope="module")
def job():
    "What a process that imports all that jobs import has of what they may not need, and what its study knows."
    imports = re.compile(r"from (bridgexfer[.\w]+) import")
    modules = {m for path in JOBS for m in imports.findall("\n".join(map(source, cells(path))))} - DRAW
    wanted = ("synthetic_sets", "transfer", "study.grid", "study.records")
    assert {f"bridgexfer.{m}" for m in wanted} <= modules
    code = ["import json, sys", *(f"import {m}" for m in sorted(modules)), f"slow = {SLOW} & set(sys.modules)",
            "from bridgexfer.study.grid import PAGES, Study",
            "rules = {job.rule for job in Study('miniature', lr='0.1').jobs()}",
            "from bridgexfer.study.costs import plan_text",
            "plan_text(Study('smoke', lr='tuned'))",
            "planned = sorted({'timm', 'diffusers', 'transformers'} & set(sys.modules))",
            "print(json.dumps(dict(slow=[*slow], planned=planned, rules=[*rules], pages=[p.name for p in PAGES])))"]
    done = run(sys.executable, "-c", "\n".join(code))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_jobs_start_without_what_they_may_not_need(job):
    "What takes long to import is imported by the functions that use it; a job's modules bring torch and little more."
    assert not job["slow"]


def test_a_plan_is_made_without_models(job):
    "Nor do the jobs, which the same process has listed: that opens no model, and importing timm takes seconds."
    assert job["planned"] == []


def test_the_study_knows_every_job_and_paper_notebook(job):
    assert set(job["rules"]) == {p.stem for p in JOBS}
    assert set(job["pages"]) == {p.stem for p in PAPER}


@pytest.mark.parametrize("notebook", [*JOBS, *PAPER], ids=name)
def test_jobs_take_parameters_and_export_nothing(notebook):
    tagged = [source(c) for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assigned = {t.id for n in ast.parse(tagged[0]).body if isinstance(n, ast.Assign) for t in n.targets}
    assert {"profile", "overrides", "settings_file"} <= assigned
    assert not [c for c in cells(notebook) if re.search(r"^#\| *(export|default_exp)", source(c), re.M)]


LONG = ("growth", "sharing", "two_commands") # many processes, parts of a study, a study in a clone


@pytest.mark.parametrize("notebook", [p if p.stem not in LONG else pytest.param(p, marks=pytest.mark.slow)
                                      for p in [TOUR, *MINIATURE, *BENCHMARKS, *TUTORIALS]], ids=name)
def test_notebook_runs(notebook, tmp_path, record_property):
    status, seconds = run_notebook(notebook, tmp_path/"log")
    record_property("elsewhere", seconds)
    assert status == 0, (tmp_path/"log").read_text()


def test_readme_is_what_its_notebook_gives():
    if run("git", "status", "--porcelain", "figures").stdout:
        pytest.skip("figures/ differs from the last commit, whose tables README.md shows: run `make readme`")
    done = run(sys.executable, "docs/readme.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_python_runs_as_pasted(tmp_path, record_property):
    pasted = re.findall(r"^```python\n(.*?)^```", (ROOT/"README.md").read_text(), re.M | re.S)
    assert len(pasted) >= 1
    log = tmp_path/"log"
    pasting = start_code("\n".join(pasted), log=log, folder=tmp_path)
    pasting.join()
    record_property("elsewhere", spent(log))
    assert pasting.exitcode == 0 and 0 < float(log.read_text()) < 1, (tmp_path/"log.errors").read_text()
