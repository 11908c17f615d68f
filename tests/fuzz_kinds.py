"""What `tests.fuzz` damages: sound files of each kind, and what the commands read of them."""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import tarfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mdt_jax import config as configs
from mdt_jax import inpaint
from mdt_jax.data import folders, latents, latents_writer, parquet_sets, sample_files, tars
from mdt_jax.data.crops import CroppedImages
from mdt_jax.data.protocols import Status
from mdt_jax.evaluation import features, image_sets, references
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling import labels
from mdt_jax.train import workdir
from mdt_jax.train.checkpoints import Checkpoints
from mdt_jax.train.log import MetricsLog
from mdt_jax.train.state import TrainState
from mdt_jax.weights import kinds, mdt_names, networks, publishing, torch_files
from mdt_jax.weights.picking import DIFFUSERS
from mdt_jax.weights.vae import Vae, recorded_norm
from tests.models.common import random_params
from tests.small_data import VAE, write_parquet, write_pictures, write_vae


class FellBack(Exception):
    """What was damaged was made anew, set aside or passed over, and this was said or counted."""


class Kind(NamedTuple):
    """make(folder) writes sound files; read(folder) returns what the commands read of them.

    damages: which of the files are damaged; makes: which names reading may add. told: whether the
    format has checksums, so that other values never come out in silence.
    """

    name: str
    make: Callable[[pathlib.Path], object]
    read: Callable[[pathlib.Path], Any]
    told: bool = False
    damages: Callable[[pathlib.Path], bool] = lambda path: True
    makes: Callable[[str], bool] = lambda name: False


MODEL = MDT(input_size=(4, 4), in_channels=1, hidden_size=8, depth=2, num_heads=2, decoder_layers=1,
            num_classes=3)  # fmt: skip
NAMES = ("cat", "dog", "eel")
NOTE = {"mdt_jax": "1", "num_classes": 3, "seed": 0, "classes": list(NAMES)}


def pictures(count: int, size: int = 6, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)


def bits(tree) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def write_weights(name: str):
    def make(folder: pathlib.Path) -> None:
        found = kinds.Weights(MODEL, random_params(MODEL, seed=0), classes=NAMES)
        networks.save(folder / name, found)

    return make


def read_weights(name: str):
    def read(folder: pathlib.Path):
        found = networks.read_network(
            folder / name, decoder_layers=1 if "." in name else None, kind="mdt"
        )
        return bits(found.params), found.classes, kinds.describe(found.model)

    return read


INDEX = "w.safetensors.index.json"


def make_uploaded(folder: pathlib.Path) -> None:
    """What `convert` uploads, without the model card."""
    found = kinds.Weights(MODEL, random_params(MODEL, seed=0), classes=NAMES, step=3)
    networks.save(folder / "model.safetensors", found)
    (folder / "config.json").write_text(json.dumps(publishing.config_of(found)))


def read_uploaded(folder: pathlib.Path):
    found = networks.read_network(folder, kind="mdt")
    return bits(found.params), found.classes, found.step, kinds.describe(found.model)


def make_shards(folder: pathlib.Path) -> None:
    state = mdt_names.to_published(MODEL, random_params(MODEL, seed=0))
    where = {name: f"{n % 2}.safetensors" for n, name in enumerate(state)}
    for shard in {*where.values()}:
        held = {name: array for name, array in state.items() if where[name] == shard}
        torch_files.write_arrays(folder / shard, held)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def make_training(folder: pathlib.Path) -> None:
    import torch

    state = mdt_names.to_published(MODEL, random_params(MODEL, seed=0))
    ema = {f"module.{name}": torch.from_numpy(np.array(array)) for name, array in state.items()}
    beside = {"lr": np.float64(0.1), "betas": np.ones(2), "results": pathlib.Path("results")}
    torch.save({"opt": {"step": 1}, "ema": ema, "args": argparse.Namespace(**beside)},
               folder / "w.pt")  # fmt: skip


def make_vae(folder: pathlib.Path) -> None:
    write_vae(folder / f"{DIFFUSERS}.safetensors")
    told = {
        "norm_num_groups": 4,
        "scaling_factor": 0.3,
        "shift_factor": None,
        "latents_mean": [0, 0, 0, 0],
    }
    (folder / "config.json").write_text(json.dumps(told))


def read_vae(folder: pathlib.Path):
    vae = Vae.load(folder)
    return bits(vae.params), vae.network.groups, recorded_norm(folder).get("scale")


def make_samples(folder: pathlib.Path) -> None:
    sink = samples_npz(folder)
    sink.begin()
    for start in (0, 4):
        sink.write(start, pictures(8)[start : start + 4])
    sink.finish()


