"""Damaged files of every kind; `python -m tests.fuzz` tries more of them."""

import os
import random

import pytest

from tests import fuzz
from tests.fuzz_kinds import KINDS


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return fuzz.Bench(tmp_path_factory.mktemp("fuzz"))


def test_some_hundred_damaged_files(bench):
    outcomes, failed = set(), []
    for number, kind, draw in fuzz.cases(seed=0, count=12 * len(KINDS), kinds=KINDS):
        title, outcome = bench.run(kind, draw)
        outcomes.add(outcome.how)
        if outcome.failed:
            failed.append(f"case {number}, {title}: {outcome.how}")
    assert not failed, "\n".join(failed)
    assert outcomes == {"same", "other", "refused", "fell back"}


@pytest.mark.parametrize("place", fuzz.PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_no_file(kind, place, bench, monkeypatch):
    """A pipe would be waited for without end, each in a way of its own."""
    monkeypatch.setattr(fuzz, "SECONDS", 5)
    draw = random.Random(0)
    for name in bench.files(kind)[:6]:
        title, outcome = bench.case(kind, name, place, draw)
        assert not outcome.failed, f"{title}: {outcome.how}"


def test_what_fails_is_seen(bench, monkeypatch):
    """A traceback, a hang, values that are others, and a file that is left."""
    kind = next(kind for kind in KINDS if kind.name == "lock")
    bench.sound(kind)
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)

    def of(read, **changes):
        broken = kind._replace(read=read, **changes)
        return bench.case(broken, ".lock", fuzz.empty, random.Random(0))[1].how

    def wait(folder):
        while True:
            pass

    assert of(lambda folder: 1 // 0).startswith("TRACEBACK ZeroDivisionError")
    assert of(wait).startswith("HANG")
    assert of(lambda folder: 0, told=True).startswith("OTHER VALUES")
    assert of(lambda folder: (folder / "x.tmp").touch()) == "LEFT x.tmp"
    assert of(lambda folder: os.read(2**20, 1)).startswith("MESSAGE names no file")
