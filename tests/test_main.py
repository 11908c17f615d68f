import json
import pathlib
import re
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import cli, main
from mdt_jax import config as configs
from mdt_jax.runtime import interrupts
from mdt_jax.runtime.errors import UserError
from mdt_jax.train import inputs, loop
from mdt_jax.train.log import Log, read_steps
from mdt_jax.train.stopping import StopSignal
from tests.conftest import (
    SMOKE,
    exits_with_one_line,
    train_here,
)
from tests.runs import lines_of, steps_of


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
        "checkpoints", "classes.json", "config.json", "curves.png", "metrics.jsonl", "report.html",
        "report.json", "samples", "samples.npz", "samples.png",
    }  # fmt: skip
    assert json.loads((trained / "classes.json").read_text()) == list("0123456789")
    report = json.loads((trained / "report.json").read_text())
    assert report["steps"] == 4 and report["num_samples"] == 20 and report["skipped"] == 0
    assert 0.95 < report["classifier_accuracy"] <= 1 and 0 <= report["class_agreement"] <= 1
    assert report["frechet_distance"] > report["frechet_distance_real"] > 0
    for name in ("seconds", "images_per_second"):
        assert report[name] > 0
    assert report["compile_seconds"] >= 0  # the step may be compiled by an earlier test
    pictures = [trained / "samples.png", *sorted((trained / "samples").iterdir())]
    notes = [json.loads(Image.open(picture).text["Comment"]) for picture in pictures]
    assert [note["step"] for note in notes] == [4, 2, 4]
    assert notes[0] == json.loads(str(np.load(trained / "samples.npz")["note"]))
    saved = np.load(trained / "samples.npz")
    assert saved["arr_0"].shape == (20, 8, 8, 1) and saved["arr_0"].dtype == np.uint8
    assert np.bincount(saved["arr_1"]).tolist() == [2] * 10
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["hidden_size"] == 16 and config["train"]["steps"] == 4


def test_what_a_run_says_of_itself(tmp_path):
    def run(*flags):
        return train_here(*SMOKE, f"--workdir={tmp_path}", *flags).splitlines()

    lines = run()
    for line in (
        "data: 1,438 images of digits, 10 classes; 4 steps of 16 are 0.04451 epochs",
        "compiling the training step …",
        f"{tmp_path} has report.html, report.json, metrics.jsonl, checkpoints/4, "
        "samples.npz, samples.png",
    ):
        assert line in lines, lines
    assert any(re.fullmatch(r"network: [\d,]+ parameters; matmuls .* highest", x) for x in lines)
    assert any(re.fullmatch(r"devices: 1 × cpu, as a mesh of data 1 × fsdp 1", x) for x in lines)
    assert any(line.startswith("sampling: ") for line in lines)
    # Samples are of the step that the report is of: none is left of an earlier one.
    lines = run("--config.train.steps=5", "--config.sample.num_samples=0")
    assert not (tmp_path / "samples.npz").exists() and not (tmp_path / "samples.png").exists()
    assert f"{tmp_path} has report.html, report.json, metrics.jsonl, checkpoints/5" in lines


def test_training_does_not_depend_on_jaxs_default_generator(trained, tmp_path):
    argv = [*SMOKE, "--config.train.steps=1", "--config.sample.num_samples=0"]
    with jax.default_prng_impl("rbg"):
        train_here(*argv, f"--workdir={tmp_path / 'run'}")
    ours, theirs = (json.loads(lines_of(workdir)[0]) for workdir in (tmp_path / "run", trained))
    assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


@pytest.fixture
def copy(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "copy"))


def test_steps_stop_and_can_be_raised(copy):
    before = (copy / "report.json").read_text()
    printed = train_here(*SMOKE, f"--workdir={copy}")
    assert "trained to step 4" in printed and (copy / "report.json").read_text() == before

    more = [*SMOKE, f"--workdir={copy}", "--config.train.steps=6", "--config.optim.clip_norm=1"]
    printed = train_here(*more)
    assert "train.steps changed from 4 to 6" in printed and "resuming from step 4" in printed
    assert steps_of(copy) == [1, 2, 3, 4, 5, 6]
    assert json.loads((copy / "report.json").read_text())["steps"] == 6

    # Nothing is left to train, but the report asked for is another one.
    printed = train_here(*more, "--config.sample.num_samples=30")
    report = json.loads((copy / "report.json").read_text())
    assert (report["steps"], report["num_samples"]) == (6, 30)
    assert len(np.load(copy / "samples.npz")["arr_0"]) == 30


