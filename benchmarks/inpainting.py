"""How well halves of held-out digits are drawn: python benchmarks/inpainting.py

For each mask and way of inpainting, with a checkpoint of configs/digits.py: the share that a
classifier reads as the class asked for, and the root mean square difference from what was hidden,
in grey levels. Prints a table and leaves inpainting.png and inpainting.json in --out.
"""

import pathlib
import time

import numpy as np

from mdt_jax import cli
from mdt_jax.data import sources
from mdt_jax.data.images import grid, save_image, to_float, to_uint8
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.sampling.inpainting import InpaintOptions, inpaint
from mdt_jax.train.workdir import make, write_json
from mdt_jax.weights.networks import load_weights

WAYS = {
    "RePaint, 10 times": InpaintOptions(),
    "RePaint, once": InpaintOptions(num_resamples=1),
    "side-interpolater, 0.3": InpaintOptions("side_interpolater", masked_share=0.3),
    "side-interpolater, 0.6": InpaintOptions("side_interpolater", masked_share=0.6),
    "side-interpolater, 0.9": InpaintOptions("side_interpolater", masked_share=0.9),
}
SHOWN = 10  # digits in the picture
GREY = 90


def masks() -> dict[str, np.ndarray]:
    """Name → [8, 8] bool, half of it true."""
    rows, columns = np.indices((8, 8))
    tokens = np.zeros(16, bool)
    tokens[np.random.RandomState(0).permutation(16)[:8]] = True
    return {
        "right half": columns >= 4,
        "lower half": rows >= 4,
        "8 of 16 tokens": np.kron(tokens.reshape(4, 4), np.ones((2, 2))).astype(bool),
    }


def bench(argv: list[str]) -> None:
    """Read the flags, draw, write and print."""
    parser = cli.Parser(prog="python benchmarks/inpainting.py", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="runs/digits")
    parser.add_argument("--images", type=int, default=359, help="held-out digits to complete")
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--out", default="runs/inpainting", help="a folder")
    flags = parser.parse_args(argv[1:])
    found = load_weights(flags.checkpoint)
    given = {} if found.config is None else SampleOptions.from_config(found.config).__dict__
    options = SampleOptions(**{**given, "sampler": "ddpm", "num_steps": flags.num_steps})
    from sklearn.svm import SVC

    train, held_out = sources.load("digits")
    classifier = SVC(C=10).fit(to_float(train.images).reshape(-1, 64), train.labels)
    images, labels = held_out.images[: flags.images], held_out.labels[: flags.images]
    make(pathlib.Path(flags.out))
    rows, pictures = [], [images[:SHOWN]]
    for mask, hidden in masks().items():
        row = {"mask": mask}
        if mask == "right half":
            pictures.append(np.where(hidden[:, :, None], np.uint8(GREY), images[:SHOWN]))
        for way, how in WAYS.items():
            started = time.process_time()
            samples = inpaint(
                found.model, found.params, to_float(images), hidden, labels, how=how,
                options=options, batch_size=100, progress=True,
            )  # fmt: skip
            drawn = to_uint8(samples)
            read = classifier.predict(to_float(drawn).reshape(-1, 64))
            gap = drawn[:, hidden].astype(float) - images[:, hidden]
            row[way] = {
                "class_agreement": float(np.mean(read == labels)),
                "difference": float(np.sqrt(np.mean(gap**2))),
                "cpu_seconds": time.process_time() - started,
            }
            if mask == "right half" and way in ("RePaint, 10 times", "side-interpolater, 0.3"):
                pictures.append(drawn[:SHOWN])
        rows.append(row)
    out = pathlib.Path(flags.out)
    save_image(str(out / "inpainting.png"), grid(np.concatenate(pictures), SHOWN, scale=6))
    write_json(out / "inpainting.json", {"options": options.__dict__, "rows": rows})
    print("| hidden | " + " | ".join(WAYS) + " |\n" + "| --- " * (len(WAYS) + 1) + "|")
    for row in rows:
        cells = [f"{row[w]['class_agreement']:.3f} · {row[w]['difference']:.0f}" for w in WAYS]
        print(f"| {row['mask']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    cli.run(bench)
