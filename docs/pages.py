"""Turn the notebooks into pages for Sphinx, in _pages: `python docs/pages.py`, which `make docs` calls first. Sphinx runs those that are to be run (docs/conf.py)."""
import ast, inspect, re, subprocess
from functools import cache
from html import escape
from importlib import import_module
from itertools import groupby
from pathlib import Path

import nbformat
import pandas as pd
from fastcore.docments import MarkdownRenderer
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pandas.api.types import is_string_dtype

ROOT = Path(__file__).resolve().parent.parent
NBS, FIGURES, PAGES = ROOT/"nbs", ROOT/"figures", ROOT/"_pages" # beside nbs: what a notebook finds from there, its page finds too


# ---- notebooks

def read(path: Path) -> NotebookNode: return nbformat.read(path, as_version=4)

def opening(path: Path) -> tuple: # title, one line
    title, *lines = read(path).cells[0].source.splitlines()
    return title.lstrip("# "), next(line.lstrip("> ") for line in lines if line.startswith(">"))

@cache
def opened(name: str): # a module of the library, with the types that it imports for its signatures alone
    module = import_module(f"bridgexfer.{name}")
    for line in re.findall(r"^if TYPE_CHECKING: (.+)$", inspect.getsource(module), re.M): exec(line, vars(module))
    return module

def signatures(module: str, source: str) -> list: # Markdown cells: what the functions and classes of a cell take and give
    names = [n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    docs = [MarkdownRenderer(getattr(opened(module), n))._repr_markdown_() for n in names]
    labels = [f"{module}.{n}" + "-class" * n[0].isupper() for n in names] # labels know no capitals, and `Pipeline` is not `pipeline`
    return [new_markdown_cell(f"({label})=\n#### {n}\n\n{doc}") for label, n, doc in zip(labels, names, docs)]

def cells_of(path: Path) -> list: # cells of a page: the story; before exported code its signatures
    (title, line), cells, module = opening(path), [], None
    about = f"{title}: {line}"
    for c in read(path).cells:
        if c.cell_type == "markdown": about = ([f"{title}: {h}" for h in re.findall(r"^##+ (.+)$", c.source, re.M)] or [about])[-1]
        else:
            words, tags = re.findall(r"^#\| *(.+)$", c.source, re.M), c.metadata.setdefault("tags", [])
            module = next((w.split()[1] for w in words if w.startswith("default_exp")), module)
            c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
            c.metadata.mystnb = {"image": {"alt": about}}
            if "eval: false" in words: tags.append("skip-execution")
            if "export" in words:
                cells += signatures(module, c.source)
                tags.append("hide-input")
        if c.source.strip(): cells.append(c)
    return cells

def folded(cells: list) -> list: # code that is not run here is not what one comes to read
    joined = []
    for kind, group in groupby(cells, lambda c: c.cell_type):
        joined += group if kind == "markdown" else [new_code_cell("\n\n".join(c.source for c in group), metadata={"tags": ["hide-input"]})]
    return joined


# ---- tables and figures, from the files that are committed

def table(frame: pd.DataFrame, rows: int | None = None) -> str: # HTML of the first rows; words that are the same in all are said once, below
    same = [c for c in frame if len(frame) > 3 and is_string_dtype(frame[c]) and frame[c].nunique(dropna=False) == 1]
    once = escape("; ".join(f"{c}: {frame[c].iloc[0]}" for c in same))
    return f'<div class="wide">{frame.drop(columns=same).head(rows).to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)}</div>' + (f"<p>In every row, {once}</p>" if same else "")

def tables(files: list) -> str: # Markdown
    parts = []
    for f in files:
        frame = pd.read_csv(f)
        parts.append(f"{f'The first 40 of {len(frame)} rows of' if len(frame) > 40 else ''} [`{f.name}`](/../{f.relative_to(ROOT)}):\n\n{table(frame, 40)}".strip())
    return "\n\n".join(parts)

def measured(path: Path) -> list: # Markdown cells: what the last whole run measured, what the paper prints
    others = tuple(p.stem for p in NBS.glob("*/*.ipynb") if p.stem.startswith(f"{path.stem}_"))
    mine = [f for folder in (FIGURES, FIGURES/"miniature") for f in sorted(folder.glob(f"{path.stem}*")) if not f.name.startswith(others or "/")]
    published = pd.read_csv(FIGURES/"published.csv", dtype=str)
    theirs = published[published.table == path.stem.split("_")[0]]
    text = [f"![{': '.join(opening(path))}](/../{f.relative_to(ROOT)})" for f in mine if f.suffix == ".png"] + [tables([f for f in mine if f.suffix == ".csv"])]
    cells = [new_markdown_cell("\n\n".join(["## Measured", *text]))] if mine else []
    if len(theirs): cells.append(new_markdown_cell("## Published\n\n" + table(theirs.pivot_table(index="row", columns="dataset", values="value", aggfunc="first", sort=False).reset_index())))
    return cells

def gallery(patterns: str) -> str: # Markdown: a card for each notebook
    cards = []
    for path in (p for pattern in patterns.split() for p in sorted(NBS.glob(f"{pattern}.ipynb"))):
        (title, line), image, page = opening(path), FIGURES/f"miniature/{path.stem}.png", path.relative_to(NBS)
        picture = f"[![{title}: {line}](/../{image.relative_to(ROOT)})]({page})\n\n" if image.exists() else ""
        cards.append(f":::{{container}} card\n{picture}[**{title}**]({page})\n\n{line}\n:::")
    return "\n".join(["::::{container} gallery", *cards, "::::"])


# ---- pages

def page(path: Path) -> str: # the notebook that Sphinx reads
    place, cells = path.relative_to(NBS), cells_of(path)
    if path.stem == "index": cells.append(new_markdown_cell((ROOT/"docs/contents.md").read_text()))
    else: cells[0].source += f"\n\n```{{container}} notebook\nThis page is the notebook {{download}}`nbs/{place} </../nbs/{place}>`; `make lab` opens it.\n```"
    if place.parts[0] in ("paper", "benchmarks"): cells = [cells[0], *measured(path), *folded(cells[1:])]
    return nbformat.writes(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}))

def text(path: Path) -> str: # Markdown; comments ask for what stands in the notebooks and tables
    filled = re.sub(r"<!-- gallery (.+) -->", lambda m: gallery(m[1]), path.read_text())
    filled = re.sub(r"<!-- tables (.+) -->", lambda m: tables([f for name in m[1].split() if (f := FIGURES/name).exists()]), filled)
    return re.sub("<!-- make help -->", lambda _: subprocess.run(["make", "-s", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout.strip(), filled)

def main() -> None:
    pages = {PAGES/p.relative_to(NBS): page(p) for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    pages |= {PAGES/p.name: text(p) for p in (ROOT/"docs/pages").glob("*.md")}
    for old in {p for p in PAGES.rglob("*") if p.is_file()} - pages.keys(): old.unlink()
    for path, words in pages.items(): # one that is as it was is not touched, so that Sphinx does not read it again
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != words: path.write_text(words)


if __name__ == "__main__": main()
