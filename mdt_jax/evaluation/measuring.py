"""How good samples are: features of them and of real images, compared."""

import importlib.util
import os
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from mdt_jax.data import sources
from mdt_jax.data.classes import correspond
from mdt_jax.data.images import to_uint8
from mdt_jax.evaluation import image_sets, references
from mdt_jax.evaluation.features import (
    Classifier,
    FeatureSet,
    InceptionFeatures,
    Parts,
    PixelFeatures,
    check_small,
    extract,
)
from mdt_jax.evaluation.image_sets import ImageSet, Slices, StoredSet
from mdt_jax.evaluation.metrics import (
    Gaussian,
    comparisons,
    frechet,
    gaussian,
    inception_score,
    precision_recall,
    psnr,
    ssim,
)
from mdt_jax.evaluation.references import Reference
from mdt_jax.models.inception import WHERE
from mdt_jax.runtime import hosts, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import log0
from mdt_jax.runtime.progress import progress_bar
from mdt_jax.weights import networks
from mdt_jax.weights.vae import Vae

FEATURES = ("inception", "pixels", "classifier")
# What tells which of a run's parameters are the best, the less the better.
BEST = ("fid", "frechet_distance")
NEIGHBOURS = 3  # k of precision and recall


def load_inception(path: str) -> InceptionFeatures:
    """From a file or folder of its weights. Raises UserError."""
    if not path:
        raise UserError(f"inception needs weights, --inception=FILE: {WHERE}")
    found = networks.read_network(path, kind="inception")
    note = {"inception": path, "inception_sha256": networks.params_sha256(found.params)}
    hosts.agree({"inception_sha256": note["inception_sha256"]})
    return InceptionFeatures(found.model, found.params, note)


def reliability_warnings(*compared: tuple[str, Gaussian]) -> Iterator[str]:
    """What makes a Fréchet distance hard to compare: lines about what is named."""
    for name, each in compared:
        size, rank = each.root.shape
        if each.count is not None and each.count <= size:
            yield (
                f"the covariance of {name}, of {each.count} images, has rank {rank} in {size} "
                "dimensions. The distance is exact, but so few images make it too large: compare "
                "it only with distances of as many"
            )
        elif each.count is None and rank < size:
            yield (
                f"the covariance of {name} has rank {rank} in {size} dimensions: it is of few "
                "images, or some features never change. The distance is exact; few images make it "
                "too large"
            )
        if each.negative > 1e-6:
            yield (
                f"the covariance of {name} has negative eigenvalues, which no images give. They "
                "are taken as 0; other code would meet complex square roots"
            )


