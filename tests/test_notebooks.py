"""Every notebook that exports runs. A file of its own, which takes half of the time: a file's tests share a worker."""
import pytest
from test_project import LIBRARY, name, run


@pytest.mark.parametrize("notebook", LIBRARY, ids=name)
def test_notebook_runs(notebook):
    done = run("nbdev-test", notebook, "--n-workers", 0)
    assert done.returncode == 0, done.stdout + done.stderr