def samples_npz(folder: pathlib.Path) -> sample_files.Npz:
    return sample_files.Npz(folder / "s.npz", np.arange(8) % 3, (6, 6, 3), NOTE)


def read_samples(folder: pathlib.Path):
    found = image_sets.open_images(str(folder / "s.npz"), labelled=True, generated=True)
    read = [part.tobytes() for _, part in found.slices(3)]
    return found.shape, read, np.asarray(found.labels).tolist(), list(found.classes)


def make_parts(folder: pathlib.Path) -> None:
    sink = samples_npz(folder)
    sink.begin()
    for start in (0, 4):
        sink.write(start, pictures(8)[start : start + 4])


def finish_samples(sink, folder: pathlib.Path) -> bool:
    """As `mdt_jax.sample` does; whether anything was written anew."""
    anew = False
    if not sink.finished():
        sink.begin()
        for start in (0, 4):
            if not sink.done(start, 4):
                anew = True
                sink.write(start, pictures(8)[start : start + 4])
        sink.finish()
    return anew


def read_parts(folder: pathlib.Path):
    finish_samples(samples_npz(folder), folder)
    return (folder / "s.npz").read_bytes()  # always the bytes of an undisturbed run


def samples_folder(folder: pathlib.Path) -> sample_files.Folder:
    return sample_files.Folder(folder / "s", np.arange(8) % 3, (6, 6, 3), NOTE)


def make_sample_folder(folder: pathlib.Path) -> None:
    finish_samples(samples_folder(folder), folder)


def read_sample_folder(folder: pathlib.Path):
    anew = finish_samples(samples_folder(folder), folder)
    found = image_sets.open_images(str(folder / "s"), labelled=True, generated=True)
    if anew:
        raise FellBack
    return [part.tobytes() for _, part in found.slices(8)], np.asarray(found.labels).tolist()


def make_reference(folder: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"arr_0": pictures(6), "count": np.array(6)}
    for suffix, size in (("", 5), ("_s", 4)):
        half = random.normal(size=(size, size))
        arrays |= {f"mu{suffix}": random.normal(size=size), f"sigma{suffix}": half @ half.T}
    with open(folder / "r.npz", "wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def read_reference(folder: pathlib.Path):
    found = references.load(str(folder / "r.npz"))
    gaussians = {n: (bits([g.mu, g.sigma]), g.count) for n, g in found.gaussians.items()}
    images = [] if found.images is None else [part.tobytes() for _, part in found.images.slices(4)]
    return gaussians, images


FEATURES = {"vectors": np.arange(12.0).reshape(4, 3)}


def feature_cache(folder: pathlib.Path) -> features.FeatureCache:
    return features.FeatureCache(folder / "parts", {"features": "pixels"})


def make_features(folder: pathlib.Path) -> None:
    cache = feature_cache(folder)
    assert dict(cache.resume()) == {}
    cache.put(0, FEATURES)


def read_features(folder: pathlib.Path):
    cache = feature_cache(folder)
    if 0 not in dict(cache.resume()):
        cache.put(0, FEATURES)
    return {key: bits(value) for key, value in dict(cache.resume())[0].items()}


WHAT = {
    "format": 1, "images": 8, "shard_images": 3, "latents": [2, 2, 4], "classes": list(NAMES),
    "image_size": 16, "vae": {"path": "v"}, "scale": 1.0, "images_sha256": "0" * 64,
}  # fmt: skip


def latent_batches(items: np.ndarray):
    random = np.random.default_rng(items)
    yield {
        "moments": random.normal(size=(len(items), 4, 2, 2, 4)).astype(np.float16),
        "labels": (items % 3).astype(np.int32),
        "items": items,
        "status": np.zeros(len(items), np.int8),
    }


def make_unfinished(folder: pathlib.Path) -> None:
    making = latents_writer.CacheWriter(folder / "c", WHAT)
    making.start()
    for shard in (0, 2):
        making.write(shard, latent_batches(making.items(shard)))


def make_latents(folder: pathlib.Path) -> None:
    make_unfinished(folder)
    read_unfinished(folder)


def read_unfinished(folder: pathlib.Path):
    """As `encode` goes on with a cache."""
    making = latents_writer.CacheWriter(folder / "c", WHAT)
    if not making.start():
        for shard in range(making.num_shards):
            if making.done(shard) is None:
                making.write(shard, latent_batches(making.items(shard)))
        making.finish()
    return read_latents(folder)


def read_latents(folder: pathlib.Path):
    cache = latents.load(folder / "c", flip=True)
    items = np.arange(len(cache))
    taken = [cache.take(items, np.full(len(items), u)) for u in (0.0, 1.0)]
    if any(view["status"].any() for view in taken):
        raise FellBack
    for number in range(len(cache.manifest["shards"])):
        latents.check_shard(cache, number)
    return [bits(view) for view in taken], cache.classes, cache.manifest


def state_at(step: int) -> TrainState:
    params = {"a": jnp.arange(6.0) + step, "b": {"c": jnp.ones((2, 3)) * step}}
    number = jnp.asarray(step, jnp.int32)
    none = jnp.zeros((), jnp.int32)
    return TrainState(
        step=number, params=params, ema=params, opt_state={"m": params}, skipped=none,
        skipped_in_row=none,
    )  # fmt: skip


def make_checkpoints(folder: pathlib.Path) -> None:
    with Checkpoints(folder, keep=2) as saved:
        for step in (2, 4):
            saved.save(state_at(step), {"config": {}, "classes": list(NAMES)})


def read_checkpoints(folder: pathlib.Path):
    with Checkpoints(folder) as saved:
        found = saved.restore(state_at(0), lambda meta: None)
    assert found is not None
    state, meta = found
    if int(state.step) == 2:
        assert bits(state) == bits(state_at(2)) and meta["step"] == 2
        raise FellBack
    return bits(state), meta


FORMS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "ppm": "PPM",
         "tif": "TIFF"}  # fmt: skip


