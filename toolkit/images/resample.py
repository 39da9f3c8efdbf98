"""Pillow's resize to the last bit, of what a crop keeps of a picture, in a third of the time.

Law: the pixels are Pillow's, and so whether this works here shows nowhere but in the time. It
needs numba; it is held against Pillow when it is loaded; and it leaves to Pillow what it does
not do: other filters, and what releases of Pillow resize in different orders.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import platform
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger(__name__)

# Of each filter, the pixels to either side that count, in those of the smaller picture.
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}

_kernels: ModuleType | None = None
_loading = threading.Lock()


class Box(NamedTuple):
    """A part of a resized picture: pixels from its left upper corner."""

    left: int
    top: int
    right: int
    bottom: int


def load(cache_dir: Path) -> bool:
    """Get ready; until then, and wherever this says ``False``, Pillow does it all.

    Takes seconds where it was never done before, and part of one later.

    Args:
        cache_dir: Where compiled code is kept, for each machine apart.
    """
    global _kernels
    with _loading:
        if _kernels is None and importlib.util.find_spec("numba") is not None:
            # Broad: whatever is wrong with a compiler or its cache, Pillow is there.
            try:
                _kernels = _checked(_import_kernels(cache_dir / platform.node()))
            except Exception as error:
                logger.warning("pictures are resized by Pillow: %s", error)
    return _kernels is not None


def suits(had: tuple[int, int], size: tuple[int, int], filter_: str) -> bool:
    """Whether :func:`resize` does this.

    Args:
        had: Width and height of a picture.
        size: The same of what it is resized to.
        filter_: Its name in timm.
    """
    if _kernels is None or filter_ not in _SUPPORT:
        return False
    fewer_columns, fewer_rows = (before - after for before, after in zip(had, size, strict=True))
    # Pillow 13 then begins along the columns, its pull request 9549; earlier releases never do.
    return fewer_rows <= 2 * max(0, fewer_columns)


def resize(
    pixels: NDArray[np.uint8], size: tuple[int, int], box: Box, filter_: str
) -> NDArray[np.uint8] | None:
    """Resize a picture and keep a part of it; safe to call from several threads.

    Args:
        pixels: RGB, shape ``(h, w, 3)``, contiguous.
        size: Width and height of the whole resized picture.
        box: The part that is kept, inside it.
        filter_: ``bilinear`` or ``bicubic``, antialiased as in Pillow.

    Returns:
        Shape ``(box height, box width, 3)``; ``None`` where Pillow has to do it.
    """
    height, width, _ = pixels.shape
    if _kernels is None or not suits((width, height), size, filter_):
        return None
    return _resize(_kernels, pixels, size, box, filter_)


def _resize(
    kernels: ModuleType,
    pixels: NDArray[np.uint8],
    size: tuple[int, int],
    box: Box,
    filter_: str,
) -> NDArray[np.uint8]:
    height, width, _ = pixels.shape
    columns = _Taps.of(width, size[0], filter_).part(box.left, box.right)
    rows = _Taps.of(height, size[1], filter_).part(box.top, box.bottom)
    top, bottom = int(rows.first[0]), int(rows.first[-1] + rows.n[-1])
    between = np.empty((bottom - top, box.right - box.left, 3), np.uint8)
    kernels.across(pixels[top:bottom], *columns, between)
    out = np.empty((box.bottom - box.top, box.right - box.left, 3), np.uint8)
    kernels.down(between, rows.first - np.int32(top), rows.n, rows.values, out)
    return out


class _Taps(NamedTuple):
    """What each pixel of one direction is made of: see :func:`toolkit.images.kernels.across`."""

    first: NDArray[np.int32]
    n: NDArray[np.int32]
    values: NDArray[np.int32]

    def part(self, start: int, stop: int) -> _Taps:
        return _Taps(*(array[start:stop] for array in self))

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def of(n_in: int, n_out: int, filter_: str) -> _Taps:
        # Each step as Pillow takes it, in the same order: the last bit counts.
        scale = n_in / n_out
        stretch = max(scale, 1.0)
        support = _SUPPORT[filter_] * stretch
        centre = (np.arange(n_out) + 0.5) * scale
        first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
        n = np.minimum((centre + support + 0.5).astype(np.int64), n_in) - first
        number = np.arange(math.ceil(support) * 2 + 1)
        weights = _weights((number + first[:, None] - centre[:, None] + 0.5) / stretch, filter_)
        weights[number >= n[:, None]] = 0
        total = np.add.accumulate(weights, axis=1)[:, -1:]  # from left to right, not in pairs
        fixed = weights / total * (1 << 22)
        values = np.trunc(fixed + np.copysign(0.5, fixed))
        return _Taps(first.astype(np.int32), n.astype(np.int32), values.astype(np.int32))


def _weights(x: NDArray[np.float64], filter_: str) -> NDArray[np.float64]:
    x = np.abs(x)
    if filter_ == "bilinear":
        return np.maximum(1.0 - x, 0.0)
    # Keys (1981), "Cubic convolution interpolation for digital image processing", a = -0.5.
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _import_kernels(cache_dir: Path) -> ModuleType:
    import numba

    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        raise RuntimeError("numba is told not to compile (NUMBA_DISABLE_JIT)")
    cache_dir.mkdir(parents=True, exist_ok=True)
    numba.config.CACHE_DIR = str(cache_dir)  # type: ignore[attr-defined]
    try:
        from toolkit.images import kernels
    # Broad: what a cut or foreign cache makes numba stumble on is not written down anywhere.
    except Exception as error:
        logger.info("compiling anew: %s", error)
        shutil.rmtree(cache_dir)
        cache_dir.mkdir()
        from toolkit.images import kernels
    return kernels


def _checked(kernels: ModuleType) -> ModuleType:
    """The kernels, if they do here what Pillow does.

    Raises:
        ArithmeticError: If not.
    """
    from PIL import Image  # deferred, as in decode

    y, x = np.indices((150, 200))
    bands = (3 * x + 5 * y, x * y // 7, (x * x + y * y) // 97)
    pixels = (np.stack(bands, axis=-1) % 256).astype(np.uint8)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for name, filter_ in filters.items():
        for size in ((67, 50), (300, 225)):
            box = Box(5, 3, 5 + size[0] // 2, 3 + size[1] // 2)
            right = np.asarray(Image.fromarray(pixels).resize(size, filter_).crop(box))
            if not np.array_equal(_resize(kernels, pixels, size, box, name), right):
                raise ArithmeticError(f"a {name} resize to {size} differs from Pillow's")
    return kernels
