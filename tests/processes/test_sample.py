"""Sampling in processes of its own: killed, measured, several as one."""

import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from mdt_jax import inpaint, sample
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.weights import kinds, networks
from tests.conftest import ROOT, run_here, start_command
from tests.processes.together import all_well, ends, free_port, start_as_one
from tests.runs import SAMPLE
from tests.small_data import VAE, write_vae


def test_killed_three_times_and_resumed(tmp_path):
    """kill -9 at random moments; the file is then an undisturbed run's, byte for byte."""
    flags = [*SAMPLE, "--num_samples=500", "--batch_size=10", "--num_steps=8", "--labels=random"]
    whole, out = tmp_path / "whole.npz", tmp_path / "killed.npz"
    run_here(sample.main, *flags, f"--out={whole}")
    parts = out.with_name("killed.npz.parts")
    moments, kills = random.Random(0), 0
    for aim in (1, 16, 38):
        process = start_command("mdt_jax.sample", *flags, f"--out={out}")
        until = time.time() + 120
        while len(list(parts.glob("*.npy"))) < aim:
            assert process.poll() is None and time.time() < until, process.communicate()
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        kills += not out.exists()
        assert len(list(parts.glob("*.npy"))) < 50
    assert kills == 3
    begun = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    process = start_command("mdt_jax.sample", *flags, f"--out={out}")
    while process.poll() is None:  # what was there is not drawn again
        for path in parts.glob("*.npy"):
            try:
                assert begun.get(path.name, 0) in (0, path.stat().st_mtime_ns)
            except FileNotFoundError:
                break
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.npz", "whole.npz"]


MEASURE = """
import resource, sys
from mdt_jax import inpaint, sample
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sample.main(["sample", *sys.argv[1:]])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """5,000 images of 64×64×3 are 61 MB as bytes and 246 MB as numbers."""
    model = MDT(input_size=(64, 64), in_channels=3, hidden_size=8, depth=2, num_heads=1,
                patch_size=32, decoder_layers=1, num_classes=3)  # fmt: skip
    params = init_params(model, jax.random.key(0))
    networks.save(tmp_path / "tiny", kinds.Weights(model, params))
    peaks = []
    for count in (500, 5000):
        flags = [f"--checkpoint={tmp_path / 'tiny'}", f"--num_samples={count}", "--num_steps=1"]
        flags += [
            "--batch_size=100",
            "--sampler=ddim",
            "--guidance_scale=1",
            f"--out={tmp_path / f'{count}.npz'}",
        ]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *flags], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1e3)
        with np.load(tmp_path / f"{count}.npz") as saved:
            assert saved["arr_1"].shape == (count,)
    assert peaks[1] < peaks[0] + 30, f"{peaks} MB"


def test_two_processes_draw_together(tmp_path):
    flags = [*SAMPLE, "--num_samples=30", "--batch_size=8"]
    run_here(sample.main, *flags, f"--out={tmp_path / 'one.npz'}")
    host = f"127.0.0.1:{free_port()}"
    all_well([
        start_command(
            "mdt_jax.sample", *flags, f"--out={tmp_path / 'two.npz'}", f"--distributed={host}",
            "--num_processes=2", f"--process_id={number}",
        )
        for number in range(2)
    ])  # fmt: skip
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    np.testing.assert_array_equal(one["arr_1"], two["arr_1"])
    assert str(one["note"]) == str(two["note"])


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_process_ends_all(told, tmp_path):
    """Without that, JAX notes SIGTERM, and the processes go on."""
    flags = [*SAMPLE, "--num_samples=20000", "--batch_size=10", f"--out={tmp_path / 'out.npz'}"]
    processes = start_as_one(2, "mdt_jax.sample", *flags)
    parts, until = tmp_path / "out.npz.parts", time.time() + 120
    while not list(parts.glob("*.npy")):
        assert processes[0].poll() is None and time.time() < until
        time.sleep(0.01)
    processes[told].send_signal(signal.SIGTERM)
    codes = [code for code, _ in ends(processes, timeout=60)]
    assert codes == [143, 143] and not (tmp_path / "out.npz").exists()
    assert not list(tmp_path.glob(".*.lock"))


def test_two_processes_complete_an_image_of_latents(tmp_path):
    model = MDT(input_size=(8, 8), in_channels=4, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=3)  # fmt: skip
    networks.save(tmp_path / "mdt", kinds.Weights(model, init_params(model, jax.random.key(0))))
    write_vae(tmp_path / "vae")
    size = 8 * VAE.factor
    mask = np.zeros((size, size), np.uint8)
    mask[10:30, 5:37] = 255
    image = np.random.RandomState(0).randint(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(image).save(tmp_path / "in.png")
    flags = [
        f"--checkpoint={tmp_path / 'mdt'}", f"--vae={tmp_path / 'vae'}", "--label=1",
        f"--image={tmp_path / 'in.png'}", f"--mask={tmp_path / 'mask.png'}", "--num_steps=3",
        "--mode=side_interpolater",
    ]  # fmt: skip
    run_here(inpaint.main, *flags, f"--out={tmp_path / 'one.png'}")
    out = f"--out={tmp_path / 'two.png'}"
    assert "wrote 1 completion" in all_well(start_as_one(2, "mdt_jax.inpaint", *flags, out))
    one, two = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in ("one", "two"))
    assert np.abs(one - two).max() <= 1
    np.testing.assert_array_equal(two[mask == 0], image[mask == 0])
