import contextlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax.errors import UserError
from mdt_jax.train.metrics import MetricsLog
from mdt_jax.weights import load_weights
from tests.conftest import SMOKE, train_here


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
    out = model.apply(
        {"params": params}, np.zeros((2, 8, 8, 1)), np.array([0, 9]), np.array([1, 10])
    )
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
