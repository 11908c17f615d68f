"""Bars for what takes long, and all that is printed beside them; one rule for all of them."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

TERMINAL_SECONDS, FILE_SECONDS = 0.5, 10.0
# What a terminal obeys instead of showing it; names of files and classes may hold it.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_lost: list[OSError] = []  # why stdout could not be written


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
            with _kept(self._stream):
                self._stream.write(state + "\n")

    def flush(self) -> None:
        with _kept(self._stream):
            self._stream.flush()


def progress_bar(total: int, show: bool, what: str, unit: str, initial: int = 0):
    """A tqdm bar on stderr; where none is to be shown, something that takes its updates.

    A terminal sees it move every half second. Anything else, such as the log of a batch job, gets
    a full line every ten seconds, one at the beginning and one at the end.
    """
    if not show or sys.stderr is None:
        return contextlib.nullcontext(_NoBar())
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, initial=initial,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=TERMINAL_SECONDS if terminal else FILE_SECONDS,
        # A bar inside another one goes when it is done; lines never move.
        position=None if terminal else 0, leave=None if terminal else True,
    )  # fmt: skip


def log(line: str) -> None:
    """Print a line to stderr, above a bar that may be there, with control characters as escapes."""
    text = CONTROL.sub(_escaped, line)
    with _kept(sys.stderr) as stream:
        if stream is not None and "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(text, file=stream)
        elif stream is not None:
            print(text, file=stream)


def print_result(text: str) -> None:
    """Print a result to stdout at once, control characters but line ends and tabs as escapes.

    Where stdout takes no more the work goes on, and `lost` says so at its end.
    """
    with _kept(sys.stdout) as stream:
        if stream is not None:
            print(
                CONTROL.sub(
                    lambda found: found[0] if found[0] in "\n\t" else _escaped(found), text
                ),
                file=stream,
                flush=True,
            )


def lost() -> OSError | None:
    """What kept stdout from being written so far, if anything did."""
    with _kept(sys.stdout) as stream:
        if stream is not None:
            stream.flush()
    error = _lost[0] if _lost else None
    _lost.clear()
    return error


def _escaped(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


@contextlib.contextmanager
def _kept(stream: TextIO | None) -> Iterator[TextIO | None]:
    """A stream that is replaced by nothing where it cannot be written: full, or a closed pipe."""
    try:
        yield stream
    except OSError as error:
        if stream is sys.stdout:
            _lost.append(error)
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]
            os.close(nothing)
