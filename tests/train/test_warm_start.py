"""Runs that start from other weights: --config.init.checkpoint."""

import jax
import numpy as np
import pytest

from mdt_jax import main
from mdt_jax.weights import kinds, networks
from tests.conftest import SMOKE, exits_with_one_line, train_here
from tests.models.common import random_params


def tree_equal(a, b):
    """Whether all is the same but for the last bits, which averaging like with like may change."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, rtol=1e-6, atol=1e-20) for x, y in pairs)


def started(workdir, *arguments):
    """(raw, EMA, what was printed) of a run after one step, which changes nothing: lr is tiny."""
    printed = train_here(
        *SMOKE,
        "--config.train.steps=1",
        "--config.sample.num_samples=0",
        "--config.train.sample_every=0",
        "--config.optim.lr=1e-30",
        f"--workdir={workdir}",
        *arguments,
    )
    raw, ema = (networks.load_weights(workdir, params=params).params for params in ("raw", "ema"))
    return raw, ema, printed


def test_parameters_and_ema_are_those_of_a_run(trained, tmp_path):
    raw, ema, printed = started(tmp_path / "run", f"--config.init.checkpoint={trained}")
    theirs = [networks.load_weights(trained, params=params).params for params in ("raw", "ema")]
    assert not tree_equal(*theirs)
    assert tree_equal(raw, theirs[0])
    near = jax.tree.map(lambda a, b: np.abs(a - b).max(), ema, theirs[1])
    far = jax.tree.map(lambda a, b: np.abs(a - b).max(), theirs[0], theirs[1])
    assert max(jax.tree.leaves(near)) < 0.1 * max(jax.tree.leaves(far))  # one step of averaging
    assert f"parameters and EMA are those of {trained}" in printed and "new label" not in printed


def test_a_file_does_as_well_and_gives_both(trained, tmp_path):
    model, params, *_ = networks.load_weights(trained)
    networks.save(tmp_path / "w.pt", kinds.Weights(model, params))
    raw, ema, _ = started(tmp_path / "run", f"--config.init.checkpoint={tmp_path / 'w.pt'}")
    assert tree_equal(raw, params) and tree_equal(ema, params)


def without_labels(params):
    return {name: tree for name, tree in params.items() if name != "label_embed"}


def test_another_number_of_classes_takes_all_but_the_label_table(trained, tmp_path):
    raw, ema, printed = started(
        tmp_path / "run",
        f"--config.init.checkpoint={trained}",
        "--config.data.name=digits_5_9",
        "--config.model.num_classes=5",
    )
    theirs = networks.load_weights(trained, params="raw").params
    assert "a new label table: 10 classes there, 5 here" in printed
    assert tree_equal(without_labels(raw), without_labels(theirs))
    table = np.asarray(raw["label_embed"]["table"]["embedding"])
    assert table.shape == (6, 16) and table.std() == pytest.approx(0.02, rel=0.3)
    assert tree_equal(ema["label_embed"], raw["label_embed"])


def test_a_run_that_goes_on_takes_its_own_checkpoints(trained, tmp_path):
    model, params, *_ = networks.load_weights(trained)
    file, workdir = tmp_path / "w.pt", tmp_path / "run"
    networks.save(file, kinds.Weights(model, params))
    start = [*SMOKE, f"--workdir={workdir}", f"--config.init.checkpoint={file}"]
    train_here(*start, "--config.train.steps=2")
    after = networks.load_weights(workdir, params="raw").params
    assert not tree_equal(after, params)
    file.unlink()  # it is not needed any more
    printed = train_here(*start, "--config.optim.lr=1e-30")
    assert "resuming from step 2" in printed and "init.checkpoint:" not in printed
    assert tree_equal(networks.load_weights(workdir, params="raw").params, after)


def test_another_resolution_on_request(trained, tmp_path, capsys, monkeypatch, in_root):
    """From weights for 4×6 tokens to the digits' 4×4."""
    model = networks.load_weights(trained).model.clone(input_size=(8, 12))
    source = tmp_path / "wide"
    networks.save(source, kinds.Weights(model, random_params(model)))
    before = sorted(p.name for p in tmp_path.iterdir())
    argv = [*SMOKE, f"--workdir={tmp_path / 'run'}", f"--config.init.checkpoint={source}"]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "is for 4×6 tokens and the config for 4×4; init.resize=True resamples" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == before

    raw, _, printed = started(tmp_path / "run", argv[-1], "--config.init.resize=True")
    assert "resampled from 4×6 to 4×4 tokens" in printed
    resized = networks.load_weights(source, input_size=(8, 8)).params
    assert tree_equal(raw, resized)


BAD = {
    "nothing": (["--config.init.checkpoint=nothing"], "checkpoint 'nothing' does not exist"),
    "size": (["--config.model.hidden_size=32"], "hidden_size is 16 there and 32 here"),
    "version": (["--config.model.version=v2"], "version is v1 there and v2 here"),
    "norm": (["--config.model.qk_norm=True"], "qk_norm is False there and True here"),
    "schedule": (["--config.diffusion.steps=500"], "diffusion.steps is 1000 there and 500 here"),
    "scale": (["--config.vae.scale=0.5"], "vae.scale is 0.18215 there and 0.5 here"),
}


def test_a_file_of_the_other_version(trained, tmp_path, capsys, monkeypatch, in_root, keep_signals):
    model = networks.load_weights(trained).model.clone(version="v2")
    networks.save(tmp_path / "v2.pt", kinds.Weights(model, random_params(model)))
    start = f"--config.init.checkpoint={tmp_path / 'v2.pt'}"
    argv = [*SMOKE, f"--workdir={tmp_path / 'run'}", start]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "version is v2 there and v1 here" in printed and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_taken(name, trained, tmp_path, capsys, monkeypatch, in_root, keep_signals):
    changes, message = BAD[name]
    start = f"--config.init.checkpoint={trained}"
    argv = [*SMOKE, f"--workdir={tmp_path / 'run'}", start, *changes]
    assert message in exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []
