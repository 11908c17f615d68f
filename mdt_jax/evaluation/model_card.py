"""The model card of a repository on the hub: its README.md, with the figures that were measured."""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from mdt_jax import config as configs
from mdt_jax.config.rules import get
from mdt_jax.data import sample_notes
from mdt_jax.evaluation.card import TITLES
from mdt_jax.models.autoencoder import AutoencoderKL, LatentNorm
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import files
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import escape, log
from mdt_jax.weights.kinds import Weights, describe, kind_of
from mdt_jax.weights.vae import norm_of

# Tags of other networks than MDT and DiT.
KINDS = {"vae": "autoencoder", "inception": "inception", "dinov2": "dinov2"}
ITEMS = {"ema": ", the EMA", "raw": ", the raw ones"}
# What a card says of how samples were drawn → the name in the table.
DRAWN = {
    "sampler": "sampler", "num_steps": "steps", "guidance_scale": "guidance scale",
    "guidance_power": "guidance power", "guidance_channels": "guided channels", "seed": "seed",
    "labels": "labels", "step": "step of the run", "parameters": "parameters",
    "parameters_sha256": "SHA-256 of the parameters", "vae": "VAE",
    "vae_sha256": "SHA-256 of the VAE", "dtype": "dtype",
    "precision": "precision of float32 matmuls",
}  # fmt: skip


def read_card(path: str, sha256: str) -> dict[str, Any]:
    """A card that `mdt_jax.evaluate` wrote of the weights with this `params_sha256`.

    Raises UserError for another file, and for a card of other weights.
    """
    card = files.read_json(files.as_path(path))
    if card is None:
        raise UserError(f"--card={path} does not exist")
    if "mdt_jax" not in card or not isinstance(card.get("measured"), dict):
        raise UserError(f"--card={path} is no card of mdt_jax.evaluate")
    found = _weights_of(card)
    if found != sha256:
        of = f"weights of SHA-256 {found[:12]}, not {sha256[:12]}" if found else "unknown weights"
        raise UserError(
            f"--card={path} is of {of}: measure samples that mdt_jax.sample drew from the weights "
            "that you upload"
        )
    return card


def _weights_of(card: Mapping[str, Any]) -> str:
    """The hash of the parameters that were measured; "" where it is not known."""
    found = _drawn(card).get("parameters_sha256", card.get("vae_sha256"))
    return found if isinstance(found, str) else ""


def _drawn(card: Mapping[str, Any]) -> dict[str, Any]:
    samples = card.get("samples")
    how = samples.get("how") if isinstance(samples, dict) else None
    return how if isinstance(how, dict) else {}


def cards_of_run(workdir: str, weights: Weights, sha256: str) -> list[dict[str, Any]]:
    """The cards of a run's samples.npz: that of `mdt_jax.evaluate`, else what report.json has.

    Those of other weights than `sha256` are left out, with a line on stderr. [] for other paths.
    """
    folder = files.as_path(workdir)
    samples = folder / "samples.npz"
    if weights.config is None or not files.is_file(samples):
        return []
    card = files.read_json(folder / "samples.npz.json")
    if card is None:
        report = files.read_json(folder / "report.json") or {}
        how = sample_notes.parsed(sample_notes.note_of(samples)) or {}
        reference = weights.config.evaluation.reference
        card = {
            "mdt_jax": how.get("mdt_jax"),
            "measured": {name: report[name] for name in TITLES if name in report},
            "samples": {
                "sha256": files.file_sha256(samples),
                "images": report.get("num_samples"),
                "how": how,
            },
            "reference": {"path": reference or f"{weights.config.data.name}, held out"},
        }
    if not card.get("measured"):
        return []
    if _weights_of(card) != sha256:
        log(f"{samples} is of other weights; its figures are left out of the model card")
        return []
    return [card]


