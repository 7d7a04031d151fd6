"""Records are written once, found by their spec, and reach a table by their job alone."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from bridgexfer.artefacts import as_dict, read_json, spec_hash, write_json
from bridgexfer.finetune import FinetuneSpec
from bridgexfer.study.records import (NoChoice, differing, find_record, job_path, read_choice, read_job, read_jobs,
                                      read_manifest, record_path, short_name, to_frame, write_job, write_record)
from bridgexfer.transfer import BridgeSpec, TransferSpec


@dataclass(frozen=True)
class Spec:
    dataset: str
    arch: str = "net"
    pipeline: str = "vanilla"
    seed: int = 0
    names: tuple = ("a", "b")


RESULT = {"accuracy": 0.5, "metric": "top1", "predictions": [0, 1], "labels": [0, 0],
          "curve": [{"epoch": 1, "loss": 1.5}], "seconds": 1.0}


def test_round_trip_and_place(tmp_path):
    result = {**RESULT, "predictions": np.array([0, 1])}
    path = write_record(tmp_path, "transfer", Spec("pets"), result, {"python": "3"})
    assert path == record_path(tmp_path, "transfer", Spec("pets")) == tmp_path/"records/transfer"/path.name
    record = find_record(tmp_path, "transfer", Spec("pets"))
    assert record["result"] == RESULT and record["hash"] == path.stem
    assert record["spec"]["names"] == ["a", "b"] and record["made"] == {"python": "3"}
    assert find_record(tmp_path, "transfer", Spec("pets", seed=1)) is None
    assert find_record(tmp_path, "leep", Spec("pets")) is None


def test_the_same_result_again_leaves_the_file_alone(tmp_path):
    path = write_record(tmp_path, "transfer", Spec("pets"), RESULT, {"python": "3"})
    before = path.read_bytes(), path.stat().st_mtime_ns
    write_record(tmp_path, "transfer", Spec("pets"), {**RESULT, "seconds": 9.0}, {"python": "4"})
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("change", [{"accuracy": 0.50001}, {"predictions": [1, 1]}, {"more": 1}])
def test_another_result_is_rejected_and_named(tmp_path, change):
    path = write_record(tmp_path, "transfer", Spec("pets"), RESULT, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path.name} holds another result .* differ in {next(iter(change))}"):
        write_record(tmp_path, "transfer", Spec("pets"), {**RESULT, **change}, {})
    assert path.read_bytes() == before


def test_results_differ_where_one_has_no_such_value():
    assert differing({"accuracy": 1, "seconds": 1}, {"accuracy": 1, "seconds": 2, "loss": None}) == ["loss"]


@pytest.mark.parametrize(("result", "where"), [
    ({"accuracy": math.nan}, "result.accuracy is nan"), ({"leep": -math.inf}, "result.leep is -inf"),
    ({"curve": [{"loss": 1.0}, {"loss": np.float32("nan")}]}, r"result.curve\[1\].loss is nan"),
    ({"p": np.array([1, np.inf])}, r"result.p\[1\] is inf")])
def test_what_is_not_finite_is_rejected_and_nothing_is_left(tmp_path, result, where):
    with pytest.raises(ValueError, match=where): write_record(tmp_path, "leep", Spec("pets"), result, {})
    assert not list(tmp_path.rglob("*.*"))


def test_unknown_kind_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="choose transfer, fixed, clip, leep, alignment, tune"):
        record_path(tmp_path, "tabel", Spec("pets"))


def test_a_damaged_record_is_named(tmp_path):
    path = write_record(tmp_path, "leep", Spec("pets"), {"leep": -1.0}, {})
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=f"{path.name} is not JSON"): find_record(tmp_path, "leep", Spec("pets"))


def test_tables_read_what_jobs_list_and_nothing_else(tmp_path):
    kept = [write_record(tmp_path, "transfer", Spec("pets", seed=s), RESULT, {}) for s in (0, 1)]
    write_record(tmp_path, "transfer", Spec("pets", seed=2), RESULT, {})  # an older grid's
    write_job(job_path(tmp_path, "transfer", "pets", "net"), kept)
    assert read_jobs(tmp_path, "transfer", ("pets",), ("net",)).seed.tolist() == [0, 1]


def test_runs_can_be_moved(tmp_path):
    here, there = tmp_path/"here", tmp_path/"there"
    write_job(job_path(here, "tune", "pets", "net"), [write_record(here, "tune", Spec("pets"), RESULT, {})])
    here.rename(there)
    assert len(read_jobs(there, "tune", ("pets",), ("net",))) == 1


def test_a_missing_job_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="2 of 2 tune jobs have not run.*`make tune`"):
        read_jobs(tmp_path, "tune", ("pets", "cars"), ("net",), "make tune")


def test_a_missing_record_is_named(tmp_path):
    path = write_record(tmp_path, "leep", Spec("pets"), {"leep": -1.0}, {})
    job = write_job(job_path(tmp_path, "transferability", "pets", "net"), [path])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name}, which is gone"): read_job(job)


def test_datasets_that_are_folders_get_names_of_their_own(tmp_path):
    a, b = (job_path(tmp_path, "transfer", d, "net") for d in ("data/a b/pets", "data/a/b/cars"))
    assert a.parent == tmp_path/"transfer" and a.name == "data_a_b_pets-net.json" and a != b
    assert short_name("data/a b/pets") == "pets"


def test_what_a_job_made_is_listed(tmp_path):
    sets = [{"hash": "a1", "folder": "synthetic/a1"}]
    write_json(tmp_path/"generate"/"single-digits.json", {"sets": sets})
    assert read_manifest(tmp_path, "generate", "single", "digits") == sets
    with pytest.raises(FileNotFoundError, match="style-digits.json is missing: run `make paper`"):
        read_manifest(tmp_path, "invert", "style", "digits", "make paper")


def test_frame_keeps_words_numbers_and_lists_of_the_result(tmp_path):
    path = write_record(tmp_path, "transfer", Spec("pets"), RESULT, {})
    write_job(job_path(tmp_path, "transfer", "pets", "net"), [path])
    frame = read_jobs(tmp_path, "transfer", ("pets",), ("net",))
    assert frame.accuracy[0] == 0.5 and frame.predictions[0] == [0, 1]
    assert frame.curve[0][0]["loss"] == 1.5 and "names" not in frame


def test_frame_rejects_two_values_for_one_column():
    with pytest.raises(ValueError, match="spec and result have different values for seed"):
        to_frame([{"kind": "leep", "hash": "0", "spec": {"seed": 0}, "result": {"seed": 1}}])


def test_trainings_inside_a_spec_have_columns():
    "The rate and the length of both stages, under names that tell them apart; what a run lacks is empty."
    stage1 = FinetuneSpec(0.3, 30, mixup=0.2)
    bridge = BridgeSpec("net", "w", "s", 60, 0, stage1)
    def spec(name, training, **more):
        return TransferSpec("pets", "a-b", "net", "w", name, 4, 0, training, "top1", **more)
    specs = [spec("vanilla", FinetuneSpec(0.1, 60)), spec("mixed", FinetuneSpec(0.03, 20), repeats=3),
             spec("bridged_pp", FinetuneSpec(0.01, 60), bridge=bridge), spec("synthetic", None, bridge=bridge)]
    frame = to_frame([dict(kind="transfer", hash=spec_hash(s), spec=as_dict(s), result=RESULT) for s in specs])
    frame = frame.set_index("pipeline")
    columns = ["lr", "epochs", "repeats", "stage1_lr", "stage1_epochs", "stage1_mixup"]
    missing = -1 # in place of NaN
    assert frame[columns].fillna(missing).values.tolist() == [
        [.1, 60, 1, missing, missing, missing], [.03, 20, 3, missing, missing, missing],
        [.01, 60, 1, .3, 30, .2], [missing, missing, 1, .3, 30, .2]]
    assert frame.bridge.dropna().tolist() == [spec_hash(bridge)] * 2 # the name of its folder
    assert "finetune" not in frame and frame.seed.tolist() == [0] * 4


def test_gaps_are_listed_beside_records(tmp_path):
    path = write_record(tmp_path, "transfer", Spec("pets"), RESULT, {})
    gap = dict(pipeline="mixed", shots=4, seed=1, why="it diverged")
    job = write_job(job_path(tmp_path, "core", "pets", "net"), [path], [gap], choices=[1])
    assert read_json(job) == dict(records=[f"records/transfer/{path.name}"], gaps=[gap], choices=[1])
    assert len(read_job(job)) == 1


def choices(path, *rows):
    path.write_text("\n".join(["dataset,arch,pipeline,shots,lr,stage1_lr", *rows]) + "\n")
    return path


def test_a_choice_is_read_by_its_cell(tmp_path):
    path = choices(tmp_path/"t.csv", "pets,net,bridged,0,0.1,0.3", "pets,net,bridged,4,0.01,0.03", "pets,net,mixed,4,,")
    assert read_choice(path, "pets", "net", "bridged", 4, ["lr", "stage1_lr"]) == {"lr": .01, "stage1_lr": .03}
    assert read_choice(path, "pets", "net", "bridged", 0, ["lr"]) == {"lr": .1}
    with pytest.raises(NoChoice, match="diverged at every learning rate .* mixed on pets with net, 4-shot"):
        read_choice(path, "pets", "net", "mixed", 4, ["lr"])
    advice = "run `make tune`( with the same DATASETS, ARCHS and SHOTS)?, or set `lr`"
    with pytest.raises(ValueError, match=f"has no rate for vanilla on pets with net, 4-shot: {advice}"):
        read_choice(path, "pets", "net", "vanilla", 4, ["lr"])
    with pytest.raises(ValueError, match=f"has no repeats for bridged on pets with net, full-shot: {advice}"):
        read_choice(path, "pets", "net", "bridged", 0, ["lr", "repeats"])
    with pytest.raises(FileNotFoundError, match=advice): read_choice(tmp_path/"none.csv", "pets", "net", "mixed", 4, [])
    path.write_text("dataset,arch,pipeline,lr,origin\npets,net,vanilla,0.1,tuned\n") # as it was before shots counted
    with pytest.raises(ValueError, match=advice): read_choice(path, "pets", "net", "vanilla", 0, ["lr"])


def test_two_processes_may_write_the_same_record(tmp_path):
    code = """
import sys
from dataclasses import dataclass
from bridgexfer.study.records import write_record

@dataclass(frozen=True)
class Spec:
    x: int

for i in range(40): write_record(sys.argv[1], "leep", Spec(i), {"leep": -1.0, "many": list(range(2000))}, {})
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [p.wait() for p in running] == [0, 0]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 40 and all(json.loads(p.read_text())["result"]["leep"] == -1 for p in files)
