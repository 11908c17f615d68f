import contextlib
import errno
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mdt_jax
from mdt_jax import config as configs
from mdt_jax.runtime.errors import UserError
from mdt_jax.train.checkpoints import BestCheckpoint, Checkpoints
from mdt_jax.train.log import MetricsLog
from mdt_jax.train.state import TrainState
from mdt_jax.weights.networks import load_weights
from mdt_jax.weights.orbax_folders import read_meta
from mdt_jax.weights.step_folders import steps_in
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
    gc.collect()  # of what Orbax was still reading
    printed = capfd.readouterr().err
    assert "4 is damaged" in printed and "Traceback" not in printed
    damage(copy / "checkpoints" / "2")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        mdt_jax.load(copy)


@pytest.mark.parametrize("damage", [damage_bytes, damage_item])
def test_training_goes_on_from_the_step_before_a_damaged_one(copy, trained, damage):
    damage(copy / "checkpoints" / "4")
    printed = train_here(*SMOKE, f"--workdir={copy}")
    assert "4 is damaged" in printed and "resuming from step 2" in printed
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
    with pytest.raises(UserError, match="file: unknown suffix ''; use one of .pt"):
        mdt_jax.load(file)


def test_a_folder_with_files_of_weights(tmp_path):
    """The file is read; a folder of a run is read as a run, whatever else is in it."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model.safetensors is empty"):
        load_weights(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_weights(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    for number in (1, 2):
        (tmp_path / f"net-0000{number}-of-00002.safetensors").touch()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="but config.json, net-00001-of-00002.safetensors, net"):
        load_weights(tmp_path)


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
        stored = json.loads(meta.read_text()) | {"format": 2}
        del stored["sha256"]
        meta.write_text(json.dumps(stored))
    printed = train_here(*SMOKE, f"--workdir={copy}", "--config.train.steps=6", expect=2)
    assert "is of format 2, newer than the 1 that this mdt_jax knows" in printed
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4"]


def small_state(step: int) -> TrainState:
    leaf, zero = jnp.full((2, 3), float(step)), jnp.int32(0)
    return TrainState(jnp.int32(step), {"a": leaf}, {"a": leaf}, {"m": leaf}, zero, zero)


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
    """A workdir with the steps 2 and 4 of a state of a few numbers."""
    with Checkpoints(tmp_path / "run", keep=5) as checkpoints:
        for step in (2, 4):
            checkpoints.save(small_state(step), {"config": {"a": 0.1, "b": ["ä"]}, "seconds": 1.5})
    return tmp_path / "run"


def restored(workdir) -> int:
    abstract = jax.eval_shape(lambda: small_state(0))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract
    )
    state, meta = Checkpoints(workdir).restore(abstract, lambda meta: None)
    assert int(state.step) == meta["step"] and (state.params["a"] == meta["step"]).all()
    return meta["step"]


def test_a_flipped_bit_of_the_meta_is_no_other_step(saved):
    """Each one either is noticed or changes no value."""
    folder = saved / "checkpoints" / "4"
    file, whole = folder / "meta" / "metadata", read_meta(folder)
    content, noticed = file.read_bytes(), 0
    at = content.index(b'"step"')
    for number, bit in [(n, b) for n in range(at, at + 10) for b in range(8)] + [
        (n, n % 8) for n in range(0, len(content), 7)
    ]:
        changed = bytearray(content)
        changed[number] ^= 1 << bit
        file.write_bytes(changed)
        try:
            found = read_meta(folder)
        except Exception:  # of many kinds
            noticed += 1
        else:
            assert {name: found.get(name) for name in whole if name != "sha256"} == {
                name: value for name, value in whole.items() if name != "sha256"
            }
    assert noticed > 100
    file.write_bytes(content.replace(b'"step": 4', b'"step": 5').replace(b'"step":4', b'"step":5'))
    assert restored(saved) == 2
    (aside,) = (saved / "damaged").iterdir()
    assert aside.name.startswith("4-") and steps_in(saved) == [2]


def test_a_meta_of_before_there_were_checksums_of_it(saved):
    """It is read, unless it says to be of another step than its folder."""
    for step, says in (("2", 2), ("4", 5)):
        file = saved / "checkpoints" / step / "meta" / "metadata"
        meta = json.loads(file.read_text()) | {"step": says}
        del meta["sha256"]
        file.write_text(json.dumps(meta))
    assert restored(saved) == 2


def test_other_things_among_the_checkpoints(saved):
    """Names that Python takes for digits, or for another writing of a number, are no steps."""
    for name in ("²", "٣", "007", "4.bak", "step_9", "notes"):
        (saved / "checkpoints" / name).mkdir()
    (saved / "checkpoints" / "³").touch()
    assert steps_in(saved) == [4, 2] and restored(saved) == 4
    with Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.save(small_state(6), {})
    assert steps_in(saved) == [6, 4] and restored(saved) == 6
    assert (saved / "checkpoints" / "²").is_dir()


NOT_NOW = [
    PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    OSError(errno.EIO, os.strerror(errno.EIO)),
    MemoryError("Unable to allocate"),
    ValueError(f"Error opening zarr: [OS error 12: ENOMEM {os.strerror(errno.ENOMEM)}]"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", NOT_NOW, ids=lambda error: str(error)[:30])
def test_what_cannot_be_read_just_now_is_not_set_aside(error, saved, monkeypatch):
    restore = ocp.Checkpointer.restore

    def fail(checkpointer, folder, args):
        if folder.name == "4" and "params" in args:
            raise error
        return restore(checkpointer, folder, args)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "restore", fail)
        with pytest.raises(UserError, match="checkpoints/4 cannot be read just now: .*nothing was"):
            restored(saved)
    assert not (saved / "damaged").exists() and restored(saved) == 4


def test_a_file_that_cannot_be_opened_is_not_missing(saved, monkeypatch):
    """Orbax says only that it finds no such item."""
    shutil.move(saved / "checkpoints" / "4" / "ema", saved / "ema")

    def walk(folder, onerror):
        onerror(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "ema"))
        yield from ()

    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", walk)
        with pytest.raises(UserError, match="cannot be read just now: Permission denied"):
            restored(saved)
    assert not (saved / "damaged").exists()
    assert restored(saved) == 2


def best_config(**fields):
    config = configs.default()
    config.evaluation.update(**fields)
    return config


def test_the_best_is_the_least(tmp_path, monkeypatch):
    """By no clock and no number of a step; and it stays after a restart."""
    import time

    clock = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    order = ((4, 3.0, 4), (6, 2.0, 6), (2, 1.0, 2), (8, 1.0, 2), (9, float("nan"), 2))
    for step, value, best_step in order:
        with BestCheckpoint(tmp_path, best_config()) as best:
            saved = best.offer(small_state(step), {"measured": {"fid": value}}, value)
        assert saved == (step == best_step)
        assert steps_in(tmp_path) == [best_step]


def test_the_best_of_other_settings_is_no_rival(tmp_path):
    """Also for the same step, measured anew."""
    with BestCheckpoint(tmp_path, best_config()) as best:
        assert best.offer(small_state(4), {}, 1.0)
    others = best_config(num_samples=5)
    for step, value, kept in ((4, 3.0, True), (6, 5.0, False), (6, 2.0, True)):
        with BestCheckpoint(tmp_path, others) as best:
            assert best.offer(small_state(step), {"value": value}, value) == kept
    assert steps_in(tmp_path) == [6]
    assert read_meta(tmp_path / "checkpoints" / "6")["value"] == 2.0


def test_the_best_of_before_metrics_stays(tmp_path):
    """One that an older version saved cannot be ranked, and is kept beside the new one."""
    with Checkpoints(tmp_path) as older:
        older.save(small_state(4), {"measured": {"fid": 1.0}})
    with BestCheckpoint(tmp_path, best_config()) as best:
        assert best.offer(small_state(6), {}, 3.0)
    assert steps_in(tmp_path) == [6, 4]


def test_a_damaged_best_is_set_aside(tmp_path):
    with BestCheckpoint(tmp_path, best_config()) as best:
        best.offer(small_state(4), {}, 1.0)
    metrics = tmp_path / "checkpoints" / "4" / "metrics" / "metrics"
    for name in ("metrics", "meta"):
        damaged = tmp_path / "checkpoints" / "4" / name
        if name == "metrics":
            metrics.write_text("{")
        else:
            shutil.rmtree(damaged)
        with BestCheckpoint(tmp_path, best_config()) as best:
            assert best.offer(small_state(4), {}, 3.0)
    assert steps_in(tmp_path) == [4]
    assert len(list((tmp_path / "damaged").iterdir())) == 2


def test_the_best_that_cannot_be_read_just_now_is_no_damaged_one(tmp_path, monkeypatch):
    with BestCheckpoint(tmp_path, best_config()) as best:
        best.offer(small_state(4), {}, 1.0)

        def fail(*_, **__):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
        with pytest.raises(UserError, match="cannot be read just now: Input/output error"):
            best.offer(small_state(6), {}, 0.5)
    assert steps_in(tmp_path) == [4] and not (tmp_path / "damaged").exists()


def test_checkpoints_on_another_disk(saved, tmp_path):
    """By a link: what is damaged is set aside on that disk."""
    shutil.move(saved / "checkpoints", tmp_path / "disk" / "checkpoints")
    (saved / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    damage_item(saved / "checkpoints" / "4")
    assert restored(saved) == 2
    assert len(list((tmp_path / "disk" / "damaged").iterdir())) == 1
