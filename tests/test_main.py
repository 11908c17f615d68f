import json
import pathlib
import random
import re
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax import cli, main, sample
from tests.conftest import SMOKE, XLA_FLAGS, run_command, start_command, train_here

LONG = [SMOKE, "--config.train.steps=400", "--config.train.checkpoint_every=20",
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

    newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return jax.tree.leaves(checkpointer.restore(newest / item))


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
        "checkpoints", "config.json", "metrics.jsonl", "report.json", "samples", "samples.npz",
        "samples.png",
    }  # fmt: skip
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
    printed = train_here(SMOKE, f"--workdir={copy}")
    assert "trained to step 4" in printed and (copy / "report.json").read_text() == before

    more = [SMOKE, f"--workdir={copy}", "--config.train.steps=6", "--config.optim.clip_norm=1"]
    printed = train_here(*more)
    assert "train.steps changed from 4 to 6" in printed and "going on from step 4" in printed
    assert steps_of(copy) == [1, 2, 3, 4, 5, 6]
    assert json.loads((copy / "report.json").read_text())["steps"] == 6

    # Nothing is left to train, but the report asked for is another one.
    printed = train_here(*more, "--config.sample.num_samples=30")
    report = json.loads((copy / "report.json").read_text())
    assert (report["steps"], report["num_samples"]) == (6, 30)
    assert len(np.load(copy / "samples.npz")["arr_0"]) == 30


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
    argv = [SMOKE, f"--workdir={copy}"]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "but no checkpoint" in printed or "should be the folder" in printed
    assert (copy / "metrics.jsonl").read_text() == before


