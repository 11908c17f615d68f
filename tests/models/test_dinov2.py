"""DINOv2 against the published network in PyTorch, and its files."""

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data

from mdt_jax.evaluation import feature_networks
from mdt_jax.models import dinov2
from mdt_jax.models.dinov2 import MEAN, STD, resize_weights
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import dinov2_names, networks, torch_files
from tests.conftest import FULL_COMPILE, run_here

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("tests.dinov2")

BOUND = 1e-5  # relative


@pytest.fixture(scope="module")
def state():
    return theirs.random_state()


@torch.no_grad()
def their_features(state, images: np.ndarray, **sizes) -> np.ndarray:
    network = theirs.Dinov2(**sizes).eval()
    network.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return network((x - mean) / std).numpy()


def our_features(state, images: np.ndarray) -> np.ndarray:
    model, params = dinov2_names.from_published(state)
    compiled = jax.jit(model.apply).lower({"params": params}, images).compile(FULL_COMPILE)
    return np.asarray(compiled({"params": params}, images))


def photographs(size: int) -> np.ndarray:
    images = (data.astronaut(), data.coffee())
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size))) for x in images])


@pytest.mark.parametrize("size", [112, 126, 224])
def test_the_class_token_is_the_published_networks(state, size):
    """On grids smaller than, equal to, and larger than that of the position embeddings."""
    images = photographs(size)
    expected = their_features(state, images)
    ours = our_features(state, images)
    assert ours.dtype == np.float32 and expected.std() > 0.5
    assert np.abs(ours - expected).max() <= BOUND * np.abs(expected).max()


@pytest.mark.parametrize(("old", "new"), [(37, 16), (37, 37), (9, 16), (5, 1), (2, 7)])
def test_position_embeddings_are_resized_as_by_pytorch(old, new):
    grid = np.random.RandomState(0).randn(1, 1, old, old).astype(np.float32)
    scale = (new + dinov2.OFFSET) / old
    expected = torch.nn.functional.interpolate(
        torch.tensor(grid), scale_factor=(scale, scale), mode="bicubic"
    )[0, 0].numpy()
    weights = resize_weights(old, new)
    np.testing.assert_allclose(weights @ grid[0, 0] @ weights.T, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


def test_the_released_size():
    leaves = jax.tree.leaves(dinov2_names.shapes(dinov2.Dinov2()))
    assert sum(leaf.size for leaf in leaves) == 304_368_640


def test_there_and_back_every_key_is_bit_equal(state, tmp_path):
    model, params = dinov2_names.from_published(state)
    assert (model.width, model.depth, model.mlp_width, model.grid) == (128, 2, 512, 9)
    theirs.Dinov2().load_state_dict(  # strict
        {n: torch.tensor(a) for n, a in dinov2_names.to_published(model, params).items()}
    )
    from mdt_jax import convert

    torch_files.write_arrays(tmp_path / "vit.pth", state)
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    printed = run_here(convert.main, f"--src={tmp_path}/vit.pth", f"--dst={folder}")
    assert "a DINOv2 of width 128 and depth 2" in printed
    run_here(convert.main, f"--src={folder}", f"--dst={back}")
    arrays = torch_files.read_arrays(back)
    assert set(arrays) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)


def test_files_of_hugging_face(state):
    renamed = theirs.hugging_face(state)
    assert len(renamed) == len(state) + 4 * theirs.DEPTH and not set(renamed) & set(state)
    ours, expected = (dinov2_names.from_published(each) for each in (renamed, state))
    assert ours[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], expected[1])


def test_other_networks_are_refused_by_name(state, tmp_path):
    def refused(match, **arrays):
        with pytest.raises(UserError, match=match):
            dinov2_names.from_published({**state, **arrays})

    refused("DINOv2 with registers; only", register_tokens=np.zeros((1, 4, 128)))
    refused("DINOv2 of size g with SwiGLU", **{"blocks.0.mlp.w12.weight": np.zeros((1, 1))})
    refused("a width of 96 is no DINOv2's", pos_embed=np.zeros((1, 82, 96)))
    refused(r"pos_embed has the shape \[82, 128\]", pos_embed=np.zeros((82, 128)))
    refused("unexpected head.weight", **{"head.weight": np.zeros((10, 128))})
    refused(
        r"patch_embed.proj.weight has the shape \[128, 3, 16, 16\]",
        **{"patch_embed.proj.weight": np.zeros((128, 3, 16, 16))},
    )
    some = {name: array for name, array in state.items() if "fc1" not in name}
    with pytest.raises(UserError, match="a DINOv2: missing blocks.0.mlp.fc1"):
        dinov2_names.from_published(some)
    # A ViT without LayerScale, for example DINO's of 2021.
    plain = {name: array for name, array in state.items() if ".ls" not in name}
    torch_files.write_arrays(tmp_path / "vit.pth", plain)
    with pytest.raises(UserError, match="vit.pth: these are not the weights of a DINOv2: missing"):
        networks.read_network(tmp_path / "vit.pth", kind="dinov2")
    torch_files.write_arrays(tmp_path / "dino.pth", state)
    for kind, name in (("mdt", "an MDT"), ("inception", "FID's Inception")):
        with pytest.raises(UserError, match=f"dino.pth holds a DINOv2, not {name}"):
            networks.read_network(tmp_path / "dino.pth", kind=kind)


def features_of(state, images: np.ndarray) -> np.ndarray:
    model, params = dinov2_names.from_published(state)
    return feature_networks.Dinov2Features(model, params, {})(images)["dinov2"]


@pytest.mark.parametrize("shape", [(300, 400), (256, 256), (64, 64), (224, 224)])
def test_images_are_resized_as_by_dgm_eval(shape):
    """It applies torchvision's Resize to a PIL.Image. EDM2's default is close to it."""
    pytest.importorskip("tests.torchvision_on_cpus")
    from torchvision.transforms import InterpolationMode, Resize

    image = data.astronaut()[: shape[0], : shape[1]]
    ours = feature_networks.resize(image)
    expected = Resize((224, 224), InterpolationMode.BICUBIC)(Image.fromarray(image))
    np.testing.assert_array_equal(ours, np.asarray(expected))
    in_float = torch.nn.functional.interpolate(
        torch.tensor(image).permute(2, 0, 1)[None].float(),
        size=(224, 224),
        mode="bicubic",
        antialias=True,
    )
    difference = np.abs(in_float[0].permute(1, 2, 0).numpy().clip(0, 255) - ours)
    assert difference.mean() < 0.4 and difference.max() < 4


def test_features_of_grey_images(state, monkeypatch):
    monkeypatch.setattr(feature_networks, "EACH_DEVICE", 2)
    grey = photographs(40)[..., :1]
    coloured = np.repeat(grey, 3, axis=-1)
    expected = their_features(state, np.stack([feature_networks.resize(x) for x in coloured]))
    for images in (grey, coloured):
        ours = features_of(state, images)
        assert np.abs(ours - expected).max() <= BOUND * np.abs(expected).max()
