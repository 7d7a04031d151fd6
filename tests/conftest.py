"""What several test files share."""

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
