# The study as a graph: which notebook makes what, and from what.
#
#   snakemake --profile profiles/local study                              what `make study` runs; `paper` is all the rest
#   snakemake --profile profiles/local study --config seeds="0 1"         with other settings, in the syntax of settings.ini
#   snakemake --profile profiles/local study --dry-run --printshellcmds   shows the papermill lines, to type by hand
#
# A job runs again when its inputs, its code, a setting that its code names or the shipped weights have changed, and never
# because of prose: notebooks are no inputs, the hashes of their code are parameters. A job that runs again finds its records.
import ast, json, os, re, shlex, sys, time
from functools import cache
from pathlib import Path
from snakemake.exceptions import WorkflowError
from bridgexfer.artefacts import PACKAGE, code_hash, digest, read_json, stable_hash
from bridgexfer.data.registry import dataset_info
from bridgexfer.study.workflow import StudyRunning, begin, failures, failures_text
from bridgexfer.study.records import job_name, job_path, write_job
from bridgexfer.study.settings import load_settings
from bridgexfer.study.grid import SWEEPS, archs_of, datasets_of, groups_of, parts_of, runs_of, sets_of

PAPERS = { # notebook of nbs/paper: the kinds of jobs whose results it reads
    "tab1_leep": "transferability", "tab2_pipelines": "core", "fig03_convergence": "core", "fig10_examples": "single",
    "fig01_framework": "core single", "fig04_few_shot": "shots", "fig05_volume": "volume", "fig06_guidance": "guidance",
    "tab3_dsi": "style tokens", "fig07_dsi": "style tokens", "fig08_architectures": "architectures core",
    "tab4_datasets": "", "tab5_learning_rates": "tune", "hyperparameters": "", "errata": "",
    "tab6_fixed_features": "fixed", "tab7_clip": "clip", "transferability_ranks": "transferability core",
    "control_compute": "controls", "control_regularisers": "controls", "control_synthetic": "controls shots", "control_mixing": "controls",
    "control_retrieval": "controls", "control_inversion": "style alignment", "control_distance": "alignment"}
FILES = { # what a notebook leaves, where it is not one table and one figure of its own name
    "hyperparameters": ("hyperparameters.csv",), "errata": ("errata.csv", "errata_leep.csv", "errata_leep.png", "errata_leep.pdf")}
CORE = ("tab1_leep", "tab2_pipelines", "fig03_convergence", "fig10_examples") # what `make study` makes

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
MINIATURE = s.model == "miniature"
if MINIATURE: os.environ["HF_HUB_OFFLINE"] = "1"

# ---- jobs: a name for each, and what it is about
ARCHS = [*s.archs, *(a for a in s.more_archs if a not in s.archs)]
GRID = {job_path("", "", d, a).stem: (d, a) for d in vocabulary for a in ARCHS} # dataset, architecture
TRANSFER = {f"{sweep}/{job_path('', '', d, a).stem}": (sweep, d, a) for sweep in SWEEPS if sweep not in ("fixed", "clip")
            for a in archs_of(s, sweep) for d in datasets_of(s, sweep)}
SETS = {f"{group}-{job_name(key)}": (group, key) for sweep in SWEEPS for d in datasets_of(s, sweep) if sweep == "clip" or archs_of(s, sweep)
        for group, key in groups_of(s, sweep, d)}
TOKENS = {name: about for name, about in SETS.items() if about[0] in ("style", "class")}
CLIP, ALIGNED = ({job_name(d): d for d in datasets_of(s, sweep)} for sweep in ("clip", "style"))

# ---- what a job depends on besides its inputs
SCOPE = {"profile", "runs", "figures", "data", "datasets", "archs"} # these are in the names of inputs and outputs
SCOPE |= {k for k in s.values if k.endswith(("_datasets", "_shots", "_images", "_archs", "_pipelines"))} | {"volumes", "guidances"} # these make the lists of runs
INVERSION = ("style_steps", "class_steps", "inversion_lr", "inversion_batch", "inversion_init") # these make tokens
SCOPE |= set(INVERSION)
RESOURCES = ("gpu", "cores", "memory", "hours", "parts") # no result depends on these, nor on `generate_hours` and the like
SCOPE |= {k for k in s.values if k.split("_")[-1] in RESOURCES}

def named(source): # every word of some code that is no comment and no prose
    found = (getattr(n, field, None) for n in ast.walk(ast.parse(source)) for field in ("id", "attr", "arg", "name", "value"))
    return {word for word in found if isinstance(word, str)}

