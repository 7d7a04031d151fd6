"""Sphinx: `make docs`. The pages are made by docs/pages.py; those that define, explain or teach are run here."""
import hashlib, logging, os, re, shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from jupyter_cache import get_cache

ROOT = Path(__file__).resolve().parent.parent
EXECUTED = ROOT/"runs/site/executed"
os.environ["JUPYTER_PATH"] = str(ROOT/"docs")
logging.getLogger("traitlets").setLevel("WARNING")


def digest() -> str: # of what the pages' code depends on, besides itself
    files = [*ROOT.glob("bridgexfer/**/*.*"), *ROOT.glob("figures/**/*.csv"), *(ROOT/name for name in ("settings.ini", "requirements.lock", "Snakefile"))]
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in sorted(files) if p.suffix != ".pyc")).hexdigest()[:16]


project = "bridgexfer"
author = copyright = "The bridgexfer authors"
release = re.search(r'__version__ = "(.+)"', (ROOT/"bridgexfer/__init__.py").read_text())[1]

extensions = ["myst_nb", "sphinx_copybutton"]
suppress_warnings = ["myst.header"] # signatures are headings of the fourth level, wherever they stand
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

nb_execution_mode = "cache" # found again while neither a page's code nor what it depends on changes
nb_execution_cache_path = str(EXECUTED/digest())
nb_execution_excludepatterns = ["jobs/*", "paper/*", "benchmarks/*", "miniature/0[1-9]*"] # these take hours, or read what such jobs leave
nb_kernel_rgx_aliases = {"python3": "quiet"} # of docs/kernels: no word about how the kernel is spoken to
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


def formula(self, node): # MathML, which browsers draw themselves: no script, no other host
    block = isinstance(node, nodes.math_block)
    tex = re.sub(r"\\[bB]ig(?![a-z])", "", node.astext()).replace(r"\dots", r"\ldots") # brackets grow by themselves
    self.body.append(f'<div class="math">{tex2mathml(tex, as_block=True)}</div>' if block else tex2mathml(tex))
    raise nodes.SkipNode


def link_names(app, doctree, page): # `name` in the text leads to where it is defined, if one module alone defines it
    found, modules = {}, set()
    for label, (where, anchor) in app.env.domaindata["std"]["anonlabels"].items():
        module, _, name = label.partition(".") # as docs/pages.py has set it
        if name and where[:2].isdigit() or where.startswith("miniature"): found.setdefault(name, []).append((where, anchor)); modules.add(module)
    for node in list(doctree.findall(nodes.literal)):
        places = found.get((text := node.astext()).lower() + "-class" * text[:1].isupper(), [])
        if len(places) == 1 and len(text) > 4 and text not in modules and isinstance(node.parent, (nodes.paragraph, nodes.entry)):
            node.replace_self(nodes.reference("", "", node.deepcopy(), refuri=f"{app.builder.get_relative_uri(page, places[0][0])}#{places[0][1]}", internal=True))


def setup(app):
    for old in EXECUTED.glob("*"):
        if str(old) != nb_execution_cache_path: shutil.rmtree(old)
    get_cache(nb_execution_cache_path).list_cache_records() # made once, before several processes ask for it
    app.add_node(nodes.math, override=True, html=(formula, None))
    app.add_node(nodes.math_block, override=True, html=(formula, None))
    app.connect("doctree-resolved", link_names)