def test_a_line_has_the_means_since_the_line_before_however_often_it_stopped(trained, tmp_path):
    def run(name, *flags):
        argv = [*SMOKE, "--config.train.sample_every=0", "--config.sample.num_samples=0", *flags]
        train_here(*argv, f"--workdir={tmp_path / name}")
        return {line["step"]: line for line in map(json.loads, lines_of(tmp_path / name))}

    each = run("each", "--config.train.steps=7")
    whole = run("whole", "--config.train.steps=7", "--config.train.log_every=3")
    for steps in (1, 4, 5):
        run("stopped", f"--config.train.steps={steps}", "--config.train.log_every=3")
    stopped = run("stopped", "--config.train.steps=7", "--config.train.log_every=3")
    names = [name for name in each[1] if "/" in name] + ["loss", "grad_norm"]
    assert list(whole) == list(stopped) == [3, 6] and len(names) > 20
    for step in (3, 6):
        for name in [*names, "epoch", "learning_rate", "skipped"]:
            assert whole[step][name] == stopped[step][name], name
        for name in names:
            seen = [each[n][name] for n in (step - 2, step - 1, step) if each[n][name] is not None]
            assert whole[step][name] == pytest.approx(np.mean(seen), rel=1e-12)
    config = json.loads((trained / "config.json").read_text())
    assert each[7]["learning_rate"] == config["optim"]["lr"]
    assert each[7]["epoch"] == pytest.approx(7 * config["data"]["batch_size"] / 1438, abs=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_goes_on_within_its_warm_up(tmp_path, accumulate, monkeypatch):
    """Bit-identical, and the log has the rates of Optax's schedule."""
    flags = [
        *SMOKE, "--config.train.steps=6", "--config.optim.schedule=cosine",
        "--config.optim.warmup_steps=4", "--config.optim.end_lr=1e-4",
        "--config.optim.weight_decay=0.1", f"--config.train.accumulate={accumulate}",
        "--config.train.sample_every=0", "--config.sample.num_samples=0",
    ]  # fmt: skip
    train_here(*flags, f"--workdir={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "requested", lambda self, step: step == 3)
        train_here(*flags, f"--workdir={tmp_path / 'stopped'}")
    assert steps_of(tmp_path / "stopped") == [1, 2, 3]
    train_here(*flags, f"--workdir={tmp_path / 'stopped'}")
    lines = [[json.loads(x) for x in lines_of(tmp_path / run)] for run in ("whole", "stopped")]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 4, 6, 1e-4)
    for step, (whole, stopped) in enumerate(zip(*lines, strict=True)):
        assert whole["learning_rate"] == pytest.approx(float(schedule(step)), rel=1e-6)
        for name in ("loss", "grad_norm", "learning_rate"):
            assert whole[name] == stopped[name], (step, name)
    states = [mdt_jax.load(tmp_path / run, params="raw").params for run in ("whole", "stopped")]
    assert all(map(np.array_equal, *map(jax.tree.leaves, states)))


def test_a_run_from_before_a_field_existed_goes_on(copy):
    """Fields that came later take their defaults; the optimiser is part of what must fit."""
    for meta in copy.glob("checkpoints/*/meta/metadata"):
        stored = json.loads(meta.read_text())
        for field in ("version", "side_layers", "relative_bias"):
            del stored["config"]["model"][field]
        del stored["config"]["vae"], stored["config"]["optim"]["name"], stored["format"]
        del stored["since_line"]
        del stored["sha256"]
        del stored["config"]["mesh"], stored["config"]["train"]["accumulate"]
        stored["config"]["train"]["remat"] = False
        meta.write_text(json.dumps(stored))
    assert mdt_jax.load(copy)[0].hidden_size == 16
    argv = [*SMOKE, f"--workdir={copy}", "--config.train.steps=6"]
    printed = train_here(*argv, "--config.optim.name=adan", expect=2)
    assert "another model or optimiser (optim.name is adamw, not adan)" in printed
    assert "resuming from step 4" in train_here(*argv)


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
    assert "but no checkpoint" in printed or "is a file, not a folder" in printed
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


def test_a_loss_that_is_not_finite_stops_the_run(copy):
    """Step 5 still is finite, but spoils the parameters: no checkpoint after it is kept."""
    broken = [*SMOKE, f"--workdir={copy}", "--config.train.steps=12", "--config.optim.lr=1e30",
              "--config.train.max_skipped=5"]  # fmt: skip
    printed = train_here(*broken, expect=2)
    assert (
        "not finite for 5 steps in a row, up to step 10" in printed and "Traceback" not in printed
    )
    assert f"the last good checkpoint is {copy}/checkpoints/4:" in printed
    lines = [json.loads(line) for line in lines_of(copy)]
    assert lines[-1]["skipped_in_row"] == 5 and lines[-1]["loss"] is None
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4"]
    train_here(*SMOKE, f"--workdir={copy}", "--config.train.steps=6")
    assert steps_of(copy) == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines_of(copy))


