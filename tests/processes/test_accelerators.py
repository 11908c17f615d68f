"""Platforms that the machine has not, in every command that starts JAX."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runs import DIGITS

CONFIG = "--config=configs/digits.py:smoke"
COMMANDS = {
    "main": [CONFIG, "--workdir=OUT/run"],
    "info": [CONFIG],
    "encode": [CONFIG, "--out=OUT/cache"],
    "sample": [f"--checkpoint={DIGITS}", "--out=OUT/a.png"],
    "inpaint": [
        f"--checkpoint={DIGITS}", "--image=a.png", "--mask=b.png", "--label=3", "--out=OUT/a.png"
    ],
    "evaluate": ["--samples=OUT/a.npz", "--reference=digits", "--out=OUT/card.json"],
    "convert": [f"--src={DIGITS}", "--dst=OUT/weights"],
}  # fmt: skip
CODE = """
import importlib, sys
from mdt_jax import cli
from tests.processes.test_accelerators import COMMANDS
out = sys.argv[1]
for name, arguments in COMMANDS.items():
    sys.argv = [name, *(argument.replace("OUT", out) for argument in arguments)]
    try:
        cli.run(importlib.import_module(f"mdt_jax.{name}").main)
    except SystemExit as exit_:
        assert exit_.code == 2, (name, exit_.code)
"""


@pytest.mark.parametrize("platform", ["cuda", "gpu", "tpu", "abacus"])
def test_a_platform_that_is_not_there_is_one_line(platform, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": platform},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "" and list(tmp_path.iterdir()) == []
    lines = process.stderr.splitlines()
    asked = f"error: JAX cannot start {platform}, which JAX_PLATFORMS asks for: "
    assert len(lines) == len(COMMANDS) and all(line.startswith(asked) for line in lines), lines
