"""Real processes of one run over jax.distributed, on this machine: together, and when some fail."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.conftest import ROOT, run_command, start_command, train_here
from tests.processes.together import all_well, ends, free_port, start_hosts
from tests.runs import arrays, steps_of
from tests.small_data import write_parquet, write_pictures, write_vae

# Wide enough that the stacks of blocks are split over `fsdp`.
RUN = [
    "--config=configs/digits.py:smoke", "--config.model.hidden_size=64", "--config.train.steps=8",
    "--config.train.checkpoint_every=4", "--config.train.sample_every=8",
]  # fmt: skip
PATIENCE = 15


def start_run(count: int, workdir, *flags: str, without: int = -1) -> list[subprocess.Popen]:
    """The processes of a run; in flags, @ is each one's number."""
    host = f"127.0.0.1:{free_port()}"
    return [
        start_command(
            "mdt_jax.main", f"--distributed={host}", f"--num_processes={count}",
            f"--process_id={number}", f"--patience={PATIENCE}", *RUN,
            *(flag.replace("@", str(number)) for flag in (f"--workdir={workdir}", *flags)),
        )
        for number in range(count) if number != without
    ]  # fmt: skip


def log_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for_steps(workdir, steps: int, process) -> None:
    until = time.time() + 450
    while len(steps_of(workdir)) < steps:
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(0.01)


def same_losses(workdir, other) -> None:
    for name in ("loss", "grad_norm", "mse/masked"):
        got, wanted = ([line[name] for line in log_of(w)] for w in (workdir, other))
        np.testing.assert_allclose(got, wanted, rtol=2e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """The run by one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train_here(*RUN, f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The run by four processes, two of which share the parameters at a time; what it printed."""
    workdir = tmp_path_factory.mktemp("four") / "run"
    return workdir, all_well(start_run(4, workdir, "--config.mesh.fsdp=2"))


def test_four_processes_train_as_one(alone, four):
    workdir, printed = four
    assert steps_of(workdir) == list(range(1, 9))
    same_losses(workdir, alone)
    for number in range(4):
        assert len(re.findall(rf"process {number} on .+: 1 × cpu", printed)) == 1
    for name in ("samples/0000008.png", "samples.npz", "report.json", "classes.json"):
        assert (workdir / name).is_file()
    samples, wanted = (np.load(w / "samples.npz")["arr_0"] for w in (workdir, alone))
    assert np.abs(samples.astype(int) - wanted).max() <= 1


def test_two_processes_unpack_parquet_shards_and_train_as_one_on_the_folder(tmp_path):
    write_pictures(tmp_path / "folder", 40)
    write_parquet(tmp_path / "folder", tmp_path / "parquet", shards=4)
    flags = ["--config.data.batch_size=16", "--config.model.num_classes=3"]
    flags += ["--config.train.sample_every=0", "--config.sample.num_samples=0"]

    def data(name):
        return [f"--config.data.name={name}", f"--config.data.path={tmp_path / name}"]

    ended = ends(start_run(2, tmp_path / "two", *flags, *data("parquet")))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "40 images of 3 classes" in ended[0][1]
    # One that comes late finds the files there.
    assert any("unpacking the images of" in printed for _, printed in ended)
    train_here(*RUN, *flags, *data("folder"), f"--workdir={tmp_path / 'one'}")
    same_losses(tmp_path / "two", tmp_path / "one")
    names = sorted(path.name for path in (tmp_path / "parquet").iterdir())
    assert len(names) == 8 and not any(name.endswith((".tmp", ".lock")) for name in names)


def test_a_checkpoint_of_four_is_restored_by_one_and_by_two(four, tmp_path):
    workdir, _ = four
    written = sum((arrays(workdir, item) for item in ("ema", "params", "progress")), [])
    for count, fsdp in ((1, 1), (2, 2), (2, 1)):
        out = tmp_path / f"{count}-{fsdp}.npz"
        more = [*RUN, f"--config.mesh.fsdp={fsdp}"]
        all_well(start_hosts(count, "restore", str(out), str(workdir), *more))
        with np.load(out) as restored:
            bits = sorted(array.tobytes() for array in restored.values())
        assert bits == sorted(np.asarray(array).tobytes() for array in written)


def test_a_step_that_one_process_alone_cannot_read(four, tmp_path, monkeypatch):
    """All take the step before, and none waits for it."""
    monkeypatch.setenv("DAMAGED_FOR", "1")
    workdir = shutil.copytree(four[0], tmp_path / "run")
    more = [str(tmp_path / "out.npz"), str(workdir), *RUN, "--config.mesh.fsdp=2"]
    printed = all_well(start_hosts(2, "restore", *more))
    assert "going on without the damaged step 8" in printed
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]