def test_a_run_that_stops_after_a_step_that_is_not_finite_keeps_its_checkpoints(copy, monkeypatch):
    monkeypatch.setattr(StopSignal, "requested", lambda self, step: step == 8)
    flags = [*SMOKE, f"--workdir={copy}", "--config.train.steps=12", "--config.optim.lr=1e30"]
    printed = train_here(*flags)
    assert "stopped at step 8, which is not saved since the last step was not finite" in printed
    assert f"the same command resumes from {copy}/checkpoints/4" in printed
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4"]


def test_a_stopped_run_does_not_end_a_python_program(tmp_path, monkeypatch, in_root, keep_signals):
    ended = []
    monkeypatch.setattr(interrupts, "end_in", lambda *arguments: ended.append(arguments))
    monkeypatch.setattr(StopSignal, "requested", lambda self, step: step == 1)
    config = configs.load("configs/digits.py", "smoke")
    config.sample.num_samples = 0
    assert not loop.train(config, tmp_path / "called") and ended == []
    stop = StopSignal(ends_process=True)
    stop.exit_code = 75
    assert not loop.train(config, tmp_path / "command", stop=stop) and ended == [(30, 75)]


def test_a_state_that_was_due_is_saved_once_a_step_is_finite(tmp_path, monkeypatch):
    catch_up = Log.catch_up

    def catch_up_with_a_bad_step(self):
        step = self._waiting[0] if self._waiting else None
        catch_up(self)
        self.skipping = self.skipping if step is None else step == 4

    monkeypatch.setattr(Log, "catch_up", catch_up_with_a_bad_step)
    flags = ["--config.train.steps=6", "--config.train.checkpoint_every=2"]
    train_here(*SMOKE, f"--workdir={tmp_path}", *flags)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "6"]


def test_the_loop_refuses_implicit_transfers(tmp_path, monkeypatch):
    """Of either direction; a CPU enforces the way to the devices alone."""
    write, guards = Log.write, set()

    def write_with_a_transfer(self, step, metrics):
        guards.add(jax.config.jax_transfer_guard_device_to_host)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            metrics["loss"] + np.float32(1)
        write(self, step, metrics)

    monkeypatch.setattr(Log, "write", write_with_a_transfer)
    train_here(*SMOKE, f"--workdir={tmp_path}", "--config.train.steps=2")
    assert guards == {"disallow"}


def test_checkpoints_keep_k(tmp_path):
    workdir = tmp_path / "run"
    train_here(*SMOKE, f"--workdir={workdir}", "--config.train.checkpoint_every=1",
        "--config.train.keep=2", "--config.sample.num_samples=0",
    )  # fmt: skip
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "4"]
    assert mdt_jax.load(workdir)[0].hidden_size == 16


