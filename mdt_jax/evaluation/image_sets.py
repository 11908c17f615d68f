"""Images to be measured, whatever they lie in, a slice at a time."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Collection, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from mdt_jax.data import folders, pictures, sample_notes, sources, tars, tfds_sets
from mdt_jax.data.crops import ImageFiles, center_crop, to_rgb
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import check_regular, file_sha256, reason

Slices = Generator[tuple[int, np.ndarray], None, None]


class ImageSet(Protocol):
    """Images to be measured, all of one size, numbered from 0."""

    @property
    def path(self) -> str:
        """Where they lie, or what they are; for messages."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """[N], numbers of classes; None where they are not known."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """What the set calls class 0, 1, …; empty where it has numbers alone."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Image i, for messages."""
        ...

    def slices(self, size: int, done: Collection[int] = ()) -> Slices:
        """(first image, [n, H, W, C] uint8), in order, but those that begin at `done`.

        size: the most images of a slice, where the set is not in slices of its own. Raises
        UserError for what is damaged.
        """
        ...


class StoredSet(ImageSet, Protocol):
    """Images that lie somewhere, so that each can be read again."""

    @property
    def sha256(self) -> str:
        """What tells them from others, hexadecimal."""
        ...

    @property
    def note(self) -> dict | None:
        """How the images came about, where `mdt_jax.sample` drew them."""
        ...

    def take(self, items: np.ndarray) -> np.ndarray:
        """The images `items`, [n] ascending: [n, H, W, C] uint8. Raises UserError."""
        ...


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images that are at hand. images: uint8 [N, H, W, C]; labels: [N] or None."""

    path: str
    images: np.ndarray
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    note = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()

    def name(self, i: int) -> str:
        return f"{self.path}, image {i}"

    def slices(self, size: int, done: Collection[int] = ()) -> Slices:
        for start in range(0, len(self), size):
            if start not in done:
                yield start, self.images[start : start + size]

    def take(self, items: np.ndarray) -> np.ndarray:
        return self.images[items]


@dataclasses.dataclass(frozen=True)
class Npz:
    """`arr_0` uint8 [N, H, W, C] of an npz, which is never read whole; `arr_1`, its labels.

    num: how many of them, from the first one on, are taken.
    """

    path: str
    num: int
    shape: tuple[int, int, int]
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return self.num

    @property
    def sha256(self) -> str:
        """Of the file, hexadecimal."""
        return file_sha256(self.path)

    @property
    def note(self) -> dict | None:
        return sample_notes.parsed(sample_notes.note_of(pathlib.Path(self.path)))

    def name(self, i: int) -> str:
        return f"{self.path}, image {i}"

    def slices(self, size: int, done: Collection[int] = ()) -> Slices:
        each = int(np.prod(self.shape))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                sample_notes.read_header(file)
                begin = file.tell()
                for start in range(0, len(self), size):
                    if start in done:
                        continue
                    file.seek(begin + start * each)
                    count = min(size, len(self) - start)
                    part = file.read(count * each)
                    if len(part) < count * each:
                        raise EOFError("it is cut short")
                    yield start, np.frombuffer(part, np.uint8).reshape(count, *self.shape)
        except Exception as error:  # of many kinds, by what is damaged
            raise UserError(f"{self.path} could not be read: {reason(error)}") from None

    def take(self, items: np.ndarray) -> np.ndarray:
        parts = []
        for start, part in self.slices(512):
            parts.append(part[items[(start <= items) & (items < start + len(part))] - start])
            if start + len(part) > items[-1]:
                break
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files of a folder, a list, a tar or a prepared set.

    size: to which they are cut, as for training; None: as they are, which must be of one size.
    num: how many are taken.
    """

    path: str
    files: ImageFiles
    num: int
    shape: tuple[int, int, int]
    size: int | None = None
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return self.num

    @property
    def sha256(self) -> str:
        """Of the list of images, and of these or the tar's bytes; hexadecimal.

        A prepared set of TFDS is told by its name, version and length.
        """
        digest = hashlib.sha256(self.files.contents.encode(errors="replace"))
        paths = [self.files.path] if isinstance(self.files, tars.Members) else []
        if isinstance(self.files, folders.Files):
            paths = map(self.files.name, range(len(self)))
        for path in paths:
            digest.update(bytes.fromhex(file_sha256(path)))
        return digest.hexdigest()

    @property
    def found(self) -> str:
        """What they are and what is left out, in a line."""
        return f"{self.path}: {self.files.found}"

    @property
    def note(self) -> dict | None:
        return sample_notes.parsed(sample_notes.settings_of(pathlib.Path(self.path)))

    def name(self, i: int) -> str:
        return self.files.name(i)

    def slices(self, size: int, done: Collection[int] = ()) -> Slices:
        """Raises UserError for an image that is damaged, or of another size."""
        for start in range(0, len(self), size):
            if start not in done:
                yield start, self.take(range(start, min(start + size, len(self))))

    def take(self, items: Iterable[int]) -> np.ndarray:
        """The images `items`, in any order."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self._read, items)))

    def check_sizes(self) -> None:
        """Raise UserError for an image of another size than the first, none being decoded."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._check_size, range(len(self))))

    def _check_size(self, i: int) -> None:
        with _opened(self.files, i) as image:
            size = image.size[::-1]
        if size != self.shape[:2]:
            (there, wide), (here, broad) = size, self.shape[:2]
            raise UserError(
                f"{self.name(i)} is {there}×{wide}, but {self.name(0)} {here}×{broad}; all must "
                "be of one size (evaluate --image_size cuts them as for training)"
            )

    def _read(self, i: int) -> np.ndarray:
        return _read_image(self.files, i, self.size, self.shape[-1] == 1)


