"""All benches of speed at once: python benchmarks/run.py --suite=cpu

cpu: S/2 against PyTorch, training and sampling, in less than nine minutes; what there is no time
for is named. small: the digits' network, to see that all of it works. Prints tables, and leaves
train_step.json and sample_step.json in --out. On a GPU, benchmarks/gpu.py measures.
"""

import json
import pathlib
import sys
import time

import sample_step
import train_step

from mdt_jax import cli
from mdt_jax.runtime.errors import UserError

LIMIT = 9 * 60  # seconds
RESERVE = 120  # of them, for what was begun last

BENCHES = {"train_step": train_step.bench, "sample_step": sample_step.bench}

# What is measured, the most important first: a bench, and its flags.
SUITES = {
    "cpu": [
        ("train_step", "--config=configs/s2.py --dtype=float32 --torch --rounds=4"),
        ("train_step", "--config=configs/s2.py --dtype=bfloat16 --torch"),
        ("sample_step", "--config=configs/s2.py --dtype=float32 --tolerance=0,0.001 --torch"),
        ("sample_step", "--config=configs/s2.py --dtype=bfloat16 --tolerance=0,0.001 --torch"),
    ],
    "small": [
        ("train_step", "--config=configs/digits.py --batch_size=8 --torch --seconds=1"),
        ("sample_step", "--config=configs/digits.py --batch_size=8 --torch --seconds=1"),
    ],
}


def bench(argv: list[str]) -> None:
    """Read the flags, run the suite."""
    parser = cli.Parser(prog="python benchmarks/run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--out", default="runs/bench", help="a folder")
    args = parser.parse_args(argv[1:])
    began, found, left = time.monotonic(), {name: [] for name in BENCHES}, []
    out = pathlib.Path(args.out)
    for name, flags in SUITES[args.suite]:
        if time.monotonic() - began > LIMIT - RESERVE:
            left.append(f"{name} {flags}")
            continue
        part = out / f"{name}.part.json"
        try:
            BENCHES[name](["", *flags.split(), f"--out={part}"])
        except UserError as error:  # a batch too large for this device, say
            print(f"{name} {flags}: {error}", file=sys.stderr)
            left.append(f"{name} {flags}")
        if part.exists():
            found[name] += json.loads(part.read_text())["rows"]
            part.unlink()
            train_step.timing.write(out / f"{name}.json", found[name])
    print(f"\n{time.monotonic() - began:.0f} s" + "".join(f"\nleft out: {each}" for each in left))


if __name__ == "__main__":
    cli.run(bench)
