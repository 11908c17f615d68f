"""Bars for what takes long, and lines beside them; one rule for all of them."""

import contextlib
import sys
from typing import TextIO

TERMINAL_SECONDS, FILE_SECONDS = 0.5, 10.0


class _NoBar:
    """Takes a bar's updates and shows nothing."""

    def update(self, count: int) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass


class _Lines:
    """A stream for tqdm that keeps each state of a bar as a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        state = text.strip("\r\n ")
        if state:
            self._stream.write(state + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, show: bool, what: str, unit: str, initial: int = 0):
    """A tqdm bar on stderr; where none is to be shown, something that takes its updates.

    A terminal sees it move every half second. Anything else, such as the log of a batch job, gets
    a full line every ten seconds, one at the beginning and one at the end.
    """
    if not show:
        return contextlib.nullcontext(_NoBar())
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, initial=initial,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=TERMINAL_SECONDS if terminal else FILE_SECONDS,
    )  # fmt: skip


def say(line: str) -> None:
    """Print to stderr, above a bar that may be there."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)
