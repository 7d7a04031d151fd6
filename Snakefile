# The study as a graph: which notebook makes what, and from what.
#
#   snakemake --profile profiles/local study                              what `make study` runs
#   snakemake --profile profiles/local study --config seeds="0 1"         with other settings, in the syntax of settings.ini
#   snakemake --profile profiles/local study --dry-run --printshellcmds   shows the papermill lines, to type by hand
#
# A job runs again when its inputs, its code, a setting that its code names or the shipped weights have changed, and never
# because of prose: notebooks are no inputs, the hashes of their code are parameters. A job that runs again finds its records.
import ast, json, os, re, shlex
from functools import cache
from pathlib import Path
from snakemake.exceptions import WorkflowError
from bridgexfer.artefacts import PACKAGE, code_hash, digest, stable_hash
from bridgexfer.datasets import dataset_info
from bridgexfer.records import job_path
from bridgexfer.settings import load_settings

PAPERS = { # notebook of nbs/paper: the job whose results it reads
    "tab1_leep": "transferability", "tab2_pipelines": "transfer", "fig03_convergence": "transfer", "fig10_examples": "generate",
    "tab5_learning_rates": "tune"}

# ---- settings; a run with other settings than the file's keeps its figures apart, so that those of the whole study stay
overrides = {k: str(v) for k, v in config.items() if k != "profile" and str(v)}
try:
    whole = load_settings(config.get("profile"))
    if overrides: overrides = {"figures": f"{overrides.get('runs', whole.runs)}/figures", **overrides}
    s = load_settings(whole.profile, **overrides)
    vocabulary = {str(d): dataset_info(str(d)).vocabulary for d in s.datasets}
except (ValueError, FileNotFoundError) as e: raise WorkflowError(str(e))

RUNS, FIGURES = (os.path.relpath(p) if p.is_relative_to(Path.cwd()) else str(p) for p in (s.runs_dir, s.figures_dir))
RATES = whole.figures_dir/"tab5_learning_rates.csv" # what `make tune` wrote
GRID = {job_path("", "", d, a).stem: (d, a) for d in vocabulary for a in s.archs} # job name: dataset, architecture
MINIATURE = s.model == "miniature"
if MINIATURE: os.environ["HF_HUB_OFFLINE"] = "1"

# ---- what a job depends on besides its inputs
SCOPE = {"profile", "runs", "figures", "data", "datasets", "archs"} # these are in the names of inputs and outputs

def named(source): # every word of some code that is no comment and no prose
    found = (getattr(n, field, None) for n in ast.walk(ast.parse(source)) for field in ("id", "attr", "arg", "name", "value"))
    return {word for word in found if isinstance(word, str)}

@cache
def needs(notebook): # the hash of its code; the settings that it, or a module it imports, names; the shipped weights
    code = "\n".join("".join(c["source"]) for c in json.loads(Path(notebook).read_text())["cells"] if c["cell_type"] == "code")
    modules = re.findall(r"^from bridgexfer\.(\S+) import", code, re.M)
    words = named(code).union(*(named((PACKAGE/f"{m.replace('.', '/')}.py").read_text()) for m in modules if m != "settings"))
    return [code_hash(notebook), {k: repr(s.values[k]) for k in sorted(words & set(s.values) - SCOPE)}, digest(PACKAGE/"weights") if MINIATURE else ""]

@cache
def contents(dataset): # of a folder of the user's: it changes when an image does
    files = sorted(p for p in Path(dataset).rglob("*") if p.is_file()) if Path(dataset).is_dir() else []
    return stable_hash(*((p, p.stat().st_size, p.stat().st_mtime_ns) for p in files)) if files else ""

def rates(): # the learning rates that `transfer` takes from the tuning
    if s.values.get("lr") != "tuned": return ""
    if not RATES.exists(): raise WorkflowError(f"{os.path.relpath(RATES)} is missing: run `make tune PROFILE={s.profile}` first, or set `lr` in settings.ini.")
    return digest(RATES)

# ---- papermill lines
RUN = "papermill --engine ipc --no-progress-bar"
THREADS = 1 if MINIATURE else workflow.cores

def given(**parameters): # `-p name value` for each one that is not empty
    return " ".join(f"-p {k} {shlex.quote(v)}" for k, v in parameters.items() if v)

inner = {k: v for k, v in overrides.items() if k != "figures"} # a job draws none, and finds its learning rates with the usual ones
JOB = given(profile=s.profile, overrides=json.dumps(inner) if inner else "")
PAPER = given(profile=s.profile, overrides=json.dumps(overrides) if overrides else "")

def made(job): # the files that a job leaves, all of them
    return [f"{RUNS}/{job}/{n}.json" for n in (sorted(set(vocabulary.values())) if job == "generate" else GRID)]

