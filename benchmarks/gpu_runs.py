"""The items of benchmarks/gpu.py that train and sample.

Each function yields the rows of its tables. small: with the recipes' smoke variants.
"""

import glob
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import sample_step
import soak
import timing
import train_step
from gpu_items import chosen_attention

from mdt_jax.models import xla
from mdt_jax.models.autoencoder import AutoencoderKL, LatentNorm
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import read_json
from mdt_jax.train import costs
from mdt_jax.weights.vae import Vae

STEPS = 10  # timed steps
TRACED = 3  # steps of a trace
MOST_KERNELS = 30  # rows of its table


def recipe(config: str, small: bool) -> str:
    return f"{config}:smoke" if small else config


# --- Training


def train(
    small: bool, out: str, config: str, batch_size: int, remat: str,
    attention: str = "auto", unroll: bool | None = None, trace: bool = False,
) -> Iterator[dict]:  # fmt: skip
    """A training step in bfloat16; trace: also a table of its kernels.

    attention: `train.attention`. unroll: blocks unrolled or scanned; None: as the code chooses.
    """
    if unroll is not None:
        use_blocks(unroll)
    spec = {
        "config": recipe(config, small), "batch_size": 4 if small else batch_size,
        "dtype": "bfloat16", "remat": remat, "attention": attention,
    }  # fmt: skip
    model = MDT.from_config(timing.recipe(spec["config"], dtype="bfloat16", attention=attention))
    unrolled = xla.for_devices(model, jax.default_backend(), jax.device_count()).unroll
    blocks = "unrolled" if unrolled else "scanned"
    yield spec | {"attention": chosen_attention(model), "blocks": blocks}
    step, facts = train_step.prepare(spec)
    step()
    took = []
    for _ in range(STEPS):
        began = time.perf_counter()
        metrics = step()
        took.append(time.perf_counter() - began)
    seconds = statistics.median(took)
    rate = facts["flops"] / seconds
    peak = costs.peak_flops(facts["device"])
    yield {
        "compile s": facts["compile_seconds"],
        "ms a step": seconds * 1e3,
        "slowest, ms": max(took) * 1e3,
        "img/s": spec["batch_size"] / seconds,
        "TFLOP/s": rate / 1e12,
        "of the matmul peak": f"{rate / facts['peak_flops']:.1%}",
        "of the data sheet": peak and f"{rate / peak:.1%}",
        "memory, GiB": facts.get("memory", 0) / 2**30 or None,
        "loss": float(metrics["loss"]),
    }
    if trace:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(out, profiler_options=options):
            for _ in range(TRACED):
                step()
        files = glob.glob(f"{out}/**/*.xplane.pb", recursive=True)
        newest = max(files, key=os.path.getmtime)
        yield from kernels(jax.profiler.ProfileData.from_file(newest), TRACED)


def use_blocks(unroll: bool) -> None:
    """From now on this process compiles models with unrolled or with scanned blocks."""
    choose = xla.for_devices
    xla.for_devices = lambda *args, **kwargs: choose(*args, **kwargs).clone(unroll=unroll)


def kernels(trace: jax.profiler.ProfileData, steps: int) -> Iterator[dict]:
    """A table of the kernels in a trace of some steps, those that took longest first.

    Kernels whose names differ only in the number at the end are one row. A CPU has no kernels: its
    rows are the operations of XLA.
    """
    seconds, calls = Counter(), Counter()
    lines = [(plane, line) for plane in trace.planes for line in plane.lines]
    for plane, line in lines:
        on_device = plane.name.startswith("/device:")
        if on_device and not line.name.startswith("Stream"):
            continue
        for event in line.events:
            is_work = on_device or "hlo_op" in dict(event.stats)
            if is_work and not event.name.startswith("end: "):
                name = re.sub(r"([._]\d+)+$", "", event.name)[:90]
                seconds[name] += event.duration_ns / 1e9 / steps
                calls[name] += 1
    total = sum(seconds.values())
    rows = [("all", total), *seconds.most_common(MOST_KERNELS)]
    calls["all"] = sum(calls.values())
    for name, took in rows:
        yield {"kernel": name, "ms a step": took * 1e3, "calls a step": calls[name] / steps,
               "share": f"{took / total:.1%}" if total else None}  # fmt: skip


