"""A user's mistake: one clear line, exit code 2, and nothing lost or left behind."""

import errno
import os
import resource
import sys
import tempfile

import numpy as np
import pytest

from mdt_jax import cli, convert, encode, evaluate, info, inpaint, main, sample
from mdt_jax.runtime.errors import UserError
from mdt_jax.train import inputs
from tests.conftest import ROOT, SMOKE, exits_with_one_line, run_here
from tests.runs import DIGITS, SAMPLE

VAE = ["--config.vae.path=vae", "--config.data.channels=3"]
FLOW = ["--config.diffusion.objective=flow", "--config.sample.sampler=heun"]
BAD_CONFIGS = {
    "no config": ([], "required: --config"),
    "missing file": (["--config=configs/nothing.py"], "'configs/nothing.py' does not exist"),
    "a folder": (["--config=configs"], "'configs' is a folder"),
    "unknown variant": (["--config=configs/digits.py:tiny"], "unknown variant 'tiny'"),
    "unknown field": ([*SMOKE, "--config.optim.lrr=1"], "unknown config field --config.optim.lrr"),
    "second field": (
        [*SMOKE, "--config.optim.lr=1", "--config.optim.lrr=1"],
        "field --config.optim.lrr; did you mean --config.optim.lr?",
    ),
    "unknown group": ([*SMOKE, "--config.optimizer.lr=1"], "did you mean --config.optim.lr?"),
    "unknown flag": ([*SMOKE, "--workdirr=x"], "unknown flag --workdirr; did you mean --workdir?"),
    "stray argument": ([*SMOKE, "train"], "unexpected argument 'train'"),
    "wrong type": ([*SMOKE, "--config.train.steps=many"], "train.steps: invalid int value: 'many'"),
    "fraction of a step": (
        [*SMOKE, "--config.train.steps=1.5"], "--config.train.steps: invalid int value: '1.5'"
    ),
    "not a boolean": (
        [*SMOKE, "--config.data.flip=perhaps"], "data.flip: expected true or false, got 'perhaps'"
    ),
    "patch size": ([*SMOKE, "--config.model.patch_size=3"], "model.patch_size 3 does not divide"),
    "heads": ([*SMOKE, "--config.model.num_heads=3"], "not divisible by model.num_heads 3"),
    "decoder": ([*SMOKE, "--config.model.decoder_layers=3"], "model.decoder_layers is 3"),
    "no decoder": ([*SMOKE, "--config.model.decoder_layers=0"], "set mask.passes=full"),
    "ratio of one": ([*SMOKE, "--config.mask.ratio=1.0"], "mask.ratio is 1.0"),
    "ratio of more": ([*SMOKE, "--config.mask.ratio_max=1.0"], "mask.ratio_max is 1.0"),
    "bounds reversed": (
        [*SMOKE, "--config.mask.ratio=0.5", "--config.mask.ratio_max=0.3"],
        "mask.ratio_max is 0.3; it must be above mask.ratio 0.5",
    ),
    "odd encoder": (
        [*SMOKE, "--config.model.version=v2", "--config.model.depth=4"],
        "model.depth 4 less model.decoder_layers 1 leaves 3 encoder blocks; v2 requires",
    ),
    "version": ([*SMOKE, "--config.model.version=v3"], "must be one of v1, v2"),
    "no masked pass": (
        [*SMOKE, "--config.mask.passes=full", "--config.mask.loss_on=masked"],
        "mask.loss_on=masked has no effect with mask.passes=full",
    ),
    "symmetric without a masked pass": (
        [*SMOKE, "--config.mask.passes=full", "--config.mask.asymmetric=False"],
        "mask.asymmetric=False has no effect with mask.passes=full",
    ),
    "drawn without a masked pass": (
        [*SMOKE, "--config.mask.passes=full", "--config.mask.ratio_max=0.5"],
        "mask.ratio_max=0.5 has no effect with mask.passes=full",
    ),
    "side blocks without a masked pass": (
        [*SMOKE, "--config.mask.passes=full", "--config.model.side_layers=2"],
        "model.side_layers=2 has no effect with mask.passes=full",
    ),
    "shortcut of nothing": (
        [*SMOKE, "--config.model.side_interpolater=False", "--config.model.masked_shortcut=False"],
        "model.masked_shortcut=False has no effect with model.side_interpolater=False",
    ),
    "blocks of nothing": (
        [*SMOKE, "--config.model.side_interpolater=False", "--config.model.side_layers=2"],
        "model.side_layers=2 has no effect with model.side_interpolater=False",
    ),
    "symmetric and no side-interpolater": (
        [*SMOKE, "--config.model.side_interpolater=False", "--config.mask.asymmetric=False"],
        "no block would see the masked tokens",
    ),
    "nothing masked": (
        [*SMOKE, "--config.mask.ratio=0.0", "--config.mask.loss_on=masked"],
        "none of the 16 tokens is masked",
    ),
    "no side blocks": ([*SMOKE, "--config.model.side_layers=0"], "model.side_interpolater=False"),
    "passes": ([*SMOKE, "--config.mask.passes=some"], "must be one of both, full, masked"),
    "clipping": (
        [*SMOKE, "--config.sample.clip_denoised=perhaps"], "must be one of auto, true, false"
    ),
    "loss on": ([*SMOKE, "--config.mask.loss_on=kept"], "must be one of all, masked"),
    "loss weight": (
        [*SMOKE, "--config.diffusion.loss_weight=snr"], "must be one of uniform, min_snr_5"
    ),
    "optimiser": ([*SMOKE, "--config.optim.name=sgd"], "must be one of adamw, adan"),
    "schedule": (
        [*SMOKE, "--config.optim.schedule=step"], "must be one of constant, cosine, linear"
    ),
    "warm-up": (
        [*SMOKE, "--config.optim.warmup_steps=4"], "warmup_steps is 4; it must be below train.steps"
    ),
    "rising rate": (
        [*SMOKE, "--config.optim.schedule=linear", "--config.optim.end_lr=1"],
        "optim.end_lr is 1.0; it must be at most optim.lr 0.002",
    ),
    "end of a constant": (
        [*SMOKE, "--config.optim.end_lr=1e-5"],
        "optim.end_lr=1e-05 has no effect with optim.schedule=constant",
    ),
    "ImageNet": (["--config=configs/xl2.py"], "tfds build imagenet2012 --file_format=array_record"),
    "on the hub": (
        ["--config=configs/xl2.py", "--config.data.path=hf://datasets/ILSVRC/imagenet-1k"],
        "hf download ILSVRC/imagenet-1k --repo-type=dataset --include='*.parquet' --local-dir=",
    ),
    "no shards": (
        ["--config=configs/xl2.py", "--config.data.name=parquet", "--config.data.path=tests"],
        "data.path tests holds no *.parquet files",
    ),
    "nowhere": (["--config=configs/ffhq.py"], "data.path is empty, but data.name is folder"),
    "pixels of latents": ([*SMOKE, "--config.data.name=latents"], "requires vae.path"),
    "random middle": (
        [*SMOKE, "--config.data.name=latents", *VAE, "--config.data.crop=random"],
        "data.crop=random has no effect",
    ),
    "path of a package": ([*SMOKE, "--config.data.path=x"], "has no effect with data.name=digits"),
    "workers": ([*SMOKE, "--config.data.workers=-1"], "data.workers is -1"),
    "damaged": ([*SMOKE, "--config.data.max_damaged=-1"], "data.max_damaged is -1"),
    "crop": ([*SMOKE, "--config.data.crop=left"], "must be one of center, random"),
    "more than there is": ([*SMOKE, "--config.data.batch_size=2000"], "fewer than data.batch_size"),
    "latents of no size": (
        [*SMOKE, *VAE, "--config.data.image_size=20"], "must be a multiple of 8"
    ),
    "grey latents": (
        [*SMOKE, "--config.vae.path=vae", "--config.data.image_size=32"], "the VAE requires 3"
    ),
    "patches of latents": (
        [*SMOKE, *VAE, "--config.data.image_size=24"], "does not divide"
    ),
    "negative ratio": ([*SMOKE, "--config.mask.ratio=-0.1"], "mask.ratio is -0.1"),
    "nothing kept": ([*SMOKE, "--config.mask.ratio=0.99"], "leaves none of the 16 tokens"),
    "batch": ([*SMOKE, "--config.data.batch_size=0"], "data.batch_size is 0"),
    "learning rate": ([*SMOKE, "--config.optim.lr=nan"], "optim.lr is nan"),
    "steps": ([*SMOKE, "--config.train.steps=0"], "train.steps is 0"),
    "keep": ([*SMOKE, "--config.train.keep=0"], "train.keep is 0"),
    "remat": ([*SMOKE, "--config.train.remat=True"], "must be one of none, dots, full"),
    "accumulate": ([*SMOKE, "--config.train.accumulate=0"], "train.accumulate is 0"),
    "parts of a batch": (
        [*SMOKE, "--config.train.accumulate=3"],
        "data.batch_size 16 is not divisible by the 1 devices times train.accumulate 3",
    ),
    "fsdp": ([*SMOKE, "--config.mesh.fsdp=0"], "mesh.fsdp is 0"),
    "mesh": ([*SMOKE, "--config.mesh.data=-1"], "mesh.data is -1"),
    "mesh and devices": ([*SMOKE, "--config.mesh.data=2"], "does not match the 1 devices"),
    "dtype": ([*SMOKE, "--config.train.dtype=float16"], "train.dtype is 'float16'"),
    "data": ([*SMOKE, "--config.data.name=cifar"], "must be one of digits, "),
    "image size": ([*SMOKE, "--config.data.image_size=16"], "holds 8×8 images"),
    "more classes": ([*SMOKE, "--config.model.num_classes=20"], "has 10 classes"),
    "noise steps": ([*SMOKE, "--config.diffusion.steps=20"], "diffusion.steps is 20"),
    **{
        f"{field}={value}": ([*SMOKE, f"--config.{field}={value}"], f"{field} is {said}")
        for field, value, said in (
            ("model.hidden_size", 400_000_000, "400000000; it must be at most 65,536"),
            ("model.depth", 10**6, "1000000; it must be at most"),
            ("model.num_classes", 10**9, "1000000000; it must be at most"),
            ("data.batch_size", 10**9, "1000000000; it must be at most"),
            ("data.image_size", 10**6, "1000000; it must be at most"),
            ("data.workers", 10**6, "1000000; it must be at most"),
            ("diffusion.steps", 10**9, "1000000000; it must be at most"),
            ("sample.num_samples", 10**12, "1000000000000; it must be at most"),
            ("train.log_every", -1, "-1; it must be at least 1"),
            ("train.keep", 10**30, "a number of "),
            ("optim.ema_decay", "nan", "nan; it must be a finite number"),
            ("optim.warmup_steps", -1, "-1; it must be at least 0"),
            ("optim.end_lr", -1, "-1.0; it must be at least 0"),
            ("optim.weight_decay", -0.1, "-0.1; it must be at least 0"),
            ("optim.b1", 1, "1.0; it must be in [0, 1), or -1"),
            ("optim.b2", -0.5, "-0.5; it must be in [0, 1), or -1"),
            ("mask.ratio_max", "inf", "inf; it must be a finite number"),
            ("sample.guidance_scale", "1e39", "1e+39; it must be a finite number"),
        )
    },
    "more than the memory": (
        [*SMOKE, "--config.model.hidden_size=65536", "--config.model.depth=13"],
        "training takes at least 16,",
    ),
    "too many tokens": (
        [*SMOKE, *VAE, "--config.data.image_size=16384"], "makes 1,048,576 tokens"
    ),
    "flagfile": ([*SMOKE, "--flagfile=/nothing"], "unknown flag --flagfile"),
    "no path": (["--config="], "config file '' does not exist"),
    "two words": (["--config", "configs/nothing.py"], "nothing.py' does not exist"),
    "classes": ([*SMOKE, "--config.model.num_classes=5"], "has 10 classes"),
    "sampler": (
        [*SMOKE, "--config.sample.sampler=euler"],
        "sampler is euler; a network that predicts noise takes one of ddpm, ddim,",
    ),
    "sampler of v": (
        [*SMOKE, "--config.diffusion.objective=v", "--config.sample.sampler=euler"],
        "sampler is euler; a network that predicts v takes one of ddpm, ddim,",
    ),
    "sampler of flow": (
        [*SMOKE, "--config.diffusion.objective=flow"],
        "sampler is ddpm; a network that predicts velocity takes one of euler, heun",
    ),
    "spacing of flow": (
        [*SMOKE, *FLOW, "--config.sample.spacing=stride"], "the steps of flow are even"
    ),
    "times of noise": (
        [*SMOKE, "--config.diffusion.timesteps=logit_normal"],
        "diffusion.timesteps=logit_normal has no effect with diffusion.objective=epsilon",
    ),
    "times of v": (
        [*SMOKE, "--config.diffusion.objective=v", "--config.diffusion.timesteps=logit_normal"],
        "diffusion.timesteps=logit_normal has no effect with diffusion.objective=v",
    ),
    "guide": ([*SMOKE, "--config.sample.guide=network"], "must be one of null, masked"),
    "guide of a full pass": (
        [*SMOKE, "--config.mask.passes=full", "--config.sample.guide=masked"],
        "sample.guide=masked requires a decoder, and masked passes in training",
    ),
    "guide of nothing": (
        [*SMOKE, "--config.sample.guide=masked", "--config.sample.guide_ratio=0.99"],
        "sample.guide_ratio 0.99 leaves none of the 16 tokens",
    ),
    "guide without guidance": (
        [*SMOKE, "--config.sample.guide=masked", "--config.sample.guidance_scale=1"],
        "sample.guide=masked has no effect with sample.guidance_scale=1; raise the scale",
    ),
    "objective": (
        [*SMOKE, "--config.diffusion.objective=x0"], "must be one of epsilon, v, flow"
    ),
    "times": (
        [*SMOKE, *FLOW, "--config.diffusion.timesteps=cosine"],
        "must be one of uniform, logit_normal",
    ),
    "sampler steps": ([*SMOKE, "--config.sample.num_steps=1001"], "between 1 and the 1000 steps"),
    "guidance": (
        [*SMOKE, "--config.model.num_classes=0", "--config.sample.guidance_scale=2"],
        "takes no guidance",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name, tmp_path, capsys, monkeypatch, in_root, keep_signals):
    argv, message = BAD_CONFIGS[name]
    workdir = tmp_path / "run"
    argv = [*argv, f"--workdir={workdir}"]
    assert message in exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert not workdir.exists()


BAD_RECIPES = {
    "def get_config(": "SyntaxError",
    "x = 1": "defines no get_config()",
    "def get_config(): return None": "must return a ConfigDict, not None",
    "def get_config(): return {}": "must return a ConfigDict",
    "def get_config(): return undefined": "NameError: name 'undefined' is not defined",
    "def get_config(): return default().nothing": "AttributeError",
    "def get_config():\n c = default()\n c.optim.lrr = 1\n return c": "lrr",
    "def get_config():\n c = default()\n c.optim.lr = 'a'\n return c": "TypeError",
    "def get_config():\n c = default().unlock()\n del c['data']\n return c": "the group data",
    "def get_config():\n c = default()\n c.train.steps = None\n return c": "train.steps is None",
    "def get_config():\n c = default().unlock()\n c.optim.b = 1\n return c": "field optim.b",
}


@pytest.mark.parametrize("text", BAD_RECIPES)
def test_bad_recipe(text, tmp_path, capsys, monkeypatch, in_root, keep_signals):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"from mdt_jax.config import default\n{text}\n")
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    argv = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    assert BAD_RECIPES[text] in exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def refused(monkeypatch):
    """refused(folder): it may not be written to. Tests run as root, who may; so it is made up."""

    def refuse(folder):
        open_probe = tempfile.TemporaryFile

        def opened(*more, dir=None, **named):
            if dir == folder:
                raise PermissionError(errno.EACCES, "Permission denied")
            return open_probe(*more, dir=dir, **named)

        monkeypatch.setattr(tempfile, "TemporaryFile", opened)

    return refuse


