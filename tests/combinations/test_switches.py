"""Every pair of switches that `validate` accepts makes a training step and a sample.

Of the configs that hold all pairs some are run, the others traced, which finds what a trace can
fail on. Any number of random configs around random triples is run by

    SWITCH_TRIPLES=50 python -m pytest -n0 tests/combinations/test_switches.py -k triples
"""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mdt_jax import config as configs
from mdt_jax.diffusion.options import SampleOptions, balanced_labels
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import keys, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling import engine, generation
from mdt_jax.sampling.noise import Noise
from mdt_jax.train import inputs
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import abstract_state, init_state
from mdt_jax.train.step import Objective, compile_step, draw_step, make_train_step

BATCH = 4
# The first value of each field makes up a config that is accepted; the others are all there are, or
# those at the edge.
VALUES = {
    "model.version": ("v1", "v2"),
    "model.hidden_size": (16, 4),
    "model.depth": (2, 1, 3, 4),
    "model.num_heads": (2, 1, 4),
    "model.patch_size": (2, 1, 4),
    "model.decoder_layers": (1, 0, 2),
    "model.side_layers": (1, 2),
    "model.num_classes": (3, 1, 0),
    "model.relative_bias": (True, False),
    "model.qk_norm": (False, True),
    "model.learned_position": (True, False),
    "model.side_interpolater": (True, False),
    "model.masked_shortcut": (True, False),
    "mask.ratio": (0.3, 0.0, 0.9),
    "mask.ratio_max": (0.0, 0.3, 0.5, 0.93),
    "mask.passes": ("both", "full", "masked"),
    "mask.loss_on": ("all", "masked"),
    "mask.asymmetric": (True, False),
    "diffusion.steps": (1000, 21),
    "diffusion.objective": ("epsilon", "v", "flow"),
    "diffusion.timesteps": ("uniform", "logit_normal"),
    "diffusion.loss_weight": ("uniform", "min_snr_5"),
    "data.channels": (1, 3),
    "optim.name": ("adamw", "adan"),
    "optim.schedule": ("constant", "cosine", "linear"),
    "optim.warmup_steps": (0, 1),
    "optim.end_lr": (0.0, 1e-5),
    "optim.weight_decay": (0.0, 0.1),
    "optim.b1": (-1.0, 0.5),
    "optim.b2": (-1.0, 0.5),
    "optim.clip_norm": (0.0, 1.0),
    "optim.ema_decay": (0.9999, 0.0),
    "optim.ema_warmup": (False, True),
    "train.dtype": ("float32", "bfloat16"),
    "train.precision": ("highest", "high", "default"),
    "train.remat": ("none", "dots", "full"),
    "train.accumulate": (1, 2, BATCH),
    "sample.sampler": ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun", "euler"),
    "sample.num_steps": (3, 1, 2, 21),
    "sample.spacing": ("even", "stride", "karras", "log_snr"),
    "sample.eta": (0.0, 1.0),
    "sample.clip_denoised": ("auto", "true", "false"),
    "sample.guidance": ("power_cosine", "power_cosine_printed", "constant"),
    "sample.guidance_scale": (3.8, 1.0, 0.0),
    "sample.guidance_power": (4.0, 0.0),
    "sample.guidance_channels": (3, 0, 1),
    "sample.guidance_low": (0.0, 0.5, 1.0),
    "sample.guidance_high": (1.0, 0.5, 0.0),
    "sample.guidance_skip_tolerance": (0.0, 9.0),
    "sample.guide": ("null", "masked"),
    "sample.guide_ratio": (0.5, 0.0),
    "sample.encoder_every": (1, 2),
    "sample.encoder_order": (1, 0, 2),
}
FIELDS = list(VALUES)
FIRST = {field: values[0] for field, values in VALUES.items()}
RUN = 2  # configs of the covering set that are run, not only traced
CHUNKS = 6  # of the covering set, for as many workers


@functools.cache
def smallest() -> ConfigDict:
    config = configs.variant(configs.default(), "smoke")
    config.data.update(image_size=4, batch_size=BATCH)
    return config


def config_of(chosen: dict) -> ConfigDict:
    config = smallest().copy_and_resolve_references()
    for field, value in chosen.items():
        group, name = field.split(".")
        config[group][name] = value
    inputs.complete_config(config, config.model.num_classes)
    return config


def accepted(chosen: dict) -> bool:
    try:
        configs.validate(config_of(chosen), jax.device_count())
    except UserError:
        return False
    return True


def pairs_of(chosen: dict) -> set:
    return set(itertools.combinations([(field, chosen[field]) for field in FIELDS], 2))


def spread(chosen: dict, held: set, left: set, random) -> dict:
    """An accepted config with other values in the fields that are not held: those that bring the
    most pairs that are left, or of equal ones any."""
    chosen = dict(chosen)
    for field in random.permutation([field for field in FIELDS if field not in held]).tolist():

        def gain(value, field=field):
            new = {**chosen, field: value}
            own = (field, value)
            return -sum(
                ((other, new[other]), own) in left or (own, (other, new[other])) in left
                for other in FIELDS
            )

        values = [VALUES[field][i] for i in random.permutation(len(VALUES[field]))]
        for value in sorted(values, key=gain):
            if value == chosen[field] or accepted({**chosen, field: value}):
                chosen[field] = value
                break
    return chosen


