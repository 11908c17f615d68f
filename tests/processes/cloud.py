"""A stand-in for Google Cloud: a gcloud that runs what it is told in two folders, one a machine.

The machines share no folder: each has a home folder of its own.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

from tests.conftest import ROOT

POD = str(ROOT / "launch" / "tpu" / "pod.sh")


def wait_for(reached, what: str, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path({folder!r})
arguments = sys.argv[1:]
with open(here / "calls", "a") as calls:
    print(json.dumps(arguments), file=calls)
flags = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
words = [a for a in arguments if not a.startswith("--")]
state = here / "state"
if words[:2] != ["compute", "tpus"]:
    sys.exit()
what, rest = words[2:4], words[4:]
if what == ["queued-resources", "create"]:
    assert not state.exists()
    for machine in "01":
        (here / machine).mkdir()
    state.write_text("ACTIVE")
elif what == ["queued-resources", "delete"]:
    state.unlink()
    for machine in "01":
        shutil.rmtree(here / machine, ignore_errors=True)
elif what == ["queued-resources", "describe"]:
    error = "ERROR: (gcloud.compute.tpus.queued-resources.describe)"
    if (here / "unavailable").exists():
        sys.exit(error + " UNAVAILABLE: The service is currently unavailable.")
    if not state.exists():
        sys.exit(error + " NOT_FOUND: Resource 'queuedResources/pod' was not found.")
    print("WARNING: updates are available", file=sys.stderr)
    print(state.read_text())
else:
    assert what[0] == "tpu-vm" and state.read_text() == "ACTIVE"
    for machine in "01" if flags["worker"] == "all" else flags["worker"]:
        if what[1] == "scp":
            shutil.copy(rest[0], here / machine / rest[1].partition(":")[2])
        else:
            environment = {{**os.environ, "HOME": str(here / machine), "MACHINE": machine}}
            command = ["bash", "-c", flags["command"]]
            code = subprocess.run(command, cwd=here / machine, env=environment).returncode
            if code:
                sys.exit(code)
"""

# Stands for a machine's Python: uv makes environments whose Python trains until it is told what
# to do, and stops at SIGTERM.
MACHINE_PYTHON = """#!/usr/bin/env bash
echo "$MACHINE $*" >> {folder}/ran
echo $MDT_JAX_RUN_TOKEN >> {folder}/tokens
[[ "$*" == *"-m mdt_jax."* ]] && echo "${{JAX_PLATFORMS:-tpu}}" >> {folder}/platforms
case "$*" in
    *"uv venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *mdt_jax.main*)
        trap 'exit 75' TERM
        until [[ -e {folder}/finish ]]; do
            [[ -e {folder}/fail ]] && exit 2
            # One failure of this machine alone.
            [[ -e {folder}/fail-once-$MACHINE ]] && rm {folder}/fail-once-$MACHINE && exit 2
            sleep 0.1
        done ;;
esac
"""

# Flags as the reference of gcloud has them.
KNOWN = {
    "services enable": {"project"},
    "storage buckets create": {"location", "project", "uniform-bucket-level-access"},
    "storage buckets add-iam-policy-binding": {"member", "role"},
    "storage cp": {"recursive"},
    "storage cat": set(),
    "storage rm": {"recursive"},
    "iam service-accounts create": {"project"},
    "compute tpus queued-resources create": {
        "node-id", "accelerator-type", "runtime-version", "spot", "zone", "project", "scopes",
        "service-account", "valid-until-duration", "labels",
    },
    "compute tpus queued-resources describe": {"format", "zone", "project"},
    "compute tpus queued-resources delete": {"force", "quiet", "zone", "project"},
    "compute tpus tpu-vm ssh": {"worker", "command", "zone", "project", "ssh-key-file"},
    "compute tpus tpu-vm scp": {"worker", "zone", "project", "ssh-key-file"},
}  # fmt: skip


class Cloud:
    """The stand-in in a folder, and pod.sh, which finds it there.

    python: a script in place of the machines' Python. variables: of the environment.
    """

    def __init__(self, folder: pathlib.Path, python: str = MACHINE_PYTHON, **variables: str):
        self.folder = folder
        (folder / "bin").mkdir()
        names = {"python": sys.executable, "folder": str(folder)}
        executable(folder / "bin" / "gcloud", GCLOUD.format(**names))
        executable(folder / "bin" / "python3", python.format(**names))
        executable(folder / "bin" / "ssh-add", f"#!/bin/bash\n[[ ! -e {folder}/no-key ]]\n")
        for name in ("ssh-agent", "ssh-keygen"):
            executable(folder / "bin" / name, "#!/bin/bash\n")
        self.environment = {
            **os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "TPU_NAME": "pod",
            "ZONE": "zone", "PROJECT": "project", "ACCELERATOR": "v5litepod-8", "SPOT": "1",
            "SERVICE_ACCOUNT": "mdt@project", "PERIOD": "0.3", "SETUP": "touch set-up",
            "CREATE_FLAGS": "--valid-until-duration=6h --labels=run=xl2",
            "SSH_FLAGS": "--ssh-key-file=key", "JAX_PLATFORMS": "", **variables,
        }  # fmt: skip
        self.command = ["train", "--config=configs/digits.py", "--config.x=it's"]

    def pod(self, *arguments: str, expect: int = 0, timeout: float = 60) -> str:
        done = subprocess.run([POD, *arguments], cwd=ROOT, env=self.environment,
                              capture_output=True, text=True, timeout=timeout)  # fmt: skip
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def check_calls(self) -> None:
        """Every call of gcloud is of a command that it has, with flags of that command."""
        for call in self.calls():
            name = next(name for name in KNOWN if call[: name.count(" ") + 1] == name.split())
            flags = {a[2:].partition("=")[0] for a in call if a.startswith("--")}
            assert flags <= KNOWN[name], call

    def trained(self) -> list[str]:
        """A line for each machine whose training was started."""
        ran = self.folder / "ran"
        lines = ran.read_text().splitlines() if ran.exists() else []
        return sorted(line for line in lines if "mdt_jax.main" in line)

    def tokens(self) -> set[str]:
        """Those of the runs that were started."""
        return set((self.folder / "tokens").read_text().split())

    def exit_codes(self) -> list[str]:
        files = [self.folder / machine / "mdt_jax" / "run.exit" for machine in "01"]
        return [file.read_text().strip() for file in files if file.exists()]

    def close(self) -> None:
        (self.folder / "fail").touch()  # whatever still trains ends
