"""What a run does when it is told to stop."""

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
    """The run was told to stop while it waited; its state is that of a whole step."""


class _Phase(enum.Enum):
    STARTING = enum.auto()
    TRAINING = enum.auto()
    WAITING = enum.auto()
    ENDED = enum.auto()


class StopSignal:
    """What SIGTERM, preemption notices and Ctrl-C do to a run.

    While it starts, they end it, with 128 + the number of the signal. While it trains, they are a
    wish that the training loop looks at; of several processes one needs to be told, and all hear of
    it at the same step. A second Ctrl-C is `interrupts.answered`'s.
    """

    def __init__(self):
        self._asked, self._phase = False, _Phase.STARTING
        interrupts.end_soon("stopped before the first step; the same command goes on")
        self._listen()

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told)

    def _told(self, number: int, _) -> None:
        self._asked = True
        if self._phase is _Phase.ENDED:
            sys.exit(0)
        if several():  # JAX listens to SIGTERM and passes it on
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._phase is _Phase.STARTING:
            sys.exit(128 + number)
        elif self._phase is _Phase.WAITING:
            raise Stopped

    def wait_for_steps(self) -> None:
        """From here on there is something to save: signals are a wish."""
        self._phase = _Phase.TRAINING
        interrupts.end_soon(None)

    def asked(self, step: int) -> bool:
        """Whether to stop before `step`; every process must ask at every step."""
        if several():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """What is done inside may be left half done: a signal raises Stopped there.

        Of several processes each hears of it when all are through.
        """
        self._phase = _Phase.WAITING
        try:
            if self._asked and not several():
                raise Stopped
            yield
        finally:
            self._phase = _Phase.TRAINING

    def exit_at_once(self, step: int) -> None:
        """From here on (and if it was asked meanwhile) leave with exit code 0."""
        if self.asked(step):
            sys.exit(0)
        self._phase = _Phase.ENDED
        self._listen()
