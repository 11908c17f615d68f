"""Every float32 product of every program has the precision that was asked for."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from mdt_jax import config as configs
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.inception import Inception
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime import parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling import engine, generation
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import abstract_state
from mdt_jax.train.step import trace_step
from mdt_jax.weights import vae

PLATFORMS = ("cuda", "tpu")
VAE = AutoencoderKL(channels=(8, 8, 8, 8), groups=4)


def products(traced: jax.stages.Traced, platform: str) -> list[list[str]]:
    """The precisions of the factors of each float32 matmul and convolution."""
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    lines = [x for x in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", x)]
    factors = [x for x in lines if "xf32>" in x.rpartition(" : ")[2].partition("->")[0]]
    return [re.findall(r"HIGHEST|HIGH|DEFAULT", x) for x in factors]


def tiny(version: str, **train) -> configs.ConfigDict:
    config = configs.default()
    config.model.update(hidden_size=16, depth=3, num_heads=2, decoder_layers=1, version=version)
    config.data.batch_size = 4
    config.mask.ratio_max = 0.5 if version == "v2" else 0.0
    config.train.update(train)
    return config


def training(config) -> jax.stages.Traced:
    model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    return trace_step(config, model, optimizer, abstract_state(model, optimizer, mesh), mesh)


def drawing(options: SampleOptions) -> jax.stages.Traced:
    model = MDT.from_config(tiny("v1"))
    asked = generation.request(
        model, init_params(model, jax.random.key(0)), [0, 1], options=options, num_steps=4
    )
    mesh, params, key = asked.on_devices()
    program, batch = asked.program(), asked.batch(0, key, mesh)
    state, segment = engine.start(program, batch), engine.Segment(guided=True, count=4)
    return engine.run_segment.trace(program, segment, params, batch, state, 0)


def abstract(network, *arguments, **flags) -> dict:
    return jax.eval_shape(
        lambda key: network.init(key, *arguments, **flags)["params"], jax.random.key(0)
    )


def encoding(precision: str) -> jax.stages.Traced:
    images = jnp.zeros((2, 16, 16, 3), jnp.uint8)
    params = abstract(VAE, jnp.zeros((1, 16, 16, 3)))
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    return vae._encode(VAE, mesh, precision).trace(params, images)


def decoding(precision: str) -> jax.stages.Traced:
    params = abstract(VAE, jnp.zeros((1, 16, 16, 3)))
    return vae._decode.trace(VAE, precision, params, jnp.zeros((2, 2, 2, 4)))


def features() -> jax.stages.Traced:
    network, images = Inception(), jnp.zeros((1, 80, 80, 3), jnp.uint8)
    params = abstract(network, images)
    return jax.jit(lambda p, x: network.apply({"params": p}, x)).trace(params, images)


def test_float32_products_are_those_of_float32():
    programs = {
        "v1": training(tiny("v1")),
        "v2": training(tiny("v2")),
        "bfloat16": training(tiny("v2", dtype="bfloat16")),
        "sampling": drawing(SampleOptions()),
        "encoding": encoding("highest"),
        "decoding": decoding("highest"),
        "Inception": features(),
    }
    for (name, traced), platform in itertools.product(programs.items(), PLATFORMS):
        found = products(traced, platform)
        assert len(found) >= (2 if name == "bfloat16" else 10), name
        assert all(each == ["HIGHEST"] * 2 for each in found), name


def test_what_is_asked_for_is_taken():
    """But for sums that are made by a matmul: a bias's gradient, the relative bias's."""
    for precision in ("high", "default"):
        wanted = [precision.upper()] * 2
        options = SampleOptions(precision=precision)
        for traced in (drawing(options), encoding(precision), decoding(precision)):
            assert all(each == wanted for each in products(traced, "tpu"))
        kinds = [tuple(each) for each in products(training(tiny("v1", precision=precision)), "tpu")]
        assert set(kinds) == {tuple(wanted), ("HIGHEST", "HIGHEST")}
        assert kinds.count(tuple(wanted)) >= 20


def test_what_jax_is_set_to_changes_nothing():
    with jax.default_matmul_precision("bfloat16"):
        found = products(drawing(SampleOptions()), "cuda") + products(training(tiny("v1")), "cuda")
    assert all(each == ["HIGHEST"] * 2 for each in found)


def test_unknown_ones_are_refused():
    config = tiny("v1", precision="exact")
    with pytest.raises(UserError, match="train.precision is 'exact'"):
        configs.validate(config)
    with pytest.raises(UserError, match="precision is 'exact'; it must be one of highest"):
        SampleOptions(precision="exact").check(10)


def test_the_run_and_its_samples_tell_it():
    config = tiny("v1", precision="default")
    assert SampleOptions.from_config(config).precision == "default"
    stored = configs.default().to_dict()
    del stored["train"]["precision"]  # of a run before there was the field
    assert configs.complete(stored).train.precision == "highest"
