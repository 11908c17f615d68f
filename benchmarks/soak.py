"""Kill a run of several processes again and again, and see that nothing is lost.

python benchmarks/soak.py --processes=4 --kills=10

Trains configs/digits.py:smoke once undisturbed, then once more while one process, any one, gets
kill -9 at a random moment. The others must end by themselves, with a message, within two minutes;
the same command is given again, until the run has ended. Parameters, EMA, optimiser and every
logged loss must then be those of the undisturbed run, bit for bit.
"""

import json
import pathlib
import random
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from mdt_jax import cli
from mdt_jax.runtime.errors import UserError

MOST = 120  # seconds that the others may take to end
SAID = (
    "did not answer for", "the coordinator, is gone", "detected fatal errors", "did not connect",
)  # fmt: skip


def start(processes: int, workdir: pathlib.Path, steps: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                sys.executable, "-m", "mdt_jax.main", "--config=configs/digits.py:smoke",
                f"--workdir={workdir}", f"--distributed=127.0.0.1:{port}",
                f"--num_processes={processes}", f"--process_id={number}", "--patience=10",
                "--start_timeout=60", f"--config.train.steps={steps}",
                "--config.train.checkpoint_every=5", "--config.train.sample_every=0",
                "--config.sample.num_samples=0",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip


def ended(run: list[subprocess.Popen], seconds: float) -> bool:
    """Wait so long at most; whether all have ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.poll() is None for process in run):
        time.sleep(0.05)
    return all(process.poll() is not None for process in run)


def disturb(run: list[subprocess.Popen], after: float, victim: int) -> str | None:
    """Kill one after some seconds; what happened, or None where the run ended before."""
    if ended(run, after):
        finish(run)
        return None
    run[victim].kill()
    killed = time.monotonic()
    if not ended(run, MOST):
        raise UserError(f"process {victim} was killed, and others still ran after {MOST} s")
    took = time.monotonic() - killed
    for number, process in enumerate(run):
        printed = process.stderr.read()
        if number != victim and (process.returncode == 0 or not any(s in printed for s in SAID)):
            raise UserError(
                f"process {number} ended with {process.returncode} and no message: {printed[-500:]}"
            )
    return f"process {victim} killed after {after:.1f} s, the others ended {took:.1f} s later"


def finish(run: list[subprocess.Popen]) -> None:
    for process in run:
        printed = process.communicate()[1]
        if process.returncode:
            raise UserError(f"a process ended with {process.returncode}: {printed[-500:]}")


def result(workdir: pathlib.Path) -> tuple[list[np.ndarray], list]:
    """The arrays of the last checkpoint, read with Orbax alone, and what was logged."""
    import orbax.checkpoint as ocp

    newest, leaves = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name)), []
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for item in ("params", "ema", "progress"):
            folder = newest.absolute() / item
            saved = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            whole = ocp.args.PyTreeRestore(restore_args=as_numpy)
            leaves += jax.tree.leaves(checkpointer.restore(folder, whole))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return leaves, [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def bench(argv: list[str]) -> None:
    """Read the flags, run, compare, print."""
    parser = cli.Parser(prog="python benchmarks/soak.py", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--within", type=float, default=60, help="seconds of a start to its kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--out", default="runs/soak", help="folder of both runs, which must be new")
    options = parser.parse_args(argv[1:])
    out, dice = pathlib.Path(options.out), random.Random(options.seed)
    if out.exists():
        raise UserError(f"{out} exists already")
    began = time.monotonic()
    finish(start(options.processes, out / "undisturbed", options.steps))
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    for kill in range(options.kills):
        run = start(options.processes, out / "killed", options.steps)
        said = disturb(run, dice.uniform(0, options.within), dice.randrange(options.processes))
        if said is None:
            raise UserError(f"the run ended after {kill} kills; give it more --steps")
        print(f"{kill + 1}: {said}", flush=True)
    finish(start(options.processes, out / "killed", options.steps))
    (arrays, log), (wanted, wanted_log) = result(out / "killed"), result(out / "undisturbed")
    same = all(np.array_equal(a, b) for a, b in zip(arrays, wanted, strict=True))
    if not same or log != wanted_log:
        raise UserError("the run that was killed ended with other numbers")
    print(f"{options.kills} kills: {len(arrays)} arrays and {len(log)} logged steps are the same")


if __name__ == "__main__":
    cli.run(bench)
