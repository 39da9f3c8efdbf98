"""Bytes to an upright RGB picture, or one error that says why not.

Law: content decides, never a file's name; the first frame counts; nothing is guessed where
pixels are missing. Every way in which a file can be bad ends as a ``DecodeError``. Whatever
changes pixels here raises ``DECODE_VERSION``, which is part of every encoder's fingerprint.

Colour profiles are not applied, as in the training of the models.
"""

from __future__ import annotations

import errno
import os
import re
import stat as stat_mode
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.errors import ChangedError, DecodeError, UnreadableError
from toolkit.images.formats import Format, open_image, recognise, webp_canvas
from toolkit.records import FileStat, show_path

# Pillow is imported inside the functions that use them: the scan takes only
# IMAGE_SUFFIXES from this room.
if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

#: Version of the recipe from bytes to pixels.
DECODE_VERSION = 1

#: Pixels of one picture; more are refused from the header, before any memory is taken.
DEFAULT_MAX_PIXELS = 200_000_000

#: What a scan takes for a picture: suffixes in lower case, with their dot.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .tif .tiff .bmp "
    ".heic .heif .hif .avif".split()
)

#: Of ``warnings.filters``: what Pillow's readers remark on bad metadata is no news to the user.
_REMARKS = ("ignore", None, UserWarning, re.compile(r"PIL\.(Image|\w+ImagePlugin)$"), 0)


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture; it keeps neither the file's bytes nor its metadata.

    Attributes:
        decoded: As the decoder gave it: see :attr:`rgb` and :attr:`pixels`.
        width: Pixels of the whole picture, upright.
        height: Pixels of the whole picture, upright.
        format: Name of the file format, as Pillow calls it.
    """

    decoded: Image.Image | NDArray[np.uint8]
    width: int
    height: int
    format: str

    @property
    def rgb(self) -> Image.Image:
        """Mode ``RGB``, upright; smaller than the picture where it was decoded reduced."""
        from PIL import Image  # Deferred: see the top.

        return (
            Image.fromarray(self.decoded) if isinstance(self.decoded, np.ndarray) else self.decoded
        )

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The same as an array, shape ``(height, width, 3)``; not to be written to."""
        return np.asarray(self.decoded)


