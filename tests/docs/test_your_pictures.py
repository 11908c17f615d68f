"""The commands of docs/your-pictures.md, on the smoke variant and a few small pictures."""

import json
import re

import pytest
from PIL import Image

from tests.docs.test_readme import ROOT, here
from tests.small_data import write_pictures

PAGE = (ROOT / "docs" / "your-pictures.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.strip().splitlines()
]
# The smoke variant is of digits.
AS_IN_THE_RECIPE = (
    " --config.data.name=folder --config.data.image_size=64 --config.data.channels=3"
    " --config.data.batch_size=8"
)


@pytest.mark.parametrize("path, classes", [("photos", ["2", "9", "10"]), ("photos/9", [])])
def test_the_commands(path, classes, tmp_path):
    write_pictures(tmp_path / "photos", 24)
    for command in COMMANDS:
        more = AS_IN_THE_RECIPE if "--config=" in command else " --num_steps=3"
        printed = here(command.replace("=photos ", f"={path} ") + more, tmp_path)
    assert "wrote 16 samples to photos.png" in printed
    assert Image.open(tmp_path / "photos.png").mode == "RGB"
    run = tmp_path / "runs" / "photos"
    stored = json.loads((run / "config.json").read_text())
    assert stored["model"]["num_classes"] == len(classes)
    assert stored["sample"]["guidance_scale"] == (2 if classes else 1)
    assert (run / "samples" / "0000002.png").is_file()
    if classes:
        assert json.loads((run / "classes.json").read_text()) == classes


def test_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    headings = {
        heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", readme, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        file, _, heading = target.partition("#")
        assert (ROOT / "docs" / file).is_file() and (not heading or heading in headings), target
