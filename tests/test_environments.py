"""Where commands run: other locales, another Python's variables, no home, long paths; and jobs that are killed."""
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from bridgexfer.study.workflow import cause
from test_project import ROOT

MAKE = ("make", "--no-print-directory", "-o", ".venv/.complete")


def run_cell(source, folder, env=(), engine="ipc"):
    "Run a notebook of one cell as the Snakefile runs a job: its exit status, notebook and log."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata={"kernelspec": {
        "name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(notebook, folder/"a.ipynb")
    shell = next(line.split('"')[1] for line in (ROOT/"Snakefile").read_text(encoding="utf-8").splitlines()
                 if line.startswith("LOGGED"))
    words = f"{sys.executable} -m papermill --engine {engine} --no-progress-bar a.ipynb b.ipynb"
    command = shell.replace("{params.command}", words).replace("{log:q}", "log.txt")
    done = subprocess.run(["bash", "-c", command], cwd=folder, env={**os.environ, **dict(env)})
    return done.returncode, folder/"b.ipynb", folder/"log.txt"


# ---- how a job ended

def test_a_job_that_ends_well_has_no_cause(tmp_path):
    code, notebook, log = run_cell("1", tmp_path)
    assert code == 0 and cause(notebook, log) is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kernel_that_is_killed_is_named_as_killed(tmp_path, number):
    code, notebook, log = run_cell(f"import os; os.kill(os.getpid(), {int(number)})", tmp_path)
    why = cause(notebook, log)
    assert code and f"killed by {signal.Signals(number).name}" in why
    assert ("out of memory" in why) == (number == signal.SIGKILL)


def test_papermill_that_is_killed_is_named_as_killed(tmp_path):
    code, notebook, log = run_cell("import os; os.kill(os.getppid(), 9)", tmp_path)
    assert code == 137 and "killed by SIGKILL: most likely out of memory" in cause(notebook, log)


def test_a_command_that_is_missing_is_not_a_kill(tmp_path):
    (tmp_path/"log.txt").write_text("bash: papermill: command not found\nEnded with status 127\n", encoding="utf-8")
    why = cause(tmp_path/"none", tmp_path/"log.txt")
    assert "not found" in why and "outside" not in why


# ---- the kernel is this environment's

def foreign_kernel(folder):
    "A user's kernelspec that fails, under the name that notebooks have."
    spec = folder/"share/jupyter/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/bin/false"], "display_name": "mine", "language": "python"}', encoding="utf-8")
    return {"JUPYTER_PATH": str(folder/"share/jupyter"), "JUPYTER_PREFER_ENV_PATH": "0"}


def foreign_startup(folder):
    "A user's start-up file of IPython that fails."
    startup = folder/"ipython/profile_default/startup/00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("seen = 'mine'", encoding="utf-8")
    return {"IPYTHONDIR": str(folder/"ipython")}


def long_folder(folder):
    "A folder for temporary files with a path too long for sockets."
    long = folder/("t" * 60)/("t" * 60)
    long.mkdir(parents=True)
    return {"TMPDIR": str(long)}