def test_two_go_on_from_four_with_another_mesh(alone, four, tmp_path):
    """And without the newest step, of which one process's file is lost."""
    one, two = (shutil.copytree(w, tmp_path / w.parent.name) for w in (alone, four[0]))
    shutil.rmtree(next((two / "checkpoints" / "8" / "ema").glob("ocdbt.process_3")))
    more = ["--config.train.steps=11", "--config.train.accumulate=2", "--config.mesh.fsdp=1"]
    printed = all_well(start_run(2, two, *more))
    assert "going on without the damaged step 8" in printed and "resuming from step 4" in printed
    assert "mesh.fsdp changed from 2 to 1" in printed
    train_here(*RUN, *more, f"--workdir={one}")
    assert steps_of(two) == list(range(1, 12))
    same_losses(two, one)


def test_one_of_four_is_killed_and_the_same_command_goes_on(four, tmp_path):
    workdir, flags = tmp_path / "run", ["--config.mesh.fsdp=2"]
    processes = start_run(4, workdir, *flags)
    wait_for_steps(workdir, 6, processes[0])
    processes[2].send_signal(signal.SIGKILL)
    killed = time.time()
    ended = ends(processes, timeout=120)
    assert time.time() - killed < 120
    assert [code for code, _ in ended] == [2, 2, -signal.SIGKILL, 2], ended
    for number in (0, 1, 3):
        assert re.search(rf"error: process {number}: process 2 did not answer", ended[number][1])
    flags += ["--config.train.sample_every=0", "--config.sample.num_samples=0"]  # compared: bits
    printed = all_well(start_run(4, workdir, *flags))
    assert re.search("resuming from step [48]", printed)
    assert steps_of(workdir) == list(range(1, 9))
    for item in ("params", "ema", "progress"):
        for a, b in zip(arrays(workdir, item), arrays(four[0], item), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 75)])
def test_one_is_told_to_stop_and_all_save_the_same_step(number, code, tmp_path):
    """Ctrl-C is passed on as SIGTERM. The exit code is the one that the flag asks for."""
    workdir = tmp_path / "run"
    processes = start_run(
        2, workdir, "--config.train.steps=100000", "--config.train.checkpoint_every=100000",
        "--config.train.sample_every=0", "--config.train.accumulate=2",
        f"--stopped_exit_code={code}",
    )  # fmt: skip
    wait_for_steps(workdir, 3, processes[0])
    processes[1].send_signal(number)
    ended = ends(processes)
    assert [each for each, _ in ended] == [code, code], ended
    assert "error" not in ended[0][1] + ended[1][1], ended
    stopped = int(re.search(r"stopped at step (\d+), saved", ended[0][1])[1])
    assert [int(p.name) for p in (workdir / "checkpoints").iterdir()] == [stopped]
    assert steps_of(workdir) == list(range(1, stopped + 1))
    assert not (workdir / "report.json").exists()


def said(count: int, workdir, *flags: str, without: int = -1) -> list[str]:
    """The last line of each process, which must all end with exit code 2 before the first step."""
    ended = ends(start_run(count, workdir, *flags, without=without))
    assert [code for code, _ in ended] == [2] * len(ended), ended
    assert not any("Traceback" in printed for _, printed in ended)
    assert not (workdir / "metrics.jsonl").exists()
    return [printed.strip().splitlines()[-1] for _, printed in ended]


def test_processes_with_different_configs(tmp_path):
    lines = said(2, tmp_path / "run", "--config.train.seed=@")
    assert all("process 0 has train.seed=0, process 1 train.seed=1" in line for line in lines)


