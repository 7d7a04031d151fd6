"""A stand-in of the hub on loopback: it speaks what `huggingface_hub` asks, counts what it sends, and fails to order.

`Hub(repositories)` serves; `Client(hub)` is a process that knows the hub by HF_ENDPOINT, as a user's would.
"""
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
PAGE = b"<!doctype html><title>Log in to the network</title>" + b"." * 300
WAIT = 7 # seconds in Retry-After


# ---- what it serves

@dataclass
class Repository:
    "Commits of a model, and the names that they have."
    commits: dict[str, dict[str, bytes]] # commit -> path -> content
    refs: dict[str, str] # branch or tag -> commit

    def commit(self, revision): # None: there is none
        return self.refs.get(revision) or (revision if revision in self.commits else None)


def is_large(path): return path.endswith((".safetensors", ".bin", ".ckpt", ".msgpack", ".h5")) # in LFS


@lru_cache
def etag_of(path, content): # as of git, or of LFS
    if is_large(path): return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str = ""
    sent: int = 0 # bytes of a body


# ---- how it fails

@dataclass
class Fault:
    "What to do instead of answering, and to which requests."
    kind: str = ""
    paths: str = "." # a regular expression
    methods: str = "GET HEAD"
    times: int = 10**9
    after: int = 0 # bytes of a file that are sent before it is cut

    def takes(self, method, path):
        found = self.kind and self.times > 0 and method in self.methods.split() and re.search(self.paths, path)
        if found: self.times -= 1
        return bool(found)


STATUSES = { # kind of fault -> status, headers
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}),
    "gated, not logged in": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Please log in."}),
    "no such repository": (401, {"X-Error-Code": "RepoNotFound"}),
    "no such revision": (404, {"X-Error-Code": "RevisionNotFound"}),
    "no such file": (404, {"X-Error-Code": "EntryNotFound"}),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "wrong token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {}),
    "too many requests": (429, {"Retry-After": str(WAIT)}),
    "proxy": (407, {}),
    "down": (503, {})}


