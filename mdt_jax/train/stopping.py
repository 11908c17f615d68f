"""What SIGTERM, Ctrl-C and preemption notices do to a run."""

import contextlib
import enum
import os
import signal
import sys
from collections.abc import Iterator

from jax.experimental import multihost_utils

from mdt_jax.runtime import interrupts
from mdt_jax.runtime.hosts import several


class Stopped(BaseException):
    """A signal asked the run to stop. Its state is that of a whole number of steps."""


class _Phase(enum.Enum):
    STARTING = enum.auto()
    TRAINING = enum.auto()
    INTERRUPTIBLE = enum.auto()
    ENDED = enum.auto()


class StopSignal:
    """Handles SIGTERM, Ctrl-C and preemption notices of a run.

    Before the first step a signal ends the process with exit code 128 + its number. While the run
    trains, a signal sets a flag that the training loop checks; of several processes one needs to
    get it, and all stop at the same step. `interrupts.answered` handles a second Ctrl-C.

    ends_process: the process has nothing to do after the run. exit_code: that of a process which a
    signal ends after the first step.
    """

    def __init__(self, ends_process: bool = False):
        self.ends_process, self.exit_code = ends_process, 0
        self._requested, self._phase = False, _Phase.STARTING
        interrupts.end_soon("stopped before the first step; the same command resumes")
        self._install()

    def _install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _) -> None:
        self._requested = True
        if self._phase is _Phase.ENDED:
            sys.exit(self.exit_code)
        if several():  # JAX handles SIGTERM, and tells the other processes
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._phase is _Phase.STARTING:
            sys.exit(128 + number)
        elif self._phase is _Phase.INTERRUPTIBLE:
            raise Stopped

    def start_training(self) -> None:
        """From now on there is a state to save, and signals set the flag."""
        self._phase = _Phase.TRAINING
        interrupts.end_soon(None)

    def requested(self, step: int) -> bool:
        """Whether to stop before `step`; every process must call this at every step."""
        if several():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises Stopped at once, since nothing there has to be completed.

        Several processes stop at their next step instead.
        """
        self._phase = _Phase.INTERRUPTIBLE
        try:
            if self._requested and not several():
                raise Stopped
            yield
        finally:
            self._phase = _Phase.TRAINING

    def exit_at_once(self, step: int) -> None:
        """From now on a signal, also one that has arrived, ends the process."""
        if self.requested(step):
            sys.exit(self.exit_code)
        self._phase = _Phase.ENDED
        self._install()
