"""The site: built without a warning, then every page visited with headless Chromium."""
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import pytest
import websocket

ROOT = Path(__file__).parent.parent
SITE = ROOT/"_site"
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
CHROMIUM = next((found for word in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(word))), None)
WIDTH = 380 # pixels, of a small telephone

pytestmark = [pytest.mark.slow, pytest.mark.site]


@pytest.fixture(scope="module")
def site():
    "The folder of the site, built as `make docs` builds it; what the notebooks gave is found again where no code has changed."
    done = subprocess.run(["make", "-o", ".venv/.complete", "docs"], cwd=ROOT, env=ENV, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return SITE


class Page(HTMLParser):
    "The links, anchors and pictures of a page."
    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.pictures = [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])
        if tag == "img": self.pictures.append((attrs.get("src", ""), attrs.get("alt") or ""))
        if tag in ("script", "img") and "src" in attrs: self.links.append(attrs["src"])
        if tag == "link" and "href" in attrs: self.links.append(attrs["href"])


@pytest.fixture(scope="module")
def pages(site): return {p: Page(p) for p in sorted(site.rglob("*.html")) if "_static" not in p.parts}


def test_every_notebook_has_its_page(pages):
    notebooks = {p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix() for p in (ROOT/"nbs").rglob("*.ipynb") if not {".ipynb_checkpoints"} & set(p.parts)}
    assert notebooks <= {p.relative_to(SITE).as_posix() for p in pages}


def test_no_link_is_broken(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target /= "index.html"
            anchors = pages[target].ids if target in pages else set()
            if not target.is_file() or parts.fragment and target in pages and unquote(parts.fragment) not in anchors: broken.append(f"{path.relative_to(SITE)}: {link}")
    assert not broken, "\n".join(broken)


def test_every_picture_has_words(pages):
    silent = [f"{path.relative_to(SITE)}: {src}" for path, page in pages.items() for src, alt in page.pictures if len(alt) < 8 or "/" in alt]
    assert not silent and sum(len(page.pictures) for page in pages.values()) > 40, "\n".join(silent)


def test_library_pages_hold_signatures_sources_and_outputs(pages):
    text = (SITE/"11_transferability.html").read_text()
    assert 'id="transferability-leep"' in text and "Show the code" in text
    assert "_check_softmax" in re.sub(r"<[^>]+>", "", text) and "-2.302" not in (SITE/"jobs/transferability.html").read_text()
    shown = re.sub(r"<[^>]+>", "", (SITE/"00_settings.html").read_text())
    assert "steps has origin 'guessed'" in unescape(shown) # printed when the notebook ran


def test_reference_has_every_setting(pages):
    text = re.sub(r"<[^>]+>", "", (SITE/"settings.html").read_text())
    keys = re.findall(r"^(\w+) *=", (ROOT/"settings.ini").read_text(), re.M)
    assert len(keys) > 80 and not [k for k in keys if k not in text]


class Browser:
    "Headless Chromium, spoken to in its DevTools protocol."
    def __init__(self, folder):
        self.process = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0", "--remote-allow-origins=*",
                                         "--disable-background-networking", "--no-first-run", f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            if (folder/"DevToolsActivePort").exists() and (words := (folder/"DevToolsActivePort").read_text().split()): break
            time.sleep(.1)
        with urlopen(f"http://127.0.0.1:{words[0]}/json") as answer: url = next(t for t in json.load(answer) if t["type"] == "page")["webSocketDebuggerUrl"]
        self.socket, self.count, self.events = websocket.create_connection(url, timeout=120), 0, []
        for domain in ("Page", "Runtime", "Log", "Network"): self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=800, deviceScaleFactor=1, mobile=False)

    def receive(self):
        message = json.loads(self.socket.recv())
        if "method" in message: self.events.append(message)
        return message

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while (message := self.receive()).get("id") != self.count: pass
        assert "error" not in message, message
        return message["result"]

    def js(self, text):
        result = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def visit(self, url): # what happened until the page stood
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(e["method"] == "Page.loadEventFired" for e in self.events): self.receive()
        return self.events

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM: pytest.skip("Chromium is missing: apt install chromium")
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def complaints(events, address):
    "What a page should not have done."
    for e in events:
        p = e["params"]
        if e["method"] == "Runtime.exceptionThrown": yield f"error: {p['exceptionDetails'].get('exception', p['exceptionDetails']).get('description', p['exceptionDetails']['text'])}"
        if e["method"] == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"): yield f"console: {p['args']}"
        if e["method"] == "Log.entryAdded" and p["entry"]["level"] == "error": yield f"log: {p['entry']['text']} {p['entry'].get('url', '')}"
        if e["method"] == "Network.requestWillBeSent" and not p["request"]["url"].startswith((address, "data:", "blob:")): yield f"asks {p['request']['url']}"
        if e["method"] == "Network.responseReceived" and p["response"]["status"] >= 400: yield f"{p['response']['status']}: {p['response']['url']}"


