"""Images with a hidden part → complete images, with any checkpoint, in two ways."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from mdt_jax.diffusion.inpainting import inpaint_steps, resampling_walk
from mdt_jax.diffusion.options import SampleOptions, check_finite
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hosts, keys, limits, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import progress_bar
from mdt_jax.sampling.generation import draw, in_pieces, network_of, pieces, request, stretches

MODES = ("repaint", "side_interpolater")
# What x̂_0 is clipped to in masked passes, even where `clip_denoised` is off; scaled latents have a
# deviation of about 1. MDT v1 cannot predict the noise of what it does not see.
PIXEL_LIMIT, LATENT_LIMIT = 1.0, 4.0
_first_noise = jax.jit(draw, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class InpaintOptions:
    """How what is hidden is drawn.

    mode: "repaint": full passes, and jumps back of `jump_length` steps so that each stretch is
    passed `num_resamples` times. "side_interpolater": the first `masked_share` of the steps, the
    noisiest, take the masked pass: the encoder sees the known tokens, the side-interpolater
    predicts the others; the later steps are full passes; nothing is passed twice.
    """

    mode: str = "repaint"
    jump_length: int = 10
    num_resamples: int = 10
    masked_share: float = 0.3

    def check(self, model: MDT, options: SampleOptions) -> None:
        """Raise UserError, naming the option, for what cannot be done."""
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}; choose one of {', '.join(MODES)}")
        if options.make_sampler().remembers:
            raise UserError(
                f"inpainting takes the sampler ddpm or ddim, not {options.sampler}, whose steps "
                "depend on those before"
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
                "more num_steps, a smaller jump_length, or num_resamples=1"
            )

    def walk(self, num_steps: int) -> np.ndarray:
        """As `resampling_walk` gives it."""
        resamples = self.num_resamples if self.mode == "repaint" else 1
        return resampling_walk(num_steps, self.jump_length, resamples)

    def masked(self, num_steps: int) -> list[bool]:
        """For each evaluation whether it is a masked pass."""
        count = len(self.walk(num_steps)) - 1
        early = round(self.masked_share * count) if self.mode == "side_interpolater" else 0
        return [k < early for k in range(count)]


@functools.partial(
    jax.jit,
    static_argnames=("model", "options", "doubled", "how", "limit", "piece"),
    donate_argnames="x",
)
def _run(
    model: MDT, options, doubled, how: InpaintOptions, limit, piece, params, key, known, hidden,
    keep_ids, noise, labels, scales, x, start,
):  # fmt: skip
    """As `sampling._run`, a stretch being (whether it takes the masked pass, how many).

    doubled: whether all evaluations are of both halves.
    """
    walk = how.walk(options.num_steps)

    def noise_at(k):
        return draw(model, key, noise, k + 1)

    for masked, count in piece:
        ids = keep_ids if masked else None
        network = network_of(model, params, labels, options, scales, doubled, ids)
        sampler = options.make_sampler()
        if masked and sampler.limit is None:
            sampler = dataclasses.replace(sampler, limit=limit)
        x = inpaint_steps(
            network, sampler, options.schedule(), walk, x, known, hidden, noise_at, start, count
        )
        start = start + count
    return x, start


def check_hidden(hidden: np.ndarray, size: tuple[int, int], name: str = "the mask") -> None:
    """Raise UserError for a mask that is not of the size (H, W) or leaves nothing to do."""
    if hidden.shape != size:
        height, width = hidden.shape if hidden.ndim == 2 else (0, 0)
        raise UserError(f"{name} is {height}×{width}, but the model draws {size[0]}×{size[1]}")
    if not hidden.any():
        raise UserError(f"{name} hides nothing: the image would stay as it is")
    if hidden.all():
        raise UserError(f"{name} hides everything: that is sampling, python -m mdt_jax.sample")


def known_tokens(hidden: np.ndarray, patch_size: int) -> np.ndarray:
    """Which tokens are wholly known: hidden [H, W] bool → [K] int32, ascending."""
    rows, columns = (side // patch_size for side in hidden.shape)
    patches = hidden.reshape(rows, patch_size, columns, patch_size)
    return np.flatnonzero(~patches.any((1, 3))).astype(np.int32)


def inpaint(
    model: MDT,
    params: dict,
    images: np.ndarray,
    hidden: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    *,
    how: InpaintOptions | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    options: SampleOptions | None = None,
    pixels: bool | None = None,
    **changes,
) -> np.ndarray:
    """Draw what is hidden of each image.

    images: [N, H, W, C] float32, of the kind that the model was trained on: pixels in [−1, 1], or
    scaled latents. hidden: [H, W] bool, for all of them. labels: N ints (an unconditional model
    reads only how many). options, changes: as `generate` takes them, sampler ddpm or ddim;
    guidance_skip_tolerance is not used. pixels: whether images are pixels, within [−1, 1]; default:
    where they have 1 or 3 channels. Sample n depends on the seed, n, image, mask and label alone.
    Returns [N, H, W, C] float32; what is known is as it was. Raises UserError.
    """
    how = how or InpaintOptions()
    pixels = model.in_channels in (1, 3) if pixels is None else pixels
    options = (options or SampleOptions()).clipping_for(pixels)
    asked = request(
        model, params, labels, seed=seed, batch_size=batch_size, options=options, **changes
    )
    images, hidden = np.asarray(images, np.float32), np.asarray(hidden, bool)
    shape = (len(asked.labels), *model.input_size, model.in_channels)
    if images.shape != shape:
        raise UserError(
            f"images have the shape {images.shape}; with these labels it must be {shape}"
        )
    check_hidden(hidden, model.input_size)
    if not np.isfinite(images[:, ~hidden]).all():
        raise UserError("what is known of the images is not finite everywhere")
    how.check(model, asked.options)
    keep_ids = known_tokens(hidden, model.patch_size)
    if any(how.masked(asked.options.num_steps)) and not len(keep_ids):
        raise UserError("no token is wholly known, so there is no masked pass; use mode repaint")

    mesh, params, key = asked.on_devices(keys.Purpose.INPAINTING)
    whole = parallel.replicated(mesh)
    fixed = parallel.put((hidden[None, :, :, None], keep_ids), whole)
    doubled = bool(asked.options.guided_evaluations(asked.scales).any())
    options, limit = asked.traced_options(), PIXEL_LIMIT if pixels else LATENT_LIMIT
    cut = pieces(stretches(how.masked(asked.options.num_steps)), progress)
    total = sum(count for piece in cut for _, count in piece)
    batches, drawn = asked.rows(mesh), [np.zeros((0, *shape[1:]), np.float32)]
    show = progress and jax.process_index() == 0
    with progress_bar(len(batches) * total, show, "inpainting", "step") as bar:
        for _, count, rows in batches:
            inputs = asked.inputs(rows, mesh)
            known = parallel.put(images[rows], parallel.split_batch(mesh))

            def run(piece, x, at, inputs=inputs, known=known):
                return _run(
                    model, options, doubled, how, limit, piece, params, key, known, *fixed, *inputs,
                    x, at,
                )  # fmt: skip

            *_, x = in_pieces(run, _first_noise(model, key, inputs[0], 0), cut, bar.update)
            drawn.append(hosts.fetch(x)[:count])
            check_finite(drawn[-1], lambda i, rows=rows: f"sample {asked.numbers[rows[i]]}")
    return np.where(hidden[None, :, :, None], np.concatenate(drawn), images)
