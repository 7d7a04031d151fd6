"""Every notebook that exports runs. A file of its own, which takes half of the time: a file's tests share a worker."""
import pytest
from test_project import LIBRARY, name
from warm import run_notebook


@pytest.mark.parametrize("notebook", LIBRARY, ids=name)
def test_notebook_runs(notebook, tmp_path, record_property):
    status, seconds = run_notebook(notebook, tmp_path/"log")
    record_property("elsewhere", seconds)
    assert status == 0, (tmp_path/"log").read_text()


def test_failures_are_noticed(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    broken = new_notebook(cells=[new_code_cell("assert 1 == 2, 'one is not two'")])
    nbformat.write(broken, tmp_path/"broken.ipynb")
    status, _ = run_notebook(tmp_path/"broken.ipynb", tmp_path/"log")
    assert status == 1
    assert "one is not two" in (tmp_path/"log").read_text()