def figures(paper, flag=lambda path: path): # what a paper notebook leaves
    return [flag(f"{FIGURES}/{paper}.{kind}") for kind in ("csv", "png", "pdf")]

# ---- rules
onstart:
    Path(RUNS, "notebooks").mkdir(parents=True, exist_ok=True)

wildcard_constraints:
    vocabulary="|".join(map(re.escape, set(vocabulary.values()))),
    name="|".join(map(re.escape, GRID))

localrules: study, learning_rates

rule study: # Tables 1 and 2, Figures 2, 3 and 10
    input: [f for paper, job in PAPERS.items() if job != "tune" for f in [*figures(paper), *made(job)]] # the figures alone come with a clone

rule learning_rates: # Table 5, which `transfer` reads
    input: figures("tab5_learning_rates"), made("tune")

rule generate: # the synthetic images of a vocabulary, for all datasets with these class names
    message: "Generating images of the classes of {wildcards.vocabulary}"
    output: f"{RUNS}/generate/{{vocabulary}}.json"
    log: f"{RUNS}/logs/generate-{{vocabulary}}.txt"
    params: needs=lambda w: needs("nbs/jobs/generate.ipynb")
    threads: THREADS
    priority: 1
    resources: gpu=int(not MINIATURE)
    shell: "{RUN} nbs/jobs/generate.ipynb {RUNS}/notebooks/generate-{wildcards.vocabulary}.ipynb {JOB}"
           " -p vocabulary {wildcards.vocabulary} > {log} 2>&1"

rule transfer: # fine-tuning by all pipelines
    message: "Fine-tuning {params.on[1]} on {params.on[0]}"
    input: lambda w: f"{RUNS}/generate/{vocabulary[GRID[w.name][0]]}.json"
    output: f"{RUNS}/transfer/{{name}}.json"
    log: f"{RUNS}/logs/transfer-{{name}}.txt"
    params: needs=lambda w: needs("nbs/jobs/transfer.ipynb"), rates=lambda w: rates(), on=lambda w: [*GRID[w.name], contents(GRID[w.name][0])]
    threads: THREADS
    priority: 1
    resources: gpu=int(not MINIATURE)
    shell: "{RUN} nbs/jobs/transfer.ipynb {RUNS}/notebooks/transfer-{wildcards.name}.ipynb {JOB}"
           " -p dataset {params.on[0]:q} -p arch {params.on[1]} > {log} 2>&1"

rule transferability: # LEEP, with the bridges of `transfer`
    message: "Scoring {params.on[1]} on {params.on[0]}"
    input: f"{RUNS}/transfer/{{name}}.json"
    output: f"{RUNS}/transferability/{{name}}.json"
    log: f"{RUNS}/logs/transferability-{{name}}.txt"
    params: needs=lambda w: needs("nbs/jobs/transferability.ipynb"), on=lambda w: [*GRID[w.name], contents(GRID[w.name][0])]
    threads: THREADS
    priority: 1
    resources: gpu=int(not MINIATURE)
    shell: "{RUN} nbs/jobs/transferability.ipynb {RUNS}/notebooks/transferability-{wildcards.name}.ipynb {JOB}"
           " -p dataset {params.on[0]:q} -p arch {params.on[1]} > {log} 2>&1"

rule tune: # the grid of learning rates, on validation data, with synthetic images of its own
    message: "Trying learning rates for {params.on[1]} on {params.on[0]}"
    output: f"{RUNS}/tune/{{name}}.json"
    log: f"{RUNS}/logs/tune-{{name}}.txt"
    params: needs=lambda w: needs("nbs/jobs/tune.ipynb"), on=lambda w: [*GRID[w.name], contents(GRID[w.name][0])]
    threads: THREADS
    priority: 1
    resources: gpu=int(not MINIATURE)
    shell: "{RUN} nbs/jobs/tune.ipynb {RUNS}/notebooks/tune-{wildcards.name}.ipynb {JOB}"
           " -p dataset {params.on[0]:q} -p arch {params.on[1]} > {log} 2>&1"

for paper, job in PAPERS.items(): # tables and figures, a rule each: the name of the notebook is a target
    rule:
        name: paper
        message: "Writing {params.paper}"
        input: made(job)
        output: *figures(paper, update) # they stay while they are made anew, and are put back if that fails
        log: f"{RUNS}/logs/{paper}.txt"
        params: paper=paper, needs=lambda w, notebook=f"nbs/paper/{paper}.ipynb": needs(notebook)
        shell: "{RUN} nbs/paper/{params.paper}.ipynb {RUNS}/notebooks/{params.paper}.ipynb {PAPER} > {log} 2>&1"
