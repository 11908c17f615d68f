import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax import cli, main
from tests.conftest import (
    ROOT,
    SMOKE,
    XLA_FLAGS,
    exits_with_one_line,
    run_command,
    start_command,
    train_here,
)

LONG = [*SMOKE, "--config.train.steps=400", "--config.train.checkpoint_every=20",
        "--config.train.sample_every=0", "--config.sample.num_samples=0"]  # fmt: skip


def steps_of(workdir: pathlib.Path) -> list[int]:
    path = workdir / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def arrays(workdir: pathlib.Path, item: str) -> list[np.ndarray]:
    """The bits of one item of the newest checkpoint, read with Orbax alone."""
    import orbax.checkpoint as ocp

    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    folder = workdir / "checkpoints" / str(newest) / item
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        whole = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return jax.tree.leaves(checkpointer.restore(folder, whole))


def assert_same_run(workdir, reference):
    for item in ("params", "ema", "progress"):
        for a, b in zip(arrays(workdir, item), arrays(reference, item), strict=True):
            np.testing.assert_array_equal(a, b)
    assert steps_of(workdir) == list(range(1, 401))
    for name in ("loss", "grad_norm"):
        values = [
            [json.loads(line)[name] for line in (w / "metrics.jsonl").read_text().splitlines()]
            for w in (workdir, reference)
        ]
        assert values[0] == values[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_command("mdt_jax.main", *LONG, f"--workdir={workdir}")
    return workdir


def lines_of(workdir) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def kill_after(workdir, steps: int, number: signal.Signals, seconds: float = 0.0):
    """Start the long run and send a signal once it has logged `steps` steps."""
    assert len(lines_of(workdir)) < steps, "an earlier run has got as far"
    process = start_command("mdt_jax.main", *LONG, f"--workdir={workdir}")
    deadline = time.time() + 200
    while len(lines_of(workdir)) < steps:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    return process.returncode, out + err


def test_killed_twice_ends_with_the_same_bits(undisturbed, tmp_path):
    random_ = random.SystemRandom()
    moments = random_.randint(5, 80), random_.randint(180, 280)
    print("killed after steps", moments)  # shown when the test fails
    workdir = tmp_path / "run"
    for moment in moments:
        code, _ = kill_after(workdir, moment, signal.SIGKILL, random_.random() / 20)
        assert code == -signal.SIGKILL
    printed = run_command("mdt_jax.main", *LONG, f"--workdir={workdir}")
    assert "going on from step" in printed
    assert_same_run(workdir, undisturbed)


def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    code, printed = kill_after(workdir, 33, signal.SIGTERM)
    assert code == 0, printed
    stopped = int(re.search(r"stopped at step (\d+), saved", printed)[1])
    assert 33 <= stopped < 400 and (workdir / "checkpoints" / str(stopped)).is_dir()
    assert steps_of(workdir) == list(range(1, stopped + 1))
    assert not (workdir / "report.json").exists()
    printed = run_command("mdt_jax.main", *LONG, f"--workdir={workdir}")
    assert f"going on from step {stopped}" in printed
    assert_same_run(workdir, undisturbed)


def test_a_finished_run(trained):
    steps = [line["step"] for line in map(json.loads, (trained / "metrics.jsonl").open())]
    assert steps == [1, 2, 3, 4]
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    for part in ("mse/full", "vb/full", "mse/masked", "vb/masked"):
        assert {f"{part}{q}" for q in ("", "/q1", "/q2", "/q3", "/q4")} <= set(line)
    assert {"loss", "loss/full", "loss/masked", "grad_norm", "skipped", "seconds"} <= set(line)
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["2", "4"]
    assert sorted(p.name for p in (trained / "samples").iterdir()) == ["0000002.png", "0000004.png"]
    assert {p.name for p in trained.iterdir()} == {
        "checkpoints", "classes.json", "config.json", "metrics.jsonl", "report.json", "samples",
        "samples.npz", "samples.png",
    }  # fmt: skip
    assert json.loads((trained / "classes.json").read_text()) == list("0123456789")
    report = json.loads((trained / "report.json").read_text())
    assert report["steps"] == 4 and report["num_samples"] == 20 and report["skipped"] == 0
    assert 0.95 < report["classifier_accuracy"] <= 1 and 0 <= report["class_agreement"] <= 1
    assert report["frechet_distance"] > report["frechet_distance_real"] > 0
    for name in ("seconds", "compile_seconds", "images_per_second"):
        assert report[name] > 0
    saved = np.load(trained / "samples.npz")
    assert saved["arr_0"].shape == (20, 8, 8, 1) and saved["arr_0"].dtype == np.uint8
    assert np.bincount(saved["arr_1"]).tolist() == [2] * 10
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["hidden_size"] == 16 and config["train"]["steps"] == 4


@pytest.fixture
def copy(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "copy"))