def no_utf8(folder): return {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
@pytest.mark.parametrize("place", [foreign_kernel, foreign_startup, long_folder, no_utf8])
def test_jobs_run_anywhere(tmp_path, place):
    source = "import sys\nassert 'seen' not in globals()\nprint('“' + sys.prefix)"
    code, notebook, log = run_cell(source, tmp_path, place(tmp_path))
    assert code == 0, log.read_text(encoding="utf-8")
    assert f"“{sys.prefix}" in notebook.read_text(encoding="utf-8")


# ---- make's commands have the environment's Python and no other's

def recipe_environment(**env):
    "What a recipe of the Makefile sees."
    printing = "include Makefile\nseen:\n\t@$(RUN) env\n"
    done = subprocess.run([*MAKE, "-f", "-", "seen"], cwd=ROOT, env={**os.environ, **env}, input=printing,
                          stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_another_python_does_not_leak_into_make():
    foreign = dict(PYTHONHOME="/nowhere", PYTHONPATH="/nowhere", CONDA_PREFIX="/nowhere", MPLBACKEND="nonsense",
                   PYTHONWARNINGS="error", PYTHONOPTIMIZE="2", PIP_USER="1", PYTHONDONTWRITEBYTECODE="1")
    seen = recipe_environment(**foreign)
    assert not [k for k, v in foreign.items() if seen.get(k) == v]
    assert seen["PYTHONPATH"] == str(ROOT) and seen["PYTHONUTF8"] == "1"
    assert Path(seen["PATH"].split(os.pathsep)[0]) == ROOT/".venv/bin"


def test_a_path_with_blanks_reaches_the_jobs_whole(tmp_path):
    words = ["paper", "PROFILE=smoke", "SEEDS=0", f"SET=runs='{tmp_path}/my runs'", "SNAKEMAKE_ARGS=-n -p"]
    done = subprocess.run([*MAKE, *words], cwd=ROOT, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
    lines = re.findall(r"^Shell command: (papermill .*/generate\.ipynb.*)$", done.stdout, re.M)
    assert lines and not [line for line in lines if f"{tmp_path}/my" in shlex.split(line)] # half of a path
    assert all(any(w.startswith(f"{tmp_path}/my runs/") for w in shlex.split(line)) for line in lines)


@pytest.mark.parametrize(("arguments", "reads"), [("", True), ("--dry-run", False), ("-n -p", False)])
def test_a_dry_run_prints_no_table(arguments, reads):
    words = ["-n", "study", "PROFILE=smoke", f"SNAKEMAKE_ARGS={arguments}"]
    said = subprocess.run([*MAKE, *words], cwd=ROOT, encoding="utf-8", stdout=subprocess.PIPE, check=True).stdout
    assert ("bridgexfer table" in said) == reads and "snakemake" in said


@pytest.mark.slow
def test_a_job_runs_in_a_folder_with_blanks(tmp_path):
    made = tmp_path/"my runs"/"smoke/generate/single-digits.json"
    words = [Path(sys.executable).with_name("snakemake"), "--profile", "profiles/local", made,
             "--config", "profile=smoke", "seeds=0", "images=2", f"runs={tmp_path}/my runs"]
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(words, cwd=ROOT, env=env, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and made.exists(), done.stdout[-3000:]
    assert list(tmp_path.rglob("shard-*.parquet")) and os.listdir(tmp_path) == ["my runs"]


# ---- a few seconds of the smoke profile, wherever it runs

def nobody(): # an account without a name, as in a container
    os.setgid(54321)
    os.setuid(54321)


def open_to_all(path):
    "Whether every account may reach a file."
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def read_only_home(folder):
    home = folder/"home"
    home.mkdir(mode=0o555)
    return {"HOME": str(home)}


PLACES = { # variables, from a folder of the test; and what the process does before it starts
    "C": (no_utf8, None), "Latin-1": (lambda folder: {**no_utf8(folder), "LC_ALL": "en_US.ISO-8859-1"}, None),
    "no HOME": (lambda folder: {"HOME": ""}, None), "read-only HOME": (read_only_home, None),
    "no passwd entry": (lambda folder: {"HOME": "/nonexistent"}, nobody), "long TMPDIR": (long_folder, None),
    "no git": (lambda folder: {"PATH": "/nowhere"}, None), "umask": (lambda folder: {}, lambda: os.umask(0o077)),
    "one core": (lambda folder: {}, lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])),
    "no terminal": (lambda folder: {"TERM": ""}, os.setsid)}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_commands_run_anywhere(place, tmp_path):
    variables, first = PLACES[place]
    if first is nobody and os.getuid(): pytest.skip("it takes root to become nobody")
    if first is nobody and not open_to_all(Path(sys.executable).resolve()): pytest.skip("this Python is root's alone")
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables(tmp_path)}
    runs = tmp_path/"my runs"
    runs.mkdir(mode=0o777)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent): folder.chmod(0o711) # pytest's are 0700
    runs.chmod(0o777)
    code = "import sys; from bridgexfer.cli import main; sys.exit(main())"
    words = ["generate", "digits", "--profile", "smoke"]
    for setting in (f"runs={runs}", "images=2", "steps=2"): words += ["--set", setting]
    for _ in range(2): # made, and found
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, env=env, preexec_fn=first,
                              encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(list(runs.rglob("shard-*.parquet"))) == 1 and not list(runs.rglob("*.part"))


# ---- what is missing is said before anything starts

@pytest.mark.slow
@pytest.mark.parametrize(("target", "said"), [("study", "run `make tune PROFILE=evening` first"),
                                              ("learning_rates", "`make datasets FETCH=pets`")])
def test_what_is_missing_is_one_sentence(tmp_path, target, said):
    config = ["profile=evening", *(f"{k}={tmp_path/k}" for k in ("runs", "data", "figures"))]
    words = [Path(sys.executable).with_name("snakemake"), "--profile", "profiles/local", target, "--config", *config]
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(words, cwd=ROOT, env=env, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode and done.stdout.count(said) == 1
    assert "Traceback" not in done.stdout and not list(tmp_path.glob("runs/*/logs/*"))