def test_steps_below_those_reached(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    printed = train_here(*SMOKE, f"--workdir={copy}", "--config.train.steps=3", expect=2)
    assert printed.count("\n") == 1
    assert f"{copy} is trained to step 4 already, and train.steps is 3; set it to 4 or more" in (
        printed
    )
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


JSON = ["[]", "3", "{", "[" * 100_000, '{"train": []}', '{"model": 3}', "\udcff"]


@pytest.mark.parametrize("name", ["config.json", "report.json"])
@pytest.mark.parametrize("content", JSON)
def test_what_is_of_another_form_is_written_anew(name, content, copy, monkeypatch):
    before = json.loads((copy / name).read_text())
    (copy / name).write_bytes(content.encode(errors="surrogateescape"))
    monkeypatch.setattr("mdt_jax.train.run.sample_and_measure", lambda *_: {})
    printed = train_here(*SMOKE, f"--workdir={copy}")
    assert "resuming from step 4" in printed and "Traceback" not in printed
    assert set(json.loads((copy / name).read_text())) <= set(before)
    assert content.startswith('{"') or f"{copy / name} " in printed


def test_samples_that_were_lost_are_drawn_again(copy):
    def cut():
        path = copy / "samples.npz"
        content = bytearray(path.read_bytes())
        content[300] ^= 1  # a pixel
        path.write_bytes(content)

    before = np.load(copy / "samples.npz")["arr_0"]
    for damage in (cut, (copy / "samples.npz").unlink, (copy / "samples.png").unlink):
        damage()
        assert "reported already" not in train_here(*SMOKE, f"--workdir={copy}")
        np.testing.assert_array_equal(np.load(copy / "samples.npz")["arr_0"], before)
        assert "reported already" in train_here(*SMOKE, f"--workdir={copy}")


BAD_LINES = [
    b"\xff\xfe\n", b'{"step": "3"}\n', b'{"step": null}\n', b'{"step": 1e400}\n', b"[]\n", b"7\n",
    b'{"step": 1.5}\n', b'{"step": true}\n', b"[" * 100_000 + b"\n", b'{"loss": 1}\n', b"\n",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_lines_that_are_none_of_metrics(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is no line of metrics"):
        read_steps(tmp_path / "metrics.jsonl")


def test_the_number_of_classes_is_that_of_the_data(tmp_path):
    argv = [*SMOKE, "--config.train.sample_every=0", "--config.sample.num_samples=0"]
    first = [*argv, f"--workdir={tmp_path / 'run'}", "--config.model.num_classes=-1"]
    printed = train_here(*first, "--config.train.steps=2")
    assert "model.num_classes is 10: the data has 10 classes" in printed
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    meta = next((tmp_path / "run" / "checkpoints" / "2" / "meta").rglob("*metadata*"))
    assert stored["model"]["num_classes"] == 10 and stored["sample"]["guidance_scale"] == 2
    assert '"num_classes": 10' in meta.read_text() and '"num_classes": -1' not in meta.read_text()
    assert "resuming from step 2" in train_here(*first)
    # Without classes there is nothing to guide by.
    printed = train_here(*argv, f"--workdir={tmp_path / 'bare'}", "--config.model.num_classes=0")
    assert "sample.guidance_scale is 1.0, not 2.0: there are no classes" in printed
    stored = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert stored["sample"]["guidance_scale"] == 1


@pytest.mark.parametrize(
    "asked, found, expected",
    [(-1, 3, (3, 2.0)), (-1, 1, (0, 1.0)), (-1, 0, (0, 1.0)), (0, 3, (0, 1.0)), (3, 3, (3, 2.0))],
)
def test_what_follows_from_the_classes_of_the_data(asked, found, expected):
    config = configs.default()
    config.model.num_classes = asked
    config.sample.update(guidance_scale=2.0, guidance="power_cosine_printed")
    inputs.complete_config(config, found)
    assert (config.model.num_classes, config.sample.guidance_scale) == expected
    assert config.sample.guidance == ("power_cosine_printed" if expected[0] else "power_cosine")
    for name, value in (("guidance_scale", 2.0), ("guidance", "power_cosine_printed")):
        config.sample[name] = value
        if expected[0]:
            inputs.complete_config(config, found, {f"sample.{name}"})
        else:
            with pytest.raises(UserError, match=f"sample.{name} is .*takes no guidance"):
                inputs.complete_config(config, found, {f"sample.{name}"})
            config.sample.update(guidance_scale=1.0, guidance="power_cosine")
