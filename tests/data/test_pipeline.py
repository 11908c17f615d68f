"""Batch k is a pure function of (seed, k): of no host count, worker count or place of resuming."""

import dataclasses
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import folders, pipeline
from mdt_jax.data.crops import CroppedImages
from mdt_jax.runtime.errors import UserError
from tests.small_data import write_pictures


def order(size, batch_size, count, **fields):
    plan = pipeline.Shuffled(size, 3, batch_size, np.arange(batch_size), **fields)
    return np.concatenate([plan[n][0] for n in range(count)])


def test_every_image_once_an_epoch_in_a_new_order():
    taken = order(20, 7, 20)
    epochs = taken.reshape(7, 20)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 7
    np.testing.assert_array_equal(order(20, 7, 1, start=11), taken[77:84])
    assert not np.array_equal(
        pipeline.Shuffled(20, 4, 7, np.arange(7))[0][0], taken[:7]
    )  # another seed
    far = pipeline.Shuffled(20, 3, 7, np.arange(7), start=10**9)[0]
    assert far[0].shape == far[1].shape == (7,)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    files = folders.load(write_pictures(tmp_path_factory.mktemp("pictures"), 22))
    return CroppedImages(files, sides=(16, 16), crop="random", flip=True)


def read(source, steps, start=0, hosts=1, workers=0, batch_size=8):
    """Batches start … start + steps − 1, put together from what each host reads."""
    each = batch_size // hosts
    found = []
    for host in range(hosts):
        rows = np.arange(host * each, (host + 1) * each)
        plan = pipeline.Shuffled(len(source), 1, batch_size, rows, start)
        stream = pipeline.batches(source, plan, workers)
        found.append([next(stream) for _ in range(steps)])
        stream.close()
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*found, strict=True)
    ]


def equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
    return True


def test_resuming_on_other_hosts_goes_on_with_the_same_batches(squares):
    straight = read(squares, steps=9)
    assert straight[0]["images"].shape == (8, 16, 16, 3)
    assert len({batch["images"].tobytes() for batch in straight}) == 9
    resumed = read(squares, 3) + read(squares, 3, start=3, hosts=2) + read(squares, 3, 6, hosts=4)
    assert equal(straight, resumed)


def test_worker_processes_change_nothing(squares):
    assert equal(read(squares, 5, start=2, hosts=2), read(squares, 5, start=2, hosts=2, workers=2))


@dataclasses.dataclass(frozen=True)
class Starts:
    """A source; starts: whether it asks JAX for devices where it reads."""

    starts: bool
    classes = ()

    def __len__(self):
        return 4

    def take(self, items, u):
        if self.starts:
            import jax

            jax.devices()
        return {"read": np.ones(len(items)), "status": np.zeros(len(items), np.int8)}


def test_workers_start_no_jax(monkeypatch):
    """On a platform that is nowhere, only what starts JAX's devices fails."""
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    plan = [(np.arange(2), np.ones(2))] * 2
    assert len(list(pipeline.batches(Starts(False), plan, workers=1))) == 2
    with pytest.raises(Exception, match="nowhere"):
        list(pipeline.batches(Starts(True), plan, workers=1))


