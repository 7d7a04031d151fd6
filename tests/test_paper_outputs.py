"""The paper's pages: which outputs of a run are stored in them, and what the stored ones must be."""
import json
import re
import runpy
import subprocess
import sys
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest
from bridgexfer.artefacts import code_hash
from nbformat import read, write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from test_project import ENV, MACHINE, PAPER, ROOT, cells, name, source

OUTPUTS = runpy.run_path(str(ROOT/"docs/outputs.py"))
PAGES = runpy.run_path(str(ROOT/"docs/pages.py"))
CODE = ["import json", 'profile = "smoke"', "table", 'plt.show()\nsave_figure(fig, table, study.figures_dir, "fig");',
        'say("Better.")']


def picture(size): # bytes of noise, in base64
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer := BytesIO(), "PNG")
    return b64encode(buffer.getvalue()).decode()


def page():
    "A small page of the paper, without outputs."
    code = [new_code_cell(text) for text in CODE]
    code[1].metadata.tags = ["parameters"]
    parts = [new_markdown_cell("# A page\n\n> A question?"), *code[:3], new_markdown_cell("## The figure"), code[3],
             new_markdown_cell("## What it means for the claims"), code[4]]
    return new_notebook(cells=parts, metadata={"kernelspec": {"name": "python3", "display_name": "python3",
                                                              "language": "python"}})


def shown(kind, value): return new_output("display_data", {kind: value, "text/plain": "<object>"})


def executed(overrides="", exception=None):
    "The same page, as papermill leaves it."
    nb = page()
    code = [c for c in nb.cells if c.cell_type == "code"]
    progress = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "100%"})
    warning = new_output("stream", name="stderr", text=f"{ROOT}/nbs: a warning")
    code[2].outputs = [progress, warning, shown("text/html", f"<table><td>{ROOT}/figures</td></table>")]
    code[3].outputs = [shown("image/png", picture(300))]
    code[4].outputs = [shown("text/markdown", "Better.")]
    injected = new_code_cell('profile = "miniature"', metadata={"tags": ["injected-parameters"]})
    nb.cells.insert(3, injected)
    parameters = {"profile": "miniature"} | ({"overrides": overrides} if overrides else {})
    nb.metadata["papermill"] = {"parameters": parameters, "exception": exception,
                                "end_time": "2026-01-02T03:04:05+00:00"}
    return nb


@pytest.fixture
def folder(tmp_path):
    "A clone with one page and its figure."
    for part in ("nbs/paper", "runs", "figures/miniature"): (tmp_path/part).mkdir(parents=True)
    write(page(), tmp_path/"nbs/paper/page.ipynb")
    (tmp_path/"figures/miniature/fig.png").touch()
    return tmp_path


def store(folder, nb):
    write(nb, folder/"runs/page.ipynb")
    path = folder/"nbs/paper/page.ipynb"
    said = OUTPUTS["store_page"](path, folder/"runs/page.ipynb", folder/"figures/miniature", "seeds 0 1", "a machine")
    return said, read(path, as_version=4)


def test_outputs_of_a_run_are_stored(folder):
    before = code_hash(folder/"nbs/paper/page.ipynb")
    said, nb = store(folder, executed())
    assert said == [] and code_hash(folder/"nbs/paper/page.ipynb") == before # no job runs again
    assert [c.source for c in nb.cells] == [c.source for c in page().cells]
    first, parameters, table, figure, meaning = (c for c in nb.cells if c.cell_type == "code")
    line = "*Outputs: profile miniature, seeds 0 1, 2026-01-02, a machine.*"
    assert [o.data for o in first.outputs] == [{"text/markdown": line}] and not parameters.outputs
    assert parameters.metadata.tags == ["parameters"]
    assert [o.data for o in table.outputs] == [{"text/html": "<table><td>./figures</td></table>"}]
    assert [o.data for o in meaning.outputs] == [{"text/markdown": "Better."}]
    stored = figure.outputs[0].data
    assert stored["text/markdown"] == "![A page: The figure](../../figures/miniature/fig.png)"
    assert set(stored) == {"text/markdown", "image/jpeg"} and len(json.dumps(stored)) <= OUTPUTS["LIMIT"]


