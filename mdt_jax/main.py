"""Train: python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits

Any field of the config can be set by a flag: --config.optim.lr=1e-3. The same command again goes
on where the run stopped, to the same bits as if it had not stopped; SIGTERM and Ctrl-C save first.
"""

import contextlib
import json
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mdt_jax import cli, evaluation, inputs, parallel, weights
from mdt_jax import config as configs
from mdt_jax.data import images as pictures
from mdt_jax.errors import UserError
from mdt_jax.files import whole
from mdt_jax.models.mdt import MDT
from mdt_jax.sampling import SampleOptions, balanced_labels, generate
from mdt_jax.train.checkpoints import Checkpoints, has_steps
from mdt_jax.train.metrics import MetricsLog, read_steps
from mdt_jax.train.optimizers import make_optimizer
from mdt_jax.train.state import abstract_state, init_state
from mdt_jax.train.step import compile_step
from mdt_jax.vae import decode


def train(config: ConfigDict, workdir: pathlib.Path, stop: "StopSignal") -> None:
    """The whole of a run: start or go on, train, sample, report."""
    mesh = parallel.data_mesh()
    configs.validate(config, mesh.size)
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
    whole = parallel.replicated(mesh)
    abstract = abstract_state(model, optimizer, whole)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))

    # Start, from other weights if asked, or go on from the newest sound checkpoint.
    seed_key, init_key = jax.device_put(
        tuple(jax.random.split(jax.random.key(config.train.seed))), whole
    )
    taken = take_weights(config, model, init_key) if not has_steps(workdir) else None
    make_workdir(workdir)
    checkpoints = Checkpoints(workdir, config.train.keep)
    restored = checkpoints.restore(
        abstract, lambda meta: check_same_run(meta, config, workdir, about_data)
    )
    if restored is None:
        check_nothing_is_lost(workdir)
        print(f"{workdir} holds no checkpoint: starting at step 0", file=sys.stderr)
        new_state = jax.jit(init_state, static_argnums=(0, 1), out_shardings=whole)
        state, start = new_state(model, optimizer, init_key), 0
        if taken is not None:
            state = state.replace(**jax.device_put(taken, whole))
        seconds = compile_seconds = 0.0
    else:
        state, meta = restored
        start, seconds, compile_seconds = (
            meta[name] for name in ("step", "seconds", "compile_seconds")
        )
        print(f"going on from step {start} in {workdir}", file=sys.stderr)
    if start >= config.train.steps and is_reported(workdir, config, start):
        print(f"{workdir} is trained to step {start} and reported already", file=sys.stderr)
        return
    (workdir / "report.json").unlink(missing_ok=True)
    write_json(workdir / "config.json", config.to_dict())
    if classes := about_data["classes"]:
        write_json(workdir / "classes.json", classes)
        print(f"classes: {inputs.describe_classes(classes)}", file=sys.stderr)
    log = MetricsLog(workdir / "metrics.jsonl", start)

    encoding = vae if config.data.name != "latents" else None
    batches = inputs.feed(config, data, mesh, encoding, start)

    # One step, compiled once, ahead of time.
    steps, options = config.train.steps, SampleOptions.from_config(config)
    if start < steps:
        clock = time.perf_counter()
        train_step = compile_step(config, model, optimizer, abstract, mesh)
        compile_seconds += time.perf_counter() - clock

    waiting = None  # the step whose metrics are still on the device
    skipping = False  # whether the last step logged was not finite
    with (
        checkpoints,
        log,
        contextlib.closing(batches),
        tqdm(total=steps, initial=min(start, steps), desc="training", unit="step",
             mininterval=0.5 if sys.stderr.isatty() else 10) as bar,
    ):  # fmt: skip
        clock = time.perf_counter()

        def finish_waiting():
            nonlocal waiting, skipping
            if waiting is None:
                return
            (step, metrics), waiting = waiting, None
            metrics = jax.device_get(metrics)
            if step % config.train.log_every == 0:
                log.write(step, metrics | {"seconds": round(spent(), 3)})
            each = (spent() - seconds) / (step - start)
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

        def spent():
            return seconds + time.perf_counter() - clock

        def save():
            times = {"seconds": spent(), "compile_seconds": compile_seconds}
            checkpoints.save(state, {"config": config.to_dict(), **about_data, **times})

        def draw_grid(step):
            nonlocal clock
            every, path = config.train.sample_every, workdir / "samples" / f"{step:07d}.png"
            if every and step and step % every == 0 and not path.exists():
                paused = time.perf_counter()
                save_sample_grid(path, model, state.ema, vae, config, options)
                clock += time.perf_counter() - paused

        # Save → next batch → step → log the step before: the host never waits on the device.
        for step in range(start, steps):
            due = step % config.train.checkpoint_every == 0 and step > start
            if stop.asked or due:
                finish_waiting()
                # The parameters may be what breaks the steps: keep the checkpoints from before.
                if stop.asked or not skipping:
                    save()
            if stop.asked:
                checkpoints.close()
                print(f"stopped at step {step}, saved; the same command goes on", file=sys.stderr)
                return
            draw_grid(step)
            state, metrics = train_step(state, next(batches), seed_key)
            finish_waiting()
            waiting = (step + 1, metrics)
        finish_waiting()
        save()
        seconds = spent()
        draw_grid(max(start, steps))
        skipped = int(state.skipped)

    stop.exit_at_once()  # the state is saved: nothing below needs finishing
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
    write_json(workdir / "report.json", report)
    print(json.dumps(report, indent=1))


