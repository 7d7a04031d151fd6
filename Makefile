# Everything is one word: `make` lists them. Nothing is needed beforehand but Python 3.11 or newer and make.

PYTHON   ?= python3.11 python3.12 python3.13 python3.14 python3 # the first that is new enough and has venv is taken
PROFILE  ?= # miniature (settings.ini's default), evening, paper, smoke
DATASETS ?=
ARCHS    ?=
PIPELINES ?= # such as vanilla mixed_weighted: see nbs/library/16_transfer.ipynb
IMAGES   ?=
SEEDS    ?=
SHOTS    ?=
FETCH    ?= # datasets to download, for `make datasets`
ON       ?= local # where jobs run, a folder of profiles: local, slurm
RESULT   ?= # a row of a table, for `make provenance`
SET      ?= # any other settings, as in SET="lr=0.01 guidance=5"
DEVICE   ?= cpu # of `make bench`: cpu, cuda
PORT     ?= 8000
PAPER    ?= # 1: of the paper's pages, for `make outputs`
MINUTES  ?= 60 # of `make fuzz`
FOR      ?= study # of `make env`, one or more of: study test docs lab
TORCH    ?= # of a new environment. keep: torch and torchvision that PYTHON has; cpu: without CUDA, from PyTorch's index
ARGS     ?= # more for pytest, as in ARGS="-k digits"
SNAKEMAKE_ARGS ?= # more for snakemake, as in SNAKEMAKE_ARGS="--default-resources slurm_partition=gpu slurm_account=me" or "--dry-run"

STAMP   := .venv/.complete
PURPOSES := test docs lab
RUN     := PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH="$(CURDIR)" PYTHONUTF8=1
# Another Python's surroundings, such as an active conda's, do not reach this one; nor does a locale without UTF-8.
unexport PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONWARNINGS PYTHONIOENCODING MPLBACKEND
# uv leaves compiling to the first import. Without what that writes, every command and job would compile PyTorch again: seconds each.
unexport PYTHONDONTWRITEBYTECODE
unexport VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
NARROW  := $(strip $(if $(strip $(DATASETS)),datasets="$(strip $(DATASETS))") $(if $(strip $(ARCHS)),archs="$(strip $(ARCHS))") \
  $(if $(strip $(PIPELINES)),pipelines="$(strip $(PIPELINES))") $(if $(strip $(IMAGES)),images="$(strip $(IMAGES))") $(foreach k,$(if $(strip $(SEEDS)),seeds few_seeds sweep_seeds beyond_seeds),$(k)="$(strip $(SEEDS))") $(if $(strip $(SHOTS)),shots="$(strip $(SHOTS))") $(SET))
