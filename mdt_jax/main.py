"""Train: python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits

Any field of the config can be set by a flag: --config.optim.lr=1e-3. The same command again goes
on where the run stopped, to the same bits as if it had not stopped (on a GPU, as far as is known,
with XLA_FLAGS=--xla_gpu_deterministic_ops=true); SIGTERM and Ctrl-C save first.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Collection

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import cli
from mdt_jax import config as configs
from mdt_jax.data.latents import Latents
from mdt_jax.evaluation.measuring import BEST
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts, interrupts, keys, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.hosts import is_first, log0
from mdt_jax.runtime.progress import print_result, progress_bar
from mdt_jax.sampling import pipeline
from mdt_jax.train import costs, inputs
from mdt_jax.train import workdir as folder
from mdt_jax.train.checkpoints import Checkpoints
from mdt_jax.train.metrics import Means
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.samples import (
    RunSampler,
    describe,
    going_on_without,
    identities,
    open_evaluator,
    sample_and_measure,
    save_sample_grid,
)
from mdt_jax.train.speed import Clock, Speed
from mdt_jax.train.state import abstract_state, init_state
from mdt_jax.train.step import compile_step
from mdt_jax.train.stopping import Stopped, StopSignal
from mdt_jax.train.trackers import Lines, Profile, open_trackers
from mdt_jax.weights import networks
from mdt_jax.weights.orbax_folders import check_path, steps_in

# Of a process that was told to stop while it waited for data, whose readers may wait for ever.
READERS_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Monitoring:
    """How a run is shown besides metrics.jsonl: the flags of `main`."""

    tensorboard: bool = False
    wandb: str = ""
    profile_steps: str = ""


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    show: Monitoring | None = None,
    said: Collection[str] = (),
    stop: StopSignal | None = None,
) -> bool:
    """The whole of a run: start or go on, train, sample, report.

    said: fields that a person has set, as of `inputs.settle`, which changes the config. stop: what
    answers signals since the process began; None: from now on. Returns whether it came to its end;
    False where it was told to stop, and has saved. Raises UserError for a user's mistake, and where
    another run is at work in the workdir.
    """
    with contextlib.ExitStack() as held:
        return _train(config, workdir, show or Monitoring(), said, stop or StopSignal(), held)


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    show: Monitoring,
    said: Collection[str],
    stop: StopSignal,
    held: contextlib.ExitStack,
) -> bool:
    """held: where the workdir's lock goes, which is let go last."""
    check_path(workdir)
    folder.check_free(workdir)
    folder.check_writable(workdir)
    folder.agree_on_config(config)
    configs.validate(config, jax.device_count())
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    profile = Profile(show.profile_steps, workdir / "profile")
    data, held_out = inputs.open_data(config)
    inputs.settle(config, len(data.classes), said)
    vae = inputs.load_vae(config)
    inputs.check_scale(config)
    if isinstance(data, Latents) and vae is not None:  # a config of latents has a VAE
        inputs.check_cache(data, config, vae)
        if doubt := inputs.doubt_scale(data.manifest["latent_std"], config.vae.scale):
            log0(f"warning: {data.folder}: {doubt}")
    evaluator = open_evaluator(config, data, held_out)
    about_data = {
        "classes": data.classes if config.model.num_classes else [],
        "images_sha256": data.identity,
        "files_sha256": identities(vae, evaluator),
    }

    # The model and its state, as shapes: nothing is computed yet.
    model = MDT.from_config(config)
    optimizer = make_optimizer(config.optim)
    abstract = abstract_state(model, optimizer, mesh)
    costs.check_memory(config, model, abstract)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))

    # Start, from other weights if asked, or go on from the newest sound checkpoint.
    purposes, whole = (keys.Purpose.TRAINING, keys.Purpose.INIT), parallel.replicated(mesh)
    make_keys = jax.jit(lambda: [keys.of(config.train.seed, purpose) for purpose in purposes],
                        out_shardings=whole)  # fmt: skip
    seed_key, init_key = make_keys()
    folder.agree_on_start(workdir, about_data)
    taken = take_weights(config, model, init_key) if not steps_in(workdir) else None
    folder.make(workdir)
    held.enter_context(folder.alone(workdir))
    checkpoints = Checkpoints(workdir, config.train.keep)
    restored = checkpoints.restore(
        abstract, lambda meta: folder.check_same_run(meta, config, workdir, about_data)
    )
    if restored is None:
        folder.check_nothing_is_lost(workdir)
        start, seconds, compile_seconds, means = 0, 0.0, 0.0, Means()
    else:
        state, meta = restored
        means = Means(meta.get("since_line"))  # older ones have none
        start, seconds, compile_seconds = (
            meta[name] for name in ("step", "seconds", "compile_seconds")
        )
    done = start >= config.train.steps and folder.is_reported(workdir, config, start)
    if hosts.all_hosts(done):
        log0(f"{workdir} is trained to step {start} and reported already")
        return True
    if restored is None:
        log0(f"{workdir} holds no checkpoint: starting at step 0")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(init_state, static_argnums=(0, 1), out_shardings=shardings)(
            model, optimizer, init_key
        )
        if taken is not None:
            state = state.replace(**jax.tree.map(parallel.put, taken, {
                "params": shardings.params, "ema": shardings.ema
            }))  # fmt: skip
    else:
        log0(f"going on from step {start} in {workdir}")
    inputs.say_found(config.data, data)
    shown = (show.tensorboard, show.wandb) if is_first() else (False, "")
    best = Checkpoints(workdir / "best", keep=None)
    measured = folder.measured_steps(workdir, BEST, start)
    log = open_trackers(workdir, config.to_dict(), start, *shown)
    log += folder.begin(workdir, config, about_data["classes"], start)
    terminal = is_first() and sys.stderr is not None and sys.stderr.isatty()
    if is_first() and not terminal:
        log.append(Lines(config.train.steps))

    if start < config.train.steps:
        describe(config, len(data), parameters, mesh)
    encoding = vae if config.data.name != "latents" else None
    batches = inputs.feed(config, data, mesh, encoding, start)

    # One step, compiled once, ahead of time.
    draws = vae and pipeline.Vae(vae.path, config.vae.scale, vae.network, vae.params)
    steps, drawer = config.train.steps, RunSampler(config, model, draws)
    if start < steps:
        log0("compiling the training step …")
        clock = Clock()
        train_step = compile_step(config, model, optimizer, abstract, mesh)
        compiling = clock.seconds()
        compile_seconds += compiling
        hosts.all_hosts(True)  # wait for the slowest: sums on CPUs do not wait for long
        log0(f"the step is compiled ({compiling:.1f} s)")

    rate = parallel.put(np.float32(config.optim.lr), parallel.replicated(mesh))
    waiting = None  # the step whose metrics are still on the device
    skipping = False  # whether the last step logged was not finite
    clock = Clock(seconds)
    flops = costs.training_flops(config, model)
    peak = costs.peak_flops(jax.devices()[0].device_kind)
    speed = Speed(clock, start, config.data.batch_size, flops, peak)
    with (
        checkpoints,
        best,
        contextlib.ExitStack() as opened,
        contextlib.closing(profile),
        contextlib.closing(batches),
        progress_bar(steps, terminal, "training", "step", start) as bar,
    ):  # fmt: skip
        for tracker in log:
            opened.enter_context(contextlib.closing(tracker))

        def finish_waiting():
            nonlocal waiting, skipping
            if waiting is None:
                return
            (step, metrics), waiting = waiting, None
            metrics = jax.device_get(metrics)
            means.add(metrics)
            if step % config.train.log_every == 0:
                logged = means.take() | {
                    "epoch": round(step * config.data.batch_size / len(data), 6),
                    "learning_rate": config.optim.lr,
                    **speed.since(step, steps),
                    "compile_seconds": compile_seconds,
                }
                for tracker in log:
                    tracker.write(step, logged)
            each = (clock.seconds() - seconds) / (step - start)
            bar.set_postfix_str(
                f"{config.data.batch_size / each:.0f} img/s, {1000 * each:.0f} ms a step, "
                f"loss {metrics['loss']:.3f}",
                refresh=False,
            )
            bar.update(1)
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

        def save(by=checkpoints.save, **more):
            for tracker in log:
                tracker.flush()  # or a crash would lose what the checkpoint is beyond
            times = {"seconds": clock.seconds(), "compile_seconds": compile_seconds}
            kept = {"config": config.to_dict(), "since_line": means.sums}
            by(state, {**kept, **about_data, **times, **more})

        def draw_grid(step):
            every, path = config.train.sample_every, workdir / "samples" / f"{step:07d}.png"
            if every and step and step % every == 0 and hosts.all_hosts(not path.exists()):
                with clock.paused(), going_on_without(f"no samples are drawn at step {step}"):
                    save_sample_grid(path, drawer, state, about_data["classes"])
                    for tracker in log:
                        tracker.image(step, path)

        def evaluate(step):
            """Measure samples, and keep the state if none was better; it is saved already."""
            if evaluator is None:
                return
            asked = config.evaluation.num_samples
            with clock.paused(), going_on_without(f"step {step} is not measured"):
                found = evaluator.measure(drawer.samples(state.ema, asked), progress=True)
                name = next(name for name in BEST if name in found)
                better = found[name] < folder.best_so_far(best, config, name)
                if better:
                    save(best.replace, measured=found)
                for tracker in log:
                    tracker.write(step, found)
                said = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                log0(f"step {step}: {said}{'; the best so far' if better else ''}")

        def leave(step):
            finish_waiting()
            save()
            checkpoints.close()
            log0(f"stopped at step {step}, saved; the same command goes on")

        def evaluation_due(step):
            every = config.evaluation.every
            return every and step and step % every == 0 and step not in measured

        stop.wait_for_steps()
        # Save → next batch → step → log the step before: the host never waits on the device.
        for step in range(start, steps):
            stopping, measuring = stop.asked(step), evaluation_due(step)
            due = measuring or step % config.train.checkpoint_every == 0
            if stopping:
                leave(step)
                return False
            if due and step > start:
                finish_waiting()
                # The parameters may be what breaks the steps: keep the checkpoints from before.
                if not skipping:
                    save()
            try:
                with stop.raising():
                    draw_grid(step)
                    if measuring:
                        evaluate(step)
                    profile.before(step + 1, state)
                    with clock.waiting():
                        batch = next(batches)
            except Stopped:
                leave(step)
                interrupts.end_in(READERS_SECONDS)
                return False
            state, metrics = train_step(state, batch, seed_key, rate)
            finish_waiting()
            waiting = (step + 1, metrics)
        finish_waiting()
        save()
        seconds = clock.seconds()
        try:
            with stop.raising():
                draw_grid(steps)
                if evaluation_due(steps):
                    evaluate(steps)
        except Stopped:
            leave(steps)
            return False
        skipped = int(state.skipped)

    stop.exit_at_once(steps)  # the state is saved: nothing below needs finishing
    report = {
        "steps": steps,
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "compile_seconds": round(compile_seconds, 1),
        "images_per_second": round(steps * config.data.batch_size / seconds, 1),
        "skipped": skipped,
    }
    if config.sample.num_samples:
        report |= sample_and_measure(workdir, drawer, state, about_data["classes"], evaluator)
    if is_first():
        folder.write_json(workdir / "report.json", report)
        print_result(json.dumps(report, indent=1))
        samples = ", samples.npz, samples.png" if config.sample.num_samples else ""
        log0(f"{workdir} has report.json, metrics.jsonl, checkpoints/{steps}{samples}")
    return True