def untouched(*_, **__):
    pytest.fail("it was begun")


@pytest.mark.parametrize("within", ["", "checkpoints", "samples", "best/checkpoints", "damaged"])
def test_a_workdir_of_somebody_else(
    within, tmp_path, refused, capsys, monkeypatch, in_root, keep_signals
):
    """It is told before data is read."""
    monkeypatch.setattr(inputs, "open_data", untouched)
    (tmp_path / within).mkdir(parents=True, exist_ok=True)
    refused(tmp_path / within)
    argv = [*SMOKE, f"--workdir={tmp_path}"]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert f"workdir {tmp_path / within} cannot be written to: Permission denied" in printed
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("command", "flags", "read"),
    [
        (sample, "--checkpoint=X --out=OUT.png", "sampling.pipeline.load"),
        (sample, "--checkpoint=X --out=OUT.npz", "sampling.pipeline.load"),
        (sample, "--checkpoint=X --out=OUT/", "sampling.pipeline.load"),
        (sample, "--checkpoint=X --out=OUT.gif --show=noise", "sampling.pipeline.load"),
        (inpaint, "--checkpoint=X --image=X --mask=X --out=OUT.png", "sampling.pipeline.load"),
        (encode, "--config=configs/xl2.py --out=OUT", "train.encoding._open_images"),
        (evaluate, "--samples=X --reference=digits --out=OUT.json", "evaluate.open_images"),
        (evaluate, "--make_reference=X --out=OUT.npz", "evaluate.open_images"),
        (evaluate, "--vae=X --images=X --out=OUT.json", "weights.vae.Vae.load"),
        (convert, "--src=X --dst=OUT.pt", "weights.networks.read_network"),
    ],
)
def test_an_out_of_somebody_else(
    command, flags, read, tmp_path, refused, capsys, monkeypatch, in_root
):
    """It is told before weights or images are read, also where the folder is yet to be made."""
    monkeypatch.setattr(f"mdt_jax.{read}", untouched)
    refused(tmp_path)
    for out in (tmp_path / "out", tmp_path / "new" / "out")[: 1 if command is convert else 2]:
        argv = flags.replace("OUT", str(out)).split()
        printed = exits_with_one_line(command.main, argv, capsys, monkeypatch)
        assert f"={out}" in printed and "cannot be written to: Permission denied" in printed
    assert list(tmp_path.iterdir()) == []


