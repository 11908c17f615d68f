"""What numbers may be at most, and what to say where a limit of the machine is met."""

import errno
import os
import resource
from typing import Any

from mdt_jax.runtime.errors import UserError

# Of fields and flags by their whole or their last name, far above what anybody has trained or
# drawn. What several of them make together is another question, `costs.check_memory`'s.
MOST = {
    "hidden_size": 65_536,
    "depth": 1_000,
    "side_layers": 1_000,
    "num_classes": 10_000_000,
    "image_size": 16_384,
    "channels": 1_024,
    "batch_size": 131_072,
    "workers": 1_024,
    "num_samples": 10_000_000,
    "num_resamples": 10_000,
    "jump_length": 10_000,
    "frames": 10_000,
    "diffusion.steps": 100_000,
}
MOST_TOKENS = 16_384  # the relative position bias has an index of their number squared
WHOLE = 2**31 - 1  # other whole numbers
REAL = 1e38  # about float32's largest
FILES = (errno.EMFILE, errno.ENFILE)


def check_number(name: str, value: Any) -> None:
    """Raise UserError, naming the field or flag, for NaN, infinity and numbers beyond all use."""
    whole = isinstance(value, int)
    most = MOST.get(name, MOST.get(name.rpartition(".")[2].lstrip("-"), WHOLE)) if whole else REAL
    if not whole and not abs(value) <= REAL:
        raise UserError(f"{name} is {value}; it must be a finite number, of at most {REAL:g}")
    if abs(value) > most:
        shown = str(value) if abs(value) < 10**20 else f"a number of {len(hex(value)) * 4} bits"
        raise UserError(f"{name} is {shown}; it must be at most {most:,}")


def check_tokens(tokens: int, hidden_size: int) -> None:
    """Raise UserError where an image makes more tokens than position embeddings are meant for."""
    if tokens > MOST_TOKENS or tokens * hidden_size > 2**26:
        raise UserError(
            f"an image makes {tokens:,} tokens of model.hidden_size {hidden_size}, which is too "
            f"much: at most {MOST_TOKENS:,} tokens, and 2^26 numbers in all; a smaller "
            "data.image_size or a larger model.patch_size makes fewer"
        )


def met(error: BaseException) -> str:
    """Which limit of the machine made an error, in words; "" where none did."""
    said = " ".join(f"{each} {getattr(each, 'errno', '')}" for each in _chain(error))
    if any(os.strerror(number) in said for number in FILES):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"too many open files: this process may open {soft} at once; raise the limit "
            f"(ulimit -n {max(4096, soft * 2)}; the hard limit is {hard}) and run again"
        )
    if isinstance(error, UserError):  # which says what is too large
        return ""
    if any(isinstance(each, MemoryError) for each in _chain(error)) or any(
        words in said for words in ("RESOURCE_EXHAUSTED", "bad_alloc", os.strerror(errno.ENOMEM))
    ):
        return (
            "out of memory: a smaller batch_size or image_size, a smaller network or more devices "
            "take less"
        )
    return ""


def _chain(error: BaseException) -> list[BaseException]:
    """An error, what it came from, and the parts of groups."""
    found, left = [], [error]
    while left and len(found) < 100:
        each = left.pop()
        if each in found:
            continue
        found.append(each)
        left += [e for e in (each.__cause__, each.__context__) if e is not None]
        left += getattr(each, "exceptions", ())
    return found
