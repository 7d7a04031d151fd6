"""Models from the hub, on a stand-in of it: what is fetched, how often it is asked, and every way in which it fails."""
import logging
import os
import re
import shutil
import subprocess

import httpx2 as httpx
import pytest
import requests
from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError

from bridgexfer.hub import FAULTS, UNKNOWN, find_fault, plain_retries, said_by_hub
from bridgexfer.models import find_weights
from hub import WAIT, Client, Fault, Hub, Repository
from hub_models import CLIP, CLIP_COMMIT, RESNET, SD, SD_COMMIT, clip, resnet18, shipped, stable_diffusion

LARGE = "someone/large"
CUT = 15 * 2**20 # bytes of a large file before a cut
CHUNK = 10 * 2**20 # bytes that huggingface_hub writes at once
COMMIT = "0123456789" * 4
ADDED = "9876543210" * 4
INDEX = (SD, "model_index.json", SD_COMMIT)
WEIGHTS = (SD, "text_encoder/model.safetensors", SD_COMMIT)
CLIP_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(scope="module")
def used():
    "Model -> the files of its repository that are opened."
    return {}


@pytest.fixture(scope="module")
def served(used):
    used[SD], diffusion = stable_diffusion()
    used[CLIP], pairs = clip()
    large = Repository({COMMIT: {"model.safetensors": os.urandom(25 * 2**20)}}, {"main": COMMIT})
    served = Hub({SD: diffusion, CLIP: pairs, LARGE: large})
    yield served
    served.reset()
    served.stop()


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    client = Client(served, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def hub(served):
    served.reset()
    return served


@pytest.fixture
def ask(client, hub, tmp_path):
    "Give the client a task, with an empty cache."
    def ask(do, *args, **how):
        return client.ask(do, *args, **({"cache": str(tmp_path/"hub")} | how))
    return ask


def sizes(files): return {path: len(content) for path, content in files.items()}


def parts(cache):
    "Files in a cache that hold a part of a download."
    return [p for p in cache.rglob("*") if p.is_file() and (p.suffix == ".incomplete" or p.name.endswith(".part"))]


# ---- what is fetched

def check(ask, hub, used, do, name, commit):
    "Fetched once and no more than needed; opened again without a request, and without a hub."
    first = ask(do, f"{name}@{commit}" if commit else name)
    assert "value" in first, first
    assert hub.requests and hub.fetched() == sizes(used)
    hub.requests = []
    assert ask(do, f"{name}@{commit}" if commit else name) == first and not hub.requests
    hub.stop()
    assert ask(do, f"{name}@{commit}" if commit else name) == first
    return first["value"]


def test_stable_diffusion(ask, hub, used):
    value = check(ask, hub, used[SD], "pipeline", SD, SD_COMMIT)
    assert value == ask("pipeline", "miniature")["value"]
    assert "name the commit" in ask("pipeline", SD)["error"] # where `main` is was never asked
    hub.start()
    hub.requests = []
    assert ask("pipeline", SD)["value"] == value
    assert {r.method for r in hub.requests} == {"HEAD"} and {r.path.split("/")[-1] for r in hub.requests} == {
        "model_index.json"} # which commit is it now?


def test_clip(ask, hub, used):
    value = check(ask, hub, used[CLIP], "clip", CLIP, CLIP_COMMIT)
    assert value["weights"] == f"{CLIP}@{CLIP_COMMIT}"
    assert value["model"] == ask("clip", "miniature")["value"]["model"]


def test_a_backbone(ask, hub):
    used, hub.repositories[RESNET] = resnet18()
    check(ask, hub, used, "backbone", "resnet18", "")


def test_a_model_without_safetensors_is_not_converted_by_anyone(ask, hub):
    answer = ask("clip", CLIP)
    assert f"Cannot open the CLIP '{CLIP}'" in answer["error"] and "not as safetensors" in answer["error"]
    assert f"{CLIP}@refs/pr/1" in answer["error"] and "pytorch_model.bin" not in hub.fetched()
    assert not [r for r in hub.requests if "discussions" in r.path or "convert" in r.path]
    assert all(CLIP in r.path for r in hub.requests if "/models/" in r.path)
    assert ask("clip", f"{CLIP}@refs/pr/66")["value"]["weights"] == f"{CLIP}@{CLIP_COMMIT}"


def test_a_download_that_was_cut_resumes(ask, hub):
    hub.fault = Fault("cut", methods="GET", times=1, after=CUT)
    assert ask("file", LARGE, "model.safetensors", COMMIT)["value"].endswith("model.safetensors")
    assert [r.range for r in hub.requests if r.method == "GET"] == ["", f"bytes={CHUNK}-"]
    size = len(hub.repositories[LARGE].commits[COMMIT]["model.safetensors"])
    assert hub.fetched() == {"model.safetensors": size + CUT - CHUNK}


def test_a_branch_moves_and_a_commit_does_not(ask, hub):
    repository = Repository({COMMIT: {"config.json": b"{}"}, ADDED: {"config.json": b"{ }"}}, {"main": COMMIT})
    hub.repositories["someone/moving"] = repository
    def commit(revision): return ask("commit", "someone/moving", revision, "config.json")["value"]
    assert commit("main") == COMMIT
    repository.refs["main"] = ADDED
    assert commit("main") == ADDED and commit(COMMIT) == COMMIT
    hub.stop()
    assert commit("main") == ADDED


def test_a_cache_without_a_list_is_completed_or_used_as_it_is(ask, hub, tmp_path):
    "As an interrupted download of an earlier version left it."
    ask("folder", CLIP, CLIP_COMMIT, CLIP_FILES)
    for trees in (tmp_path/"hub").rglob("trees"): shutil.rmtree(trees)
    next((tmp_path/"hub").rglob("tokenizer.json")).unlink()
    assert ask("folder", CLIP, CLIP_COMMIT, CLIP_FILES)["value"] == sorted(CLIP_FILES)
    for trees in (tmp_path/"hub").rglob("trees"): shutil.rmtree(trees)
    hub.stop()
    assert ask("folder", CLIP, CLIP_COMMIT, CLIP_FILES)["value"] == sorted(CLIP_FILES)


def test_an_interrupted_folder_is_not_taken_for_whole(ask, hub):
    hub.fault = Fault("down", paths="tokenizer.json")
    assert "out of order" in ask("folder", CLIP, CLIP_COMMIT, CLIP_FILES)["error"]
    hub.stop()
    assert "refuses connections" in ask("folder", CLIP, CLIP_COMMIT, CLIP_FILES)["error"]
    hub.reset()
    assert ask("folder", CLIP, CLIP_COMMIT, CLIP_FILES)["value"] == sorted(CLIP_FILES)
    assert "config.json" not in hub.fetched() # it was there


# ---- how it fails

REFUSED = "http://127.0.0.1:1"
ALWAYS = [ # a fault; what else is unlike; what is said and what to do
    ("gated", {}, rf"licence accepted first: accept it at http\S+/{SD}, then log in with `hf auth login`"),
    ("gated, not logged in", {}, "licence accepted first: accept it"),
    ("no such repository", {}, "no such model, or it is private: check its name"),
    ("no such revision", {}, "no such revision of it: name a branch, a tag or a commit"),
    ("no such file", {}, "no such file in this revision of it: name a model or a revision"),
    ("disabled", {}, "has disabled the model: use another"),
    ("wrong token", {}, "rejects the token that it was sent: log in again"),
    ("forbidden", {}, "forbids it to this account: use a token"),
    ("proxy", {}, "the proxy does not let the hub be asked .*: check HTTPS_PROXY"),
    ("too many requests", {}, rf"takes no more requests for now: run the same command again in {WAIT} seconds"),
    ("down", {}, r"out of order \(HTTP 503\): run the same command again later"),
    ("page", {}, "perhaps the login page of a network: log in to the network"),
    ("login", {}, "perhaps the login page of a network: log in to the network"),
    ("drop", {}, "broke off .*: run the same command again"),
    ("hang", {"seconds": 0.3}, "did not answer in time: .*HF_HUB_DOWNLOAD_TIMEOUT to more than 0.3 seconds"),
    ("", {"endpoint": REFUSED}, rf"{REFUSED} cannot be reached because it refuses connections: correct HF_ENDPOINT"),
    ("", {"endpoint": "http://hub.invalid"}, "no address is known for http://hub.invalid .*: connect this machine"),
    ("", {"environment": {"http_proxy": REFUSED}}, "the proxy of http_proxy refuses connections"),
    ("", {"environment": {"all_proxy": "socks5://127.0.0.1:1"}}, "speaks SOCKS, .* socksio is missing: install it"),
    ("", {"environment": {"http_proxy": "gopher://127.0.0.1:1"}}, "address of the proxy is not one .*: correct")]


@pytest.mark.parametrize(("kind", "how", "said"), ALWAYS, ids=[f"{k}{list(h.values()) or ''}" for k, h, _ in ALWAYS])
def test_each_fault_is_a_sentence_with_its_remedy(kind, how, said, ask, hub, tmp_path):
    hub.fault = Fault(kind)
    answer = ask("file", *INDEX, **how)
    assert "OSError" in answer["kind"] and len(answer["error"].splitlines()) == 1
    assert re.search(said, answer["error"]), answer["error"]
    assert not parts(tmp_path) and not list(tmp_path.rglob("snapshots/*/*"))
    if kind == "too many requests": assert WAIT + 1 in answer["slept"]
    hub.reset()
    assert ask("file", *INDEX)["value"].endswith("model_index.json")


IN_A_FILE = [
    ("cut", "broke off .*: run the same command again"),
    ("reset", "broke off .*: run the same command again"),
    ("hang", "did not answer in time"),
    ("page", "not the file that the hub announced, but of another size: run the same command again"),
    ("down", "out of order")]


@pytest.mark.parametrize(("kind", "said"), IN_A_FILE)
def test_a_file_that_does_not_arrive_leaves_nothing(kind, said, ask, hub, tmp_path):
    hub.fault = Fault(kind, methods="GET", after=1000)
    answer = ask("file", *WEIGHTS, seconds=0.5)
    assert re.search(said, answer["error"]), answer
    assert not parts(tmp_path) and not list(tmp_path.rglob("*.safetensors"))
    hub.reset()
    found = ask("file", *WEIGHTS)["value"]
    assert open(found, "rb").read() == hub.repositories[SD].commits[SD_COMMIT][WEIGHTS[1]]


@pytest.mark.parametrize("kind", ["page", "down", "drop", "hang", "too many requests", "no such revision"])
def test_a_list_of_files_that_does_not_arrive(kind, ask, hub, tmp_path):
    "huggingface_hub itself would wait for ever."
    hub.fault = Fault(kind, paths="^/api/models/")
    answer = ask("folder", CLIP, CLIP_COMMIT, CLIP_FILES, seconds=0.3)
    assert "OSError" in answer["kind"] and len(answer["error"].splitlines()) == 1
    assert find_text(answer["error"]) != UNKNOWN
    hub.reset()
    assert ask("folder", CLIP, CLIP_COMMIT, CLIP_FILES)["value"] == sorted(CLIP_FILES)


def find_text(said):
    "The fault whose sentence it is."
    def pattern(f): return re.sub(r"\\{\w+\\}", ".*", re.escape(f"{f.said}: {f.remedy}"))
    return next(f for f in (*FAULTS, UNKNOWN) if re.search(pattern(f), said))


@pytest.mark.parametrize(("kind", "how"), [(kind, how) for kind, how, _ in ALWAYS],
                         ids=[f"{k}{list(h.values()) or ''}" for k, h, _ in ALWAYS])
def test_what_the_cache_has_is_used_whatever_the_hub_says(kind, how, ask, hub):
    assert ask("commit", SD, "main", "model_index.json")["value"] == SD_COMMIT
    hub.requests = []
    hub.fault = Fault(kind)
    assert ask("commit", SD, "main", "model_index.json", **how)["value"] == SD_COMMIT
    hub.requests = []
    assert "value" in ask("file", *INDEX, **how) and not hub.requests # of a commit


def test_a_cache_that_cannot_be_written(ask, tmp_path):
    (tmp_path/"file").write_text("in the way")
    answer = ask("file", *INDEX, cache=str(tmp_path/"file"/"hub"))
    assert "the cache cannot be written" in answer["error"] and "set HF_HOME to a folder" in answer["error"]
    assert ask("file", *INDEX)["value"].endswith("model_index.json")


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path/"disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here; the error itself is recognised in another test")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(ask, small_disk, hub):
    answer = ask("file", *WEIGHTS, cache=str(small_disk/"hub"))
    assert "no space is left on the disk of the cache: free some, or set HF_HOME" in answer["error"]
    assert not parts(small_disk) and not list(small_disk.rglob("*.safetensors"))
    assert ask("file", *INDEX, cache=str(small_disk/"hub"))["value"].endswith("model_index.json")


