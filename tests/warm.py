"""Notebooks run in processes forked from one that has imported the libraries: that takes longer than most of them."""
import os
import resource
import sys
from multiprocessing import get_context
from pathlib import Path

LIBRARIES = ["torch", "torch._dynamo", "torchvision", "timm", "sklearn.linear_model", "pandas", "seaborn", "nbdev.test",
             "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip.modeling_clip"]
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(LIBRARIES)


def processor_seconds() -> float:
    "Of this process and of those that it waited for."
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run_here(notebook: str, log: str) -> None:
    "Run a notebook in this process; its status is 1 where a cell fails."
    from nbdev.test import test_nb
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2): os.dup2(output, stream)
    done, _ = test_nb(notebook)
    sys.stdout.flush()
    Path(f"{log}.seconds").write_text(str(processor_seconds()))
    os._exit(0 if done else 1)


def run_notebook(notebook: Path, log: Path) -> tuple[int, float]: # exit status, processor seconds
    "As `nbdev-test` does, sooner; what it prints goes to `log`."
    child = PROCESSES.Process(target=run_here, args=(str(notebook), str(log)))
    child.start()
    child.join()
    seconds = Path(f"{log}.seconds")
    return child.exitcode, float(seconds.read_text()) if seconds.exists() else 0.