def test_damaged_images_are_named_counted_and_replaced(tmp_path, capfd):
    folder = write_pictures(tmp_path / "pictures", 12)
    (folder / "2" / "000.jpg").write_bytes(b"no picture")
    whole = (folder / "9" / "001.jpg").read_bytes()
    (folder / "9" / "001.jpg").write_bytes(whole[: len(whole) // 2])
    source = CroppedImages(folders.load(folder), sides=(16, 16))
    plan = pipeline.Shuffled(12, 0, 6, np.arange(6))
    for workers in (0, 1):
        stream = pipeline.batches(source, plan, workers, max_damaged=2)
        found = [next(stream) for _ in range(6)]
        stream.close()
        printed = capfd.readouterr().err
        assert printed.count("is left out") == 2  # each is named once
        assert f"{folder}/2/000.jpg is left out: cannot identify image" in printed
        assert f"{folder}/9/001.jpg is left out: " in printed
        for batch in found:
            assert all(image.any() for image in batch["images"])
        stream = pipeline.batches(source, plan, workers, max_damaged=1)
        with pytest.raises(UserError, match="read: 2, the last .*; data.max_damaged is 1"):
            [next(stream) for _ in range(6)]
        capfd.readouterr()


def test_a_picture_that_is_too_long_is_not_called_damaged(tmp_path, capfd):
    Image.new("L", (500_000, 1)).save(tmp_path / "0.png")
    Image.new("L", (20, 20)).save(tmp_path / "1.png")
    source, plan = CroppedImages(folders.load(tmp_path), sides=(8, 8)), [(np.arange(2), np.ones(2))]
    with pytest.raises(UserError, match="read: 1, the last .*0.png: it is too long: 1×500000"):
        next(pipeline.batches(source, plan))
    assert "damaged" not in capfd.readouterr().err
    next(pipeline.batches(source, plan, max_damaged=1))


def test_where_no_image_can_be_read(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(b"")
    source = CroppedImages(folders.load(tmp_path), sides=(8, 8))
    with pytest.raises(UserError, match=r"\d.png cannot be read: cannot identify image"):
        next(pipeline.batches(source, pipeline.Shuffled(4, 0, 2, np.arange(2)), 0, 100))


def test_a_worker_that_is_killed_is_one_line(squares):
    rows = np.arange(8)
    stream = pipeline.batches(squares, pipeline.Shuffled(len(squares), 0, 8, rows), workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a process that reads data was killed"):
        for _ in range(100):
            next(stream)


@dataclasses.dataclass(frozen=True)
class Large(Starts):
    """Batches that do not fit the pipe between processes."""

    def take(self, items, u):
        return {"images": np.ones((2**22,)), "status": np.zeros(len(items), np.int8)}


def test_workers_end_when_nobody_reads_their_batches():
    """Grain by itself waits 25 s for each of those that have begun to send one."""
    plan = pipeline.Shuffled(4, 0, 4, np.arange(4))
    stream = pipeline.batches(Large(False), plan, workers=2)
    for _ in range(3):
        next(stream)
    workers = multiprocessing.active_children()
    time.sleep(1)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 12 and len(workers) == 2
    for worker in workers:
        worker.join(5)
        assert worker.exitcode is not None


def test_in_their_own_order(squares):
    items = np.arange(22)
    plan = [(items[i : i + 5], np.ones(5)[: len(items[i : i + 5])]) for i in range(0, 22, 5)]
    batches = list(pipeline.batches(dataclasses.replace(squares, crop="center"), plan))
    labels = np.concatenate([batch["labels"] for batch in batches])
    np.testing.assert_array_equal(labels, squares.files.labels)


def test_grey_and_wide_images(tmp_path):
    Image.fromarray(np.full((30, 20), 77, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((30, 20, 4), 9, np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(np.full((9, 40), 257 * 5, np.uint16)).save(tmp_path / "c.png")
    Image.new("CMYK", (33, 7), (0, 255, 255, 0)).save(tmp_path / "d.tiff")
    files = folders.load(tmp_path)
    rgb = CroppedImages(files, sides=(8, 8)).take(np.arange(4), np.ones(4))["images"]
    assert [tuple(image[4, 4].tolist()) for image in rgb] == [
        (77, 77, 77), (9, 9, 9), (5, 5, 5), (255, 0, 0),
    ]  # fmt: skip
    grey = CroppedImages(files, sides=(8, 8), channels=1).take(np.arange(4), np.ones(4))["images"]
    assert grey.shape == (4, 8, 8, 1) and grey[:, 4, 4, 0].tolist() == [77, 9, 5, 76]


def test_what_is_not_the_images_fault_is_an_error(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 12)
    source = CroppedImages(folders.load(folder), sides=(16, 16))
    (folder / "2" / "000.jpg").unlink()
    plan = pipeline.Shuffled(12, 0, 12, np.arange(12))
    for workers in (0, 1):
        with pytest.raises(UserError, match="the data cannot be read: .*No such file.*2/000.jpg"):
            next(pipeline.batches(source, plan, workers, max_damaged=100))


@dataclasses.dataclass(frozen=True)
class Slow:
    """A source that takes a tenth of a second for a batch."""

    def take(self, items, u):
        time.sleep(0.1)
        return {"status": np.zeros(len(items), np.int8)}


def test_reading_goes_on_while_a_step_runs():
    stream = pipeline.batches(Slow(), [(np.arange(2), np.ones(2))] * 11)
    next(stream)
    started = time.perf_counter()
    for _ in range(10):
        time.sleep(0.1)  # the step
        next(stream)
    assert time.perf_counter() - started < 1.6  # one after the other it would be 2