class Handler(BaseHTTPRequestHandler):
    "One request; the connection is closed after it."
    protocol_version = "HTTP/1.1"
    hub: "Hub" # set by the hub
    cdn = False # whether it is the store of large files

    def log_message(self, *_): pass

    def respond(self, status, headers, content=b""):
        "Answer, and note what was sent; a body may be cut."
        body = content if self.command == "GET" else b""
        cut = self.fault.kind in ("cut", "reset") and status in (200, 206) and bool(body)
        if cut: body = body[:self.fault.after]
        self.hub.note(Request(self.command, self.path, self.headers.get("Range", ""), len(body)))
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "Connection": "close", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True
        if cut and self.fault.kind == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        wanted = self.hub.fault
        with self.hub.lock: self.fault = wanted if wanted.takes(self.command, path) else Fault()
        kind = self.fault.kind
        if kind in STATUSES:
            status, headers = STATUSES[kind]
            return self.respond(status, headers, b"{}")
        if kind == "page": return self.respond(200, {"Content-Type": "text/html"}, PAGE)
        if kind == "login": return self.respond(302, {"Location": "http://login.invalid/?from=hub"})
        if kind in ("hang", "drop"):
            self.hub.note(Request(self.command, self.path))
            if kind == "hang": self.hub.released.wait(60)
            self.close_connection = True
            return None
        return self.file_by_digest(path) if self.cdn else self.answer(path)

    def do_GET(self):
        with suppress(ConnectionError): self.handle_one()

    do_HEAD = do_GET

    def send_file(self, content, headers):
        "A file, or the end of one."
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not start: return self.respond(200, {"Accept-Ranges": "bytes", **headers}, content)
        at = int(start[1])
        where = {"Content-Range": f"bytes {at}-{len(content) - 1}/{len(content)}"}
        return self.respond(206, headers | where, content[at:])

    def file_by_digest(self, path):
        content = next(content for etag, _, content in self.hub.large_files() if etag == path.strip("/"))
        return self.send_file(content, {"Content-Type": "binary/octet-stream"})

    def answer(self, path):
        revision = r"(refs/pr/\d+|[^/]+)"
        if found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{revision}/(.+)", path):
            return self.file(found[1], found[2], found[3], False)
        if found := re.fullmatch(rf"/api/resolve-cache/models/([^/]+/[^/]+)/{revision}/(.+)", path):
            return self.file(found[1], found[2], found[3], True)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            return self.listing(found[1], found[2] or "revision", found[3] or "main")
        return self.respond(404, {}, b"{}")

    def files(self, name, revision):
        "(commit, its files); or what to answer instead."
        repository = self.hub.repositories.get(name)
        if not repository: return STATUSES["no such repository"]
        commit = repository.commit(revision)
        return (commit, repository.commits[commit]) if commit else STATUSES["no such revision"]

    def file(self, name, revision, path, settled): # settled: asked for where a redirect pointed
        commit, files = self.files(name, revision)
        if isinstance(commit, int): return self.respond(commit, files, b"{}")
        if path not in files:
            status, headers = STATUSES["no such file"]
            return self.respond(status, headers | {"X-Repo-Commit": commit}, b"{}")
        content = files[path]
        etag = f'"{etag_of(path, content)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Content-Type": "text/plain"}
        if is_large(path):
            where = {"Location": f"{self.hub.cdn_address}/{etag.strip(chr(34))}"}
            return self.respond(302, headers | where | {"X-Linked-ETag": etag, "X-Linked-Size": len(content)})
        if not settled: # a relative redirect, which is followed
            return self.respond(307, headers | {"Location": f"/api/resolve-cache/models/{name}/{commit}/{path}"})
        return self.send_file(content, headers)

    def listing(self, name, what, revision):
        commit, files = self.files(name, revision)
        if isinstance(commit, int): return self.respond(commit, files, b"{}")
        if what == "tree": answer = [entry(path, content) for path, content in files.items()]
        else: answer = {"id": name, "modelId": name, "sha": commit, "private": False, "gated": False, "disabled": False,
                        "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in files]}
        return self.respond(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())


def entry(path, content):
    "A file in a listing."
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    large = {"lfs": {"oid": etag_of(path, content), "size": len(content), "pointerSize": 134}} if is_large(path) else {}
    return {"type": "file", "path": path, "size": len(content), "oid": oid, **large}


@dataclass
class Hub:
    "A hub and its store of large files, each a server of its own."
    repositories: dict[str, Repository]
    fault: Fault = field(default_factory=Fault)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self):
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.servers = []
        self.ports = [0, 0]
        self.start()

    def start(self):
        "Serve, at the ports of the last time if there was one."
        for i, cdn in enumerate((False, True)):
            handler = type("Bound", (Handler,), {"hub": self, "cdn": cdn})
            server = ThreadingHTTPServer(("127.0.0.1", self.ports[i]), handler)
            server.daemon_threads = True
            self.ports[i] = server.server_address[1]
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self.servers.append(server)

    def stop(self):
        "Be gone: connections are refused."
        self.released.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers = []
        self.released = threading.Event()

    def large_files(self):
        "(digest, path, content) of what the store has."
        commits = [files for r in self.repositories.values() for files in r.commits.values()]
        return [(etag_of(path, content), path, content) for files in commits
                for path, content in files.items() if is_large(path)]

    @property
    def address(self): return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def cdn_address(self): return f"http://127.0.0.1:{self.ports[1]}"

    def note(self, request):
        with self.lock: self.requests.append(request)

    def reset(self):
        self.released.set()
        self.released = threading.Event()
        self.fault = Fault()
        self.requests = []
        if not self.servers: self.start()

    def fetched(self):
        "Path of a file -> bytes of it that were sent."
        names = {etag: path for etag, path, _ in self.large_files()}
        sent = {}
        for r in self.requests:
            path = names.get(r.path.strip("/")) or re.sub(r"^.*?/([0-9a-f]{40}|main)/", "", r.path)
            if r.sent and "/api/models/" not in r.path: sent[path] = sent.get(path, 0) + r.sent
        return sent


