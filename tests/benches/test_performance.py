"""The benches of speed, and what keeps a step fast."""

import json
import runpy

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import keys
from mdt_jax.sampling.generation import generate
from mdt_jax.sampling.noise import Noise
from mdt_jax.sampling.noise import draw as draw_noise
from mdt_jax.train.step import Draws, Objective, sample_losses
from mdt_jax.weights.mdt_names import to_published
from tests.benches.test_benchmarks import rows_of, script
from tests.conftest import ROOT, run_here
from tests.models.common import random_params

torch = pytest.importorskip("torch")
MODEL = MDT(input_size=(8, 8), in_channels=4, hidden_size=32, depth=4, num_heads=2, num_classes=10)
BATCH, TOKENS, KEPT = 3, 16, 11


@pytest.fixture(scope="module")
def plain():
    """The MDT in PyTorch that we are measured against."""
    return runpy.run_path(str(ROOT / "benchmarks" / "torch_mdt.py"))


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture
def network(plain, params):
    network = plain["TorchMDT"](MODEL)
    state = to_published(MODEL, params)
    network.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return network


def nchw(x):
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


@pytest.fixture
def inputs():
    random = np.random.default_rng(0)
    noise = [random.normal(size=(BATCH, 8, 8, 4)).astype(np.float32) for _ in range(3)]
    order = random.permuted(np.tile(np.arange(TOKENS), (BATCH, 1)), axis=1)
    # Not t = 0, where the likelihood of a random network is float32 noise: log(1 − (1 − 1e-7)).
    return noise, np.array([3, 500, 999], np.int32), order.astype(np.int32)


def largest(got, expected):
    return np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(expected).max()


@pytest.mark.parametrize("masked", [False, True])
def test_the_other_network_does_the_same_work(network, params, inputs, masked):
    (x, *_), t, order = inputs
    ids = order[:, :KEPT] if masked else None
    y = np.array([1, 2, 10], np.int32)
    ours = MODEL.apply({"params": params}, x, t, y, ids)
    with torch.inference_mode():
        kept = None if ids is None else torch.tensor(ids).long()
        theirs = network(nchw(x), torch.tensor(t), torch.tensor(y), kept)
    assert largest(np.moveaxis(theirs.numpy(), 1, -1), ours) < 1e-5


def test_the_other_step_has_the_same_loss_and_gradient(plain, network, params, inputs):
    noise, t, order = inputs
    labels = np.array([1, 2, 3], np.int32)
    draws = Draws(
        t=jnp.asarray(t), noise_full=noise[1], noise_masked=noise[2],
        drop_full=jnp.zeros(BATCH, bool), drop_masked=jnp.ones(BATCH, bool),
        mask_noise=jnp.asarray(np.argsort(order, axis=1), jnp.float32), ratio_u=jnp.float32(0),
    )  # fmt: skip
    batch = {"latents": jnp.asarray(noise[0]), "labels": jnp.asarray(labels)}
    slopes = jax.value_and_grad(sample_losses, argnums=2, has_aux=True)
    (ours, _), grads = slopes(MODEL, Objective(), params, batch, draws)
    trainer = plain["Trainer"](network, 1e-4, 0.9999)
    both = [torch.tensor(labels).long(), torch.full((BATCH,), 10)]
    kept = torch.tensor(order[:, :KEPT]).long()
    theirs = trainer.loss(
        nchw(noise[0]), torch.tensor(t).long(), [nchw(n) for n in noise[1:]], both, kept
    )
    assert theirs.item() == pytest.approx(float(ours), rel=1e-5)
    theirs.backward()
    expected = to_published(MODEL, grads)
    for name, parameter in network.named_parameters():
        assert largest(parameter.grad.numpy(), expected[name]) < 1e-4, name


def test_the_other_sampler_has_the_same_means(plain, network, params):
    """At one step of sampling the noise counts nothing."""
    x = np.asarray(generate(MODEL, params, [1, 2], num_steps=1, seed=4))
    start = draw_noise(MODEL, keys.of(4, keys.Purpose.SAMPLES), Noise(jnp.arange(2)), 0)
    sampler = plain["Sampler"](network, 1, 3.8, 4.0, False)
    drawn = sampler.sample(nchw(start), torch.tensor([1, 2]))
    assert SampleOptions().guidance_scale == 3.8
    assert largest(np.moveaxis(drawn.numpy(), 1, -1), x) < 1e-5


def test_the_small_suite(tmp_path):
    printed, _ = script("run.py", "--suite=small", f"--out={tmp_path}")
    rows = rows_of(printed)
    assert "left out:" not in printed and len(rows) == 2 * (2 + 2)
    assert rows[0][-1] == "CPU, to PyTorch's" and rows[2][-1] == "1.00"
    for name in ("train_step", "sample_step"):
        theirs, ours = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert (theirs["kind"], ours["kind"]) == ("PyTorch", "mdt_jax")
        assert theirs["flops"] == ours["flops"] > 0 and ours["compile_seconds"] > 0
        assert ours["ratio"] > 0 and len(ours["took"]) == ours["steps"] >= 3
        low, high = ours["quartiles"]
        assert low <= ours["seconds"] <= high
        assert 0 < ours["flops"] / ours["seconds"] < ours["peak_flops"]


def test_a_bench_says_what_it_cannot_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name, flags in (
        ("train_step.py", ["--config=configs/none.py"]),
        ("sample_step.py", ["--batch_size=x"]),
        ("train_step.py", ["--config=configs/digits.py", "--dtype=float7"]),
        ("run.py", ["--suite=all"]),
    ):
        bench = runpy.run_path(str(ROOT / "benchmarks" / name))["bench"]
        said = run_here(bench, *flags, f"--out={tmp_path / 'out'}", expect=2)
        assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said
    assert not (tmp_path / "out").exists()