def take_weights(config: ConfigDict, model: MDT, key: jax.Array) -> dict | None:
    """{"params", "ema"} of init.checkpoint, if there is one, each with memory of its own."""
    if not config.init.checkpoint:
        return None
    params, ema, said = weights.start_from(config, model, key)
    for line in [f"parameters and EMA are those of {config.init.checkpoint}", *said]:
        print(f"init.checkpoint: {line}", file=sys.stderr)
    return {"params": params, "ema": jax.tree.map(np.array, ema)}


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a wish that the training loop looks at between steps."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_):
        self.asked = True

    def exit_at_once(self) -> None:
        """From here on (and if it was asked meanwhile) leave with exit code 0."""
        if self.asked:
            sys.exit(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))


def check_same_run(meta: dict, config: ConfigDict, workdir: pathlib.Path, about_data: dict) -> None:
    """Raise UserError where a checkpoint is of another model; print what else has changed."""
    was, now = meta.get("classes", about_data["classes"]), about_data["classes"]
    if was != now:
        raise UserError(
            f"{workdir} was trained with the classes {inputs.describe_classes(was)}; "
            f"the data now has {inputs.describe_classes(now)}"
        )
    if meta.get("images_sha256", about_data["images_sha256"]) != about_data["images_sha256"]:
        print("going on with another list of images than before", file=sys.stderr)
    old, new = configs.complete(meta["config"]).to_dict(), config.to_dict()
    changed = []
    for group, fields in new.items():
        for name, value in fields.items():
            before = old.get(group, {}).get(name)
            if before != value:
                changed.append((f"{group}.{name}", before, value))
    shape = (
        "model.", "data.image_size", "data.channels", "vae.", "diffusion.steps", "optim.name"
    )  # fmt: skip
    other = [f"{name} is {was}, not {now}" for name, was, now in changed if name.startswith(shape)]
    if other:
        raise UserError(
            f"{workdir} holds a checkpoint of another model or optimiser ({'; '.join(other)}); "
            "choose another workdir or the same config"
        )
    for name, was, now in changed:
        print(f"going on with {name} changed from {was} to {now}", file=sys.stderr)


def check_nothing_is_lost(workdir: pathlib.Path) -> None:
    """Raise UserError where a run got past its first checkpoints but none is there any more."""
    steps = [step for step, _ in read_steps(workdir / "metrics.jsonl")]
    if not steps:
        return
    # The second save waits for the first, so after that a checkpoint must have been finished.
    try:
        config = json.loads((workdir / "config.json").read_text())
        every = config["train"]["checkpoint_every"]
    except (OSError, ValueError, KeyError):
        every = 1
    if (workdir / "report.json").exists() or steps[-1] > 2 * every:
        raise UserError(
            f"{workdir} holds the metrics of {steps[-1]} steps but no checkpoint; put its "
            "checkpoints back, or train anew in another workdir"
        )
    print(f"{workdir} was stopped after {steps[-1]} steps, before a checkpoint", file=sys.stderr)


def is_reported(workdir: pathlib.Path, config: ConfigDict, step: int) -> bool:
    """Whether report.json is of this config at this step."""
    try:
        report = json.loads((workdir / "report.json").read_text())
        return (
            report["steps"] == step
            and json.loads((workdir / "config.json").read_text()) == config.to_dict()
        )
    except (OSError, ValueError, KeyError):
        return False


def make_workdir(workdir: pathlib.Path) -> None:
    """Raise UserError where nothing can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written to: {error.strerror}") from None


def write_json(path: pathlib.Path, content: object) -> None:
    """Whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def pixels(samples, vae: inputs.Vae | None, config: ConfigDict):
    """What a model draws as uint8 images, decoded if it draws latents."""
    if vae is not None:
        samples = decode(vae.network, vae.params, samples, scale=config.vae.scale)
    return pictures.to_uint8(samples)


def save_sample_grid(path, model, params, vae, config: ConfigDict, options: SampleOptions) -> None:
    """A PNG of one batch of EMA samples, the same noise each time."""
    path.parent.mkdir(exist_ok=True)
    size = config.sample.batch_size
    labels = balanced_labels(size, model.num_classes)
    samples = generate(
        model, params, labels, seed=config.train.seed, batch_size=size, options=options
    )
    pictures.save_grid(str(path), pixels(samples, vae, config))


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
        "[--config.field=value …]\nFields and defaults: mdt_jax/config.py"
    )
    config, flags = cli.parse_config(argv, usage, workdir="where checkpoints and results go")
    train(config, pathlib.Path(flags.workdir), StopSignal())


if __name__ == "__main__":
    cli.run(main)
