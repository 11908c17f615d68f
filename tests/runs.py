"""Commands that several tests give, and what they read of a run's workdir."""

import json
import pathlib

import jax
import numpy as np

from tests.conftest import ROOT, SMOKE

# A run of many short steps, long enough to be stopped twice on its way.
LONG = [*SMOKE, "--config.train.steps=120", "--config.train.checkpoint_every=20",
        "--config.train.sample_every=0", "--config.sample.num_samples=0"]  # fmt: skip
# A run that measures its samples.
MEASURING = [
    "--config=configs/digits.py:smoke", "--config.train.sample_every=0",
    "--config.sample.num_samples=0", "--config.evaluation.every=2",
    "--config.evaluation.num_samples=30", "--config.train.checkpoint_every=3",
]  # fmt: skip
# The demo's model, small, and a few samples of it.
DIGITS = str(ROOT / "tests" / "digits.safetensors")
SAMPLE = [f"--checkpoint={DIGITS}", "--num_steps=3", "--sampler=ddim", "--guidance_scale=2"]


def steps_of(workdir: pathlib.Path) -> list[int]:
    path = workdir / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def lines_of(workdir) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def arrays(workdir: pathlib.Path, item: str) -> list[np.ndarray]:
    """The bits of one item of the newest checkpoint, read with Orbax alone."""
    import orbax.checkpoint as ocp

    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    folder = workdir / "checkpoints" / str(newest) / item
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        whole = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return jax.tree.leaves(checkpointer.restore(folder, whole))


def measured(workdir) -> dict[int, dict]:
    """Of each step that was measured; each must be there once."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "frechet_distance" in line or "fid" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line.pop("step"): line for line in found}
