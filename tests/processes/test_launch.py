"""What launch/ has: scripts pass shellcheck and do what they say, files of Kubernetes are valid.

tests/processes/test_slurm.py has Slurm.
"""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mdt_jax import cli, main
from mdt_jax.runtime.coordination import TOKEN
from mdt_jax.runtime.errors import UserError
from tests.conftest import ROOT
from tests.processes.cloud import POD, Cloud, executable, wait_for
from tests.runs import LONG, lines_of, steps_of

LAUNCH = ROOT / "launch"
SCRIPTS = [path for path in sorted(LAUNCH.rglob("*")) if path.suffix in (".sh", ".sbatch")]
GUIDES = sorted(LAUNCH.rglob("README.md"))
RUN = str(LAUNCH / "run.sh")
PAGE = ROOT / "docs" / "tpu-pods.md"
PROJECT = "/path/to/mdt_jax"  # on the pages
COMMANDS = ["encode", "sample", "evaluate", "inpaint", "convert", "info"]
MODULES = {"train": main} | {name: importlib.import_module(f"mdt_jax.{name}") for name in COMMANDS}


class Started(Exception):
    """Instead of the start of processes and devices."""


def test_shellcheck():
    assert {path.name for path in SCRIPTS} == {"run.sh", "job.sbatch", "pod.sh"}
    program = shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    done = subprocess.run([program, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(os.access(path, os.X_OK) for path in SCRIPTS if path.suffix == ".sh")


# The wrapper.


def stand_in(folder: pathlib.Path, behaviour: str) -> str:
    """An interpreter of which only the exit code matters."""
    return str(executable(folder / "python", f"#!/usr/bin/env bash\n{behaviour}\n"))


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("exit 0", 0),
        ("exit 75", 75),
        ("exit 2", 2),
        ("exit 143", 75),
        ("kill -TERM $$", 75),
        ("kill -KILL $$", 137),
        ("exit 134", 134),
    ],
)
def test_exit_codes(behaviour, code, tmp_path):
    environment = {**os.environ, "PYTHON": stand_in(tmp_path, behaviour)}
    done = subprocess.run([RUN, "--config=a.py"], env=environment, timeout=60)
    assert done.returncode == code


