"""Picture files: one way to open them, and what is too large to be opened."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

# Pillow's names of what is read. It knows dozens of formats, goes by a file's content, whatever its
# suffix says, and hands PostScript to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
MAX_SIDE = 65_535  # pixels; a JPEG's sides are no longer
MAX_PIXELS = 2**27  # which take 0.4 GB as RGB


@contextlib.contextmanager
def opened(file: str | os.PathLike | BinaryIO) -> Iterator["Image.Image"]:
    """A PIL.Image of a path or of an open file, of which the header alone is read yet.

    Raises OSError where the file cannot be opened, and ValueError where it is no regular file, of
    none of FORMATS, or has more pixels than MAX_SIDE and MAX_PIXELS allow. Decoding it may raise
    whatever Pillow's readers raise on a damaged file.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(file, (str, os.PathLike)) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file")  # opening a pipe would wait for a writer
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"cannot identify image: it is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        raise ValueError(f"it is too large: more than {MAX_PIXELS} pixels") from None
    with image:
        width, height = image.size
        if max(width, height) > MAX_SIDE:
            raise ValueError(
                f"it is too long: {height}×{width} pixels, and {MAX_SIDE} on a side are the most"
            )
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"it is too large: {height}×{width} pixels, and {MAX_PIXELS} are the most"
            )
        if not width * height:
            raise ValueError("it has no pixels")
        yield image
