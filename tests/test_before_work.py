"""What a study finds and says before its first job: rates of its own search, sizes that fit, what it will take."""
import json
import shlex

import pytest

from bridgexfer.cli import main
from bridgexfer.data.archives import ARCHIVES
from bridgexfer.study.costs import disk_of, job_hours, more_lines, require_rates, work_text
from bridgexfer.study.grid import Study, check_stored, job_command, rates_of
from bridgexfer.transfer import Run
from test_project import ROOT

DINO = "vit_small_patch14_dinov2.lvd142m"


# ---- learning rates

HEAD = "dataset,arch,pipeline,shots,lr,stage1_lr,stage1_epochs,repeats"


def test_a_search_of_fewer_shots_is_too_little_for_a_study_of_more(tmp_path):
    "It would be found out after the images were made."
    folders = {k: f"{tmp_path}/{k}" for k in ("runs", "figures")}
    study = Study("smoke", lr="tuned", pipelines="vanilla bridged", **folders)
    study.tuned_path.parent.mkdir(parents=True)
    rows = [f"digits,mini_resnet10,{name},4,0.1,0.1,1,1" for name in ("vanilla", "bridged")]
    study.tuned_path.write_text("\n".join([HEAD, *rows]))
    few = Study("smoke", **study.overrides | {"shots": "4"})
    require_rates(few, {"study"})
    with pytest.raises(ValueError, match="no rate for vanilla on digits .*, full-shot: run `make tune`"):
        require_rates(study, {"study"})
    with pytest.raises(ValueError, match="no rate for .*: run `make tune`"): require_rates(few, {"paper"})
    diverged = [f"digits,mini_resnet10,{name},0,,,," for name in ("vanilla", "bridged")] # tables say it
    study.tuned_path.write_text("\n".join([HEAD, *rows, *diverged]))
    require_rates(study, {"study"})


def test_a_narrowed_search_adds_to_the_whole_one(tmp_path):
    "Else the advice to run it would be followed in vain."
    study = Study("smoke", lr="tuned", runs=f"{tmp_path}/runs", figures=f"{tmp_path}/figures", pipelines="vanilla",
                  shots="2 4")
    whole, narrowed = (tmp_path/place/"smoke/tab5_learning_rates.csv" for place in ("figures", "runs/figures"))
    for path, shots, lr in ((whole, 4, 0.1), (narrowed, 2, 0.3), (narrowed, 4, 0.7)):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if path.exists() else HEAD
        path.write_text(f"{before}\ndigits,mini_resnet10,vanilla,{shots},{lr},0.1,1,1")
        if path == whole:
            said = "no rate for vanilla .*, 2-shot: run `make tune` with the same DATASETS, ARCHS and SHOTS"
            with pytest.raises(ValueError, match=said): require_rates(study)
    require_rates(study)
    rates = {k: study.choice("digits", "mini_resnet10", Run("vanilla", k, 0))["lr"] for k in (2, 4)}
    assert rates == {2: 0.3, 4: 0.1} # the whole search counts where it has a choice