def test_workdir_missing_or_not_writable(capsys, monkeypatch, in_root, keep_signals):
    printed = exits_with_one_line(main.main, [*SMOKE], capsys, monkeypatch)
    assert "--workdir is missing" in printed
    printed = exits_with_one_line(main.main, [*SMOKE, "--workdir="], capsys, monkeypatch)
    assert "--workdir is missing" in printed
    argv = [*SMOKE, "--workdir=/dev/null/run"]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "workdir /dev/null/run cannot be written to" in printed


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--distributed=somewhere"], "must be auto, off or HOST:PORT"),
        (["--distributed=127.0.0.1:1"], "requires --num_processes and a --process_id below it"),
        (["--distributed=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "not 2 and 2"),
        (["--num_processes=2"], "require --distributed=HOST:PORT, not auto"),
        (["--patience=0"], "--patience=0 at least 5"),
        (["--profile_steps=3"], "must be FIRST:LAST, for example 10:13"),
    ],
)
def test_flags_that_make_no_sense(
    flags, line, tmp_path, capsys, monkeypatch, in_root, keep_signals
):
    argv = [*SMOKE, f"--workdir={tmp_path / 'run'}", *flags]
    assert line in exits_with_one_line(main.main, argv, capsys, monkeypatch)


def test_workdir_of_another_model(trained, capsys, monkeypatch, in_root, keep_signals):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    argv = [*SMOKE, f"--workdir={trained}", "--config.model.hidden_size=32"]
    printed = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "another model or optimiser (model.hidden_size is 16, not 32)" in printed
    assert before == {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}