def render(path: str, weights: Weights, sha256: str, cards: Sequence[Mapping[str, Any]]) -> str:
    """The text of README.md, Markdown after YAML.

    path: hf://… of the repository. sha256: of the parameters. cards: as of `read_card`.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    facts = {
        "network": describe(weights.model),
        "parameters": f"{count:,}{ITEMS.get(weights.item or '', '')}",
        "step of the run": weights.step,
        "SHA-256 of the parameters": sha256,
    }
    title = path.removeprefix("hf://").partition("@")[0]
    parts = [_front_matter(weights), f"# {title}", _table("network", "value", facts)]
    if isinstance(weights.model, MDT):
        parts.append(_usage(path, weights))
    if cards:
        parts.append("## Figures")
        parts += [part for card in cards for part in _figures(card)]
    if weights.config is not None:
        default = configs.default()
        fields = {
            f"{group}.{name}": value
            for group, names in weights.config.to_dict().items()
            for name, value in names.items()
            if value != get(default, f"{group}.{name}")
        }
        parts += ["## Config", "The fields that differ from the defaults; config.json has all."]
        parts.append(_table("field", "value", fields))
    return "\n\n".join(parts) + "\n"


def _front_matter(weights: Weights) -> str:
    """The fields by which the hub finds and shows a model."""
    model, lines = weights.model, ["---", "library_name: mdt_jax"]
    tags = [KINDS.get(kind_of(model), "mdt"), "jax"]
    if isinstance(model, MDT):
        tags[0] = "mdt" if model.decoder_layers else "dit"
        lines.append("pipeline_tag: unconditional-image-generation")
        tags += ["diffusion", "image-generation"]
        tags += ["class-conditional"] if model.num_classes else []
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _usage(path: str, weights: Weights[MDT]) -> str:
    """How to load the model and sample from it, in Python and by command."""
    model, config = weights.model, weights.config
    own = config.vae.path if config is not None else weights.vae or ""
    vae = own if config is None and own.startswith("hf://") else ""
    known = config is None or norm_of(config) == LatentNorm()
    is_sd = known and model.in_channels == AutoencoderKL.latent_channels
    if is_sd and not own.startswith("hf://"):
        vae = "hf://stabilityai/sd-vae-ft-mse"  # which a path on another machine does not name
    python, flag = (f', vae="{vae}"', f" --vae={vae}") if vae else ("", "")
    labels = [number % max(1, model.num_classes) for number in range(3)]
    text = ",".join(map(str, labels))
    which = f" --labels={text}" if model.num_classes else " --num_samples=3"
    return f"""## Use

```python
import mdt_jax

pipeline = mdt_jax.load("{path}"{python})
images = pipeline.to_images(pipeline.generate({labels}))  # uint8
```

```bash
python -m mdt_jax.sample --checkpoint={path}{flag}{which} --out=samples.png
```"""


def _figures(card: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a card, and how they were measured."""
    measured, how = card["measured"], _drawn(card)
    samples, reference = (_part(card, name) for name in ("samples", "reference"))
    yield _table(
        "figure",
        "value",
        {TITLES[name]: measured[name] for name in TITLES if measured.get(name) is not None},
    )
    settings = {title: how.get(name) for name, title in DRAWN.items()}
    settings |= {
        "samples": samples.get("images"),
        "SHA-256 of the samples": samples.get("sha256"),
        "reference": _name(reference.get("path")),
        "SHA-256 of the reference": reference.get("sha256"),
        "mdt_jax": card.get("mdt_jax"),
    }
    yield _table("measured with", "value", settings)


def _part(card: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = card.get(name)
    return part if isinstance(part, dict) else {}


def _name(path: object) -> str | None:
    """A path without its folders, which mean nothing on another machine."""
    return pathlib.PurePosixPath(path).name if isinstance(path, str) else None


def _table(first: str, second: str, rows: Mapping[str, Any]) -> str:
    """A Markdown table; None is left out."""
    lines = [f"| {first} | {second} |", "| --- | --- |"]
    for name, value in rows.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            if isinstance(value, float):
                text = f"{value:.6g}"
            lines.append(f"| {name} | {escape(text)[:500].replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
