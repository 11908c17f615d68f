"""A checkpoint and what sampling needs of it: network, options, classes, VAE, images, note."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import __version__
from mdt_jax.data.classes import parse_label
from mdt_jax.data.images import UINT8_RULE, to_uint8
from mdt_jax.diffusion.options import (
    OWN_GUIDES,
    PREDICTS,
    SAMPLERS_OF,
    SampleOptions,
    check_labels,
    defaults,
)
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts
from mdt_jax.runtime.backend import keep_compilations
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling import generation, inpainting
from mdt_jax.sampling.generation import Request, changed
from mdt_jax.sampling.labels import describe_labels
from mdt_jax.weights.kinds import Weights, describe, params_sha256
from mdt_jax.weights.networks import load_weights
from mdt_jax.weights.vae import RECORDED, Vae, norm_of, recorded_norm, slice_size, text_of

PIXELS = "identity"  # vae.path of a model of pixels
SD_VAE = "hf://stabilityai/sd-vae-ft-mse"  # the released models'


class Pipeline(tuple[MDT, dict]):
    """(model, params) of a checkpoint, and what else sampling needs: `model, params = pipeline`.

    path: the checkpoint's name. weights: all that was read from it, for example its step. options:
    SampleOptions, as the run's config has them or as published. scales: guidance scales that
    samples take in turn; empty if all have `options.guidance_scale`. guide: the pipeline of the
    network that guides this one, or None.
    """

    path: str
    weights: Weights[MDT]
    options: SampleOptions
    scales: tuple[float, ...]
    guide: "Pipeline | None"
    _vae: Vae | str | None
    _vae_scale: float | None

    def __new__(
        cls,
        path: str,
        weights: Weights[MDT],
        *,
        vae: Vae | str | None = None,
        vae_scale: float | None = None,
        guide: "str | os.PathLike | Pipeline | None" = None,
        **options: Any,
    ) -> "Pipeline":
        """Of weights in memory; vae, vae_scale, guide, options: as `load` takes them."""
        pipeline = super().__new__(cls, (weights.model, weights.params))
        pipeline.path, pipeline.weights = path, weights
        pipeline._vae, pipeline._vae_scale = vae, vae_scale
        scales = np.atleast_1d(options.pop("guidance_scale", ())).tolist()
        if len(scales) == 1:
            options["guidance_scale"] = scales.pop()
        pipeline.scales = tuple(scales)
        own = changed(defaults(weights.model.num_classes), dict(weights.sampling))
        if weights.config is not None:
            own = SampleOptions.from_config(weights.config)
            if options.get("objective", own.objective) != own.objective:
                raise UserError(
                    f"objective is {options['objective']}, but {path} was trained with "
                    f"{own.objective}"
                )
        if options.get("objective", own.objective) != own.objective:
            samplers = SAMPLERS_OF.get(options["objective"], [own.sampler])
            own = changed(own, {"sampler": next(iter(samplers))})
        own = own.clipping_for(_is_pixels(weights.model, vae))
        pipeline.guide = None
        pipeline.options = changed(own, options)
        if isinstance(guide, str) and guide in OWN_GUIDES:
            pipeline.options = changed(pipeline.options, {"guide": guide})
        elif guide is not None:
            pipeline.options = changed(pipeline.options, {"guide": "network"})
            pipeline.guide = pipeline._load_guide(guide)
        return pipeline

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        params: str = "ema",
        decoder_layers: int | None = None,
        input_size: tuple[int, int] | None = None,
        *,
        num_heads: int | None = None,
        dtype: str | None = None,
        vae: str | None = None,
        vae_scale: float | None = None,
        guide: "str | os.PathLike | Pipeline | None" = None,
        **options: Any,
    ) -> "Pipeline":
        """Load a network and its parameters, on the default device.

        path: a workdir, its checkpoints folder, one step of it, a folder that `convert` wrote, a
        published file (.pt, .pth, .bin, .ckpt, .safetensors, .safetensors.index.json), a
        folder with one, or hf://OWNER/REPOSITORY[@REVISION][/FILE].
        params: "ema", or "raw" for the parameters that the optimiser updates; most files have only
        one kind. decoder_layers: of a published file of MDT v1, which does not state it (None: 2).
        num_heads: of a published file of DiT or SiT, which does not state it (None: as released).
        input_size: (H, W) of the latents or pixels that the model takes. Weights for another size
        are resampled, with a line on stderr.
        dtype: of matmuls and activations, "float32" or "bfloat16"; None: the run's.
        vae, vae_scale: of a model of latents, the path of its VAE and the factor of its latents;
        None: as the run's config says. The VAE is read on first use.
        guide: what guidance leads away from: "null", "masked", or a weaker network, as a path like
        the first or a pipeline. It predicts what this network predicts, for the same input size,
        and has the same classes, or none.
        options: other fields of SampleOptions that replace the checkpoint's; guidance_scale may be
        several scales, which samples take in turn.
        From now on compiled programs are cached on disk, as by the commands, unless JAX is
        configured otherwise.
        Raises UserError if the path holds nothing, damaged data or another network, and for
        options that cannot be sampled with.
        """
        keep_compilations()
        weights = load_weights(path, params, decoder_layers, input_size, num_heads)
        if dtype is not None:
            weights = weights._replace(model=weights.model.clone(dtype=jnp.dtype(dtype)))
        pipeline = cls(str(path), weights, vae=vae, vae_scale=vae_scale, guide=guide, **options)
        pipeline.options.check(pipeline.model.num_classes)
        return pipeline

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "Pipeline":
        """Load the --checkpoint of a command as its other flags say; those not given are None."""
        names = ("decoder_layers", "num_heads", "dtype", "vae", "vae_scale")
        given = {name: flags[name] for name in names if flags.get(name) is not None}
        return cls.load(flags["checkpoint"], **given, **_options(flags))

    def with_flags(self, flags: Mapping[str, Any]) -> "Pipeline":
        """The same network and VAE, with the sampling options of a command's flags.

        Flags that are not given are None. Raises UserError.
        """
        vae = self.vae
        loaded = {"vae": self._vae} if vae is None else {"vae": vae}
        pipeline = type(self)(self.path, self.weights, **loaded, **_options(flags))
        pipeline.options.check(self.model.num_classes)
        pipeline.__dict__["params_sha256"] = self.params_sha256
        return pipeline

    def _load_guide(self, guide: "str | os.PathLike | Pipeline") -> "Pipeline":
        """The weaker network. Raises UserError for one that predicts something else."""
        if not isinstance(guide, Pipeline):
            weights = load_weights(guide)
            model = weights.model.clone(dtype=self.model.dtype)
            guide = type(self)(str(guide), weights._replace(model=model))
        objective, steps = self.options.objective, self.options.diffusion_steps
        pairs = []
        if guide.config is None and "objective" not in guide.weights.sampling:
            hosts.log0(
                f"{guide.path} does not record what it predicts: taken for {PREDICTS[objective]}"
            )
        else:
            pairs.append(("objective", guide.options.objective, objective))
        if guide.config is not None and objective != "flow":
            pairs.append(("diffusion_steps", guide.options.diffusion_steps, steps))
        if guide.config is not None and self.config is not None:
            pairs.append(("latents normalised by", *map(norm_of, (guide.config, self.config))))
        if guide.classes and self.classes:
            pairs.append(("the classes", *(",".join(p.classes) for p in (guide, self))))
        if None not in (hashes := [p.weights.vae_sha256 for p in (guide, self)]):
            pairs.append(("a VAE of SHA-256", *hashes))
        for name, theirs, wanted in pairs:
            if theirs != wanted:
                raise UserError(
                    f"{guide.path} has {name} {str(theirs)[:100]}, but {self.path}, which it is to "
                    f"guide, has {str(wanted)[:100]}"
                )
        return guide

    def __repr__(self) -> str:
        return f"Pipeline({self.path!r})"

    @property
    def model(self) -> MDT:
        """The network."""
        return self.weights.model

    @property
    def params(self) -> dict:
        """The network's parameters."""
        return self.weights.params

    @property
    def config(self) -> ConfigDict | None:
        """The config of the run; None for a file."""
        return self.weights.config

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of class 0, 1, … in the run's data; empty if they are not known."""
        return self.weights.classes

    @functools.cached_property
    def params_sha256(self) -> str:
        """The hash of the parameters that notes of samples have."""
        return params_sha256(self.params)

    @functools.cached_property
    def vae(self) -> Vae | None:
        """The VAE of a model of latents, read on first use; None for a model of pixels.

        Raises UserError if its path is not known, or its latents are not the model's.
        """
        return self._vae if isinstance(self._vae, Vae) else self._load_vae(self._vae)

    def _load_vae(self, given: str | None) -> Vae | None:
        """given: the path of the VAE that replaces the run's own."""
        config, channels = self.config, self.model.in_channels
        path = given or (config.vae.path if config is not None else self.weights.vae)
        if path == PIXELS and channels not in (1, 3):
            raise UserError(f"--vae={PIXELS}, but an image has 1 or 3 channels, not {channels}")
        if _is_pixels(self.model, path):
            if self._vae_scale is not None:
                raise UserError(f"--vae_scale is for latents; {self.path} draws pixels")
            return None
        if path is None:
            raise UserError(
                f"{self.path} draws latents of {channels} channels; to make pictures of them say "
                f"--vae={SD_VAE if channels == 4 else 'PATH'}, or the path of the VAE"
            )
        trained = norm_of(config) if config is not None else None
        if trained is not None and self._vae_scale not in (None, trained.scale):
            raise UserError(
                f"--vae_scale={self._vae_scale}, but {self.path} was trained with {trained.scale}"
            )
        norm = {} if self._vae_scale is None else {"scale": self._vae_scale}
        vae = Vae.load(path, **(norm if trained is None else trained._asdict()))
        if self.weights.vae_sha256 not in (None, vae.sha256):
            hosts.log0(f"warning: {self.path} was trained with another VAE than {path}")
        if vae.network.latent_channels != channels:
            raise UserError(
                f"the latents of {path} have {vae.network.latent_channels} channels, but the "
                f"model draws {channels}"
            )
        # A run's own VAE has the norm of the training, whatever the VAE's folder records.
        own = given is None and trained is not None
        for name, value in ({} if own else recorded_norm(path, channels)).items():
            if value != getattr(vae.norm, name):
                other = f"{self.path} was trained with" if trained else "--vae_scale is"
                raise UserError(
                    f"the {RECORDED[name]} of --vae={path} is {text_of(value)}, but {other} "
                    f"{text_of(getattr(vae.norm, name)) or 'none'}"
                )
        return vae

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that `to_images` returns."""
        height, width = self.model.input_size
        if self.vae is None:
            return height, width, self.model.in_channels
        return self.vae.network.factor * height, self.vae.network.factor * width, 3

    def to_images(self, samples: np.ndarray, batch_size: int = 64, first: int = 0) -> np.ndarray:
        """Samples [N, h, w, c] → images [N, H, W, C] uint8; latents are decoded by the VAE.

        batch_size: the most latents that are decoded at a time. first: the number of the first
        sample, for messages. Raises UserError, and NotFiniteError for images that are not finite.
        """
        if self.vae is None:
            return to_uint8(samples)
        height, width, _ = self.image_shape
        images = self.vae.decode(
            samples,
            batch_size=min(batch_size, slice_size(height, width) * jax.device_count()),
            precision=self.options.precision,
            name=lambda i: f"sample {first + i}",
        )
        return to_uint8(images)

    def labels(self, classes: Sequence[int | str] | np.ndarray) -> np.ndarray:
        """The labels of classes that are given by number or name: [N] int32.

        Names are read as by the flag --labels. Raises UserError for a name of no class, or several.
        """
        count = self.model.num_classes
        if np.ndim(classes) == 1:
            classes = [
                parse_label(each, count, self.classes, "labels") if isinstance(each, str) else each
                for each in classes
            ]
        check_labels(np.asarray(classes, object), count)
        return np.asarray(classes, np.int32)

    def request(self, labels: Sequence[int | str] | np.ndarray, **sampling: Any) -> Request:
        """A request for samples with the pipeline's options; sampling: as `generate` takes it.

        labels: numbers or names of classes. Raises UserError.
        """
        labels = self.labels(labels)
        options = sampling.get("options") or self.options
        own = self._sampling(len(labels), sampling.get("guide", options.guide))
        return generation.request(*self, labels, **{**own, **sampling})

    def generate(
        self, labels: Sequence[int | str] | np.ndarray, progress: bool = False, **sampling: Any
    ) -> np.ndarray:
        """Draw one sample for each label, as `mdt_jax.generate` with the pipeline's options.

        labels: numbers or names of classes. Returns [N, h, w, c] float32. Raises UserError.
        """
        return self.request(labels, **sampling).draw(progress)

    def inpaint(
        self,
        images: np.ndarray,
        hidden: np.ndarray,
        labels: Sequence[int | str] | np.ndarray,
        **sampling: Any,
    ) -> np.ndarray:
        """Complete images [N, h, w, c], as `mdt_jax.inpaint` with the pipeline's options.

        labels: numbers or names of classes. Returns [N, h, w, c] float32. Raises UserError.
        """
        labels = self.labels(labels)
        own = self._sampling(len(labels), "null")
        sampling = {**own, "pixels": self.vae is None, **sampling}
        return inpainting.inpaint(*self, images, hidden, labels, **sampling)

    def _sampling(self, count: int, guide: str) -> dict[str, Any]:
        """The pipeline's own arguments for `count` samples, guided as an option says."""
        own: dict[str, Any] = {"options": self.options}
        if self.scales:
            own["guidance_scale"] = np.resize(self.scales, count)
        if self.guide is not None and guide == "network":
            own["guide_network"] = tuple(self.guide)
        return own

    def note(self, request: Request | None = None, text: str | None = None) -> dict[str, Any]:
        """How samples are made: network, parameters, options and VAE; and which, with a request.

        text: the labels as --labels gave them.
        """
        model, vae = self.model, self.vae
        note: dict[str, Any] = {
            "mdt_jax": __version__,
            "checkpoint": self.path,
            "step": self.weights.step,
            "parameters": self.weights.item or "those of the file",
            "parameters_sha256": self.params_sha256,
            "network": describe(model),
            "num_classes": model.num_classes,
        }
        if self.weights.stored:
            note["stored"] = self.weights.stored
        if self.classes:
            note["classes"] = list(self.classes)
        note |= {"dtype": jnp.dtype(model.dtype).name, **dataclasses.asdict(self.options)}
        if self.scales:
            note["guidance_scale"] = list(self.scales)
        if self.guide is not None:
            note |= {"guide": self.guide.path, "guide_sha256": self.guide.params_sha256}
        note["uint8"] = UINT8_RULE
        if vae is not None:
            note |= {"vae": vae.path, "vae_scale": vae.norm.scale, "vae_sha256": vae.sha256}
            if vae.norm.shift or vae.norm.std:
                note |= {"vae_shift": vae.norm.shift, "vae_std": vae.norm.std}
        if request is not None:
            note |= describe_labels(request.labels, text)
            note |= {"seed": request.seed, "batch_size": request.batch_size}
        return note


def _options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of SampleOptions among flags that are given."""
    names = (field.name for field in dataclasses.fields(SampleOptions))
    return {name: flags[name] for name in names if flags.get(name) is not None}


def _is_pixels(model: MDT, vae: Vae | str | None) -> bool:
    """Whether samples are pixels, as far as the model and the path of its VAE tell."""
    return vae == PIXELS or (vae is None and model.in_channels in (1, 3))


load = Pipeline.load
Run = Pipeline  # the name before there was a Pipeline
