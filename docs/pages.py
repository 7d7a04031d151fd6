"""Turn the notebooks into pages for Sphinx, in runs/site/pages: `python docs/pages.py`, which `make docs` calls first."""
import ast, hashlib, os, re, shutil, subprocess, sys, tarfile
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from contextlib import chdir
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pandas as pd
from fastcore.docments import docments
from nbclient import NotebookClient
from nbdev.serve import proc_nbs
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell
from traitlets.config import Config

from bridgexfer.cli import parser
from bridgexfer.settings import parse_value

ROOT = Path(__file__).resolve().parent.parent
NBS, BUILD, FIGURES, RUNS = ROOT/"nbs", ROOT/"runs/site", ROOT/"figures/miniature", ROOT/"runs/miniature/notebooks"
PAGES = BUILD/"pages"
LIBRARY = [*sorted(NBS.glob("[0-9]*.ipynb")), NBS/"miniature/00_typeset.ipynb"] # they export modules
EXECUTED = [NBS/"index.ipynb", *LIBRARY, *sorted(NBS.glob("tutorials/*.ipynb"))] # the others are jobs, or need runs/
MATHJAX = ("mathjax", "3.2.2", "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09") # npm package, version, SHA-256


def read(path: Path) -> NotebookNode: return nbformat.read(path, as_version=4)
def name(path: Path) -> str: return path.relative_to(NBS).as_posix()
def is_code(cell) -> bool: return cell.cell_type == "code"
def directive(cell, words: str) -> bool: return bool(re.search(rf"^#\| *({words})\b", cell.source, re.M))
def opening(path: Path) -> tuple: # title, one line
    lines = read(path).cells[0].source.splitlines()
    return lines[0].lstrip("# "), next((line.lstrip("> ") for line in lines if line.startswith(">")), "")


# ---- outputs: from a run in the build, found again while nothing that it depends on changes

def digest(path: Path) -> str: # of code, not of prose
    parts = [c.source.encode() for c in read(path).cells if is_code(c)]
    needs = [p for p in sorted((ROOT/"bridgexfer").rglob("*")) if p.is_file() and p.suffix != ".pyc"] + [ROOT/"settings.ini", ROOT/"requirements.lock"]
    if path.stem == "index": needs += sorted(ROOT.glob("figures/**/*.csv"))
    return hashlib.sha256(b"\0".join(parts + [p.read_bytes() for p in needs])).hexdigest()

def execute(path: Path) -> NotebookNode: # the notebook with its outputs
    cached, key = BUILD/"executed"/name(path), digest(path)
    if cached.exists() and (nb := read(cached)).metadata.get("digest") == key: return nb
    print(f"running {name(path)}", flush=True)
    nb = read(path)
    for c in nb.cells:
        if is_code(c) and directive(c, "eval: *false"): c.metadata.tags = ["skip-execution"]
    with TemporaryDirectory(prefix="kernel-") as folder: # files, not ports
        config = Config(KernelManager=dict(transport="ipc", connection_file=f"{folder}/k.json"))
        NotebookClient(nb, kernel_name="python3", timeout=None, config=config, resources={"metadata": {"path": str(path.parent)}}).execute()
    nb.metadata.digest = key
    cached.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, cached)
    return nb

def outputs_of_run(path: Path) -> list | None: # outputs, a list for each code cell, if `make paper` has run this very code here
    if not (run := RUNS/path.name).exists(): return None
    cells = [c for c in read(run).cells if is_code(c) and "injected-parameters" not in c.metadata.get("tags", [])]
    here = [c for c in read(path).cells if is_code(c)]
    return [c.outputs for c in cells] if [c.source for c in cells] == [c.source for c in here] else None


# ---- cells

def shown(cell, outputs: list, alt: str, tags=()) -> list: # cells: the code, and its outputs in their order
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    image = {"image": {"alt": alt}}
    cells = [new_code_cell(source, metadata={"tags": list(tags), "mystnb": image})] if source else []
    for o in outputs:
        data = o.get("data", {})
        if o.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in data: continue
        if "text/markdown" in data: cells.append(new_markdown_cell(data["text/markdown"]))
        elif cells and is_code(cells[-1]): cells[-1].outputs.append(o)
        else: cells.append(new_code_cell("pass", outputs=[o], metadata={"tags": ["remove-input"], "mystnb": image})) # without code it would be left out
    return cells

