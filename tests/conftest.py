"""What several test files share."""
import csv
from pathlib import Path

import pytest
from warm import processor_seconds


@pytest.fixture(scope="session")
def model():
    "The folder of the text-to-image pipeline that ships with the package."
    from bridgexfer.artefacts import PACKAGE # here and below: `make check` does without torch
    return str(PACKAGE / "weights" / "pipeline")


@pytest.fixture(scope="session")
def pipe(model):
    "That pipeline, open."
    from bridgexfer.models import load_pipeline

    return load_pipeline(model)


@pytest.fixture
def one_thread():
    "Arithmetic on one thread, so that two processes round alike."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- where the time goes: `make test ARGS="--times FILE"`

def pytest_addoption(parser):
    parser.addoption("--times", metavar="FILE", help="append to FILE the processor seconds of every test, as CSV")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "A fixture that several tests share counts for the first of them."
    before = processor_seconds()
    result = yield
    times = item.config.getoption("times")
    if times:
        seconds = processor_seconds() - before + dict(item.user_properties).get("elsewhere", 0)
        with open(times, "a", encoding="utf-8", newline="") as f:
            csv.writer(f).writerow([item.nodeid, f"{seconds:.1f}"])
    return result


# ---- the longest files first, so that no process waits for them at the end; and what `make test` leaves to others

LONGEST = ("test_slurm.py", "test_project.py", "test_jobs.py", "test_site.py")
TIMES = Path(__file__).with_name("times.csv")
HEAVY = 5 # processor seconds from which a test is `heavy`

def times_of(path): # nodeid -> processor seconds; short tests are not in it
    "The committed times of tests."
    with open(path, encoding="utf-8", newline="") as f:
        return {row["test"]: float(row["processor_seconds"]) for row in csv.DictReader(f)}


@pytest.hookimpl(tryfirst=True) # before `-m` looks at marks
def pytest_collection_modifyitems(items):
    times = times_of(TIMES)
    for item in items:
        if times.get(item.nodeid, 0) >= HEAVY: item.add_marker(pytest.mark.heavy)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
