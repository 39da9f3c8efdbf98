"""Good and bad picture files for every test, made from nothing and always the same.

A function named for a format returns the bytes of a file. ``texture`` is what most hold: a
ramp of two colours under noise, both drawn from ``seed``.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (64, 48)


def texture(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """A picture unlike that of any other seed, of mode ``RGB``; ``size`` is (width, height)."""
    rng = np.random.default_rng(seed)
    width, height = size
    first, last = rng.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, width)[None, :, None] + np.linspace(0, 1, height)[:, None, None]
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((first + (last - first) * ramp / 2 + noise).clip(0, 255).astype("u1"))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Any picture as a file of any format that can be written."""
    if format == "HEIF":
        import pillow_heif  # Only here: the code under test must not need it registered.

        image = image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")
        file = pillow_heif.from_pillow(image)
        out = io.BytesIO()
        file.save(out, **options)
        return out.getvalue()
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def jpeg(size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> bytes:
    return encoded(texture(size, seed), "JPEG", **{"quality": 90, **options})


def cmyk_jpeg(cmyk: tuple[int, int, int, int] = (0, 255, 255, 0)) -> bytes:
    """One colour, inverted as Adobe does it; the default is red."""
    return encoded(Image.new("CMYK", SIZE, cmyk), "JPEG", quality=95)


def exif_block(orientation: int) -> bytes:
    """The EXIF of a camera that was held in one of eight ways."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def quarters() -> Image.Image:
    """32 x 16, upright: red, green over blue, white. Each quarter tells its place."""
    image = Image.new("RGB", (32, 16))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    for place, colour in enumerate(colours):
        left, top = place % 2 * 16, place // 2 * 8
        image.paste(colour, (left, top, left + 16, top + 8))
    return image


#: EXIF orientation to what the camera did to the upright picture when it stored it.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation: int, format: str = "JPEG", **options: Any) -> bytes:
    """:func:`quarters`, stored turned, with the EXIF that turns it back."""
    how = STORED[orientation]
    image = quarters() if how is None else quarters().transpose(how)
    return encoded(image, format, exif=exif_block(orientation), **options)


def png(size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> bytes:
    return encoded(texture(size, seed), "PNG", **options)


def webp(size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> bytes:
    return encoded(texture(size, seed), "WEBP", **options)


def gif_animated(size: tuple[int, int] = SIZE, seed: int = 0) -> bytes:
    """Three frames: the textures of ``seed``, ``seed + 1`` and ``seed + 2``."""
    frames = [texture(size, seed + i).quantize(64) for i in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def tiff(size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> bytes:
    return encoded(texture(size, seed), "TIFF", **options)


def grey16(values: list[int], format: str = "TIFF") -> bytes:
    """One row of 16-bit grey."""
    return encoded(Image.fromarray(np.array([values], np.uint16)), format)


def float_tiff(values: list[float]) -> bytes:
    """One row of 32-bit float grey."""
    return encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")


def bmp(size: tuple[int, int] = SIZE, seed: int = 0) -> bytes:
    return encoded(texture(size, seed), "BMP")


def heic(size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> bytes:
    return encoded(texture(size, seed), "HEIF", **options)


def avif(size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> bytes:
    return encoded(texture(size, seed), "AVIF", **options)


@functools.cache
def one_of_each() -> dict[str, bytes]:
    """A small valid file of every format, under the suffix that it would have."""
    return {
        ".jpg": jpeg(),
        ".jpeg": jpeg(progressive=True),
        ".png": png(),
        ".webp": webp(),
        ".gif": gif_animated(),
        ".tif": tiff(),
        ".tiff": tiff(compression="tiff_lzw"),
        ".bmp": bmp(),
        ".heic": heic(),
        ".avif": avif(),
    }


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb_png(megapixels: int = 600, *, whole: bool = False) -> bytes:
    """A file of some bytes that claims 1-bit pixels by the million.

    Args:
        megapixels: Made of lines 20,000 pixels wide.
        whole: Hold the pixels too, all black: then it is valid, about 1/1000 of their size.
    """
    width, height = 20_000, megapixels * 50
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(1)
    line = bytes(1 + width // 8)
    pixels = b"".join(packer.compress(line) for _ in range(height if whole else 1))
    pixels += packer.flush()
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def bomb_webp() -> bytes:
    """The header of a WebP with a canvas of 16,000 x 16,000."""
    edge = (15_999).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + edge + edge
    return b"RIFF" + struct.pack("<I", len(body)) + body


def truncated(data: bytes, share: float = 0.5) -> bytes:
    """The first part of a file, as an interrupted copy leaves it."""
    return data[: int(len(data) * share)]


def zero_tailed(data: bytes, share: float = 0.5) -> bytes:
    """The length of a file and its first part, as an interrupted download leaves it."""
    return truncated(data, share).ljust(len(data), b"\0")


def write_bad_files(folder: Path) -> dict[str, str]:
    """Write one file for each way to be bad.

    Returns:
        Name of each file to a word that must stand in the reason for its refusal.
    """
    cut = {f"cut{suffix}": truncated(data) for suffix, data in one_of_each().items()}
    # Its first frame ends within the first third.
    cut["cut.gif"] = truncated(gif_animated(), 0.2)
    files = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"This is no picture at all.\n", "kind"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "kind"),
        "photoshop.jpg": (b"8BPS\0\1" + bytes(20), "kind"),
        "icon.png": (b"\0\0\1\0\1\0" + bytes(20), "kind"),
        "header_only.jpg": (b"\xff\xd8\xff", "damaged"),
        "bomb.png": (bomb_png(), "megapixels"),
        "bomb.webp": (bomb_webp(), "megapixels"),
        "zero_tail.jpg": (zero_tailed(jpeg()), "damaged"),
        "zero_tail.png": (zero_tailed(png()), "damaged"),
        **{name: (data, "damaged") for name, data in cut.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: word for name, (_, word) in files.items()}


def write_photos(folder: Path, n: int, seed: int = 0, size: tuple[int, int] = SIZE) -> list[Path]:
    """Write ``n`` small JPEGs, each of its own content: ``photo_0000.jpg`` and so on.

    The content depends on ``seed`` plus the number, so ``seed`` 0 and 1 overlap; leave a
    gap of ``n`` between two folders that must differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photo_{i:04d}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        path.write_bytes(jpeg(size, seed + i))
    return paths