@pytest.mark.parametrize(("words", "wanted"), [
    (("generate", "digits", "--profile", "evening"), "text-to-image model"),
    (("leep", "digits", "--arch", "resnet18"), "weights resnet18.tv_in1k")])
def test_commands_end_with_exit_code_2(words, wanted, ask, hub, tmp_path):
    hub.fault = Fault("gated")
    answer = ask("command", *words, "--set", f"runs={tmp_path}/runs")["value"]
    last = answer["said"].strip().splitlines()[-1]
    assert answer["code"] == 2 and wanted in last and "licence accepted first" in last and "Traceback" not in last
    assert not list((tmp_path/"runs").rglob("shard-*"))


# ---- errors of any client

@pytest.mark.parametrize(("error", "said"), [
    (requests.exceptions.ConnectionError("Failed to resolve 'x' ([Errno -2] Name or service not known)"), "no address"),
    (requests.exceptions.ConnectionError("[Errno 111] Connection refused"), "refuses"),
    (requests.exceptions.ProxyError("Cannot connect to proxy."), "the proxy"),
    (requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED]"), "certificate"),
    (requests.exceptions.ConnectTimeout("timed out"), "in time"),
    (requests.exceptions.ChunkedEncodingError("Response ended prematurely"), "broke off"),
    (httpx.ConnectError("[Errno -3] Temporary failure in name resolution"), "no address"),
    (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), "certificate"),
    (httpx.ConnectError("[Errno 101] Network is unreachable"), "cannot be reached"),
    (httpx.ReadTimeout("The read operation timed out"), "in time"),
    (httpx.ReadError("[Errno 104] Connection reset by peer"), "broke off"),
    (httpx.ProxyError("403 Forbidden"), "the proxy"),
    (FileMetadataError("no commit"), "login page"),
    (OSError(28, "No space left on device"), "no space is left"),
    (OSError(122, "Disk quota exceeded"), "no space is left"),
    (PermissionError(13, "Permission denied"), "cannot be written"),
    (OSError(30, "Read-only file system"), "cannot be written"),
    (RuntimeError("Data processing error: CAS service error"), "gave no answer")])
