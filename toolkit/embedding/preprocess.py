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

#: A picture longer than this many times its short side is cropped before it is resized: its
#: short side would be blown up to the input's, and its long side with it, to gigabytes.
MAX_ASPECT_RATIO = 100

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def prepare(rgb: Image.Image, how: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop one picture; may be called from several threads.

    Args:
        rgb: Upright, of mode ``RGB``.
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
        height, width = _kept_ratio(rgb, scaled, longest=True)
        red, green, blue = (round(255 * mean) for mean in how.mean)
        fill = (red, green, blue)
    else:
        rgb = _without_far_ends(rgb)
        height, width = (
            _shortest(rgb, scaled[0])
            if scaled[0] == scaled[1]
            else _kept_ratio(rgb, scaled, longest=False)
        )
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), _FILTERS[how.interpolation])
    return np.asarray(_centered(rgb, wanted[0], wanted[1], fill))


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


def _shortest(rgb: Image.Image, edge: int) -> tuple[int, int]:
    """Height and width whose shorter one is ``edge``, as torchvision's ``Resize`` rounds them."""
    short, long = sorted(rgb.size)
    other = int(edge * long / short)
    return (other, edge) if rgb.width <= rgb.height else (edge, other)


def _kept_ratio(rgb: Image.Image, scaled: list[int], *, longest: bool) -> tuple[int, int]:
    """Height and width as timm's ``ResizeKeepRatio`` rounds them."""
    ratios = rgb.height / scaled[0], rgb.width / scaled[1]
    ratio = max(ratios) if longest else min(ratios)
    return round(rgb.height / ratio), round(rgb.width / ratio)


def _centered(rgb: Image.Image, height: int, width: int, fill: tuple[int, int, int]) -> Image.Image:
    """The middle of a picture, which gets a border first where it is too small."""
    more_x, more_y = max(0, width - rgb.width), max(0, height - rgb.height)
    if more_x or more_y:
        border = (more_x // 2, more_y // 2, (more_x + 1) // 2, (more_y + 1) // 2)
        rgb = ImageOps.expand(rgb, border, fill)
    top, left = round((rgb.height - height) / 2), round((rgb.width - width) / 2)
    return rgb.crop((left, top, left + width, top + height))


def _without_far_ends(rgb: Image.Image) -> Image.Image:
    """The middle of a picture; all of it unless it is far too long."""
    limit = MAX_ASPECT_RATIO * min(rgb.size)
    if max(rgb.size) <= limit:
        return rgb
    width, height = min(rgb.width, limit), min(rgb.height, limit)
    left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
    return rgb.crop((left, top, left + width, top + height))
