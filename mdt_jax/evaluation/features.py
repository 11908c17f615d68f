"""Features of image sets: extracted a slice at a time, kept on disk meanwhile, and summed up.

A feature network takes images [n, H, W, C] uint8 to a dict of arrays of n rows:

- "pool" and "spatial" [n, D] float32, the Inception's, for FID and sFID;
- "logits" [n, classes] float32, the Inception's, for the Inception Score;
- "pixels" [n, 32] uint8, the SHA-256 of each image, which orders images for the Inception Score;
- "dinov2" [n, D] float32, the class token of DINOv2, for FD-DINOv2;
- "vectors" [n, D] float32, the pixels of small images, for a Fréchet distance;
- "classes" [n], the class that a classifier predicts for each image;
- "psnr", "ssim" [n] float64, of a VAE's reconstruction, and "reconstructed" [n, D] float32, "pool"
  of the reconstruction.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Iterator

import numpy as np

from mdt_jax.evaluation.image_sets import ImageSet
from mdt_jax.evaluation.metrics import Gaussian, Moments
from mdt_jax.runtime import files, hosts
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write, check_regular, passes, reason, save_arrays
from mdt_jax.runtime.progress import progress_bar

SLICE = 512  # images in memory at once, and in a file of the cache
# Mean and covariance are needed of these.
DISTRIBUTIONS = ("pool", "spatial", "dinov2", "vectors", "reconstructed")
UNUSED_ROWS = ("spatial", "vectors", "reconstructed")  # of which nothing else is needed
SETTINGS = "features.json"

FeatureNetwork = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of `count` images, by name.

    gaussians: of DISTRIBUTIONS. rows: all but UNUSED_ROWS, in the order of the images.
    """

    count: int
    gaussians: dict[str, Gaussian]
    rows: dict[str, np.ndarray]


class Accumulator:
    """Gathers the features of an image set, slice by slice."""

    def __init__(self):
        self._counts: dict[int, int] = {}
        self._moments: dict[str, Moments] = {}
        self._rows: dict[str, dict[int, np.ndarray]] = {}

    def add(self, start: int, features: dict[str, np.ndarray]) -> None:
        """Add the features of the slice that begins at image `start`; slices in any order."""
        for name, rows in features.items():
            self._counts[start] = len(rows)
            if name in DISTRIBUTIONS:
                self._moments.setdefault(name, Moments()).add(rows)
            if name not in UNUSED_ROWS:
                self._rows.setdefault(name, {})[start] = rows

    def result(self) -> FeatureSet:
        """The features of all images."""
        gaussians = {name: moments.gaussian() for name, moments in self._moments.items()}
        rows = {
            name: np.concatenate([slices[start] for start in sorted(slices)])
            for name, slices in self._rows.items()
        }
        return FeatureSet(sum(self._counts.values()), gaussians, rows)


def extract(
    networks: Collection[FeatureNetwork],
    images: ImageSet,
    cache: "FeatureCache | None" = None,
    progress: bool = False,
) -> FeatureSet | None:
    """Extract the features of all images by all networks, reading each image once.

    All processes compute; process 0 alone returns the features, the others return None. cache:
    where process 0 keeps the features of each slice, so that an interrupted extraction can be
    resumed. Raises UserError for a feature that is not finite.
    """
    first, accumulator, cached = hosts.is_first(), Accumulator(), []
    if first and cache is not None:
        for start, features in cache.resume():
            accumulator.add(start, features)
            cached.append(start)
    cached = hosts.broadcast(cached)

    done = sum(min(SLICE, len(images) - start) for start in cached)
    bar = progress_bar(len(images), progress and first, "measuring", "image", initial=done)
    with contextlib.closing(images.slices(SLICE, cached)) as slices, bar as bar:
        for start, pixels in slices:
            features = {name: rows for net in networks for name, rows in net(pixels).items()}
            if first:
                _check_finite(images, start, features)
                accumulator.add(start, features)
            if first and cache is not None:
                cache.put(start, features)
            bar.update(len(pixels))
    return accumulator.result() if first else None


def _check_finite(images: ImageSet, start: int, features: dict[str, np.ndarray]) -> None:
    for name, rows in features.items():
        if name != "psnr" and rows.dtype.kind == "f" and not np.isfinite(rows).all():
            finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
            raise UserError(
                f"{images.name(start + int(finite.argmin()))} has features that are not finite: "
                "the weights of the network are damaged"
            )


class FeatureCache:
    """A folder of extracted features, a file a slice, removed once everything is measured.

    settings: what the features are of. A folder with other settings is emptied.
    """

    def __init__(self, folder: files.Path, settings: dict):
        self._folder = folder
        self._settings = json.dumps({**settings, "slice": SLICE, "format": 2})

    def resume(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Read the slices that an earlier run has written, as (first image, features), in order.

        Must be called before `put`. Damaged files are skipped. Raises UserError or OSError for a
        file that cannot be read at the moment, for example without permission.
        """
        if self._read_settings() != self._settings:
            self.remove()
            files.make_folder(self._folder)
            with atomic_write(self._folder / SETTINGS) as temporary:
                temporary.write_text(self._settings, encoding="utf-8")
        for name in sorted(files.names_in(self._folder)):
            path = self._folder / name
            if path.suffix != ".npz":
                continue
            try:
                check_regular(path)
                with np.load(files.fetched(path)) as arrays:
                    features = dict(arrays)
                start = int(features.pop("start"))
            except Exception as error:  # NumPy and zipfile raise many kinds for damaged files
                if passes(error):
                    raise UserError(f"{path} cannot be read: {reason(error)}") from None
                continue
            yield start, features

    def _read_settings(self) -> str | None:
        path = self._folder / SETTINGS
        try:
            check_regular(path)
            return path.read_bytes().decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put(self, start: int, features: dict[str, np.ndarray]) -> None:
        """Write the features of the slice that begins at image `start`. Raises UserError."""
        arrays = {"start": np.array(start), **features}
        save_arrays(self._folder / f"{start:09d}.npz", arrays)

    def remove(self) -> None:
        """Remove the folder, if it is a cache, and the one above if that is empty then."""
        if files.is_file(self._folder / SETTINGS):
            with contextlib.suppress(Exception):  # of many kinds in a bucket
                files.remove_folder(self._folder)
            if isinstance(self._folder, pathlib.Path):
                with contextlib.suppress(OSError):
                    self._folder.parent.rmdir()