@cache
def needs(notebook): # the hash of its code; the settings that it, or a module it imports, names; the shipped weights
    code = "\n".join("".join(c["source"]) for c in json.loads(Path(notebook).read_text())["cells"] if c["cell_type"] == "code")
    modules = set(re.findall(r"^from bridgexfer\.(\S+) import", code, re.M))
    if "study.grid" in modules: modules.add("generation")
    words = named(code).union(*(named((PACKAGE/f"{m.replace('.', '/')}.py").read_text()) for m in modules if m != "study.settings"))
    published = digest("figures/published.csv") if "published" in words else ""
    return [code_hash(notebook), published, {k: repr(s.values[k]) for k in sorted(words & set(s.values) - SCOPE)}, digest(PACKAGE/"weights") if MINIATURE else ""]

def kept(path): # a hash of the settings that it lists
    return stable_hash(*(line for line in Path(path).read_text().splitlines() if line.split("=")[0].strip().split("_")[-1] not in RESOURCES))

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
THREADS = s.cores

def given(**parameters): # `-p name value` for each one that is not empty
    return " ".join(f"-p {k} {shlex.quote(v)}" for k, v in parameters.items() if v)

inner = {k: v for k, v in overrides.items() if k != "figures" and k.split("_")[-1] not in RESOURCES} # a job draws none, and finds its learning rates with the usual ones
JOB = given(profile=s.profile, overrides=json.dumps(inner) if inner else "")
PAPER = given(profile=s.profile, overrides=json.dumps(overrides) if overrides else "")

def asks(rule): # what its jobs ask of a machine: for a sweep's, `volume_hours` goes before `transfer_hours`, and that before `hours`
    def setting(what, unit): return lambda w: int(unit * next(s.values[k] for k in (f"{w.get('sweep', rule)}_{what}", f"{rule}_{what}", what) if k in s.values))
    return dict(gpu=setting("gpu", 1), mem_mb=setting("memory", 1000), runtime=setting("hours", 60)) # a number, MB, minutes

PARTS = [f"{i}of{s.parts}" for i in range(1, s.parts + 1) if s.parts > 1]

def made(kinds): # the files that all jobs of some kinds leave: a sweep, a group of sets, or tokens, alignment, transferability, tune
    def names(kind):
        if kind == "tune": return [f"tune/{name}" for name in GRID]
        if kind == "tokens": return [f"invert/{name}" for name in TOKENS]
        if kind == "alignment": return [f"alignment/{job_name(d)}-clip" for d in datasets_of(s, "style")]
        if kind == "clip": return [f"clip/{name}-clip" for name in CLIP]
        if kind in ("fixed", "transferability"):
            return [f"{kind}/{job_path('', '', d, a).stem}" for a in s.archs for d in (datasets_of(s, kind) if kind in SWEEPS else vocabulary)]
        return [name for name, about in TRANSFER.items() if about[0] == kind] if kind in SWEEPS else [f"generate/{name}" for name, about in SETS.items() if about[0] == kind]
    return [f"{RUNS}/{name}.json" for kind in kinds.split() for name in names(kind)]

def asked_for(paper): # does the profile have what it is about?
    return all(made(kind) for kind in PAPERS[paper].split())

def sets(sweep, dataset): # that its runs take images from
    return [f"{RUNS}/generate/{group}-{job_name(key)}.json" for group, key in groups_of(s, sweep, dataset)]

def inversion(group): # the settings behind the tokens that its prompts name
    return [repr(s.values[k]) for k in INVERSION] if group in ("style", "class", "untrained") else ""

def asked(sweep, dataset): # a hash of the runs, so that a change of one sweep reruns no other
    return stable_hash(*map(repr, runs_of(s, sweep, dataset)))

def figures(paper, flag=lambda path: path): # what a paper notebook leaves
    return [flag(f"{FIGURES}/{name}") for name in FILES.get(paper, [f"{paper}.{kind}" for kind in ("csv", "png", "pdf")])]

# ---- rules
BEGAN, LOCK = time.time(), [] # the lock's file is open as long as this process lives

onstart: # not in a dry run
    try: LOCK.append(begin())
    except StudyRunning as e: raise WorkflowError(str(e))
    Path(RUNS, "notebooks").mkdir(parents=True, exist_ok=True)

onerror: # one line of cause for each job that failed
    print(failures_text(failures(RUNS, BEGAN)), file=sys.stderr)

wildcard_constraints:
    set="|".join(map(re.escape, SETS)),
    token="|".join(map(re.escape, TOKENS)) or "none",
    sweep="|".join(x for x in SWEEPS if x not in ("fixed", "clip")),
    name="|".join(map(re.escape, GRID)),
    dataset="|".join(map(re.escape, {**CLIP, **ALIGNED})) or "none",
    part="|".join(f"[.]{p}" for p in PARTS) or "()"

localrules: study, paper, jobs, learning_rates

rule study: # Tables 1 and 2, Figures 2, 3 and 10
    input: [f for name in CORE for f in [*figures(name), *made(PAPERS[name])]] # the figures alone come with a clone

