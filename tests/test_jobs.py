"""`make study` and `make paper`, in the smallest profile: once, again, after edits, and with mistakes."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent


class Clone:
    "A copy of the repository that uses this environment."
    def __init__(self, folder):
        self.folder = folder
        for name in ("bridgexfer", "figures", "nbs", "profiles"):
            shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for name in ("Makefile", "Snakefile", "settings.ini", "requirements.lock", "pyproject.toml"):
            shutil.copy2(ROOT/name, folder)
        (folder/".ci").mkdir()
        shutil.copy2(ROOT/".ci/uv.txt", folder/".ci")
        (folder/".venv").symlink_to(sys.prefix)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.env = {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
        self.fresh = self.files()

    def files(self):
        "What the copy holds, but for runs and caches."
        skipped = {".venv", ".snakemake", "runs", "__pycache__"}
        def kept(path): return not skipped & set(path.relative_to(self.folder).parts) and path.is_file()
        return {p: p.read_bytes() for p in self.folder.rglob("*") if kept(p)}

    def run(self, command):
        "Run a command in the copy; what it prints and its errors come together."
        return subprocess.run(command, cwd=self.folder, env=self.env, text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def make(self, *words, ok=True):
        "Call make; the environment counts as made."
        done = self.run(["make", "--no-print-directory", "-o", ".venv/.complete", *words])
        assert (done.returncode == 0) == ok, done.stdout
        return done.stdout

    def command(self, *words, on="local", **settings):
        "The command line of snakemake, on this machine or a cluster (`profiles/`)."
        program = Path(sys.executable).with_name("snakemake")
        config = [f"{k}={v}" for k, v in {"profile": "smoke", **settings}.items()]
        return [program, "--profile", f"profiles/{on}", *words, "--config", *config]

    def snakemake(self, *words, on="local", **settings):
        "Call snakemake: its exit status, and what it says."
        done = self.run(self.command(*words, on=on, **settings))
        return done.returncode, done.stdout

    def would_run(self, target="study", **settings):
        "The jobs that the next run would do, by the name of their rule, and what snakemake says."
        code, said = self.snakemake(target, "--dry-run", "--printshellcmds", **settings)
        assert code == 0, said
        return set(re.findall(r"^([a-z]\w+) +\d+$", said, re.M)) - {target, "total"}, said

    def edit(self, path, change):
        "Change a file's text."
        text = (self.folder/path).read_text()
        assert change(text) != text
        (self.folder/path).write_text(change(text))


def add_cell(kind, text):
    "An edit that adds a cell at the end of a notebook."
    def change(notebook):
        nb = json.loads(notebook)
        cell = {"cell_type": kind, "id": "added", "metadata": {}, "source": text}
        if kind == "code": cell |= {"execution_count": None, "outputs": []}
        nb["cells"].append(cell)
        return json.dumps(nb)
    return change


PAPERS = {"tab1_leep", "tab2_pipelines", "fig03_convergence", "fig10_examples"}
EVERYTHING = PAPERS | {"generate", "transfer", "transferability"}


def paper_notebooks(clone):
    "The notebooks that `make paper` runs: all but the one of `make tune`, and what goes beyond the paper."
    stems = {p.stem for p in (clone.folder/"nbs/paper").glob("*.ipynb")}
    return {s for s in stems if not s.startswith("beyond_")} - {"tab5_learning_rates"}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A clone in which the study has run, and what make printed."
    clone = Clone(tmp_path_factory.mktemp("clone"))
    return clone, clone.make("study", "PROFILE=smoke")


@pytest.fixture(scope="module")
def whole(first):
    "The same clone, in which every table and figure has been made."
    clone, _ = first
    return clone, clone.make("paper", "PROFILE=smoke")


@pytest.fixture
def clone(first):
    "That clone; whatever a test changes in it is undone, the run stays."
    yield first[0]
    for path, content in first[0].fresh.items():
        if path.read_bytes() != content: path.write_bytes(content)


def test_study_leaves_tables_figures_and_notebooks(first):
    clone, printed = first
    figures = clone.folder/"runs/figures/smoke"
    for paper in PAPERS: assert len(pd.read_csv(figures/f"{paper}.csv"))
    assert list(figures.glob("*.png")) and list(figures.glob("*.pdf"))
    executed = {p.stem for p in (clone.folder/"runs/smoke/notebooks").glob("*.ipynb")}
    jobs = {"generate-single-digits", "core-digits-mini_resnet10", "transferability-digits-mini_resnet10"}
    assert executed == PAPERS | jobs
    ending = printed.strip().splitlines()[-1]
    assert ending.startswith("Tables and figures: ") and ending.endswith("runs/figures/smoke")
    assert "Bridged++" in printed


def test_study_writes_nothing_elsewhere(first):
    clone, _ = first
    now = clone.files()
    assert now.keys() == clone.fresh.keys() and not [p for p in now if now[p] != clone.fresh[p]]


def test_all_that_is_made_says_how(first):
    runs = first[0].folder/"runs/smoke"
    for kind in ("records/transfer/*", "records/leep/*", "bridges/*/bridge", "synthetic/*/shard-*"):
        files = [json.loads(p.read_text()) for p in runs.glob(f"{kind}.json")]
        assert files
        for f in files:
            how = f.get("made", f)
            assert {"seconds", "finished", "device", "commit", "python", "torch"} <= set(how)
            assert ("images_per_s" in how) == ("leep" not in kind)
            assert "records" not in kind or {"seed", "dataset"} <= set(f["spec"])


def test_from_a_number_back_to_its_runs(first):
    clone, _ = first
    table = pd.read_csv(clone.folder/"runs/figures/smoke/tab2_pipelines.csv")
    line = table.index[(table.pipeline == "bridged_pp") & (table.shots == 4)][0]
    said = clone.make("provenance", f"RESULT=runs/figures/smoke/tab2_pipelines.csv:{line + 2}")
    assert said == clone.make("provenance", "PROFILE=smoke", "RESULT=tab2_pipelines bridged_pp shots=4")
    paths = set(re.findall(r"runs/smoke/[\w./-]+\w", said))
    assert all((clone.folder/p).exists() for p in paths)
    assert "missing" not in said
    assert {p.split("/")[2] for p in paths} == {"notebooks", "logs", "core", "records", "bridges", "synthetic"}
    assert f"{table.n[line]} runs, with a mean accuracy of {table['mean'][line]:.6g} %" in said
    executed = "runs/smoke/notebooks/core-digits-mini_resnet10.ipynb"
    assert f"papermill --engine ipc nbs/jobs/transfer.ipynb {executed}" in said
    assert "seed 1" in said and "images/s" in said and "lr 0.01" in said
    ambiguous = clone.make("provenance", "PROFILE=smoke", "RESULT=tab2_pipelines bridged_pp", ok=False)
    assert "name one of these" in ambiguous


def test_second_call_finds_everything_again(first):
    clone, printed = first
    again = clone.make("study", "PROFILE=smoke")
    assert "Nothing to be done" in again
    table = printed[printed.index("Elapsed time"):].split("\n", 1)[1]
    assert again.endswith(table) and "Bridged++" in table


def test_figures_that_came_with_a_clone_are_made_anew(clone):
    runs = clone.folder/"runs/smoke"
    state = clone.folder/".snakemake"
    for folder in (runs, state): folder.rename(folder.with_name(f"{folder.name}.away"))
    try: assert clone.would_run()[0] == EVERYTHING
    finally:
        shutil.rmtree(state, ignore_errors=True)
        for folder in (runs, state): folder.with_name(f"{folder.name}.away").rename(folder)


def ask_for_more(text):
    "An edit of settings: the resources requested per job."
    more = "memory = 3\nhours = 2\ntransfer_memory = 4\ncore_hours = 5\n"
    return text.replace("memory         = 2\nhours          = 1\n", more)


def test_prose_and_resources_rerun_nothing(clone):
    for notebook in [*clone.folder.glob("nbs/jobs/*.ipynb"), *clone.folder.glob("nbs/paper/*.ipynb")]:
        clone.edit(notebook, add_cell("markdown", "More prose."))
        clone.edit(notebook, add_cell("code", "# a comment"))
    for module in clone.folder.glob("bridgexfer/**/*.py"): clone.edit(module, lambda text: text + "\n# a comment\n")
    clone.edit("settings.ini", lambda text: text.replace("[smoke]", "# a comment\n[smoke]"))
    clone.edit("settings.ini", ask_for_more)
    assert clone.would_run()[0] == set()


@pytest.mark.parametrize(("notebook", "rerun"), [
    ("jobs/transferability", {"transferability", "tab1_leep"}), ("paper/tab2_pipelines", {"tab2_pipelines"}),
    ("jobs/transfer", {"transfer", "transferability", "tab1_leep", "tab2_pipelines", "fig03_convergence"})])
def test_code_reruns_what_depends_on_it(clone, notebook, rerun):
    clone.edit(f"nbs/{notebook}.ipynb", add_cell("code", "print('more')"))
    assert clone.would_run()[0] == rerun


def test_code_of_modules_counts_also_where_it_is_reached_by_others(clone):
    # the job imports a module that imports this one
    clone.edit("bridgexfer/prompts.py", lambda text: text + "\nMORE = 1\n")
    assert clone.would_run()[0] >= {"generate", "transfer"}


@pytest.mark.slow
def test_paper_leaves_every_table_and_figure(whole):
    clone, printed = whole
    papers = paper_notebooks(clone)
    figures = clone.folder/"runs/figures/smoke"
    csv, png, pdf = ({p.stem for p in figures.glob(f"*.{kind}")} for kind in ("csv", "png", "pdf"))
    assert papers <= csv
    assert papers - {"hyperparameters", "errata"} <= png & pdf
    assert all(len(p.read_text().splitlines()) > 1 for p in figures.glob("*.csv"))
    assert all(p.stat().st_size > 1000 for p in figures.iterdir() if p.suffix != ".csv")
    executed = {p.stem for p in (clone.folder/"runs/smoke/notebooks").glob("*.ipynb")}
    assert papers <= executed
    assert {"invert-style-digits", "invert-class-digits", "generate-real_guidance-digits"} <= executed
    assert {"architectures-digits-mini_vit", "clip-digits-clip"} <= executed
    assert re.search(r"\d+ of \d+ steps \(100%\) done", printed)


@pytest.mark.slow
def test_what_was_made_for_the_study_is_not_made_again_for_the_paper(whole):
    clone, printed = whole
    assert not re.search(r"^(Job \d+: )?(Scoring|Writing tab2_pipelines)", printed, re.M)
    assert clone.would_run("paper")[0] == set()


@pytest.mark.slow
def test_nor_does_it_rerun_a_table(whole, clone):
    clone.edit("settings.ini", ask_for_more)
    assert clone.would_run("paper")[0] == set()


@pytest.mark.slow
def test_a_sweep_reruns_alone(whole, clone):
    clone.edit("settings.ini", lambda text: text.replace("guidances      = 2 3.5\n", "guidances = 2 5\n"))
    assert clone.would_run("paper")[0] == {"generate", "transfer", "fig06_guidance", "hyperparameters"}
    said = clone.would_run("paper")[1]
    assert len(re.findall(r"nbs/jobs/(?:generate|transfer)\.ipynb", said)) == 2


def test_paper_would_run_every_notebook(clone):
    would = clone.would_run("paper")[0]
    jobs = {"invert", "generate", "transfer", "fixed", "clip", "alignment"}
    assert would >= paper_notebooks(clone) - PAPERS | jobs


def test_seeds_narrow_every_list_of_seeds(clone):
    said = clone.make("study", "PROFILE=smoke", "SEEDS=0 1", "--dry-run")
    for key in ("seeds", "few_seeds", "sweep_seeds", "beyond_seeds"): assert f' {key}="0 1"' in said
    assert "seeds=" not in clone.make("study", "PROFILE=smoke", "--dry-run")


def test_plan_lists_jobs_images_hours_and_rates(clone):
    said = clone.make("plan", "PROFILE=paper")
    assert re.search(r"H100-hours", said)
    assert re.search(r"^In all [\d,]{9} images", said, re.M)
    assert "projected" in said and "assumed" in said
    assert "digits" not in said
    assert clone.make("plan", "PROFILE=miniature", "SEEDS=0") != clone.make("plan", "PROFILE=miniature")


def test_settings_on_which_results_depend_rerun_everything(clone):
    clone.edit("settings.ini", lambda text: text.replace("[smoke]", "[smoke]\nguidance = 5"))
    assert clone.would_run()[0] == EVERYTHING


def test_narrowed_study_leaves_the_committed_figures_alone(clone):
    rates = clone.folder/"figures/miniature/tab5_learning_rates.csv"
    rates.parent.mkdir(exist_ok=True)
    absent = not rates.exists()
    if absent: rates.write_text("dataset\n")
    _, narrow = clone.would_run(profile="miniature", seeds=0)
    _, whole = clone.would_run(profile="miniature")
    if absent: rates.unlink()
    assert "input: figures/miniature/tab1_leep.csv, " in whole
    assert "input: runs/figures/miniature/tab1_leep.csv, " in narrow
    assert "-p overrides" in narrow and "-p overrides" not in whole


@pytest.mark.parametrize(("word", "said"), [
    ("PROFILE=huge", "Unknown profile 'huge': settings.ini has miniature, "),
    ("DATASETS=cats", "Unknown dataset 'cats': choose digits, digits-photo, greek, "),
    ("SET=guidence=5", "Unknown setting guidence: settings.ini has ")])
def test_mistakes_are_named_with_the_choices(clone, word, said):
    assert said in clone.make("study", word, ok=False)


def test_a_notebook_that_fails_shows_its_error_and_loses_no_figure(clone):
    clone.edit("nbs/paper/tab2_pipelines.ipynb", add_cell("code", "raise RuntimeError('as planned')"))
    code, said = clone.snakemake("tab2_pipelines")
    assert code and "RuntimeError: as planned" in said and "Traceback" in said
    figures = clone.folder/"runs/figures/smoke"
    for kind in ("csv", "png", "pdf"): assert (figures/f"tab2_pipelines.{kind}").stat().st_size
    assert "as planned" in (clone.folder/"runs/smoke/notebooks/tab2_pipelines.ipynb").read_text()