def prose(path: Path, cells: list, collapsed: bool) -> list: # cells of a page, outputs in `cells`
    title, line = opening(path)
    head, _, first = cells[0].source.partition("\n")
    place, heading = name(path), title
    link = f"{{download}}`nbs/{place} </notebooks/{place}>`"
    page = [new_markdown_cell(f"{head}\n\n{first.strip()}\n\n```{{container}} notebook\nThis page is the notebook {link}; `make lab` opens it.\n```")]
    for c in cells[1:]:
        if not is_code(c):
            heading = ([h for h in re.findall(r"^#+ (.+)$", c.source, re.M)] or [heading])[-1]
            page.append(new_markdown_cell(c.source))
        elif "parameters" in c.metadata.get("tags", []) and collapsed: continue
        else: page += shown(c, c.outputs, f"{title}: {heading}" if heading != title else f"{title}: {line}", ["hide-input"] if collapsed else c.metadata.get("page", ()))
    return merged(page) if collapsed else page

def merged(cells: list) -> list: # folded code without outputs joined to the next
    kept = []
    for c in cells:
        if all(is_code(x) and "hide-input" in x.metadata.tags for x in (*kept[-1:], c)) and kept and not kept[-1].outputs: kept[-1].source, kept[-1].outputs = f"{kept[-1].source}\n\n{c.source}", c.outputs
        else: kept.append(c)
    return kept

def defined(cell) -> list: # names of functions and classes
    return [n.name for n in ast.parse(cell.source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]

def label(module: str, n: str) -> str: return f"{module}.{n}" + "-class" * n[0].isupper() # labels know no capitals, and `Pipeline` is not `pipeline`

def library(path: Path, processed: Path) -> list: # cells: the story, and in place of exported code its signature and, folded, its source
    done = {c.get("id"): c for c in read(processed).cells}
    docs = {m[1]: "".join(c.outputs[0].data["text/markdown"]) for c in done.values() if is_code(c) and c.outputs for m in [re.search(r"^show_doc\((\w+)\)", c.source, re.M)] if m}
    cells, module = [], re.search(r"^#\| default_exp (\S+)", "\n".join(c.source for c in read(path).cells), re.M)[1]
    for c in execute(path).cells:
        if not is_code(c): cells.append(c)
        elif directive(c, "export"):
            for n in [n for n in defined(c) if n in docs]:
                text = re.sub(r"^---\n+### .*\n", "", docs[n])
                cells.append(new_markdown_cell(f"({label(module, n)})=\n#### {n}\n\n{text}"))
            cells.append(new_code_cell(c.source, metadata={"page": ["hide-input"]}))
            cells[-1].outputs = c.outputs
        elif c.id in done and c.source: cells.append(c)
    return cells

def symbols() -> dict: # name -> label, for names that one module alone defines
    found = {}
    for path in LIBRARY:
        nb = read(path)
        module = re.search(r"^#\| default_exp (\S+)", "\n".join(c.source for c in nb.cells), re.M)[1]
        for c in nb.cells:
            if is_code(c) and directive(c, "export"):
                for n in defined(c): found.setdefault(n, []).append(label(module, n))
    modules = {path.stem.split("_", 1)[1] for path in LIBRARY} # such as `datasets`, which is a command too
    return {n: labels[0] for n, labels in found.items() if len(labels) == 1 and n[0] != "_" and len(n) > 4 and n not in modules}

def linked(text: str, names: dict) -> str: # `name` -> a link to where it is explained; not in code blocks, headings, links
    def line(s): return s if s.startswith(("#", "    ", "(")) else re.sub(r"(?<![\[`])`(\w+)`(?![\]`])", lambda m: f"[{m[0]}](#{names[m[1]]})" if m[1] in names else m[0], s)
    blocks = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return "".join(b if b.startswith("```") else "\n".join(map(line, b.split("\n"))) for b in blocks)

def write(place: str, cells: list, names: dict) -> None:
    up = "../" * place.count("/")
    for c in cells:
        if is_code(c): continue
        text = re.sub(r"\]\((\.\./)+figures/", f"]({up}figures/", c.source).replace("](../nbs/", f"]({up}")
        c.source = linked(text, names)
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}})
    (PAGES/place).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, PAGES/place)


# ---- tables and figures that are committed

def grid(table: pd.DataFrame) -> str: # Markdown
    def text(v): return "" if pd.isna(v) else f"{v:.4g}" if isinstance(v, float) else str(v).replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$").replace("*", "\\*")
    rows = [table.columns, *table.itertuples(index=False)]
    lines = ["| " + " | ".join(text(v) for v in row) + " |" for row in rows]
    return "\n".join(["```{container} wide", "", lines[0], "|---" * len(table.columns) + "|", *lines[1:], "```"])

