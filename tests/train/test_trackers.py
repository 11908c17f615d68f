"""What shows a run while it goes; tests/processes/test_trackers.py has real runs."""

import json
import re
import sys
import time
import types

import jax
import numpy as np
import pytest

from mdt_jax.runtime.errors import UserError
from mdt_jax.train import costs
from mdt_jax.train.log import LATEST, Means
from mdt_jax.train.speed import Clock, Profile, Speed
from mdt_jax.train.trackers import open_trackers


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


def test_means_are_of_the_steps_that_changed_something():
    nan, means = np.float32(np.nan), Means()
    steps = (1, 4, 0, 0), (nan, 2, 1, 1), (9, 2, 2, 2), (2, nan, 2, 0)
    for step, (loss, quarter, skipped, in_row) in enumerate(steps):
        values = {"loss": loss, "mse/q1": quarter, "skipped": skipped, "skipped_in_row": in_row}
        values["learning_rate"] = 1e-4 * step
        means.add({name: np.asarray(value, np.float32) for name, value in values.items()})
    again = Means(json.loads(json.dumps(means.sums)))
    found = means.take()
    latest = {"learning_rate": 3e-4, "skipped": 2, "skipped_in_row": 0}
    assert found == {"loss": 1.5, "mse/q1": 4, **latest}
    assert again.take() == {"loss": 1.5, "mse/q1": 4} and means.sums == {}
    means.add({name: np.asarray(nan) for name in ("loss", *LATEST)})
    assert np.isnan(means.take()["loss"])


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
    with pytest.raises(UserError, match="must be FIRST:LAST, for example 10:13"):
        Profile(steps, tmp_path)


@pytest.mark.parametrize("left", [b"", b"\0" * 16, b"a/b", b"\xff\n"])
def test_a_number_of_wandb_that_a_crash_left(left, tmp_path, monkeypatch):
    started = []
    wandb = types.ModuleType("wandb")
    errors = types.ModuleType("wandb.errors")
    vars(wandb).update(Image=None, init=lambda **given: started.append(given["id"]), errors=errors)
    vars(errors).update(Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "wandb.errors", errors)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run-id").write_bytes(left)
    for _ in range(2):
        open_trackers(tmp_path, {}, 0, False, "project")
    assert started[0] == started[1] == (tmp_path / "wandb" / "run-id").read_text()
    assert re.fullmatch("[0-9a-f]{16}", started[0])


@pytest.mark.parametrize(("module", "flags"), [("tensorboardX", (True, "")), ("wandb", (0, "p"))])
def test_a_package_that_is_not_there(module, flags, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=f"needs the package {module}"):
        open_trackers(tmp_path, {}, 0, *flags)
