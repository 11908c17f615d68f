"""A bar for what takes long, and lines beside it."""

import contextlib
import sys
import types


def progress_bar(total: int, show: bool, what: str, unit: str, initial: int = 0):
    """A tqdm bar; where none is to be shown, something that takes its updates."""
    if not show:
        return contextlib.nullcontext(types.SimpleNamespace(update=lambda count: None))
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, initial=initial)


def say(line: str) -> None:
    """Print to stderr, above a bar that may be there."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)
