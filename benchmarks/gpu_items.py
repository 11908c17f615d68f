"""The items of benchmarks/gpu.py that ask what a device computes: its limits, and its errors.

Each function yields the rows of its tables. small: with small arrays.
"""

import functools
import importlib.metadata
import itertools
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax import config as configs
from mdt_jax.diffusion import schedule as sch
from mdt_jax.diffusion.guidance import guide, power_cosine
from mdt_jax.diffusion.samplers import SAMPLERS, sample
from mdt_jax.models import attend, fused, masking, xla
from mdt_jax.models.mdt import MDT
from mdt_jax.train import costs
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import state_from_params
from mdt_jax.train.step import make_train_step, sample_losses

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12", "nvidia-cublas", "grain", "scikit-learn",
)  # fmt: skip
GIB = 2**30


# --- The device


def versions(small: bool, out: str) -> Iterator[dict]:
    """The device, its driver and memory, and the packages."""
    device = jax.devices()[0]
    yield {"what": "device", "value": f"{len(jax.devices())} × {device.device_kind}"}
    yield {"what": "platform", "value": " ".join(device.client.platform_version.split())}
    if program := shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,memory.total,power.limit,clocks.max.sm"
        command = [program, query, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        value = (done.stdout or done.stderr).strip()
        yield {"what": "driver, memory, power limit, largest clock", "value": value}
    limit = (device.memory_stats() or {}).get("bytes_limit")
    yield {"what": "memory for JAX, GiB", "value": limit and limit / GIB}
    yield {"what": "Python", "value": platform.python_version()}
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        yield {"what": name, "value": version}


def seconds_of(function: Callable, *arguments, calls: int = 10) -> float:
    """Seconds of a call: the mean of `calls` enqueued one after another, the best of three."""
    jax.block_until_ready(function(*arguments))
    took = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        took.append((time.perf_counter() - began) / calls)
    return min(took)


def normal(seed: int, shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.Array:
    """Standard normal draws: a GPU multiplies constant matrices up to 13 % faster."""
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return draw(jax.random.key(seed), shape, dtype)


def ceilings(small: bool, out: str) -> Iterator[dict]:
    """Matmuls, XL/2's among them, a copy of 4 GB, and the error of float32 matmuls."""
    scale = 64 if small else 1
    peak = costs.peak_flops(jax.devices()[0].device_kind)
    multiply = jax.jit(jnp.matmul)
    weights = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    weight_gradient = jax.jit(lambda x, grad: weights(x.T, grad))
    shapes = [(8192, 8192, 8192)]
    for tokens in (64 * 256, 64 * 179):  # of both passes of a batch of 64
        shapes += [(tokens, *layer) for layer in ((1152, 3456), (1152, 1152))]
        shapes += [(tokens, *layer) for layer in ((1152, 4608), (4608, 1152))]
    draws = normal(0, (64 * 256 * 4608 // scale,))  # of each shape would be compiled anew
    for n, d, e in (np.array(shapes) // scale).tolist():
        x, grad = draws[: n * d].reshape(n, d), draws[-n * e :].reshape(n, e)
        kernel = draws[-d * e :].reshape(d, e)
        operations = 2 * n * d * e
        row: dict = {"bfloat16 matmul": f"{n}×{d}×{e}"}
        for name, took in (
            ("", seconds_of(multiply, x, kernel)),
            ("weight gradient: ", seconds_of(weight_gradient, x, grad)),
        ):
            row[f"{name}ms"] = took * 1e3
            row[f"{name}TFLOP/s"] = operations / took / 1e12
            row[f"{name}of the data sheet"] = peak and f"{operations / took / peak:.0%}"
        yield row
    x = jnp.arange(2**30 // scale**2, dtype=jnp.uint32)
    took = seconds_of(jax.jit(lambda x: x + 1), x)
    yield {"copy, GB": x.nbytes / 1e9, "ms": took * 1e3, "read and written, TB/s":
           2 * x.nbytes / took / 1e12}  # fmt: skip
    yield from _float32_errors(2048 // scale)


def _float32_errors(side: int) -> Iterator[dict]:
    """Matmuls of float32 at each precision, against float64 in NumPy."""
    from tests.published import relative_error

    a, b = (normal(seed, (side, side), jnp.float32) for seed in (3, 4))
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    for precision in ("default", "high", "highest"):
        multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
        error = relative_error(multiply(a, b), exact)
        took = seconds_of(multiply, a, b)
        yield {"float32 matmul": f"{side}×{side}×{side}", "precision": precision,
               "relative error": error, "TFLOP/s": 2 * side**3 / took / 1e12}  # fmt: skip


# --- The recorded numbers


def goldens(small: bool, out: str, version: str) -> Iterator[dict]:
    """Relative errors to the numbers of the published code, which ran in float32 on a CPU.

    A row for each dtype, precision of float32 matmuls and form of attention; small: one row.
    """
    from tests.published import MODELS

    modes = [
        ("float32", "highest", "auto"), ("bfloat16", "highest", "auto"),
        ("bfloat16", "highest", "plain"), ("float32", "default", "auto"),
    ]  # fmt: skip
    for dtype, precision, form in modes[: 1 if small else None]:
        model = MODELS[version].clone(dtype=jnp.dtype(dtype), attention=form)
        row = {"dtype": dtype, "precision": precision, "attention": chosen_attention(model)}
        model = xla.for_devices(model, jax.default_backend(), 1)
        with jax.default_matmul_precision(precision):
            errors = _pass_errors(version, model) | _training_errors(version, model)
        yield row | errors


def _pass_errors(version: str, model: MDT) -> dict[str, float]:
    """Errors of the full, the masked and the guided pass, and of ten guided steps of sampling."""
    from tests.published import published_numbers, published_params, relative_error

    golden, params = published_numbers(version), published_params(f"{version}_state")
    length = masking.keep_length(64, float(golden["mask_ratio"]))
    keep_ids = masking.keep_ids(jnp.asarray(golden["mask_noise"]), length)
    x, t, y = (jnp.asarray(golden[f"fwd_{name}"]) for name in "xty")
    guided_inputs = [jnp.asarray(golden[f"cfg_{name}"][:3]) for name in "xty"]
    scale, power = float(golden["cfg_scale"]), float(golden["cfg_power"])
    schedule = sch.respace(sch.linear_schedule(), sch.spaced_timesteps(10, 1000))
    noise = jnp.asarray(golden["sample_noise"][:, :3])
    sampler = SAMPLERS["ddpm"](0.0)

    def network(params, x, t, y, keep_ids=None):
        return model.apply({"params": params}, x, t, y, keep_ids)

    def guided(params, y, scale, power):
        def evaluate(x, t):
            both = jnp.concatenate([y, jnp.full_like(y, 10)])
            out = network(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
            return guide(*jnp.split(out, 2), power_cosine(t, scale, power))

        return evaluate

    @jax.jit
    def passes(params):
        x_, t_, y_ = guided_inputs
        full, masked = network(params, x, t, y), network(params, x, t, y, keep_ids)
        return full, masked, guided(params, y_, scale, power)(x_, t_)

    @jax.jit
    def sampled(params, z, y):
        network = guided(params, y, 3.8, 4.0)
        return sample(network, sampler, schedule, sampler.start(z), lambda k: noise[k]).x

    got = dict(zip(("fwd_out", "mask_out", "cfg_out"), passes(params), strict=True))
    start = (jnp.asarray(golden[f"sample_{name}"]) for name in "zy")
    got["sample_ddpm"] = sampled(params, *start)
    names = ("forward", "masked", "guided", "10 steps of ddpm")
    return {
        name: relative_error(array, golden[key][: len(array)])
        for name, (key, array) in zip(names, got.items(), strict=True)
    }


def _training_errors(version: str, model: MDT) -> dict[str, float]:
    """Errors of the first gradient, of the losses of five steps and of how far they move."""
    from tests.published import (
        OBJECTIVES,
        published_numbers,
        published_params,
        published_step,
        relative_error,
    )

    golden, initial = published_numbers(version), published_params(f"{version}_state")
    objective, optim = OBJECTIVES[version], configs.default().optim
    if version == "v2":
        optim.update(name="adan", clip_norm=1.0)

    @jax.jit
    def gradient(params, batch, draws):
        def loss(params):
            return sample_losses(model, objective, params, batch, draws)[0]

        return jax.grad(loss)(params)

    first = gradient(initial, *published_step(version, 0))
    optimizer, rate = make_optimizer(optim), jnp.float32(golden["train_lr"])
    state = state_from_params(jax.tree.map(jnp.asarray, initial), optimizer)
    step = jax.jit(make_train_step(model, objective, optimizer, float(golden["train_ema_rate"])))
    losses = []
    for i in range(5):
        state, metrics = step(state, *published_step(version, i), rate)
        losses.append(float(metrics["loss"]))
    moved, expected = (
        jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), tree, initial)
        for tree in (state.params, published_params(f"{version}_params_after"))
    )
    return {
        "gradient": relative_error(first, published_params(f"{version}_grad_step0")),
        "5 losses": relative_error(losses, golden["train_losses"][:, 0]),
        "5 updates": relative_error(moved, expected),
    }


# --- Attention


def attention(small: bool, out: str) -> Iterator[dict]:
    """Plain and fused attention of a batch of XL/2: time, memory, error and determinism.

    q, k, v: [64, 256, 16, 72] bfloat16; bias: [1, 16, 256, 256] float32. All tokens, or the 179 of
    each sample that a masked pass keeps. The error is relative to float64 in NumPy, of two samples.
    """
    (batch, tokens, heads, width), count = ((3, 16, 2, 8), 11) if small else (
        (64, 256, 16, 72), 179
    )  # fmt: skip
    q, k, v, grad = (normal(seed, (batch, tokens, heads, width)) for seed in range(4))
    bias = normal(4, (1, heads, tokens, tokens), jnp.float32)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(tokens), (batch, 1)), axis=1)
    some = jnp.asarray(order < count)
    for (name, function), kept in itertools.product(forms_of_attention().items(), (None, some)):
        row = {"attention": name, "tokens": f"{tokens}" if kept is None else f"{count} of {tokens}"}
        # A masked pass drops the outputs of hidden queries.
        grads = grad if kept is None else jnp.where(kept[:, :, None, None], grad, 0)
        try:
            yield row | _measure_attention(function, (q, k, v, bias), kept, grads)
        except Exception as error:  # the other form is still of interest
            traceback.print_exc()
            yield row | {"fails": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def forms_of_attention() -> dict[str, Callable[..., jax.Array]]:
    """The forms by name; without a GPU XLA computes what cuDNN would."""
    if jax.default_backend() == "gpu":
        return {"plain": attend.plain, "cudnn": fused.cudnn}
    return {"plain": attend.plain, "as cudnn": functools.partial(fused.cudnn, implementation="xla")}


def chosen_attention(model: MDT) -> str:
    """The form of attention that `xla.for_devices` chooses here, and why if it is not the fused."""
    form = xla.for_devices(model, jax.default_backend(), jax.device_count()).ops.attend
    if form is fused.cudnn:
        return "cudnn"
    return f"plain {xla.refusal(model, jax.default_backend())}".strip()


def _measure_attention(function: Callable, inputs: tuple, kept, grad) -> dict:
    """Milliseconds, gigabytes, relative errors, and whether a second call gives the same bits."""
    from tests.published import relative_error

    def forward(q, k, v, bias, kept):
        return function(q, k, v, bias, kept)

    def both(q, k, v, bias, kept, grad):
        out, backward = jax.vjp(lambda *inputs: function(*inputs, kept), q, k, v, bias)
        return out, *backward(grad.astype(out.dtype))

    forward = jax.jit(forward)
    compiled = jax.jit(both).lower(*inputs, kept, grad).compile()
    memory = compiled.memory_analysis()
    once, again = (compiled(*inputs, kept, grad) for _ in range(2))
    same = all(bool(jnp.array_equal(a, b)) for a, b in zip(once, again, strict=True))
    del once, again
    two = [array if array.shape[0] == 1 else array[:2] for array in inputs]
    two_kept, two_grad = None if kept is None else kept[:2], grad[:2]
    exact = exact_attention(*two, two_kept, two_grad)
    got = [np.asarray(array, np.float64) for array in jax.jit(both)(*two, two_kept, two_grad)]
    if two_kept is not None:
        got[0] = np.where(np.asarray(two_kept)[:, :, None, None], got[0], 0)
    names = ("output", "dq", "dk", "dv", "dbias")
    return {
        "forward, ms": seconds_of(forward, *inputs, kept) * 1e3,
        "forward and backward, ms": seconds_of(compiled, *inputs, kept, grad) * 1e3,
        "temporary, GB": memory and memory.temp_size_in_bytes / 1e9,
        **{
            f"error of {name}": relative_error(a, b)
            for name, a, b in zip(names, got, exact, strict=True)
        },
        "same bits twice": same,
    }


def exact_attention(q, k, v, bias, kept, grad) -> tuple[np.ndarray, ...]:
    """Attention and its gradients in float64: (output, dq, dk, dv, dbias).

    The arguments have the shapes of `attention`. The output is 0 at tokens that are not kept.
    """
    q, k, v, bias, grad = (np.asarray(array, np.float64) for array in (q, k, v, bias, grad))
    scale, product = q.shape[-1] ** -0.5, functools.partial(np.einsum, optimize=True)
    logits = product("bnhd,bmhd->bhnm", q, k) * scale + bias
    if kept is not None:
        logits = np.where(np.asarray(kept)[:, None, None, :], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = product("bhnm,bmhd->bnhd", weights, v)
    if kept is not None:
        out = np.where(np.asarray(kept)[:, :, None, None], out, 0)
    d_weights = product("bnhd,bmhd->bhnm", grad, v)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    return (
        out,
        product("bhnm,bmhd->bnhd", d_logits, k) * scale,
        product("bhnm,bnhd->bmhd", d_logits, q) * scale,
        product("bhnm,bnhd->bmhd", weights, grad),
        d_logits.sum(0, keepdims=True),
    )
