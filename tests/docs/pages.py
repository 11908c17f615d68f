"""The README and docs/*.md: their commands, their Python, and how to run them on tiny networks."""

import importlib
import pathlib
import re
import shlex
import sys

import pytest

from tests.conftest import ROOT, XLA_FLAGS, run_here

# In the order in which their commands run: later pages use the runs of earlier ones.
FIRST = ["README.md", "docs/training.md", "docs/data.md", "docs/your-pictures.md"]
PAGES = [ROOT / name for name in FIRST]
PAGES += [page for page in sorted((ROOT / "docs").glob("*.md")) if page not in PAGES]
MODULE_COMMAND = re.compile(r"(\w+=\S+ )?python -m mdt_jax\.")


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands(page: pathlib.Path) -> list[str]:
    """The commands of a page: lines of its bash blocks, and mdt_jax commands within the text."""
    lines = []
    for block in blocks(page, "bash"):
        lines += block.replace("\\\n", "").strip().splitlines()
    spans = re.findall(r"`(python -m mdt_jax\.\w+ --[^`]*)`", page.read_text())
    return [" ".join(line.split()) for line in [*spans, *lines]]


ALL_COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
PAGE_COMMANDS = [line for line in ALL_COMMANDS if "mdt_jax.demo" in line]  # run until Ctrl-C
MODULE_COMMANDS = [
    line for line in ALL_COMMANDS if MODULE_COMMAND.match(line) and line not in PAGE_COMMANDS
]

REPLACED = {
    "train.steps=4000": "train.steps=4",
    "num_samples=50000": "num_samples=8",
    "num_steps=250": "num_steps=5",
    "num_steps=50": "num_steps=12",
    "evaluation.every=500": "evaluation.every=1",
    "evaluation.num_samples=1000": "evaluation.num_samples=20",
    "mesh.fsdp=8": "mesh.fsdp=1",
    "=docs/": f"={ROOT}/docs/",
}


def smoke(command: str) -> str:
    """The same command on a recipe's smoke variant and small data, in this interpreter."""
    if (
        "latents/" in command or "--estimate_scale" in command
    ):  # the images and the VAE of the fixture `folder`
        if "data.name" not in command and "--verify" not in command:
            command += " --config.data.name=folder --config.data.path=imagenet/train"
        command += " --config.data.image_size=32 --config.data.channels=3 --config.vae.path=vae"
        command += " --config.model.num_classes=3 --config.vae.scale=1.0"
    if "pictures64" in command:  # the smoke variant is of digits
        command += " --config.data.name=folder --config.data.image_size=64"
        command += " --config.data.channels=3 --config.data.batch_size=8"
    if "configs/emoji" in command:
        command += " --config.data.name=folder --config.data.path=emoji/train"
        command += " --config.data.image_size=32 --config.data.channels=3"
        command += " --config.evaluation.reference=emoji/test"
    if "evaluate" in command:
        command = command.replace("image_size=256", "image_size=32")
    if "inpaint" in command:
        command += " --num_steps=12"
    if "mdt_jax.sample" in command and ("hf://" in command or "runs/photos" in command):
        command += " --num_steps=3"
    for text, small in REPLACED.items():
        command = command.replace(text, small)
    command = re.sub(r"(configs/\w+\.py)(?!:)", r"\1:smoke", command)
    command = command.replace("--config=configs", f"--config={ROOT}/configs")
    command = re.sub(r"^XLA_FLAGS=(\S+)", rf"XLA_FLAGS='{XLA_FLAGS} \1'", command)
    return command.replace("python", sys.executable, 1)


def run_smoke(command: str, folder: pathlib.Path) -> str:
    """Run it in this process, with Inception on two images at a time; returns what it printed."""
    from mdt_jax.evaluation import feature_networks

    _, _, module, *arguments = shlex.split(smoke(command))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_networks, "EACH_DEVICE", 2)
        return run_here(importlib.import_module(module).main, *arguments, cwd=folder)