def test_unknown_command():
    done = subprocess.run([RUN, "smaple"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: smaple is none of train, encode, sample" in done.stderr


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ([], ["mdt_jax.main", "--stopped_exit_code=75"]),
        (["train"], ["mdt_jax.main", "--stopped_exit_code=75"]),
        *[([name], [f"mdt_jax.{name}"]) for name in COMMANDS],
    ],
)
def test_flags_and_launcher_are_passed_on(command, module, tmp_path):
    launcher = executable(tmp_path / "launcher", '#!/bin/bash\nprintf "%s|" "$@"\n')
    environment = {**os.environ, "LAUNCHER": f"{launcher} -n2", "PYTHON": "py"}
    flags = ["--config=a b.py", f"--workdir={tmp_path}", "--config.x='1'"]
    done = subprocess.run([RUN, *command, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == "|".join(["-n2", "py", "-m", *module, *flags, ""])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_however_many_come(number, tmp_path):
    """The child ends in its own time; the wrapper waits for it."""
    python = stand_in(
        tmp_path,
        f"trap 'echo told >> {tmp_path}/told' TERM\ntouch {tmp_path}/ready\n"
        f"until [[ -e {tmp_path}/leave ]]; do sleep 0.1; done; exit 75",
    )
    process = subprocess.Popen(
        [RUN, f"--workdir={tmp_path}"], env={**os.environ, "PYTHON": python},
    )  # fmt: skip
    wait_for((tmp_path / "ready").exists, "the child")
    told = tmp_path / "told"
    for times in (1, 2):
        process.send_signal(number)
        wait_for(lambda n=times: told.exists() and told.read_text() == "told\n" * n, "the signal")
    assert process.poll() is None
    (tmp_path / "leave").touch()
    assert process.wait(timeout=30) == 75


def test_real_run_stopped_and_going_on(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [RUN, *LONG, "--config.train.steps=100", f"--workdir={tmp_path}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(lines_of(tmp_path)) > 10, "step 10", 200)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=100)
    assert process.returncode == 75 and "saved" in printed, printed
    assert len(steps_of(tmp_path)) < 100 and not (tmp_path / "report.json").exists()

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path) == list(range(1, 101)) and (tmp_path / "report.json").exists()


# Kubernetes.


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))


def check_pods(job: dict) -> dict:
    """What has to hold for any job that trains; returns its container."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] > 1
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    rules = spec["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert rules[0]["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [75]
    }  # fmt: skip
    rights = pod["securityContext"]
    assert rights["runAsNonRoot"] and (rights["runAsUser"], rights["runAsGroup"]) == (1000, 1000)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert not pod.get("hostNetwork")  # a NetworkPolicy would not hold
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+|[\w./-]+@sha256:\w{64}", container["image"])
    (variable,) = container["env"]
    assert variable["name"] == TOKEN and "secretKeyRef" in variable["valueFrom"]
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["serviceAccountName"] == "mdt-jax"
    mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
    assert mounts == {volume["name"] for volume in pod.get("volumes", ())} <= {"shm"}
    assert container["args"][0] == "train"
    for name in ("workdir", "config.data.path"):  # the pods share a bucket, and no disk
        assert any(flag.startswith(f"--{name}=gs://my-bucket/") for flag in container["args"])
    return container


def check_policy(policy: dict, labels: dict) -> None:
    """Only pods with these labels may reach them."""
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)
    ours = {"podSelector": {"matchLabels": labels}}
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"] == ours | {"policyTypes": ["Ingress"], "ingress": [{"from": [ours]}]}


def test_indexed_job():
    parts = {part["kind"]: part for part in documents("indexed-job-gpu.yaml")}
    for part in parts.values():
        kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)
    job, service = parts["Job"], parts["Service"]
    container = check_pods(job)
    assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
    name = job["metadata"]["name"]
    assert job["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": name}
    check_policy(parts["NetworkPolicy"], {"job-name": name})
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    account = parts["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    assert [subject["name"] for subject in parts["RoleBinding"]["subjects"]] == [account]
    assert parts["RoleBinding"]["roleRef"]["name"] == parts["Role"]["metadata"]["name"]
    allowed = {
        resource for rule in parts["Role"]["rules"] if {"get", "list"} <= set(rule["verbs"])
        for resource in rule["resources"]
    }  # fmt: skip
    assert allowed == {"pods", "services", "jobs"}


@pytest.mark.parametrize("name", ["indexed-job-gpu.yaml", "jobset-tpu.yaml"])
def test_the_readme_has_what_the_files_refer_to(name):
    """Of the clusters that a file's comments name, the README shows the account's roles."""
    clusters = set(re.findall(r"\b(?:GKE|EKS|AKS)\b", (LAUNCH / "kubernetes" / name).read_text()))
    readme = (LAUNCH / "kubernetes" / "README.md").read_text()
    buckets = readme.partition("## Buckets\n")[2].partition("\n## ")[0]
    assert clusters and all(cluster in buckets for cluster in clusters)


def test_jobset():
    """Its own schema is not at hand offline; the job inside it is one of Kubernetes."""
    account, policy, jobset = documents("jobset-tpu.yaml")
    kubernetes_validate.validate(account, kubernetes_validate.latest_version(), strict=True)
    assert (account["kind"], account["metadata"]["name"]) == ("ServiceAccount", "mdt-jax")
    name = jobset["metadata"]["name"]
    check_policy(policy, {"jobset.sigs.k8s.io/jobset-name": name})
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(jobset["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    assert set(jobset["spec"]["network"]) == {"enableDNSHostnames", "publishNotReadyAddresses"}
    policy = jobset["spec"]["failurePolicy"]
    assert set(policy) == {"maxRestarts", "rules"} and policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"} and replicated["replicas"] == 1
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
    job |= replicated["template"]
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    container = check_pods(job)
    # One pod that fails or is stopped must end the job, so that all are started together.
    assert job["spec"]["backoffLimit"] == 0
    assert {rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]} == {"FailJob"}
    selector = job["spec"]["template"]["spec"]["nodeSelector"]
    chips = 1
    for side in selector["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert chips == container["resources"]["limits"]["google.com/tpu"] * job["spec"]["parallelism"]


COMMAND = re.compile(r"(?:pod\.sh (?:run|watch)|job\.sbatch|run\.sh|-m mdt_jax\.main) (.*)")


def commands() -> list[list[str]]:
    """A command and its flags, for every one that the pages and files launch."""
    found = []
    for page in [*GUIDES, PAGE]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in COMMAND.findall(block.replace("\\\n", " ")):
                line = line.replace("$BUCKET", "gs://my-bucket").replace(PROJECT, str(ROOT))
                words = shlex.split(line)
                found.append(words if words[0] in MODULES else ["train", *words])
    for name in ("indexed-job-gpu.yaml", "jobset-tpu.yaml"):
        for part in documents(name):
            text = json.dumps(part)
            if '"args"' in text:
                found.append(json.loads(re.search(r'"args": (\[.*?\])', text)[1]))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_lines(words, gcs, monkeypatch, keep_signals, tmp_path):
    """Each ends where the first process or device would be started.

    Those with the project's full path are called in another folder.
    """
    command, *flags = (word.replace("gs://my-bucket", gcs.root) for word in words)
    module = MODULES[command]
    monkeypatch.chdir(tmp_path if str(ROOT) in " ".join(words) else ROOT)

    def start(*_, **__):
        raise Started

    monkeypatch.setattr(cli, "start", start)
    with pytest.raises(Started):
        module.main([command, *flags])
    with pytest.raises(UserError, match="unknown flag --no_such"):
        module.main([command, *flags, "--no_such=1"])


def test_every_way_has_a_command():
    names = [command for command, *_ in commands()]
    assert names.count("train") >= 8
    assert {"train", "encode", "sample", "evaluate"} <= set(names)


def test_links_lead_somewhere():
    assert {guide.parent.name for guide in GUIDES} == {
        "launch",
        "slurm",
        "tpu",
        "kubernetes",
        "space",
    }
    for guide in GUIDES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", guide.read_text()):
            assert (guide.parent / target).exists(), f"{guide}: {target}"


# The container.


def test_dockerfile():
    text = (LAUNCH / "Dockerfile").read_text()
    sources = [
        name for line in re.findall(r"^COPY (.*)$", text, re.M) for name in line.split()[:-1]
    ]
    assert {"setup.py", "pyproject.toml", "configs", "mdt_jax", "launch/run.sh"} <= set(sources)
    let_in = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert sorted(let_in) == sorted(set(sources) - {"mdt_jax/__init__.py"})
    assert all((ROOT / name).exists() for name in sources)
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1]) == ["/mdt_jax/launch/run.sh"]
    assert "WORKDIR /mdt_jax\n" in text

    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.search(r"^ARG EXTRAS=(.*)$", text, re.M)[1].split(","))
    guide = (LAUNCH / "kubernetes" / "README.md").read_text()
    for more in re.findall(r"EXTRAS=([\w,]+)", guide):
        extras |= set(more.split(","))
    assert extras == {"cuda", "tpu", "k8s", "data", "gcs", "parquet"}
    assert extras <= set(given["optional-dependencies"])
    assert re.search(r"pip install [^\n]*\.\[\$\{EXTRAS\}\]", text)


def test_the_container_is_not_root():
    """By number, which Kubernetes can tell from root's; nothing after it needs root."""
    text = (LAUNCH / "Dockerfile").read_text()
    user = re.search(r"^USER (\d+):(\d+)$", text, re.M)
    assert user and user.groups() == ("1000", "1000")
    assert re.findall(r"^[A-Z]+", text[user.end() :], re.M) == ["ENTRYPOINT"]


def test_what_is_installed_is_pinned():
    """The base image by its full version, and all packages that the extras bring."""
    text = (LAUNCH / "Dockerfile").read_text()
    base = re.search(r"^ARG BASE=(.*)$", text, re.M)[1]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) and "FROM ${BASE}\n" in text
    assert base in (LAUNCH / "README.md").read_text()
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = given["optional-dependencies"]
    names = ("cuda", "tpu", "k8s", "data", "gcs", "parquet")
    for line in sum((extras[name] for name in names), given["dependencies"]):
        requirement = Requirement(line)
        assert Version(pins[canonicalize_name(requirement.name)]) in requirement.specifier, line
    for path in (LAUNCH / "Dockerfile", LAUNCH / "tpu" / "pod.sh"):
        assert "--constraint launch/constraints.txt" in path.read_text()


