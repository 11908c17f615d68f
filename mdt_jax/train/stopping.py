"""What a run does when it is told to stop."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

from jax.experimental import multihost_utils

from mdt_jax.distributed import say, several


class StopSignal:
    """Turns SIGTERM, preemption notices and Ctrl-C into a wish that the training loop looks at.

    Of several processes one needs to be told; all hear of it at the same step.
    """

    def __init__(self):
        self._asked = False
        if several():  # JAX listens to SIGTERM and passes it on

            def pass_on(*_):
                signal.signal(signal.SIGINT, signal.default_int_handler)  # the second time
                os.kill(os.getpid(), signal.SIGTERM)

            signal.signal(signal.SIGINT, pass_on)
        else:
            self._on_both(self._ask)

    def _ask(self, *_):
        self._asked = True

    def _on_both(self, handler: Callable) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop before `step`; every process must ask at every step."""
        if several():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    @contextlib.contextmanager
    def leaving_at_once(self, line: str):
        """What is done inside may be left half done: who asks to stop there, stops there.

        line: what is said then. Of several processes each hears of it when all are through.
        """

        def leave(*_):
            say(line)
            sys.exit(0)

        if not several():
            if self._asked:
                leave()
            self._on_both(leave)
        yield
        if not several():
            self._on_both(self._ask)

    def exit_at_once(self, step: int) -> None:
        """From here on (and if it was asked meanwhile) leave with exit code 0."""
        if self.asked(step):
            sys.exit(0)
        self._on_both(lambda *_: sys.exit(0))