def written(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("dataset\n")
    return path


def test_a_narrowed_study_reads_a_narrowed_search_unless_the_whole_one_has_run(tmp_path):
    folders = dict(runs=f"{tmp_path}/runs", figures=f"{tmp_path}/figures")
    narrowed = Study("evening", seeds="0", runs=folders["runs"])
    assert narrowed.figures_dir == tmp_path/"runs/figures/evening" # where the page of `make tune` writes
    study = Study("evening", **folders)
    with pytest.raises(FileNotFoundError, match="run `make tune PROFILE=evening` first"): require_rates(study)
    own = written(narrowed.figures_dir/"tab5_learning_rates.csv")
    assert study.tuned_path == own
    with pytest.raises(ValueError, match="has no rate for vanilla on pets with resnet18"): require_rates(study)
    whole = written(study.figures_dir/"tab5_learning_rates.csv")
    assert study.tuned_path == whole != own


def test_figures_of_ones_own_have_rates_of_their_own_or_those_of_the_whole_study(tmp_path):
    "Every job reads the table that was looked at before it, and the committed one serves until there is another."
    study = Study("miniature", figures=f"{tmp_path}/my figures")
    assert study.tuned_path == ROOT/"figures/miniature/tab5_learning_rates.csv"
    require_rates(study)
    own = written(study.figures_dir/"tab5_learning_rates.csv")
    assert study.tuned_path == own
    require_rates(study) # what it lacks is in the committed one
    own.write_text(f"{HEAD},epochs\ndigits,mini_resnet10,vanilla,4,0.7,,,,\n")
    assert study.choice("digits", "mini_resnet10", Run("vanilla", 4, 0)) == {"lr": 0.7}
    job = next(job for job in study.jobs() if job.rule == "transfer")
    words = shlex.split(job_command(study, job))
    inner = json.loads(words[words.index("overrides") + 1])
    assert Study("miniature", **inner).tuned_path == own


# ---- sizes

@pytest.mark.parametrize(("profile", "archs", "settings"), [
    ("evening", [DINO], dict(stored_size=518)), ("evening", ["resnet18"], dict(stored_size=224)),
    ("paper", ["resnet18", "resnet50", "vit_base", "vit_large"], {}), ("miniature", ["mini_vit"], {})])
def test_images_as_large_as_a_backbone_takes_them_will_do(profile, archs, settings):
    check_stored(Study(profile, **settings).settings, archs)


@pytest.mark.parametrize(("arch", "stored", "least"), [(DINO, 512, 518), ("resnet18", 32, 224)])
def test_smaller_ones_are_rejected_before_any_image_is_read_or_made(arch, stored, least, tmp_path, capsys):
    words = ["transfer", "digits", "--profile", "evening", "--arch", arch, "--device", "cpu"]
    words += ["--out", f"{tmp_path}/out"]
    folders = [f"--set={k}={tmp_path/k}" for k in ("runs", "data", "figures")]
    assert main([*words, *folders, f"--set=stored_size={stored}"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{arch} takes images of {least} pixels, and they are stored at {stored}: set stored_size={least}" in last
    assert not list(tmp_path.iterdir())


# ---- what it takes

def test_what_will_run_is_counted():
    study = Study("evening", lr="0.1")
    every = {job.key for job in study.jobs()}
    core = {"generate/single-pets", "core/pets-resnet18"}
    images = 3 * 37 * 100 # three sets
    assert work_text(study, core, "a card").startswith(f"On a card: 2 jobs, {images:,} images to generate, about ")
    hours = job_hours(study, rates_of(study)).hours
    assert f"about {hours[[*core]].sum():,.2f} H100-hours" in work_text(study, core)
    assert f"{len(every)} jobs" in work_text(study, every) and "On cpu" in work_text(study, every)
    assert "1 job, 0 images" in work_text(study, {"alignment/pets-clip"})


def test_the_plan_counts_what_is_kept_besides_generated_images():
    study = Study("paper", lr="0.1")
    rates = rates_of(study)
    [real, latents] = disk_of(study, rates).values()
    assert real == sum(a.train + a.test for a in ARCHIVES.values()) * rates.image_bytes / 1e9
    styled = ("aircraft", "cars", "dtd", "food", "sun397", "caltech101", "flowers")
    assert latents == sum(ARCHIVES[name].train for name in styled) * 64 * 64 * 8 * 4 / 1e9
    said = "\n".join(more_lines(study, rates))
    assert f"Besides {real:,.3g} GB of real images and {latents:,.3g} GB of latents" in said


# ---- what it waits for

def reached(study, target):
    "The jobs that the pages of a target need, by their keys."
    jobs = {job.key: job for job in study.jobs()}
    read = {manifest for page in study.pages_of(target) for manifest in study.manifests(*page.reads)}
    todo = [job.key for job in jobs.values() if job.manifest in read]
    found = set()
    while todo:
        key = todo.pop()
        if key not in found: todo += [k for m in jobs[key].inputs for k in jobs if k == m or jobs[k].manifest == m]
        found.add(key)
    return found


@pytest.mark.parametrize(("profile", "settings"), [
    ("miniature", {}), ("evening", {}), ("paper", {}), ("evening", dict(sweep_images=10, images=10, volumes="10 20"))])
def test_the_paper_waits_for_nothing_that_make_beyond_alone_needs(profile, settings):
    study = Study(profile, lr="0.1", **settings)
    paper = reached(study, "paper")
    assert not [key for key in paper if "beyond" in key]
    assert {job.key for job in study.jobs() if job.rule == "invert" and "beyond" not in job.key} <= paper
    assert any(key.startswith("invert/beyond_lora") for key in reached(study, "beyond"))