def committed(path: Path) -> list: # cells: figures and tables of the notebook's name, and the paper's numbers
    title, line = opening(path)
    alone = {f.stem for f in NBS.glob("paper/*.ipynb")} - {path.stem}
    mine = [f for f in sorted(FIGURES.glob(f"{path.stem}*")) if f.stem not in alone]
    cells = [new_markdown_cell("## What the last run gave\n\nThe committed figures and tables; the text below says how each came about.")]
    cells += [new_markdown_cell(f"![{title}: {line}](../figures/miniature/{f.name})") for f in mine if f.suffix == ".png"]
    for f in (f for f in mine if f.suffix == ".csv"):
        table, of = pd.read_csv(f), f"[`{f.name}`](../figures/miniature/{f.name})"
        head = f"The first 40 of {len(table)} rows of {of}:" if len(table) > 40 else f"{of}:"
        cells.append(new_markdown_cell(f"{head}\n\n{grid(table.head(40))}"))
    published = pd.read_csv(ROOT/"figures/published.csv", dtype=str)
    theirs = published[published.table == path.stem.split("_")[0]]
    if len(theirs): cells.append(new_markdown_cell("The paper's numbers, to set beside them:\n\n" + grid(theirs.pivot_table(index="row", columns="dataset", values="value", aggfunc="first", sort=False).reset_index())))
    return cells


# ---- pages that are generated

def settings_page() -> str:
    ini, text = ConfigParser(interpolation=None), ["# Settings\n\nEvery line of `settings.ini`, with where its value comes from: `paper` (printed there), `assumed` (the paper does not say, or the profile "
        "departs from it) or `tuned` (chosen on validation data). A profile overrides the section `[study]` line by line. "
        "[Hyper-parameters](paper/hyperparameters.ipynb) has the same by setting, for what is not the paper's.\n"]
    ini.read(ROOT/"settings.ini")
    for section in ini.sections():
        rows = [(f"`{k}`", f"`{v.split('|')[0].strip()}`" if v.split("|")[0].strip() else "none", *(x or "" for x in parse_value(k, v)[1:])) for k, v in ini[section].items()]
        text.append(f"## `[{section}]`\n\n{grid(pd.DataFrame(rows, columns=['setting', 'value', 'origin', 'reason']))}\n")
    return "\n".join(text)

def command_page() -> str:
    os.environ["COLUMNS"] = "100"
    top, text = parser(), ["# Command line\n\nThe library's commands; [the notebook](22_cli.ipynb) shows each. `make help` lists the study's.\n"]
    for title, p in [("bridgexfer", top), *next(a for a in top._actions if a.choices).choices.items()]:
        text.append(f"## {title}\n\n```text\n{p.format_help().strip()}\n```\n")
    text.append(f"## make\n\n```text\n{subprocess.run(['make', '-s', '-C', ROOT, 'help'], capture_output=True, text=True, check=True).stdout.strip()}\n```\n")
    return "\n".join(text)

def records_page() -> str:
    intro = (ROOT/"docs/records.md").read_text()
    parts = []
    for kind, where in dict(transfer="transfer.TransferSpec", fixed="fixed_features.FixedSpec", clip="clip_tuning.ClipSpec", leep="transferability.LeepSpec", alignment="alignment.AlignmentSpec").items():
        module, spec = where.split(".")
        cls = getattr(import_module(f"bridgexfer.{module}"), spec)
        words = docments(cls)
        rows = [(f"`{f.name}`", f"`{getattr(f.type, '__name__', f.type)}`", words.get(f.name) or "") for f in fields(cls)]
        parts.append(f"### {kind}\n\n[`{spec}`](#{label(module, spec)}): {cls.__doc__}\n\n{grid(pd.DataFrame(rows, columns=['field', 'type', 'meaning']))}\n")
    return intro + "\n" + "\n".join(parts)

def gallery(stems: list) -> str: # Markdown: each figure, with its title, a link to its page
    cards = []
    for stem in stems:
        (title, line), image = opening(NBS/f"paper/{stem}.ipynb"), FIGURES/f"{stem}.png"
        picture = f"[![{title}: {line}](figures/miniature/{image.name})](paper/{stem}.ipynb)\n\n" if image.exists() else ""
        cards.append(f":::{{container}} card\n{picture}[**{title}**](paper/{stem}.ipynb)\n\n{line}\n:::")
    return "::::{container} gallery\n" + "\n".join(cards) + "\n::::"

