"""Train: python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits

Any field of the config can be set by a flag: --config.optim.lr=1e-3. The same command again goes
on where the run stopped, to the same bits as if it had not stopped; SIGTERM and Ctrl-C save first.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mdt_jax import cli, costs, distributed, evaluation, inputs, parallel, weights
from mdt_jax import config as configs
from mdt_jax import workdir as folder
from mdt_jax.data import images as pictures
from mdt_jax.distributed import is_first, say
from mdt_jax.errors import UserError
from mdt_jax.models.mdt import MDT
from mdt_jax.options import SampleOptions, balanced_labels
from mdt_jax.sampling import generate
from mdt_jax.train.checkpoints import Checkpoints, steps_in
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.speed import Clock, Speed
from mdt_jax.train.state import abstract_state, init_state
from mdt_jax.train.step import compile_step
from mdt_jax.train.trackers import Profile, open_trackers
from mdt_jax.vae import decode


@dataclasses.dataclass(frozen=True)
class Shown:
    """How a run is shown besides metrics.jsonl: the flags of `main`."""

    tensorboard: bool = False
    wandb: str = ""
    profile_steps: str = ""


def train(config: ConfigDict, workdir: pathlib.Path, show: Shown | None = None) -> bool:
    """The whole of a run: start or go on, train, sample, report.

    Returns whether it came to its end; False where it was told to stop, and has saved.
    """
    show = show or Shown()
    stop = distributed.StopSignal()
    folder.agree_on_config(config)
    configs.validate(config, jax.device_count())
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    profile = Profile(show.profile_steps, workdir / "profile")
    data, held_out = inputs.open_data(config)
    vae = inputs.load_vae(config)
    if config.data.name == "latents":
        inputs.check_cache(data, config, vae)
    about_data = {
        "classes": data.classes if config.model.num_classes else [],
        "images_sha256": data.identity,
    }

    # The model and its state, as shapes: nothing is computed yet.
    model = MDT.from_config(config)
    optimizer = make_optimizer(config.optim)
    abstract = abstract_state(model, optimizer, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))

    # Start, from other weights if asked, or go on from the newest sound checkpoint.
    make_keys = jax.jit(lambda: jax.random.split(jax.random.key(config.train.seed)),
                        out_shardings=parallel.replicated(mesh))  # fmt: skip
    seed_key, init_key = make_keys()
    folder.agree_on_start(workdir, about_data)
    taken = take_weights(config, model, init_key) if not steps_in(workdir) else None
    folder.make(workdir)
    checkpoints = Checkpoints(workdir, config.train.keep)
    restored = checkpoints.restore(
        abstract, lambda meta: folder.check_same_run(meta, config, workdir, about_data)
    )
    if restored is None:
        folder.check_nothing_is_lost(workdir)
        start, seconds, compile_seconds = 0, 0.0, 0.0
    else:
        state, meta = restored
        start, seconds, compile_seconds = (
            meta[name] for name in ("step", "seconds", "compile_seconds")
        )
    done = start >= config.train.steps and folder.is_reported(workdir, config, start)
    if distributed.everyone(done):
        say(f"{workdir} is trained to step {start} and reported already")
        return True
    if restored is None:
        say(f"{workdir} holds no checkpoint: starting at step 0")
        lies = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(init_state, static_argnums=(0, 1), out_shardings=lies)(
            model, optimizer, init_key
        )
        if taken is not None:
            state = state.replace(**jax.tree.map(parallel.put, taken, {
                "params": lies.params, "ema": lies.ema
            }))  # fmt: skip
    else:
        say(f"going on from step {start} in {workdir}")
    shown = (show.tensorboard, show.wandb) if is_first() else (False, "")
    log = open_trackers(workdir, config.to_dict(), start, *shown)
    log += folder.begin(workdir, config, about_data["classes"], start)

    encoding = vae if config.data.name != "latents" else None
    batches = inputs.feed(config, data, mesh, encoding, start)

    # One step, compiled once, ahead of time.
    steps, options = config.train.steps, SampleOptions.from_config(config)
    if start < steps:
        clock = Clock(compile_seconds)
        train_step = compile_step(config, model, optimizer, abstract, mesh)
        compile_seconds = clock.seconds()
        distributed.everyone(True)  # wait for the slowest: sums on CPUs do not wait for long
        say(f"the step is compiled ({compile_seconds:.1f} s in all)")

    waiting = None  # the step whose metrics are still on the device
    skipping = False  # whether the last step logged was not finite
    clock = Clock(seconds)
    flops = costs.training_flops(config, model)
    peak = costs.peak_flops(jax.devices()[0].device_kind)
    speed = Speed(clock, start, config.data.batch_size, flops, peak)
    with (
        checkpoints,
        contextlib.ExitStack() as opened,
        contextlib.closing(profile),
        contextlib.closing(batches),
        tqdm(total=steps, initial=min(start, steps), desc="training", unit="step",
             mininterval=0.5 if sys.stderr.isatty() else 10, disable=not is_first()) as bar,
    ):  # fmt: skip
        for tracker in log:
            opened.enter_context(contextlib.closing(tracker))

        def finish_waiting():
            nonlocal waiting, skipping
            if waiting is None:
                return
            (step, metrics), waiting = waiting, None
            metrics = jax.device_get(metrics)
            if step % config.train.log_every == 0:
                logged = metrics | speed.since(step, steps) | {"compile_seconds": compile_seconds}
                for tracker in log:
                    tracker.write(step, logged)
            each = (clock.seconds() - seconds) / (step - start)
            bar.set_postfix_str(
                f"{config.data.batch_size / each:.0f} img/s, {1000 * each:.0f} ms a step, "
                f"loss {metrics['loss']:.3f}",
                refresh=False,
            )
            bar.update(step - bar.n)
            skipping = metrics["skipped_in_row"] > 0
            if metrics["skipped_in_row"] >= config.train.max_skipped:
                good = checkpoints.newest()
                raise UserError(
                    f"the loss or gradient was not finite {config.train.max_skipped} steps in a "
                    f"row, up to step {step}; "
                    + (f"the last good checkpoint is {good}: " if good else "no checkpoint yet: ")
                    + "lower optim.lr or set optim.clip_norm, then run again"
                    + ("" if good else " in another workdir")
                )

        def save():
            for tracker in log:
                tracker.flush()  # or a crash would lose what the checkpoint is beyond
            times = {"seconds": clock.seconds(), "compile_seconds": compile_seconds}
            checkpoints.save(state, {"config": config.to_dict(), **about_data, **times})

        def draw_grid(step):
            every, path = config.train.sample_every, workdir / "samples" / f"{step:07d}.png"
            if every and step and step % every == 0 and distributed.everyone(not path.exists()):
                with clock.paused():
                    save_sample_grid(path, model, state.ema, vae, config, options)
                for tracker in log:
                    tracker.image(step, path)

        # Save → next batch → step → log the step before: the host never waits on the device.
        for step in range(start, steps):
            stopping, due = stop.asked(step), step % config.train.checkpoint_every == 0
            if stopping or (due and step > start):
                finish_waiting()
                # The parameters may be what breaks the steps: keep the checkpoints from before.
                if stopping or not skipping:
                    save()
            if stopping:
                checkpoints.close()
                say(f"stopped at step {step}, saved; the same command goes on")
                return False
            draw_grid(step)
            profile.before(step + 1, state)
            with clock.waiting():
                batch = next(batches)
            state, metrics = train_step(state, batch, seed_key)
            finish_waiting()
            waiting = (step + 1, metrics)
        finish_waiting()
        save()
        seconds = clock.seconds()
        draw_grid(max(start, steps))
        skipped = int(state.skipped)

    stop.exit_at_once(max(start, steps))  # the state is saved: nothing below needs finishing
    report = {
        "steps": max(start, steps),
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "compile_seconds": round(compile_seconds, 1),
        "images_per_second": round(max(start, steps) * config.data.batch_size / seconds, 1),
        "skipped": skipped,
    }
    if config.sample.num_samples:
        report |= sample_and_measure(
            workdir, model, state.ema, vae, config, options, data, held_out
        )
    if is_first():
        folder.write_json(workdir / "report.json", report)
        print(json.dumps(report, indent=1))
    return True


def take_weights(config: ConfigDict, model: MDT, key: jax.Array) -> dict | None:
    """{"params", "ema"} of init.checkpoint, if there is one, each with memory of its own."""
    if not config.init.checkpoint:
        return None
    params, ema, said = weights.start_from(config, model, key)
    for line in [f"parameters and EMA are those of {config.init.checkpoint}", *said]:
        say(f"init.checkpoint: {line}")
    return {"params": params, "ema": jax.tree.map(np.array, ema)}


def pixels(samples, vae: inputs.Vae | None, config: ConfigDict):
    """What a model draws as uint8 images, decoded if it draws latents."""
    if vae is not None:
        samples = decode(vae.network, vae.params, samples, scale=config.vae.scale)
    return pictures.to_uint8(samples)


def save_sample_grid(path, model, params, vae, config: ConfigDict, options: SampleOptions) -> None:
    """A PNG of one batch of EMA samples, the same noise each time."""
    size = config.sample.batch_size
    labels = balanced_labels(size, model.num_classes)
    samples = generate(
        model, params, labels, seed=config.train.seed, batch_size=size, options=options
    )
    images = pixels(samples, vae, config)
    if is_first():
        path.parent.mkdir(exist_ok=True)
        pictures.save_grid(str(path), images)


def sample_and_measure(workdir, model, params, vae, config, options, data, held_out) -> dict:
    """Write samples.npz and samples.png; returns how good they are, where there is a way to tell.

    That is for packaged sets, whose images are all at hand and partly held out.
    """
    labels = balanced_labels(config.sample.num_samples, model.num_classes)
    started = time.perf_counter()
    samples = generate(
        model,
        params,
        labels,
        seed=config.train.seed,
        batch_size=config.sample.batch_size,
        progress=True,
        options=options,
    )
    images = pixels(samples, vae, config)
    seconds = time.perf_counter() - started
    if not is_first():
        return {}
    pictures.save_npz(str(workdir / "samples.npz"), images, labels)
    pictures.save_grid(str(workdir / "samples.png"), images[:100])
    measured = {"num_samples": len(images)}
    if held_out is not None:
        measured = evaluation.evaluate_samples(
            images, labels if model.num_classes else None, data, held_out
        )
    return measured | {"sample_seconds": round(seconds, 1)}


def main(argv: list[str]) -> None:
    """Parse the flags and train."""
    usage = (
        "usage: python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits "
        "[--distributed=auto|off|HOST:PORT --num_processes=N --process_id=I] [--start_timeout=300] "
        "[--patience=60] [--tensorboard] [--wandb=PROJECT] [--profile_steps=10:13] "
        "[--config.field=value …]\nFields and defaults: mdt_jax/config.py"
    )
    optional = {
        **cli.PROCESSES,
        "tensorboard": (False, "write event files to the workdir"),
        "wandb": ("", "the project of Weights & Biases to log to"),
        "profile_steps": ("", "first and last step of a trace: 10:13"),
    }
    config, flags = cli.parse_config(
        argv, usage, optional, workdir="where checkpoints and results go"
    )
    distributed.start(*(flags[name].value for name in cli.PROCESSES))
    show = Shown(flags.tensorboard, flags.wandb, flags.profile_steps)
    train(config, pathlib.Path(flags.workdir), show)


if __name__ == "__main__":
    cli.run(main)
