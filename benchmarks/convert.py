"""Time and memory of converting weights of full size, there and back.

python benchmarks/convert.py

Makes the published file of a model of random weights, converts it to a folder and back in processes
of their own, and checks that the file that comes back has the same keys, types, shapes and bits.
Prints a table; takes room for three times the weights in --out (9 GB for XL/2), and frees it.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from mdt_jax import cli
from mdt_jax.models.mdt import MDT, SIZES, init_params
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import torch_files
from mdt_jax.weights.kinds import Weights
from mdt_jax.weights.networks import save

MODELS = {
    "MDT": {},
    "MDTv2": {"version": "v2", "decoder_layers": 4},
    "DiT": {"decoder_layers": 0, "side_layers": 0}
    | {"relative_bias": False, "learned_position": False},
}


@dataclasses.dataclass
class Cost:
    """seconds on the clock; peak: bytes of memory, pages of files that are read among them."""

    seconds: float
    peak: int


def convert(src: pathlib.Path, dst: pathlib.Path) -> Cost:
    """Run the command to its end. Raises UserError where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mdt_jax.convert", f"--src={src}", f"--dst={dst}"]
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"converting {src} to {dst} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(time.perf_counter() - started, usage.ru_maxrss * unit)


def random_weights(model: MDT) -> Weights:
    """Standard normal draws everywhere."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    draws = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    return Weights(model, draws)


def assert_same(first: pathlib.Path, second: pathlib.Path) -> None:
    """Keys, types, shapes and bits."""
    a, b = torch_files.read_arrays(first), torch_files.read_arrays(second)
    assert set(a) == set(b), set(a) ^ set(b)
    for name, array in a.items():
        assert (array.dtype, array.shape) == (b[name].dtype, b[name].shape), name
        assert np.array_equal(array, b[name]), name


def bench(argv: list[str]) -> None:
    """Read the flags, run, print."""
    parser = cli.Parser(prog="python benchmarks/convert.py", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="XL")
    parser.add_argument("--out", default=None, help="folder for the files; default: the system's")
    flags = parser.parse_args(argv[1:])
    print("| | file | to a folder | and back | peak memory |", "| --- " * 5 + "|", sep="\n")
    for name, fields in MODELS.items():
        model = MDT(input_size=(32, 32), in_channels=4, **SIZES[flags.size], **fields)
        with tempfile.TemporaryDirectory(dir=flags.out) as folder:
            first, middle, last = (pathlib.Path(folder, name) for name in ("a.pt", "b", "c.pt"))
            save(first, random_weights(model))
            there, back = convert(first, middle), convert(middle, last)
            assert_same(first, last)
            size = first.stat().st_size
        peak = max(there.peak, back.peak)
        print(
            f"| {name}-{flags.size}/2 | {size / 1e9:.2f} GB "
            f"| {there.seconds:.0f} s | {back.seconds:.0f} s "
            f"| {peak / 1e9:.2f} GB, {peak / size:.2f}× the file |",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(bench)
