"""Every notebook of the library runs; a file of its own, because a file's tests run one after the other, and these are half of the time."""
import pytest
from test_project import LIBRARY, name, run


@pytest.mark.parametrize("notebook", LIBRARY, ids=name)
def test_notebook_runs(notebook):
    done = run("nbdev-test", notebook, "--n-workers", 0)
    assert done.returncode == 0, done.stdout + done.stderr
