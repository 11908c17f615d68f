"""How many images and latents a second the pipeline reads, against what one H100 can train on.

python benchmarks/data.py

Makes a set like ImageNet in a folder, in a tar and in parquet shards (JPEGs of about 500×375, cut
from scikit-learn's two photographs) and a latent cache of random moments (the numbers do not matter
to reading), and reads each at random through the pipeline, for several numbers of worker processes.
Prints tables, writes data.json to --out, and frees the room that it took (about 0.8 GB).
"""

import io
import json
import os
import pathlib
import platform
import resource
import tarfile
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
from PIL import Image

from mdt_jax import cli
from mdt_jax.data import folders, latents, latents_writer, parquet_sets, pipeline, tars
from mdt_jax.data.crops import CroppedImages
from mdt_jax.models.masking import keep_length
from mdt_jax.models.mdt import MDT, SIZES
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write
from mdt_jax.runtime.progress import progress_bar
from mdt_jax.train import costs

BATCH = 256
SHAPE = (32, 32, 4)
GROUPS = (10, 1000)  # images in a row group
H100 = 989.4e12  # FLOP/s of dense bfloat16, as NVIDIA states them for the SXM module
QUALITY = 95  # of the JPEGs
RATIO = 0.3  # of tokens that the masked pass hides


def jpegs(count: int) -> Iterator[bytes]:
    """Pieces of photographs, of ImageNet's usual sizes and about its 100 kB each."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for n in range(count):
        photograph = photographs[n % 2]
        width, height = [(500, 375), (500, 333), (375, 500), (400, 400)][n % 4]
        zoom = min(photograph.width / width, photograph.height / height) * random.uniform(0.6, 1)
        left = random.uniform(0, photograph.width - zoom * width)
        top = random.uniform(0, photograph.height - zoom * height)
        box = (left, top, left + zoom * width, top + zoom * height)
        pixels = np.asarray(photograph.resize((width, height), box=box))
        noisy = (pixels + random.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def write_images(place: pathlib.Path, count: int) -> None:
    """The same images as `folder`, a folder a class, as `tar`, a tar of a tar a class, and as
    parquet in row groups of GROUPS images, `parquet10` and `parquet1000`.
    """
    classes: dict[str, list[tuple[str, bytes]]] = {}
    with progress_bar(count, True, "making images", "image") as bar:
        for n, content in enumerate(jpegs(count)):
            classes.setdefault(f"n{n % 10:08}", []).append((f"{n:06}.JPEG", content))
            bar.update(1)
    with tarfile.open(place / "tar", "w") as outer:
        for name, images in classes.items():
            (place / "folder" / name).mkdir(parents=True)
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for path, content in images:
                    (place / "folder" / name / path).write_bytes(content)
                    add(archive, path, content)
            add(outer, f"{name}.tar", inner.getvalue())
    for rows in GROUPS:
        write_parquet(place / f"parquet{rows}", classes, rows)


def write_parquet(folder: pathlib.Path, classes: dict[str, list[tuple[str, bytes]]], rows: int):
    """Two shards as `datasets` writes them, by default compressed and with a dictionary."""
    import pyarrow as pa
    import pyarrow.parquet

    contents = [(image, name) for name, images in classes.items() for _, image in images]
    folder.mkdir()
    for n in range(2):
        images, labels = zip(*contents[n::2], strict=True)
        columns = {"image": [{"bytes": image} for image in images], "label": labels}
        name = f"train-{n:05}-of-00002.parquet"
        pyarrow.parquet.write_table(pa.table(columns), folder / name, row_group_size=rows)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_latents(place: pathlib.Path, count: int) -> None:
    """A cache of random moments, through the code that writes real ones."""
    what = {
        "format": latents.FORMAT,
        "images": count,
        "shard_images": 1024,
        "latents": list(SHAPE),
        "image_size": 256,
        "vae": {},
        "scale": 1.0,
        "classes": [],
    }
    random = np.random.default_rng(0)

    def batches(items):
        for start in range(0, len(items), 64):
            part = items[start : start + 64]
            bar.update(len(part))
            yield {
                "moments": random.normal(size=(len(part), 4, *SHAPE)).astype(np.float16),
                "labels": np.zeros(len(part), np.int32),
                "items": part,
                "status": np.zeros(len(part), np.int8),
            }

    making = latents_writer.CacheWriter(place / "latents", what)
    making.start()
    with progress_bar(count, True, "making latents", "latent") as bar:
        for shard in range(making.num_shards):
            making.write(shard, batches(making.items(shard)))
    making.finish()


def cpu_seconds() -> float:
    """Of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(source, workers: int, seconds: float) -> dict[str, float]:
    """Items a second of the clock, and of this process's CPU time, once the workers are going."""
    batch = min(BATCH, len(source))
    plan = pipeline.Shuffled(len(source), 0, batch, np.arange(batch))
    stream = pipeline.batches(source, plan, workers)
    for _ in range(2 + 2 * workers):
        next(stream)
    started, cpu, batches = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - started < seconds or batches < 2:
        next(stream)
        batches += 1
    elapsed, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    stream.close()
    return {"per_second": batches * batch / elapsed, "per_cpu_second": batches * batch / cpu}


