"""Images to be measured, read a slice at a time: arrays, npz files, and image files of any kind."""

import contextlib
import copy
import functools
import hashlib
import math
import os
import zipfile
from collections.abc import Collection, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Protocol, Self

import numpy as np

from mdt_jax.data import folders, parquet_sets, sample_notes, sources, tars, tfds_sets
from mdt_jax.data.crops import Sides, center_crop
from mdt_jax.data.image_files import ImageFiles
from mdt_jax.data.images import MAX_PIXELS, open_image, to_rgb
from mdt_jax.evaluation.npz_files import Header, read_array, read_headers, reading
from mdt_jax.runtime import limits
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import as_path, fetched, file_sha256, in_bucket

Slices = Generator[tuple[int, np.ndarray], None, None]


class ImageSet(Protocol):
    """Images to be measured, all of one size, numbered from 0."""

    @property
    def path(self) -> str:
        """The path or a description of the images, for messages."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """[N] numbers of classes; None if unknown."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """The names of classes 0, 1, …; empty if unknown."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Image i, for messages."""
        ...

    def slices(self, size: int, done: Collection[int] = ()) -> Slices:
        """Yield (number of the first image, [n, H, W, C] uint8), in order.

        Slices whose first image is in `done` are left out. size: the largest n; a set that computes
        its images may use slices of its own. Raises UserError for damaged images.
        """
        ...


