"""From any image file to the square that a model is trained on, as ADM does it.

Dhariwal & Nichol 2021 (guided-diffusion, image_datasets.py): halve with a box filter while the
short side is at least twice the target, resize bicubically, cut out. EXIF is left aside.
"""

import numpy as np

BOX, BICUBIC = 4, 3  # Pillow's own numbers


def to_rgb(image):
    """A PIL.Image of any mode as RGB: grey repeated, alpha dropped, 16 bits scaled to 8."""
    if image.mode.startswith(("I;16", "I")):
        from PIL import Image

        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray((wide / 257 + 0.5).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def center_crop(image, size: int) -> np.ndarray:
    """A PIL.Image in RGB → its middle, uint8 [size, size, 3]."""
    array = np.asarray(_shrink(image, size))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def random_crop(
    image, size: int, random: np.random.Generator, smallest: float = 0.8, largest: float = 1.0
) -> np.ndarray:
    """A PIL.Image in RGB → a square from anywhere in it, uint8 [size, size, 3].

    The square is `smallest` to `largest` of the image's short side.
    """
    least, most = int(np.ceil(size / largest)), int(np.ceil(size / smallest))
    array = np.asarray(_shrink(image, int(random.integers(least, most + 1))))
    top, left = (int(random.integers(side - size + 1)) for side in array.shape[:2])
    return array[top : top + size, left : left + size]


def _shrink(image, size: int):
    """Resized so that the short side is `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=BOX)
    scale = size / min(image.size)
    return image.resize(tuple(round(side * scale) for side in image.size), resample=BICUBIC)