# --- Sampling


def sample(small: bool, out: str, batch_size: int) -> Iterator[dict]:
    """Guided sampling with XL/2 in bfloat16; guidance is left out where its weight is near 1."""
    steps = {"ddpm": 5, "ddim": 3} if small else {"ddpm": 250, "ddim": 50}
    tolerances = (0.001,) if small else (0.0, 0.001)
    for tolerance, (sampler, count) in itertools.product(tolerances, steps.items()):
        spec = {
            "config": recipe("configs/xl2.py", small), "dtype": "bfloat16", "sampler": sampler,
            "batch_size": batch_size, "num_steps": count, "tolerance": tolerance,
        }  # fmt: skip
        run, facts = sample_step.prepare(spec)
        took = [facts["sample_seconds"]]
        while sum(took) < 5 and len(took) < 5:
            began = time.perf_counter()
            run()
            took.append(time.perf_counter() - began)
        seconds = statistics.median(took)
        yield {
            "sampler": sampler, "steps": count, "guidance left out below": tolerance,
            "passes": facts["passes"], "images": batch_size,
            "compile s": facts["compile_seconds"], "s": seconds,
            "ms a step": seconds / count * 1e3, "img/s": batch_size / seconds,
            "TFLOP/s": facts["flops"] / seconds / 1e12,
            "memory, GiB": facts.get("memory", 0) / 2**30 or None,
        }  # fmt: skip


def vae(small: bool, out: str) -> Iterator[dict]:
    """Decoding with Stable Diffusion's VAE, with random weights."""
    size = dict(channels=(8, 8), groups=4) if small else {}
    network, side = AutoencoderKL(**size), 8 if small else 32
    image = np.zeros((1, 8, 8, 3), np.float32)
    init = jax.jit(lambda key: network.init(key, image)["params"])
    decoder = Vae("random", LatentNorm(1.0), network, init(jax.random.key(0)))
    random = np.random.default_rng(0)
    precisions = ("highest",) if small else ("highest", "default")
    for precision, count in itertools.product(precisions, (8, 64)):
        latents = random.normal(size=(count, side, side, 4)).astype(np.float32)
        decoder.decode(latents, precision=precision)
        began = time.perf_counter()
        decoder.decode(latents, precision=precision)
        seconds = time.perf_counter() - began
        yield {"images": count, "precision": precision, "s": seconds, "img/s": count / seconds}


# --- Losses


# (dtype, precision of float32 matmuls, attention); a CPU computes the first.
VARIANTS = (
    ("float32", "highest", "plain"),
    ("float32", "default", "plain"),
    ("bfloat16", "highest", "plain"),
    ("bfloat16", "highest", "auto"),
)


def run_losses(small: bool, dtype: str, precision: str, attention: str) -> list[float]:
    """The losses of S/2 on eight random latents, 300 steps (small: 20)."""
    spec = {
        "config": recipe("configs/s2.py", small), "batch_size": 8, "dtype": dtype,
        "remat": "none", "precision": precision, "attention": attention,
    }  # fmt: skip
    step, _ = train_step.prepare(spec)
    return [float(step()["loss"]) for _ in range(20 if small else 300)]


