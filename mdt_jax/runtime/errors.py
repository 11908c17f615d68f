"""The errors that a user can correct, and how they are recognised."""

import errno
import os
import resource


class UserError(ValueError):
    """Says in one line what was wrong, where, and what to do. Commands print it and exit with 2."""


class DamagedError(UserError):
    """A file that this package wrote does not have the content that it wrote."""


class NotFiniteError(UserError):
    """Samples have NaN or infinity. A training run continues without them."""


def causes(error: BaseException) -> list[BaseException]:
    """An error, the errors that caused it and the members of exception groups, each once."""
    chain, pending = [], [error]
    while pending and len(chain) < 100:
        each = pending.pop()
        if each not in chain:
            chain.append(each)
            pending += [e for e in (each.__cause__, each.__context__) if e is not None]
            pending += getattr(each, "exceptions", ())
    return chain


def exceeded_limit(error: BaseException) -> str:
    """The message for the limit of the machine that caused an error; "" if none did.

    A UserError that memory caused already says what is too large.
    """
    chain = causes(error)
    text = " ".join(f"{each} {getattr(each, 'errno', '')}" for each in chain)
    if any(os.strerror(number) in text for number in (errno.EMFILE, errno.ENFILE)):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"too many open files: this process may open {soft} at once; raise the limit "
            f"(ulimit -n {max(4096, soft * 2)}; the hard limit is {hard}) and run again"
        )
    memory = ("RESOURCE_EXHAUSTED", "bad_alloc", os.strerror(errno.ENOMEM))
    if not isinstance(error, UserError) and (
        any(isinstance(each, MemoryError) for each in chain) or any(word in text for word in memory)
    ):
        return (
            "out of memory: a smaller batch_size or image_size, a smaller network or more devices "
            "take less"
        )
    return ""
