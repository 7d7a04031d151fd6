"""Write README.md from nbs/index.ipynb: `python docs/readme.py`, or `make readme`. The notebook is executed first."""
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
README = ROOT/"README.md"
CONFIG = Config(
    TagRemovePreprocessor={"enabled": True, "remove_input_tags": ("remove-input",)},
    MarkdownExporter={"preprocessors": ["nbconvert.preprocessors.TagRemovePreprocessor"]},
)


def from_top(markdown: str) -> str:
    "Markdown whose relative links start from nbs/, with links that start from the folder above."
    return re.sub(r"\]\((?!\w+:|#|\.\./)", "](nbs/", markdown).replace("](../", "](")


def readme() -> str: # Markdown
    "The text of README.md."
    nb = nbformat.read(ROOT/"nbs/index.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT/"nbs")}}
    NotebookClient(nb, kernel_name="python3", startup_timeout=600, resources=resources).execute()
    for cell in nb.cells: # no progress bars, no warnings
        if cell.cell_type != "code": continue
        cell.outputs = [o for o in cell.outputs if "text/markdown" in o.get("data", {})]
    markdown, _ = MarkdownExporter(config=CONFIG).from_notebook_node(nb)
    lines = "\n".join(line.rstrip() for line in from_top(markdown).splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n"


if __name__ == "__main__":
    markdown = readme()
    if "--check" not in sys.argv[1:]: README.write_text(markdown, encoding="utf-8")
    elif markdown != README.read_text(encoding="utf-8"):
        sys.exit("README.md is not what nbs/index.ipynb gives: run `make readme`.")