def contents(page: str, places: list, text: str = "", option: str = ":maxdepth: 1") -> None: # end a page of docs/pages with what it leads to
    with open(PAGES/f"{page}.md", "a") as f: f.write("\n".join(["", text, "", "```{toctree}", option, "", *places, "```", ""]))

def mathjax() -> None: # one file, so that no page asks another host
    package, version, sha = MATHJAX
    kept, static = BUILD/f"{package}-{version}.tgz", BUILD/"static"
    if not kept.exists():
        if not shutil.which("npm"): sys.exit("npm is needed once, for MathJax: install it (Debian, Ubuntu: apt install npm).")
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=BUILD, check=True, stdout=subprocess.DEVNULL)
    if hashlib.sha256(kept.read_bytes()).hexdigest() != sha:
        kept.unlink()
        sys.exit(f"{kept.name} is not the file that was pinned: it has been removed, run `make docs` again.")
    static.mkdir(exist_ok=True)
    with tarfile.open(kept) as tar: (static/"mathjax.js").write_bytes(tar.extractfile("package/es5/tex-svg-full.js").read())


def stage() -> None: # what nbdev is to process: it does again what is newer here
    shutil.copy2(ROOT/"pyproject.toml", BUILD)
    for path in LIBRARY:
        copy, text = BUILD/"nbs"/name(path), path.read_text().replace('"if TYPE_CHECKING: import', '"import') # signatures name these types
        if not copy.exists() or copy.read_text() != text: copy.write_text(text)


def main() -> None:
    (BUILD/"nbs/miniature").mkdir(parents=True, exist_ok=True)
    mathjax()
    stage()
    with ThreadPoolExecutor(max(1, int(os.environ.get("JOBS", 2)))) as pool: list(pool.map(execute, EXECUTED))
    with chdir(BUILD): processed = proc_nbs(n_workers=0)

    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT/"docs/pages", PAGES)
    shutil.copytree(ROOT/"figures", PAGES/"figures", ignore=shutil.ignore_patterns("*.pdf"))
    shutil.copytree(NBS, PAGES/"notebooks", ignore=shutil.ignore_patterns(".*", "_*"))
    shutil.copy(ROOT/"CHANGELOG.md", PAGES/"changelog.md")
    shutil.copy(ROOT/"CONTRIBUTING.md", PAGES/"contributing.md")
    names = symbols()
    for path in sorted(NBS.rglob("*.ipynb")):
        place = name(path)
        if path in LIBRARY: cells = prose(path, library(path, processed/place), False)
        elif path.stem == "index":
            cells = execute(path).cells
            for c in cells:
                if is_code(c): c.outputs = [o for o in c.outputs if "text/markdown" in o.get("data", {})]
            cells = [x for c in cells for x in (shown(c, c.outputs, "")[("hide-input" in c.metadata.get("tags", [])):] if is_code(c) else [new_markdown_cell(c.source)])]
            cells.append(new_markdown_cell((ROOT/"docs/contents.md").read_text()))
        elif path in EXECUTED: cells = prose(path, execute(path).cells, False)
        elif path.parent.name == "paper":
            cells, outputs = read(path).cells, outputs_of_run(path)
            for c, o in zip((c for c in cells if is_code(c)), outputs or ()): c.outputs = o
            cells = prose(path, cells, True)
            if not outputs: cells[1:1] = committed(path)
        else: cells = prose(path, read(path).cells, False)
        write(place, cells, names)
    paper = sorted(p.stem for p in NBS.glob("paper/*.ipynb"))
    left_open = [p for p in paper if p.startswith("control") or p in ("hyperparameters", "errata", "transferability_ranks")]
    for page, stems in (("paper", [p for p in paper if p not in left_open]), ("open", left_open)):
        contents(page, [f"paper/{p}" for p in stems], gallery(stems), ":hidden:")
    first = ["first_study", "own_images", "own_backbone"]
    contents("tutorials", [f"tutorials/{p}" for p in sorted((p.stem for p in NBS.glob("tutorials/*.ipynb")), key=lambda p: (first.index(p) if p in first else 9, p))])
    for page, text in (("settings", settings_page()), ("command_line", command_page()), ("records", records_page())): (PAGES/f"{page}.md").write_text(text)


if __name__ == "__main__": main()