def test_that_ports_belong_on_a_private_network_is_said():
    for guide in (guide for guide in GUIDES if guide.parent.name != "space"):
        assert "belong on a private network" in " ".join(guide.read_text().split()), guide


class SlurmJob:
    """A job as Slurm runs it: a copy of the script, in the folder where sbatch was called."""

    def __init__(self, folder: pathlib.Path, code: int = 0):
        self.folder = folder
        srun = f'echo "$*" >> {folder}/tasks; echo "${TOKEN} $PYTHONPATH" >> {folder}/seen'
        executable(folder / "srun", f"#!/bin/bash\n{srun}\nexit {code}\n")
        original = LAUNCH / "slurm" / "job.sbatch"
        executable(
            folder / "scontrol",
            f"""#!/bin/bash
echo "$*" >> {folder}/scontrol.calls
[[ $1 == show ]] && printf '   JobState=RUNNING\\n   Command={original} sample --x=1\\n'
""",
        )
        shutil.copy(original, folder / "slurm_script")

    def run(self, *flags: str, expect: int = 0, **more: str) -> str:
        own = {"SLURM_JOB_ID": "7", "PYTHONPATH": "mine", "PYTHON": "py"}
        path = f"{self.folder}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **own, **more}
        done = subprocess.run(
            ["bash", self.folder / "slurm_script", *flags], cwd=self.folder, env=environment,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == expect, done.stderr
        return done.stderr


def test_a_slurm_job_is_submitted_from_anywhere(tmp_path):
    job = SlurmJob(tmp_path)
    job.run("sample", "--out=a b.npz")
    assert (tmp_path / "tasks").read_text() == "py -m mdt_jax.sample --out=a b.npz\n"
    assert (tmp_path / "seen").read_text().split()[1] == f"{ROOT}:mine"
    assert (tmp_path / "scontrol.calls").read_text() == "show job 7\n"
    job.run(MDT_JAX_ROOT=str(ROOT))
    assert (tmp_path / "scontrol.calls").read_text() == "show job 7\n"
    assert "set MDT_JAX_ROOT" in job.run(MDT_JAX_ROOT="/nowhere", expect=2)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (143, True), (2, False)])
