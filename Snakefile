# The study as a graph: `Study` knows its jobs and pages (nbs/study/02_grid.ipynb), here they become rules. To see the papermill lines:
#   snakemake --profile profiles/local study --dry-run --printshellcmds --config profile=smoke seeds="0 1"
# A job runs again when its inputs or its state change, never because of prose, and then finds its records.
import os, sys, time
from snakemake.exceptions import WorkflowError
from bridgexfer.study.grid import Study, check_stored, gather_parts, job_command, job_state, near, page_command, page_state, patterns, resources
from bridgexfer.study.costs import require_baseline, require_data, require_gpu, require_rates, work_text
from bridgexfer.study.workflow import begin, failures, failures_text, prepare, sentence
class Said(WorkflowError): __traceback__ = property(lambda self: None, lambda self, lines: None) # no lines of code
def said(make): # what a user can cause, in one sentence without a traceback
    try: return make()
    except (ValueError, OSError) as e: raise Said(sentence(e)) from None

study = said(lambda: Study(config.get("profile"), **{k: v for k, v in config.items() if k != "profile"}))
JOBS = said(lambda: {job.key: job for job in study.jobs()})
said(lambda: check_stored(study.settings, study.all_archs))
RUNS, FIGURES = near(study.runs_dir), near(study.figures_dir)
BEGAN, LOCK = time.time(), [] # the lock's file is open as long as this process lives
if {"study", "paper", "beyond", "jobs"} & {*sys.argv}: said(lambda: require_rates(study, {*sys.argv}))
if {"study", "paper", "beyond"} & {*sys.argv}: said(lambda: require_baseline(study))
if study.offline: os.environ["HF_HUB_OFFLINE"] = "1"

onstart: # not in a dry run
    LOCK.append(said(begin))
    said(lambda: require_data(study))
    needed = list(workflow.dag.needrun_jobs())
    if workflow.local_exec and any(job.resources.get("gpu") for job in needed): said(lambda: require_gpu(study))
    made = [str(file).removeprefix(f"{RUNS}/").removesuffix(".json") for job in needed for file in job.output]
    if todo := JOBS.keys() & made: print(work_text(study, todo, None if workflow.local_exec else "the cluster"), file=sys.stderr)
    said(lambda: prepare(RUNS, FIGURES))

onerror: print(failures_text(failures(RUNS, BEGAN)), file=sys.stderr) # one line of cause for each job that failed

LOGGED = "{params.command} > {log:q} 2>&1 && code=0 || code=$?; echo Ended with status $code >> {log:q} || true; exit $code"

def of(w): return JOBS[f"{w.folder}/{w.name}"]
def parts(w): return [job for job in JOBS.values() if job.part and job.manifest == f"{w.folder}/{w.name}"]
def manifests(keys): return [f"{RUNS}/{key}.json" for key in keys]
def reads(pages): return [f for p in pages for f in manifests(study.manifests(*p.reads))]
def leaves(pages): return [f"{FIGURES}/{f}" for p in pages for f in p.leaves]
def whole(pages): return [*leaves(pages), *reads(pages)]
localrules: study, paper, beyond, jobs, learning_rates, gather
for target in ("study", "paper", "beyond", "learning_rates"): # see `make help`; the figures alone come with a clone
    rule:
        name: target
        input: whole(study.pages_of(target))

rule jobs: # everything that `paper` reads, and no table
    input: sorted({*reads(study.pages_of("paper"))})

rule gather: # the parts of a job
    input: lambda w: manifests(job.key for job in parts(w))
    output: f"{RUNS}/{{folder}}/{{name}}.json"
    wildcard_constraints: **patterns(job.manifest for job in JOBS.values() if job.part)
    run: said(lambda: gather_parts(study, parts(wildcards)[0]))

for kind in dict.fromkeys(job.rule for job in JOBS.values()):
    rule: # one for each notebook of nbs/jobs
        name: kind
        message: "{params.message}"
        input: lambda w: manifests(of(w).inputs)
        output: f"{RUNS}/{{folder}}/{{name}}.json"
        wildcard_constraints: **patterns(job.key for job in JOBS.values() if job.rule == kind)
        log: f"{RUNS}/logs/{{folder}}-{{name}}.txt"
        params: message=lambda w: of(w).message, command=lambda w: job_command(study, of(w)), state=lambda w: said(lambda: job_state(study, of(w)))
        threads: lambda w: resources(study, of(w).rule, of(w).folder)["cores"]
        priority: 2 if kind in ("invert", "generate") else 1
        resources: **{k: lambda w, k=k: resources(study, of(w).rule, of(w).folder)[k] for k in ("gpu", "mem_mb", "runtime")}
        shell: LOGGED

for page in study.pages():
    rule: # the name of its notebook is a target
        name: page.name
        message: "Writing {params.page}"
        input: reads([page])
        output: *map(update, leaves([page])) # they stay while they are made anew, and are put back if that fails
        log: f"{RUNS}/logs/{page.name}.txt"
        params: page=page.name, command=page_command(study, page), state=page_state(study, page)
        resources: **{k: resources(study, "table")[k] for k in ("gpu", "mem_mb", "runtime")}
        shell: LOGGED
