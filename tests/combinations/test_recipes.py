import json

import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import config as configs
from mdt_jax.models.mdt import MDT
from mdt_jax.train import costs
from tests.conftest import ROOT, train_here
from tests.small_data import write_pictures

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# Ours throughout; the others follow a paper.
OWN = {
    "digits", "mnist", "finetune_digits", "pictures64", "pictures_wide", "emoji", "v2_xl2_512",
    "vavae_xl1",
}  # fmt: skip
PARAMETERS = {
    "s2": 35_797_208,
    "b2": 141_488_528,
    "l2": 477_641_312,
    "xl2": 699_778_144,
    "v2_s2": 38_454_872,
    "v2_xl2": 742_263_904,
    "dit_xl2": 675_129_632 - 256 * 1152,
}


def recipe(name, variant=""):
    return configs.load(str(ROOT / "configs" / f"{name}.py"), variant)


def test_none_is_missing():
    sizes = ("s2", "b2", "l2", "xl2")
    wanted = {*sizes, *(f"v2_{size}" for size in sizes), "dit_s2", "dit_b2", "dit_xl2"}
    wanted |= {"lsun_bedroom", "ffhq"}
    assert set(RECIPES) == wanted | OWN


def small_networks() -> dict[str, list[str]]:
    """Recipes by the first of those whose smoke variants are equal."""
    found, seen = {}, []
    for name in RECIPES:
        small = recipe(name, "smoke").to_dict()
        if small not in seen:
            seen.append(small)
            found[name] = []
        found[list(found)[seen.index(small)]].append(name)
    return found


def test_recipes_of_one_family_are_one_network_when_small():
    found = small_networks()
    assert sum(found.values(), []) and sorted(sum(found.values(), [])) == RECIPES
    assert ["b2", "l2", "s2", "xl2"] in found.values()
    assert ["v2_b2", "v2_l2", "v2_xl2", "v2_xl2_512"] in found.values()
    assert ["dit_b2", "dit_s2", "dit_xl2"] in found.values()
    assert ["ffhq", "lsun_bedroom"] in found.values()


@pytest.mark.parametrize("name", small_networks())
def test_smoke_trains_two_steps_and_samples(name, trained, tmp_path):
    workdir = tmp_path / "run"
    start = [f"--config.init.checkpoint={trained}"] if recipe(name).init.checkpoint else []
    train_here(f"--config=configs/{name}.py:smoke", f"--workdir={workdir}", *start)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    images = np.load(workdir / "samples.npz")["arr_0"]
    assert len(images) == 20 and images.dtype == np.uint8
    assert sorted(path.name for path in (workdir / "samples").iterdir())[-1] == "0000002.png"


@pytest.mark.parametrize("name", RECIPES)
def test_smoke_has_the_structure_of_the_recipe(name):
    whole, small = recipe(name), recipe(name, "smoke")
    configs.validate(whole)
    configs.validate(small)
    shrunk = {"hidden_size", "depth", "num_heads", "decoder_layers", "num_classes"}
    for field, value in whole.model.items():
        assert field in shrunk or small.model[field] == value
    assert bool(small.model.decoder_layers) == bool(whole.model.decoder_layers)
    assert (small.mask, small.diffusion) == (whole.mask, whole.diffusion)
    warmup = min(whole.optim.warmup_steps, 1)
    assert small.optim.to_dict() == {**whole.optim, "warmup_steps": warmup}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = MDT.from_config(recipe(name))
    assert model.num_tokens == 256
    assert costs.parameter_counts(model)[0] == PARAMETERS[name]


@pytest.mark.parametrize(
    "name, changes, grid, channels",
    [
        ("v2_xl2_512", {}, (32, 32), 4),
        ("v2_xl2_512", {"model.patch_size": 4}, (16, 16), 4),
        ("vavae_xl1", {}, (16, 16), 32),
        ("pictures_wide", {}, (16, 24), 3),
        ("v2_xl2", {"data.image_size": 512, "data.image_width": 768}, (32, 48), 4),
    ],
)
def test_grids_of_tokens(name, changes, grid, channels):
    config = recipe(name)
    configs.override(config, changes)
    configs.validate(config)
    model = MDT.from_config(config)
    assert (model.grid, model.in_channels) == (grid, channels)


def test_pictures_that_are_not_square_are_trained_on(tmp_path):
    """Of the recipe's size; the network is small."""
    write_pictures(tmp_path / "pictures")
    printed = train_here(
        "--config=configs/pictures_wide.py", f"--config.data.path={tmp_path / 'pictures'}",
        "--config.model.hidden_size=16", "--config.model.depth=3", "--config.model.num_heads=2",
        "--config.model.decoder_layers=1", "--config.data.batch_size=8", "--config.train.steps=4",
        "--config.train.sample_every=4", "--config.train.log_every=1",
        "--config.sample.num_steps=4", "--config.sample.num_samples=0",
        "--config.sample.batch_size=6", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert "step 4/4" in printed
    grid = Image.open(tmp_path / "run" / "samples" / "0000004.png")
    assert (grid.width + 1) % 97 == 0 and (grid.height + 1) % 65 == 0  # a line between two
    pipeline = mdt_jax.load(tmp_path / "run", num_steps=4)
    assert pipeline.image_shape == (64, 96, 3)
    assert pipeline.to_images(pipeline.generate([0, 1])).shape == (2, 64, 96, 3)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - OWN))
def test_every_line_names_its_source(name):
    lines = (ROOT / "configs" / f"{name}.py").read_text().splitlines()
    fields = [line for line in lines if line.startswith("    config.")]
    of_another = any("configs.base(" in line for line in lines)
    assert len(fields) >= (2 if of_another else 10) and all("  # " in line for line in fields)


def test_v2_differs_from_v1_as_published():
    v1, v2 = recipe("xl2"), recipe("v2_xl2")
    assert (v1.mask.ratio, v1.mask.ratio_max, v1.optim.name, v1.optim.clip_norm) == (
        0.3,
        0.0,
        "adamw",
        0.0,
    )
    assert (v2.mask.ratio, v2.mask.ratio_max, v2.optim.name, v2.optim.clip_norm) == (
        0.3,
        0.5,
        "adan",
        1.0,
    )
    assert costs.kept_lengths(v1, 256) == (179, 179)
    assert costs.kept_lengths(v2, 256) == (128, 179)
    assert (v1.optim.lr, v2.optim.lr, recipe("v2_s2").optim.lr) == (3e-4, 3e-4, 5e-4)
