import contextlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax.errors import UserError
from mdt_jax.train.metrics import MetricsLog
from mdt_jax.weights import load_weights
from tests.conftest import ROOT, SMOKE, train_here
from tests.models.common import apply
from tests.runs import arrays


@pytest.fixture
def copy(trained, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage_bytes(folder):
    file = largest_file(folder / "ema")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def damage_length(folder):
    file = largest_file(folder / "ema")
    file.write_bytes(file.read_bytes()[:100])


def damage_item(folder):
    shutil.rmtree(folder / "ema")


def damage_meta(folder):
    for file in (folder / "meta").iterdir():
        if file.is_file():
            file.write_text("{")


def damage_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [damage_bytes, damage_length, damage_item, damage_meta, damage_all]


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/4"])
def test_load_takes_a_workdir_its_checkpoints_or_a_step(trained, path):
    model, params = mdt_jax.load(trained / path)
    assert model.hidden_size == 16 and model.depth == 3
    out = apply(model, params, np.zeros((2, 8, 8, 1)), np.array([0, 9]), np.array([1, 10]))
    assert out.shape == (2, 8, 8, 2)
    assert same(params, mdt_jax.load(trained)[1])
    assert not same(params, mdt_jax.load(trained / "checkpoints" / "2")[1])


@pytest.mark.parametrize("damage", DAMAGES)
def test_loading_a_damaged_step_falls_back_or_says_so(copy, damage, capfd):
    older = mdt_jax.load(copy / "checkpoints" / "2")[1]
    damage(copy / "checkpoints" / "4")
    with pytest.raises(UserError, match="damaged|holds no checkpoint"):
        load_weights(copy / "checkpoints" / "4")
    assert same(mdt_jax.load(copy)[1], older)
    assert "4 is damaged" in capfd.readouterr().err
    damage(copy / "checkpoints" / "2")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        mdt_jax.load(copy)


@pytest.mark.parametrize("damage", [damage_bytes, damage_item])
def test_training_goes_on_from_the_step_before_a_damaged_one(copy, trained, damage):
    damage(copy / "checkpoints" / "4")
    printed = train_here(*SMOKE, f"--workdir={copy}")
    assert "4 is damaged" in printed and "going on from step 2" in printed
    assert [p.name.split("-")[0] for p in (copy / "damaged").iterdir()] == ["4"]
    assert same(mdt_jax.load(copy)[1], mdt_jax.load(trained)[1])
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_training_never_starts_anew_over_damaged_checkpoints(copy):
    for step in ("2", "4"):
        damage_item(copy / "checkpoints" / step)
    before = (copy / "metrics.jsonl").read_text()
    printed = train_here(*SMOKE, f"--workdir={copy}", expect=2)
    assert "none of the 2 checkpoints" in printed and "Traceback" not in printed
    assert (copy / "metrics.jsonl").read_text() == before


def test_paths_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        mdt_jax.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no checkpoint"):
        mdt_jax.load(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="is a file of no kind that holds weights"):
        mdt_jax.load(file)


def test_an_orbax_folder_of_another_program_is_not_called_damaged(tmp_path):
    import orbax.checkpoint as ocp

    tree, args = {"params": {"a": np.ones(3)}}, ocp.args.StandardSave
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(1000, args=args(tree))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "alone", tree)
    for path, said in (
        ("steps", "steps/1000 is an Orbax checkpoint of another program: it holds default"),
        ("alone", "alone is an Orbax checkpoint of another program"),
    ):
        with pytest.raises(UserError, match=said):
            mdt_jax.load(tmp_path / path)


def test_metrics_log_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(MetricsLog(path, 0)) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": np.float32(step), "empty": float("nan")})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    with contextlib.closing(MetricsLog(path, 2)) as log:
        log.write(3, {"loss": 30.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert lines[0]["empty"] is None


CRASHING = """
import os, sys
import jax.numpy as jnp
from mdt_jax.train.checkpoints import Checkpoints
from mdt_jax.train.state import TrainState

def state(step):
    leaf = jnp.full((2, 3), float(step))
    return TrainState(jnp.int32(step), {"a": leaf}, {"a": leaf}, {"m": leaf}, jnp.int32(0), jnp.int32(0))

workdir, last = sys.argv[1], int(sys.argv[2])
with Checkpoints(workdir) as checkpoints:
    checkpoints.save(state(1), {})
    checkpoints.close()
    for name in ("rename", "replace", "mkdir"):
        def counted(*arguments, _before=getattr(os, name), **more):
            global last
            last -= 1
            if last < 0:
                os._exit(9)
            return _before(*arguments, **more)
        setattr(os, name, counted)
    checkpoints.save(state(2), {})
"""  # noqa: E501


def test_a_crash_between_the_files_of_a_step_leaves_the_step_before(tmp_path):
    """At every other folder that is made and name that is changed while a step is written."""
    found = {}
    for moment in range(0, 40, 2):
        workdir = tmp_path / str(moment)
        command = [sys.executable, "-c", CRASHING, str(workdir), str(moment)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 9), done.stderr
        (found[moment],) = [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
        values = arrays(workdir, "params")[0]
        assert (values == float(found[moment])).all()
        if done.returncode == 0:
            break
    assert found[0] == "1" and found[moment] == "2" and moment >= 6, found


def test_a_checkpoint_of_a_newer_format(copy):
    for meta in copy.glob("checkpoints/*/meta/metadata"):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 2}))
    printed = train_here(*SMOKE, f"--workdir={copy}", "--config.train.steps=6", expect=2)
    assert "is of format 2, newer than the 1 that this mdt_jax knows" in printed
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4"]
