"""Signatures of what the processes of a run tell each other.

JAX's coordination service asks nobody who they are: whoever reaches its port can read and set keys.
A signature tells what this run's processes said from what a process of another run, or anybody
else, has put in its place. It hides nothing, and it does not keep others from the port.
"""

import hmac
import os

TOKEN = "MDT_JAX_RUN_TOKEN"  # an environment variable, the same in all processes of a run


def sign(place: str, text: str) -> bytes:
    """The text after its HMAC-SHA256 under the run's token, and a space.

    place: what it is said about or where it is left; it counts, so that no text can be moved.
    """
    content = text.encode()
    return _code(place, content) + b" " + content


def signed_text(place: str, signed: bytes) -> str | None:
    """The text that `sign` was given for that place; None where this run's token
    did not sign it.
    """
    code, _, content = signed.partition(b" ")
    if not hmac.compare_digest(code, _code(place, content)):
        return None
    return content.decode()


def _code(place: str, content: bytes) -> bytes:
    """Without a token anybody can make it, and it tells mistakes apart, not intent."""
    token = os.environ.get(TOKEN, "").encode()
    return hmac.digest(token, place.encode() + b"\n" + content, "sha256").hex().encode()