BAD_SAMPLING = {
    "no checkpoint flag": (["--out=g.png"], "--checkpoint"),
    "no such path": (["--checkpoint=nothing", "--out=g.png"], "'nothing' does not exist"),
    "no checkpoint there": (["--checkpoint=.", "--out=g.png"], "holds no checkpoint"),
    "label": (["--checkpoint=RUN", "--out=g.png", "--labels=3,10"], "label 10 is outside"),
    "label unused": (
        ["--checkpoint=RUN", "--out=g.png", "--labels=3,10", "--num_samples=1"],
        "label 10 is outside",
    ),
    "not a label": (["--checkpoint=RUN", "--out=g.png", "--labels=cat"], "--labels=cat"),
    "steps": (["--checkpoint=RUN", "--out=g.png", "--num_steps=2000"], "1000 steps"),
    "sampler": (
        ["--checkpoint=RUN", "--out=g.png", "--sampler=x"],
        "sampler is 'x'; it must be one of ddpm",
    ),
    "scale": (["--checkpoint=RUN", "--out=g.png", "--vae_scale=0.5"], "RUN draws pixels"),
    "endless": (
        ["--checkpoint=RUN", "--out=g.png", "--vae_scale=inf"],
        "--vae_scale: inf must be positive and finite",
    ),
    "absurd count": (
        ["--checkpoint=RUN", "--out=g.png", f"--num_samples={10**12}"],
        "--num_samples is 1000000000000; it must be at most 10,000,000",
    ),
    "absurd batch": (["--checkpoint=RUN", "--out=g.png", f"--batch_size={10**12}"], "at most 131"),
    "absurd scale": (
        ["--checkpoint=RUN", "--out=g.png", "--guidance_scale=1,1e39"],
        "guidance_scale is 1e+39; it must be a finite number",
    ),
    "suffix": (
        ["--checkpoint=RUN", "--out=g.jpg"],
        "'.jpg'; use .png, .npz, or a name with /",
    ),
    "count": (
        ["--checkpoint=RUN", "--out=g.png", "--num_samples=0"],
        "--num_samples: 0 must be at least 1",
    ),
    "seed": (["--checkpoint=RUN", "--out=g.png", "--seed=-1"], "seed is -1"),
    "wrong type": (["--checkpoint=RUN", "--out=g.png", "--num_steps=ten"], "--num_steps"),
    "unknown flag": (["--checkpoint=RUN", "--out=g.png", "--stepps=3"], "--stepps"),
    "huge label": (["--checkpoint=RUN", "--out=g.png", f"--labels={10**20}"], "is outside"),
    "too large a grid": (
        ["--checkpoint=RUN", "--out=g.png", "--num_samples=1000000"],
        "g.png: a grid of 1000000 images would have 1.3e+09 pixels, more than 134217728",
    ),
    "too many frames": (
        ["--checkpoint=RUN", "--out=g.gif", "--show=trajectory", f"--frames={10**12}"],
        "--frames is 1000000000000; it must be at most 10,000",
    ),
    "empty labels": (
        ["--checkpoint=RUN", "--out=g.png", "--labels="],
        "--labels=: '' is no class",
    ),
    "hole in labels": (
        ["--checkpoint=RUN", "--out=g.png", "--labels=1,,2"],
        "'' is no class",
    ),
    "batch size": (
        ["--checkpoint=RUN", "--out=new/g.png", "--batch_size=0"],
        "--batch_size: 0 must be",
    ),
    "empty path": (["--checkpoint=", "--out=g.png"], "checkpoint '' does not exist"),
    "long path": ([f"--checkpoint={'a' * 300}", "--out=g.png"], "does not exist"),
    "channels": (
        ["--checkpoint=RUN", "--out=g.png", "--guidance_channels=x"],
        "expected a number of channels or all",
    ),
    "out is a folder": (["--checkpoint=RUN", "--out=/proc/g.png"], "cannot be written"),
    "out is nowhere": (["--checkpoint=RUN", "--out=/dev/null/g.png"], "--out=/dev/null/g.png"),
}