def test_stored_outputs_survive_cleaning(folder):
    store(folder, executed())
    path = folder/"nbs/paper/page.ipynb"
    before = path.read_text()
    (folder/"pyproject.toml").write_text((ROOT/"pyproject.toml").read_text())
    subprocess.run(["nbdev-clean"], cwd=folder, env=ENV, check=True, capture_output=True)
    assert path.read_text() == before


def test_nothing_is_stored_of_another_run(folder):
    other = executed()
    other.cells[-1].source = 'say("Worse.")'
    bad = {"its code has changed": other, "had other settings": executed('{"seeds": "0"}'),
           "failed or was stopped": executed(exception=True)}
    for why, nb in bad.items():
        said, left = store(folder, nb)
        assert len(said) == 1 and why in said[0]
        assert not any(c.get("outputs") for c in left.cells)
    missing = OUTPUTS["store_page"](folder/"nbs/paper/page.ipynb", folder/"none.ipynb", folder, "", "")
    assert missing == ["page.ipynb: this profile has not run it."]


def test_seeds_in_words():
    settings = {"seeds": (0, 1, 2, 3), "few_seeds": (0, 2), "sweep_seeds": (), "tuning_seeds": (100,)}
    assert OUTPUTS["seeds_of"](settings) == "seeds 0 to 3, few-shot seeds 0 2"


def test_outputs_of_a_profile_whose_figures_are_ignored_are_not_stored():
    done = subprocess.run([sys.executable, "docs/outputs.py", "--paper", "smoke"], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)
    assert done.returncode and "The figures of the profile smoke are not committed" in done.stderr


def test_a_figure_without_a_committed_one_is_stored_small(folder):
    (folder/"figures/miniature/fig.png").unlink()
    _, nb = store(folder, executed())
    assert list(nb.cells[5].outputs[0].data) == ["image/jpeg"]


def test_the_site_folds_code_and_shows_outputs(folder):
    _, nb = store(folder, executed())
    parts = PAGES["folded"](nb.cells[1:])
    kinds = [(c.cell_type, len(c.get("outputs", []))) for c in parts]
    assert kinds == [("code", 1), ("code", 1), ("markdown", 0), ("code", 1), ("markdown", 0), ("code", 1)]
    assert list(parts[3].outputs[0].data) == ["text/markdown"] # the committed figure
    joined = PAGES["folded"](page().cells[1:])
    assert [c.cell_type for c in joined] == ["code", "markdown", "code", "markdown", "code"]


# ---- the pages themselves

WITH_OUTPUTS = [p for p in PAPER if any(c["outputs"] for c in cells(p))]


def texts(cell):
    "What a reader sees of a cell, as text."
    data = [o.get("data", {"text/plain": o.get("text", "")}) for o in cell["outputs"]]
    return ["".join(v) for d in data for kind, v in d.items() if kind.startswith("text/")]


@pytest.mark.parametrize("notebook", WITH_OUTPUTS, ids=name)
def test_stored_pages_say_what_they_are_of(notebook):
    code = cells(notebook)
    line = texts(code[0])[0]
    assert re.fullmatch(r"\*Outputs: profile \w+, seeds \d.*, \d{4}-\d\d-\d\d, .+\.\*", line), line
    for cell in code:
        assert len(json.dumps(cell["outputs"], ensure_ascii=False).encode()) <= OUTPUTS["LIMIT"]
        assert not [o for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
        assert not MACHINE.search("\n".join(texts(cell)))
    for link in re.findall(r"!\[[^]]{8,}\]\((\S+)\)", "\n".join(t for c in code for t in texts(c))):
        assert (notebook.parent/link).exists(), link


@pytest.mark.parametrize("notebook", WITH_OUTPUTS, ids=name)
def test_stored_pages_have_their_conclusion(notebook):
    parts = json.loads(notebook.read_text())["cells"]
    headings = [i for i, c in enumerate(parts) if re.search(r"^## What it means", source(c), re.M)]
    if not headings: pytest.skip("a page without claims")
    said = [t for c in parts[headings[-1]:] if c["cell_type"] == "code" for t in texts(c)]
    assert any(t.strip() for t in said), f"run docs/outputs.py --paper after `make paper`: {notebook.name}"
