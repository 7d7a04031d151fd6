"""Store outputs in the notebooks that are read on GitHub: `python docs/outputs.py [NOTEBOOK ...]`, or `make outputs`.

Without arguments: the tour, the tutorials and the notebooks that define the package, each executed in place. What a
reader sees is kept, up to LIMIT bytes a cell: text, tables, pictures. What differs from run to run is not: progress
bars, warnings, counts, times, temporary folders. A cell tagged `unstored`, such as one that prints seconds, keeps
nothing.

With `--paper [PROFILE]`, or `make outputs PAPER=1`: the paper's pages, which are not executed here. Their outputs are
those of the last complete run, from runs/PROFILE/notebooks.
"""
import ast
import json
import os
import re
import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from tempfile import gettempdir

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbformat import NotebookNode
from nbformat.v4 import new_output
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 30 * 1024 # bytes of a cell's outputs, as stored
SHOWN = ("image/jpeg", "image/png", "text/html", "text/latex", "text/markdown", "text/plain") # on GitHub


def stored_size(outputs: list) -> int: # bytes
    "What a cell's outputs take in the file."
    return len(json.dumps(outputs, ensure_ascii=False).encode())


def portable(text: str) -> str:
    "Text without folders of this machine."
    text = text.replace(str(ROOT), ".").replace(f"{Path.home()}/", "~/")
    return re.sub(rf"{re.escape(gettempdir())}/\w+", "tmp", text)


def encoded(image: Image.Image, kind: str, **options) -> str: # base64
    image.save(buffer := BytesIO(), kind, **options)
    return b64encode(buffer.getvalue()).decode()


def smaller(png: str, # base64
            limit: int, # bytes of the result
           ) -> dict[str, str]: # kind of output -> base64
    "A picture as it is, in 256 colours, as JPEG, or scaled down, whichever fits first."
    if len(png) <= limit: return {"image/png": png}
    image, scale = Image.open(BytesIO(b64decode(png))).convert("RGB"), 1.
    while True:
        part = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
        colours = encoded(part.quantize(256), "PNG", optimize=True)
        if len(colours) <= limit: return {"image/png": colours}
        photo = encoded(part, "JPEG", quality=90)
        if len(photo) <= limit or scale < 0.2: return {"image/jpeg": photo}
        scale *= 0.9


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    "Consecutive prints as one output, whenever the kernel happened to flush them; without what is not for readers."
    kept = []
    for o in outputs:
        if o.output_type == "stream" and o.name == "stderr": continue
        if o.output_type == "stream" and kept and kept[-1].output_type == "stream": kept[-1].text += o.text
        elif "application/vnd.jupyter.widget-view+json" not in o.get("data", {}): kept.append(o)
    return kept


def tidy(outputs: list[NotebookNode], # of one cell
        ) -> list[NotebookNode]:
    "What is stored of a cell's outputs."
    kept = merged(outputs)
    for o in kept:
        if "text" in o: o.text = portable(o.text)
        if "data" not in o: continue
        o.data = {kind: portable(v) if kind.startswith("text") else v for kind, v in o.data.items() if kind in SHOWN}
        if "image/png" in o.data: o.data.pop("text/plain", None) # the name of a figure's type
    pictures = [o for o in kept if "image/png" in o.get("data", {})]
    room = LIMIT - stored_size(kept) + sum(len(o.data["image/png"]) for o in pictures)
    for o in pictures: o.data |= smaller(o.data.pop("image/png"), room // len(pictures))
    return kept


def keep(nb: NotebookNode, # executed
         path: Path, # to write
        ) -> list[str]: # what could not be stored, a sentence each
    "Write a notebook with those of its outputs that are stored."
    left_out = []
    for number, cell in enumerate(nb.cells):
        if cell.cell_type != "code": continue
        cell.outputs = [] if "unstored" in cell.metadata.get("tags", []) else tidy(cell.outputs)
        if stored_size(cell.outputs) <= LIMIT: continue
        left_out.append(f"{path.name}: the outputs of cell {number} are larger than {LIMIT} bytes and are not stored.")
        cell.outputs = []
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])
    nbformat.write(nb, path)
    return left_out


def store(path: Path) -> list[str]: # what could not be stored, a sentence each
    "Execute a notebook and write it back with its outputs."
    nb = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nb, kernel_name="quiet", timeout=1200, startup_timeout=600, resources=resources).execute()
    return keep(nb, path)


# ---- the paper's pages, from the notebooks that papermill left

def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    "The code cells of a notebook, without the parameters that papermill adds."
    code = [c for c in nb.cells if c.cell_type == "code"]
    return [c for c in code if "injected-parameters" not in c.metadata.get("tags", [])]


def obstacle(page: NotebookNode, # in nbs/paper
             executed: NotebookNode, # as papermill left it
            ) -> str: # "" if there is none
    "Why the outputs of an executed page cannot be stored."
    run = executed.metadata.get("papermill", {})
    if run.get("exception") or not run.get("end_time"): return "its last run failed or was stopped"
    if run["parameters"].get("overrides"): return f"its last run had other settings, {run['parameters']['overrides']}"
    sources = [[c.source for c in code_cells(nb)] for nb in (page, executed)]
    return "" if sources[0] == sources[1] else "its code has changed since its last run"


