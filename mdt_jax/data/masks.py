"""An image and the mask that says which part of it to draw anew."""

from collections.abc import Callable

import numpy as np

from mdt_jax.data.crops import center_crop
from mdt_jax.data.images import open_image, to_rgb
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import reason


def open_picture(path: str, name: str, over: Callable = lambda image: image):
    """A PIL.Image in RGB, rotated as its EXIF says.

    name: what messages call it. over: applied before the alpha channel is dropped. Raises UserError
    for a file that is no picture.
    """
    from PIL import ImageOps

    try:
        with open_image(path) as image:
            return to_rgb(over(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise UserError(f"{name} could not be read: {reason(error)}") from None


def open_mask(path: str, name: str):
    """A PIL.Image of brightness; transparent parts are black. As `open_picture` otherwise."""
    return open_picture(path, name, over_black).convert("L")


def read_pair(
    image_path: str, mask_path: str, shape: tuple[int, int, int], resize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Read (image [H, W, C] uint8, hidden [H, W] bool) of the shape (H, W, C).

    Both are rotated as their EXIF says, which is how programs that draw masks show them. With
    `resize` both are cropped and resized alike. Transparent parts of the mask are known. Raises
    UserError for files that cannot be read, and for other sizes.
    """
    height, width, channels = shape
    image = open_picture(image_path, f"--image={image_path}")
    mask = open_mask(mask_path, f"--mask={mask_path}")
    if mask.size != image.size:
        fits = scaled_alike(mask.size, image.size)
        if not (resize and fits):
            raise UserError(
                f"--mask={mask_path} is {mask.height}×{mask.width}, but the image is "
                f"{image.height}×{image.width}; --resize "
                + ("makes them fit" if fits else "takes masks of the image's proportions only")
            )
        mask = mask.resize(image.size)
    hidden = fitted(mask, shape[:2], resize, f"--mask={mask_path}") > 127
    image = image.convert("L") if channels == 1 else image
    pixels = fitted(image, shape[:2], resize, f"--image={image_path}")
    return pixels.reshape(height, width, channels), hidden


def over_black(mask):
    """A PIL.Image composited over black; unchanged if it has no alpha channel."""
    from PIL import Image

    if "A" not in mask.getbands() and "transparency" not in mask.info:
        return mask
    mask = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, (0, 0, 0, 255)), mask)


def scaled_alike(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a mask of (W, H) has the aspect ratio of an image, up to rounding."""
    (width, height), (wide, high) = sorted((mask, image))
    return abs(high * width / wide - height) < 1


def fitted(image, size: tuple[int, int], resize: bool, name: str) -> np.ndarray:
    """The pixels of a PIL.Image, center-cropped and resized to `size` (H, W) if allowed."""
    height, width = size
    if (image.height, image.width) == size:
        return np.asarray(image)
    if not resize:
        raise UserError(
            f"{name} is {image.height}×{image.width}, but the model draws {height}×{width}; "
            "--resize makes it fit"
        )
    return center_crop(image, size)
