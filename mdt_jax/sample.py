"""Sample: python -m mdt_jax.sample --checkpoint=runs/digits --labels=0,1,2 --out=grid.png

Writes a PNG grid, or an .npz (arr_0 uint8 [N, H, W, C], arr_1 labels) that ADM's evaluator reads.
"""

import dataclasses
import pathlib

import numpy as np

from mdt_jax import cli
from mdt_jax.data.images import save_grid, save_npz, to_uint8
from mdt_jax.errors import UserError
from mdt_jax.sampling import SampleOptions, balanced_labels, check_labels, check_seed, generate
from mdt_jax.train.checkpoints import load_run

WRITERS = {".png": lambda path, images, _: save_grid(path, images), ".npz": save_npz}


def channels(text: str) -> int:
    """A number of channels, or "all"."""
    return 0 if text == "all" else int(text)


def parse(argv: list[str]):
    parser = cli.Parser(prog="python -m mdt_jax.sample", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a workdir, its checkpoints folder, or one step of it")
    add("--out", required=True, help="grid.png or samples.npz")
    add("--num_samples", type=int, default=100)
    add("--labels", help="classes, taken in turn: 0,1,2 (default: all)")
    add("--seed", type=int, default=0, help="sample n depends on the seed, n and its label alone")
    add("--batch_size", type=int, default=100, help="changes the speed, not the samples")
    group = parser.add_argument_group("overriding the checkpoint's own settings")
    group.add_argument("--sampler", help="ddpm or ddim")
    group.add_argument("--num_steps", type=int)
    group.add_argument("--spacing", help="even or stride")
    group.add_argument("--guidance_scale", type=float)
    group.add_argument("--guidance_power", type=float, help="0: constant weight")
    group.add_argument("--guidance", help="power_cosine or power_cosine_printed")
    group.add_argument("--guidance_channels", type=channels, help="the first N channels, or all")
    return parser.parse_args(argv[1:])


def parse_labels(text: str | None, num_samples: int, num_classes: int) -> np.ndarray:
    """`num_samples` labels: those of the text in turn, or all classes in turn."""
    if text is None:
        return balanced_labels(num_samples, num_classes)
    if not num_classes:
        raise UserError("--labels was given, but the model is unconditional")
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--labels={text} is not a list of class numbers such as 0,1,2") from None
    check_labels(labels, num_classes)
    return np.resize(np.asarray(labels, np.int32), num_samples)


def check_writable(out: pathlib.Path) -> None:
    """Raise UserError now rather than after all samples are drawn."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe = out.with_name(f"{out.name}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None


def main(argv: list[str]) -> None:
    """Parse the flags, load the EMA parameters, sample, write."""
    args = parse(argv)
    out = pathlib.Path(args.out)
    if out.suffix not in WRITERS:
        raise UserError(f"--out={out}: unknown suffix {out.suffix!r}; use {' or '.join(WRITERS)}")
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    check_seed(args.seed)
    model, params, config = load_run(args.checkpoint)
    fields = [field.name for field in dataclasses.fields(SampleOptions)]
    given = {name: getattr(args, name, None) for name in fields}
    options = dataclasses.replace(
        SampleOptions.from_config(config),
        **{name: value for name, value in given.items() if value is not None},
    )
    options.check(model.num_classes)
    labels = parse_labels(args.labels, args.num_samples, model.num_classes)
    check_writable(out)
    samples = generate(
        model,
        params,
        labels,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=True,
        options=options,
    )
    WRITERS[out.suffix](str(out), to_uint8(samples), labels)
    print(f"wrote {len(labels)} samples to {out}")


if __name__ == "__main__":
    cli.run(main)
