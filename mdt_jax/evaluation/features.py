"""Images → features, by networks that can be exchanged: what measures compare.

A feature network has a `note`, its settings, and takes images [n, H, W, C] uint8 to a dict of
arrays of n rows: "pool" and "spatial" [n, D] float32, whose distributions are compared, "logits"
[n, classes], "pixels" [n, 32] uint8, a hash of each image's, and "classes" [n], what it reads the
images as.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import cast

import jax
import numpy as np
from jax.sharding import PartitionSpec

from mdt_jax.data.images import to_float
from mdt_jax.evaluation.image_sets import ImageSet
from mdt_jax.evaluation.metrics import Gaussian, Moments
from mdt_jax.models.inception import POOL, SPATIAL, Features, Inception
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write, check_regular, passes, reason, save_arrays
from mdt_jax.runtime.progress import progress_bar

EACH_DEVICE = 16  # images that a device takes at once, always: so rounding is the same everywhere
SLICE = 512  # images in memory, and in a part that is kept
MOST_PIXELS = 4096  # numbers of an image whose covariance is still small
COMPARED = ("pool", "spatial")  # what is compared by its distribution
SETTINGS = "features.json"


class InceptionFeatures:
    """FID's Inception on all devices, in float32: "pool" of 2048, "spatial" of 2023, "logits".

    And "pixels", the SHA-256 of each image, by which the Inception Score splits images.
    """

    def __init__(self, network: Inception, params: dict, note: dict):
        mesh = parallel.make_mesh()
        self.sizes = {"pool": POOL, "spatial": SPATIAL}
        splits = "of at most 5,000 images, dealt in the order of their pixels' SHA-256"
        self.note = {"features": "inception", **note, "inception_score_splits": splits}
        self._params = parallel.put(params, parallel.replicated(mesh))
        self._split, self._size = parallel.split_batch(mesh), EACH_DEVICE * mesh.size

        # Each device runs the same program, so that their number changes no bit.
        def one_device(params, images):
            return cast(Features, network.apply({"params": params}, images))._asdict()

        specs = (PartitionSpec(), PartitionSpec(parallel.AXES))
        self._run = jax.jit(
            jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=specs[1])
        )

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        started = []
        for start in range(0, len(images), self._size):
            part = images[start : start + self._size]
            padded = np.pad(part, [(0, self._size - len(part)), (0, 0), (0, 0), (0, 0)])
            started.append(self._run(self._params, parallel.put(padded, self._split)))
        found = [jax.tree.map(hosts.fetch, out) for out in started]
        hashes = [hashlib.sha256(image.tobytes()).digest() for image in images]
        return {
            name: np.concatenate([out[name] for out in found])[: len(images)] for name in found[0]
        } | {"pixels": np.frombuffer(b"".join(hashes), np.uint8).reshape(len(images), -1)}


class PixelFeatures:
    """The pixels in [−1, 1] as one vector, "pool": for small images."""

    note = {"features": "pixels"}

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"pool": _pixels(images)}


class Classifier:
    """An RBF support vector machine trained on the pixels of real images: "classes"."""

    note = {"features": "classifier"}

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from sklearn.svm import SVC

        self._machine = SVC(C=10).fit(_pixels(images), labels)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"classes": self._machine.predict(_pixels(images))}


def _pixels(images: np.ndarray) -> np.ndarray:
    return to_float(images).reshape(len(images), -1)


def check_small(shape: tuple[int, int, int]) -> None:
    """Raise UserError for images (H, W, C) whose pixels are too many to be compared."""
    if np.prod(shape) > MOST_PIXELS:
        raise UserError(
            f"images of {'×'.join(map(str, shape))} are too large to be compared by their pixels, "
            f"which is for at most {MOST_PIXELS} numbers; compare them by inception"
        )


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of `count` images. gaussians: of "pool", "spatial"; rows: all others, and "pool"."""

    count: int
    gaussians: dict[str, Gaussian]
    rows: dict[str, np.ndarray]