rule paper: # every table and figure that this profile's settings ask for
    input: [f for name, kinds in PAPERS.items() if kinds != "tune" and asked_for(name) for f in [*figures(name), *made(kinds)]]

rule jobs: # everything that `paper` reads, and no table
    input: sorted({f for kinds in PAPERS.values() if kinds != "tune" for f in made(kinds)})

rule learning_rates: # Table 5, which `transfer` reads
    input: figures("tab5_learning_rates"), made("tune")

rule invert: # learned tokens: of a dataset's style, or of its classes
    message: "Learning the {params.on[0]} of {params.on[1]}"
    output: f"{RUNS}/invert/{{token}}.json"
    log: f"{RUNS}/logs/invert-{{token}}.txt"
    params: needs=lambda w: needs("nbs/jobs/invert.ipynb"), on=lambda w: [*TOKENS[w.token], contents(TOKENS[w.token][1])],
            sets=lambda w: [repr(sets_of(s, *TOKENS[w.token])), inversion(TOKENS[w.token][0])]
    threads: THREADS
    priority: 2
    resources: **asks("invert")
    shell: "{RUN} nbs/jobs/invert.ipynb {RUNS}/notebooks/invert-{wildcards.token}.ipynb {JOB}"
           " -p kind {params.on[0]} -p dataset {params.on[1]:q} > {log} 2>&1"

rule generate: # the synthetic images of one group of sets
    message: "Generating images: {params.on[0]}, for {params.on[1]}"
    input: lambda w: [f"{RUNS}/invert/{w.set}.json"] if w.set in TOKENS else [f"{RUNS}/generate/single-{job_name(SETS[w.set][1])}.json"] if SETS[w.set][0] == "volume" else []
    output: f"{RUNS}/generate/{{set}}.json"
    log: f"{RUNS}/logs/generate-{{set}}.txt"
    params: needs=lambda w: needs("nbs/jobs/generate.ipynb"), on=lambda w: [*SETS[w.set], contents(SETS[w.set][1])],
            sets=lambda w: [repr(sets_of(s, *SETS[w.set])), inversion(SETS[w.set][0])]
    threads: THREADS
    priority: 2
    resources: **asks("generate")
    shell: "{RUN} nbs/jobs/generate.ipynb {RUNS}/notebooks/generate-{wildcards.set}.ipynb {JOB}"
           " -p group {params.on[0]} -p key {params.on[1]:q} > {log} 2>&1"

rule transfer: # fine-tuning: the runs of a sweep, or a part of them
    message: "Fine-tuning {params.on[2]} on {params.on[1]}: {params.on[0]}"
    input: lambda w: sets(w.sweep, GRID[w.name][0]), # and the core sweep before the others, which share runs with it
           lambda w: [f"{RUNS}/core/{w.name}.json"] if w.sweep != "core" and GRID[w.name][1] in s.archs else []
    output: f"{RUNS}/{{sweep}}/{{name}}{{part}}.json"
    log: f"{RUNS}/logs/{{sweep}}-{{name}}{{part}}.txt"
    params: needs=lambda w: needs("nbs/jobs/transfer.ipynb"), rates=lambda w: rates(), on=lambda w: [w.sweep, *GRID[w.name], contents(GRID[w.name][0])],
            runs=lambda w: asked(w.sweep, GRID[w.name][0]), part=lambda w: given(part=w.part[1:])
    threads: THREADS
    priority: 1
    resources: **asks("transfer")
    shell: "{RUN} nbs/jobs/transfer.ipynb {RUNS}/notebooks/{wildcards.sweep}-{wildcards.name}{wildcards.part}.ipynb {JOB}"
           " -p sweep {params.on[0]} -p dataset {params.on[1]:q} -p arch {params.on[2]} {params.part} > {log} 2>&1"

if PARTS:
    localrules: gather

    rule gather: # the records of all parts, in the order in which one job would have listed them
        input: lambda w: [f"{RUNS}/{w.sweep}/{w.name}.{part}.json" for part, some in zip(PARTS, parts_of(runs_of(s, w.sweep, GRID[w.name][0]), s.parts)) if some]
        output: f"{RUNS}/{{sweep}}/{{name}}.json"
        run:
            runs = runs_of(s, wildcards.sweep, GRID[wildcards.name][0])
            found = {run: Path(RUNS, record) for some, path in zip(parts_of(runs, s.parts), input) for run, record in zip(some, read_json(path)["records"], strict=True)}
            write_job(output[0], [found[run] for run in runs])

