"""`evening`, and `paper` of two datasets, from data to every table, on a stand-in of the hub; and with it gone."""
import re
import shlex
import shutil

import pandas as pd
import pytest
from archives_fixture import write_archive
from hub import Hub
from hub_models import CLIP, full_size
from test_first_study import fresh_clone, typed
from test_own_images import write

from bridgexfer.data.archives import ARCHIVES
from bridgexfer.study.grid import Study

# as little as there is of everything
NARROW = """
  images=1 steps=1 size=32 stored_size=224 generate_batch=64 precision=float32 epochs=1 few_epochs=1 stage1_epochs=1
  mixed_epochs=1 mixed_few_epochs=1 lrs=0.01 stage1_lrs=0.01 clip_lrs=0.01 real_shares=0.5 mix_weights=1 keeps=0.5
  seeds=0 tuning_seeds=100 few_tuning_seeds=100 sets=1 style_steps=1 inversion_batch=2 volumes="1 2" guidances="2 3.5"
  sweep_images=1 more_images=1 mixed_images=1 few_shots=1 clip_shots=1 beyond_shots=1 gpu=0
  cores=1 memory=2
"""
PAPER = """
  archs=mini_resnet10 more_archs=resnet18 volume_datasets=pets guidance_datasets=pets style_datasets=pets
  class_datasets= arch_style_datasets=pets fixed_datasets=dtd clip_datasets=dtd generate_cores=1 invert_cores=1
  generate_memory=2 invert_memory=2 table_memory=2 jobs_per_sweep=1 part_hours=0
"""
PROFILES = {"evening": ("pets", NARROW), "paper": ("pets dtd", NARROW + PAPER)} # -> datasets, settings


def as_counted(clone, written):
    "Make official, in a clone, as many images as were written."
    path = clone/"bridgexfer/data/archives.py"
    code = path.read_text(encoding="utf-8")
    for name, listed in written.items():
        official = f"train={ARCHIVES[name].train}, test={ARCHIVES[name].test},"
        assert code.count(official) == 1
        code = code.replace(official, f"train={listed.archive.train}, test={listed.archive.test},")
    path.write_text(code, encoding="utf-8")


class Reader:
    "Types commands in a fresh clone whose hub is the stand-in."
    def __init__(self, root, profile, hub):
        self.profile, self.clone = profile, fresh_clone(root/"bridgexfer")
        self.datasets, settings = PROFILES[profile]
        self.words = [*shlex.split(settings), f"data={root/'data'}"]
        written = {name: write_archive(name, root/"data", "tiny", per_class=(2, 1)) for name in self.datasets.split()}
        as_counted(self.clone, written)
        self.environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(root/"home"), "HF_HUB_DISABLE_TELEMETRY": "1",
                            "HF_HUB_OFFLINE": "", "CUDA_VISIBLE_DEVICES": ""}

    def type(self, *words): return typed(shlex.join(words), self.clone, **self.environment)

    def make(self, target):
        pairs = [word.split("=", 1) for word in self.words]
        settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in pairs)
        return self.type("make", target, f"PROFILE={self.profile}", f"DATASETS={self.datasets}", "SHOTS=full 1",
                         f"SET={settings}")

    def study(self):
        settings = dict(word.split("=", 1) for word in self.words)
        return Study(self.profile, datasets=self.datasets, shots="full 1", runs=f"{self.clone}/runs", **settings)

    def tables(self): # without how long something took
        found = {path.name: pd.read_csv(path) for path in sorted(self.study().figures_dir.glob("*.csv"))}
        return {name: table.loc[:, ~table.columns.str.contains("seconds")].to_csv() for name, table in found.items()}


@pytest.fixture(scope="module")
def models(): return full_size()


@pytest.fixture
def hub(models):
    hub = Hub({name: repository for name, (_, repository) in models.items()})
    yield hub
    hub.stop()


@pytest.fixture(params=PROFILES)
def reader(request, hub, tmp_path):
    yield Reader(tmp_path, request.param, hub)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_from_data_to_every_table_and_again_with_the_hub_gone(reader, hub, models, tmp_path):
    found = reader.make("datasets")
    for name in reader.datasets.split(): assert re.search(rf"^{name} +yes ", found, re.M)
    assert "Fetched once:" in reader.make("plan") and hub.requests == []

    reader.make("tune")
    study = reader.make("study").strip().splitlines()
    assert study[-1] == f"Tables and figures: runs/figures/{reader.profile}"
    assert any("Bridged++" in line for line in study)
    core = [files.items() for name, (files, _) in models.items() if name != CLIP]
    assert hub.fetched() == {path: len(content) for files in core for path, content in files} # each once, and no other

    hub.requests = []
    reader.make("paper")
    assert hub.fetched() == {path: len(content) for path, content in models[CLIP][0].items()}
    left = [reader.study().figures_dir/file for page in reader.study().pages_of("paper") for file in page.leaves]
    assert left and all(file.exists() for file in left)

    hub.requests = []
    out = tmp_path/"out"
    words = ["transfer", str(write(tmp_path/"own", per_class=(2, 1))), "--profile", reader.profile, "--device", "cpu"]
    reader.type(".venv/bin/bridgexfer", *words, "--out", str(out), *(f"--set={word}" for word in reader.words))
    assert (out/"report.html").exists() and hub.requests == []

    hub.stop()
    tables = reader.tables()
    shutil.rmtree(reader.clone/"runs")
    for target in ("tune", "study", "paper"): reader.make(target)
    assert reader.tables() == tables and hub.requests == []
