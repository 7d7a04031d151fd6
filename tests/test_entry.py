"""What a shell starts: Ctrl-C while the command line is still being imported."""
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def started(*words, **variables):
    "The command, as the script that is installed starts it."
    module, _, function = SCRIPTS["bridgexfer"].partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    def start(): signal.signal(signal.SIGINT, signal.default_int_handler) # which a shell's background job ignores
    return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, **variables}, preexec_fn=start)


@pytest.mark.parametrize(("words", "kept"), [
    (["check", "my"], "nothing was changed"), ([], "nothing was changed"), (["generate", "my"], "to resume")])
def test_ctrl_c_during_the_import_is_a_sentence(words, kept, tmp_path):
    (tmp_path/"typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = started(*words, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 130 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("Interrupted: ") and kept in done.stderr


def test_the_script_runs_commands():
    done = started("check", "no_such_folder", PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "no_such_folder" in done.stderr and "Traceback" not in done.stderr