def test_a_process_of_another_run(tmp_path, monkeypatch):
    """It comes to the coordinator's port in the place of one of ours."""
    processes, host = [], f"127.0.0.1:{free_port()}"
    for number, token in enumerate(("ours", "theirs")):
        monkeypatch.setenv("MDT_JAX_RUN_TOKEN", token)
        processes.append(start_command(
            "mdt_jax.main", *RUN, f"--distributed={host}", "--num_processes=2",
            f"--process_id={number}", f"--workdir={tmp_path / str(number)}",
        ))  # fmt: skip
    for code, printed in ends(processes, timeout=120):
        assert code == 2 and "Traceback" not in printed
        assert "was not set by a process of this run" in printed.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_processes_that_differ(alone, tmp_path):
    """Each case is refused by both before its first step, and they go on to the next one."""
    for number in (0, 1):  # the same path, but each process's own disk
        write_pictures(tmp_path / str(number) / "pictures", count=24 + number)
    trained = shutil.copytree(alone, tmp_path / "trained")
    folder = [
        "--config.data.name=folder", "--config.data.path=pictures",
        "--config.model.num_classes=0", "--config.sample.guidance_scale=1.0",
    ]  # fmt: skip
    cases = [
        (["--config.train.seed=@"], "process 0 has train.seed=0, process 1 train.seed=1"),
        (
            [f"--config.init.checkpoint={tmp_path}/other@"],
            f"process 0 has init.checkpoint={tmp_path}/other0, process 1 init.checkpoint=",
        ),
        (
            [f"--workdir={trained}", "--config.train.steps=9", "--config.mesh.fsdp=@"],
            "process 0 has mesh.fsdp=0, process 1 mesh.fsdp=1",
        ),
        (folder, "; all must read the same data"),
        (["--config.mesh.fsdp=3"], "mesh.fsdp 3 does not match the 2 devices"),
        (
            ["--config.data.batch_size=17"],
            "data.batch_size 17 is not divisible by the 2 devices",
        ),
    ]
    config = [f"--config={ROOT}/configs/digits.py:smoke", *RUN[1:], f"--workdir={tmp_path}/run"]
    runs = [[f"{tmp_path}/@", *config, *flags] for flags, _ in cases]
    (tmp_path / "cases.json").write_text(json.dumps(runs))
    for code, printed in ends(start_hosts(2, "refused", str(tmp_path / "cases.json"))):
        assert code == 0, printed
        said = [line for line in printed.splitlines() if line.startswith("refused: ")]
        for line, (flags, expected) in zip(said, cases, strict=True):
            assert expected in line, flags
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_workdir_that_is_not_shared(tmp_path):
    lines = said(2, tmp_path / "run@")
    assert all("is not one folder for all processes" in line for line in lines)


def test_a_pod_that_cannot_see_its_job(tmp_path):
    printed = run_command(
        "mdt_jax.main", *RUN, f"--workdir={tmp_path}", expect=2,
        KUBERNETES_SERVICE_HOST="127.0.0.1", JOB_COMPLETION_INDEX="1", PYTHONWARNINGS="ignore",
    )  # fmt: skip
    assert "could not be connected" in printed and 'pip install -e ".[k8s]"' in printed


def test_a_process_that_does_not_come(tmp_path):
    lines = said(3, tmp_path / "run", "--start_timeout=12", without=1)
    assert all("process 1 of 3 did not connect within 12 s" in line for line in lines), lines


def test_a_coordinator_that_does_not_answer(tmp_path):
    lines = said(2, tmp_path / "run", "--start_timeout=6", without=0)
    assert re.search(r"process 0 at 127.0.0.1:\d+, did not answer within 6 s", lines[0])


def test_slurm_is_found_by_itself(tmp_path):
    """As srun sets it for two tasks, of which one does not come."""
    printed = run_command(
        "mdt_jax.main", *RUN, f"--workdir={tmp_path}", "--start_timeout=5", expect=2,
        SLURM_JOB_ID="7", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2", SLURM_PROCID="0",
        SLURM_LOCALID="0", SLURM_STEP_NUM_NODES="1",
    )  # fmt: skip
    assert "process 1 of 2 did not connect within 5 s" in printed


def test_two_processes_encode_images_while_they_train(tmp_path):
    """The VAE's parameters and each batch are placed inside the loop's transfer guard."""
    write_pictures(tmp_path / "pictures")
    write_vae(tmp_path / "vae")
    flags = [
        "--config.data.name=folder", f"--config.data.path={tmp_path}/pictures",
        "--config.data.image_size=32", "--config.data.channels=3", "--config.vae.scale=1.0",
        f"--config.vae.path={tmp_path}/vae", "--config.model.num_classes=3",
        "--config.train.steps=2", "--config.train.sample_every=0", "--config.sample.num_samples=0",
    ]  # fmt: skip
    all_well(start_run(2, tmp_path / "run", *flags))
    assert steps_of(tmp_path / "run") == [1, 2]
