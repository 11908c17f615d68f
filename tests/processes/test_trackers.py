"""What shows a run, of which each package wants a process of its own."""

import json
import struct

import jax
import pytest

from tests.conftest import SMOKE, run_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tracked") / "run"
    flags = [*SMOKE, f"--workdir={workdir}", "--tensorboard", "--wandb=tests"]
    flags += ["--config.sample.num_samples=0"]
    environment = dict(WANDB_MODE="offline", WANDB_SILENT="true")
    run_command("mdt_jax.main", *flags, "--profile_steps=2:3", **environment)
    run_command("mdt_jax.main", *flags, "--config.train.steps=5", **environment)
    return workdir


def events(folder):
    """What the event files hold, read as TensorBoard does: length, its checksum, record, its."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            yield Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16


def test_tensorboard(run):
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses, pictures = {}, []
    for event in events(run / "tensorboard"):
        for value in event.summary.value:
            if value.tag == "loss":
                losses[event.step] = value.simple_value
            if value.HasField("image"):
                pictures.append(event.step)
    assert losses == {line["step"]: pytest.approx(line["loss"], rel=1e-6) for line in logged}
    assert sorted(losses) == [1, 2, 3, 4, 5] and pictures == [2, 4]


def test_wandb_goes_on_in_the_same_run(run):
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    number = (run / "wandb" / "run-id").read_text()
    assert [file.name for file in files] == [f"run-{number}.wandb"] * 2
    assert all(file.stat().st_size > 1000 for file in files)


def test_wandb_without_access_is_one_line(tmp_path):
    printed = run_command(
        "mdt_jax.main", *SMOKE, f"--workdir={tmp_path / 'run'}", "--wandb=tests", expect=2,
        WANDB_MODE="online", WANDB_API_KEY="", NETRC=str(tmp_path / "none"), HOME=str(tmp_path),
    )  # fmt: skip
    assert "error: --wandb=tests: " in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_trace_of_the_steps_asked_for(run):
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    profiler = jax.profiler.ProfileData.from_file(str(trace))
    (host,) = (plane for plane in profiler.planes if "host:cpu" in plane.name.lower())
    steps = [
        dict(event.stats)["step_num"]
        for line in host.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [2, 3]


def test_what_is_logged_of_the_speed(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        for name in ("images_per_second", "images_per_second_per_device", "tflops_per_device"):
            assert line[name] > 0
        assert line["compile_seconds"] > 0 and 0 <= line["data_wait"] <= 1
        assert 0.05 < line["memory_gb"] < 20 and "mfu" not in line  # no peak is known of a CPU
    left = [line["eta_seconds"] > 0 for line in lines]  # of four steps, and then of five
    assert left == [True, True, True, False, False]
