"""Where the tests' time goes: what several share counts for itself, and who waits for it is not called heavy."""
import csv
import subprocess
import sys

from conftest import times_of
from test_project import ROOT

SHARING = """
import time
import pytest

def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass

@pytest.fixture(scope="module")
def base():
    burn(.3)
    yield
    burn(.2)

@pytest.fixture(scope="module")
def top(base):
    burn(.2)
    yield
    burn(.4)

def test_a(top): burn(.1)
def test_b(top, record_property): record_property("elsewhere", 2)
"""


def test_what_is_shared_counts_for_itself(tmp_path):
    "From the first test that needs it, to its end after the last."
    (tmp_path/"test_sharing.py").write_text(SHARING)
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", tmp_path, "--confcutdir", ROOT]
    here = [sys.executable, "-m", "pytest", *options, "-p", "conftest", "--times", tmp_path/"times.csv", tmp_path]
    done = subprocess.run(here, cwd=ROOT/"tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path/"times.csv", newline="") as f: found = {name: float(s) for name, s in csv.reader(f)}
    wanted = {"test_a": .1, "test_b": 2, "base, shared": .5, "top, shared": .6}
    assert {name.split("::")[-1]: s for name, s in found.items() if s >= .1}.keys() == wanted.keys()
    for name, seconds in found.items():
        expected = wanted.get(name.split("::")[-1], 0)
        assert expected - .05 <= seconds <= expected + .15, (name, seconds)


def test_the_committed_times_are_of_tests_that_exist():
    "A test that was renamed would be light again."
    files = {name.split("::")[0] for name in times_of(ROOT/"tests/times.csv") if "::" in name}
    texts = {file: (ROOT/file).read_text(encoding="utf-8") for file in files}
    named = [name.removesuffix(", shared") for name in times_of(ROOT/"tests/times.csv") if "::" in name]
    gone = [n for n in named if f"def {n.split('::')[1].split('[')[0]}(" not in texts[n.split("::")[0]]]
    assert not gone
