"""The study on a cluster: the resources requested, and a SLURM of one node that makes the tables of this machine."""
import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from test_jobs import Clone

SMALL = dict(pipelines="vanilla bridged", shots="4") # a piece of the grid
DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel")
SBIN = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]) # where daemons are, which is not on everybody's PATH
CONF = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/munge/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
ReturnToService=2
MailProg=/bin/true
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory}
PartitionName=main Nodes={host} Default=YES
"""


def free_ports(n):
    "TCP ports that nobody listens on."
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in found: s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in found]


class Cluster:
    "A SLURM of one node, all of it in a folder of its own; `env` finds it."
    def __init__(self, folder):
        self.folder = folder
        for name, mode in (("munge", 0o711), ("state", 0o700), ("spool", 0o700), ("bin", 0o755)):
            (folder/name).mkdir(mode=mode)
        (folder/"munge/key").write_bytes(os.urandom(1024))
        (folder/"munge/key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        cpus = min(2, os.cpu_count())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 # MiB
        conf = CONF.format(folder=folder, host=host, ports=free_ports(2), cpus=cpus, memory=min(8000, memory))
        (folder/"slurm.conf").write_text(conf)
        # the plugin's inner srun is started without the variables of SLURM, this one among them
        (folder/"bin/srun").write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        (folder/"bin/srun").chmod(0o755)
        self.env = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin{os.pathsep}{SBIN}"}

    def run(self, *words): return subprocess.run(words, env=self.env, capture_output=True, text=True)

    def start(self, *words):
        "Start a daemon as a child."
        with open(self.folder/f"{words[0]}.txt", "w") as log:
            return subprocess.Popen(words, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait(self, ready, what):
        "Until something is the case, or one minute."
        until = time.time() + 60
        while not ready():
            logs = "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in self.folder.glob("*.txt"))
            assert time.time() < until, f"{what}\n{logs}"
            time.sleep(0.2)

    def jobs(self):
        "Each job's comment, state, memory, time limit, CPUs and partition."
        listed = self.run("squeue", "--states=all", "--noheader", "--format=%k|%T|%m|%l|%C|%P")
        return [line.split("|") for line in listed.stdout.splitlines()]


def stop(daemon):
    "End a child that was started here."
    daemon.terminate()
    try: daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


@pytest.fixture(scope="module")
def cluster():
    "A SLURM that is up; it is gone afterwards, with everything that still runs on it."
    if os.geteuid(): pytest.skip("a SLURM of its own needs root")
    missing = [name for name in (*DAEMONS, *CLIENTS) if not shutil.which(name, path=SBIN)]
    if missing: pytest.skip(f"no {', '.join(missing)}: install SLURM (Debian, Ubuntu: apt-get install slurm-wlm munge)")
    with TemporaryDirectory(prefix="slurm-") as name, ExitStack() as stack:
        c = Cluster(Path(name))
        c.folder.chmod(0o711)
        munge = c.folder/"munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge/file}" for option, file in files.items()]
        stack.callback(stop, c.start("munged", "--foreground", "--force", *options))
        c.wait((munge/"socket").exists, "munged does not answer")
        for daemon in ("slurmctld", "slurmd"):
            stack.callback(stop, c.start(daemon, "-D", "-f", f"{c.folder}/slurm.conf"))
        stack.callback(lambda: c.wait(lambda: not c.run("squeue", "--noheader").stdout, "jobs do not end"))
        stack.callback(c.run, "scancel", "--user=root")
        def idle(): return c.run("sinfo", "--noheader", "--format=%T").stdout.strip() == "idle"
        c.wait(idle, "the node does not get ready")
        yield c


def core(clone, on, *words, **settings):
    "Make Table 2, from the core sweep: the table as text."
    code, said = clone.snakemake("tab2_pipelines", *words, on=on, **settings)
    assert code == 0, said
    return {p.name: p.read_text() for p in (clone.folder/"runs/figures/smoke").glob("*.csv")}


@pytest.mark.slow
@pytest.mark.slurm
def test_slurm_and_this_machine_make_the_same_table(cluster, tmp_path):
    for name in ("there", "here"): (tmp_path/name).mkdir()
    there = Clone(tmp_path/"there")
    here = Clone(tmp_path/"here")
    path = os.pathsep.join([str(cluster.folder/"bin"), there.env["PATH"]])
    there.env = {**there.env, **cluster.env, "PATH": path}
    polling = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2")
    partition = ("--default-resources", "slurm_partition=main")
    made = core(there, "slurm", *polling, *partition, jobs_per_sweep=2, **SMALL)
    assert made.keys() == {"tab2_pipelines.csv"}
    assert made == core(here, "local", **SMALL)
    done = cluster.jobs()
    asked_by = [comment.split("_wildcards_")[0] for comment, *_ in done]
    assert sorted(asked_by) == ["rule_generate", "rule_tab2_pipelines", "rule_transfer", "rule_transfer"]
    assert {tuple(asked) for _, *asked in done} == {("COMPLETED", "2000M", "1:00:00", "1", "main")}
    jobs = [(clone.folder/"runs/smoke/core/digits-mini_resnet10.json").read_text() for clone in (there, here)]
    assert jobs[0] == jobs[1] # the parts were put together in the order of one job


STAND_INS = { # for SLURM's commands, in shell; they take no job
    "sbatch": "echo no >&2; exit 1", "sinfo": "echo gpu", "squeue": "exit 0", "sacct": "exit 0",
    "sacctmgr": "echo me", "scontrol": "exit 1"}


def test_jobs_ask_for_what_settings_say(tmp_path):
    "With stand-ins for SLURM's commands; the machine need not have any."
    for name in ("clone", "bin"): (tmp_path/name).mkdir()
    clone = Clone(tmp_path/"clone")
    for name, text in STAND_INS.items():
        (tmp_path/"bin"/name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path/"bin"/name).chmod(0o755)
    clone.env["PATH"] = os.pathsep.join([str(tmp_path/"bin"), clone.env["PATH"]])
    clone.edit("settings.ini", lambda text: text.replace("[evening]", "[evening]\ngenerate_memory = 24\nhours = 5"))
    polling = "--slurm-init-seconds-before-status-checks 1"
    resources = "--default-resources slurm_partition=gpu slurm_account=me"
    arguments = f"SNAKEMAKE_ARGS={polling} {resources}"
    there = "datasets=digits volume_datasets= style_datasets= fixed_datasets= clip_datasets=" # images that ship
    said = clone.make("study", "PROFILE=evening", "ON=slurm", f"SET=lr=0.01 {there}", arguments, ok=False)
    asked = re.search(r"sbatch --parsable .*? --comment rule_generate_\S+(.*?)--wrap", said)[1]
    for words in ("--mem 24000 ", "-t 300 ", "--gpus=1 ", "--cpus-per-task=4 ", "-p gpu ", "-A me "):
        assert words in asked, asked
