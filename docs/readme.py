"""Write README.md from nbs/index.ipynb: `python docs/readme.py`, or `make readme`. Runs the notebook, so what it shows is what it gives."""
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parent.parent


def readme() -> str: # Markdown
    "The text of README.md."
    nb = nbformat.read(ROOT/"nbs/index.ipynb", as_version=4)
    NotebookClient(nb, kernel_name="python3", resources={"metadata": {"path": str(ROOT/"nbs")}}).execute()
    for cell in nb.cells: # only what was written for readers: no progress bars, no warnings
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if "text/markdown" in o.get("data", {})]
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=("remove-input",)), MarkdownExporter=dict(preprocessors=["nbconvert.preprocessors.TagRemovePreprocessor"]))
    text, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    lines = "\n".join(line.rstrip() for line in re.sub(r"\]\((?!\w+:|#|\.\./)", "](nbs/", text).replace("](../", "](").splitlines()).strip("\n")
    while "\n\n\n" in lines: lines = lines.replace("\n\n\n", "\n\n")
    return lines + "\n"


if __name__ == "__main__":
    text = readme()
    if "--check" in sys.argv[1:]: sys.exit(0 if text == (ROOT/"README.md").read_text() else "README.md is not what nbs/index.ipynb gives: run `make readme`.")
    (ROOT/"README.md").write_text(text)
