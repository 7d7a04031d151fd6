"""Turn the notebooks into pages for Sphinx, in _pages: `python docs/pages.py`. `make docs` calls it first, and then
Sphinx, which executes the pages that are not excluded in docs/conf.py."""
import ast
import inspect
import re
import subprocess
from functools import cache
from html import escape
from importlib import import_module
from pathlib import Path
from types import ModuleType

import nbformat
import pandas as pd
from fastcore.docments import MarkdownRenderer
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pandas.api.types import is_string_dtype

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
FIGURES = ROOT/"figures"
PAGES = ROOT/"_pages" # beside nbs, so that relative links and paths work from either
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


# ---- notebooks

def read(path: Path) -> NotebookNode: return nbformat.read(path, as_version=4)


def opening(path: Path) -> tuple[str, str]: # title, one line
    "How a notebook introduces itself."
    title, *lines = read(path).cells[0].source.splitlines()
    return title.lstrip("# "), next(line.lstrip("> ") for line in lines if line.startswith(">"))


@cache
def opened(name: str) -> ModuleType: # name: below the package, such as "study.grid"
    "A module, with the names that it imports for type checkers only."
    module = import_module(f"bridgexfer.{name}")
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), module.__file__, "exec"), vars(module))
    return module


def label(module: str, name: str) -> str:
    "The target of a signature. Sphinx lowers labels, so classes are told from functions: `Pipeline`, `pipeline`."
    return f"{module}.{name}" + "-class" * name[0].isupper()


def signatures(module: str, # that exports the cell
               source: str, # of the cell
              ) -> list[NotebookNode]: # Markdown cells
    "The public functions and classes of a cell: parameters, types, docstrings."
    defined = [n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    cells = []
    for name in (n for n in defined if n[0] != "_"):
        doc = MarkdownRenderer(getattr(opened(module), name))._repr_markdown_()
        cells.append(new_markdown_cell(f"({label(module, name)})=\n#### {name}\n\n{doc}"))
    return cells


def cells_of(path: Path) -> list[NotebookNode]:
    "The cells of a page: those of the notebook, with signatures before exported code, which is folded."
    title, line = opening(path)
    about, module, cells = f"{title}: {line}", None, []
    for c in read(path).cells:
        if c.cell_type == "markdown":
            headings = re.findall(r"^##+ (.+)$", c.source, re.M)
            if headings: about = f"{title}: {headings[-1]}"
        else:
            directives = re.findall(r"^#\| *(.+)$", c.source, re.M)
            module = next((d.split()[1] for d in directives if d.startswith("default_exp")), module)
            c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
            c.metadata.mystnb = {"image": {"alt": about}}
            tags = c.metadata.setdefault("tags", [])
            if "eval: false" in directives: tags.append("skip-execution")
            if "export" in directives:
                cells += signatures(module, c.source)
                tags.append("hide-input")
        if c.source.strip(): cells.append(c)
    return cells


def stored(cells: list[NotebookNode]) -> list[NotebookNode]: # outputs
    "The outputs of code cells, with the committed figure instead of the small copy that GitHub shows."
    outputs = [o for c in cells for o in c.get("outputs", [])]
    for o in outputs:
        if "text/markdown" in o.get("data", {}): o.data = {"text/markdown": o.data["text/markdown"]}
    return outputs


def folded(cells: list[NotebookNode]) -> list[NotebookNode]:
    "Cells of a page that is not executed: code is folded, and joined as far as it shows nothing."
    joined, code = [], []
    for cell in cells:
        if cell.cell_type == "code": code.append(cell)
        shows = bool(cell.get("outputs"))
        if code and (shows or cell.cell_type == "markdown"):
            joined.append(folded_code(code))
            code = []
        if cell.cell_type == "markdown": joined.append(cell)
    return [*joined, *([folded_code(code)] if code else [])]


def folded_code(cells: list[NotebookNode]) -> NotebookNode:
    "Code cells as one, with their stored outputs."
    metadata = {**cells[-1].metadata, "tags": ["hide-input"]}
    return new_code_cell("\n\n".join(c.source for c in cells), outputs=stored(cells), metadata=metadata)


# ---- tables and figures, from the files that are committed

def linked(path: Path) -> str: return f"/../{path.relative_to(ROOT)}" # from any page


def table(frame: pd.DataFrame,
          rows: int | None = None, # at most
         ) -> str: # HTML
    "The first rows of a table; text columns with one value throughout become a line below it."
    def repeats(column): return is_string_dtype(column) and column.nunique(dropna=False) == 1
    constant = [c for c in frame if len(frame) > 3 and repeats(frame[c])]
    shown = frame.drop(columns=constant).head(rows)
    html = shown.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)
    note = escape("; ".join(f"{c}: {frame[c].iloc[0]}" for c in constant))
    return f'<div class="wide">{html}</div>' + (f"<p>In every row, {note}</p>" if constant else "")


