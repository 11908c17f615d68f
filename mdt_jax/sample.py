"""Sample: python -m mdt_jax.sample --checkpoint=runs/digits --labels=0,1,2 --out=grid.png

Writes a PNG grid, or an .npz (arr_0 uint8 [N, H, W, C], arr_1 labels) that ADM's evaluator reads;
how they came about is kept inside. A model of latents needs a VAE: --vae=hf://OWNER/REPOSITORY.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from mdt_jax import __version__, cli
from mdt_jax.data.classes import imagenet_label, imagenet_names
from mdt_jax.data.images import save_grid, save_npz, to_uint8
from mdt_jax.errors import UserError
from mdt_jax.files import beside
from mdt_jax.sampling import SampleOptions, balanced_labels, check_labels, check_seed, generate
from mdt_jax.vae import VAE_SCALE, decode
from mdt_jax.weights import describe, load_vae, load_weights

WRITERS = {
    ".png": lambda path, images, labels, note: save_grid(path, images, note=note),
    ".npz": save_npz,
}
PIXELS = "identity"


def channels(text: str) -> int:
    """A number of channels, or "all"."""
    return 0 if text == "all" else int(text)


def parse(argv: list[str]):
    parser = cli.Parser(prog="python -m mdt_jax.sample", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a workdir or a step of it, .pt, .safetensors, hf://…")
    add("--out", required=True, help="grid.png or samples.npz")
    add("--num_samples", type=int, help="default: as many as --labels, or 100 without")
    add("--labels", help='classes, taken in turn: 0,1,2 or "golden retriever" (default: all)')
    add("--seed", type=int, default=0, help="sample n depends on the seed, n and its label alone")
    add("--batch_size", type=int, default=100, help="changes the speed, not the samples")
    add("--vae", help="a file, a folder or hf://OWNER/REPOSITORY; default: the run's own")
    add(
        "--vae_scale",
        type=float,
        help=f"of a file's latents (default: {VAE_SCALE})",
    )
    add("--decoder_layers", type=int, help="what MDT v1's published files do not tell (default: 2)")
    group = parser.add_argument_group("overriding the checkpoint's own settings")
    group.add_argument("--sampler", help="ddpm or ddim")
    group.add_argument("--num_steps", type=int)
    group.add_argument("--spacing", help="even or stride")
    group.add_argument("--guidance_scale", type=float)
    group.add_argument("--guidance_power", type=float, help="0: constant weight")
    group.add_argument("--guidance", help="power_cosine or power_cosine_printed")
    group.add_argument("--guidance_channels", type=channels, help="the first N channels, or all")
    return parser.parse_args(argv[1:])


def parse_labels(
    text: str | None, num_samples: int | None, num_classes: int, classes: Sequence[str] = ()
) -> np.ndarray:
    """`num_samples` labels: those of the text in turn, or all classes in turn."""
    if text is None:
        return balanced_labels(100 if num_samples is None else num_samples, num_classes)
    if not num_classes:
        raise UserError("--labels was given, but the model is unconditional")
    labels = [parse_label(part.strip(), text, num_classes, classes) for part in text.split(",")]
    check_labels(labels, num_classes)
    return np.resize(np.asarray(labels, np.int32), num_samples or len(labels))


def parse_label(part: str, text: str, num_classes: int, classes: Sequence[str] = ()) -> int:
    """A class number, or a name: the run's own, or for a thousand classes ImageNet's."""
    try:
        return int(part)
    except ValueError:
        if part in classes:
            return classes.index(part)
        if part and num_classes == len(imagenet_names()):
            return imagenet_label(part)
        names = [name for name in classes if not name.isdigit()]
        hint = f", nor a class of the run such as {names[0]}" if part and names else ""
        raise UserError(
            f"--labels={text} is not a list of class numbers such as 0,1,2{hint}"
        ) from None


def check_writable(out: pathlib.Path) -> None:
    """Raise UserError now rather than after all samples are drawn."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe = beside(out)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None


def find_vae(args, config, model):
    """(path, scale, network, parameters) of the VAE that decodes, or None for a model of pixels."""
    path = args.vae or (config.vae.path if config is not None else None)
    if path == PIXELS and model.in_channels not in (1, 3):
        raise UserError(f"--vae={PIXELS}, but {model.in_channels} channels are no picture's")
    if path == PIXELS or (path is None and model.in_channels in (1, 3)):
        if args.vae_scale is not None:
            raise UserError(f"--vae_scale is for latents; {args.checkpoint} draws pixels")
        return None
    if path is None:
        raise UserError(
            f"{args.checkpoint} draws latents of {model.in_channels} channels; to make pictures of "
            "them say --vae=hf://stabilityai/sd-vae-ft-mse, or where the VAE lies"
        )
    scale = config.vae.scale if config is not None else args.vae_scale or VAE_SCALE
    if args.vae_scale not in (None, scale):
        raise UserError(
            f"--vae_scale={args.vae_scale}, but {args.checkpoint} was trained with {scale}"
        )
    vae, params = load_vae(path)
    if vae.latent_channels != model.in_channels:
        raise UserError(
            f"the latents of {path} have {vae.latent_channels} channels, but the model draws "
            f"{model.in_channels}"
        )
    return path, scale, vae, params


def main(argv: list[str]) -> None:
    """Parse the flags, load the EMA parameters, sample, decode, write."""
    args = parse(argv)
    out = pathlib.Path(args.out)
    if out.suffix not in WRITERS:
        raise UserError(f"--out={out}: unknown suffix {out.suffix!r}; use {' or '.join(WRITERS)}")
    for name in ("num_samples", "batch_size", "vae_scale"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name}={value} must be positive, and finite")
    check_seed(args.seed)
    found = load_weights(args.checkpoint, decoder_layers=args.decoder_layers)
    model, params, config, item, classes = found
    fields = [field.name for field in dataclasses.fields(SampleOptions)]
    given = {name: getattr(args, name, None) for name in fields}
    options = dataclasses.replace(
        SampleOptions.from_config(config) if config is not None else SampleOptions(),
        **{name: value for name, value in given.items() if value is not None},
    )
    options.check(model.num_classes)
    labels = parse_labels(args.labels, args.num_samples, model.num_classes, classes)
    decoder = find_vae(args, config, model)
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
    note = {
        "mdt_jax": __version__,
        "checkpoint": args.checkpoint,
        "parameters": item or "those of the file",
        "network": describe(model),
        "labels": args.labels or "all classes in turn",
        "num_samples": len(labels),
        "seed": args.seed,
        **dataclasses.asdict(options),
    }
    if decoder is not None:
        path, scale, vae, vae_params = decoder
        note |= {"vae": path, "vae_scale": scale}
        samples = decode(vae, vae_params, samples, scale=scale, progress=True)
    WRITERS[out.suffix](str(out), to_uint8(samples), labels, json.dumps(note))
    print(f"wrote {len(labels)} samples to {out}")


if __name__ == "__main__":
    cli.run(main)
