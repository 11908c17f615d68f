"""Images with a hidden part → complete images, with any checkpoint, in two modes."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, cast

import jax
import numpy as np
from jax.sharding import Mesh

from mdt_jax.diffusion.inpainting import Known, RePaint, resampling_walk
from mdt_jax.diffusion.options import UNGUIDED, SampleOptions, defaults
from mdt_jax.diffusion.samplers import State
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import keys, limits, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.engine import Batch, Program, Segment
from mdt_jax.sampling.generation import Labels, Request, changed, request
from mdt_jax.weights.vae import Vae

MODES = ("repaint", "side_interpolater")
# x̂₀ is clipped to this in masked passes, even without `clip_denoised`: MDT v1 cannot predict the
# noise of tokens that it does not see. Scaled latents have a standard deviation of about 1.
PIXEL_LIMIT, LATENT_LIMIT = 1.0, 4.0


@dataclasses.dataclass(frozen=True)
class InpaintOptions:
    """How the hidden part is drawn.

    mode: "repaint": full passes, with jumps back of `jump_length` steps, so that each interval of
    that length is passed `num_resamples` times. "side_interpolater": without jumps; the first
    `masked_share` of the steps, the noisiest, take the masked pass, in which the encoder sees the
    known tokens and the side-interpolater predicts the others; the later steps are full passes.
    """

    mode: str = "repaint"
    jump_length: int = 10
    num_resamples: int = 10
    masked_share: float = 0.3

    def check(self, model: MDT, options: SampleOptions) -> None:
        """Raise UserError, naming the option, for options that cannot be used together."""
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}; choose one of {', '.join(MODES)}")
        if options.objective == "flow":
            raise UserError("inpainting takes a network that predicts noise or v, not velocity")
        if options.make_sampler().remembers:
            raise UserError(
                f"inpainting takes the sampler ddpm or ddim, not {options.sampler}, whose steps "
                "depend on earlier ones"
            )
        for name in ("jump_length", "num_resamples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
            limits.check_number(name, getattr(self, name))
        if not 0 <= self.masked_share <= 1:
            raise UserError(f"masked_share is {self.masked_share}; it must be in [0, 1]")
        if self.mode == "side_interpolater" and not model.decoder_layers:
            raise UserError("a DiT has no masked pass; use mode repaint")
        jumps = self.mode == "repaint" and self.num_resamples > 1
        if jumps and options.num_steps <= self.jump_length:
            raise UserError(
                f"num_steps {options.num_steps} leaves no room for jumps of {self.jump_length}: "
                "use more num_steps, a smaller jump_length, or num_resamples=1"
            )

    def walk(self, num_steps: int) -> np.ndarray:
        """The steps of the schedule in the order of `resampling_walk`."""
        resamples = self.num_resamples if self.mode == "repaint" else 1
        return resampling_walk(num_steps, self.jump_length, resamples)

    def masked(self, num_steps: int) -> list[bool]:
        """For each evaluation whether it is a masked pass."""
        count = len(self.walk(num_steps)) - 1
        early = round(self.masked_share * count) if self.mode == "side_interpolater" else 0
        return [k < early for k in range(count)]


@dataclasses.dataclass(frozen=True)
class InpaintProgram(Program):
    """A program that walks and puts the known part back as RePaint does.

    limit: what x̂₀ is clipped to in masked passes.
    """

    how: InpaintOptions
    limit: float

    def times(self, segment: Segment, start: jax.Array) -> None:
        """A walk visits steps several times."""

    def advance(
        self, network: Callable, batch: Batch, segment: Segment, state: State, start: jax.Array
    ) -> State:
        sampler, schedule = self.options.make_sampler(), self.options.schedule()
        if segment.masked and sampler.limit is None:
            sampler = dataclasses.replace(sampler, limit=self.limit)
        repaint = RePaint(sampler, schedule, self.how.walk(self.options.num_steps))
        known, noise = cast(Known, batch.known), self.noise(batch)
        x = repaint.sample(network, state.x, known, noise, start, segment.count)
        return sampler.start(x)


@dataclasses.dataclass(frozen=True)
class InpaintRequest(Request):
    """Images to complete, checked.

    images: [N, H, W, C] float32; hidden: [H, W] bool; limit: as of `InpaintProgram`.
    """

    images: np.ndarray
    hidden: np.ndarray
    how: InpaintOptions
    limit: float
    purpose: ClassVar[keys.Purpose] = keys.Purpose.INPAINTING
    title: ClassVar[str] = "inpainting"

    def program(self) -> InpaintProgram:
        plain = super().program()
        return InpaintProgram(plain.model, plain.options, self.how, self.limit, guide=plain.guide)

    def evaluations(self) -> tuple[list[bool], list[bool]]:
        """If any step is guided, all are: a walk passes each step several times."""
        masked = self.how.masked(self.options.num_steps)
        guided = bool(self.options.guided_evaluations(self.scales).any())
        return [guided] * len(masked), masked

    def batch(self, start: int, key: jax.Array, mesh: Mesh) -> Batch:
        images = parallel.put(self.images[self.rows(start, mesh)], parallel.split_batch(mesh))
        hidden, keep_ids = parallel.put(
            (self.hidden[None, :, :, None], known_tokens(self.hidden, self.model.patch_size)),
            parallel.replicated(mesh),
        )
        batch = super().batch(start, key, mesh)
        return dataclasses.replace(batch, known=Known(images, hidden), keep_ids=keep_ids)


def plain_options(options: SampleOptions, num_classes: int) -> SampleOptions:
    """The options without those that inpainting does not take: other guides, a reused encoder."""
    if options.guide != "null" and not num_classes:  # such a model takes no other guidance
        options = changed(options, UNGUIDED)
    return changed(options, {"guide": "null", "encoder_every": 1})


def check_hidden(hidden: np.ndarray, size: tuple[int, int], name: str = "the mask") -> None:
    """Raise UserError for a mask that is not of the size (H, W), or hides nothing or everything."""
    if hidden.shape != size:
        height, width = hidden.shape if hidden.ndim == 2 else (0, 0)
        raise UserError(f"{name} is {height}×{width}, but the model draws {size[0]}×{size[1]}")
    if not hidden.any():
        raise UserError(f"{name} hides nothing: the image would stay as it is")
    if hidden.all():
        raise UserError(f"{name} hides everything: that is sampling, python -m mdt_jax.sample")


def known_tokens(hidden: np.ndarray, patch_size: int) -> np.ndarray:
    """The tokens without a hidden pixel: hidden [H, W] bool → [K] int32, ascending."""
    rows, columns = (side // patch_size for side in hidden.shape)
    patches = hidden.reshape(rows, patch_size, columns, patch_size)
    return np.flatnonzero(~patches.any((1, 3))).astype(np.int32)


def inpaint(
    model: MDT,
    params: dict,
    images: np.ndarray,
    hidden: np.ndarray,
    labels: Labels,
    *,
    how: InpaintOptions | None = None,
    progress: bool = False,
    options: SampleOptions | None = None,
    pixels: bool | None = None,
    **sampling,
) -> np.ndarray:
    """Draw the hidden part of each image.

    images: [N, H, W, C] float32 of the kind that the model was trained on: pixels in [−1, 1], or
    normalised latents. hidden: [H, W] bool, for all images. labels: N ints; an unconditional model
    uses only their number. options: as in `generate`, with the sampler ddpm or ddim; its guide,
    encoder_every and guidance_skip_tolerance have no effect. pixels: whether images are pixels,
    within [−1, 1]; by default where they have 1 or 3 channels. sampling: seed, batch_size,
    guidance_scale and the fields of SampleOptions, as in `generate`. Sample n depends on the seed,
    n, its image and label and the mask alone.
    Returns [N, H, W, C] float32, the known part unchanged. Raises UserError for invalid arguments,
    and NotFiniteError for samples that are not finite.
    """
    how = how or InpaintOptions()
    pixels = model.in_channels in (1, 3) if pixels is None else pixels
    options = (options or defaults(model.num_classes)).clipping_for(pixels)
    for name in ("guide", "guide_ratio", "encoder_every", "encoder_order"):
        if name in sampling:
            raise UserError(f"{name} is for sampling, not inpainting")
    options = plain_options(options, model.num_classes)
    plain = request(model, params, labels, options=options, **sampling)
    images, hidden = np.asarray(images, np.float32), np.asarray(hidden, bool)
    shape = (len(plain.labels), *model.input_size, model.in_channels)
    if images.shape != shape:
        raise UserError(f"images of shape {images.shape}; with these labels it must be {shape}")
    check_hidden(hidden, model.input_size)
    if not np.isfinite(images[:, ~hidden]).all():
        raise UserError("the known part of the images is not finite everywhere")
    how.check(model, plain.options)
    masked = any(how.masked(plain.options.num_steps))
    if masked and not len(known_tokens(hidden, model.patch_size)):
        raise UserError("no token is completely known, as the masked pass requires; use repaint")
    limit = PIXEL_LIMIT if pixels else LATENT_LIMIT
    completed = InpaintRequest(**vars(plain), images=images, hidden=hidden, how=how, limit=limit)
    return np.where(hidden[None, :, :, None], completed.draw(progress), images)


def encode_known(
    image: np.ndarray, hidden: np.ndarray, vae: Vae, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """Encode the known part of an image.

    image: [H, W, 3] uint8; hidden: [H, W] bool. Returns normalised latents [h, w, c], and which of
    them are hidden, [h, w] bool. The mean of the known pixels replaces the hidden ones, so that
    they do not influence the latents. A latent is hidden if one of its pixels is. Raises UserError
    if all are.
    """
    known = np.where(hidden[:, :, None], image[~hidden].mean(0).astype(np.uint8), image)
    encode = vae.encoder(parallel.make_mesh(devices=jax.local_devices()[:1]), precision)
    mean, _ = encode(known[None])
    rows, columns = mean.shape[1:3]
    side = vae.network.factor
    hidden_latents = np.asarray(hidden.reshape(rows, side, columns, side).any((1, 3)))
    if hidden_latents.all():
        raise UserError(
            f"the mask leaves no {side}×{side} pixels whole, so that no latent is known; use one "
            "that leaves larger parts"
        )
    return vae.norm.apply(np.asarray(mean[0])), hidden_latents
