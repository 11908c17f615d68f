"""The commands of docs/your-pictures.md for photos, on images with classes and without."""

import json

import pytest
from PIL import Image

from tests.docs.pages import ROOT, commands, run_smoke
from tests.small_data import write_pictures

PAGE = commands(ROOT / "docs" / "your-pictures.md")
COMMANDS = [command for command in PAGE if "emoji" not in command]  # test_pages.py runs the others


@pytest.mark.parametrize("path, classes", [("photos", ["2", "9", "10"]), ("photos/9", [])])
def test_the_commands(path, classes, tmp_path):
    write_pictures(tmp_path / "photos", 24)
    for command in COMMANDS:
        printed = run_smoke(command.replace("=photos ", f"={path} "), tmp_path)
    assert "wrote 16 samples to photos.png" in printed
    assert Image.open(tmp_path / "photos.png").mode == "RGB"
    run = tmp_path / "runs" / "photos"
    stored = json.loads((run / "config.json").read_text())
    assert stored["model"]["num_classes"] == len(classes)
    assert stored["sample"]["guidance_scale"] == (2 if classes else 1)
    assert (run / "samples" / "0000002.png").is_file()
    if classes:
        assert json.loads((run / "classes.json").read_text()) == classes
