"""The training loop."""

import contextlib
import os
from collections.abc import Collection

import jax
from ml_collections import ConfigDict

from mdt_jax import config as configs
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import interrupts, parallel
from mdt_jax.runtime.files import as_path
from mdt_jax.train import costs, inputs, warm_start, workdir
from mdt_jax.train.log import Log
from mdt_jax.train.mirror import Mirror
from mdt_jax.train.optimizers import learning_rate, make_optimizer
from mdt_jax.train.run import Run
from mdt_jax.train.samples import RunSampler, open_evaluator
from mdt_jax.train.speed import Profile
from mdt_jax.train.state import abstract_state, initial_state, run_keys
from mdt_jax.train.step import compile_step
from mdt_jax.train.stopping import Stopped, StopSignal
from mdt_jax.train.trackers import Monitoring

# How long a stopped process waits for readers of data, which may hang, before it exits.
READERS_SECONDS = 30


def train(
    config: ConfigDict,
    folder: str | os.PathLike,
    show: Monitoring | None = None,
    set_fields: Collection[str] = (),
    stop: StopSignal | None = None,
) -> bool:
    """Train to the last step, or until a signal asks for a stop. Returns whether it finished.

    folder: the workdir, on a disk or gs://BUCKET/NAME. A run that is there resumes, and its result
    is bit-identical to that of an uninterrupted run on the same machine. set_fields: the config
    fields that the user set explicitly; `inputs.complete_config` overrides no field among them.
    stop: the signal handler; by default one is installed now. Raises UserError for a user's
    mistake, and where another run works in the workdir.
    """
    show, stop, folder = show or Monitoring(), stop or StopSignal(), as_path(folder)

    # Check what can be checked before the workdir is changed.
    workdir.check_usable(folder)
    workdir.agree_on_config(config)
    configs.validate(config, jax.device_count())
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    mirror = Mirror(folder)
    profile = Profile(show.profile_steps, mirror.folder / "profile")
    data = inputs.open_inputs(config, set_fields)
    evaluator = open_evaluator(config, data.source, data.held_out)
    identity = data.identity(evaluator, config.model.num_classes)
    model, optimizer = MDT.from_config(config), make_optimizer(config.optim)
    abstract = abstract_state(model, optimizer, mesh)
    costs.check_memory(config, model, abstract)
    workdir.agree_on_start(folder, identity)
    seed_key, init_key = run_keys(config.train.seed, mesh)
    weights = warm_start.read_weights(config, folder, model, init_key)

    with Run(config, folder, identity, evaluator, stop, mirror) as run:
        # Resume from the newest sound checkpoint, or start.
        state = run.restore(abstract)
        if run.is_finished():
            return True
        if state is None:
            state = initial_state(model, optimizer, init_key, abstract, weights)
        sampler = RunSampler(config, model, data.vae)
        trackers = run.begin(data, abstract, mesh, show)
        batches = inputs.feed(config, data, mesh, run.start)
        rate = learning_rate(config.optim, mesh)
        train_step = run.compile(lambda: compile_step(config, model, optimizer, abstract, mesh))
        log = Log(run, model, len(data.source), trackers)
        stop.start_training()

        # Each turn: save → sample → measure → next batch → step → log the step before.
        # A state is saved first, so that a kill while sampling loses nothing. Metrics are logged
        # one step late, so that the devices never wait for the host. There is one turn more than
        # steps, so that the last state is saved, sampled and measured like any other.
        step, steps = run.start, config.train.steps
        closing = contextlib.closing
        with log, closing(batches), closing(profile), jax.transfer_guard("disallow"):
            try:
                for step in range(run.start, steps + 1):
                    if stop.requested(step):
                        raise Stopped
                    measure = run.must_measure(step)
                    if run.must_save(step, measure):
                        run.save(step, state, log)
                    run.publish_log()
                    with stop.interruptible():
                        if run.must_sample(step):
                            run.save_grid(step, sampler, state, log)
                        if measure:
                            run.measure(step, sampler, state, log)
                        if step == steps:
                            break
                        profile.before(step + 1, state)
                        with run.clock.waiting():
                            batch = next(batches)
                    with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                        state, metrics = train_step(state, batch, seed_key, rate)
                    log.write(step + 1, metrics)
            except Stopped:
                run.save_stopped(step, state, log)
                if stop.ends_process:
                    interrupts.end_in(READERS_SECONDS, stop.exit_code)
                return False
        return run.report(state, sampler)
