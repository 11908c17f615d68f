"""Samples to disk, batch by batch, so that an interrupted command can be continued."""

from mdt_jax.data.sample_files import Sink
from mdt_jax.runtime import files, hosts
from mdt_jax.runtime.errors import NotFiniteError, UserError
from mdt_jax.runtime.files import Path
from mdt_jax.runtime.hosts import is_first
from mdt_jax.sampling.generation import Request
from mdt_jax.sampling.pipeline import Pipeline


def write_samples(pipeline: Pipeline, request: Request, sink: Sink) -> bool:
    """Draw the samples that a sink does not have yet, and write their images.

    All processes draw, and the first one writes. Returns False if the sink has all samples already.
    Raises UserError if another process writes there, and NotFiniteError: then nothing is written of
    the batch with the first sample that is not finite.
    """
    with hosts.alone(sink.lock, str(sink.out)):
        if hosts.broadcast(is_first() and sink.finished()):
            return False
        total, size, done = len(request.labels), request.batch_size, []
        if is_first():
            sink.begin()
            starts = range(0, total, size)
            done = [start for start in starts if sink.done(start, min(size, total - start))]
        try:
            for batch in request.batches(progress=True, done=hosts.broadcast(done)):
                images = pipeline.to_images(batch.samples, size, batch.start)
                if is_first():
                    sink.write(batch.start, images)
        except NotFiniteError:
            if is_first():
                sink.give_up()
            raise
        if is_first():
            sink.finish()
        return True


def check_writable(out: Path) -> None:
    """Raise UserError before the work begins if the file --out cannot be written, or a folder next
    to it in which a stopped command has kept its work. Only the first process checks.
    """
    if not is_first():
        return
    if files.is_dir(out):
        raise UserError(f"--out={out} cannot be written: it is a folder")
    files.check_writable(out.parent, f"--out={out}")
    if files.in_bucket(out):
        return
    for kept in (out.with_name(f"{out.name}.{suffix}") for suffix in ("parts", "features")):
        if kept.exists():
            files.check_writable(kept, f"--out={out}: {kept}")
