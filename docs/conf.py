"""Sphinx: `make docs`. The pages are made by docs/pages.py."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "bridgexfer"
author = copyright = "The bridgexfer authors"
release = re.search(r'__version__ = "(.+)"', (ROOT/"bridgexfer/__init__.py").read_text())[1]

extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["notebooks", "figures"]
suppress_warnings = ["myst.header"] # signatures are headings of the fourth level, wherever they stand

html_theme = "furo"
html_title = "bridgexfer"
html_static_path = [str(ROOT/"docs/static"), str(ROOT/"runs/site/static")]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = html_show_sourcelink = False
html_theme_options = {"source_edit_link": "", "top_of_page_buttons": []}

mathjax_path = "mathjax.js" # in runs/site/static: nothing is asked of another host
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
nb_execution_mode = "off" # docs/pages.py has run what is to be run
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
nb_render_markdown_format = "myst"
copybutton_prompt_text, copybutton_exclude = "$ ", ".linenos, .gp, .go"
