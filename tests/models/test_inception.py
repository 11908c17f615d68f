"""FID's Inception against the networks of pytorch-fid and torch-fidelity."""

import jax
import numpy as np
import pytest
from skimage import data
from sklearn.datasets import load_sample_images

from mdt_jax.models.inception import Inception, resize_bilinear
from mdt_jax.weights import inception_names
from tests.conftest import FULL_COMPILE

torch = pytest.importorskip("torch")
fid = pytest.importorskip("tests.fid_packages")

BOUND = 1e-4  # relative, of each output


@pytest.fixture(scope="module")
def state():
    return fid.random_state()


@pytest.fixture(scope="module")
def run(state):
    network, params = inception_names.from_published(state)

    def apply(images):
        compiled = jax.jit(network.apply).lower({"params": params}, images).compile(FULL_COMPILE)
        return compiled({"params": params}, images)

    return apply


def photographs() -> list[np.ndarray]:
    """Of several sizes, smaller and larger than 299, neither square nor grey."""
    china, flower = load_sample_images().images
    return [data.astronaut(), data.coffee(), data.chelsea()[:256, :256], china, flower[::5, ::5]]


def difference(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def spatial_of(network) -> list:
    """What sFID takes, of each call of a network of PyTorch's."""
    seen = []

    def take(module, inputs, output):
        channels_last = output.permute(0, 2, 3, 1)[..., :7]
        seen.append(channels_last.reshape(len(output), -1).numpy())

    network.Mixed_6d.branch1x1.register_forward_hook(take)
    return seen


@torch.no_grad()
def test_all_outputs_are_torch_fidelitys_resize_included(state, run, tmp_path):
    torch.save({name: torch.tensor(array) for name, array in state.items()}, tmp_path / "fid.pth")
    wanted = ["2048", "logits_unbiased"]
    theirs = fid.FeatureExtractorInceptionV3("fid", wanted, str(tmp_path / "fid.pth"))
    seen = spatial_of(theirs)
    for image in photographs():
        pool, logits = theirs(torch.tensor(image[None]).permute(0, 3, 1, 2))
        ours = run(image[None])
        assert difference(ours.pool, pool) <= BOUND
        assert difference(ours.logits, logits) <= BOUND
        assert difference(ours.spatial, seen[-1]) <= BOUND
        assert ours.spatial.shape == (1, 2023) and ours.logits.shape == (1, 1008)


@torch.no_grad()
def test_all_outputs_are_pytorch_fids(state, run, monkeypatch):
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    monkeypatch.setattr(fid.inception, "load_state_dict_from_url", lambda *_, **__: tensors)
    whole = fid.inception.fid_inception_v3().eval()
    seen, wrapped = spatial_of(whole), fid.inception.InceptionV3(
        [3], resize_input=False, normalize_input=False
    ).eval()  # fmt: skip
    images = np.stack([image[:299, :299] for image in photographs()[:2]])
    inputs = (torch.tensor(images).permute(0, 3, 1, 2).float() - 128) / 128
    ours, pool = run(images), wrapped(inputs)[0][:, :, 0, 0]
    assert difference(ours.pool, pool) <= BOUND
    logits = whole(inputs) - torch.tensor(state["fc.bias"])
    assert difference(ours.logits, logits) <= BOUND
    assert difference(ours.spatial, seen[-1]) <= BOUND


def test_the_resize_is_tensorflow_ones():
    """Pixel i is taken at i·(old/new): no half pixels, no aligned corners."""
    ramp = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1) * np.ones((1, 4, 1, 1), np.float32)
    row = np.asarray(resize_bilinear(ramp, 8))[0, 0, :, 0]
    np.testing.assert_array_equal(row, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    same = np.random.RandomState(0).rand(1, 9, 9, 3).astype(np.float32)
    np.testing.assert_array_equal(resize_bilinear(same, 9), same)


def test_it_computes_in_float32_whatever_it_is_given(state):
    shapes = jax.eval_shape(
        lambda x: Inception().init_with_output(jax.random.key(0), x)[0], np.zeros((1, 8, 8, 3))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
