"""What a GPU computes, and how fast: python benchmarks/gpu.py --stage=a --out=runs/gpu

Stage a: versions, limits of the device, the recorded numbers of the published code, attention, and
a training step of XL/2 with a table of its kernels. Stage b: that step with other batch sizes,
unrolled and scanned, and MDTv2's. Stage c: sampling, small networks, losses, the VAE, and a run
that is stopped and resumed.

Each item is a process with a time-out. A stage takes 8.5 minutes at most and starts with what
matters most; an item that fails or no longer fits does not end it. --out keeps the compiled
programs between the stages. stage.jsonl there gets a line as soon as an item ends, STAGE.log what
the processes print to stderr, and STAGE.md the tables that are printed last. --small runs small
networks on any device.

Losses on a GPU are compared to those of a CPU:

python benchmarks/gpu.py --write_losses=losses.json      on the CPU
python benchmarks/gpu.py --stage=c --losses=losses.json  on the GPU
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import gpu_items
import gpu_runs
import timing

from mdt_jax import cli
from mdt_jax.runtime.errors import UserError

BUDGET = 8.5 * 60  # seconds of a stage
ROOT = pathlib.Path(__file__).parents[1]
XL2 = {"config": "configs/xl2.py", "batch_size": 64, "remat": "dots"}


class Item(NamedTuple):
    """A part of a stage.

    seconds: how long it is expected to take; it is stopped after twice as long. work: the name of a
    function in WORK. arguments: of that function.
    """

    name: str
    seconds: int
    work: str
    arguments: dict = {}


# The most important items come first.
STAGES = {
    "a": [
        Item("versions", 20, "versions"),
        Item("ceilings", 50, "ceilings"),
        Item("goldens_v1", 60, "goldens", {"version": "v1"}),
        Item("attention", 90, "attention"),
        Item("xl2", 130, "train", {**XL2, "trace": True}),
        Item("goldens_v2", 60, "goldens", {"version": "v2"}),
        Item("xl2_plain", 110, "train", {**XL2, "attention": "plain", "trace": True}),
    ],
    "b": [
        Item("xl2_unrolled", 110, "train", {**XL2, "unroll": True}),
        Item("xl2_scanned", 70, "train", {**XL2, "unroll": False}),
        Item("xl2_128", 70, "train", {**XL2, "batch_size": 128}),
        Item("v2_xl2", 80, "train", {**XL2, "config": "configs/v2_xl2.py"}),
        Item("xl2_32_none", 70, "train", {**XL2, "batch_size": 32, "remat": "none"}),
        Item("xl2_160", 70, "train", {**XL2, "batch_size": 160}),
        Item("xl2_96", 70, "train", {**XL2, "batch_size": 96}),
    ],
    "c": [
        Item("sample_1", 90, "sample", {"batch_size": 1}),
        Item("sample_32", 130, "sample", {"batch_size": 32}),
        Item("losses", 110, "losses"),
        Item("resume", 60, "resume"),
        Item("s2", 50, "train", {"config": "configs/s2.py", "batch_size": 256, "remat": "none"}),
        Item("vae", 40, "vae"),
        Item("b2", 60, "train", {"config": "configs/b2.py", "batch_size": 256, "remat": "dots"}),
    ],
}  # fmt: skip

# Functions that yield the rows of an item's tables. A row maps the heads of columns to values; rows
# with the same heads, one after another, make one table.
WORK = {
    "versions": gpu_items.versions,
    "ceilings": gpu_items.ceilings,
    "goldens": gpu_items.goldens,
    "attention": gpu_items.attention,
    "train": gpu_runs.train,
    "sample": gpu_runs.sample,
    "losses": gpu_runs.losses,
    "resume": gpu_runs.resume,
    "vae": gpu_runs.vae,
}


def run_process(
    command: Sequence[str], environment: dict, log: pathlib.Path, seconds: float
) -> tuple[list[dict], str]:
    """Run a process that prints JSON objects; kill it and its children after so many seconds.

    log: the file to which its stderr is appended. Returns the objects, and why the process did not
    end as it should ("" if it did). An object {"reason": …} is the process's own explanation.
    """
    with tempfile.TemporaryFile("w+") as printed, open(log, "a+") as errors:
        start = errors.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=errors, process_group=0
        )
        reason = ""
        try:
            code = process.wait(seconds)
            if code:
                errors.seek(start)
                last = (errors.read().strip().splitlines() or ["it printed nothing"])[-1]
                ended = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
                reason = f"{ended}: {last}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed.seek(0)
        lines = [json.loads(line) for line in printed if line.startswith("{")]
    own = [line["reason"] for line in lines if line.keys() == {"reason"}]
    return [line for line in lines if line.keys() != {"reason"}], own[0] if own else reason


def run_here(spec: dict) -> None:
    """The work of an item's process: print each row as soon as it is known."""
    try:
        for row in WORK[spec["work"]](**spec["arguments"]):
            print(json.dumps(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps({"reason": cli.one_line(error) or first[: cli.LONGEST]}), flush=True)
        sys.exit(1)


PROBE = """
import jax, json, sys
from mdt_jax.runtime import backend
try:
    backend.start()
except Exception as error:
    print(json.dumps({"reason": str(error)}))
    sys.exit(1)
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "kind": device.device_kind}))
"""


def find_device(environment: dict) -> dict:
    """{"platform", "kind"} of JAX's first device, found by a process of its own. Raises UserError.

    This process must not start JAX's devices: it would hold the memory that the items need.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "log"
        found, reason = run_process([sys.executable, "-c", PROBE], environment, log, 120)
    if not found:
        raise UserError(reason)
    return found[0]


def prepare(out: pathlib.Path, small: bool) -> tuple[dict, dict]:
    """(the device, the environment of the items). Raises UserError without a GPU, unless `small`.

    On a GPU XLA writes the results of its autotuning to the file `autotune_file(out)`, if this
    version has the flag: one that it does not know ends the process.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    plain = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_COMPILATION_CACHE_DIR": str(out / "cache"),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    dump = f"--xla_gpu_dump_autotune_results_to={autotune_file(out)}"
    tuned = {**plain, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()}
    try:
        device, environment = find_device(tuned), tuned
    except UserError:
        device, environment = find_device(plain), plain
    if device["platform"] == "gpu":
        return device, environment
    if not small:
        raise UserError(
            f"no GPU: JAX finds only the platform {device['platform']}; --small runs on it"
        )
    return device, plain


def autotune_file(out: pathlib.Path) -> pathlib.Path:
    """The file that each process overwrites.

    Its name is the same for all, since XLA's flags are part of the key of JAX's compilation cache.
    """
    return out / "autotune.txt"


def run_item(item: Item, spec: dict, environment: dict, log: pathlib.Path, left: float) -> dict:
    """{"rows", "reason", "seconds"} of an item, for which so many seconds are left."""
    if left < item.seconds:
        reason = f"left out: {max(left, 0):.0f} s are left of about {item.seconds}"
        return {"rows": [], "reason": reason, "seconds": 0.0}
    print(f"{item.name} …", file=sys.stderr, flush=True)
    began = time.monotonic()
    command = [sys.executable, __file__, f"--one={json.dumps(spec)}"]
    rows, reason = run_process(command, environment, log, min(2 * item.seconds, left))
    return {"rows": rows, "reason": reason, "seconds": round(time.monotonic() - began, 1)}


def run_stage(
    stage: str, items: Sequence[Item], out: pathlib.Path, small: bool, losses: str
) -> str:
    """Run the items, write their results to `out`, and return the tables in Markdown."""
    began, records = time.monotonic(), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # end the item, too
    device, environment = prepare(out, small)
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{stage}.log"
    for item in items:
        arguments = {"small": small, "out": str(out / item.name), **item.arguments}
        if item.work == "losses":
            arguments["beside"] = losses
        spec = {"work": item.work, "arguments": arguments}
        left = BUDGET - (time.monotonic() - began)
        record = {"stage": stage, "item": item.name, "device": device["kind"], "small": small}
        record |= run_item(item, spec, environment, log, left)
        with open(out / "stage.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if autotune_file(out).exists():
            autotune_file(out).rename(out / f"autotune-{stage}-{item.name}.txt")
        records.append(record)
    tables = report(stage, device["kind"], records, time.monotonic() - began)
    (out / f"{stage}.md").write_text(tables + "\n")
    return tables


def report(stage: str, kind: str, records: Sequence[dict], seconds: float) -> str:
    """The tables of a stage in Markdown; items without rows have a line that says why."""
    parts = [f"# Stage {stage}, {kind}, {seconds:.0f} s"]
    for record in records:
        parts.append(f"## {record['item']}, {record['seconds']:.0f} s")
        for heads, rows in itertools.groupby(record["rows"], tuple):
            columns = {head: lambda row, head=head: cell(row[head]) for head in heads}
            parts.append(timing.markdown(columns, list(rows)))
        if record["reason"]:
            parts.append(record["reason"])
    return "\n\n".join(parts)


def cell(value: object) -> str:
    """A value as the text of a table's cell."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def chosen(stage: str, only: str) -> list[Item]:
    """The items of a stage, or those that `only` names, with commas. Raises UserError."""
    items = {item.name: item for item in STAGES[stage]}
    names = only.split(",") if only else list(items)
    for name in names:
        if name not in items:
            raise UserError(f"--only={name}: stage {stage} has {', '.join(items)}")
    return [items[name] for name in names]


def bench(argv: list[str]) -> None:
    """Read the flags, run the stage, print its tables."""
    parser = cli.Parser(prog="python benchmarks/gpu.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", choices=STAGES)
    add("--out", default="runs/gpu", type=cli.local, help="a folder, the same for all stages")
    add("--only", default="", help="items of the stage: a,b,c")
    add("--small", action="store_true", help="small networks, on any device")
    add("--losses", default="", type=cli.local, help="file of losses to compare those of stage c")
    add("--write_losses", default="", type=cli.local, help="write such a file, and end")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    if args.one:
        run_here(json.loads(args.one))
    elif args.write_losses:
        gpu_runs.write_losses(args.write_losses, args.small)
    elif args.stage is None:
        raise UserError("--stage is missing: a, b or c")
    else:
        losses = args.losses and str(pathlib.Path(args.losses).absolute())
        if losses:
            gpu_runs.read_losses(losses, args.small)  # to say now if it cannot be read
        items = chosen(args.stage, args.only)
        out = pathlib.Path(args.out).absolute()
        print(run_stage(args.stage, items, out, args.small, losses))


if __name__ == "__main__":
    cli.run(bench)