def test_metrics_damaged_by_hand(copy, capsys, monkeypatch, in_root, keep_signals):
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text("what?\n" + text)
    argv = [SMOKE, f"--workdir={copy}", "--config.train.steps=6"]
    monkeypatch.setattr("sys.argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        cli.run(main.main)
    assert exit_.value.code == 2
    assert "metrics.jsonl, line 1 is no line of metrics" in capsys.readouterr().err


def test_the_step_compiles_once(tmp_path):
    """Counted in JAX's own compile log, over a run with a checkpoint and a sample grid inside."""
    printed = run_command(
        "mdt_jax.main", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.train.steps=8",
        JAX_LOG_COMPILES="1",
    )  # fmt: skip
    assert len(re.findall(r"Finished XLA compilation of jit\(step_with_draws\)", printed)) == 1
    assert len(re.findall(r"Compiling jit\(step_with_draws\)", printed)) == 1


def test_every_other_way_of_training_at_once(tmp_path):
    """Unconditional, mirrored, clipped, in bfloat16, with activations recomputed."""
    workdir = tmp_path / "run"
    train_here(SMOKE, f"--workdir={workdir}", "--config.model.num_classes=0",
        "--config.sample.guidance_scale=1", "--config.data.flip=True", "--config.optim.clip_norm=1",
        "--config.train.dtype=bfloat16", "--config.train.remat=True",
    )  # fmt: skip
    report = json.loads((workdir / "report.json").read_text())
    assert report["skipped"] == 0 and np.isfinite(report["frechet_distance"])
    assert "class_agreement" not in report


def test_mnist_recipe(tmp_path):
    train_here("--config=configs/mnist.py:smoke", f"--workdir={tmp_path / 'run'}")
    assert np.load(tmp_path / "run" / "samples.npz")["arr_0"].shape == (20, 28, 28, 1)


def test_eight_devices_train_as_one(trained, tmp_path):
    workdir = tmp_path / "run"
    run_command(
        "mdt_jax.main", SMOKE, f"--workdir={workdir}", "--config.sample.num_samples=0",
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
    broken = [SMOKE, f"--workdir={copy}", "--config.train.steps=12", "--config.optim.lr=1e30",
              "--config.train.max_skipped=5"]  # fmt: skip
    printed = train_here(*broken, expect=2)
    assert "not finite 5 steps in a row, up to step 10" in printed and "Traceback" not in printed
    assert f"the last good checkpoint is {copy}/checkpoints/4:" in printed
    lines = [json.loads(line) for line in lines_of(copy)]
    assert lines[-1]["skipped_in_row"] == 5 and lines[-1]["loss"] is None
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4"]
    train_here(SMOKE, f"--workdir={copy}", "--config.train.steps=6")
    assert steps_of(copy) == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines_of(copy))


BAD_CONFIGS = {
    "no config": ([], "--config is missing"),
    "missing file": (["--config=configs/nothing.py"], "'configs/nothing.py' does not exist"),
    "a folder": (["--config=configs"], "'configs' is a folder"),
    "unknown variant": (["--config=configs/digits.py:tiny"], "unknown variant 'tiny'"),
    "unknown field": ([SMOKE, "--config.optim.lrr=1"], "unknown config field --config.optim.lrr=1"),
    "second field": (
        [SMOKE, "--config.optim.lr=1", "--config.optim.lrr=1"],
        'field --config.optim.lrr=1 Did you mean "lr"',
    ),
    "unknown group": ([SMOKE, "--config.optimizer.lr=1"], "unknown config field"),
    "unknown flag": ([SMOKE, "--workdirr=x"], "workdirr"),
    "stray argument": ([SMOKE, "train"], "unexpected argument 'train'"),
    "wrong type": ([SMOKE, "--config.train.steps=many"], "config.train.steps=many"),
    "fraction of a step": ([SMOKE, "--config.train.steps=1.5"], "config.train.steps=1.5"),
    "not a boolean": ([SMOKE, "--config.data.flip=perhaps"], "config.data.flip=perhaps"),
    "patch size": ([SMOKE, "--config.model.patch_size=3"], "model.patch_size 3 does not divide"),
    "heads": ([SMOKE, "--config.model.num_heads=3"], "not divisible by model.num_heads 3"),
    "decoder": ([SMOKE, "--config.model.decoder_layers=3"], "decoder_layers 3 must be smaller"),
    "no decoder": ([SMOKE, "--config.model.decoder_layers=0"], "model.decoder_layers is 0"),
    "ratio of one": ([SMOKE, "--config.mask.ratio=1.0"], "mask.ratio is 1.0"),
    "negative ratio": ([SMOKE, "--config.mask.ratio=-0.1"], "mask.ratio is -0.1"),
    "nothing kept": ([SMOKE, "--config.mask.ratio=0.99"], "leaves none of the 16 tokens"),
    "batch": ([SMOKE, "--config.data.batch_size=0"], "data.batch_size is 0"),
    "learning rate": ([SMOKE, "--config.optim.lr=nan"], "optim.lr is nan"),
    "steps": ([SMOKE, "--config.train.steps=0"], "train.steps is 0"),
    "keep": ([SMOKE, "--config.train.keep=0"], "train.keep is 0"),
    "dtype": ([SMOKE, "--config.train.dtype=float16"], "train.dtype is 'float16'"),
    "data": ([SMOKE, "--config.data.name=cifar"], "choose one of digits, mnist"),
    "image size": ([SMOKE, "--config.data.image_size=16"], "holds 8×8 images"),
    "more classes": ([SMOKE, "--config.model.num_classes=20"], "has 10 classes"),
    "noise steps": ([SMOKE, "--config.diffusion.steps=20"], "diffusion.steps is 20"),
    "flagfile": ([SMOKE, "--flagfile=/nothing"], "/nothing"),
    "no path": (["--config="], "config file '' does not exist"),
    "two words": (["--config", "configs/nothing.py"], "nothing.py' does not exist"),
    "classes": ([SMOKE, "--config.model.num_classes=5"], "has 10 classes"),
    "sampler": ([SMOKE, "--config.sample.sampler=heun"], "unknown sampler 'heun'"),
    "sampler steps": ([SMOKE, "--config.sample.num_steps=1001"], "between 1 and the 1000 steps"),
    "guidance": (
        [SMOKE, "--config.model.num_classes=0", "--config.sample.guidance_scale=2"],
        "takes no guidance",
    ),
}  # fmt: skip


def exits_with_one_line(command, argv, capsys, monkeypatch) -> str:
    monkeypatch.setattr("sys.argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        cli.run(command)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name, tmp_path, capsys, monkeypatch, in_root, keep_signals):
    argv, message = BAD_CONFIGS[name]
    workdir = tmp_path / "run"
    argv = [*argv, f"--workdir={workdir}"]
    assert message in exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert not workdir.exists()


BAD_RECIPES = {
    "def get_config(": "SyntaxError",
    "x = 1": "defines no get_config()",
    "def get_config(): return None": "must return a ConfigDict, not None",
    "def get_config(): return {}": "must return a ConfigDict",
    "def get_config(): return undefined": "NameError: name 'undefined' is not defined",
    "def get_config(): return default().nothing": "AttributeError",
    "def get_config():\n c = default()\n c.optim.lrr = 1\n return c": "lrr",
    "def get_config():\n c = default()\n c.optim.lr = 'a'\n return c": "TypeError",
    "def get_config():\n c = default().unlock()\n del c['data']\n return c": "the group data",
    "def get_config():\n c = default()\n c.train.steps = None\n return c": "train.steps is None",
    "def get_config():\n c = default().unlock()\n c.optim.b = 1\n return c": "field optim.b",
}


@pytest.mark.parametrize("text", BAD_RECIPES)
def test_bad_recipe(text, tmp_path, capsys, monkeypatch, in_root, keep_signals):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"from mdt_jax.config import default\n{text}\n")
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    argv = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    assert BAD_RECIPES[text] in exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert not (tmp_path / "run").exists()


def test_workdir_missing_or_not_writable(capsys, monkeypatch, in_root, keep_signals):
    printed = exits_with_one_line(main.main, [SMOKE], capsys, monkeypatch)
    assert "--workdir is missing" in printed
    printed = exits_with_one_line(main.main, [SMOKE, "--workdir="], capsys, monkeypatch)
    assert "--workdir is missing" in printed
    argv = [SMOKE, "--workdir=/dev/null/run"]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "workdir /dev/null/run cannot be written to" in printed


def test_workdir_of_another_model(trained, capsys, monkeypatch, in_root, keep_signals):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    argv = [SMOKE, f"--workdir={trained}", "--config.model.hidden_size=32"]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "another model (model.hidden_size is 16, not 32)" in printed
    assert before == {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}


def test_batch_not_divisible_by_the_devices(tmp_path):
    printed = run_command(
        "mdt_jax.main", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.data.batch_size=12",
        expect=2, XLA_FLAGS=f"{XLA_FLAGS} --xla_force_host_platform_device_count=8",
    )  # fmt: skip
    assert printed.strip() == "error: data.batch_size 12 is not divisible by the 8 devices"


BAD_SAMPLING = {
    "no checkpoint flag": (["--out=g.png"], "--checkpoint"),
    "no such path": (["--checkpoint=nothing", "--out=g.png"], "'nothing' does not exist"),
    "no checkpoint there": (["--checkpoint=.", "--out=g.png"], "holds no checkpoint"),
    "label": (["--checkpoint=RUN", "--out=g.png", "--labels=3,10"], "label 10 is outside"),
    "label unused": (
        ["--checkpoint=RUN", "--out=g.png", "--labels=3,10", "--num_samples=1"],
        "label 10 is outside",
    ),
    "not a label": (["--checkpoint=RUN", "--out=g.png", "--labels=cat"], "--labels=cat"),
    "steps": (["--checkpoint=RUN", "--out=g.png", "--num_steps=2000"], "1000 steps"),
    "sampler": (["--checkpoint=RUN", "--out=g.png", "--sampler=x"], "unknown sampler 'x'"),
    "suffix": (["--checkpoint=RUN", "--out=g.jpg"], "unknown suffix '.jpg'; use .png or .npz"),
    "count": (["--checkpoint=RUN", "--out=g.png", "--num_samples=0"], "--num_samples=0"),
    "seed": (["--checkpoint=RUN", "--out=g.png", "--seed=-1"], "seed is -1"),
    "wrong type": (["--checkpoint=RUN", "--out=g.png", "--num_steps=ten"], "--num_steps"),
    "unknown flag": (["--checkpoint=RUN", "--out=g.png", "--stepps=3"], "--stepps"),
    "huge label": (["--checkpoint=RUN", "--out=g.png", f"--labels={10**20}"], "is outside"),
    "empty labels": (["--checkpoint=RUN", "--out=g.png", "--labels="], "--labels= is not a list"),
    "hole in labels": (["--checkpoint=RUN", "--out=g.png", "--labels=1,,2"], "is not a list"),
    "batch size": (["--checkpoint=RUN", "--out=new/g.png", "--batch_size=0"], "--batch_size=0"),
    "empty path": (["--checkpoint=", "--out=g.png"], "checkpoint '' does not exist"),
    "long path": ([f"--checkpoint={'a' * 300}", "--out=g.png"], "does not exist"),
    "channels": (["--checkpoint=RUN", "--out=g.png", "--guidance_channels=x"], "channels value"),
    "out is a folder": (["--checkpoint=RUN", "--out=/proc/g.png"], "cannot be written"),
    "out is nowhere": (["--checkpoint=RUN", "--out=/dev/null/g.png"], "--out=/dev/null/g.png"),
}


@pytest.mark.parametrize("name", BAD_SAMPLING)
def test_bad_sampling(name, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = BAD_SAMPLING[name]
    argv = [argument.replace("RUN", str(trained)) for argument in argv]
    assert message in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_shows_no_traceback(tmp_path):
    printed = run_command(
        "mdt_jax.main", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.optim.lrr=1", expect=2
    )
    assert printed.startswith("error: unknown config field") and printed.count("\n") == 1


def test_checkpoints_keep_k(tmp_path):
    workdir = tmp_path / "run"
    train_here(SMOKE, f"--workdir={workdir}", "--config.train.checkpoint_every=1",
        "--config.train.keep=2", "--config.sample.num_samples=0",
    )  # fmt: skip
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "4"]
    assert mdt_jax.load(workdir)[0].hidden_size == 16