def make_images(folder: pathlib.Path) -> None:
    for n, (suffix, form) in enumerate(FORMS.items()):
        image = Image.fromarray(pictures(8, 20)[n])
        image = image.convert("P") if n == 3 else image
        (folder / "d" / NAMES[n % 3]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "d" / NAMES[n % 3] / f"{n}.{suffix}", form, exif=Image.Exif())


def squares_of(files):
    found = CroppedImages(files, (8, 8))
    taken = found.take(np.arange(len(found)), np.zeros(len(found)))
    found.warnings()
    if taken["status"].any():
        for item in np.flatnonzero(taken["status"] == Status.REPLACED):
            found.why(int(item))
        raise FellBack
    return bits(taken), found.classes, found.identity


def read_images(folder: pathlib.Path):
    found = image_sets.open_images(str(folder / "d"), 8)
    try:
        found.take(np.arange(len(found)))
    except UserError:
        squares_of(folders.load(str(folder / "d")))
        raise
    return squares_of(folders.load(str(folder / "d")))


def make_tar(folder: pathlib.Path) -> None:
    make_images(folder)
    with tarfile.open(folder / "inner.tar", "w") as inner:
        for n in range(2):
            Image.fromarray(pictures(2, 9)[n]).save(folder / f"{n}.ppm")
            inner.add(folder / f"{n}.ppm", f"{n}.ppm")
    with tarfile.open(folder / "t.tar", "w", format=tarfile.PAX_FORMAT) as made:
        made.add(folder / "d", "d")
        made.add(folder / "0.ppm", f"d/cat/{'long' * 40}ü.ppm")
        made.add(folder / "inner.tar", "fox.tar")
    for path in (*folder.glob("*.ppm"), folder / "inner.tar", *(folder / "d").rglob("*.*")):
        path.unlink()


def make_indexed(folder: pathlib.Path) -> None:
    make_tar(folder)
    tars.load(str(folder / "t.tar"))


def read_tar(folder: pathlib.Path):
    return squares_of(tars.load(str(folder / "t.tar")))


def make_parquet(folder: pathlib.Path) -> None:
    write_parquet(write_pictures(folder / "d", 6), folder / "p", rows=2)
    shutil.rmtree(folder / "d")


def make_unpacked(folder: pathlib.Path) -> None:
    make_parquet(folder)
    parquet_sets.load(folder / "p", at_random=True)


def read_parquet(folder: pathlib.Path):
    for at_random in (False, True):
        found = squares_of(parquet_sets.load(folder / "p", at_random=at_random))
    return found


def make_lists(folder: pathlib.Path) -> None:
    make_images(folder)
    paths = sorted(path.relative_to(folder).as_posix() for path in (folder / "d").rglob("*.*"))
    rows = [(path, NAMES[n % 3]) for n, path in enumerate(paths)]
    (folder / "a.csv").write_text("path,label\n" + "".join(f"{p},{c}\n" for p, c in rows))
    lines = [json.dumps({"path": path, "label": label}) + "\n" for path, label in rows]
    (folder / "a.jsonl").write_text("".join(lines))
    numbered = [[path, n % 3] for n, path in enumerate(paths)]
    (folder / "dataset.json").write_text(json.dumps({"labels": numbered}))


def read_lists(folder: pathlib.Path):
    found = []
    for name in ("a.csv", "a.jsonl", "dataset.json"):
        files = folders.load(str(folder / name), None)
        found.append((files.contents, files.classes, files.summary))
        files.read(0)
    return found