def needed() -> dict[str, float]:
    """TFLOP that a trained image takes, of each size of MDT with patches of 2."""
    found = {}
    for size, fields in SIZES.items():
        model = MDT(input_size=SHAPE[:2], in_channels=SHAPE[2], **fields)
        kept = keep_length(model.num_tokens, RATIO)
        # A multiply-accumulate is two operations, and the backward pass costs two forward passes.
        found[size] = 6 * (costs.pass_macs(model) + costs.pass_macs(model, kept)) / 1e12
    return found


def numbers(text: str) -> list[int]:
    """ "0,1,2" as numbers."""
    if not all(part.isdigit() for part in text.split(",")):
        raise UserError(f"{text!r} is not a list of numbers such as 0,1,2")
    return [int(part) for part in text.split(",")]


def bench(argv: list[str]) -> None:
    """Read the flags, run, print."""
    parser = cli.Parser(prog="python benchmarks/data.py", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", default="0,1,2", help="worker processes; 0: threads")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--out", default="runs/benchmarks", help="folder for data.json")
    flags = parser.parse_args(argv[1:])
    workers = numbers(flags.workers)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        write_images(place, flags.images)
        write_latents(place, flags.latents)
        sources = {
            "images of a folder": CroppedImages(
                folders.load(place / "folder"), (256, 256), flip=True
            ),
            "images of a tar": CroppedImages(tars.load(place / "tar"), (256, 256), flip=True),
            **{
                f"images of parquet, {rows:,} in a row group": CroppedImages(
                    parquet_sets.load(place / f"parquet{rows}", at_random=True),
                    (256, 256),
                    flip=True,
                )
                for rows in GROUPS
            },
            "latents of a cache": latents.load(place / "latents", flip=True),
        }
        for name, source in sources.items():
            rows[name] = {count: measure(source, count, flags.seconds) for count in workers}
    work = needed()
    print(f"{os.cpu_count()} cores, {platform.machine()}; batches of {BATCH}\n")
    heads = [f"{n} worker{'s' * (n > 1)}" if n else "threads of one process" for n in workers]
    print("| a second |", " | ".join(heads), "| a CPU second, threads |")
    print("| --- " * (len(workers) + 2) + "|")
    for name, row in rows.items():
        cells = [f"{row[count]['per_second']:,.0f}" for count in workers]
        print(f"| {name} |", " | ".join(cells), f"| {row[workers[0]]['per_cpu_second']:,.0f} |")
    print("\n| one H100 trains | TFLOP an image | images/s at its peak | at half of it |")
    print("| --- " * 4 + "|")
    for size, tflop in work.items():
        most = H100 / (tflop * 1e12)
        print(f"| MDT-{size}/2 | {tflop:.3g} | {most:,.0f} | {most / 2:,.0f} |")
    out = pathlib.Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"cores": os.cpu_count(), "jax": jax.__version__, "rates": rows, "tflop": work}
    with atomic_write(out / "data.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(bench)
