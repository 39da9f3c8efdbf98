"""From an upright picture to what a model looks at: timm's evaluation transform without torch.

Law: the pixels are timm's own. Who loads a model compares the two on the golden pictures, and
a model whose transform this is not is refused.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from toolkit.embedding.spec import Preprocessing
from toolkit.images import resample

#: A picture longer than this many times its short side is cropped before it is resized: its
#: short side would be blown up to the input's, and its long side with it, to gigabytes.
MAX_ASPECT_RATIO = 100

#: A picture that Pillow holds is copied to be resized outside of Pillow, unless it has more pixels.
MAX_COPIED_PIXELS = 16_000_000

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def prepare(rgb: Image.Image | NDArray[np.uint8], how: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop one picture; may be called from several threads.

    Args:
        rgb: Upright: an image of mode ``RGB``, or an array of shape ``(height, width, 3)``.
        how: The model's preprocessing.

    Returns:
        What the model looks at, shape ``(height, width, 3)``.
    """
    _, *wanted = how.input_size
    scaled = [math.floor(edge / how.crop_pct) for edge in wanted]
    fill = (0, 0, 0)
    if how.crop_mode == "squash":
        height, width = scaled
    elif how.crop_mode == "border":
        height, width = _kept_ratio(_size(rgb), scaled, longest=True)
        red, green, blue = (round(255 * mean) for mean in how.mean)
        fill = (red, green, blue)
    else:
        rgb = _without_far_ends(rgb)
        height, width = (
            _shortest(_size(rgb), scaled[0])
            if scaled[0] == scaled[1]
            else _kept_ratio(_size(rgb), scaled, longest=False)
        )
    if _size(rgb) != (width, height):
        fits = height >= wanted[0] and width >= wanted[1] and _is_handy(rgb)
        if fits and resample.suits(_size(rgb), (width, height), how.interpolation):
            box = _middle(width, height, wanted)
            kept = resample.resize(np.asarray(rgb), (width, height), box, how.interpolation)
            if kept is not None:
                return kept
        rgb = _image(rgb).resize((width, height), _FILTERS[how.interpolation])
    return np.asarray(_centered(_image(rgb), wanted, fill))


def least_edge(how: Preprocessing) -> int:
    """Pixels that the shorter edge of a picture must have for a model to see all it can see."""
    return max(math.floor(edge / how.crop_pct) for edge in how.input_size[1:])


def golden_pictures() -> list[Image.Image]:
    """A few pictures that are the same everywhere and for ever."""
    pictures = []
    for n, (width, height) in enumerate([(320, 240), (240, 320), (224, 224), (640, 200)], 1):
        y, x = np.indices((height, width))
        bands = (3 * x + n * y, x * y // (6 + n), (x * x + y * y) // 97)
        pictures.append(Image.fromarray((np.stack(bands, axis=-1) % 256).astype(np.uint8)))
    return pictures


def _is_handy(rgb: Image.Image | NDArray[np.uint8]) -> bool:
    """Whether it is an array, or may become one: that copies it."""
    return not isinstance(rgb, Image.Image) or rgb.width * rgb.height <= MAX_COPIED_PIXELS


def _size(rgb: Image.Image | NDArray[np.uint8]) -> tuple[int, int]:
    """Width and height."""
    return rgb.size if isinstance(rgb, Image.Image) else (rgb.shape[1], rgb.shape[0])


def _image(rgb: Image.Image | NDArray[np.uint8]) -> Image.Image:
    return rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)


def _shortest(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Height and width whose shorter one is ``edge``, as torchvision's ``Resize`` rounds them."""
    width, height = size
    other = int(edge * max(size) / min(size))
    return (other, edge) if width <= height else (edge, other)


def _kept_ratio(size: tuple[int, int], scaled: list[int], *, longest: bool) -> tuple[int, int]:
    """Height and width as timm's ``ResizeKeepRatio`` rounds them."""
    width, height = size
    ratios = height / scaled[0], width / scaled[1]
    ratio = max(ratios) if longest else min(ratios)
    return round(height / ratio), round(width / ratio)


def _middle(width: int, height: int, wanted: list[int]) -> resample.Box:
    """The part that is kept of a picture that is large enough."""
    top, left = round((height - wanted[0]) / 2), round((width - wanted[1]) / 2)
    return resample.Box(left, top, left + wanted[1], top + wanted[0])


def _centered(rgb: Image.Image, wanted: list[int], fill: tuple[int, int, int]) -> Image.Image:
    """The middle of a picture, which gets a border first where it is too small."""
    more_y, more_x = (max(0, edge - had) for edge, had in zip(wanted, rgb.size[::-1], strict=True))
    if more_x or more_y:
        border = (more_x // 2, more_y // 2, (more_x + 1) // 2, (more_y + 1) // 2)
        rgb = ImageOps.expand(rgb, border, fill)
    return rgb.crop(_middle(*rgb.size, wanted))


def _without_far_ends(
    rgb: Image.Image | NDArray[np.uint8],
) -> Image.Image | NDArray[np.uint8]:
    """The middle of a picture; all of it unless it is far too long."""
    limit = MAX_ASPECT_RATIO * min(_size(rgb))
    if max(_size(rgb)) <= limit:
        return rgb
    image = _image(rgb)
    width, height = min(image.width, limit), min(image.height, limit)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
