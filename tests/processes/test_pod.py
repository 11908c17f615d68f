"""launch/tpu/pod.sh with real commands on two machines that share a bucket and no folder."""

import io
import json
import os
import signal
import subprocess

import numpy as np
import pytest

from mdt_jax import encode
from mdt_jax.weights.step_folders import COMMIT
from tests.conftest import ROOT, run_here
from tests.processes.cloud import POD, Cloud, wait_for
from tests.processes.together import free_port
from tests.runs import LONG
from tests.small_data import write_pictures, write_tar, write_vae

# A machine's Python. The flags are what JAX learns from a TPU's environment. What needs no TPU gets
# none: it runs on one machine.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"uv venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m mdt_jax.convert"* | "-m mdt_jax.info"*) exec {python} "$@" ;;
    "-m mdt_jax."*)
        exec {python} "$@" --patience=15 --num_processes=2 --process_id="$MACHINE" \\
            --distributed="127.0.0.1:$PORT" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path, gcs):
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "", "PERIOD": "1"}
    cloud = Cloud(tmp_path, PYTHON, PORT=str(free_port()), **variables)
    yield cloud
    kill(cloud)


def kill(cloud: Cloud) -> None:
    """End what runs on the machines, without notice."""
    for file in cloud.folder.glob("[01]/mdt_jax/run.pid"):
        try:
            os.killpg(os.getpgid(int(file.read_text())), signal.SIGKILL)
        except ProcessLookupError:
            continue


def logs(cloud: Cloud) -> str:
    return "\n".join(file.read_text() for file in cloud.folder.glob("[01]/mdt_jax/run.log"))


def watch(cloud: Cloud, *command: str) -> None:
    """Run a command to its end on the machines there are."""
    try:
        cloud.pod("watch", *command, timeout=300)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"{error}\n{logs(cloud)}") from None


def test_train_preempted_resumed_sample_evaluate_convert(cloud, gcs):
    run = f"{gcs.root}/runs/digits"
    train = ["train", *LONG, "--config.train.steps=60", f"--workdir={run}"]
    with open(cloud.folder / "said", "w") as said:
        process = subprocess.Popen(
            [POD, "watch", *train], cwd=ROOT, env=cloud.environment, stdout=said, stderr=said
        )

    def said_so_far() -> str:
        return (cloud.folder / "said").read_text() + logs(cloud)

    def saved() -> bool:
        assert process.poll() is None, said_so_far()
        return f"runs/digits/checkpoints/20/{COMMIT}" in gcs.objects("runs/digits/checkpoints/")

    try:
        wait_for(saved, "a checkpoint", 200)
        (cloud.folder / "state").write_text("SUSPENDED")  # Google takes the machines away
        kill(cloud)
        assert process.wait(timeout=300) == 0, said_so_far()
    finally:
        process.kill()
    made = [call[3] for call in cloud.calls() if call[2] == "queued-resources"]
    assert [name for name in made if name != "describe"] == ["create", "delete", "create"]
    assert "resuming from step" in logs(cloud)
    lines = gcs.read("runs/digits/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert json.loads(gcs.read("runs/digits/report.json"))["steps"] == 60

    samples = f"{gcs.root}/samples.npz"
    watch(cloud, "sample", f"--checkpoint={run}", "--num_samples=1000", "--num_steps=3",
          "--sampler=ddim", "--batch_size=250", f"--out={samples}")  # fmt: skip
    with np.load(io.BytesIO(gcs.read("samples.npz"))) as arrays:
        assert arrays["arr_0"].shape == (1000, 8, 8, 1)
    watch(cloud, "evaluate", f"--samples={samples}", "--reference=digits",
          "--features=pixels,classifier")  # fmt: skip
    measured = json.loads(gcs.read("samples.npz.json"))["measured"]
    assert measured["num_samples"] == 1000 and measured["frechet_distance"] > 0

    watch(cloud, "convert", f"--src={run}", f"--dst={gcs.root}/digits.safetensors")
    assert "digits.safetensors" in gcs.objects("digits")
    for machine in "01":  # nothing is left on a machine but code, log, state and caches
        left = {path.name for path in (cloud.folder / machine).iterdir()}
        caches = {".cache", ".config"}  # matplotlib makes a folder for its settings
        assert left <= {"mdt_jax", "mdt_jax.tar.gz", "set-up", *caches}, left


def test_encode_and_train_on_the_latents(cloud, gcs, tmp_path):
    """Images and VAE in the bucket; the shards are those that one process writes on a disk."""
    images = write_tar(write_pictures(tmp_path / "pictures"), tmp_path / "images.tar")
    gcs.write("images.tar", images.read_bytes())
    vae = write_vae(tmp_path / "vae.safetensors")
    gcs.write(vae.name, vae.read_bytes())

    def flags(root: str, name: str, path: str) -> list[str]:
        sizes = ["image_size=32", "channels=3", f"name={name}", f"path={root}/{path}"]
        model = ["model.num_classes=3", f"vae.path={root}/vae.safetensors", "vae.scale=1.0"]
        config = [f"--config.{field}" for field in [*(f"data.{each}" for each in sizes), *model]]
        return ["--config=configs/xl2.py:smoke", *config]

    encode_flags = ["--shard_images=4", *flags(str(tmp_path), "tar", "images.tar")]
    printed = run_here(encode.main, *encode_flags, f"--out={tmp_path / 'latents'}")
    assert "24 images in 6 shards" in printed

    cloud.pod("create")
    shards = ["--shard_images=4", f"--out={gcs.root}/latents"]
    watch(cloud, "encode", *shards, *flags(gcs.root, "tar", "images.tar"))
    assert "this part is done" in logs(cloud) and "24 images in 6 shards" in logs(cloud)
    written = {name: gcs.read(name) for name in gcs.objects("latents/") if "array_record" in name}
    assert len(written) == 6
    for name, content in written.items():
        assert content == (tmp_path / name).read_bytes()

    watch(cloud, "train", *flags(gcs.root, "latents", "latents"), "--config.train.steps=3",
          "--config.sample.num_samples=0", f"--workdir={gcs.root}/run")  # fmt: skip
    assert json.loads(gcs.read("run/report.json"))["steps"] == 3
