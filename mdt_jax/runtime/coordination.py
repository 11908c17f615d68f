"""Signed values in JAX's coordination service, which connects the processes of a run.

The service does not authenticate its clients: anybody who reaches its port can read and set keys.
A signature shows that a process of this run has set a value. It neither hides the value nor
protects the port.
"""

import hmac
import itertools
import os
import threading
from typing import Any

# jax.distributed has no public handle on the service. Orbax and Flax use this one, too.
from jax._src.distributed import global_state

from mdt_jax.runtime.errors import UserError

TOKEN = "MDT_JAX_RUN_TOKEN"  # an environment variable, the same in all processes of a run


class Connection:
    """This process's connection to the others of its run.

    service: JAX's state of the service: client (None in a run of one process), process_id,
        num_processes and coordinator_address.
    patience: seconds after which a process that does not answer counts as dead.
    ended: set at the end of the run, when a process that leaves is no error any more.
    watchers: the threads of `cluster` that watch the other processes.
    exchanges: the numbers of the exchanges, in the same order in all processes.
    """

    def __init__(self):
        self.service: Any = global_state
        self.patience = 60.0
        self.ended = threading.Event()
        self.watchers: list[threading.Thread] = []
        self.exchanges = itertools.count()

    def put(self, key: str, text: str) -> None:
        """Set a key, which nobody may have set before. Raises UserError if somebody has."""
        try:
            self.service.client.key_value_set_bytes(key, sign(key, text))
        except Exception as error:
            if "ALREADY_EXISTS" in str(error):
                raise self._foreign(key) from None
            raise

    def get(self, key: str, seconds: int) -> str:
        """Wait for the value of a key. Raises UserError if no process of this run has signed it."""
        value = self.service.client.blocking_key_value_get_bytes(key, seconds * 1000)
        text = signed_text(key, value)
        if text is None:
            raise self._foreign(key)
        return text

    def _foreign(self, key: str) -> UserError:
        return UserError(
            f"the key {key} at the coordinator {self.service.coordinator_address} was not set by a "
            f"process of this run: set the same {TOKEN} in all its processes, and keep its ports "
            "on a private network"
        )


connection = Connection()


def sign(key: str, text: str) -> bytes:
    """The HMAC-SHA256 of key and text under the run's token, a space and the text.

    The key is part of the signature so that a signed text is valid under no other key.
    """
    content = text.encode()
    return _signature(key, content) + b" " + content


def signed_text(key: str, signed: bytes) -> str | None:
    """The text that `sign` received with this key; None if this run's token did not sign it."""
    signature, _, content = signed.partition(b" ")
    if not hmac.compare_digest(signature, _signature(key, content)):
        return None
    return content.decode()


def _signature(key: str, content: bytes) -> bytes:
    """Without a token anybody can compute it, so that it only detects mistakes."""
    token = os.environ.get(TOKEN, "").encode()
    return hmac.digest(token, key.encode() + b"\n" + content, "sha256").hex().encode()