def take_weights(config: ConfigDict, model: MDT, key: jax.Array) -> dict | None:
    """{"params", "ema"} of init.checkpoint, if there is one, each with memory of its own."""
    if not config.init.checkpoint:
        return None
    params, ema, said = networks.start_from(config, model, key)
    for line in [f"parameters and EMA are those of {config.init.checkpoint}", *said]:
        log0(f"init.checkpoint: {line}")
    return {"params": params, "ema": jax.tree.map(np.array, ema)}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m mdt_jax.main",
        usage="python -m mdt_jax.main --config=FILE --workdir=FOLDER [--flag=value …]",
        description="Train a model, or resume its run. --config.GROUP.FIELD=VALUE sets a field.",
    )
    add = parser.add_argument
    add("--workdir", default="", type=cli.local, help="folder of the run's checkpoints and results")
    add("--tensorboard", **cli.SWITCH, help="write event files to the workdir")
    add("--wandb", default="", metavar="PROJECT", help="log to a project of Weights & Biases")
    add("--profile_steps", default="", metavar="FIRST:LAST", help="steps to profile, as 10:13")
    parser.add_processes()
    parser.add_config()
    args = parser.parse_args(argv[1:])
    if not args.workdir:
        raise UserError("--workdir is missing: the folder of the run's checkpoints and results")
    return args


def main(argv: list[str]) -> None:
    """Parse the flags and train."""
    stop = StopSignal()
    args = parse(argv)
    config, given = cli.read_config(args)
    cli.start(args, keep_memory=True)
    show = Monitoring(args.tensorboard, args.wandb, args.profile_steps)
    train(config, pathlib.Path(args.workdir), show, given, stop)


if __name__ == "__main__":
    cli.run(main)
