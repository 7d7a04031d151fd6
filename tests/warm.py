"""Notebooks and code run in processes forked from one that has imported the libraries: that takes longer than most."""
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


def divert(log: str, errors: str) -> None:
    "What this process prints goes to files."
    for stream, path in ((1, log), (2, errors)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def run_here(notebook: str, log: str) -> None:
    "Run a notebook in this process; its status is 1 where a cell fails."
    from nbdev.test import test_nb
    divert(log, log)
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


def code_here(code: str, arguments: tuple[str, ...], folder: str, log: str, names: dict) -> None:
    "Run code in this process, as `python -c` would."
    divert(log, f"{log}.errors")
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    try: exec(compile(code, "<code>", "exec"), {"__name__": "__main__", **names})
    finally: Path(f"{log}.seconds").write_text(str(processor_seconds()))


def start_code(code: str, *arguments: str, log: Path, folder: Path | str = ".", **names): # names: that the code has
    "As `python -c` does, sooner: a process, whose output goes to `log`, and errors to a file beside it."
    child = PROCESSES.Process(target=code_here, args=(code, arguments, str(folder), str(log), names))
    child.start()
    return child


def spent(*logs: Path) -> float: # processor seconds
    "By processes that were started here and came to their end."
    files = [Path(f"{log}.seconds") for log in logs]
    return sum(float(f.read_text()) for f in files if f.exists())