def tables(files: list[Path]) -> str: # Markdown
    "Committed tables, each with a link to its CSV file."
    parts = []
    for f in files:
        frame = pd.read_csv(f)
        first = f"The first 40 of {len(frame)} rows of " if len(frame) > 40 else ""
        parts.append(f"{first}[`{f.name}`]({linked(f)}):\n\n{table(frame, 40)}")
    return "\n\n".join(parts)


def committed(path: Path) -> list[Path]:
    "The files in figures/ that a notebook has left."
    longer = tuple(p.stem for p in NBS.glob("*/*.ipynb") if p.stem.startswith(f"{path.stem}_")) # notebooks of their own
    files = [f for folder in (FIGURES, FIGURES/"miniature") for f in sorted(folder.glob(f"{path.stem}*"))]
    return [f for f in files if not longer or not f.name.startswith(longer)]


def measured(path: Path) -> list[NotebookNode]: # Markdown cells
    "What the last complete run measured for a notebook's table or figure, and what the paper prints."
    files = committed(path)
    cells = []
    if files:
        pictures = [f"![{': '.join(opening(path))}]({linked(f)})" for f in files if f.suffix == ".png"]
        numbers = tables([f for f in files if f.suffix == ".csv"])
        cells.append(new_markdown_cell("\n\n".join(["## Measured", *pictures, numbers])))
    published = pd.read_csv(FIGURES/"published.csv", dtype=str)
    theirs = published[published.table == path.stem.split("_")[0]]
    if len(theirs):
        pivot = theirs.pivot_table(index="row", columns="dataset", values="value", aggfunc="first", sort=False)
        cells.append(new_markdown_cell("## Published\n\n" + table(pivot.reset_index())))
    return cells


def files_of(path: Path) -> list[NotebookNode]: # Markdown cells
    "Links to the tables of a page that shows them as it was run."
    found = [f for f in committed(path) if f.suffix == ".csv"]
    links = ", ".join(f"[`{f.name}`]({linked(f)})" for f in found)
    return [new_markdown_cell(f"## Files\n\nThe tables of this page: {links}.")] if found else []


def gallery(patterns: str) -> str: # Markdown; patterns: of notebooks below nbs, without ending
    "A card for each notebook: picture, title, one line."
    cards = []
    for path in (p for pattern in patterns.split() for p in sorted(NBS.glob(f"{pattern}.ipynb"))):
        title, line = opening(path)
        image, page = FIGURES/f"miniature/{path.stem}.png", path.relative_to(NBS)
        picture = f"[![{title}: {line}]({linked(image)})]({page})\n\n" if image.exists() else ""
        cards.append(f":::{{container}} card\n{picture}[**{title}**]({page})\n\n{line}\n:::")
    return "\n".join(["::::{container} gallery", *cards, "::::"])


# ---- pages

def page(path: Path) -> str: # JSON
    "The notebook that Sphinx reads."
    place, cells = path.relative_to(NBS), cells_of(path)
    note = f"This page is the notebook {{download}}`nbs/{place} </../nbs/{place}>`; `make lab` opens it."
    if path.stem == "index":
        for c in cells: c.source = c.source.replace("(../CONTRIBUTING.md", "(contributing.md") # a page of the site
        cells.append(new_markdown_cell((ROOT/"docs/contents.md").read_text(encoding="utf-8")))
    else: cells[0].source += f"\n\n```{{container}} notebook\n{note}\n```"
    if place.parts[0] in ("paper", "benchmarks"):
        shown = any(c.get("outputs") for c in cells) # as it was run; else the committed tables and figures
        before, after = ([], files_of(path)) if shown else (measured(path), [])
        cells = [cells[0], *before, *folded(cells[1:]), *after]
    return nbformat.writes(new_notebook(cells=cells, metadata=METADATA))


def text(path: Path) -> str: # Markdown
    "A page that is not a notebook; its comments ask for galleries, tables and `make help`."
    def commands(_): return subprocess.check_output(["make", "-s", "-C", ROOT, "help"], encoding="utf-8").strip()
    def named(match): return tables([FIGURES/name for name in match[1].split() if (FIGURES/name).exists()])
    filled = re.sub(r"<!-- gallery (.+) -->", lambda m: gallery(m[1]), path.read_text(encoding="utf-8"))
    filled = re.sub(r"<!-- tables (.+) -->", named, filled)
    return re.sub("<!-- make help -->", commands, filled)


def main() -> None:
    pages = {PAGES/p.relative_to(NBS): page(p) for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    pages |= {PAGES/p.name: text(p) for p in (ROOT/"docs/pages").glob("*.md")}
    for old in {p for p in PAGES.rglob("*") if p.is_file()} - pages.keys(): old.unlink()
    for path, content in pages.items():
        # untouched, so that Sphinx does not read it again
        if path.exists() and path.read_text(encoding="utf-8") == content: continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__": main()
