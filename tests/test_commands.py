"""Each command once as a user starts it: a process of its own. Other tests call its `main`."""

import json
import re

import jax
import numpy as np
import pytest

from tests.conftest import SMOKE, run_command
from tests.encoding import arguments
from tests.runs import DIGITS, SAMPLE
from tests.small_data import write_pictures, write_vae


def test_main(tmp_path):
    printed = run_command("mdt_jax.main", *SMOKE, f"--workdir={tmp_path / 'run'}")
    assert json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["steps"] == 4
    assert (tmp_path / "run" / "samples.npz").is_file()


def test_a_mistake_shows_no_traceback(tmp_path):
    flags = [*SMOKE, f"--workdir={tmp_path / 'run'}", "--config.optim.lrr=1"]
    printed = run_command("mdt_jax.main", *flags, expect=2)
    assert printed.startswith("error: unknown config field") and printed.count("\n") == 1


def test_sample_and_evaluate(tmp_path):
    out = tmp_path / "samples.npz"
    run_command("mdt_jax.sample", *SAMPLE, "--num_samples=30", f"--out={out}")
    assert np.load(out)["arr_0"].shape == (30, 8, 8, 1)
    reference = ["--reference=digits", "--features=pixels,classifier"]
    printed = run_command("mdt_jax.evaluate", f"--samples={out}", *reference)
    assert "class agreement" in printed and (tmp_path / "samples.npz.json").is_file()


def test_inpaint(tmp_path):
    run_command(
        "mdt_jax.inpaint", f"--checkpoint={DIGITS}", "--image=docs/three.png",
        "--mask=docs/mask.png", "--label=3", "--num_steps=12", f"--out={tmp_path / 'out.png'}",
    )  # fmt: skip
    assert (tmp_path / "out.png").is_file()


def test_encode(tmp_path):
    write_pictures(tmp_path / "pictures", 24)
    write_vae(tmp_path / "vae")
    out = f"--out={tmp_path / 'cache'}"
    printed = run_command("mdt_jax.encode", *arguments(tmp_path), out)
    assert "24 images in 1 shards, 0 damaged" in printed


def test_convert(tmp_path):
    pytest.importorskip("safetensors")
    out = tmp_path / "digits"
    run_command("mdt_jax.convert", f"--src={DIGITS}", f"--dst={out}")
    assert out.is_dir()


def test_info():
    printed = run_command("mdt_jax.info", "--config=configs/v2_xl2.py:smoke")
    assert re.search(
        r"^parameters +[\d,]+ \([\d,]+ without the training-only part\)$", printed, re.M
    )
    assert re.search(r"^full pass +0\.00 GMAC an image$", printed, re.M)
    assert re.search(r"^kept lengths +8–11 of 16 tokens, drawn for each step$", printed, re.M)
    assert re.search(r"^memory of a step .* GiB on each device for a batch of 16 ", printed, re.M)
    assert re.search(rf"^this machine +1 × cpu, JAX {re.escape(jax.__version__)}", printed, re.M)