def open_images(
    path: str,
    image_size: int | None = None,
    labelled: bool = False,
    num: int | None = None,
    drawn: bool = False,
) -> StoredSet:
    """Images of an npz (arr_0), a folder, a list (.csv, .jsonl), a .tar, tfds:NAME[:SPLIT], or the
    held-out part of a packaged set (digits, mnist, …).

    image_size: to which image files are cut. labelled: whether files must tell their labels, too.
    num: how many there must be, of which the first ones are taken; None: all. drawn: whether they
    are samples, so that LABEL_NUMBER.png tells the number of a class, not a name, and stands in the
    order of NUMBER. Raises UserError for anything else.
    """
    if image_size is not None and image_size**2 > pictures.MAX_PIXELS:
        raise UserError(f"image_size is {image_size}, larger than images that are read")
    if path.endswith(".npz"):
        images = _open_npz(path, labelled)
    elif path in sources.PACKAGED:
        held_out = sources.load(path)[1]
        images = Arrays(path, held_out.images, held_out.labels, held_out.classes)
    else:
        images = _open_files(path, image_size, labelled, drawn)
    if image_size is not None and images.shape[:2] != (image_size, image_size):
        raise UserError(
            f"{path} has images of {images.shape[0]}×{images.shape[1]}; --image_size={image_size} "
            "cuts image files only"
        )
    if labelled and images.labels is None:
        raise UserError(f"{path} has no labels, which telling classes apart needs")
    if num is None:
        return images
    if num > len(images):
        raise UserError(f"{path} has {len(images)} images, fewer than the {num} asked for")
    labels = None if images.labels is None else images.labels[:num]
    if isinstance(images, Arrays):
        return Arrays(path, images.images[:num], labels, images.classes)
    return dataclasses.replace(images, num=num, labels=labels)


