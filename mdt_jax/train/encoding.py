"""Encode images to a cache of latents, verify a cache, and measure the scale of latents."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Generator, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax.data import latents, pipeline, sources
from mdt_jax.data.crops import CroppedImages
from mdt_jax.data.latents_writer import CacheWriter
from mdt_jax.data.protocols import Status
from mdt_jax.models.autoencoder import LatentNorm
from mdt_jax.models.mdt import image_sides, input_shape
from mdt_jax.runtime import files, parallel
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.progress import log, print_result, progress_bar
from mdt_jax.train import inputs
from mdt_jax.weights.vae import Vae

EACH_DEVICE = 16  # images in a batch; the VAE takes a few of them at a time
MEASURED = 4096  # images whose latents tell the scale
NO_VAE = "vae.path is identity: there is nothing to encode with"


def encode(config: ConfigDict, out: files.Path, shard_images: int, part: tuple[int, int]) -> None:
    """Write the shards of one part, (index, number of parts), that do not exist yet.

    The process that ends last also finishes the cache. Raises UserError where the config cannot be
    encoded, and where another process or another cache is in the folder.
    """
    files.check_writable(out, f"--out={out}")
    images = _open_images(config)
    name, left_out = inputs.name_of(config.data), images.files.left_out
    inputs.check_classes(name, len(images.classes), config.model.num_classes, left_out)
    inputs.complete_config(config, len(images.classes))
    vae = _load_vae(config)
    vae.check_norm()
    inputs.record_norm(config, vae)
    writer = CacheWriter(out, _describe(config, images, vae, shard_images))
    with writer.lock(part) as check:
        if writer.start():
            log(f"{out} is finished already; --verify reads all of it")
            return
        inputs.log_contents(config.data, images)
        shards = range(part[0], writer.num_shards, part[1])
        _write_shards(writer, config, images, vae, shards, check)
        check()
        manifest = writer.finish()
    if manifest is None:
        print_result(
            f"{out}: this part is done; the last of the {part[1]} to end finishes the cache"
        )
        return
    damaged = _count_damaged(manifest)
    print_result(
        f"{out}: {len(images) - damaged} images in {writer.num_shards} shards, {damaged} damaged "
        f"left out; {inputs.describe_norm(latents.sums_of(manifest), vae.norm)}"
    )


def verify(config: ConfigDict, out: files.Path) -> None:
    """Read a finished cache through. Raises UserError for damage, and for another VAE or scale."""
    cache = latents.load(out)
    vae = _load_vae(config)
    inputs.check_cache(cache, config, vae)
    vae.check_norm()
    manifest, sums, errors = cache.manifest, latents.Sums(), []
    with progress_bar(len(cache), True, "verifying", "image") as bar:
        for number, shard in enumerate(manifest["shards"]):
            try:
                sums += latents.check_shard(cache, number)
            except UserError as error:
                errors.append(str(error))
            bar.update(shard["records"])
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise UserError("; ".join(errors[:3]) + more)
    count = len(cache) + _count_damaged(manifest)
    if count != manifest["images"]:
        raise UserError(f"{out} accounts for {count} of {manifest['images']} images")
    if doubt := inputs.doubt_norm(sums, vae.norm):
        raise UserError(f"{out}: {doubt}")
    print_result(
        f"{out} is sound: {len(cache)} images in {len(manifest['shards'])} shards; "
        f"{inputs.describe_norm(sums, vae.norm)}"
    )


def estimate_scale(config: ConfigDict) -> None:
    """Print 1/deviation of the latents of MEASURED images from all over the set, and each channel's
    mean and deviation."""
    images = _open_images(config)
    vae = _load_vae(config)
    count = min(MEASURED, len(images))
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
    sums = latents.Sums()
    batches = _encode_images(config, images, vae, [chosen])
    with contextlib.closing(batches), progress_bar(count, True, "encoding", "image") as bar:
        for batch in batches:
            sums += latents.Sums.of_moments(batch["moments"][batch["status"] == Status.READ])
            bar.update(len(batch["labels"]))
    if not sums.records:
        raise UserError(f"none of {count} images could be read")
    own = vae.norm._replace(scale=1.0)
    std, how = sums.deviation(*own), ""
    if own != LatentNorm(1.0):
        how = ", less vae.shift and divided by vae.std"
    shift, each = (",".join(f"{x:.5g}" for x in values) for values in (sums.mean, sums.std))
    print_result(
        f"vae.scale: {1 / std:.5g}, one over the deviation of the latents of {count} images{how}\n"
        f"or, with each channel by itself: --config.vae.scale=1 --config.vae.shift={shift} "
        f"--config.vae.std={each} (a config.json beside the VAE must say the same, or nothing)"
    )


def _load_vae(config: ConfigDict) -> Vae:
    """The VAE of a config. Raises UserError where it has none."""
    vae = Vae.from_config(config)
    if vae is None:
        raise UserError(NO_VAE)
    return vae


def _open_images(config: ConfigDict) -> CroppedImages:
    """The images of a config, not mirrored; black replaces a damaged one. Raises UserError."""
    if config.vae.path == "identity":
        raise UserError(NO_VAE)
    if config.data.name not in sources.STORED or config.data.name == "latents":
        raise UserError(
            f"data.name is {config.data.name}; folder, tar, tfds and parquet can be encoded"
        )
    if config.data.crop != "center":
        raise UserError(f"data.crop is {config.data.crop}; a cache needs data.crop=center")
    images = sources.cropped(config.data, config.model.num_classes, stand_ins=0)
    return dataclasses.replace(images, flip=False)


def _describe(config: ConfigDict, images: CroppedImages, vae: Vae, shard_images: int) -> dict:
    """The fields of the manifest that describe a cache."""
    data, (height, width) = config.data, image_sides(config)
    return {
        "format": latents.FORMAT,
        "images": len(images),
        "shard_images": shard_images,
        "latents": list(input_shape(config)),
        "image_size": data.image_size if height == width else [height, width],
        "crop": data.crop,
        "vae": vae.path,
        "vae_sha256": vae.sha256,
        **vae.norm._asdict(),
        "precision": config.train.precision,
        "classes": images.classes if config.model.num_classes else [],
        "images_sha256": images.identity,
        "source": f"{data.name} {data.path}",
    }


def _count_damaged(manifest: dict) -> int:
    return sum(len(shard["damaged"]) for shard in manifest["shards"])


def _write_shards(
    writer: CacheWriter,
    config: ConfigDict,
    images: CroppedImages,
    vae: Vae,
    shards: range,
    check: Callable[[], None],
) -> None:
    """Write those of the shards that are not finished. check: raises UserError for a lost lock."""
    sidecars = writer.sidecars(shards)
    missing = [shard for shard, sidecar in sidecars.items() if sidecar is None]
    damaged = {item for sidecar in sidecars.values() if sidecar for item in sidecar["damaged"]}
    total, left = (sum(len(writer.items(n)) for n in group) for group in (shards, missing))
    # One stream for all shards, because starting the workers takes seconds.
    batches = _encode_images(config, images, vae, [writer.items(n) for n in missing], damaged)
    bar = progress_bar(total, True, "encoding", "image", initial=total - left)
    with contextlib.closing(batches), bar:
        for shard in missing:
            check()
            try:
                writer.write(shard, _next_images(batches, len(writer.items(shard)), bar))
            except UserError:
                # Another host, whose lock is not visible here, may have finished and tidied.
                if not writer.finished():
                    raise
                return


def _next_images(batches: Iterator[dict], count: int, bar) -> Iterator[dict]:
    """The next batches that make up `count` images."""
    while count > 0:
        batch = next(batches)
        bar.update(len(batch["labels"]))
        count -= len(batch["labels"])
        yield batch


def _encode_images(
    config: ConfigDict,
    images: CroppedImages,
    vae: Vae,
    parts: list[np.ndarray],
    damaged: Collection[int] = (),
) -> Generator[dict[str, np.ndarray], None, None]:
    """Encode the images of each part in batches; no batch holds images of two parts.

    Yields "moments" [n, 4, h, w, c] float16, and "labels", "items" and "status" as of
    `pipeline.batches`. damaged: images that are known to be damaged. Raises UserError.
    """
    encoder = _Encoder(vae, config.train.precision)
    size = encoder.batch_size
    items = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
    plan = [(each, np.ones(len(each))) for each in items]
    waiting = collections.deque()  # the devices encode a batch while the one before is handed on
    read = pipeline.batches(images, plan, config.data.workers, config.data.max_damaged, damaged)
    with contextlib.closing(read):
        for batch in read:
            waiting.append((batch, encoder.start(batch.pop("images"))))
            if len(waiting) > 1:
                yield encoder.finish(*waiting.popleft())
        if waiting:
            yield encoder.finish(*waiting.popleft())


class _Encoder:
    """A VAE on the devices of this process."""

    def __init__(self, vae: Vae, precision: str):
        mesh = parallel.local_mesh()
        self.batch_size, self._split = EACH_DEVICE * mesh.size, parallel.split_batch(mesh)
        self._path = vae.path
        self._run = vae.encoder(mesh, precision)

    def start(self, pixels: np.ndarray) -> list[jax.Array]:
        """Begin to encode [n, H, W, 3] uint8: mean and std of the images and of their mirrors."""
        missing = self.batch_size - len(pixels)
        pixels = np.pad(pixels, [(0, missing), (0, 0), (0, 0), (0, 0)])
        views = jax.device_put((pixels, pixels[:, :, ::-1]), self._split)
        return [moment for view in views for moment in self._run(view)]

    def finish(self, batch: dict[str, np.ndarray], moments: list[jax.Array]) -> dict:
        """The batch with "moments" [n, 4, h, w, c] float16. Raises UserError for an overflow."""
        count = len(batch["labels"])
        with np.errstate(over="ignore"):
            halves = [np.asarray(moment)[:count].astype(latents.MOMENTS) for moment in moments]
        stacked = np.stack(halves, axis=1)
        if not np.isfinite(stacked).all():
            raise UserError(f"{self._path} encodes images to numbers that float16 cannot hold")
        return {"moments": stacked, **batch}
