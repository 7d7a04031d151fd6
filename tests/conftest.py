"""What several test files share."""
import csv
from functools import partial
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
    said = "append to FILE the processor seconds of every test and shared fixture, as CSV"
    parser.addoption("--times", metavar="FILE", help=said)


class Meter:
    "Processor seconds between `start` and `stop`, by name; what is inside another count is that one's."
    def __init__(self):
        self.seconds, self.open = {}, []

    def start(self, name): self.open.append((name, processor_seconds()))

    def stop(self, elsewhere=0.):
        name, before = self.open.pop()
        spent = processor_seconds() - before + elsewhere
        self.seconds[name] = self.seconds.get(name, 0.) + spent
        if self.open: # of the one around it no more
            outer, began = self.open[-1]
            self.open[-1] = outer, began + spent - elsewhere


METER = Meter()
SHARED = ", shared"


def write_times(config, names):
    if not config.getoption("times"): return
    rows = [(name, f"{METER.seconds[name]:.1f}") for name in names]
    with open(config.getoption("times"), "a", encoding="utf-8", newline="") as f: csv.writer(f).writerows(rows)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    METER.start(item.nodeid)
    result = yield
    METER.stop(dict(item.user_properties).get("elsewhere", 0.))
    write_times(item.config, [item.nodeid])
    return result


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    "What several tests share counts for itself, not for the first of them; so does its end, not for the last."
    if fixturedef.scope == "function": return (yield)
    name = f"{fixturedef.baseid or 'tests'}::{fixturedef.argname}{SHARED}"
    fixturedef.addfinalizer(METER.stop) # the last to run
    METER.start(name)
    try: return (yield)
    finally:
        METER.stop()
        fixturedef.addfinalizer(partial(METER.start, name)) # before its own


def pytest_sessionfinish(session):
    write_times(session.config, [name for name in METER.seconds if name.endswith(SHARED)])


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