def _open_npz(path: str, labelled: bool) -> Npz:
    arrays = open_arrays(path)
    if "arr_0" not in arrays:
        raise UserError(f"{path} holds no arr_0, the images; it has {', '.join(arrays) or 'none'}")
    shape, by_columns, dtype = arrays["arr_0"]
    if dtype != np.uint8:
        raise UserError(f"{path}: arr_0 is {dtype}; images are uint8, from 0 to 255")
    if len(shape) != 4 or shape[-1] not in (1, 3):
        hint = "; its channels come first" if len(shape) == 4 and shape[1] in (1, 3) else ""
        raise UserError(f"{path}: arr_0 has the shape {list(shape)}; images are [N, H, W, 3]{hint}")
    if 0 in shape:
        raise UserError(f"{path} holds no images: arr_0 has the shape {list(shape)}")
    if by_columns:
        raise UserError(f"{path}: arr_0 is in Fortran's order; save np.ascontiguousarray of it")
    if not labelled or "arr_1" not in arrays:
        return Npz(path, shape[0], shape[1:])
    there, _, kind = arrays["arr_1"]
    if there != shape[:1] or kind.kind not in "iu":
        raise UserError(
            f"{path}: {shape[0]} images, but arr_1 is {kind} of shape {list(there)}; labels are "
            "whole numbers [N]"
        )
    labels = read_array(path, "arr_1")
    images = Npz(path, shape[0], shape[1:], labels)
    return dataclasses.replace(images, classes=sample_notes.classes_in(images.note, labels))


def _open_files(path: str, size: int | None, labelled: bool, drawn: bool) -> Files:
    try:
        if path.startswith("tfds:"):
            name, _, split = path.removeprefix("tfds:").partition(":")
            files = tfds_sets.load(name, split or "train")
        elif path.endswith(".tar"):
            files = tars.load(path)
        else:
            files = folders.load(path, None if labelled else 0)
            files = sample_notes.in_order(files) if drawn else files
    except UserError as error:
        raise UserError(str(error).removeprefix("data.path ")) from None
    labels = None
    if labelled and files.classes:
        if isinstance(files, tfds_sets.Prepared):  # which tells them with each image only
            labels = np.array([files.read(i)[1] for i in range(len(files))])
        else:
            labels = files.labels
    grey = all(_is_grey(files, i) for i in range(len(files)))  # seldom looks at more than one
    first = _read_image(files, 0, size, grey)
    images = Files(path, files, len(files), first.shape, size, labels, files.classes)
    if size is None:
        images.check_sizes()
    if labels is None or not isinstance(files, folders.Files):
        return images
    labels, classes = sample_notes.labels_in(files.paths, labels, files.classes, images.note, drawn)
    return dataclasses.replace(images, labels=labels, classes=classes)


@contextlib.contextmanager
def _opened(files: ImageFiles, i: int):
    """A PIL.Image. Raises UserError for what cannot be read, or is too large."""
    try:
        with pictures.opened(files.read(i)[0]) as image:
            yield image
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{files.name(i)} could not be read: {reason(error)}") from None


def _is_grey(files: ImageFiles, i: int) -> bool:
    with _opened(files, i) as image:
        return image.mode in ("L", "1")


def _read_image(files: ImageFiles, i: int, size: int | None, grey: bool) -> np.ndarray:
    """[H, W, C] uint8; C is 1 if `grey`, else 3."""
    with _opened(files, i) as image:
        image = to_rgb(image).convert("L") if grey else to_rgb(image)
        array = np.asarray(image) if size is None else center_crop(image, size)
    return array[..., None] if grey else array


def open_arrays(path: str) -> dict[str, tuple[tuple[int, ...], bool, np.dtype]]:
    """name → (shape, whether in Fortran's order, dtype) of the arrays in an npz, none of them read.

    Raises UserError.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        found[name.removesuffix(".npy")] = sample_notes.read_header(file)
            return found
    except Exception as error:  # of many kinds, by what is damaged
        raise UserError(f"{path} could not be read: {reason(error)}") from None


def read_array(path: str, name: str) -> np.ndarray:
    """One array of an npz, whole. Raises UserError."""
    try:
        with np.load(path) as arrays:
            return arrays[name]
    except Exception as error:  # of many kinds, by what is damaged
        raise UserError(f"{path}: {name} could not be read: {reason(error)}") from None