@pytest.mark.parametrize("name", BAD_SAMPLING)
def test_bad_sampling(name, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = BAD_SAMPLING[name]
    *argv, message = (text.replace("RUN", str(trained)) for text in (*argv, message))
    assert message in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_info_knows_the_same_mistakes(capsys, monkeypatch, in_root):
    argv = [SMOKE[0], "--config.model.version=v2", "--config.model.depth=4"]
    printed = exits_with_one_line(info.main, argv, capsys, monkeypatch)
    assert "3 encoder blocks" in printed
    assert "required: --config" in exits_with_one_line(info.main, [], capsys, monkeypatch)


SMOKE_CONFIG = f"--config={ROOT}/configs/digits.py:smoke"
URLS = {
    "workdir": (main, [SMOKE_CONFIG, "--workdir=az://b/x"]),
    "workdir on the hub": (main, [SMOKE_CONFIG, "--workdir=hf://b/x"]),
    "config": (main, ["--config=az://b/x.py", "--workdir=run"]),
    "config of two words": (info, ["--config", "https://b/x.py"]),
    **{
        field: (main, [SMOKE_CONFIG, "--workdir=run", f"--config.{field}=abfs://b/x"])
        for field in (
            "data.path", "vae.path", "init.checkpoint", "evaluation.reference",
            "evaluation.inception",
        )
    },
    "a field of info": (info, [SMOKE_CONFIG, "--config.data.path=az://b/x"]),
    "latents": (encode, [SMOKE_CONFIG, "--out=az://b/x"]),
    "npz": (sample, [f"--checkpoint={DIGITS}", "--out=az://b/x.npz"]),
    "picture": (sample, [f"--checkpoint={DIGITS}", "--out=GS://b/x.png"]),
    "folder": (sample, [f"--checkpoint={DIGITS}", "--out=file:///x/"]),
    "labels": (sample, [f"--checkpoint={DIGITS}", "--out=x.npz", "--labels=az://b/x.txt"]),
    "checkpoint": (sample, ["--checkpoint=az://b/x", "--out=x.npz"]),
    "vae": (sample, [f"--checkpoint={DIGITS}", "--out=x.npz", "--vae=https://b/x"]),
    "samples": (evaluate, ["--samples=az://b/x.npz", "--reference=digits"]),
    "reference": (evaluate, ["--samples=x.npz", "--reference=hf://b/x.npz"]),
    "inception": (evaluate, ["--samples=x", "--reference=y", "--inception=az://b/x"]),
    "dinov2": (evaluate, ["--samples=x", "--reference=y", "--dinov2=az://b/x"]),
    "card": (evaluate, ["--samples=x", "--reference=y", "--out=az://b/x.json"]),
    "new reference": (evaluate, ["--make_reference=az://b/x", "--out=x.npz"]),
    "images": (evaluate, ["--vae=x", "--images=az://b/x"]),
    "a VAE": (evaluate, ["--vae=az://b/x", "--images=x"]),
    "source": (convert, ["--src=az://b/x.pt", "--dst=x.pt"]),
    "destination": (convert, [f"--src={DIGITS}", "--dst=az://b/x.pt"]),
    "image": (inpaint, ["--checkpoint=x", "--image=az://b/x", "--mask=m", "--out=o.png"]),
    "mask": (inpaint, ["--checkpoint=x", "--image=i", "--mask=az://b/x", "--out=o.png"]),
    "inpainted": (inpaint, ["--checkpoint=x", "--image=i", "--mask=m", "--out=az://b/x.png"]),
}  # fmt: skip


@pytest.mark.parametrize("name", URLS)
def test_urls_are_refused_at_once(name, tmp_path, capsys, monkeypatch, keep_signals):
    monkeypatch.chdir(tmp_path)
    command, argv = URLS[name]
    line = exits_with_one_line(command.main, argv, capsys, monkeypatch)
    assert "is a URL, and mdt_jax reads and writes local files" in line and "://" in line
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder(tmp_path, capsys, monkeypatch, keep_signals):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "labels.txt").write_text("3\n")
    run_here(sample.main, *SAMPLE, "--labels=~/labels.txt", "--out=~/x.png", cwd=tmp_path)
    assert (tmp_path / "home" / "x.png").is_file()
    (tmp_path / "home" / "recipe.py").write_text((ROOT / "configs" / "digits.py").read_text())
    argv = ["--config=~/recipe.py:smoke", "--workdir=~/run", "--config.init.checkpoint=~/no.pt"]
    line = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert f"{tmp_path}/home/no.pt does not exist" in line
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