CONFIG  := $(if $(strip $(PROFILE)),profile="$(strip $(PROFILE))") $(NARROW)
# $(call one-of,NAME,words): an error unless each word of the variable NAME is one of some words
one-of   = $(if $(filter-out $(2),$($(1))),$(error $(1) is one of $(strip $(2)), got '$(strip $($(1)))'))
WORKFLOW = $(call one-of,ON,$(patsubst profiles/%/,%,$(wildcard profiles/*/)))$(RUN) snakemake --profile profiles/$(strip $(ON))
WITH     = $(if $(strip $(CONFIG)),--config $(CONFIG)) $(SNAKEMAKE_ARGS)

.PHONY: help env study paper beyond plan provenance tune datasets test test-all fuzz check lab docs docs-serve readme outputs cost bench miniature checkpoints clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'study, paper, beyond, plan and tune take PROFILE= DATASETS= ARCHS= PIPELINES= IMAGES= SEEDS= SHOTS= SET=, as in: make study DATASETS=digits SEEDS="0 1" SET=guidance=5'
	@echo 'study, paper, beyond and tune also take ON=, where jobs run: make study PROFILE=paper ON=slurm'

env: $(STAMP) $(call one-of,FOR,study $(PURPOSES))$(patsubst %,.venv/.%,$(filter-out study,$(FOR))) ## the environment in .venv, from requirements.lock; made once, and again when the lock changes

study: $(STAMP) ## the study's core: Tables 1 and 2, Figures 2, 3 and 10 (25 minutes on two cores)
	@$(WORKFLOW) study $(WITH)
	$(if $(filter -n --dry-run --dryrun,$(SNAKEMAKE_ARGS)),,@$(RUN) bridgexfer table $(CONFIG))

paper: $(STAMP) ## every table and figure, and the controls (by the plan two hours and a quarter on two cores; stop it and run it again as you like)
	@$(WORKFLOW) paper $(WITH)

beyond: $(STAMP) ## ways of making synthetic images and ways of using them that the paper does not compare (by the plan an hour and three quarters on two cores; stop it and run it again as you like)
	@$(WORKFLOW) beyond $(WITH)

plan: $(STAMP) ## what a profile costs before it runs: jobs, images, hours, disk, as in: make plan PROFILE=paper
	@$(RUN) bridgexfer plan $(CONFIG)

provenance: $(STAMP) ## from a number back to its runs, notebooks and commands: make provenance RESULT="tab2_pipelines digits bridged_pp shots=0"
	@$(RUN) bridgexfer provenance '$(strip $(RESULT))' $(if $(strip $(PROFILE)),--profile "$(strip $(PROFILE))")

tune: $(STAMP) ## choose the hyper-parameters on validation data: Table 5, which `make study` reads (by the plan 50 minutes on two cores)
	@$(WORKFLOW) learning_rates $(WITH)

datasets: $(STAMP) ## the paper's ten datasets: found or not, and what to do; FETCH="pets dtd" downloads, SET="data=FOLDER" says where
	@$(RUN) bridgexfer datasets $(CONFIG) $(if $(strip $(FETCH)),--fetch $(FETCH))

test: .venv/.test ## modules and notebooks, all tests below five processor seconds (about 6 minutes on two cores)
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow and not heavy" $(ARGS)

test-all: .venv/.test .venv/.docs ## the same, and the study, every job and paper notebook, faults, evening and paper on a stand-in of the hub, a SLURM, the site in a browser (an hour and a half on two cores)
	@bash .ci/extras
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: .venv/.test ## odd folders, settings and words for MINUTES=60: a command ends in a sentence and loses nothing
	@$(RUN) BRIDGEXFER_FUZZ_MINUTES="$(strip $(MINUTES))" python -m pytest -s -n 0 tests/test_fuzz.py $(ARGS)

check: .venv/.test ## the quick part of the tests: style, notebooks clean, modules as exported, links
	@$(RUN) python -m pytest -n 2 tests/test_project.py tests/test_style.py -k "not runs and not readme"

lab: .venv/.lab ## open the notebooks in JupyterLab
	@$(RUN) jupyter lab nbs

docs: .venv/.docs ## the site in _site, from the notebooks (2 minutes the first time on two cores)
	@$(RUN) OMP_NUM_THREADS=1 python docs/pages.py
	@$(RUN) OMP_NUM_THREADS=1 sphinx-build -W --keep-going -j auto -c docs -d runs/site/doctrees _pages _site
	@echo "The site: _site/index.html, or make docs-serve"

docs-serve: docs ## show the site on localhost, at PORT=8000
	@echo "http://127.0.0.1:$(PORT)"; $(RUN) python -m http.server --bind 127.0.0.1 --directory _site $(PORT)

readme: .venv/.test ## write README.md from nbs/index.ipynb
	@$(RUN) python docs/readme.py

outputs: .venv/.test ## execute the tour, the tutorials and the notebooks that export, and store what they show (20 minutes); PAPER=1 stores what `make paper` left
	@$(RUN) OMP_NUM_THREADS=1 python docs/outputs.py $(if $(strip $(PAPER)),--paper $(PROFILE))

# What a machine measures: at miniature scale on a CPU, at the models' own sizes on a GPU.
cpu_generation       = -p images 64 -p batch 64 -p steps 25 -p rounds 3
cuda_generation      = -p model sd15 -p device cuda -p precisions bfloat16 -p images 32 -p batch 16 -p steps 50 -p rounds 3
cpu_style_inversion  = -p steps 20 -p images 256 -p rounds 5
cuda_style_inversion = -p model sd15 -p device cuda -p precision bfloat16 -p size 512 -p batch 4 -p images 64 -p steps 20 -p rounds 5
cpu_finetuning       = -p shapes "mini_resnet10@32 mini_resnet18@64 resnet18@64" -p images 256 -p batch 64 -p rounds 5 -p workers 2 -p seeds 5 -p epochs 15
cuda_finetuning      = -p shapes "resnet18@224 vit_base@224" -p device cuda -p images 12800 -p batch 64 -p rounds 3 -p workers 16
cpu_sharing          = -p part miniature -p rounds 2
cpu_two_commands     = -p commands "study; study" -p environment new -p kept "$(CURDIR)/runs/benchmarks/fresh"
cpu_replication      = -p fresh "$(CURDIR)/runs/benchmarks/fresh"
cpu_scores           = -p images 898 -p heads 30 -p epochs 20 -p leep_size "20000 1000 200" -p feature_size "5000 512 100" -p rounds 3
cuda_scores          = $(cpu_scores) -p device cuda
cpu_growth           = -p per_class "20 200 1000 3000" -p size 512 -p written "200 400 800" -p read "400 800 1600 3200" -p limit 120 \
  -p mapped "10000 50000 100000" -p profiles "miniature evening paper" -p listed "1 3 6" -p listed_size "400 2500" -p scored "2000 6000 20000" -p sources 1000
bench = $(call one-of,DEVICE,cpu cuda)@mkdir -p runs/benchmarks && $(RUN) papermill --engine ipc --log-output nbs/benchmarks/$(1).ipynb runs/benchmarks/$(1).ipynb -p out "$(CURDIR)/figures" $($(strip $(DEVICE))_$(1))

cost: override DEVICE = cpu
cost: $(STAMP) ## time `make study` in a fresh clone of the last commit, see where its time goes, and compare its results with the committed ones (26 minutes)
	$(call bench,two_commands)
	$(call bench,replication)

bench: $(STAMP) ## ours beside what others do, in turn, and how time and memory grow: figures/benchmarks.csv, growth.csv (25 minutes on two cores); on a GPU at full size with DEVICE=cuda
	$(if $(filter cuda,$(strip $(DEVICE))),@$(RUN) python -m bridgexfer.study.device cuda figures)
	$(call bench,generation)
	$(call bench,style_inversion)
	$(call bench,finetuning)
	$(call bench,scores)
	$(if $(filter cpu,$(strip $(DEVICE))),$(call bench,sharing))
	$(if $(filter cpu,$(strip $(DEVICE))),$(call bench,growth))

# The sizes at which the shipped weights were trained.
WEB_IMAGES = 40000
build = @mkdir -p runs/weights && $(RUN) papermill --engine ipc --log-output nbs/miniature/$(1).ipynb runs/weights/$(1).ipynb \
  -p out "$(CURDIR)/bridgexfer/weights" $(if $(2),-p images $(WEB_IMAGES) -p steps $(2))

miniature: $(STAMP) ## train the shipped weights again (hours on two cores); everything made with the old ones is made anew
	$(call build,01_clip,1500)
	$(call build,02_vae,1600)
	$(call build,03_unet,10000)
	$(call build,04_backbones,1500)
	$(call build,05_generator)

# A tiny Stable Diffusion as the shipped one, in half the steps; and what classifiers learn from it before it is trained to the end.
CHECKPOINTS = 150 300 600 1200 2500 5000
checkpoints: $(STAMP) ## the tiny Stable Diffusion along its training: do better pictures make better classifiers? (an hour on two cores)
	@mkdir -p runs/checkpoints && $(RUN) papermill --engine ipc --log-output nbs/miniature/03_unet.ipynb runs/checkpoints/03_unet.ipynb \
	  -p out "$(CURDIR)/runs/checkpoints" -p images $(WEB_IMAGES) -p steps $(lastword $(CHECKPOINTS)) -p kept "$(CHECKPOINTS)"
	@mkdir -p runs/miniature/notebooks && $(RUN) papermill --engine ipc --log-output nbs/paper/beyond_checkpoints.ipynb \
	  runs/miniature/notebooks/beyond_checkpoints.ipynb -p profile miniature -p checkpoints "$(CURDIR)/runs/checkpoints/checkpoints"

clean: ## remove the environment, not the runs
	rm -rf .venv .uv

# uv is installed into .uv by pip, pinned by .ci/uv.txt; it makes .venv. A .venv that was never finished is made from scratch.
# What a command needs is an extra of pyproject.toml, and has a stamp of its own; .venv/.kept lists what does not come from the lock.
INSTALL   = .uv/bin/uv pip install $$quiet --python .venv/bin/python -c requirements.lock
LOCKED    = $(INSTALL) --require-hashes --excludes .venv/.kept -r pyproject.toml
QUIET     = set -e; export UV_PYTHON_DOWNLOADS=never; quiet=; [ -t 2 ] || quiet=--quiet

$(STAMP): requirements.lock pyproject.toml .ci/uv.txt
	@python=; old=; for p in $(PYTHON); do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; old=$$p; \
	  "$$p" -c 'import ensurepip, venv' 2>/dev/null && { python=$$p; break; }; done; \
	if [ -z "$$old" ]; then echo "Python 3.11 or newer is needed and was not found: install it (Debian, Ubuntu: apt install python3 python3-venv)" \
	  "or say where it is with PYTHON=/path/to/python3." >&2; exit 1; fi; \
	if [ -z "$$python" ]; then echo "$$old has no venv module: install it (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; fi; \
	case '$(strip $(TORCH))' in ''|keep|cpu) ;; *) echo "TORCH is keep, cpu or nothing: see the first lines of the Makefile." >&2; exit 1;; esac; \
	$(QUIET); if ! cmp -s .ci/uv.txt .uv/uv.txt || ! .uv/bin/uv --version >/dev/null 2>&1; then \
	  echo "Installing uv into .uv"; rm -rf .uv; "$$python" -m venv .uv; \
	  .uv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r .ci/uv.txt; cp .ci/uv.txt .uv/uv.txt; fi; \
	if [ -f $(STAMP) ] && .venv/bin/python -c '' 2>/dev/null; then rm $(STAMP); [ -f .venv/.kept ] || : >.venv/.kept; else \
	  kept=$$(if [ '$(strip $(TORCH))' = keep ]; then "$$python" .ci/kept.py requirements.lock; fi); \
	  echo "Making the environment in .venv (figures/environment.csv has its size)"; \
	  rm -rf .venv; .uv/bin/uv venv --quiet --python "$$("$$python" -c 'import sys; print(sys.executable)')" .venv; \
	  if [ -n "$$kept" ]; then echo "$$kept" >"$$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/kept.pth"; fi; \
	  echo '$(if $(strip $(TORCH)),torch torchvision)' | tr ' ' '\n' >.venv/.kept; \
	  if [ '$(strip $(TORCH))' = cpu ]; then : >.venv/.cpu; fi; fi; \
	$(LOCKED) --exact --extra study $(patsubst .venv/.%,--extra %,$(wildcard $(PURPOSES:%=.venv/.%))); \
	if [ -f .venv/.cpu ]; then $(INSTALL) --no-verify-hashes --torch-backend cpu torch torchvision; fi; \
	.uv/bin/uv pip install --quiet --no-deps --no-build-isolation --python .venv/bin/python -e .; \
	touch $(STAMP) $(wildcard $(PURPOSES:%=.venv/.%))

$(PURPOSES:%=.venv/.%): $(STAMP)
	@$(QUIET); echo "Adding to .venv what make $(@:.venv/.%=%) needs"; $(LOCKED) --extra $(@:.venv/.%=%); touch $@