class StoredImages:
    """Images in memory or on disk, each of which can be read again: an `ImageSet`.

    note: how the images were sampled, if `mdt_jax.sample` wrote them. summary: one line about the
    images used and left out, if there is something to tell.
    """

    note: dict | None = None
    summary: str | None = None

    def __init__(self, path: str, num: int, shape: tuple[int, ...]):
        self.path, self._num = path, num
        self.shape = (shape[0], shape[1], shape[2])
        self.labels: np.ndarray | None = None
        self.classes: Sequence[str] = ()

    def __len__(self) -> int:
        return self._num

    def name(self, i: int) -> str:
        return f"{self.path}, image {i}"

    @property
    def sha256(self) -> str:
        """Identifies the images; hexadecimal."""
        raise NotImplementedError

    def take(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images with the ascending numbers `items`: [n, H, W, C] uint8. Raises UserError."""
        raise NotImplementedError

    def slices(self, size: int, done: Collection[int] = ()) -> Slices:
        for start in range(0, len(self), size):
            if start not in done:
                yield start, self.take(range(start, min(start + size, len(self))))

    def first(self, num: int) -> Self:
        """The first `num` of these images. Raises UserError if there are fewer."""
        if num > len(self):
            raise UserError(f"{self.path} has {len(self)} images, fewer than the {num} to measure")
        part = copy.copy(self)
        part._num = num
        part.labels = None if self.labels is None else self.labels[:num]
        return part


class ArrayImages(StoredImages):
    """Images in memory: uint8 [N, H, W, C]. labels: [N] or None."""

    def __init__(
        self,
        path: str,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
    ):
        super().__init__(path, len(images), images.shape[1:])
        self._images, self.labels, self.classes = images, labels, classes

    @property
    def sha256(self) -> str:
        images = np.ascontiguousarray(self._images[: len(self)])
        return hashlib.sha256(images.data).hexdigest()

    def take(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._images[np.asarray(items)]


class NpzImages(StoredImages):
    """Images of an npz file, `arr_0` uint8 [N, H, W, C], never read as a whole."""

    def __init__(self, path: str, labelled: bool):
        """labelled: read the labels `arr_1` [N], if there are any. Raises UserError."""
        headers = read_headers(path)
        if "arr_0" not in headers:
            names = ", ".join(headers) or "none"
            raise UserError(f"{path} holds no arr_0, the images; its arrays are {names}")
        check_images(f"{path}: arr_0", headers["arr_0"])
        shape = headers["arr_0"].shape
        super().__init__(path, shape[0], shape[1:])
        if labelled and "arr_1" in headers:
            header = headers["arr_1"]
            if header.shape != shape[:1] or header.dtype.kind not in "iu":
                raise UserError(
                    f"{path}: {shape[0]} images, but arr_1 is {header.dtype} of shape "
                    f"{list(header.shape)}; labels must be whole numbers [N]"
                )
            self.labels = read_array(path, "arr_1")
            self.classes = sample_notes.classes_in(self.note, self.labels)

    @property
    def sha256(self) -> str:
        return file_sha256(self.path)

    @property
    def note(self) -> dict | None:
        return sample_notes.parsed(sample_notes.note_of(as_path(self.path)))

    @functools.cached_property
    def _content(self) -> tuple[IO[bytes], int]:
        """The open array, since seeking from its beginning is slow; and where its images begin."""
        archive = zipfile.ZipFile(fetched(self.path))
        file = archive.open("arr_0.npy")
        sample_notes.read_header(file)
        return file, file.tell()

    def take(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        images = np.empty((len(items), *self.shape), np.uint8)
        with reading(self.path):
            file, begin = self._content
            for image, item in zip(images, items, strict=True):
                file.seek(begin + int(item) * image.nbytes)
                content = file.read(image.nbytes)
                if len(content) < image.nbytes:
                    raise EOFError("it is cut short")
                image[:] = np.frombuffer(content, np.uint8).reshape(self.shape)
        return images


def check_images(name: str, header: Header) -> None:
    """Raise UserError for an array that does not hold images."""
    shape, fortran_order, dtype = header
    images = len(shape) == 4 and 0 not in shape and shape[-1] in (1, 3)
    if not images or fortran_order or dtype != np.uint8:
        order = ", in Fortran order" if fortran_order else ""
        raise UserError(
            f"{name} is {dtype} of shape {list(shape)}{order}; images must be uint8 [N, H, W, C], "
            "in C order, with 1 or 3 channels (mdt_jax.to_uint8 makes them of samples)"
        )


class FileImages(StoredImages):
    """Image files of a folder, list, tar, parquet or prepared TFDS set; grey if all of them are.

    Images are cropped as for training if there is an image_size; else all must have one size.
    """

    def __init__(self, path: str, image_size: Sides | None, labelled: bool, generated: bool):
        """Arguments as of `open_images`. Reads headers only. Raises UserError."""
        self._files, self._image_size = _list_files(path, labelled), image_size
        if generated and isinstance(self._files, folders.FolderFiles):
            self._files = sample_notes.in_order(self._files)
        count = len(self._files)
        grey = all(self._header(i)[0] in ("L", "1") for i in range(count))
        super().__init__(path, count, (*(image_size or self._header(0)[1]), 1 if grey else 3))
        if image_size is None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(self._check_size, range(count)))
        if labelled and self._files.classes:
            self._read_labels(generated)

    def _read_labels(self, generated: bool) -> None:
        files, labels = self._files, self._files.labels
        if labels is None:  # stored beside the images
            labels = np.array([files.read(i)[1] for i in range(len(files))])
        self.labels, self.classes = labels, files.classes
        if isinstance(files, folders.FolderFiles):
            self.labels, self.classes = sample_notes.labels_in(
                files.paths, labels, files.classes, self.note, generated
            )

    @property
    def sha256(self) -> str:
        """Of the list of images, and of the images' files, the tar or the parquet shards.

        A prepared TFDS set is identified by its name, version and length.
        """
        digest = hashlib.sha256(self._files.contents.encode(errors="replace"))
        if isinstance(self._files, (tars.TarFiles, parquet_sets.ParquetFiles)):
            digest.update(bytes.fromhex(self._files.sha256))
        elif isinstance(self._files, folders.FolderFiles):
            for path in map(self.name, range(len(self))):
                digest.update(bytes.fromhex(file_sha256(path)))
        return digest.hexdigest()

    @property
    def note(self) -> dict | None:
        return sample_notes.parsed(sample_notes.settings_of(as_path(self.path)))

    @property
    def summary(self) -> str:
        return f"{self.path}: {self._files.summary}"

    def name(self, i: int) -> str:
        return self._files.name(i)

    def take(self, items: Iterable[int] | np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self._read, items)))

    def _read(self, i: int) -> np.ndarray:
        size = self._image_size
        with self._opened(i) as image:
            image = to_rgb(image) if self.shape[-1] == 3 else to_rgb(image).convert("L")
            array = np.asarray(image) if size is None else center_crop(image, size)
            return array.reshape(self.shape)

    @contextlib.contextmanager
    def _opened(self, i: int):
        """Image i as a PIL.Image. Raises UserError if it cannot be read or is too large."""
        with reading(self.name(i)), open_image(self._files.read(i)[0]) as image:
            yield image

    def _header(self, i: int) -> tuple[str, tuple[int, int]]:
        """(Pillow's mode, (height, width)) of image i. Raises UserError."""
        with self._opened(i) as image:
            return image.mode, (image.height, image.width)

    def _check_size(self, i: int) -> None:
        (height, width), (first_height, first_width) = self._header(i)[1], self.shape[:2]
        if (height, width) != (first_height, first_width):
            raise UserError(
                f"{self.name(i)} is {height}×{width}, but {self.name(0)} {first_height}×"
                f"{first_width}; all must have one size (evaluate --image_size crops them as for "
                "training)"
            )


def _list_files(path: str, labelled: bool) -> ImageFiles:
    try:
        if path.startswith("tfds:"):
            name = path.removeprefix("tfds:")
            scheme = name[: name.find("://") + 3] if in_bucket(name) else ""
            name, _, split = name.removeprefix(scheme).partition(":")
            return tfds_sets.load(f"{scheme}{name}", split or "train")
        if path.endswith(".tar"):
            return tars.load(path)
        if path.endswith(parquet_sets.SUFFIX):
            return parquet_sets.load(path, None if labelled else 0)
        return folders.load(path, None if labelled else 0)
    except UserError as error:
        raise UserError(str(error).removeprefix("data.path ")) from None


def open_images(
    path: str,
    image_size: int | Sides | None = None,
    labelled: bool = False,
    num: int | None = None,
    generated: bool = False,
) -> StoredImages:
    """Open images, of which no more than headers are read yet.

    path: an npz file with arr_0, a folder, a list (.csv, .jsonl), a .tar, a .parquet or a glob of
    them, tfds:NAME[:SPLIT], or the name of a packaged set (digits, mnist, …), of which the held-out
    images are used. image_size: (H, W) to which image files are cropped as for training, or the
    side of a square.
    labelled: read the labels, too, if there are any. num: use the first `num` images only.
    generated: the images are samples, so that files named LABEL_NUMBER.png are ordered by NUMBER,
    and LABEL is the number of a class and not its name. Raises UserError.
    """
    sides = image_size if isinstance(image_size, tuple | None) else (image_size, image_size)
    for side in sides or ():
        limits.check_number("image_size", side)
    if sides is not None and math.prod(sides) > MAX_PIXELS:
        size = "×".join(map(str, sides))
        raise UserError(f"image_size is {size}, larger than images that are read")
    as_path(path)  # refuses URLs of other kinds
    if path.endswith(".npz"):
        images = NpzImages(path, labelled)
    elif path in sources.PACKAGED:
        held_out = sources.load(path)[1]
        images = ArrayImages(path, held_out.images, held_out.labels, held_out.classes)
    else:
        images = FileImages(path, sides, labelled, generated)
    if sides is not None and images.shape[:2] != sides:
        flag = "x".join(map(str, dict.fromkeys(sides)))
        raise UserError(
            f"{path} has images of {images.shape[0]}×{images.shape[1]}; --image_size={flag} crops "
            "image files only"
        )
    return images if num is None else images.first(num)