def test_a_slurm_job_that_was_stopped_is_requeued(code, requeued, tmp_path):
    SlurmJob(tmp_path, code).run("encode", expect=75 if requeued else code)
    calls = (tmp_path / "scontrol.calls").read_text().splitlines()
    assert calls == ["show job 7", *["requeue 7"] * requeued]


def test_a_slurm_job_has_a_token_of_its_own(tmp_path):
    """New each time, unless one is given; srun hands it to the tasks."""
    job = SlurmJob(tmp_path)
    for more in ({}, {}, {TOKEN: "mine"}):
        job.run(**more)
    lines = (tmp_path / "seen").read_text().splitlines()
    first, second, third = (line.split()[0] for line in lines)
    assert re.fullmatch("[0-9a-f]{32}", first) and first != second and third == "mine"


# The TPU pod, on a stand-in for Google Cloud.


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.close()


def test_pod_step_by_step(cloud):
    cloud.pod("create")
    create = cloud.calls()[0]
    assert create == [
        "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod",
        "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite",
        "--scopes=https://www.googleapis.com/auth/cloud-platform", "--service-account=mdt@project",
        "--spot", "--valid-until-duration=6h", "--labels=run=xl2", "--zone=zone",
        "--project=project",
    ]  # fmt: skip
    for machine in "01":
        home = cloud.folder / machine
        assert (home / "set-up").exists() and (home / "mdt_jax" / "launch" / "run.sh").exists()
    ran = (cloud.folder / "ran").read_text().splitlines()
    assert [line for line in ran if "[tpu,data,gcs,parquet]" in line]

    cloud.pod("run", *cloud.command)
    wait_for(lambda: len(cloud.trained()) == 2, "two machines")
    expected = " ".join(["-m mdt_jax.main --stopped_exit_code=75", *cloud.command[1:]])
    assert cloud.trained() == [f"0 {expected}", f"1 {expected}"]
    assert len(cloud.tokens()) == 1
    assert "a command is running already" in cloud.pod("run", *cloud.command, expect=1)
    cloud.pod("stop")
    wait_for(lambda: cloud.exit_codes() == ["75", "75"], "the machines to stop")
    cloud.pod("stop")  # which now has nothing to do
    cloud.pod("run", *cloud.command)
    (cloud.folder / "finish").touch()
    wait_for(lambda: cloud.exit_codes() == ["0", "0"], "the end")
    assert len(cloud.tokens()) == 2  # of each start one
    cloud.pod("delete")
    assert not (cloud.folder / "state").exists()

    cloud.check_calls()
    for call in cloud.calls():
        assert call[:2] == ["compute", "tpus"] and {"--zone=zone", "--project=project"} <= set(call)


