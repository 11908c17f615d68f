"""Small sets of images with random Inception weights, and the card of one against the other."""

import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from mdt_jax import evaluate
from mdt_jax.evaluation import evaluator, feature_networks
from tests.conftest import run_here


@contextlib.contextmanager
def quick_inception() -> Iterator[None]:
    """Meanwhile a file's network is compiled once, for two images a device at a time, and runs once
    on equal images; a covariance of its 2048 features is decomposed once."""
    known, eigh, run = {}, np.linalg.eigh, feature_networks.InceptionFeatures.__call__

    def remembered(matrix: np.ndarray):
        key = hashlib.sha256(np.ascontiguousarray(matrix)).digest()
        if key not in known:
            known[key] = eigh(matrix)
        return known[key]

    def found_once(network: feature_networks.InceptionFeatures, images: np.ndarray):
        key = id(network), images.shape, hashlib.sha256(np.ascontiguousarray(images)).digest()
        if key not in known:
            known[key] = run(network, images)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, "eigh", remembered)
        load_once = functools.cache(feature_networks.load_inception)
        for module in (feature_networks, evaluator, evaluate):
            patch.setattr(module, "load_inception", load_once)
        patch.setattr(feature_networks.InceptionFeatures, "__call__", found_once)
        patch.setattr(feature_networks, "EACH_DEVICE", 2)
        yield


def crops(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Pieces of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    photographs, random = load_sample_images().images, np.random.RandomState(seed)
    pieces = []
    for n in range(count):
        photograph = photographs[n % 2]
        top, left = (random.randint(side - size) for side in photograph.shape[:2])
        pieces.append(photograph[top : top + size, left : left + size])
    return np.stack(pieces)


def make_sets(folder: pathlib.Path) -> pathlib.Path:
    """Write samples.npz, real.npz, fid.pth and card.json, the first measured against the second."""
    import torch

    from tests import fid_packages

    np.savez(folder / "samples.npz", arr_0=crops(6, 1), arr_1=np.arange(6) % 2)
    np.savez(folder / "real.npz", arr_0=crops(10, 2), arr_1=np.arange(10) % 2)
    state = {name: torch.tensor(array) for name, array in fid_packages.random_state().items()}
    torch.save(state, folder / "fid.pth")
    run_here(evaluate.main, *flags(folder), f"--out={folder}/card.json")
    return folder


def flags(folder: pathlib.Path, **others) -> list[str]:
    given = {
        "samples": folder / "samples.npz", "reference": folder / "real.npz",
        "inception": folder / "fid.pth", **others,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


def measured(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())["measured"]


def assert_equal(ours: dict, theirs: dict, bound: float = 1e-9) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=bound), name
