"""The search as a job, and runs without a result: nothing is chosen on test images, and a gap has its reason."""
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from bridgexfer.artefacts import read_json
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import hold_out
from bridgexfer.images import as_images
from bridgexfer.study.grid import Study, gather
from bridgexfer.synthetic_sets import generate
from bridgexfer.transfer import Run
from test_project import ROOT, cells, source

ARCH = "mini_resnet10"


def run_job(name, **parameters):
    "What the cells of a job's notebook define, run in this process."
    matplotlib.use("Agg")
    defined = {"__name__": name}
    for i, cell in enumerate(cells(ROOT/f"nbs/jobs/{name}.ipynb")):
        exec(compile(source(cell), f"{name}.ipynb, code cell {i}", "exec"), defined)
        if "profile" in defined: defined |= parameters if "study" not in defined else {}
    return SimpleNamespace(**defined)


# ---- the search

CELLS = [("vanilla", 0), ("mixed", 4), ("bridged_pp", 4)]
SMALL = dict(images="5", stage1_lrs="0.03 0.1", stage1_epochs="1 2")


def searched(folder, data, monkeypatch):
    "The choices of the job, and its records by their hash."
    with monkeypatch.context() as m:
        m.setattr(Study, "load", lambda self, dataset: data)
        m.setattr(Study, "tuned_cells", lambda self, dataset, arch, target="paper": CELLS)
        job = run_job("tune", overrides=json.dumps(dict(runs=str(folder), **SMALL)))
    manifest = read_json(job.study.runs_dir/"tune"/f"digits-{ARCH}.json")
    records = [read_json(job.study.runs_dir/path) for path in manifest["records"]]
    return manifest["choices"], {r["hash"]: r for r in records}


def result(record): return {k: v for k, v in record["result"].items() if k != "seconds"}


def test_other_test_images_and_labels_change_no_choice(tmp_path, monkeypatch):
    "Not one number of any trial either; and what is measured on are validation images."
    digits = load_dataset("digits")
    labels = np.random.default_rng(0).permutation(digits.test.labels)
    test = as_images(255 - digits.test.pixels, labels, digits.info.names)
    choices, records = searched(tmp_path/"a", digits, monkeypatch)
    again, others = searched(tmp_path/"b", replace(digits, test=test), monkeypatch)
    assert again == choices and [(c["pipeline"], c["shots"]) for c in choices] == CELLS
    assert list(records) == list(others)
    assert all(result(records[h]) == result(others[h]) for h in records)
    parts = {seed: hold_out(digits.train, 0.2, seed) for seed in (100, 101)}
    for r in records.values():
        fit, validation = parts[r["spec"]["seed"]]
        assert r["spec"]["split"] == "validation" and r["spec"]["data"] == f"{fit.digest}-{validation.digest}"
        assert r["result"]["labels"] == validation.labels.tolist()
    assert {c["pipeline"]: c["searched"] for c in choices} == {
        "vanilla": "lr", "mixed": "lr repeats", "bridged_pp": "lr stage1_lr stage1_epochs"}
    assert all(c["seeds"] <= (2 if c["shots"] else 1) for c in choices)


# ---- gaps

SETTINGS = dict(pipelines="vanilla mixed bridged", shots="4", seeds="0 1", few_seeds="0 1", images="8", lr="tuned")
CHOSEN = dict(vanilla=(0.03, ""), mixed=(1e38, ""), bridged=("", 0.03)) # the second diverges, the third had no choice


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    "Settings of a study whose search has been, with a rate at which training diverges."
    folder = tmp_path_factory.mktemp("gaps")
    settings = SETTINGS | dict(runs=str(folder/"runs"), figures=str(folder/"figures"))
    study = Study("smoke", **settings)
    shared = dict(dataset="digits", arch=ARCH, shots=4, stage1_epochs=1, epochs=1, repeats=1)
    rows = [shared | dict(pipeline=name, lr=lr, stage1_lr=stage1) for name, (lr, stage1) in CHOSEN.items()]
    study.tuned_path.parent.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(study.tuned_path, index=False)
    digits = study.load("digits")
    for seed in (0, 1):
        spec = study.synthesis(digits, study.set_key(Run("mixed", 4, seed, 8)))
        generate(spec, study.runs_dir/"synthetic", 8, progress=False)
    return settings


def manifest_of(overrides, **parameters):
    job = run_job("transfer", overrides=json.dumps(overrides), **parameters)
    return job, read_json(job.job)


def as_set(gaps): return {json.dumps(gap, sort_keys=True) for gap in gaps}


def test_runs_that_diverge_are_gaps_and_the_others_have_records(overrides):
    "Each gap has the fields of its run and the reason."
    job, manifest = manifest_of(overrides)
    records = [read_json(job.study.runs_dir/path) for path in manifest["records"]]
    assert [(r["spec"]["pipeline"], r["spec"]["seed"]) for r in records] == [("vanilla", 0), ("vanilla", 1)]
    runs = {r for r in job.runs if r.pipeline != "vanilla"}
    why = {Run(**{k: v for k, v in gap.items() if k != "why"}): gap["why"] for gap in manifest["gaps"]}
    assert set(why) == runs and len(why) == len(manifest["gaps"]) == 4
    for run, reason in why.items():
        said = dict(mixed="The loss of Mixed, 4-shot, seed", bridged="diverged at every learning rate")
        assert said[run.pipeline] in reason


@pytest.mark.parametrize("n", [2, 4])
def test_gaps_of_parts_are_those_of_the_whole(overrides, n):
    "Also where every run of a part is a gap."
    job, whole = manifest_of(overrides)
    study = Study("smoke", **overrides, jobs_per_sweep=str(n))
    parts = [manifest_of(overrides, part=part)[1] for part in study.parts(study.runs("core", "digits"))]
    assert n == 2 or [] in [part["records"] for part in parts]
    job.job.unlink()
    gathered = read_json(gather(study, "core", "digits", ARCH))
    assert gathered["records"] == whole["records"] and as_set(gathered["gaps"]) == as_set(whole["gaps"])
    assert {k for gap in gathered["gaps"] for k in gap} == {*asdict(job.runs[0]), "why"}


def test_a_table_leaves_out_pipelines_with_gaps_and_says_why(overrides):
    job, manifest = manifest_of(overrides)
    study = Study("smoke", **overrides)
    frame = study.read("core")
    assert set(frame.pipeline) == {"vanilla"} and len(frame) == 2
    assert set(frame.attrs["gaps"]) == {gap["why"] for gap in manifest["gaps"]}