def saved_figures(source: str) -> list[str]: # names, in order
    "The figures that code saves with `save_figure`."
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    named = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "save_figure" and n.args]
    return [n.args[-1].value for n in sorted(named, key=lambda n: n.lineno) if isinstance(n.args[-1], ast.Constant)]


def link_figures(cell: NotebookNode, # executed; changed in place
                 place: Path, # of the page
                 figures: Path, # folder of the committed figures
                 about: str, # what a cell's pictures show
                ) -> None:
    "Beside each picture, a link to its committed figure: the site shows that one, GitHub the small stored copy."
    pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    names = saved_figures(cell.source)
    if len(names) != len(pictures): return
    for o, name in zip(pictures, names):
        if not (figures/f"{name}.png").exists(): continue
        link = os.path.relpath(figures/f"{name}.png", place.parent)
        o.data["text/markdown"] = f"![{about}]({link})"


def richest(outputs: list[NotebookNode]) -> list[NotebookNode]: # changed in place
    "Outputs without the plain text that stands for a table or a paragraph."
    for o in outputs:
        if {"text/html", "text/markdown"} & set(o.get("data", {})): o.data.pop("text/plain", None)
    return outputs


def origin(run: dict, # papermill's metadata
           seeds: str,
           machine: str,
          ) -> NotebookNode: # an output
    "The line that says what a page's outputs are of."
    said = f"profile {run['parameters']['profile']}, {seeds}, {run['end_time'][:10]}, {machine}"
    return new_output("display_data", {"text/markdown": f"*Outputs: {said}.*"})


def seeds_of(settings: Mapping[str, object]) -> str: # such as "seeds 0 to 3, few-shot seeds 0 to 11"
    "The seeds that results are of."
    kinds = {"seeds": "seeds", "few_seeds": "few-shot seeds", "sweep_seeds": "seeds of sweeps"}
    def span(v): return f"{v[0]} to {v[-1]}" if list(v) == list(range(v[0], v[-1] + 1)) else " ".join(map(str, v))
    return ", ".join(f"{text} {span(settings[k])}" for k, text in kinds.items() if settings.get(k))


def store_page(path: Path, # in nbs/paper
               executed: Path, # as papermill left it
               figures: Path, # folder of the committed figures
               seeds: str, # as from `seeds_of`
               machine: str,
              ) -> list[str]: # what could not be stored, a sentence each
    "Store the outputs of the last run of a page of the paper."
    if not executed.exists(): return [f"{path.name}: this profile has not run it."]
    page, ran = (nbformat.read(p, as_version=4) for p in (path, executed))
    why = obstacle(page, ran)
    if why: return [f"{path.name}: {why}."]
    title = page.cells[0].source.splitlines()[0].lstrip("# ")
    outputs, heading = iter(code_cells(ran)), title
    for cell in page.cells:
        for found in re.findall(r"^##+ (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else ():
            heading = f"{title}: {found}"
        if cell.cell_type != "code": continue
        cell.outputs = richest(next(outputs).outputs)
        link_figures(cell, path, figures, re.sub(r"[][/]", " ", heading))
    code_cells(page)[0].outputs.insert(0, origin(ran.metadata.papermill, seeds, machine))
    return keep(page, path)


def store_paper(profile: str | None) -> list[str]: # what could not be stored, a sentence each
    "Store the outputs of a profile's last complete run in the pages of nbs/paper."
    from bridgexfer.study.benchmarks import machine
    from bridgexfer.study.grid import Study
    from torch.cuda import is_available
    study = Study(profile)
    where = machine("cuda" if is_available() else "cpu") # as jobs choose
    if not study.figures_dir.is_relative_to(ROOT/"figures"):
        raise SystemExit(f"The figures of the profile {study.settings.profile} are not committed: choose another.")
    seeds = seeds_of(study.settings.values)
    found = []
    for page in study.pages():
        executed = study.runs_dir/f"notebooks/{page.name}.ipynb"
        found += store_page(ROOT/f"nbs/paper/{page.name}.ipynb", executed, study.figures_dir, seeds, where)
    return found


if __name__ == "__main__":
    os.environ["JUPYTER_PATH"] = str(ROOT/"docs") # for docs/kernels: a kernel that does not announce its transport
    if sys.argv[1:2] == ["--paper"]:
        left_out = store_paper(" ".join(sys.argv[2:]))
        sys.exit("\n".join(left_out) or 0)
    folders = ("library", "data", "study", "apps", "tutorials")
    wings = [p for folder in folders for p in sorted((ROOT/"nbs"/folder).glob("*.ipynb"))]
    for path in map(Path, sys.argv[1:] or [ROOT/"nbs/00_tour.ipynb", *wings]):
        print(path.name, flush=True)
        for sentence in store(path): print(f"  {sentence}")
