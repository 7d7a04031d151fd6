"""What several test files share."""
import resource

import pytest
import torch
from bridgexfer.artefacts import PACKAGE


@pytest.fixture(scope="session")
def model():
    "The folder of the text-to-image pipeline that ships with the package."
    return str(PACKAGE / "weights" / "pipeline")


@pytest.fixture(scope="session")
def pipe(model):
    "That pipeline, open."
    from bridgexfer.models import load_pipeline

    return load_pipeline(model)


@pytest.fixture
def one_thread():
    "Arithmetic on one thread, so that two processes round alike."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- where the time goes: `make test ARGS="--times FILE"`

def pytest_addoption(parser):
    parser.addoption("--times", metavar="FILE", help="append to FILE the processor seconds of every test, as CSV")


def processor_seconds():
    "Of this process and of those that it waited for."
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "A fixture that several tests share counts for the first of them."
    before = processor_seconds()
    result = yield
    times = item.config.getoption("times")
    if times:
        with open(times, "a") as f: f.write(f'"{item.nodeid}",{processor_seconds() - before:.1f}\n')
    return result
