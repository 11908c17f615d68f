"""What a data set must provide, and in what form the pipeline hands it on."""

import enum
from typing import Protocol

import numpy as np


class Status(enum.IntEnum):
    """What became of an item that was to be read."""

    READ = 0
    REPLACED = 1  # the item is damaged; another item, or black, is in its place
    UNREADABLE = 2  # the item is damaged and nothing is in its place: an error


class Source(Protocol):
    """A data set: items numbered from 0, each an image or its latents, with a label.

    Worker processes get a copy, so a source must be picklable.
    """

    @property
    def classes(self) -> list[str]:
        """The names of the labels 0, 1, …; empty without labels."""
        ...

    @property
    def identity(self) -> str:
        """A SHA-256, hexadecimal, that differs between data sets."""
        ...

    def __len__(self) -> int: ...

    def take(self, items: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """Read items [n] int64; u: [n] float64 in [0, 1), the randomness of each (crop, mirror).

        Returns "labels" [n] int32, "status" [n] int8 of `Status`, and either "images"
        [n, H, W, C] uint8 or "mean" and "std" [n, h, w, c] float16. Raises OSError for failures
        that are not the items' fault.
        """
        ...

    def name(self, i: int) -> str:
        """The name of item i in messages."""
        ...

    def why(self, i: int) -> str:
        """Why item i cannot be read, for messages."""
        ...


class Plan(Protocol):
    """Which items make up which batch: `pipeline.Shuffled`, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, n: int, /) -> tuple[np.ndarray, np.ndarray]:
        """(items, u) of batch n, the arguments of `Source.take`."""
        ...
