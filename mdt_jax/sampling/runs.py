"""What Python gets of a run or a file: model and parameters, and what the commands know of it."""

import functools
import os
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mdt_jax.data.classes import parse_label
from mdt_jax.diffusion.options import SampleOptions, check_labels
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime.backend import keep_compilations
from mdt_jax.sampling import generation, pipeline
from mdt_jax.weights.networks import Weights, load_weights
from mdt_jax.weights.vae import Vae


class Run(tuple[MDT, dict]):
    """(model, params) of a run, a folder or a file, and what is known of it.

    `model, params = run` unpacks it. `mdt_jax.generate(*run, labels, options=run.options)` draws as
    the command `mdt_jax.sample` does. weights: all that was read, such as the step.
    """

    path: str
    weights: Weights[MDT]
    _vae: tuple[str | None, float | None]

    def __new__(
        cls,
        path: str,
        weights: Weights[MDT],
        vae: str | None = None,
        vae_scale: float | None = None,
    ) -> "Run":
        """vae, vae_scale: as `load` takes them."""
        run = super().__new__(cls, (weights.model, weights.params))
        run.path, run.weights, run._vae = path, weights, (vae, vae_scale)
        return run

    def __repr__(self) -> str:
        return f"Run({self.path!r})"

    @property
    def model(self) -> MDT:
        """The network."""
        return self.weights.model

    @property
    def params(self) -> dict:
        """Its parameters."""
        return self.weights.params

    @property
    def config(self) -> ConfigDict | None:
        """The config of the run; None of a file."""
        return self.weights.config

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of class 0, 1, … in the run's data; empty where they are not known."""
        return self.weights.classes

    @property
    def options(self) -> SampleOptions:
        """How the run draws samples; of a file, the published way."""
        return pipeline.options_of(self.weights, self._vae[0])

    @functools.cached_property
    def vae(self) -> Vae | None:
        """The VAE of a model of latents, read when it is first asked for; None for pixels.

        Raises UserError where it is not known where it lies.
        """
        return pipeline.find_vae(self.path, self.weights, *self._vae)

    def labels(self, classes: Sequence[int | str] | np.ndarray) -> np.ndarray:
        """[N] int32, the numbers of classes that are given by number or name, as `--labels` reads
        them. Raises UserError for what means no class, or several.
        """
        count, names = self.model.num_classes, self.classes
        if np.ndim(classes) == 1:
            classes = [
                parse_label(each, count, names, "labels") if isinstance(each, str) else each
                for each in classes
            ]
        check_labels(np.asarray(classes, object), count)
        return np.asarray(classes, np.int32)

    def to_images(self, samples: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """Samples [N, h, w, c] → images [N, H, W, C] uint8; latents are decoded by the VAE.

        batch_size: the most latents that are decoded at a time. Raises UserError.
        """
        precision = self.options.precision
        return pipeline.decoder(self.model, self.vae, batch_size, precision)[0](samples)

    def generate(self, labels: Sequence[int | str] | np.ndarray, **how) -> np.ndarray:
        """As `mdt_jax.generate` with the run's own options; labels may be names.

        how: as `mdt_jax.generate` takes it. Returns [N, h, w, c] float32.
        """
        how = {"options": self.options, **how}
        return generation.generate(*self, self.labels(labels), **how)


def load(
    path: str | os.PathLike,
    params: str = "ema",
    decoder_layers: int | None = None,
    input_size: tuple[int, int] | None = None,
    *,
    vae: str | None = None,
    vae_scale: float | None = None,
) -> Run:
    """A network and its parameters, on the default device: `model, params = load(path)`.

    path: a workdir, its checkpoints folder, one step of it, a folder that `convert` wrote, a
    published file (.pt, .pth, .bin, .ckpt, .safetensors), or hf://OWNER/REPOSITORY/FILE.
    params: "ema", or "raw" for those the optimiser sees; a file has but one kind.
    decoder_layers: what a published file of MDT v1 does not tell (None: 2).
    input_size: (H, W) of latents (or pixels) the model is to take. Weights for another size are
    resampled, and this is said on stderr.
    vae, vae_scale: of a model of latents, where its VAE lies and what latents are multiplied by;
    default: as the run says. The VAE is read when `vae` or `to_images` of the result is used.
    Compiled programs are kept from now on where the commands keep them, unless JAX was told where.
    Raises UserError where there is nothing to load, or what is there is damaged or another network.
    """
    keep_compilations()
    weights = load_weights(path, params, decoder_layers, input_size)
    return Run(str(path), weights, vae, vae_scale)