rule fixed: # the head alone is trained
    message: "Training heads on fixed features of {params.on[1]} on {params.on[0]}"
    input: f"{RUNS}/core/{{name}}.json"
    output: f"{RUNS}/fixed/{{name}}.json"
    log: f"{RUNS}/logs/fixed-{{name}}.txt"
    params: needs=lambda w: needs("nbs/jobs/fixed.ipynb"), on=lambda w: [*GRID[w.name], contents(GRID[w.name][0])], runs=lambda w: asked("fixed", GRID[w.name][0])
    threads: THREADS
    priority: 1
    resources: **asks("fixed")
    shell: "{RUN} nbs/jobs/fixed.ipynb {RUNS}/notebooks/fixed-{wildcards.name}.ipynb {JOB}"
           " -p dataset {params.on[0]:q} -p arch {params.on[1]} > {log} 2>&1"

rule clip: # CLIP's head is tuned
    message: "Tuning CLIP on {params.on}"
    input: lambda w: sets("clip", CLIP[w.dataset])
    output: f"{RUNS}/clip/{{dataset}}-clip.json"
    log: f"{RUNS}/logs/clip-{{dataset}}.txt"
    params: needs=lambda w: needs("nbs/jobs/clip.ipynb"), on=lambda w: CLIP[w.dataset], runs=lambda w: [asked("clip", CLIP[w.dataset]), contents(CLIP[w.dataset])]
    threads: THREADS
    priority: 1
    resources: **asks("clip")
    shell: "{RUN} nbs/jobs/clip.ipynb {RUNS}/notebooks/clip-{wildcards.dataset}.ipynb {JOB}"
           " -p dataset {params.on:q} > {log} 2>&1"

rule alignment: # how near synthetic images are to the real ones
    message: "Comparing synthetic images with {params.on[0]}"
    input: lambda w: sets("style", ALIGNED[w.dataset])
    output: f"{RUNS}/alignment/{{dataset}}-clip.json"
    log: f"{RUNS}/logs/alignment-{{dataset}}.txt"
    params: needs=lambda w: needs("nbs/jobs/alignment.ipynb"), on=lambda w: [ALIGNED[w.dataset], contents(ALIGNED[w.dataset])], runs=lambda w: asked("style", ALIGNED[w.dataset])
    threads: THREADS
    priority: 1
    resources: **asks("alignment")
    shell: "{RUN} nbs/jobs/alignment.ipynb {RUNS}/notebooks/alignment-{wildcards.dataset}.ipynb {JOB}"
           " -p dataset {params.on[0]:q} > {log} 2>&1"

rule transferability: # LEEP, LogME and H-score, with the bridges of the core sweep
    message: "Scoring {params.on[1]} on {params.on[0]}"
    input: f"{RUNS}/core/{{name}}.json"
    output: f"{RUNS}/transferability/{{name}}.json"
    log: f"{RUNS}/logs/transferability-{{name}}.txt"
    params: needs=lambda w: needs("nbs/jobs/transferability.ipynb"), on=lambda w: [*GRID[w.name], contents(GRID[w.name][0])]
    threads: THREADS
    priority: 1
    resources: **asks("transferability")
    shell: "{RUN} nbs/jobs/transferability.ipynb {RUNS}/notebooks/transferability-{wildcards.name}.ipynb {JOB}"
           " -p dataset {params.on[0]:q} -p arch {params.on[1]} > {log} 2>&1"

rule tune: # the grid of learning rates, on validation data, with synthetic images of its own
    message: "Trying learning rates for {params.on[1]} on {params.on[0]}"
    output: f"{RUNS}/tune/{{name}}.json"
    log: f"{RUNS}/logs/tune-{{name}}.txt"
    params: needs=lambda w: needs("nbs/jobs/tune.ipynb"), on=lambda w: [*GRID[w.name], contents(GRID[w.name][0])]
    threads: THREADS
    priority: 1
    resources: **asks("tune")
    shell: "{RUN} nbs/jobs/tune.ipynb {RUNS}/notebooks/tune-{wildcards.name}.ipynb {JOB}"
           " -p dataset {params.on[0]:q} -p arch {params.on[1]} > {log} 2>&1"

for paper, kinds in {name: kinds for name, kinds in PAPERS.items() if asked_for(name)}.items(): # tables and figures, a rule each: the name of the notebook is a target
    rule:
        name: paper
        message: "Writing {params.paper}"
        input: made(kinds)
        output: *figures(paper, update) # they stay while they are made anew, and are put back if that fails
        log: f"{RUNS}/logs/{paper}.txt"
        params: paper=paper, needs=lambda w, notebook=f"nbs/paper/{paper}.ipynb": needs(notebook), settings=kept("settings.ini") if paper == "hyperparameters" else ""
        resources: **asks("table")
        shell: "{RUN} nbs/paper/{params.paper}.ipynb {RUNS}/notebooks/{params.paper}.ipynb {PAPER} > {log} 2>&1"
