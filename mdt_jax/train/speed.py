"""Time, throughput, memory and profiler traces of a run."""

import contextlib
import pathlib
import re
import resource
import sys
import time
from collections.abc import Iterator

import jax

from mdt_jax.runtime.errors import UserError


class Clock:
    """Counts the seconds of training, without pauses. waited: those spent waiting for data.

    before: seconds of training in earlier processes.
    """

    def __init__(self, before: float = 0.0):
        self._began = time.perf_counter() - before
        self.waited = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began


class Speed:
    """Throughput since the last line of the log.

    images: the global batch size. flops: floating-point operations of training for each image,
    recomputation not counted. peak: the most of them that a device does in a second, if known.
    """

    def __init__(self, clock: Clock, step: int, images: int, flops: int, peak: float | None):
        self._clock, self._images, self._flops, self._peak = clock, images, flops, peak
        self._last = step, clock.seconds(), clock.waited

    def since(self, step: int, steps: int) -> dict[str, float]:
        """The fields of the log up to `step` of `steps`, which docs/training.md explains."""
        (step_before, seconds_before, waited_before), now = self._last, self._clock.seconds()
        self._last = step, now, self._clock.waited
        spent, done = max(now - seconds_before, 1e-9), step - step_before
        each = done * self._images / spent / jax.device_count()
        values = {
            "images_per_second": each * jax.device_count(),
            "images_per_second_per_device": each,
            "tflops_per_device": each * self._flops / 1e12,
            "data_wait": (self._clock.waited - waited_before) / spent,
            "memory_gb": memory_high_water() / 1e9,
            "eta_seconds": spent / max(done, 1) * (steps - step),
        }
        if self._peak:
            values["mfu"] = each * self._flops / self._peak
        values = {name: float(f"{value:.6g}") for name, value in values.items()}
        return {"seconds": round(now, 3), **values}


def memory_high_water() -> int:
    """The peak of bytes in use on one of this process's devices.

    CPU devices do not report it; there it is the peak of the process's resident memory.
    """
    statistics = [device.memory_stats() for device in jax.local_devices()]
    if all(stats and "peak_bytes_in_use" in stats for stats in statistics):
        return max(stats["peak_bytes_in_use"] for stats in statistics)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Profile:
    """A profiler trace of some steps, for the viewers of TensorBoard and Perfetto.

    steps: the first and the last step, for example "10:13", counted as in metrics.jsonl; "" for no
    trace. Raises UserError for anything else.
    """

    def __init__(self, steps: str, folder: pathlib.Path):
        match = re.fullmatch(r"([0-9]+):([0-9]+)", steps)
        if steps and (not match or not 1 <= int(match[1]) <= int(match[2])):
            raise UserError(f"--profile_steps={steps} must be FIRST:LAST, for example 10:13")
        self._first, self._last = (int(match[1]), int(match[2])) if match else (0, 0)
        self._folder, self._running = folder, False

    def before(self, step: int, state) -> None:
        """Start or stop the trace; call it before each step, with the state that it starts from."""
        if self._first <= step <= self._last and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step > self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
        self._running = False
