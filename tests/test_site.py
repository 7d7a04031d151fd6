"""The site: built without a warning (Sphinx warns of every link that leads nowhere), then visited with Chromium."""
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parent.parent
SITE = ROOT/"_site"
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTH = 380 # pixels, of a small telephone

pytestmark = [pytest.mark.slow, pytest.mark.site]


@pytest.fixture(scope="module")
def site():
    "The folder of the site, built as `make docs` builds it; outputs are reused where no code has changed."
    command = ["make", "-o", ".venv/.complete", "-o", ".venv/.docs", "docs"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return SITE


# ---- files

class Page(HTMLParser):
    "The links, anchors and pictures of a page."
    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.pictures = [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "img": self.pictures.append((attrs.get("src", ""), attrs.get("alt") or ""))
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])


@pytest.fixture(scope="module")
def pages(site): return {p: Page(p) for p in sorted(site.rglob("*.html")) if "_static" not in p.parts}


def words(place): return unescape(re.sub(r"<[^>]+>", "", (SITE/place).read_text()))


def test_every_notebook_has_its_page(pages):
    notebooks = [p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    wanted = {p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix() for p in notebooks}
    assert wanted <= {p.relative_to(SITE).as_posix() for p in pages}


def test_every_picture_has_words(pages):
    pictures = [(path.relative_to(SITE), *picture) for path, page in pages.items() for picture in page.pictures]
    silent = [f"{place}: {src}" for place, src, alt in pictures if len(alt) < 8 or "/" in alt]
    assert not silent and len(pictures) > 40, "\n".join(silent)


def test_library_pages_hold_signatures_sources_and_outputs(pages):
    html, text = (SITE/"library/17_scores.html").read_text(), words("library/17_scores.html")
    assert 'id="scores-leep"' in html and "Show the code" in html
    assert "_check_softmax" in text and "-2.302" not in words("jobs/transferability.html")
    assert "steps has the source 'guessed'" in words("study/00_settings.html") # printed when the notebook ran


def test_names_lead_to_their_definitions(pages):
    assert "library/16_transfer.html#transfer-transferspec-class" in pages[SITE/"records.html"].links


def test_reference_has_every_setting(pages):
    text = words("settings.html")
    keys = re.findall(r"^(\w+) *=", (ROOT/"settings.ini").read_text(), re.M)
    assert len(keys) > 80 and not [k for k in keys if k not in text]


# ---- in a browser

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM: pytest.skip("Chromium is missing: apt install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser):
    opened = browser.new_page(viewport={"width": WIDTH, "height": 800})
    yield opened
    opened.close()


def complaints(tab, address):
    "A list that fills with what a page should not do."
    found = []
    def console(message):
        if message.type in ("error", "assert"): found.append(f"console: {message.text}")
    def request(asked):
        if not asked.url.startswith((address, "data:", "blob:")): found.append(f"requests {asked.url}")
    def response(answer):
        if answer.status >= 400: found.append(f"{answer.status}: {answer.url}")
    tab.on("pageerror", lambda error: found.append(f"error: {error}"))
    tab.on("console", console)
    tab.on("request", request)
    tab.on("response", response)
    return found


WIDE = "document.documentElement.scrollWidth"
FORMULAS = "[...document.querySelectorAll('math')].filter(e => e.getBoundingClientRect().width > 4).length"
MISSING = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
CUT_OFF = """() => {
  const inside = e => e.getBoundingClientRect().right <= innerWidth + 1;
  const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && inside(e);
  const within = e => { for (let a = e.parentElement; a; a = a.parentElement) if (scrolls(a)) return true; };
  const visible = e => getComputedStyle(e).visibility != 'hidden' && e.getClientRects().length;
  return [...document.querySelectorAll('article *, main *')]
    .filter(e => !e.closest('.headerlink, .toc-drawer') && !inside(e) && !within(e) && visible(e))
    .slice(0, 3).map(e => e.outerHTML.slice(0, 80));
}"""


def test_the_browser_notices(tab, address):
    found = complaints(tab, address)
    tab.goto("about:blank")
    tab.set_content("""<script>console.error('x'); undefined_thing()</script>
      <main><p style='width:500px'>wide</p><div style='overflow-x:auto'><p style='width:500px'>scrolls</p></div></main>
      <img src='http://127.0.0.1:1/x.png'>""")
    assert {f.split(":")[0].split()[0] for f in found} >= {"console", "error", "requests"}, found
    assert tab.evaluate(WIDE) > WIDTH and len(tab.evaluate(CUT_OFF)) == 1 and len(tab.evaluate(MISSING)) == 1


def test_every_page_in_a_browser(pages, address, tab):
    wrong, formulas, found = [], {}, complaints(tab, address)
    for place in (path.relative_to(SITE).as_posix() for path in pages):
        tab.goto(f"{address}/{place}")
        width = tab.evaluate(WIDE)
        if width > WIDTH: found.append(f"{width} pixels wide")
        found += [f"cut off: {html}" for html in tab.evaluate(CUT_OFF)]
        found += [f"no picture {src}" for src in tab.evaluate(MISSING)]
        formulas[place] = tab.evaluate(FORMULAS)
        wrong += [f"{place}: {text}" for text in found]
        found.clear()
    assert not wrong, "\n".join(wrong)
    assert formulas["library/17_scores.html"] > 10 and sum(formulas.values()) > 200


@pytest.mark.parametrize(("word", "page"), [("LEEP", "library/17_scores"), ("bridged", "library/16_transfer")])
def test_search_finds(address, tab, word, page):
    tab.goto(f"{address}/search.html?q={word}")
    expect(tab.locator(f"#search-results li a[href*='{page}']").first).to_be_attached(timeout=20_000)


def test_dark_mode_is_a_click_away(address, tab):
    tab.goto(f"{address}/index.html")
    colours = set()
    for _ in range(3):
        tab.evaluate("document.querySelector('.theme-toggle').click()")
        colours.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) > 1


def test_generation_can_be_played(address, tab):
    tab.goto(f"{address}/tutorials/playing_with_generation.html")
    picture = tab.locator(".explorer [role=img]")
    knobs = tab.locator(".explorer input, .explorer select")

    def seen():
        place = picture.evaluate("e => getComputedStyle(e).backgroundPosition")
        return picture.get_attribute("aria-label"), place

    def turn(knob, change):
        told = "k.dispatchEvent(new Event('input', {bubbles: true}))"
        knobs.nth(knob).evaluate(f"k => {{ k.{change}; {told}; }}")

    states = [seen()]
    for knob, change in ((0, "value = 0"), (1, "value = 3"), (2, "selectedIndex = 2")):
        turn(knob, change)
        states.append(seen())
    assert len({label for label, _ in states}) == len({place for _, place in states}) == 4
    assert "guidance 1, seed 3" in states[-1][0] and "blueprint" in states[-1][0]
