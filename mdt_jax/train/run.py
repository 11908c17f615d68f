"""A run in its workdir: it resumes, saves, samples, measures and reports."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax.evaluation.evaluator import BEST, Evaluator
from mdt_jax.runtime import hosts
from mdt_jax.runtime.errors import NotFiniteError
from mdt_jax.runtime.files import Path, exists, in_bucket
from mdt_jax.runtime.hosts import log0
from mdt_jax.runtime.progress import print_result
from mdt_jax.train import inputs, page, record, workdir
from mdt_jax.train.checkpoints import BestCheckpoint, Checkpoints
from mdt_jax.train.inputs import Inputs
from mdt_jax.train.log import Log, Means, MetricsLog
from mdt_jax.train.mirror import LOG, Mirror
from mdt_jax.train.samples import RunSampler, sample_and_measure, save_sample_grid
from mdt_jax.train.speed import Clock
from mdt_jax.train.state import TrainState
from mdt_jax.train.stopping import StopSignal
from mdt_jax.train.trackers import Lines, Monitoring, Tracker, on_terminal, open_trackers


class Run:
    """A run in its workdir, which is locked inside `with`.

    identity: classes and hashes of the data and files that the run depends on; every checkpoint
    keeps them, and a run that resumes must have the same. evaluator: measures samples, if any.
    mirror: of the workdir, for the log and the trackers.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        identity: dict,
        evaluator: Evaluator | None,
        stop: StopSignal,
        mirror: Mirror,
    ):
        self.config, self.folder, self.identity, self.mirror = config, folder, identity, mirror
        self.evaluator, self.stop = evaluator, stop
        self.checkpoints = Checkpoints(folder, config.train.keep)
        self.best = BestCheckpoint(folder / "best", config)
        self.start, self.resumed = 0, False  # the step that the run starts or resumes from
        self.means = Means()  # of the metrics since the last line of the log
        self.clock = Clock()
        self.compile_seconds = 0.0
        self._seconds_before = 0.0  # trained before this process started
        self._measured: set[int] = set()
        self._unpublished: str | None = None  # the log of a checkpoint that may not be whole yet
        self._overdue = False  # a state that was due is not saved yet
        self._check_lock: Callable[[], None] = lambda: None
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        workdir.make(self.folder)
        with contextlib.ExitStack() as opened:
            self._check_lock = opened.enter_context(workdir.alone(self.folder))
            opened.enter_context(self.checkpoints)
            opened.enter_context(self.best)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._opened.__exit__(*error)

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The state of the newest sound checkpoint; None where the run starts.

        abstract: shapes and shardings of the state. Raises UserError where the checkpoint is of
        another run, or where checkpoints are missing.
        """
        restored = self.checkpoints.restore(
            abstract,
            lambda meta: workdir.check_same_run(meta, self.config, self.folder, self.identity),
        )
        if hosts.is_first():
            self.mirror.fetch(LOG, "wandb/run-id")
        if restored is None:
            workdir.check_nothing_is_lost(self.folder)
            return None
        state, meta = restored
        if hosts.is_first() and "log" in meta and in_bucket(self.folder):
            (self.mirror.folder / LOG).write_text(meta["log"])
        self.resumed = True
        self.start, self.compile_seconds = meta["step"], meta["compile_seconds"]
        self.means = Means(meta.get("since_line"))  # older checkpoints have none
        self._seconds_before = meta["seconds"]
        self._measured = workdir.measured_steps(self.mirror.folder, BEST, self.start)
        return state

    def is_finished(self) -> bool:
        """Whether the last step was reached and its report is written."""
        finished = self.start >= self.config.train.steps
        finished = finished and workdir.is_reported(self.folder, self.config, self.start)
        if hosts.all_hosts(finished):
            log0(f"{self.folder} is trained to step {self.start} and reported already")
            return True
        return False

    def begin(
        self, data: Inputs, abstract: TrainState, mesh: Mesh, show: Monitoring
    ) -> list[Tracker]:
        """Print what is trained on what, write config.json and classes.json, open the trackers.

        Only process 0 has trackers. Raises UserError where one cannot be opened.
        """
        if self.resumed:
            log0(f"resuming from step {self.start} in {self.folder}")
        else:
            log0(f"{self.folder} holds no checkpoint: starting at step 0")
        inputs.log_contents(self.config.data, data.source)
        trackers = []
        if hosts.is_first():
            config = self.config.to_dict()
            trackers = open_trackers(
                self.mirror.folder, config, self.start, show.tensorboard, show.wandb,
                self.folder.name,
            )  # fmt: skip
            workdir.begin(self.folder, self.config, self.identity["classes"], self.start)
            trackers.append(MetricsLog(self.mirror.folder / LOG, self.start))
            self.mirror.put_log(self.mirror.log())
            if not on_terminal():
                trackers.append(Lines(self.config.train.steps))
        if self.start < self.config.train.steps:
            _log_setup(self.config, len(data.source), parameter_count(abstract), mesh)
        return trackers

    def compile(self, compile_step: Callable[[], jax.stages.Compiled]) -> Any:
        """The training step, compiled ahead of time, or None where no step is left.

        The clock of the run starts when it returns.
        """
        compiled = None
        if self.start < self.config.train.steps:
            log0("compiling the training step …")
            clock = Clock()
            compiled = compile_step()
            seconds = clock.seconds()
            self.compile_seconds += seconds
            hosts.all_hosts(True)  # otherwise the first sum times out while others compile
            log0(f"the step is compiled ({seconds:.1f} s)")
        self.clock = Clock(self._seconds_before)
        return compiled

    def must_save(self, step: int, measure: bool) -> bool:
        """Whether the state of a step is due; `measure`: whether its samples are measured."""
        due = measure or self._overdue or step % self.config.train.checkpoint_every == 0
        return step == self.config.train.steps or (due and step > self.start)

    def must_sample(self, step: int) -> bool:
        """Whether a sample grid of a step is due and missing; every process must call this."""
        every = self.config.train.sample_every
        if not (every and step and step % every == 0):
            return False
        return hosts.all_hosts(not exists(self._grid(step)))

    def must_measure(self, step: int) -> bool:
        """Whether a measurement of samples is due and not in the log."""
        every = self.config.evaluation.every
        if self.evaluator is None or not (every and step and step % every == 0):
            return False
        return step not in self._measured

    def save(self, step: int, state: TrainState, log: Log, only: bool = False) -> None:
        """Start to save a state, unless its last step was not finite.

        Its parameters may be the reason, so older checkpoints are kept instead, and the next finite
        state is saved. The last state of the run is saved in any case, and so is one that would be
        its `only` checkpoint. The log is flushed first: no checkpoint is ahead of it. In a bucket
        the checkpoint contains the log, of which `publish_log` writes a copy.
        """
        log.catch_up()
        self._overdue = log.skipping and step < self.config.train.steps and not only
        if self._overdue:
            return
        self._check_lock()
        log.flush()
        text = self.mirror.log()
        with jax.transfer_guard("allow"):
            contents = self._meta() if text is None else self._meta() | {"log": text}
            self.checkpoints.save(state, contents)  # waits until the one before is whole
        self.mirror.put_log(self._unpublished)
        self._unpublished = text

    def publish_log(self) -> None:
        """Write the log of the last checkpoint to the bucket, once that checkpoint is whole."""
        if self._unpublished is not None and self.checkpoints.are_whole():
            self.mirror.put_log(self._unpublished)
            self._unpublished = None

    def save_stopped(self, step: int, state: TrainState, log: Log) -> None:
        """Save a state at which the run stops, wait until it is on disk, and print that."""
        newest = self.checkpoints.newest()
        self.save(step, state, log, only=newest is None)
        self.checkpoints.close()
        self.publish_log()
        if self._overdue:
            log0(
                f"stopped at step {step}, which is not saved since the last step was not finite; "
                f"the same command resumes from {newest}"
            )
        else:
            log0(f"stopped at step {step}, saved; the same command resumes")

    def save_grid(self, step: int, sampler: RunSampler, state: TrainState, log: Log) -> None:
        """Write samples/STEP.png; samples that are not finite are a warning."""
        with self._outside_training(f"no samples are drawn at step {step}"):
            save_sample_grid(self._grid(step), sampler, state, self.identity["classes"])
            log.image(step, self._grid(step))

    def measure(self, step: int, sampler: RunSampler, state: TrainState, log: Log) -> None:
        """Measure samples of the EMA, and keep the state in best/ if none was better."""
        assert self.evaluator is not None  # as `must_measure` says
        with self._outside_training(f"step {step} is not measured"):
            samples = sampler.samples(state.ema, self.config.evaluation.num_samples)
            measured = self.evaluator.measure(samples, progress=True)
            log.flush()
            ranked = next(measured[name] for name in BEST if name in measured)
            better = self.best.offer(state, self._meta() | {"measured": measured}, ranked)
            log.write_now(step, measured)
            text = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            log0(f"step {step}: {text}{'; the best so far' if better else ''}")

    def report(self, state: TrainState, sampler: RunSampler) -> bool:
        """Draw and measure the final samples, write report.json and its page. Returns True."""
        config, seconds = self.config, self.clock.seconds()
        self.checkpoints.close()
        self.best.close()
        self.stop.exit_at_once(config.train.steps)  # all is saved
        report = {
            "steps": config.train.steps,
            "parameters": parameter_count(state),
            "seconds": round(seconds, 1),
            "compile_seconds": round(self.compile_seconds, 1),
            "images_per_second": round(config.train.steps * config.data.batch_size / seconds, 1),
            "skipped": int(state.skipped),
        }
        files = f"report.html, report.json, metrics.jsonl, checkpoints/{config.train.steps}"
        if config.sample.num_samples:
            classes = self.identity["classes"]
            report |= sample_and_measure(self.folder, sampler, state, classes, self.evaluator)
            files += ", samples.npz, samples.png"
        if hosts.is_first():
            self.mirror.push()
            self.mirror.put_log(self.mirror.log())
            workdir.write_json(self.folder / "report.json", report)
            page.write(record.read(self.folder))
            print_result(json.dumps(report, indent=1))
            log0(f"{self.folder} has {files}")
        return True

    def _grid(self, step: int) -> Path:
        return self.folder / "samples" / f"{step:07d}.png"

    def _meta(self) -> dict:
        """What a checkpoint keeps besides the state."""
        times = {"seconds": self.clock.seconds(), "compile_seconds": self.compile_seconds}
        run = {"config": self.config.to_dict(), "since_line": self.means.sums}
        return run | self.identity | times

    @contextlib.contextmanager
    def _outside_training(self, consequence: str) -> Iterator[None]:
        """Work that the clock does not count and that may transfer arrays.

        Samples that are not finite are a warning with its consequence: the EMA of bad steps may
        recover.
        """
        with self.clock.paused(), jax.transfer_guard("allow"):
            try:
                yield
            except NotFiniteError as error:
                log0(f"warning: {consequence}: {error}")


def parameter_count(state: TrainState) -> int:
    """The number of the network's parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def _log_setup(config: ConfigDict, images: int, parameters: int, mesh: Mesh) -> None:
    size, steps, name = config.data.batch_size, config.train.steps, config.data.name
    classes = config.model.num_classes
    log0(
        f"data: {images:,} images of {name}, {f'{classes} classes' if classes else 'no classes'}; "
        f"{steps:,} steps of {size:,} are {steps * size / images:.4g} epochs"
    )
    log0(
        f"network: {parameters:,} parameters; matmuls and activations {config.train.dtype}, "
        f"float32 matmuls of precision {config.train.precision}"
    )
    kind = jax.devices()[0].device_kind
    axes = " × ".join(f"{axis} {count}" for axis, count in mesh.shape.items())
    log0(f"devices: {mesh.size} × {kind}, as a mesh of {axes}")