CUT_OFF = """[...document.querySelectorAll('article *, main *')].filter(e => {
  if (e.closest('.headerlink, .toc-drawer') || e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let a = e.parentElement; a; a = a.parentElement) if (['auto', 'scroll'].includes(getComputedStyle(a).overflowX) && a.getBoundingClientRect().right <= innerWidth + 1) return false;
  return getComputedStyle(e).visibility != 'hidden' && e.getClientRects().length; }).slice(0, 3).map(e => e.outerHTML.slice(0, 80))"""


def test_the_browser_notices(browser, address):
    text = "<script>console.error('x'); undefined_thing()</script><main><p style='width:500px'>wide</p><div style='overflow-x:auto'><p style='width:500px'>scrolls</p></div></main><img src='http://127.0.0.1:1/x.png'>"
    found = list(complaints(browser.visit(f"data:text/html,{text}"), address))
    assert {f.split(":")[0].split()[0] for f in found} >= {"console", "error", "asks"}
    assert browser.js("document.documentElement.scrollWidth") > WIDTH and len(browser.js(CUT_OFF)) == 1


def test_every_page_in_a_browser(pages, address, browser):
    wrong, formulas = [], {}
    for path in pages:
        place = path.relative_to(SITE).as_posix()
        found = list(complaints(browser.visit(f"{address}/{place}"), address))
        width = browser.js("document.documentElement.scrollWidth")
        if width > WIDTH: found.append(f"{width} pixels wide")
        found += [f"cut off: {html}" for html in browser.js(CUT_OFF)]
        found += [f"no picture {src}" for src in browser.js("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")]
        formulas[place] = browser.js("[...document.querySelectorAll('math')].filter(e => e.getBoundingClientRect().width > 4).length")
        wrong += [f"{place}: {text}" for text in found]
    assert not wrong, "\n".join(wrong)
    assert formulas["11_transferability.html"] > 10 and sum(formulas.values()) > 200


@pytest.mark.parametrize(("word", "page"), [("LEEP", "11_transferability"), ("bridged", "10_transfer")])
def test_search_finds(address, browser, word, page):
    browser.visit(f"{address}/search.html?q={word}")
    for _ in range(100):
        found = browser.js("[...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href'))")
        if any(page in link for link in found): break
        time.sleep(.2)
    assert any(page in link for link in found), found


def test_dark_mode_is_a_click_away(address, browser):
    browser.visit(f"{address}/index.html")
    colours = set()
    for _ in range(3):
        browser.js("document.querySelector('.theme-toggle').click()")
        colours.add(browser.js("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) > 1


def test_generation_can_be_played(address, browser):
    browser.visit(f"{address}/tutorials/playing_with_generation.html")
    state = "(p => [p.getAttribute('aria-label'), getComputedStyle(p).backgroundPosition])(document.querySelector('.explorer [role=img]'))"
    turn = "(k => {{ k.{what}; k.dispatchEvent(new Event('input', {{bubbles: true}})); }})(document.querySelectorAll('.explorer input, .explorer select')[{knob}])"
    seen = [browser.js(state)]
    for knob, what in ((0, "value = 0"), (1, "value = 3"), (2, "selectedIndex = 2")):
        browser.js(turn.format(knob=knob, what=what))
        seen.append(browser.js(state))
    assert len({label for label, _ in seen}) == len({place for _, place in seen}) == 4
    assert "guidance 1, seed 3" in seen[-1][0] and "blueprint" in seen[-1][0]
