"""Store outputs in the notebooks that are read on GitHub: `python docs/outputs.py [NOTEBOOK ...]`, or `make outputs`.

Without arguments: the tour and the library wing. Each notebook is executed in place. What a reader sees is kept, up to
LIMIT bytes a cell: text, tables, pictures. What differs from run to run is not: progress bars, warnings, counts, times,
temporary folders. A cell tagged `unstored`, such as one that prints seconds, keeps nothing.
"""
import json
import os
import re
import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from tempfile import gettempdir

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 30 * 1024 # bytes of a cell's outputs, as stored
SHOWN = ("image/jpeg", "image/png", "text/html", "text/latex", "text/markdown", "text/plain") # on GitHub


def stored_size(outputs: list) -> int: # bytes
    "What a cell's outputs take in the file."
    return len(json.dumps(outputs, ensure_ascii=False).encode())


def portable(text: str) -> str:
    "Text without folders of this machine."
    return re.sub(rf"{re.escape(gettempdir())}/\w+", "tmp", text.replace(str(ROOT), "."))


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


def store(path: Path) -> list[str]: # what could not be stored, a sentence each
    "Execute a notebook and write it back with its outputs."
    nb = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nb, kernel_name="quiet", timeout=1200, resources=resources).execute()
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


if __name__ == "__main__":
    os.environ["JUPYTER_PATH"] = str(ROOT/"docs") # for docs/kernels: a kernel that does not announce its transport
    library = sorted((ROOT/"nbs/library").glob("*.ipynb"))
    for path in map(Path, sys.argv[1:] or [ROOT/"nbs/00_tour.ipynb", *library]):
        print(path.name, flush=True)
        for sentence in store(path): print(f"  {sentence}")
