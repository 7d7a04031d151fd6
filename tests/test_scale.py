"""Scale: nothing is copied or held that need not be, and every job ends in the hours that it requests."""
import json

import numpy as np
import pytest
from PIL import Image

from bridgexfer.artefacts import read_json
from bridgexfer.generation import SynthesisSpec
from bridgexfer.images import Parts
from bridgexfer.rates import H100, SD15, TWO_CORES, hours_for, share
from bridgexfer.study.costs import job_hours
from bridgexfer.study.grid import Study, gather_parts, set_parts, shards_of
from bridgexfer.synthetic_sets import (SyntheticSet, bind, files_in_place, find_places, image_file, image_files,
                                       read_shard, shard_path, shard_table, write_shard)
from test_project import ROOT
from test_tuning import run_job

PAPER = Study("paper")


# ---- generation in ranges of shards

@pytest.mark.parametrize(("n", "length"), [(1, 5), (3, 10), (9, 9), (25, 50)])
def test_parts_are_stretches_of_nearly_equal_length(n, length):
    parts = [share([*range(length)], f"{i}of{n}") for i in range(1, n + 1)]
    assert sum(parts, []) == [*range(length)] == share([*range(length)], "")
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_every_shard_of_the_paper_is_made_by_one_job():
    made = {}
    for job in PAPER.jobs():
        if job.rule != "generate": continue
        group, key = job.parameters["group"], job.parameters["key"]
        for w, number in share(shards_of(PAPER, group, key), job.part):
            where = key if group not in ("single", "volume") else f"vocabulary {key}"
            assert made.setdefault((where, group == "guidance", w, number), job.key) == job.key
    sets = {}
    for (group, key), found in PAPER.every_set.items():
        for w, n in found.items():
            where = key if group not in ("single", "volume") else f"vocabulary {key}"
            sets[where, group == "guidance", w] = max(n, sets.get((where, group == "guidance", w), 0))
    assert len(made) == sum(-(-n // SynthesisSpec.shard) for n in sets.values())


def test_parts_take_about_an_hour_and_no_job_longer_than_it_requests():
    found = job_hours(PAPER, H100)
    parts = found[found.rule == "generate"].hours
    assert .9 < parts.median() < 1.1 and parts.max() < 1.5
    assert (found.hours < found.requested).all(), found[found.hours >= found.requested]
    assert {"generate", "invert", "transfer", "tune"} == {*found.rule}


def test_a_machine_of_ones_own_has_a_job_for_each_group():
    for profile in ("miniature", "evening", "smoke"):
        study = Study(profile)
        assert all(job.rule != "generate" for job in study.jobs() if job.part)
        assert {job.part for job in study.jobs()} <= {"", "1of2", "2of2"} # the miniature's trainings, for two cores
        assert all(set_parts(study, *g) == [""] for g in study.all_sets)
        assert not any("tuning" in job.name for job in study.jobs() if job.rule == "generate")


def test_a_model_without_a_rate_is_cut_like_the_one_that_has_one():
    assert hours_for(H100, "generate", "owner/name", 1e4) == hours_for(H100, "generate", SD15, 1e4)
    assert hours_for(TWO_CORES, "transfer", "resnet18", 3600 * 3000) == 1
    other = Study("paper", model="owner/name", revision="main")
    assert len(other.jobs()) == len(PAPER.jobs())


SMALL = dict(images="40", sets="1", seeds="0", few_seeds="0", steps="1", lr="0.1", part_hours="0.0001")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    "A study whose images two jobs have made."
    folder = tmp_path_factory.mktemp("halves")
    study = Study("smoke", runs=str(folder), **SMALL)
    parts = [job for job in study.jobs() if job.manifest == "generate/single-digits"]
    assert [job.part for job in parts] == ["1of2", "2of2"]
    given = json.dumps(dict(runs=str(folder)) | {k: v for k, v in SMALL.items() if k != "part_hours"})
    for job in reversed(parts): run_job("generate", profile="smoke", overrides=given, **job.parameters)
    return study, parts


def test_parts_make_what_one_job_makes(halves, tmp_path):
    study, parts = halves
    manifest = read_json(gather_parts(study, parts[0]))
    alone = run_job("generate", profile="smoke", overrides=json.dumps(SMALL | dict(runs=str(tmp_path))))
    assert manifest == read_json(alone.manifest)
    [entry] = manifest["sets"]
    for k in range(2):
        here, there = (shard_path(s.runs_dir/entry["folder"], k) for s in (study, alone.study))
        assert here.read_bytes() == there.read_bytes()
    card = (study.runs_dir/entry["folder"]/"README.md").read_text(encoding="utf-8")
    assert "40 of each of 10 classes" in card # though the part that ended last saw half of them when it began


def test_a_part_whose_shards_are_gone_is_no_whole(halves):
    study, parts = halves
    folder = study.runs_dir/read_json(gather_parts(study, parts[0]))["sets"][0]["folder"]
    shard = shard_path(folder, 1)
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"has 20 images .* not 40: .*delete generate/single-digits\.\*"):
        gather_parts(study, parts[0])
    shard.write_bytes(kept)


# ---- searches in parts

def test_searches_that_share_a_bridge_stay_together():
    for arch in PAPER.all_archs:
        parts = PAPER.search_parts("sun397", arch)
        assert sorted(sum(parts.values(), [])) == sorted(PAPER.tuned_cells("sun397", arch)) and len(parts) > 1
        for name in ("bridged", "bridged_pp"):
            assert sum(any(cell[0] == name for cell in part) for part in parts.values()) <= 1
    one = Study("paper", jobs_per_sweep="1").search_parts("pets", "resnet18")
    assert one == {"": PAPER.tuned_cells("pets", "resnet18")}


def test_few_shots_stay_with_those_whose_choices_they_inherit():
    study = Study("paper", few_repeats="1 3")
    for part in study.search_parts("sun397", "resnet18").values():
        few = {cell for cell in part if cell[0] == "mixed" and cell[1]}
        assert not few or few == {c for c in study.tuned_cells("sun397", "resnet18") if c[0] == "mixed" and c[1]}


def test_on_a_cluster_no_search_makes_images():
    for study in (PAPER, Study("paper", sets="3")):
        manifests = {job.manifest for job in study.jobs()}
        tune = [job for job in study.jobs() if job.rule == "tune"]
        assert all(job.inputs and manifests.issuperset(job.inputs) for job in tune)
        for job in tune: # the sets that its seeds take are made by the jobs that it waits for
            groups = {name.removeprefix("generate/").split("-")[0] for name in job.inputs}
            made = {w for (group, _), sets in study.every_set.items() if group in groups for w in sets}
            assert {*study.searched_sets} <= made


def test_searches_in_parts_choose_what_one_job_chooses(tmp_path):
    study = Study("paper", runs=str(tmp_path), datasets="pets")
    [first, *others] = parts = [job for job in study.jobs() if job.manifest == "tune/pets-resnet18"]
    for job in parts:
        cells = study.search_parts("pets", "resnet18")[job.part]
        path = study.runs_dir/f"{job.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [f"records/tune/{name}-{shots}.json" for name, shots in cells]
        choices = [dict(pipeline=name, shots=shots) for name, shots in cells]
        path.write_text(json.dumps(dict(records=records, gaps=[], choices=choices)), encoding="utf-8")
    found = read_json(gather_parts(study, first))
    assert [(c["pipeline"], c["shots"]) for c in found["choices"]] == study.tuned_cells("pets", "resnet18")
    assert len({*found["records"]}) == len(found["records"]) == len(found["choices"]) and others


def test_the_snakefile_is_a_list_of_rules():
    assert len((ROOT/"Snakefile").read_text(encoding="utf-8").splitlines()) <= 80


# ---- image files, mapped where they are

SPEC = SynthesisSpec(tuple("abcdefghij"), "none", size=96, stored_size=96, format="jpeg")


def pictures(n, seed):
    "Image files of different lengths, of which some may be equal."
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 24, 24, 3), dtype=np.uint8)
    return [image_file(np.asarray(Image.fromarray(c).resize((96, 96))), SPEC) for c in coarse]


