"""Sphinx: `make docs`. docs/pages.py makes the pages; what stores no outputs is executed here."""
import hashlib
import logging
import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from jupyter_cache import get_cache

ROOT = Path(__file__).resolve().parent.parent
EXECUTED = ROOT/"runs/site/executed"
WINGS = ("library/", "data/", "study/", "apps/", "miniature/") # whose pages define names
os.environ["JUPYTER_PATH"] = str(ROOT/"docs")
logging.getLogger("traitlets").setLevel("WARNING")


def digest() -> str: # 16 hexadecimal digits
    "A hash of all that the pages' code depends on besides itself."
    files = {*ROOT.glob("bridgexfer/**/*.*"), *ROOT.glob("figures/**/*.csv")}
    files |= {ROOT/name for name in ("settings.ini", "requirements.lock", "Snakefile")}
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in sorted(files) if p.suffix != ".pyc")).hexdigest()[:16]


project = "bridgexfer"
author = copyright = "The bridgexfer authors"
release = re.search(r'__version__ = "(.+)"', (ROOT/"bridgexfer/__init__.py").read_text(encoding="utf-8"))[1]

extensions = ["myst_nb", "sphinx_copybutton"]
suppress_warnings = ["myst.header"] # signatures are headings of the fourth level, below headings of any level
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

nb_execution_mode = "cache" # outputs are reused until a page's code, or what it depends on, changes
nb_execution_cache_path = str(EXECUTED/digest())
# shown as they were run, `make outputs`; the player of tutorials/playing_with_generation is too large to be stored
STORED = ["00_tour*", "library/*", "data/*", "study/*", "apps/*", "tutorials/[!p]*", "paper/*"]
nb_execution_excludepatterns = [*STORED, # and what takes hours, or reads what such jobs leave
    "jobs/*", "benchmarks/*", "miniature/0[1-9]*"]
nb_kernel_rgx_aliases = {"python3": "quiet"} # docs/kernels: a kernel that does not announce its transport
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_output_stderr = "remove"
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
nb_render_markdown_format = "myst"
copybutton_prompt_text, copybutton_exclude = "$ ", ".linenos, .gp, .go"

html_theme = "furo"
html_title = "bridgexfer"
html_static_path = [str(ROOT/"docs/static")]
html_favicon = str(ROOT/"docs/static/icon.svg")
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = html_show_sourcelink = False
html_theme_options = {"source_edit_link": "", "top_of_page_buttons": []}


def formula(self, node):
    "MathML, which browsers draw without a script and without another host."
    block = isinstance(node, nodes.math_block)
    tex = re.sub(r"\\[bB]ig(?![a-z])", "", node.astext()) # brackets grow by themselves
    mathml = tex2mathml(tex.replace(r"\dots", r"\ldots"), as_block=block)
    self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def defined_names(labels: dict) -> tuple[dict[str, list], set[str]]: # name -> places; modules
    "Where names are defined: the labels that docs/pages.py sets are `module.name`."
    places, modules = {}, set()
    for label, (page, anchor) in labels.items():
        module, _, name = label.rpartition(".")
        if not module or not page.startswith(WINGS): continue
        places.setdefault(name, []).append((page, anchor))
        modules |= {module, module.rpartition(".")[2]}
    return places, modules


def link_names(app, doctree, page):
    "Link `name` in the text to its definition, if exactly one module defines it."
    places, modules = defined_names(app.env.domaindata["std"]["anonlabels"])
    for node in list(doctree.findall(nodes.literal)):
        text = node.astext()
        found = places.get(text.lower() + "-class" * text[:1].isupper(), [])
        if len(found) != 1 or len(text) < 5 or text in modules: continue
        if not isinstance(node.parent, (nodes.paragraph, nodes.entry)): continue
        where, anchor = found[0]
        uri = f"{app.builder.get_relative_uri(page, where)}#{anchor}"
        node.replace_self(nodes.reference("", "", node.deepcopy(), refuri=uri, internal=True))


def setup(app):
    for old in EXECUTED.glob("*"):
        if str(old) != nb_execution_cache_path: shutil.rmtree(old)
    get_cache(nb_execution_cache_path).list_cache_records() # creates it, before several processes open it
    app.add_node(nodes.math, override=True, html=(formula, None))
    app.add_node(nodes.math_block, override=True, html=(formula, None))
    app.connect("doctree-resolved", link_names)