def read_file(path: bytes) -> tuple[bytes, FileStat]:
    """Read a file whole, and know that what was read is one version of it.

    Args:
        path: As the bytes of the file system. A link is followed.

    Returns:
        The content (none is not an error here) and the stat that belongs to it.

    Raises:
        UnreadableError: If the system refuses, or it is not a regular file. A pipe
            without a writer does not block.
        ChangedError: If it was written to meanwhile.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            before = os.fstat(file.fileno())
            if not stat_mode.S_ISREG(before.st_mode):
                raise UnreadableError(
                    f"{show_path(path)} is not a regular file; leave it out with exclude="
                )
            data = file.readall()
            after = os.fstat(file.fileno())
    except (OSError, MemoryError) as error:
        raise UnreadableError(
            f"cannot read {show_path(path)}: {_why(error)}; the next build tries it again"
        ) from error
    stat = FileStat.of(after)
    if FileStat.of(before) != stat or len(data) != stat.size:
        raise ChangedError(
            f"{show_path(path)} changed while it was read: {before.st_size} bytes before, "
            f"{len(data)} read, {stat.size} after; the next build tries it again"
        )
    return data, stat


def decode(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, least_edge: int | None = None
) -> Picture:
    """Decode the first frame of a picture file to upright RGB.

    Alpha, also of palettes and colour keys, is laid on white. CMYK is inverted as Adobe
    means it. Deep grey is rescaled, where Pillow would clip it to white:

    - 16 bits from their full range: 0 is black, 65535 white, whatever the picture uses. So
      two pictures of one series stay comparable, and one with 12 used bits comes out dark.
    - float from 0 to 1 where all values lie there.
    - other float and 32-bit integers from their own least to their own greatest value, for
      want of a convention; what is not finite becomes black.

    A file that was cut off is refused, or gives the same pixels as the whole file. A tail of
    zeros (a broken copy) is found in JPEG and PNG; the other formats carry no checksum of
    their pixels.

    Safe to call from several threads. Sets ``PIL.Image.MAX_IMAGE_PIXELS`` to ``None`` for the
    process: its limit would overrule ``max_pixels``, and its warning is no verdict.

    Args:
        data: A whole file.
        max_pixels: Width times height; checked against the header first.
        least_edge: Decode a JPEG at a half, a quarter or an eighth of its size as long as no
            edge becomes shorter than this; ``None``: in full.

    Returns:
        The picture, independent of ``data``.

    Raises:
        DecodeError: If the bytes are not a picture of a format read here, are cut off or
            damaged, or hold too many pixels; the message is one sentence.
    """
    if not data:
        raise DecodeError("the file is empty (0 bytes); copy it again from its source")
    kind = recognise(data)
    try:
        return _decode(data, kind, max_pixels, least_edge)
    except (DecodeError, MemoryError):
        raise
    # Broad: a parser lets out whatever broken bytes make it stumble on.
    except Exception as error:
        raise DecodeError(
            f"the {kind.name} is cut off or damaged ({_why(error)}); copy it again from its source"
        ) from error


def _open_at_once(path: str, flags: int) -> int:
    # Otherwise a pipe waits for its writer; Windows has neither the flag nor such pipes.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _decode(data: bytes, kind: Format, max_pixels: int, least_edge: int | None) -> Picture:
    from PIL import Image  # Deferred: see the top.

    Image.MAX_IMAGE_PIXELS = None
    _ignore_remarks()
    if kind.name == "WEBP":
        _check_size(webp_canvas(data), max_pixels)  # Opening a WebP allocates its canvas.
    image = open_image(data, kind)
    _check_size(image.size, max_pixels)
    if kind.ends is not None and not kind.ends(data):
        raise DecodeError(
            f"the {kind.name} is cut off or damaged: no valid end within its {len(data)} bytes; "
            "copy it again from its source"
        )
    width, height = image.size
    if kind.name == "JPEG" and least_edge is not None:
        image.draft(None, (least_edge, least_edge))
    is_plain = kind.name == "JPEG" and image.mode == "RGB"
    pixels = _plain_jpeg(data, image.size) if is_plain else None
    if pixels is None:
        image.load()
    orientation = _orientation(image)
    if orientation in _ON_ITS_SIDE:
        width, height = height, width
    if pixels is not None and orientation not in _UPRIGHT:
        return Picture(pixels, width, height, kind.name)
    rgb = _upright(_to_rgb(image) if pixels is None else Image.fromarray(pixels), orientation)
    # A bare image around the same pixels: a plugin's would keep the file's bytes alive. The
    # public ways to get one (copy, convert) cost another pass over the memory.
    bare = rgb._new(rgb.im)
    bare.info.clear()
    return Picture(bare, width, height, kind.name)


def _ignore_remarks() -> None:
    # Not catch_warnings, which swaps the filters of all threads. Looked up at each call
    # because others do swap them; once in place this changes nothing.
    if _REMARKS not in warnings.filters:
        warnings.filterwarnings("ignore", category=UserWarning, module=_REMARKS[3].pattern)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DecodeError(
            f"{width * height / 1e6:.1f} megapixels ({width} x {height}) are over the limit of "
            f"{max_pixels / 1e6:.1f}; scale the picture down"
        )


def _plain_jpeg(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """A colour JPEG by simplejpeg, in less than Pillow's time; ``None`` leaves it to Pillow.

    Its size, width and height, is the whole one, or that of a half, a quarter or an eighth.

    Both are libjpeg-turbo, with the same inverse transform and upsampling, so the pixels are
    the same; a test holds them together.
    """
    try:
        import simplejpeg  # an extra
    except ImportError:
        return None
    try:
        width, height = size
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", min_width=width, min_height=height
        )
    except ValueError:  # damaged, or odd: Pillow says what is wrong with it, if anything is
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    from PIL import Image  # Deferred: see the top.

    values: NDArray[Any] = np.asarray(image)
    # By the values, not the mode: some releases of Pillow read 16 bits into 32.
    if image.mode != "F" and values.min() >= 0 and values.max() <= 0xFFFF:
        grey: NDArray[Any] = values.astype(np.uint32)
        grey += 128
        grey //= 257
    else:
        grey = _stretched(values)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _stretched(values: NDArray[Any]) -> NDArray[np.float64]:
    """Values of any range onto whole numbers from 0 to 255; what is not finite becomes 0."""
    # In place from here on: float64 takes eight times the memory of what comes out.
    grey = values.astype(np.float64)
    is_finite = np.isfinite(grey)
    low = grey.min(where=is_finite, initial=np.inf)
    high = grey.max(where=is_finite, initial=-np.inf)
    if low >= 0 and high <= 1:  # True also where nothing is finite.
        low, high = 0.0, 1.0
    grey -= low
    grey *= 255 / ((high - low) or 1)
    np.rint(grey, out=grey)
    grey[~is_finite] = 0
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image  # Deferred: see the top.

    # Pillow has no way from La, grey with premultiplied alpha, but by LA.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(rgba, mask=rgba)
    return canvas


#: EXIF orientation to the member of ``PIL.Image.Transpose`` that undoes it.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_EXIF_ORIENTATION = 0x0112


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1, upright, when the metadata are damaged. All but a JPEG is loaded."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # Broad for the reason given in decode; metadata are not the picture.
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image  # Deferred: see the top.

    name = _UPRIGHT.get(orientation)
    return image.transpose(Image.Transpose[name]) if name else image


def _why(error: BaseException) -> str:
    """One line about an error: the system's words, or the type and its text."""
    if isinstance(error, OSError) and error.errno:
        return f"{error.strerror}, {errno.errorcode.get(error.errno, error.errno)}"
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
