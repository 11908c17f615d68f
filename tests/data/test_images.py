"""Which files are opened as pictures."""

import io
import os
import struct
import zlib

import pytest
from PIL import Image

from mdt_jax.data import images
from tests.conftest import ROOT


def content(form, size=(4, 3)):
    file = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(file, form)
    return file.getvalue()


def png_of(width, height):
    """A PNG's beginning that promises so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("form", images.FORMATS)
def test_every_format_that_is_read(form, tmp_path):
    (tmp_path / "a.png").write_bytes(content(form))  # the suffix says nothing
    for file in (tmp_path / "a.png", str(tmp_path / "a.png"), io.BytesIO(content(form))):
        with images.open_image(file) as image:
            assert image.size == (4, 3)
            image.load()


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICO", "TGA", "PCX", "JPEG2000"])
def test_other_formats_are_not_tried(form, tmp_path, monkeypatch):
    (tmp_path / "cat_1.png").write_bytes(content(form, (16, 16)))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # which would be called
    none_of_them = pytest.raises(ValueError, match="it is none of JPEG, PNG")
    with none_of_them, images.open_image(tmp_path / "cat_1.png"):
        pass


@pytest.mark.parametrize(
    "width, height, message",
    [
        (500_000, 1, "it is too long: 1×500000 pixels; the longest side may have 65535"),
        (1, 65_536, "it is too long: 65536×1"),
        (12_000, 12_000, "it is too large: 12000×12000 pixels; at most 134217728 are read"),
        (60_000, 60_000, "it is too large: more than 134217728 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_too_large_is_not_decoded(width, height, message):
    file = io.BytesIO(png_of(width, height))
    with pytest.raises(ValueError, match=message), images.open_image(file):
        pass


def test_pictures_are_opened_in_one_place():
    modules = (ROOT / "mdt_jax").rglob("*.py")
    assert [path.name for path in modules if "Image.open(" in path.read_text()] == ["images.py"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    refused = pytest.raises(ValueError, match="it is no regular file")
    with refused, images.open_image(tmp_path / "x.png"):
        pass
    with pytest.raises(FileNotFoundError), images.open_image(tmp_path / "none.png"):
        pass
