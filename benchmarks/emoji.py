"""Google's emoji as a data set of small colour images: a folder for each category, some held out.

python benchmarks/emoji.py                     emoji/train/CATEGORY/NAME.png, emoji/test/…
python benchmarks/emoji.py --archive=FILE.tgz  from a file that was downloaded before

The images are Noto Emoji (Apache License 2.0) from npm's package emoji-datasource-google: 64×64
pixels, on white. Skin tones are left out: with them 60 % of the images would be people, most of
them copies in another colour. Of equal images, such as the flags of Norway and Svalbard, the first
is kept. About one emoji in ten is held out, as a hash of its code points decides. The hash ignores
gender and direction, so that a man and a woman who run are both held out or both not.
"""

import base64
import collections
import hashlib
import io
import json
import pathlib
import shutil
import tarfile

from downloads import download

from mdt_jax import cli
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import names_in, temp_path

NAME = "emoji-datasource-google-16.0.0.tgz"
URL = f"https://registry.npmjs.org/emoji-datasource-google/-/{NAME}"
SHA512 = (  # in base64, as the registry states it
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
)
LIST = "package/emoji.json"
IMAGES = "package/img/google/64/"  # unlike the sheets, without images of other vendors
CATEGORIES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}  # the others are Component: the skin tones by themselves
# Man, woman, person, joiner, male, female, facing right, emoji presentation.
VARIANTS = {"1F468", "1F469", "1F9D1", "200D", "2642", "2640", "27A1", "FE0F"}
HELD_OUT = 10  # one emoji in so many


def is_held_out(unified: str) -> bool:
    """Whether an emoji is held out. unified: its code points, as 1F3C3-200D-2640-FE0F."""
    points = [point for point in unified.split("-") if point not in VARIANTS]
    digest = hashlib.sha256("-".join(points).encode()).digest()
    return int.from_bytes(digest) % HELD_OUT == 0


def check(path: str) -> None:
    """Raise UserError unless a file is the package."""
    with open(path, "rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if digest != SHA512:
        raise UserError(
            f"{path} is not {NAME}: its SHA-512 is {digest}, not {SHA512}; delete it and rerun"
        )


def read(path: str) -> dict[str, bytes]:
    """The list of emoji and the images of a package: content by name."""
    with tarfile.open(path) as package:
        return {
            member.name: file.read()
            for member in package
            if member.name == LIST or member.name.startswith(IMAGES)
            if (file := package.extractfile(member))
        }


def write(contents: dict[str, bytes], folder: pathlib.Path) -> None:
    """Write what `read` returns: folder/train/CATEGORY/NAME.png, folder/test/CATEGORY/NAME.png."""
    from PIL import Image

    seen = set()
    for each in sorted(json.loads(contents[LIST]), key=lambda each: each["sort_order"]):
        if each["category"] not in CATEGORIES:
            continue
        image = Image.open(io.BytesIO(contents[IMAGES + each["image"]])).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        pixels = Image.alpha_composite(white, image).convert("RGB")
        if pixels.tobytes() in seen:
            continue
        seen.add(pixels.tobytes())
        split = "test" if is_held_out(each["unified"]) else "train"
        place = folder / split / CATEGORIES[each["category"]]
        place.mkdir(parents=True, exist_ok=True)
        pixels.save(place / f"{each['short_name']}.png")


def table(folder: pathlib.Path) -> str:
    """How many images of each category there are; Markdown."""
    counts = collections.Counter(path.parts[-3:-1] for path in folder.glob("*/*/*.png"))
    rows = [(name, counts["train", name], counts["test", name]) for name in CATEGORIES.values()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [f"| {name} | {train} | {test} |" for name, train, test in rows]
    return "\n".join(["| | train | test |", "| --- | --- | --- |", *lines])


def bench(argv: list[str]) -> None:
    """Read the flags, write the folder whole or not at all, and print its table."""
    parser = cli.Parser(prog="python benchmarks/emoji.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="emoji", type=cli.local, help="folder (default: emoji)")
    add("--archive", default="", type=cli.local, help=f"{NAME}; default: downloaded beside --out")
    flags = parser.parse_args(argv[1:])
    out = pathlib.Path(flags.out).absolute()
    if names_in(out) or out.is_file():
        raise UserError(f"{flags.out} exists and is not empty; delete it, or choose another --out")
    archive = flags.archive or download(URL, out.parent, "archive")
    check(archive)
    temporary = temp_path(out)
    try:
        write(read(archive), temporary)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(table(out))


if __name__ == "__main__":
    cli.run(bench)