def test_errors_of_any_client_are_recognised_wherever_they_are_in_a_chain(error, said):
    try:
        try: raise LocalEntryNotFoundError("An error happened while trying to locate the file") from error
        except OSError: raise OSError("Can't load config") # without `from`, as libraries do
    except OSError as e: assert said in said_by_hub(e) and find_fault(e)[1] is error


def test_each_fault_has_a_remedy_of_its_own():
    assert len({f.remedy for f in FAULTS}) == len(FAULTS) == len({f.said for f in FAULTS})


# ---- folders

def test_a_digest_counts_weights_and_configurations(tmp_path):
    used, repository = stable_diffusion()
    used = shipped("pipeline")
    extra = {k: v for k, v in repository.commits[SD_COMMIT].items() if k not in used and "feature_extractor" not in k}
    for path, content in (used | extra | {".DS_Store": b"x", ".cache/huggingface/a.json": b"x"}).items():
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/path).write_bytes(content)
    assert find_weights(str(tmp_path)) == find_weights("miniature")
    (tmp_path/"unet/config.json").write_bytes(b"{}")
    assert find_weights(str(tmp_path)) != find_weights("miniature")


def test_a_request_that_is_repeated_is_one_plain_line(caplog):
    library = logging.getLogger("huggingface_hub.utils._http")
    with plain_retries():
        library.warning("'[Errno -2] …' thrown while requesting HEAD https://hub/model.safetensors")
        library.warning("Retrying in 8s [Retry 4/5].")
        library.warning("Rate limited. Waiting 31.0s before retry [Retry 1/5].")
    library.warning("Retrying in 8s [Retry 5/5].")
    assert caplog.messages == ["No answer from the hub, trying again in 8 seconds (4 of 5)",
                               "No answer from the hub, trying again in 31.0 seconds (1 of 5)",
                               "Retrying in 8s [Retry 5/5]."]