@pytest.fixture
def made(tmp_path):
    bind(tmp_path, SPEC)
    write_shard(shard_path(tmp_path, 0), shard_table(SPEC, 0, pictures(200, 0)))
    write_shard(shard_path(tmp_path, 1), shard_table(SPEC, 1, pictures(7, 1) * 28 + pictures(4, 2))) # equal files
    return SyntheticSet(tmp_path)


def test_files_are_found_where_they_are(made):
    for k in range(2):
        path = shard_path(made.folder, k)
        data, files = path.read_bytes(), [*image_files(read_shard(path))]
        assert [data[begin:begin + length] for begin, length in find_places(path)] == files
        assert [bytes(memoryview(f)) for f in files_in_place(path)] == files


def test_a_file_of_two_gigabytes_would_be_found_by_whole_content(tmp_path):
    "Files of equal length and head are told apart."
    bind(tmp_path, SPEC)
    files = [b"\xff\xd8" + bytes(100) + n.to_bytes(2, "big") for n in range(200)]
    write_shard(shard_path(tmp_path, 0), shard_table(SPEC, 0, files[::-1]))
    data = shard_path(tmp_path, 0).read_bytes()
    assert [data[b:b + n] for b, n in find_places(shard_path(tmp_path, 0))] == files[::-1]


def test_mapping_copies_nothing(made):
    shards = sum(p.stat().st_size for p in made.folder.glob("*.parquet"))
    held, there = made.images(), made.images(memory=0)
    assert isinstance(there.pixels, Parts) and there.digest == held.digest and there.are_files
    kept = [*(made.folder/"decoded").iterdir()]
    assert sum(p.stat().st_size for p in kept) < 0.02 * shards and {p.suffix for p in kept} == {".places"}
    assert made.images(13, memory=0).digest == made.images(13).digest


def test_what_was_kept_of_other_contents_goes(made):
    made.images(memory=0)
    copy = made.folder/"decoded"/f"{shard_path(made.folder, 0).stem}-1-2.arrow" # as earlier versions left them
    copy.write_bytes(b"old")
    old = made.images(memory=0)
    before = bytes(memoryview(old.pixels[[0]][0]))
    write_shard(shard_path(made.folder, 0), shard_table(SPEC, 0, pictures(200, 9)))
    new = made.images(memory=0)
    assert new.digest == made.images().digest != old.digest and not copy.exists()
    assert len([*(made.folder/"decoded").iterdir()]) == 2
    assert bytes(memoryview(old.pixels[[0]][0])) == before # who had opened the old one still has it


def test_a_damaged_shard_is_named_before_anything_is_kept(made):
    path = shard_path(made.folder, 1)
    whole = path.read_bytes()
    at = whole.index(pictures(4, 2)[0]) + 200
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    with pytest.raises(ValueError, match="is damaged .* verify"): made.images(memory=0)
    assert not [*(made.folder/"decoded").glob("shard-00001-*")]
    path.write_bytes(whole)
    assert made.images(memory=0).digest == made.images().digest


def test_a_shard_that_another_program_compressed_is_named(made):
    import pyarrow.parquet as pq
    path = shard_path(made.folder, 0)
    pq.write_table(read_shard(path), path, compression="gzip")
    with pytest.raises(ValueError, match="written again by another program"): made.images(memory=0)