def extract(
    networks: Mapping[str, Callable[[np.ndarray], dict]],
    images: ImageSet,
    parts: "Parts | None" = None,
    progress: bool = False,
) -> dict[str, FeatureSet]:
    """The features of all images by each network; the images are read once, a slice at a time.

    parts: where those of each slice are kept, and found again. Of several processes all compute and
    the first one has the result; the others have nothing. Raises UserError where a feature is not
    finite.
    """
    first = hosts.is_first()
    kept = parts.begin() if parts is not None and first else ()
    done = set(hosts.broadcast(sorted(kept)))
    moments, rows = {}, {}  # by network and feature

    def take(start: int, found: dict[tuple[str, str], np.ndarray]) -> None:
        for key, values in found.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                finite = np.isfinite(values).reshape(len(values), -1).all(1)
                at = start + int(finite.argmin())
                raise UserError(
                    f"{images.name(at)} has features that are not finite: the "
                    "weights of the network are damaged"
                )
            if key[1] in COMPARED:
                moments.setdefault(key, Moments()).add(values)
            if key[1] != "spatial":
                rows.setdefault(key, {})[start] = values

    bar = progress_bar(len(images), progress and first, "measuring", "image")
    with contextlib.closing(images.slices(SLICE, done)) as unread, bar as bar:
        if first and parts is not None:
            for start in sorted(done):
                take(start, parts.load(start))
                bar.update(min(SLICE, len(images) - start))
        for start, part in unread:
            found = {
                (name, feature): values
                for name, network in networks.items()
                for feature, values in network(part).items()
            }
            if first:
                take(start, found)
            if first and parts is not None:
                parts.save(start, found)
            bar.update(len(part))
    if not first:
        return {}
    whole_rows = {
        key: np.concatenate([values[start] for start in sorted(values)])
        for key, values in rows.items()
    }
    return {
        name: FeatureSet(
            len(images),
            {feature: m.gaussian() for (of, feature), m in moments.items() if of == name},
            {feature: values for (of, feature), values in whole_rows.items() if of == name},
        )
        for name in networks
    }


class Parts:
    """Features on disk as they come, in a folder that is removed when all is measured.

    What is of other images or another network is made anew.
    """

    def __init__(self, folder: pathlib.Path, note: dict):
        self.folder, self._note = folder, json.dumps({**note, "slice": SLICE})

    def _path(self, start: int) -> pathlib.Path:
        return self.folder / f"{start:09d}.npz"

    def begin(self) -> set[int]:
        """The first images of the slices that are there already and whole, of these settings.

        Raises UserError or OSError where they cannot be read just now.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            check_regular(self.folder / SETTINGS)
            text = (self.folder / SETTINGS).read_text(encoding="utf-8", errors="replace")
            if text == self._note:
                names = [path.stem for path in self.folder.glob("*.npz")]
                starts = {int(name) for name in names if re.fullmatch("[0-9]{9}", name)}
                return {start for start in starts if self._is_whole(start)}
        self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / SETTINGS) as temporary:
            temporary.write_text(self._note, encoding="utf-8")
        return set()

    def save(self, start: int, found: dict[tuple[str, str], np.ndarray]) -> None:
        save_arrays(self._path(start), {"/".join(key): values for key, values in found.items()})

    def _is_whole(self, start: int) -> bool:
        try:
            return all(len(key) == 2 for key in self._read(start))
        except Exception as error:  # of many kinds, by what is damaged
            if passes(error):
                raise self._unreadable(start, error) from None
            return False

    def _read(self, start: int) -> dict[tuple[str, str], np.ndarray]:
        check_regular(self._path(start))
        with np.load(self._path(start)) as arrays:
            return {tuple(key.split("/")): values for key, values in arrays.items()}

    def load(self, start: int) -> dict[tuple[str, str], np.ndarray]:
        """Those of a slice that `begin` has found. Raises UserError where they cannot be read."""
        try:
            return self._read(start)
        except Exception as error:  # of many kinds, by what is damaged
            raise self._unreadable(start, error) from None

    def _unreadable(self, start: int, error: Exception) -> UserError:
        return UserError(f"{self._path(start)} cannot be read: {reason(error)}")

    def remove(self) -> None:
        """A folder that is none of ours is left alone."""
        if (self.folder / SETTINGS).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