# ---- who asks it

class Client:
    "A process that opens models and runs commands; what it is told and what it answers are lines of JSON."
    def __init__(self, hub, home):
        env = {k: v for k, v in os.environ.items() if not re.search("proxy|^HF_|^TRANSFORMERS_|TOKEN", k, re.I)}
        env |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, str(HERE/"hub.py")], env=env, cwd=HERE.parent, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def ask(self, do, *args, **how):
        self.process.stdin.write(json.dumps(dict(do=do, args=args, **how)) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"): return json.loads(line[1:])
        raise RuntimeError(f"the client ended with {self.process.wait()}")

    def close(self):
        self.process.kill()
        self.process.wait()


def _numbers(model):
    "A short digest of a network's weights."
    h = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()): h.update(name.encode() + value.float().numpy().tobytes())
    return h.hexdigest()[:16]


def _file(name, file, revision):
    from bridgexfer.hub import fetch_file
    return fetch_file(name, file, revision).as_posix()


def _folder(name, commit, patterns):
    from functools import partial
    from bridgexfer.hub import fetch_folder
    from huggingface_hub import snapshot_download
    folder = fetch_folder(partial(snapshot_download, allow_patterns=patterns), name, commit)
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _commit(name, revision, file):
    from bridgexfer.hub import commit_of
    return commit_of(name, revision, file)


def _pipeline(name):
    from bridgexfer.models import load_pipeline
    pipe = load_pipeline(name)
    return {part: _numbers(getattr(pipe, part)) for part in ("text_encoder", "unet", "vae")}


def _clip(name):
    from bridgexfer.clip_tuning import load_clip
    clip = load_clip(name)
    return {"model": _numbers(clip.model), "weights": clip.weights, "words": clip.tokenizer("one two").input_ids}


def _backbone(arch):
    from bridgexfer.backbones import create_backbone
    return _numbers(create_backbone(arch))


def _command(*words):
    import io
    from contextlib import redirect_stderr, redirect_stdout
    from bridgexfer.cli import main
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()):
        code = main(list(words))
    return {"code": code, "said": said.getvalue()}


TASKS = {"file": _file, "folder": _folder, "commit": _commit, "pipeline": _pipeline, "clip": _clip,
         "backbone": _backbone, "command": _command}


def _settle(cache, endpoint, seconds):
    "Tell huggingface_hub where to look and how long to wait."
    from huggingface_hub import constants, file_download
    constants.HF_HUB_CACHE = cache
    constants.ENDPOINT = endpoint or os.environ["HF_ENDPOINT"]
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = file_download._ETAG_RETRY_TIMEOUT = seconds


def _work(do, args, cache, endpoint="", seconds=30, environment=None):
    "One task, with a cache, a hub, a time limit and environment variables of its own."
    from huggingface_hub import close_session
    _settle(cache, endpoint, seconds)
    before = dict(os.environ)
    os.environ.update(environment or {})
    close_session() # proxies are read when a session begins
    try: return {"value": TASKS[do](*args)}
    except Exception as e: return {"error": str(e), "kind": [kind.__name__ for kind in type(e).__mro__]}
    finally:
        os.environ.clear()
        os.environ.update(before)
        close_session()


def _serve():
    "Work off what is asked, without the pauses before another try."
    slept = []
    time.sleep = slept.append
    for line in sys.stdin:
        slept.clear()
        answer = _work(**json.loads(line))
        print("@" + json.dumps(answer | {"slept": slept}), flush=True)


if __name__ == "__main__": _serve()