def test_steps_stop_and_can_be_raised(copy):
    before = (copy / "report.json").read_text()
    printed = train_here(*SMOKE, f"--workdir={copy}")
    assert "trained to step 4" in printed and (copy / "report.json").read_text() == before

    more = [*SMOKE, f"--workdir={copy}", "--config.train.steps=6", "--config.optim.clip_norm=1"]
    printed = train_here(*more)
    assert "train.steps changed from 4 to 6" in printed and "going on from step 4" in printed
    assert steps_of(copy) == [1, 2, 3, 4, 5, 6]
    assert json.loads((copy / "report.json").read_text())["steps"] == 6

    # Nothing is left to train, but the report asked for is another one.
    printed = train_here(*more, "--config.sample.num_samples=30")
    report = json.loads((copy / "report.json").read_text())
    assert (report["steps"], report["num_samples"]) == (6, 30)
    assert len(np.load(copy / "samples.npz")["arr_0"]) == 30


def test_a_run_from_before_a_field_existed_goes_on(copy):
    """Fields that came later take their defaults; the optimiser is part of what must fit."""
    for meta in copy.glob("checkpoints/*/meta/metadata"):
        stored = json.loads(meta.read_text())
        for field in ("version", "side_layers", "relative_bias"):
            del stored["config"]["model"][field]
        del stored["config"]["vae"], stored["config"]["optim"]["name"], stored["format"]
        del stored["config"]["mesh"], stored["config"]["train"]["accumulate"]
        stored["config"]["train"]["remat"] = False
        meta.write_text(json.dumps(stored))
    assert mdt_jax.load(copy)[0].hidden_size == 16
    argv = [*SMOKE, f"--workdir={copy}", "--config.train.steps=6"]
    printed = train_here(*argv, "--config.optim.name=adan", expect=2)
    assert "another model or optimiser (optim.name is adamw, not adan)" in printed
    assert "going on from step 4" in train_here(*argv)


def empty(checkpoints):
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()


def rename(checkpoints):
    for folder in list(checkpoints.iterdir()):
        folder.rename(f"{folder}.bak")


def replace_by_file(checkpoints):
    shutil.rmtree(checkpoints)
    checkpoints.touch()


@pytest.mark.parametrize("damage", [shutil.rmtree, empty, rename, replace_by_file])
@pytest.mark.parametrize("reported", [True, False])
def test_a_run_without_its_checkpoints_does_not_start_anew(
    copy, damage, reported, capsys, monkeypatch, in_root, keep_signals
):
    damage(copy / "checkpoints")
    if not reported:
        (copy / "report.json").unlink()
        with open(copy / "metrics.jsonl", "a") as file:
            file.write('{"step": 5}\n')
    before = (copy / "metrics.jsonl").read_text()
    argv = [*SMOKE, f"--workdir={copy}"]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "but no checkpoint" in printed or "should be the folder" in printed
    assert (copy / "metrics.jsonl").read_text() == before