def write_losses(path: str, small: bool) -> None:
    """Train on this device in float32 and write the losses to a file for `read_losses`."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    losses = run_losses(small, *VARIANTS[0])
    device = jax.devices()[0].device_kind
    content = {"small": small, "device": device, "losses": losses}
    pathlib.Path(path).write_text(json.dumps(content) + "\n")


def read_losses(path: str, small: bool) -> tuple[str, list[float]]:
    """(device, losses) of a file. Raises UserError where it is none, or of the other size."""
    found = read_json(pathlib.Path(path))
    if found is None:
        raise UserError(f"{path} does not exist; --write_losses={path} writes it on a CPU")
    if found.keys() != {"small", "device", "losses"}:
        raise UserError(f"{path} holds no losses of --write_losses")
    if found["small"] != small:
        raise UserError(f"the losses in {path} are {'' if found['small'] else 'not '}--small")
    return found["device"], found["losses"]


def losses(small: bool, out: str, beside: str = "") -> Iterator[dict]:
    """The losses of S/2 in each of VARIANTS (small: the first and the last), compared to a file.

    beside: the file of `write_losses`; without it they are compared to the first variant.
    """
    device, expected = read_losses(beside, small) if beside else ("the first row", None)
    for dtype, precision, attention in VARIANTS[:: 3 if small else 1]:
        got = run_losses(small, dtype, precision, attention)
        expected = expected or got
        yield {
            "dtype": dtype, "precision": precision, "attention": attention,
            "first loss": got[0], "mean of the last tenth": last_mean(got),
            f"largest difference to {device} in the first tenth": largest(got, expected, 0.1),
            "in all steps": largest(got, expected, 1.0),
            "of the means of the last tenth": abs(last_mean(got) / last_mean(expected) - 1),
        }  # fmt: skip


def last_mean(values: Sequence[float]) -> float:
    return statistics.fmean(values[-math.ceil(len(values) / 10) :])


def largest(got: Sequence[float], expected: Sequence[float], share: float) -> float:
    """The largest relative difference in the first `share` of the steps."""
    pairs = itertools.islice(zip(got, expected, strict=True), math.ceil(len(got) * share))
    return max(abs(a / b - 1) for a, b in pairs)


# --- A run that is stopped


def resume(small: bool, out: str) -> Iterator[dict]:
    """A run that SIGTERM stops and the same command resumes, beside one that nothing disturbs.

    This process starts no devices before the runs are over: it would hold their memory.
    """
    missing = [name for name in ("grain", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"mdt_jax.main needs packages that are missing: {', '.join(missing)}")
    steps, folder = 120, pathlib.Path(out)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier stage c
    flags = [
        f"--config={recipe('configs/digits.py', small)}", f"--config.train.steps={steps}",
        "--config.train.dtype=bfloat16", "--config.train.log_every=1",
        "--config.train.sample_every=0", "--config.train.checkpoint_every=20",
        "--config.sample.num_samples=0",
    ]  # fmt: skip
    undisturbed, stopped = (start_main(flags, folder / name) for name in ("whole", "stopped"))
    metrics = folder / "stopped" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 10:
        if stopped.poll() is not None:
            raise UserError(f"the run ended early: {stopped.communicate()[1].strip()[-300:]}")
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    said = finish(stopped).splitlines()[-1]
    finish(start_main(flags, folder / "stopped"))
    finish(undisturbed)
    (arrays, log), (wanted, wanted_log) = (
        soak.result(folder / name) for name in ("stopped", "whole")
    )
    differences = [
        np.abs(np.float64(a) - np.float64(b)).max(initial=0)
        for a, b in zip(arrays, wanted, strict=True)
    ]
    yield {
        "it printed": said, "arrays": len(arrays), "equal bits": not any(differences),
        "largest difference": float(max(differences)), "equal losses": log == wanted_log,
    }  # fmt: skip


def start_main(flags: Sequence[str], workdir: pathlib.Path) -> subprocess.Popen:
    """Start `mdt_jax.main`, which shares a GPU with another one."""
    flag = "--xla_gpu_deterministic_ops=true"  # without it a GPU adds in any order
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "mdt_jax.main", *flags, f"--workdir={workdir}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    """What a process printed to stderr. Raises UserError where it failed."""
    printed = process.communicate()[1]
    if process.returncode:
        raise UserError(f"exit code {process.returncode}: {printed.strip()[-300:]}")
    return printed