class Evaluator:
    """Measures samples against a reference, whose features are computed once."""

    def __init__(self, reference: Reference, features: Sequence[str], inception: str = ""):
        """features: of FEATURES; inception: where its weights lie. Raises UserError."""
        self.reference, self._said = reference, set()
        self._real: dict[str, FeatureSet] | None = None  # empty in all processes but the first
        for name in features:
            if name not in FEATURES:
                raise UserError(f"unknown features {name!r}; choose of {', '.join(FEATURES)}")
            if name != "inception":
                check_small(self._images_for(name).shape)
        make = {
            "inception": lambda: load_inception(inception),
            "pixels": PixelFeatures,
            "classifier": self._train,
        }
        self.networks = {name: make[name]() for name in FEATURES if name in features}
        for name, gaussian_ in reference.gaussians.items() if "inception" in features else ():
            size = self.networks["inception"].sizes[name]
            if len(gaussian_.mu) != size:
                raise UserError(
                    f"{reference.path} has statistics of {len(gaussian_.mu)} features, but "
                    f"inception's {name} has {size}: they are of another network"
                )

    def _images_for(self, name: str) -> StoredSet:
        """The images of the reference. Raises UserError where it has none."""
        if self.reference.images is None:
            raise UserError(f"{name} needs images; {self.reference.path} holds statistics only")
        return self.reference.images

    def _train(self) -> Classifier:
        """On the training images of the reference, or on 80 % of its images."""
        images = self._images_for("classifier")
        if images.labels is None:
            raise UserError(f"{images.path} has no labels, which a classifier needs")
        held_out = sources.Images(images.take(np.arange(len(images))), images.labels, [])
        training = self.reference.training
        if training is None:
            training, held_out = sources.split(held_out)
        if len(np.unique(training.labels)) < 2:
            raise UserError(f"{images.path} has one class: there is nothing to tell apart")
        if not len(held_out):
            raise UserError(f"{images.path} has too few images of each class to train and test on")
        self._labels = np.unique(training.labels)
        classifier = Classifier(training.images, training.labels)
        self._accuracy = float(np.mean(classifier(held_out.images)["classes"] == held_out.labels))
        return classifier

    def measure(
        self, samples: ImageSet, parts: dict[str, Parts] | None = None, progress: bool = False
    ) -> dict[str, float]:
        """The measures of `samples` by each network, in every process the first one's.

        inception: fid, sfid, inception_score, precision, recall. pixels: frechet_distance, and
        where the reference has training images frechet_distance_real, of as many of these, and
        their ratio. classifier: class_agreement, the share of samples that it reads as their
        labels, and its own accuracy on real images. parts: where features of "samples" and
        "reference" are kept on the way. Raises UserError where sets cannot be compared.
        """
        self.check(samples)
        parts = parts or {}
        found = extract(self.networks, samples, parts.get("samples"), progress)
        compared = {n: each for n, each in self.networks.items() if n != "classifier"}
        if compared and self._real is None and self.reference.images is not None:
            self._real = extract(compared, self.reference.images, parts.get("reference"), progress)
        real = self._real or {}
        report: dict[str, float] = {"num_samples": len(samples)}
        if "inception" in found:
            report |= self._by_inception(found["inception"], real.get("inception"), progress)
        if "pixels" in found:
            report |= self._by_pixels(found["pixels"], real["pixels"])
        if "classifier" in found:
            asked = self._asked(samples)
            right = found["classifier"].rows["classes"] == asked
            report["class_agreement"] = float(np.mean(right))
            report["classifier_accuracy"] = self._accuracy
        return hosts.broadcast(report)

    def check(self, samples: ImageSet) -> None:
        """Raise UserError for what cannot be compared."""
        images = self.reference.images
        if images is not None and images.shape != samples.shape:
            there, here = ("×".join(map(str, x.shape)) for x in (images, samples))
            raise UserError(
                f"the images of {self.reference.path} are {there}, but those of {samples.path} "
                f"{here}; compare images of one size"
            )
        least = NEIGHBOURS + 1 if "inception" in self.networks else 2
        for each in (samples, images):
            if each is not None and len(each) < least:
                raise UserError(
                    f"{each.path} has too few images: {len(each)}; at least {least} are needed"
                )
        if "classifier" in self.networks:
            if samples.labels is None:
                raise UserError(f"{samples.path} has no labels, which class agreement needs")
            self._asked(samples)

    def _asked(self, samples: ImageSet) -> np.ndarray:
        """The classes of samples as the reference numbers them, [N]. Raises UserError."""
        real = self._images_for("classifier")
        labels, ours = np.asarray(samples.labels).tolist(), samples.classes
        known = self._labels.tolist()
        try:
            there = correspond(set(labels), ours, known, real.classes)
        except UserError as error:
            raise UserError(f"{samples.path} against {real.path}: {error}") from None
        strange = {label for label in labels if there.get(label) not in known}
        if strange:
            label = min(strange)
            raise UserError(
                f"{samples.path} has the label {ours[label] if ours else label!r}, which no image "
                f"of {self.reference.path} has"
            )
        return np.array([there[label] for label in labels])

    def _by_pixels(self, found: FeatureSet, of_real: FeatureSet) -> dict[str, float]:
        real = of_real.gaussians["pool"]
        distance = self._distance(found.gaussians["pool"], real)
        training = self.reference.training
        if training is None:
            return {"frechet_distance": distance}
        as_many = np.random.RandomState(0).permutation(len(training))[: found.count]
        vectors = self.networks["pixels"](training.images[as_many])["pool"]
        distance_real = frechet(gaussian(vectors), real)
        return {
            "frechet_distance": distance,
            "frechet_distance_real": distance_real,
            "frechet_ratio": distance / distance_real,
        }

    def _by_inception(
        self, found: FeatureSet, real: FeatureSet | None, progress: bool
    ) -> dict[str, float]:
        theirs = self.reference.gaussians or (real.gaussians if real is not None else {})
        report = {}
        report["fid"] = self._distance(found.gaussians["pool"], theirs["pool"])
        if "spatial" in theirs:
            report["sfid"] = frechet(found.gaussians["spatial"], theirs["spatial"])
        else:
            self._warn(f"{self.reference.path} has no mu_s and sigma_s: there is no sFID")
        logits, pixels = (found.rows[name] for name in ("logits", "pixels"))
        report["inception_score"] = inception_score(logits, pixels)
        if real is not None:
            features = real.rows["pool"], found.rows["pool"]
            steps = comparisons(*map(len, features))
            with progress_bar(steps, progress and steps > 9, "comparing", "step") as bar:
                shares = precision_recall(*features, NEIGHBOURS, bar.update)
            report["precision"], report["recall"] = shares
        return report

    def _distance(self, ours: Gaussian, theirs: Gaussian) -> float:
        """Fréchet distance, and once a warning of what makes it hard to compare."""
        for line in reliability_warnings(("the samples", ours), (self.reference.path, theirs)):
            self._warn(line)
        return frechet(ours, theirs)

    def _warn(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            log0(f"warning: {line}")


def evaluate_samples(
    images: np.ndarray,
    labels: np.ndarray | None,
    training: sources.Images,
    held_out: sources.Images,
) -> dict[str, float]:
    """Measures of samples (uint8 NHWC; labels: the classes asked for, or None) of a small set."""
    features = ("pixels",) if labels is None else ("pixels", "classifier")
    reference = references.of_split("the held-out images", training, held_out)
    return Evaluator(reference, features).measure(image_sets.Arrays("the samples", images, labels))


def fid(
    samples: str | os.PathLike | np.ndarray,
    reference: str | os.PathLike | np.ndarray,
    inception: str | os.PathLike,
    *,
    image_size: int | None = None,
    progress: bool = False,
) -> float:
    """FID of samples against real images or their statistics, as `mdt_jax.evaluate` computes it.

    samples, reference: images [N, H, W, C] uint8, or where they lie, as --samples and --reference
    take it. inception: weights of FID's Inception: a file, a folder that `convert` wrote, or hf://….
    image_size: to which image files are cut. Raises UserError for what cannot be compared.
    """
    if isinstance(samples, np.ndarray):
        images = _at_hand("the samples", samples)
    else:
        images = image_sets.open_images(os.fspath(samples), image_size, drawn=True)
    if isinstance(reference, np.ndarray):
        real = Reference("the reference", {}, _at_hand("the reference", reference))
    else:
        real = references.load(os.fspath(reference), image_size)
    evaluator = Evaluator(real, ("inception",), os.fspath(inception))
    return evaluator.measure(images, progress=progress)["fid"]


def _at_hand(name: str, images: np.ndarray) -> image_sets.Arrays:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{name} are {images.dtype} of the shape {list(images.shape)}; FID takes uint8 images "
            "[N, H, W, C] of 1 or 3 channels, which mdt_jax.to_uint8 makes of samples"
        )
    return image_sets.Arrays(name, images)


