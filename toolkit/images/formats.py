"""The file formats that are read: told by content, opened by one reader, checked for their end.

Law: content decides, never a file's name.
"""

from __future__ import annotations

import importlib
import io
import re
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

from toolkit.errors import DecodeError

if TYPE_CHECKING:
    from PIL import ImageFile

# A marker is FF and a code; FF00 is a data byte, FFD0 to FFD7 restart the same scan.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_END = 0xD9


def _jpeg_ends(data: bytes) -> bool:
    """Whether the segments lead to an end marker; what follows it does not count.

    They are walked because a thumbnail in the header has an end marker too.
    """
    position = 2
    while marker := _JPEG_MARKER.search(data, position):
        position = marker.end()
        if data[position - 1] == _JPEG_END:
            return True
        position += int.from_bytes(data[position : position + 2], "big")
    return False


def _png_ends(data: bytes) -> bool:
    """Whether the chunks lead to ``IEND``, with the checksums of the critical ones true.

    Pillow reads as many rows as there are and looks at no checksum of pixels.
    """
    view = memoryview(data)
    position = 8
    while position < len(data):
        body = position + 8
        end = body + int.from_bytes(view[position : position + 4], "big")
        name = data[position + 4 : body]
        is_critical = len(name) == 4 and not name[0] & 0x20
        if is_critical and zlib.crc32(view[position + 4 : end]) != int.from_bytes(
            view[end : end + 4], "big"
        ):
            return False
        if name == b"IEND":
            return True
        position = end + 4
    return False


class Format(NamedTuple):
    """A format and its reader.

    Attributes:
        name: As Pillow calls it.
        signature: Pattern of a file's first bytes.
        module: Where its reader is.
        opener: Class of the reader.
        ends: Whether a file of this format is whole, where that can be told.
    """

    name: str
    signature: bytes
    module: str
    opener: str
    ends: Callable[[bytes], bool] | None = None


# The classes are called directly, not through Image.open: that would import every plugin
# there is, start Ghostscript for an EPS, and need pillow-heif registered for the whole process.
_FORMATS = (
    Format("JPEG", rb"\xff\xd8\xff", "PIL.JpegImagePlugin", "JpegImageFile", _jpeg_ends),
    Format("PNG", rb"\x89PNG\r\n\x1a\n", "PIL.PngImagePlugin", "PngImageFile", _png_ends),
    Format("WEBP", rb"RIFF.{4}WEBP", "PIL.WebPImagePlugin", "WebPImageFile"),
    Format("GIF", rb"GIF8[79]a", "PIL.GifImagePlugin", "GifImageFile"),
    Format("TIFF", rb"II[*+]\0|MM\0[*+]", "PIL.TiffImagePlugin", "TiffImageFile"),
    Format("BMP", rb"BM", "PIL.BmpImagePlugin", "BmpImageFile"),
    # Before HEIF: the brands mif1 and msf1 serve both, what follows tells them apart.
    Format(
        "AVIF",
        rb".{4}ftyp(?:avi[fs]|m[is]f1.{4}(?:.{4}){0,7}?avi[fs])",
        "PIL.AvifImagePlugin",
        "AvifImageFile",
    ),
    Format("HEIF", rb".{4}ftyp(?:he[iv][cmsx]|m[is]f1)", "pillow_heif", "HeifImageFile"),
)


def recognise(data: bytes) -> Format:
    """The format of a file.

    Raises:
        DecodeError: If it is none that is read here.
    """
    for kind in _FORMATS:
        if re.match(kind.signature, data, re.DOTALL):
            return kind
    names = ", ".join(kind.name for kind in _FORMATS)
    raise DecodeError(
        f"not a picture of a kind read here ({names}): it begins with {data[:12]!r}; "
        "convert it, or leave it out with exclude="
    )


def open_image(data: bytes, kind: Format) -> ImageFile.ImageFile:
    """Read the header of a file; whatever the reader raises goes on."""
    opener = getattr(importlib.import_module(kind.module), kind.opener)
    return cast("ImageFile.ImageFile", opener(io.BytesIO(data)))


def webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height from the header; ``(0, 0)`` where libwebp will find it damaged."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    return width, height
