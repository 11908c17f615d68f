"""One run at a time: who is refused, and what a lock that was left does."""

import contextlib
import errno
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

from mdt_jax import config as configs
from mdt_jax import evaluate, sample
from mdt_jax.data import latents_writer
from mdt_jax.runtime import locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.train import encoding
from tests.conftest import ROOT, SMOKE, run_here, train_here
from tests.runs import SAMPLE

HOLD = """
import pathlib, sys, time
from mdt_jax.runtime import locks
with locks.held(pathlib.Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "WATCH", 0.5)


def refused(lock) -> str:
    with pytest.raises(UserError) as error, locks.held(lock, "it"):
        pass
    return str(error.value)


def test_the_second_is_refused_and_told_who_holds_it(tmp_path):
    lock = tmp_path / "new" / ".lock"
    with locks.held(lock, "it"):
        since = json.loads(lock.read_text())["since"]
        line = refused(lock)
        assert f"it is in use by process {os.getpid()} on {socket.gethostname()} since {since}" in (
            line
        )
        with pytest.raises(UserError, match="is in use"):
            locks.check_free(lock, "it")
    assert not lock.exists()
    locks.check_free(lock, "it")
    with locks.held(lock, "it"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_that_fails_lets_go(tmp_path):
    with pytest.raises(KeyError), locks.held(tmp_path / ".lock", "it"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_holds_nothing(tmp_path):
    lock = tmp_path / ".lock"
    holding = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holding.stdout.readline() == "held\n"
    assert f"by process {holding.pid} on" in refused(lock)
    holding.kill()
    holding.wait()
    assert lock.exists()
    with locks.held(lock, "it"):
        assert json.loads(lock.read_text())["process"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01", "[" * 900])
def test_a_lock_of_other_content(content, tmp_path):
    lock = tmp_path / ".lock"
    lock.write_text(content)
    with locks.held(lock, "it"):
        assert "process" in json.loads(lock.read_text())


def elsewhere(lock):
    lock.write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "then"}))


@contextlib.contextmanager
def touched(lock):
    """As a holder does whose locks are not seen from here."""
    ended = threading.Event()

    def touch():
        while not ended.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=touch)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_a_lock_that_another_host_left(tmp_path, quick, capsys):
    """It is taken once nobody gives a sign of life, whatever the clocks say."""
    lock = tmp_path / ".lock"
    elsewhere(lock)
    os.utime(lock, (time.time() + 1e5, time.time() + 1e5))
    with locks.held(lock, "it"):
        pass
    assert "was left by process 7 on elsewhere; looking" in capsys.readouterr().err
    elsewhere(lock)
    with touched(lock):
        assert "it is in use by process 7 on elsewhere since then" in refused(lock)


def test_a_file_system_without_locks(tmp_path, quick, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    lock = tmp_path / ".lock"
    with locks.held(lock, "it"):
        assert "is in use by process" in refused(lock)
    elsewhere(lock)
    with locks.held(lock, "it"):
        pass
    assert not lock.exists()


def test_a_lock_that_cannot_be_made():
    line = refused(pathlib.Path("/dev/null/new/.lock"))
    assert line.startswith("it cannot be written to: /dev/null/new/.lock: ")


def test_two_runs_in_one_workdir(tmp_path):
    workdir = tmp_path / "run"
    with locks.held(workdir / ".lock", "it"):
        printed = train_here(*SMOKE, f"--workdir={workdir}", expect=2)
        assert printed.count("\n") == 1
        assert f"error: workdir {workdir} is in use by process {os.getpid()} on" in printed
        assert [path.name for path in workdir.iterdir()] == [".lock"]


@pytest.mark.parametrize("out", ["a.npz", "a.png", "a", "walk.gif"])
def test_two_samplers_on_one_output(out, tmp_path):
    flags = ["--num_samples=3", f"--out={tmp_path / out}"]
    if out == "walk.gif":
        flags += ["--show=trajectory", "--frames=2"]
    lock = tmp_path / "a" / ".lock" if out == "a" else locks.beside(tmp_path / out)
    with locks.held(lock, "it"):
        printed = run_here(sample.main, *SAMPLE, *flags, expect=2)
        assert f"error: {tmp_path / out} is in use by process" in printed.splitlines()[-1]
        assert not list(tmp_path.rglob("*.np?")) and not list(tmp_path.rglob("*.png"))
    run_here(sample.main, *SAMPLE, *flags)
    assert not list(tmp_path.rglob(".*"))


def test_two_evaluators_on_one_card(trained, tmp_path):
    flags = [f"--samples={trained}/samples.npz", "--reference=digits", "--features=pixels"]
    flags += [f"--out={tmp_path / 'card.json'}"]
    with locks.held(tmp_path / ".card.json.lock", "it"):
        printed = run_here(evaluate.main, *flags, expect=2)
        assert f"{tmp_path / 'card.json'} is in use by process" in printed
    run_here(evaluate.main, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_two_encoders_of_one_part(tmp_path):
    """Others of the same division work beside it; those of another one are refused."""
    making = latents_writer.CacheWriter(tmp_path / "cache", {"images": 8, "shard_images": 2})
    with making.lock((0, 2)):
        with making.lock((1, 2)):
            assert not making.start()
        for part, name in (((0, 2), "part 1 of 2 of"), ((0, 1), ""), ((2, 3), "")):
            said = f"{name}.*cache is in use by process"
            with pytest.raises(UserError, match=said), making.lock(part):
                pass
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["unfinished.json"]


def test_encode_holds_its_part(monkeypatch, tmp_path):
    """The whole command, up to where it would write."""
    monkeypatch.setattr(encoding, "_open_images", lambda config: mock.MagicMock(classes=[]))
    monkeypatch.setattr(encoding, "_load_vae", lambda config: mock.MagicMock())
    monkeypatch.setattr(encoding, "_describe", lambda *_: {"images": 8, "shard_images": 2})
    config = configs.default()
    config.model.num_classes = 0
    said = pytest.raises(UserError, match="part 1 of 1 of .*cache is in use by process")
    with locks.held(tmp_path / "cache" / ".part-1-of-1.lock", "it"), said:
        encoding.encode(config, tmp_path / "cache", 2, (0, 1))