def make_workdir(folder: pathlib.Path) -> None:
    config = configs.default().to_dict()
    for name, content in (("config", config), ("report", {"steps": 3})):
        workdir.write_json(folder / f"{name}.json", content)
    log = MetricsLog(folder / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.5 / step, "fid": 3.0})
    log.close()


def read_workdir(folder: pathlib.Path):
    config = configs.default()
    config.sample.num_samples = 0
    log = MetricsLog(folder / "metrics.jsonl", 3)
    log.close()
    found = workdir.measured_steps(folder, ("fid",), 3)
    try:
        workdir.check_nothing_is_lost(folder)
    except UserError as error:
        assert "but no checkpoint" in str(error)
    workdir.is_reported(folder, config, 3)
    return found, (folder / "metrics.jsonl").read_text()


def make_labels(folder: pathlib.Path) -> None:
    np.save(folder / "l.npy", np.arange(8) % 3)
    (folder / "l.txt").write_text("cat\n1\n2\neel\n")


def read_labels(folder: pathlib.Path):
    return [labels.read_labels(str(folder / name), 3, NAMES) for name in ("l.npy", "l.txt")]


def make_mask(folder: pathlib.Path) -> None:
    Image.fromarray(pictures(1, 16)[0]).save(folder / "image.png")
    hidden = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    hidden.paste((255, 255, 255, 255), (2, 2, 9, 9))
    hidden.save(folder / "mask.png")
    hidden.convert("L").convert("P").save(folder / "mask.gif", transparency=0)


def read_mask(folder: pathlib.Path):
    image = str(folder / "image.png")
    return [
        [array.tobytes() for array in inpaint.read_pair(image, str(folder / mask), (8, 8, 3), True)]
        for mask in ("mask.png", "mask.gif")
    ]


def make_lock(folder: pathlib.Path) -> None:
    (folder / ".lock").write_text('{"host": "", "process": 1, "since": "2020-01-01 00:00:00"}')


def read_lock(folder: pathlib.Path):
    with locks.held(folder / ".lock", str(folder)):
        return sorted(os.listdir(folder))


locks.WATCH = 0.01  # another host's file is watched for seconds

KINDS = [
    Kind("safetensors", write_weights("w.safetensors"), read_weights("w.safetensors")),
    Kind("uploaded", make_uploaded, read_uploaded, told=True),
    Kind("shards", make_shards, read_weights(INDEX)),
    Kind("training checkpoint", make_training, read_weights("w.pt"), told=True),
    Kind("pt", write_weights("w.pt"), read_weights("w.pt"), told=True),
    Kind("saved folder", write_weights("w"), read_weights("w"), told=True),
    Kind("VAE config", make_vae, read_vae, damages=lambda path: path.name == "config.json"),
    Kind("samples npz", make_samples, read_samples, told=True),
    Kind("sample parts", make_parts, read_parts, told=True,
         makes=lambda name: name == "s.npz" or name.startswith("s.npz.parts/")),
    Kind("sample folder", make_sample_folder, read_sample_folder, told=True,
         makes=lambda name: name.startswith("s/")),
    Kind("reference npz", make_reference, read_reference, told=True),
    Kind("feature parts", make_features, read_features, told=True,
         makes=lambda name: name.startswith("parts/")),
    Kind("latents", make_latents, read_latents, told=True),
    Kind("unfinished latents", make_unfinished, read_unfinished, told=True,
         makes=lambda name: name.startswith(("c/latents-", "c/manifest.json"))),
    Kind("checkpoints", make_checkpoints, read_checkpoints, told=True,
         makes=lambda name: name.startswith("damaged")),
    Kind("images", make_images, read_images),
    Kind("tar", make_tar, read_tar, makes=lambda name: name == "t.tar.index.npz"),
    Kind("tar with index", make_indexed, read_tar, damages=lambda path: path.suffix == ".tar"),
    Kind("index of a tar", make_indexed, read_tar, told=True,
         damages=lambda path: path.suffix == ".npz", makes=lambda name: name == "t.tar.index.npz"),
    Kind("parquet", make_parquet, read_parquet,
         makes=lambda name: name.endswith(".array_record")),
    Kind("copies of parquet", make_unpacked, read_parquet, told=True,
         damages=lambda path: path.suffix == ".array_record",
         makes=lambda name: name.endswith(".array_record")),
    Kind("lists", make_lists, read_lists, damages=lambda path: path.parent.name != "d" and
         path.suffix in (".csv", ".jsonl", ".json")),
    Kind("workdir", make_workdir, read_workdir, makes=lambda name: name == "metrics.jsonl"),
    Kind("labels", make_labels, read_labels),
    Kind("mask", make_mask, read_mask),
    Kind("lock", make_lock, read_lock, makes=lambda name: name == "nothing"),
]  # fmt: skip
__all__ = ["FellBack", "KINDS", "Kind", "VAE"]