def test_metrics_damaged_by_hand(copy, capsys, monkeypatch, in_root, keep_signals):
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text("what?\n" + text)
    argv = [*SMOKE, f"--workdir={copy}", "--config.train.steps=6"]
    monkeypatch.setattr("sys.argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        cli.run(main.main)
    assert exit_.value.code == 2
    assert "metrics.jsonl, line 1 is no line of metrics" in capsys.readouterr().err


def compilations(*arguments: str) -> int:
    """How often a run compiled its step, counted in JAX's own compile log."""
    printed = run_command("mdt_jax.main", *arguments, JAX_LOG_COMPILES="1")
    finished = re.findall(r"Finished XLA compilation of jit\(step_with_draws\)", printed)
    assert len(finished) == len(re.findall(r"Compiling jit\(step_with_draws\)", printed))
    return len(finished)


def test_the_step_compiles_once(tmp_path):
    """Over a run with a checkpoint and a sample grid inside."""
    workdir = f"--workdir={tmp_path / 'run'}"
    assert compilations(*SMOKE, workdir, "--config.train.steps=8") == 1


def test_the_step_compiles_once_while_the_kept_length_changes(tmp_path):
    """200 steps of MDTv2, whose mask ratio is drawn for each."""
    workdir = tmp_path / "run"
    assert compilations(
        "--config=configs/v2_s2.py:smoke", f"--workdir={workdir}", "--config.train.steps=200",
        "--config.train.sample_every=0", "--config.train.checkpoint_every=100",
    ) == 1  # fmt: skip
    assert steps_of(workdir) == list(range(1, 201))
    kept = [json.loads(line)["kept"] for line in lines_of(workdir)]
    assert set(kept) == {8, 9, 10, 11}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_other_way_of_training_at_once(version, tmp_path):
    """Unconditional, mirrored, clipped, in bfloat16, with activations recomputed."""
    workdir = tmp_path / "run"
    train_here(*SMOKE, f"--config.model.version={version}", f"--workdir={workdir}",
        "--config.model.num_classes=0", "--config.mask.ratio_max=0.5",
        "--config.sample.guidance_scale=1", "--config.data.flip=True", "--config.optim.clip_norm=1",
        "--config.train.dtype=bfloat16", "--config.train.remat=full", "--config.train.accumulate=2",
    )  # fmt: skip
    report = json.loads((workdir / "report.json").read_text())
    assert report["skipped"] == 0 and np.isfinite(report["frechet_distance"])
    assert "class_agreement" not in report


def test_eight_devices_train_as_one(trained, tmp_path):
    workdir = tmp_path / "run"
    run_command(
        "mdt_jax.main", *SMOKE, f"--workdir={workdir}", "--config.sample.num_samples=0",
        "--config.train.sample_every=0",
        XLA_FLAGS=f"{XLA_FLAGS} --xla_force_host_platform_device_count=8",
    )  # fmt: skip
    one, eight = (
        [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
        for w in (trained, workdir)
    )
    for name in ("loss", "grad_norm", "mse/full", "mse/masked"):
        np.testing.assert_allclose(
            [line[name] for line in eight], [line[name] for line in one], rtol=1e-5
        )


def test_a_loss_that_is_not_finite_stops_the_run(copy):
    """Step 5 still is finite, but spoils the parameters: no checkpoint after it is kept."""
    broken = [*SMOKE, f"--workdir={copy}", "--config.train.steps=12", "--config.optim.lr=1e30",
              "--config.train.max_skipped=5"]  # fmt: skip
    printed = train_here(*broken, expect=2)
    assert "not finite 5 steps in a row, up to step 10" in printed and "Traceback" not in printed
    assert f"the last good checkpoint is {copy}/checkpoints/4:" in printed
    lines = [json.loads(line) for line in lines_of(copy)]
    assert lines[-1]["skipped_in_row"] == 5 and lines[-1]["loss"] is None
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4"]
    train_here(*SMOKE, f"--workdir={copy}", "--config.train.steps=6")
    assert steps_of(copy) == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines_of(copy))


def test_checkpoints_keep_k(tmp_path):
    workdir = tmp_path / "run"
    train_here(*SMOKE, f"--workdir={workdir}", "--config.train.checkpoint_every=1",
        "--config.train.keep=2", "--config.sample.num_samples=0",
    )  # fmt: skip
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "4"]
    assert mdt_jax.load(workdir)[0].hidden_size == 16


def test_compiled_programs_are_kept_for_the_next_time(tmp_path):
    code = """
import jax
from mdt_jax import cli
cli.keep_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.jit(lambda x: x + 1)(1)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    assert any((tmp_path / "mdt_jax" / "xla").iterdir())
