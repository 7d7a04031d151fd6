"""Records are written once, found by their spec, and reach a table by their job alone."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bridgexfer.study.records import LABELS, find_record, job_path, plus_minus, published, read_job, read_jobs
from bridgexfer.study.records import record_path, show_table, to_frame, write_job, write_record

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Spec:
    dataset: str
    arch: str = "net"
    pipeline: str = "vanilla"
    seed: int = 0
    names: tuple = ("a", "b")


RESULT = {"accuracy": 0.5, "metric": "top1", "predictions": [0, 1], "labels": [0, 0], "curve": [{"epoch": 1, "loss": 1.5}], "seconds": 1.0}


def test_round_trip_and_place(tmp_path):
    path = write_record(tmp_path, "transfer", Spec("pets"), {**RESULT, "predictions": np.array([0, 1])}, {"python": "3"})
    assert path == record_path(tmp_path, "transfer", Spec("pets")) == tmp_path/"records/transfer"/path.name
    record = find_record(tmp_path, "transfer", Spec("pets"))
    assert record["result"] == RESULT and record["hash"] == path.stem and record["spec"]["names"] == ["a", "b"] and record["made"] == {"python": "3"}
    assert find_record(tmp_path, "transfer", Spec("pets", seed=1)) is None and find_record(tmp_path, "leep", Spec("pets")) is None


def test_the_same_result_again_leaves_the_file_alone(tmp_path):
    path = write_record(tmp_path, "transfer", Spec("pets"), RESULT, {"python": "3"})
    before = path.read_bytes(), path.stat().st_mtime_ns
    write_record(tmp_path, "transfer", Spec("pets"), {**RESULT, "seconds": 9.0}, {"python": "4"})
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("change", [{"accuracy": 0.50001}, {"predictions": [1, 1]}, {"more": 1}])
def test_another_result_is_refused_and_named(tmp_path, change):
    path = write_record(tmp_path, "transfer", Spec("pets"), RESULT, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path.name} holds another result .* differ in {next(iter(change))}"):
        write_record(tmp_path, "transfer", Spec("pets"), {**RESULT, **change}, {})
    assert path.read_bytes() == before


@pytest.mark.parametrize(("result", "where"), [
    ({"accuracy": math.nan}, "result.accuracy is nan"), ({"leep": -math.inf}, "result.leep is -inf"),
    ({"curve": [{"loss": 1.0}, {"loss": np.float32("nan")}]}, r"result.curve\[1\].loss is nan"), ({"p": np.array([1, np.inf])}, r"result.p\[1\] is inf")])
def test_what_is_not_finite_is_refused_and_nothing_is_left(tmp_path, result, where):
    with pytest.raises(ValueError, match=where): write_record(tmp_path, "leep", Spec("pets"), result, {})
    assert not list(tmp_path.rglob("*.*"))


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose transfer, fixed, clip, leep, alignment, tune"): record_path(tmp_path, "tabel", Spec("pets"))


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


def test_frame_keeps_words_numbers_and_lists_of_the_result(tmp_path):
    write_job(job_path(tmp_path, "transfer", "pets", "net"), [write_record(tmp_path, "transfer", Spec("pets"), RESULT, {})])
    frame = read_jobs(tmp_path, "transfer", ("pets",), ("net",))
    assert frame.accuracy[0] == 0.5 and frame.predictions[0] == [0, 1] and frame.curve[0][0]["loss"] == 1.5 and "names" not in frame


def test_frame_refuses_two_values_for_one_column():
    with pytest.raises(ValueError, match="seed stands in its spec and in its result"):
        to_frame([{"kind": "leep", "hash": "0", "spec": {"seed": 0}, "result": {"seed": 1}}])


def test_two_processes_may_write_the_same_record(tmp_path):
    code = ("import sys; from dataclasses import dataclass; from bridgexfer.study.records import write_record\n"
            "@dataclass(frozen=True)\nclass Spec:\n    x: int\n"
            "for i in range(40): write_record(sys.argv[1], 'leep', Spec(i), {'leep': -1.0, 'many': list(range(2000))}, {})")
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [p.wait() for p in running] == [0, 0]
    files = list(tmp_path.rglob("*"))
    assert sum(p.is_file() for p in files) == 40 and all(json.loads(p.read_text())["result"]["leep"] == -1 for p in files if p.is_file())


# ---- the paper's numbers

def test_printed_values_are_complete_and_marked():
    counts = {"tab1": (20, 1), "tab2": (50, 0), "tab3": (10, 0), "tab4": (40, 10), "tab5": (10, 0), "tab6": (9, 0), "tab7": (20, 0)} # Table 4's measures are words
    for table, (rows, missing) in counts.items():
        frame = published(table)
        assert len(frame) == rows and frame.value.isna().sum() == missing and not frame.duplicated(["dataset", "row"]).any()
        assert frame.note[frame.value.isna()].notna().all()
    assert published("tab2").spread.between(0, 1).all() and set(published("tab2").row) == set(LABELS)
    with pytest.raises(ValueError, match="choose tab1, tab2, tab3, tab4, tab5, tab6, tab7, text"): published("tab9")


def test_printed_values_agree_with_the_papers_text():
    mean = published("tab2").pivot(index="dataset", columns="row", values="value")
    assert (mean.bridged_pp > mean.vanilla).all()  # "consistently outperforms vanilla transfer"
    assert 6 <= (mean.vanilla - mean.mixed).mean() <= 10  # "a 6-10% reduction", on average
    said = published("text").set_index(["dataset", "row"]).value
    for d in ("aircraft", "cars"): assert round(mean.bridged_pp[d] - mean.vanilla[d], 1) == said[d, "bridged_pp_gain"]
    worse = {d for d in mean.index if mean.bridged[d] < mean.vanilla[d]}
    assert {"dogs", "dtd"} <= worse and "flowers" not in worse  # appendix C says Flowers, the table says otherwise
    leep = published("tab1").pivot(index="dataset", columns="row", values="value").dropna()
    assert (leep.synthetic > leep.imagenet).all()


def test_every_pipeline_has_a_label_and_a_colour():
    from bridgexfer.study.plots import COLORS, DASHES, MARKERS
    from bridgexfer.transfer import PIPELINES

    assert list(PIPELINES) == list(LABELS) == list(COLORS) == list(MARKERS) == list(DASHES)


# ---- tables for people

def test_show_table(tmp_path):
    rows = [dict(dataset=d, arch="net", shots=k, pipeline=p, mean=81.25, sd=0.5, n=3, verdict=v)
            for k in (0, 4) for d in "abcdefg" for p, v in (("vanilla", None), ("mixed", "worse"), ("bridged", "inconclusive"))]
    pd.DataFrame(rows).to_csv(tmp_path/"t.csv", index=False)
    text = show_table(tmp_path/"t.csv")
    assert max(map(len, text.splitlines())) <= 100 and text.count("Vanilla") == 4 and text.count("81.2 ± 0.5 −") == 14
    assert "net, full-shot" in text and "net, 4-shot" in text and "over 3 seeds" in text
    pd.DataFrame({"x": [1.5], "y": ["word"]}).to_csv(tmp_path/"other.csv", index=False)
    assert "word" in show_table(tmp_path/"other.csv")


def test_plus_minus():
    assert plus_minus(1, 0.25, 2) == "1.00 ± 0.25" and plus_minus(99.96, math.nan) == "100.0"
