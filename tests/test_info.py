import pytest

from mdt_jax import config as configs
from mdt_jax import info
from mdt_jax.models.mdt import MDT, SIZES
from mdt_jax.train import costs
from tests.conftest import run_here


def published(size, version="v1", decoder_layers=2, **fields):
    """The shape of a published model for 256×256 images."""
    fields = {**SIZES[size], "version": version, "decoder_layers": decoder_layers, **fields}
    return MDT(input_size=(32, 32), in_channels=4, **fields)


@pytest.mark.parametrize(
    "model, total, sampling",
    [
        (published("S"), 35_797_208, 33.13e6),
        (published("B"), 141_488_528, 130.85e6),
        (published("L"), 477_641_312, 458.74e6),
        (published("XL"), 699_778_144, 675.86e6),
        (published("S", "v2", 6), 38_454_872, 35.79e6),
        (published("XL", "v2", 4), 742_263_904, 718.34e6),
    ],
    ids=["S", "B", "L", "XL", "v2 S", "v2 XL"],
)
def test_parameter_counts_are_the_published_ones(model, total, sampling):
    counted, without = costs.parameter_counts(model)
    assert counted == total
    assert without == pytest.approx(sampling, abs=6e3)


def test_a_dit_has_dits_parameters():
    """DiT-XL/2 counts 675,129,632, its fixed position embedding [256, 1152] among them."""
    dit = published("XL", decoder_layers=0, relative_bias=False, learned_position=False)
    total, sampling = costs.parameter_counts(dit)
    assert total == sampling == 675_129_632 - 256 * 1152


@pytest.mark.parametrize(
    "model, full, masked",
    [
        (published("S"), 6.06, {179: 4.94}),
        (published("B"), 23.01, {179: 18.96}),
        (published("L"), 80.70, {179: 61.23}),
        (published("XL"), 118.62, {179: 88.97}),
        (published("S", "v2", 6), 6.74, {128: 5.5, 179: 6.2}),
        (published("XL", "v2", 4), 129.49, {128: 78, 179: 100}),
    ],
    ids=["S", "B", "L", "XL", "v2 S", "v2 XL"],
)
def test_work_is_the_published_codes(model, full, masked):
    assert round(costs.pass_macs(model) / 1e9, 2) == full
    for kept, expected in masked.items():
        digits = len(str(expected).partition(".")[2])
        assert round(costs.pass_macs(model, kept) / 1e9, digits) == expected


def test_scanned_and_unrolled_blocks_are_the_same_work():
    model = MDT(input_size=(8, 8), in_channels=1, hidden_size=16, depth=5, num_heads=2)
    assert costs.pass_macs(model) == costs.pass_macs(model.clone(unroll=True))
    assert costs.pass_macs(model) == costs.pass_macs(model.clone(remat="full"))


def test_a_dit_has_no_masked_pass():
    printed = run_here(info.main, "--config=configs/dit_s2.py:smoke")
    assert "full pass" in printed and "kept" not in printed and "masked" not in printed


def test_memory_holds_the_state():
    config = configs.variant(configs.default(), "smoke")
    config.optim.name = "adan"
    model = MDT.from_config(config)
    memory = costs.step_memory(config, model)
    total, _ = costs.parameter_counts(model)
    # Parameters, EMA, three moments and the last gradient, in float32; and a few counters.
    assert memory["state"] == pytest.approx(4 * 6 * total, abs=64)
    pixels = 16 * 8 * 8
    assert pixels <= memory["batch"] < 2 * pixels
    assert memory["temporary"] > 4 * total