class Reconstructed:
    """Images as a VAE gives them back from the means of their posteriors, an `ImageSet`.

    psnr, ssim: of the images that were read, [n] in parts.
    """

    labels, classes, note = None, (), None

    def __init__(self, vae: Vae, images: ImageSet):
        """Raises UserError for images of a size, or of a number, that cannot be measured."""
        if len(images) < 2:
            raise UserError(f"{images.path} has one image; rFID compares two at least")
        if importlib.util.find_spec("skimage") is None:
            raise UserError("SSIM needs scikit-image: pip install scikit-image")
        height, width, _ = self.shape = (*images.shape[:2], 3)
        if height % vae.network.factor or width % vae.network.factor or min(height, width) < 11:
            raise UserError(
                f"the images of {images.path} are {height}×{width}; the VAE takes multiples of "
                f"{vae.network.factor}, and SSIM 11×11 at least; --image_size cuts image files"
            )
        self.path = f"{images.path} through the VAE"
        self._vae, self._images = vae, images
        self._mesh = parallel.make_mesh()
        self.psnr, self.ssim = [], []

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        return f"{self._images.name(i)}, through the VAE,"

    def slices(self, size: int, done: Collection[int] = ()) -> Slices:
        """As of the images; each slice is compared with what it is made of."""
        encode, split = self._vae.encoder(self._mesh), parallel.split_batch(self._mesh)
        for start, images in self._images.slices(size, done):
            images = np.broadcast_to(images, (*images.shape[:3], 3))
            padded = np.pad(images, [(0, -len(images) % self._mesh.size), (0, 0), (0, 0), (0, 0)])
            mean, _ = encode(parallel.put(padded, split))
            latents = hosts.fetch(mean)[: len(images)]
            back = to_uint8(
                self._vae.decode(latents, name=lambda i, at=start: self._images.name(at + i))
            )
            self.psnr.append(psnr(images, back))
            self.ssim.append(ssim(images, back))
            yield start, back


def measure_vae(
    back: Reconstructed,
    images: ImageSet,
    inception: InceptionFeatures | None,
    progress: bool = False,
) -> dict[str, float]:
    """psnr (dB) and ssim, means over images, and with an Inception rfid, their Fréchet distance.

    back: the images as the VAE gives them back.
    """
    networks = {} if inception is None else {"inception": inception}
    found = extract(networks, back, progress=progress)
    report: dict[str, float] = {
        "num_images": len(images),
        "psnr": float(np.concatenate(back.psnr).mean()),
        "ssim": float(np.concatenate(back.ssim).mean()),
    }
    real = extract(networks, images, progress=progress) if networks else {}
    if found and real:  # in the first process
        compared = [
            (each.path, theirs["inception"].gaussians["pool"])
            for each, theirs in ((back, found), (images, real))
        ]
        for line in reliability_warnings(*compared):
            log0(f"warning: {line}")
        report["rfid"] = frechet(*(gaussian_ for _, gaussian_ in compared))
    return hosts.broadcast(report)