UNREADABLE = [
    "lr[1e-4]",
    "a*b",
    "why?",
    "back\\slash",
    "runs[1]/x",
    "a.orbax-checkpoint-tmp/x",
    "\udcff",
]


@pytest.mark.parametrize("name", UNREADABLE, ids=ascii)
def test_folders_that_orbax_cannot_read_back(name, tmp_path, capsys, monkeypatch, keep_signals):
    monkeypatch.chdir(tmp_path)
    argv = [SMOKE_CONFIG, f"--workdir={name}"]
    line = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    said = name.encode(errors="backslashreplace").decode()
    assert f"{tmp_path}/{said} has " in line and "choose another name" in line
    argv = [f"--src={DIGITS}", f"--dst={name}"]
    line = exits_with_one_line(convert.main, argv, capsys, monkeypatch)
    assert "; choose another name" in line
    assert list(tmp_path.iterdir()) == []
    # The folder that one works in counts, too, and one that is there already says so.
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)
    line = exits_with_one_line(main.main, [SMOKE_CONFIG, "--workdir=run"], capsys, monkeypatch)
    assert "choose another name, or rename the folder" in line
    argv = ["--checkpoint=.", "--out=x.png"]
    assert "or rename" in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert not list((tmp_path / name).iterdir())


def test_what_names_and_values_hold_reaches_no_terminal():
    """Of damaged files, and of other people's."""
    line = cli.one_line(UserError("a\x1b[2Jb\udcffc\n d\xa0é: " + "x" * 5000 + "; remove it"))
    assert line.startswith("a\\x1b[2Jb\\udcffc d é: xxx") and line.endswith("xxx; remove it")
    assert len(line) < 1010
    assert cli.one_line(KeyError("of our own")) == ""