def test_the_page_on_tpu_pods(cloud):
    """Its commands in order, but for what never ends and what tests/docs/test_pages.py runs."""
    (cloud.folder / "finish").touch()
    script = ["set -e"]
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S):
        lines = block.replace("\\\n", " ").splitlines()
        script += [line for line in lines if not re.search(r"pod\.sh logs|^python -m", line)]
    for name in ("CREATE_FLAGS", "SSH_FLAGS", "ACCELERATOR", "ZONE", "PROJECT", "SERVICE_ACCOUNT"):
        cloud.environment.pop(name)
    done = subprocess.run(["bash", "-c", "\n".join(script)], cwd=ROOT, env=cloud.environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cloud.check_calls()
    ran = (cloud.folder / "ran").read_text().splitlines()
    started = [line.split()[2] for line in ran if line.startswith("0 -m mdt_jax.")]
    assert started == [f"mdt_jax.{name}" for name in ("encode", "main", "sample", "evaluate")]
    assert not (cloud.folder / "state").exists()  # the page ends without a pod that costs money
    accounts = {a for call in cloud.calls() for a in call if a.startswith("--service-account=")}
    assert accounts == {"--service-account=mdt-jax@my-project.iam.gserviceaccount.com"}


@contextlib.contextmanager
def watching(cloud):
    """A process of `watch`, which writes to the file `said`."""
    with open(cloud.folder / "said", "w") as said:
        process = subprocess.Popen(
            [POD, "watch", *cloud.command],
            cwd=ROOT,
            env=cloud.environment,
            stdout=said,
            stderr=said,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_pod_watch_goes_on_after_a_preemption(cloud):
    with watching(cloud) as process:
        wait_for(lambda: len(cloud.trained()) == 2, "the first start")
        cloud.pod("stop")  # as maintenance may; the pod stays
        wait_for(lambda: len(cloud.trained()) == 4, "the second start")
        cloud.pod("stop")
        (cloud.folder / "state").write_text("SUSPENDED")
        wait_for(lambda: len(cloud.trained()) == 6, "the start on a new pod")
        assert process.poll() is None
        (cloud.folder / "finish").touch()
        assert process.wait(timeout=60) == 0
    made = [call[3] for call in cloud.calls() if call[2] == "queued-resources"]
    assert [name for name in made if name != "describe"] == ["create", "delete", "create"]


def test_pod_watch_takes_no_other_command_for_its_own(cloud):
    (cloud.folder / "finish").touch()
    cloud.pod("watch", *cloud.command)
    cloud.pod("watch", *cloud.command)  # is finished
    assert len(cloud.trained()) == 2
    cloud.pod("watch", "sample", "--out=x")
    assert "0 -m mdt_jax.sample --out=x" in (cloud.folder / "ran").read_text()
    assert [call[3] for call in cloud.calls()].count("create") == 1


def test_pod_watch_gives_up_on_a_run_that_fails(cloud):
    (cloud.folder / "fail").touch()
    assert "train failed with exit code 2" in cloud.pod("watch", *cloud.command, expect=1)
    assert len(cloud.trained()) == 8  # the first time and three more


def test_pod_watch_forgets_failures_after_a_long_run(cloud):
    """Three failures, ten checks that find the command running, and one more failure."""
    cloud.environment["PERIOD"] = "0.05"
    said, failure = cloud.folder / "said", cloud.folder / "fail-once-0"
    with watching(cloud) as process:
        for starts in (1, 2, 3):
            wait_for(lambda n=2 * starts: len(cloud.trained()) == n, f"start {starts}")
            failure.touch()
        wait_for(lambda: len(cloud.trained()) == 8, "start 4")
        last = "pod: 2\n"
        wait_for(
            lambda: said.read_text().rpartition(last)[2].count("pod: running\n") > 10,
            "ten checks that find the command running",
        )
        failure.touch()
        wait_for(lambda: len(cloud.trained()) == 10, "start 5")
        (cloud.folder / "finish").touch()
        assert process.wait(timeout=60) == 0
    assert said.read_text().count(last) == 4


def test_pod_watch_waits_while_gcloud_cannot_tell_the_state(cloud):
    """It creates no pod then, and shows what gcloud says."""
    (cloud.folder / "finish").touch()
    (cloud.folder / "unavailable").touch()
    said = cloud.folder / "said"
    with watching(cloud) as process:
        wait_for(lambda: said.read_text().count("UNAVAILABLE: The service") >= 3, "three checks")
        assert said.read_text().count("pod: state unknown\n") >= 2
        assert {call[3] for call in cloud.calls()} == {"describe"}
        (cloud.folder / "unavailable").unlink()
        assert process.wait(timeout=60) == 0
    assert len(cloud.trained()) == 2


def test_pod_create_fails_while_gcloud_cannot_tell_the_state(cloud):
    (cloud.folder / "unavailable").touch()
    assert "UNAVAILABLE: The service" in cloud.pod("create", expect=1)
    assert [call[3] for call in cloud.calls()] == ["create", "describe"]


@pytest.mark.parametrize("name", COMMANDS)
def test_pod_runs_every_command(cloud, name):
    """On all machines; on the first, without a TPU, what needs none."""
    cloud.pod("create")
    cloud.pod("run", name, "--flag=it's")
    machines = "0" if name in ("convert", "info") else "01"
    wait_for(lambda: len(cloud.exit_codes()) == len(machines), "the end")
    assert cloud.exit_codes() == ["0"] * len(machines)
    lines = (cloud.folder / "ran").read_text().splitlines()
    expected = [f"{machine} -m mdt_jax.{name} --flag=it's" for machine in machines]
    assert sorted(line for line in lines if "-m mdt_jax." in line) == expected
    platforms = (cloud.folder / "platforms").read_text().split()
    assert platforms == (["cpu"] if machines == "0" else ["tpu", "tpu"])


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-32", "v2-alpha-tpuv5"),
     ("v6e-16", "v2-alpha-tpuv6e"), ("v4-32", "")],
)  # fmt: skip
def test_pod_knows_the_software_of_its_accelerator(cloud, accelerator, version):
    cloud.environment["ACCELERATOR"] = accelerator
    if not version:
        assert "RUNTIME_VERSION: is not set" in cloud.pod("create", expect=1)
        cloud.environment["RUNTIME_VERSION"] = version = "mine"
    cloud.pod("create")
    assert f"--runtime-version={version}" in cloud.calls()[0]


def test_pod_asks_for_a_key(cloud):
    (cloud.folder / "no-key").touch()
    for subcommand in ("create", "install", "run", "stop", "watch"):
        assert "error: no SSH agent holds a key" in cloud.pod(subcommand, expect=1)
    assert not (cloud.folder / "calls").exists()


def test_pod_explains_itself():
    done = subprocess.run([POD], env={**os.environ, "ZONE": "z"}, capture_output=True, text=True)
    assert done.returncode == 2 and "watch COMMAND FLAGS" in done.stderr
