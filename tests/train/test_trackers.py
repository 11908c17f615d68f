"""What shows a run while it goes, from a real run; and what it is made of."""

import json
import struct
import time

import jax
import pytest

from mdt_jax import costs
from mdt_jax.errors import UserError
from mdt_jax.train.speed import Clock, Speed
from mdt_jax.train.trackers import Profile, open_trackers
from tests.conftest import SMOKE, run_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tracked") / "run"
    flags = [*SMOKE, f"--workdir={workdir}", "--tensorboard", "--wandb=tests"]
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
    assert any("host" in plane.name.lower() for plane in profiler.planes)


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


def test_speed_is_since_the_step_logged_before(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(50.0)
    speed = Speed(clock, 10, images=32, flops=10**9, peak=1e12)
    with clock.paused():
        now += 30
    with clock.waiting():
        now += 1
    now += 1
    found = speed.since(14, 24)
    assert (found["seconds"], found["data_wait"], found["eta_seconds"]) == (52, 0.5, 5)
    assert found["images_per_second"] == pytest.approx(4 * 32 / 2)
    each = 64 / jax.device_count()
    assert found["images_per_second_per_device"] == pytest.approx(each)
    assert found["mfu"] == found["tflops_per_device"] == pytest.approx(each / 1000)
    now += 3
    assert speed.since(15, 24)["data_wait"] == 0


def test_peaks_are_found_by_the_names_that_devices_have():
    names = {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-40GB": 312, "TPU v4": 275,
        "TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918, "NVIDIA L40S": 362, "NVIDIA L4": 121,
    }  # fmt: skip
    for name, tera in names.items():
        assert costs.peak_flops(name) == tera * 1e12
    for name in ("cpu", "NVIDIA RTX A1000", "NVIDIA T400"):
        assert costs.peak_flops(name) is None


@pytest.mark.parametrize("steps", ["10", "3:2", "0:3", "a:b"])
def test_steps_to_profile_that_make_no_sense(steps, tmp_path):
    with pytest.raises(UserError, match="is not such as 10:13"):
        Profile(steps, tmp_path)


@pytest.mark.parametrize(("module", "flags"), [("tensorboardX", (True, "")), ("wandb", (0, "p"))])
def test_a_package_that_is_not_there(module, flags, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=f"needs the package {module}"):
        open_trackers(tmp_path, {}, 0, *flags)
