"""The first evening, narrowed, on a stand-in of the hub: what it fetches is what is said; the second asks nobody."""
import re

import pytest

from bridgexfer.study.costs import WEIGHTS, download_text, downloads
from bridgexfer.study.grid import Study
from hub import Client, Hub
from hub_models import CLIP, RESNET, SD, full_size
from test_own_images import write
from test_project import ROOT

REPOSITORIES = {SD: SD, CLIP: CLIP, RESNET: "resnet18"} # -> as the settings name it
NARROW = dict(images=1, steps=1, size=32, stored_size=224, epochs=1, stage1_epochs=1, mixed_epochs=1, mixed_images=1,
              lrs="0.01", stage1_lrs="0.01", seeds=0, tuning_seeds=100, real_shares="0.5", gpu=0)
EVENING = Study("evening")


@pytest.fixture(scope="module")
def models(): return full_size()


@pytest.fixture(scope="module")
def used(models):
    "Repository -> the files of it that are opened."
    return {name: files for name, (files, _) in models.items()}


@pytest.fixture(scope="module")
def hub(models):
    hub = Hub({name: repository for name, (_, repository) in models.items()})
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def evening(hub, tmp_path_factory):
    "Runs it, with one cache; a new folder for what it makes."
    root = tmp_path_factory.mktemp("evening")
    folder = write(root/"digits", per_class=(2, 1))
    client = Client(hub, root/"home")
    def evening(name):
        settings = [f"--set={k}={v}" for k, v in (NARROW | {"runs": root/name}).items()]
        words = ["transfer", str(folder), "--profile", "evening", "--out", str(root/f"{name}-out"), "--device", "cpu",
                 "--no-images"]
        hub.requests = []
        answer = client.ask("command", *words, *settings, cache=str(root/"hub"))["value"]
        assert answer["code"] == 0, answer["said"]
        return root/f"{name}-out"
    yield evening
    client.close()


def weights(files): return {path for path in files if path.endswith(".safetensors")}


def test_the_first_evening_fetches_what_is_said_and_the_second_asks_nobody(evening, hub, used):
    first = evening("first")
    files = used[SD] | used[RESNET]
    assert hub.fetched() == {path: len(content) for path, content in files.items()} # no more, and each once
    opened = {REPOSITORIES[name] for name in used if any(f"/{name}/" in r.path for r in hub.requests)}
    assert opened == set(downloads(EVENING, core=True))
    again = evening("second") # nothing of the first is there but the cache
    assert hub.requests == []
    assert {p.name for p in first.iterdir()} == {p.name for p in again.iterdir()}


def test_the_files_whose_sizes_are_known_are_those_that_are_opened(used, hub):
    for repository, name in REPOSITORIES.items():
        assert {w.path for w in WEIGHTS if w.of == name} == weights(used[repository])


def test_the_readme_and_the_plan_say_how_much(used, hub):
    def size(*names): return sum(w.size for w in WEIGHTS if w.of in names) / 1e9
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    [said] = re.findall(r"The first call fetches ([\d.]+) GB of weights", readme)
    assert said == f"{size(SD, 'resnet18'):.1f}"
    assert download_text(EVENING).endswith(f"; {size(SD, CLIP, 'resnet18'):.1f} GB in all")
