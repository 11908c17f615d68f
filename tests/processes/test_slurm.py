"""launch/slurm/job.sbatch on a real Slurm: preempted, requeued, and the bits are the same.

The cluster is this machine alone; its configuration, sockets, keys and logs are in a folder that
is thrown away, so that nothing of an installed Slurm is touched.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.runs import SAMPLE, arrays, steps_of

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = os.environ["PATH"] + ":/usr/sbin"
missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"Slurm is not installed: no {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of Slurm need root"),
]

STEPS = 40
TRAIN = [
    f"--config={ROOT}/configs/digits.py:smoke", f"--config.train.steps={STEPS}",
    "--config.train.checkpoint_every=10", "--config.train.sample_every=0",
    "--config.sample.num_samples=0",
]  # fmt: skip
TWO_TASKS = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]

# cred_expire is also how long a requeued job waits until it may start again.
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=100
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Slurm:
    """Daemons of one test run, and the commands that talk to them."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "slurm.conf").write_text(
            CONFIG.format(folder=folder, ctld_port=free_port(), d_port=free_port())
        )
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
        } | {
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
        }
        self.daemons = []

    def open(self) -> None:
        folder = self.folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.start(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        self.until(lambda: (folder / "munge.socket").exists(), "munged")
        self.start("slurmctld", "-D")
        self.start("slurmd", "-D", "-N", "localhost")
        self.until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T", check=False), "a node")

    def start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "w") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            )

    def ask(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def until(self, reached, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        files = [*sorted(self.folder.glob("*.log")), *sorted(self.folder.glob("*.out"))]
        return "\n".join(f"== {file.name}\n{file.read_text()[-6000:]}" for file in files)

    def submit(self, *arguments: str) -> str:
        """The number of a new job."""
        output = f"--output={self.folder}/job-%j.out"
        return self.ask("sbatch", "--parsable", output, *arguments).strip()

    def train(self, workdir, *flags: str) -> str:
        return self.submit(
            "--partition=low", *TWO_TASKS, str(ROOT / "launch" / "slurm" / "job.sbatch"), *TRAIN,
            f"--workdir={workdir}", *flags,
        )  # fmt: skip

    def said(self, job: str) -> str:
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def job(self, job: str, field: str) -> str:
        return re.search(rf"\b{field}=(\S+)", self.ask("scontrol", "show", "job", job))[1]

    def ended(self, job: str, seconds: float = 300) -> str:
        """The state in which a job ends."""
        going = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
        self.until(lambda: self.job(job, "JobState") not in going, f"the end of job {job}", seconds)
        return self.job(job, "JobState")

    def close(self) -> None:
        self.ask("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.open()
        yield cluster
    finally:
        cluster.close()


def test_preempted_job_ends_with_the_bits_of_an_undisturbed_one(slurm, tmp_path):
    undisturbed = slurm.train(tmp_path / "undisturbed")
    assert slurm.ended(undisturbed) == "COMPLETED", slurm.said(undisturbed)
    assert "process 1 on" in slurm.said(undisturbed)

    workdir = tmp_path / "preempted"
    job = slurm.train(workdir)
    slurm.until(lambda: len(steps_of(workdir)) > 10, "step 10", 300)
    slurm.submit("--partition=high", "--ntasks=2", "--wrap=sleep 1")
    slurm.until(lambda: slurm.job(job, "Restarts") == "1", "the requeue", 200)
    assert not (workdir / "report.json").exists()
    assert slurm.ended(job) == "COMPLETED", slurm.said(job)

    said = slurm.said(job)
    stopped = int(re.search(r"stopped at step (\d+), saved", said)[1])
    assert 10 < stopped < STEPS and f"resuming from step {stopped}" in said
    assert slurm.job(job, "Restarts") == "1"
    assert json.loads((workdir / "report.json").read_text())["steps"] == STEPS
    assert steps_of(workdir) == list(range(1, STEPS + 1))
    for item in ("params", "ema", "progress"):
        pairs = zip(arrays(workdir, item), arrays(tmp_path / "undisturbed", item), strict=True)
        for got, expected in pairs:
            np.testing.assert_array_equal(got, expected)


def test_another_command_submitted_by_a_relative_path(slurm, tmp_path):
    script = os.path.relpath(ROOT / "launch" / "slurm" / "job.sbatch", slurm.folder)
    flags = [*SAMPLE, "--num_samples=30", f"--out={tmp_path / 'samples.npz'}"]
    job = slurm.submit("--partition=low", *TWO_TASKS, script, "sample", *flags)
    assert slurm.ended(job) == "COMPLETED", slurm.said(job)
    assert "process 1 on" in slurm.said(job)
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["arr_0"].shape == (30, 8, 8, 1)


def test_a_run_that_fails_is_not_requeued(slurm, tmp_path):
    job = slurm.train(tmp_path / "run", "--config.no.such=1")
    assert slurm.ended(job) == "FAILED"
    assert slurm.job(job, "ExitCode") == "2:0" and slurm.job(job, "Restarts") == "0"
    assert "unknown config field --config.no.such" in slurm.said(job)


def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):
    job = slurm.train(tmp_path / "run")
    slurm.until(lambda: "process 0 on" in slurm.said(job), "the processes", 200)
    slurm.ask("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    slurm.until(lambda: slurm.ask("squeue", "-h", "-j", job, check=False) == "", "a free node")
    assert slurm.job(job, "JobState") == "CANCELLED" and slurm.job(job, "Restarts") == "0"
