"""`bridgexfer push`: what goes to the hub, and what does not. The hub is a small server on loopback."""
import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bridgexfer.classifier import push_classifier

PUSH = "from bridgexfer.cli import main; import sys; sys.exit(main(['push', *sys.argv[1:]]))"


class StandIn(BaseHTTPRequestHandler):
    "The part of the hub that takes files."
    def log_message(self, *_): pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        answer = {"url": f"{self.server.address}/me/digits", "commitUrl": f"{self.server.address}/me/digits/commit/1",
                  "commitOid": "1" * 40, "errors": [], "warnings": []}
        if self.path.endswith("/preupload/main"):
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [file | plain for file in json.loads(body)["files"]]}
        self.reply(self.server.status, answer)

    def do_GET(self): self.reply(200, {"sha": "1" * 40, "id": "me/digits", "siblings": []})

    def reply(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.address, server.asked, server.status = f"http://127.0.0.1:{server.server_port}", [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def kept(tmp_path):
    "A folder as `transfer` leaves it; its weights are never opened."
    folder = tmp_path/"better"
    folder.mkdir()
    (folder/"config.json").write_text('{"label_names": ["one", "two"]}')
    (folder/"README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    for name in ("model.safetensors", "report.html", "outcome.json"): (folder/name).write_text(name)
    return folder


def push(hub, tmp_path, *words):
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_mine", "HF_HOME": str(tmp_path/"hf"),
           "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, "-c", PUSH, *map(str, words)], env=env, capture_output=True, text=True)


def sent(hub): # path -> content, of the commit
    [body] = [body for path, body, _ in hub.asked if "/commit/" in path]
    lines = [json.loads(line) for line in body.splitlines()]
    return {l["value"]["path"]: base64.b64decode(l["value"]["content"]).decode() for l in lines if l["key"] == "file"}


def made(hub): # how the repository was asked for
    [body] = [body for path, body, _ in hub.asked if path == "/api/repos/create"]
    return json.loads(body)


def test_a_classifier_is_pushed_without_its_report(hub, kept, tmp_path):
    done = push(hub, tmp_path, kept, "me/digits")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/digits"
    assert sent(hub) == {n: (kept/n).read_text() for n in ("config.json", "model.safetensors", "README.md")}
    assert made(hub).get("private") is True or made(hub).get("visibility") == "private"
    assert {token for _, _, token in hub.asked} == {"Bearer hf_mine"}


def test_public_is_a_word_of_its_own(hub, kept, tmp_path):
    done = push(hub, tmp_path, kept, "me/digits", "--public", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"address": f"{hub.address}/me/digits", "public": True}
    assert made(hub).get("private") is False or made(hub).get("visibility") == "public"


def test_a_rejected_token_is_a_sentence(hub, kept, tmp_path):
    hub.status = 401
    done = push(hub, tmp_path, kept, "me/digits")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "could not be put on the hub as me/digits: the hub rejects the token" in done.stderr


def test_what_is_no_classifier_or_no_name_is_not_pushed(kept):
    with pytest.raises(ValueError, match="owner/name, got 'digits'"): push_classifier(kept, "digits")
    (kept/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no classifier"): push_classifier(kept, "me/digits")
