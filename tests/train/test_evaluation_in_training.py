"""Samples measured while training: the log, the best checkpoint, stops on the way, mistakes."""

import json

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax import config as configs
from mdt_jax import main
from mdt_jax.data import sources
from mdt_jax.diffusion.options import balanced_labels
from mdt_jax.evaluation.evaluator import Evaluator, evaluate_samples
from mdt_jax.runtime.errors import UserError
from mdt_jax.train import workdir
from mdt_jax.weights import kinds, networks
from mdt_jax.weights.step_folders import steps_in
from tests.conftest import train_here
from tests.measuring import quick_inception
from tests.runs import MEASURING, measured


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, what it printed) of six steps."""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    return workdir, train_here(*MEASURING, "--config.train.steps=6", f"--workdir={workdir}")


def test_every_n_steps_into_the_log(run):
    workdir, printed = run
    found = measured(workdir)
    assert list(found) == [2, 4, 6]
    for step, values in found.items():
        assert (
            f"step {step}: num_samples 30, frechet_distance {values['frechet_distance']:.4g}"
            in (printed)
        )
    model, ema = mdt_jax.load(workdir)
    labels = balanced_labels(30, 10)
    config = json.loads((workdir / "config.json").read_text())
    how = {"num_steps": config["sample"]["num_steps"], "seed": config["train"]["seed"]}
    how |= {name: config["sample"][name] for name in ("guidance_scale", "guidance_power")}
    images = mdt_jax.to_uint8(mdt_jax.generate(model, ema, labels, batch_size=10, **how))
    theirs = evaluate_samples(images, labels, *sources.load("digits"))
    assert found[6] == pytest.approx(theirs, rel=1e-12)


def test_the_best_is_kept(run):
    workdir, printed = run
    distances = {step: line["frechet_distance"] for step, line in measured(workdir).items()}
    best = min(distances, key=distances.get)
    assert steps_in(workdir / "best") == [best]
    lines = [line for line in printed.splitlines() if "the best so far" in line]
    least, records = np.inf, []
    for step, distance in distances.items():
        if distance < least:
            least, records = distance, [*records, step]
    assert [int(line.split("step ")[1].split(":")[0]) for line in lines] == records
    model, ema = mdt_jax.load(workdir / "best")
    config = json.loads((workdir / "config.json").read_text())["sample"]
    labels = balanced_labels(30, 10)
    how = {name: config[name] for name in ("num_steps", "guidance_scale", "guidance_power")}
    images = mdt_jax.to_uint8(mdt_jax.generate(model, ema, labels, seed=0, batch_size=10, **how))
    theirs = evaluate_samples(images, labels, *sources.load("digits"))
    assert theirs["frechet_distance"] == pytest.approx(least, rel=1e-12)


def test_the_best_is_of_one_way_of_measuring(run, tmp_path):
    """Figures of another number of samples are no rivals, nor is a damaged one."""
    import shutil

    shutil.copytree(run[0], tmp_path / "run")
    more = [flag for flag in MEASURING if "num_samples=30" not in flag]
    more += ["--config.evaluation.num_samples=20", "--config.train.steps=8"]
    printed = train_here(*more, f"--workdir={tmp_path}/run")
    assert "evaluation.num_samples changed from 30 to 20" in printed
    assert "step 8: num_samples 20" in printed and "the best so far" in printed
    assert steps_in(tmp_path / "run" / "best") == [8]
    shutil.rmtree(tmp_path / "run" / "best" / "checkpoints" / "8" / "meta")
    train_here(*more, "--config.train.steps=10", f"--workdir={tmp_path}/run")
    assert steps_in(tmp_path / "run" / "best") == [10]


def test_the_best_while_the_clock_goes_back(tmp_path, monkeypatch):
    import time

    clock, figures = iter(range(10**6, 0, -1)), iter((3.0, 2.0, 1.0))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(Evaluator, "measure", lambda *_, **__: {"frechet_distance": next(figures)})
    train_here(*MEASURING, "--config.train.steps=6", f"--workdir={tmp_path}")
    assert steps_in(tmp_path / "best") == [6]


def test_it_does_not_change_the_training(run, tmp_path):
    without = [flag for flag in MEASURING if "evaluation" not in flag]
    train_here(*without, "--config.train.steps=6", f"--workdir={tmp_path}")
    same = ("loss", "grad_norm")
    ours, theirs = (
        [
            [line[name] for name in same]
            for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for workdir in (run[0], tmp_path)
    )
    assert ours == theirs and len(ours) == 6


def test_what_is_lost_with_a_checkpoint_is_measured_again(run, tmp_path):
    import shutil

    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6" / "params")
    printed = train_here(*MEASURING, "--config.train.steps=6", f"--workdir={tmp_path}/run")
    assert "resuming from step 4" in printed
    assert measured(tmp_path / "run") == measured(run[0])


def test_a_finished_run_of_before_there_was_evaluation_stays_finished(run, tmp_path):
    import shutil

    shutil.copytree(run[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["evaluation"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    flags = [flag for flag in MEASURING if "evaluation" not in flag]
    flags += ["--config.evaluation.num_samples=10000", "--config.train.steps=6"]
    assert "is trained to step 6 and reported already" in train_here(
        *flags, f"--workdir={tmp_path}/run"
    )


def test_by_inception_against_a_file(tmp_path):
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("tests.fid_packages")
    state = {name: torch.tensor(array) for name, array in fid.random_state().items()}
    torch.save(state, tmp_path / "fid.pth")
    real = sources.load("digits")[1].images[:6]
    np.savez(tmp_path / "real.npz", arr_0=real)
    with quick_inception():
        printed = train_here(
            *MEASURING, "--config.train.steps=2", f"--workdir={tmp_path}/run",
            "--config.evaluation.num_samples=5",
            f"--config.evaluation.inception={tmp_path}/fid.pth",
            f"--config.evaluation.reference={tmp_path}/real.npz", "--config.sample.num_samples=5",
        )  # fmt: skip
    assert "rank 4 in 2048 dimensions" in printed
    found = measured(tmp_path / "run")[2]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert found[name] == pytest.approx(report[name], rel=1e-9)
    assert steps_in(tmp_path / "run" / "best") == [2]


def test_samples_that_are_not_finite_do_not_end_a_run(trained, tmp_path):
    """Its grids and measurements are left out; its last samples are asked for, and an error."""
    model, params = mdt_jax.load(trained)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, 3e38), params)
    networks.save(tmp_path / "broken", kinds.Weights(model, broken))
    flags = [flag for flag in MEASURING if "sample_every" not in flag]
    flags += ["--config.train.sample_every=2", "--config.train.steps=3"]
    flags += [f"--config.init.checkpoint={tmp_path}/broken", f"--workdir={tmp_path}/run"]
    printed = train_here(*flags)
    assert "warning: no samples are drawn at step 2: sample 0 holds NaN" in printed
    assert "warning: step 2 is not measured: sample 0 holds NaN" in printed
    assert list((tmp_path / "run" / "samples").glob("*")) == []
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 3
    last = train_here(*flags, "--config.sample.num_samples=4", expect=2)
    assert "error: sample 0 holds NaN or infinity" in last
    assert not list((tmp_path / "run").glob("samples*"))


VAE = ["--config.vae.path=vae", "--config.data.channels=3", "--config.data.name=folder"]
BAD = {
    "never": (["--config.evaluation.every=-1"], "evaluation.every is -1"),
    "few": (["--config.evaluation.num_samples=3"], "evaluation.num_samples is 3; it must be"),
    "no reference": (
        ["--config.data.name=folder", "--config.data.path=x"],
        "evaluation.reference is empty",
    ),
    "latents by pixels": (
        [*VAE, "--config.data.image_size=256", "--config.evaluation.reference=x.npz"],
        "evaluation.inception is empty",
    ),
    "no such reference": (["--config.evaluation.reference=no.npz"], "no.npz could not be read"),
    "another size": (["--config.evaluation.reference=mnist"], "has images of 28×28×1, but the"),
    "no such weights": (["--config.evaluation.inception=no.pth"], "no.pth"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_told_before_training(name, tmp_path, capsys, monkeypatch, in_root):
    flags, message = BAD[name]
    argv = [*MEASURING, *flags, f"--workdir={tmp_path}/run"]
    monkeypatch.setattr("sys.argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        from mdt_jax import cli

        cli.run(main.main)
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and message in printed.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_another_reference_or_inception_under_the_same_path(tmp_path):
    """Refused when the run goes on; older checkpoints do not tell, and go on."""
    _, held_out = sources.load("digits")
    np.savez(tmp_path / "real.npz", arr_0=held_out.images)
    argv = [*MEASURING, f"--config.evaluation.reference={tmp_path / 'real.npz'}"]
    argv += [f"--workdir={tmp_path / 'run'}"]
    train_here(*argv, "--config.train.steps=2")
    np.savez(tmp_path / "real.npz", arr_0=held_out.images[::-1])
    printed = train_here(*argv, "--config.train.steps=4", expect=2)
    line = f"error: evaluation.reference {tmp_path}/real.npz has changed since {tmp_path}/run was"
    assert line in printed.splitlines()[-1]

    def check(before, now):
        config = configs.default()
        config.evaluation.inception = "fid.pth"
        about = {"classes": [], "images_sha256": "i"}
        meta = {"step": 1, "config": config.to_dict(), **about, **before}
        about_data = {**about, "files_sha256": {"evaluation.inception": now}}
        workdir.check_same_run(meta, config, tmp_path / "run", about_data)

    check({"files_sha256": {"evaluation.inception": "a"}}, "a")
    check({"files_sha256": {}}, "a")
    check({}, "a")
    with pytest.raises(UserError, match="evaluation.inception fid.pth has changed since .* was b"):
        check({"files_sha256": {"evaluation.inception": "b"}}, "a")