@functools.cache
def covering() -> tuple[dict, ...]:
    """Accepted configs that hold every pair of values of two fields that any holds."""
    random = np.random.default_rng(0)
    left: dict = dict.fromkeys(
        ((f, a), (g, b))
        for f, g in itertools.combinations(FIELDS, 2)
        for a in VALUES[f]
        for b in VALUES[g]
    )
    found = []
    # What is set when there is no masked pass, or no classes.
    bases = [
        FIRST,
        {**FIRST, "mask.passes": "full", "model.decoder_layers": 0},
        {**FIRST, "model.num_classes": 0, "sample.guidance_scale": 1.0},
        {**FIRST, "model.patch_size": 4, "mask.ratio": 0.0},
        {**FIRST, "diffusion.objective": "flow", "sample.sampler": "euler"},
        {**FIRST, "sample.guide": "masked"},
        {**FIRST, "sample.encoder_every": 2},
        {**FIRST, "model.depth": 4, "model.version": "v2", "model.decoder_layers": 2},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "default", functools.cache(configs.default))
        while left:
            pair = next(iter(left))
            starts = ({**base, **dict(pair)} for base in [*bases, *found[::-1][:20]])
            start = next(filter(accepted, starts), None)
            if start is None:  # refused, whatever the rest is
                del left[pair]
                continue
            found.append(spread(start, set(dict(pair)), left.keys(), random))
            for each in pairs_of(found[-1]):
                left.pop(each, None)
    return tuple(found)


def parts_of(config: ConfigDict):
    model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
    return model, optimizer, parallel.make_mesh(config.mesh.data, config.mesh.fsdp)


def trace(config: ConfigDict) -> None:
    """A training step and the drawing of samples, as shapes."""
    model, optimizer, mesh = parts_of(config)
    objective = Objective.from_config(config)
    step = make_train_step(
        model, objective, optimizer, config.optim.ema_decay, config.train.accumulate
    )
    state = abstract_state(model, optimizer, mesh)
    key = jax.eval_shape(keys.key, 0)
    drawn = functools.partial(
        draw_step,
        model=model,
        batch=BATCH,
        diffusion_steps=objective.steps,
        flow_times=objective.timesteps if objective.is_flow else None,
    )
    draws = jax.eval_shape(drawn, key, state.step)
    batch = {
        "latents": draws.noise_full,
        "labels": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    after, _ = jax.eval_shape(step, state, batch, draws._replace(posterior=None), 1e-4)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)

    asked = requested(config, model, {})
    program, chain = asked.program(), engine.segments(*asked.evaluations())
    shared = asked.shared(asked.evaluations()[0], mesh)

    def sampled(params, key, labels, scales):
        batch = engine.Batch(key, Noise(labels), labels, scales, **shared)
        state, done = engine.start(program, batch), 0
        for segment in chain:
            state, done = engine.run_segment(program, segment, params, batch, state, done)
        return state, done

    scales = jax.ShapeDtypeStruct((BATCH,), jnp.float32)
    drawn, _ = jax.eval_shape(sampled, state.ema, key, batch["labels"], scales)
    assert drawn.x.shape == batch["latents"].shape


def requested(config: ConfigDict, model: MDT, params) -> generation.Request:
    labels = balanced_labels(BATCH, model.num_classes)
    options = SampleOptions.from_config(config)
    return generation.request(model, params, labels, options=options, batch_size=BATCH)


def run(config: ConfigDict) -> None:
    """The same with numbers, which must be finite."""
    model, optimizer, mesh = parts_of(config)
    state = jax.jit(init_state, static_argnums=(0, 1))(model, optimizer, keys.key(0))
    step = compile_step(config, model, optimizer, abstract_state(model, optimizer, mesh), mesh)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 4, 4, config.data.channels))
    labels = balanced_labels(BATCH, model.num_classes)
    batch = {"images": images.astype(np.uint8), "labels": labels}
    batch = parallel.put(batch, parallel.split_batch(mesh))
    state, metrics = step(state, batch, keys.key(1), np.float32(config.optim.lr))
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0
    assert np.isfinite(requested(config, model, state.ema).draw()).all()


def said(chosen: dict) -> str:
    """What is unusual about a config, for the name of a test."""
    return " ".join(f"{f}={v}" for f, v in chosen.items() if v != FIRST[f])


def test_all_values_of_switches_are_in_some_pair():
    assert {value for each in covering() for value in each.items()} == {
        (field, value) for field, values in VALUES.items() for value in values
    }


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_all_pairs_of_switches(chunk):
    for number, each in list(enumerate(covering()))[chunk::CHUNKS]:
        try:
            (run if number < RUN else trace)(config_of(each))
        except Exception as error:
            raise AssertionError(f"{said(each)}: {type(error).__name__}: {error}") from error


def test_enumerations_are_complete():
    """A new name in one of them comes into the pairs by being written above."""
    for field in FIELDS:
        if isinstance(FIRST[field], str):
            unknown = {**FIRST, field: "nothing"}
            with pytest.raises(UserError, match="must be one of") as refused:
                configs.validate(config_of(unknown))
            names = str(refused.value).partition("must be one of ")[2].split(", ")
            assert set(names) == set(VALUES[field]), field


@pytest.mark.parametrize("number", range(int(os.environ.get("SWITCH_TRIPLES", "0"))))
def test_random_triples_of_switches(number):
    random = np.random.default_rng(number)
    for _ in range(1000):
        fields = random.permutation(FIELDS)[:3].tolist()
        triple = {f: VALUES[f][random.integers(len(VALUES[f]))] for f in fields}
        if accepted({**FIRST, **triple}):
            chosen = spread({**FIRST, **triple}, set(fields), set(), random)
            print(said(chosen))
            run(config_of(chosen))
            jax.clear_caches()  # or a hundred of them map more memory than Linux allows
            return