def too_many_files(_):
    try:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x")
    except OSError:
        raise RuntimeError("no such attribute") from None  # as libraries do


def said_by_a_library(_):
    raise RuntimeError("RESOURCE_EXHAUSTED: opening x: Too many open files")


def system_is_full(_):
    raise ExceptionGroup("two", [ValueError("y"), OSError(errno.ENFILE, os.strerror(errno.ENFILE))])


def file_of_ours(_):
    try:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x")
    except OSError:
        raise UserError("x cannot be read") from None


def no_memory(_):
    np.empty(2**60, np.uint8)


def no_memory_of_a_device(_):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.\ndump")


@pytest.mark.parametrize(
    "main_, line",
    [
        (too_many_files, "too many open files: this process may open LIMIT at once"),
        (said_by_a_library, "too many open files: this process may open LIMIT at once"),
        (system_is_full, "too many open files: this process may open LIMIT at once"),
        (file_of_ours, "x cannot be read (too many open files: this process may open LIMIT"),
        (no_memory, "out of memory: a smaller batch_size or image_size, a smaller network or more"),
        (no_memory_of_a_device, "take less (RESOURCE_EXHAUSTED: Out of memory allocating 12345"),
    ],
)
def test_limits_of_the_machine_are_one_line(main_, line, capsys, monkeypatch):
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back at the end
    printed = exits_with_one_line(main_, [], capsys, monkeypatch)
    assert line.replace("LIMIT", str(soft)) in printed
