"""All output to the terminal: messages and progress bars to stderr, results to stdout."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TextIO

TERMINAL_SECONDS, FILE_SECONDS = 0.5, 10.0
# Characters that a terminal obeys or cannot show. Names of files and classes may contain them.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Called with what is done, how many of its units, and of how many.
Listener = Callable[[str, int, int], None]
_stdout_errors: list[OSError] = []
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def escape(text: str, keep: str = "") -> str:
    """The text with control characters, except those in `keep`, as escapes like \\x1b."""

    def replacement(match: re.Match) -> str:
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    return CONTROL.sub(replacement, text)


def log(line: str) -> None:
    """Print a line to stderr, above the progress bar if there is one."""
    clear_bar = contextlib.nullcontext()
    if sys.stderr is not None and "tqdm" in sys.modules:
        clear_bar = sys.modules["tqdm"].tqdm.external_write_mode(file=sys.stderr)
    with clear_bar:
        _write(sys.stderr, escape(line) + "\n")


@functools.cache
def log_once(line: str) -> None:
    """`log` a line, but not a second time, and not an empty one."""
    if line:
        log(line)


def print_result(text: str) -> None:
    """Print a result to stdout at once. If stdout fails, the work continues: see `stdout_error`."""
    error = _write(sys.stdout, escape(text, keep="\n\t") + "\n")
    if error is not None:
        _stdout_errors.append(error)


def stdout_error() -> OSError | None:
    """The first error of `print_result` since the last call, or None."""
    error = _stdout_errors[0] if _stdout_errors else None
    _stdout_errors.clear()
    return error


def _write(stream: TextIO | None, text: str) -> OSError | None:
    """Write a text. On an error (disk full, closed pipe) redirect the stream to /dev/null."""
    if stream is None:
        return None
    try:
        stream.write(text)
        stream.flush()
        return None
    except OSError as error:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), stream.fileno())
        return error


class _NoBar:
    """Takes a bar's updates and shows nothing."""

    def update(self, count: int) -> None:
        """Take `count` units that are done."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass


class _Listened(_NoBar):
    """Tells the listener of this thread."""

    def __init__(self, listener: "Listener", what: str, total: int, done: int):
        self._listener, self._what, self._total, self._done = listener, what, total, done
        self.update(0)

    def update(self, count: int) -> None:
        self._done += count
        self._listener(self._what, self._done, self._total)


class _Lines:
    """A stream for tqdm that writes each state of a bar to stderr as a line of its own."""

    def write(self, text: str) -> None:
        state = text.strip("\r\n ")
        if state:
            _write(sys.stderr, state + "\n")

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, the progress of this thread goes to a listener instead of to bars.

    An error that the listener raises ends the work.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def progress_bar(total: int, show: bool, what: str, unit: str, initial: int = 0):
    """A context manager of a tqdm bar on stderr, or of an object that ignores its updates.

    On a terminal the bar moves every half second. A file, for example the log of a batch job, gets
    a line at the beginning, every ten seconds and at the end.
    """
    listener = _listener.get()
    if show and listener is not None:
        return contextlib.nullcontext(_Listened(listener, what, total, initial))
    if not show or sys.stderr is None:
        return contextlib.nullcontext(_NoBar())
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit=unit, initial=initial,
        file=sys.stderr if terminal else _Lines(),
        mininterval=TERMINAL_SECONDS if terminal else FILE_SECONDS,
        miniters=1,  # else tqdm looks at the clock as seldom as the pace before suggests
        # An inner bar disappears at its end; lines never move.
        position=None if terminal else 0, leave=None if terminal else True,
    )  # fmt: skip
