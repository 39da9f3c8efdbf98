"""Bytes to pixels: right ones, or a reason."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests import pictures
from toolkit.errors import ChangedError, DecodeError, UnreadableError
from toolkit.images.decode import IMAGE_SUFFIXES, _plain_jpeg, decode, read_file
from toolkit.images.identity import image_key

SUFFIXES = sorted(pictures.one_of_each())

needs_simplejpeg = pytest.mark.skipif(
    find_spec("simplejpeg") is None, reason="the fast extra is not installed"
)


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = decode(data).rgb.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


# --- what comes out ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_becomes_upright_rgb_of_its_size(suffix: str) -> None:
    data = pictures.one_of_each()[suffix]

    picture = decode(data)

    assert suffix in IMAGE_SUFFIXES
    assert (picture.rgb.mode, picture.rgb.size) == ("RGB", (64, 48))
    assert (picture.width, picture.height) == (64, 48)


def test_format_is_told_by_content_in_pillows_words() -> None:
    formats = {decode(data).format for data in pictures.one_of_each().values()}

    assert formats == {"JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "HEIF", "AVIF"}


def test_avif_under_a_general_brand_is_not_taken_for_heic() -> None:
    data = pictures.avif().replace(b"ftypavif", b"ftypmif1")

    assert decode(data).format == "AVIF"


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp"])
def test_lossless_formats_give_back_every_pixel(suffix: str) -> None:
    picture = decode(pictures.one_of_each()[suffix])

    assert picture.rgb.tobytes() == pictures.texture().tobytes()


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".avif"])
def test_plain_files_decode_as_pillow_decodes_them(suffix: str) -> None:
    data = pictures.one_of_each()[suffix]
    with Image.open(io.BytesIO(data)) as image:
        expected = image.convert("RGB").tobytes()

    assert decode(data).rgb.tobytes() == expected


def test_heic_is_near_the_picture_it_was_made_from() -> None:
    made_from = np.asarray(pictures.texture(), np.int16)

    decoded = np.asarray(decode(pictures.heic(quality=95)).rgb, np.int16)

    assert np.abs(decoded - made_from).mean() < 10


def test_one_pixel_is_a_picture() -> None:
    data = pictures.encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")

    picture = decode(data)

    assert (picture.width, picture.height, picture.rgb.getpixel((0, 0))) == (1, 1, (1, 2, 3))


def test_first_frame_of_an_animation_counts() -> None:
    data = pictures.gif_animated(seed=7)
    first = pictures.texture(seed=7).quantize(64).convert("RGB")

    assert decode(data).rgb.tobytes() == first.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_camera_orientation_is_undone(format: str, orientation: int) -> None:
    data = pictures.turned(orientation, format)

    picture = decode(data)

    assert (picture.width, picture.height) == (32, 16)
    centres = [picture.rgb.getpixel(at) for at in ((8, 4), (24, 4), (8, 12), (24, 12))]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    # Lossy colours come back within a few steps.
    np.testing.assert_allclose(np.array(centres, int), expected, atol=12)


def test_adobe_cmyk_is_not_a_negative() -> None:
    red, green, blue = pixel(pictures.cmyk_jpeg((0, 255, 255, 0)))

    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (7, 255), (7, 7, 7)),
    ],
)
def test_alpha_lies_on_white(mode: str, colour: tuple[int, ...], expected: tuple[int, ...]) -> None:
    data = pictures.encoded(Image.new(mode, (4, 4), colour), "PNG")

    assert pixel(data) == expected


@pytest.mark.parametrize("transparency", [0, bytes([0])])
def test_transparent_palette_entry_becomes_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)

    data = pictures.encoded(image, "PNG", transparency=transparency)

    assert (pixel(data, 0), pixel(data, 1)) == ((255, 255, 255), (0, 0, 255))


def test_transparent_colour_of_plain_rgb_becomes_white() -> None:
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (1, 2, 3))

    data = pictures.encoded(image, "PNG", transparency=(9, 9, 9))

    assert (pixel(data, 0), pixel(data, 1)) == ((255, 255, 255), (1, 2, 3))


@pytest.mark.parametrize("format", ["TIFF", "PNG"])
def test_16_bit_grey_is_scaled_and_not_clipped(format: str) -> None:
    # A step of grey is 257 wide; 129 is nearer to the second step than to the first.
    data = pictures.grey16([0, 129, 32896, 65535], format)

    assert [pixel(data, x) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]


def test_big_endian_16_bit_grey_is_read_in_its_order() -> None:
    image = Image.new("I;16B", (1, 1), 257 * 2)
    data = pictures.encoded(image, "TIFF")

    assert data[:2] == b"MM"
    assert pixel(data) == (2, 2, 2)


def test_32_bit_grey_is_spread_over_its_own_range() -> None:
    image = Image.fromarray(np.array([[-1_000_000, 0, 1_000_000]], np.int32))

    data = pictures.encoded(image, "TIFF")

    assert [pixel(data, x)[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.2, 0.4], [0, 51, 102]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),
        ([5.0, 5.0], [0, 0]),
        ([float("nan"), 0.2, 1.0], [0, 51, 255]),
        ([float("nan"), float("inf")], [0, 0]),
    ],
)
def test_float_grey_from_zero_to_one_or_over_its_own_range(
    values: list[float], expected: list[int]
) -> None:
    data = pictures.float_tiff(values)

    assert [pixel(data, x)[0] for x in range(len(values))] == expected


def test_black_and_white_stay_so() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)

    data = pictures.encoded(image, "TIFF")

    assert (pixel(data, 0), pixel(data, 1)) == ((0, 0, 0), (255, 255, 255))


def test_ycbcr_and_lab_become_the_colours_they_mean() -> None:
    ycbcr = pictures.encoded(Image.new("RGB", (8, 8), (200, 30, 60)).convert("YCbCr"), "TIFF")
    # Lightness 53, a 80, b 67 is sRGB red; Pillow stores 0..100 as 0..255 and shifts by 128.
    lab = pictures.encoded(Image.new("LAB", (8, 8), (136, 80 + 128, 67 + 128)), "TIFF")

    np.testing.assert_allclose(pixel(ycbcr), (200, 30, 60), atol=3)
    np.testing.assert_allclose(pixel(lab), (255, 0, 0), atol=12)


# --- what is refused --------------------------------------------------------------------------


def test_every_bad_file_gives_its_reason_in_one_line(tmp_path: Path) -> None:
    words = pictures.write_bad_files(tmp_path)

    for name, word in words.items():
        with pytest.raises(DecodeError, match=word) as caught:
            decode((tmp_path / name).read_bytes())
        assert "\n" not in str(caught.value), name
        assert " object at 0x" not in str(caught.value), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_file_is_refused_or_gives_the_same_pixels(suffix: str) -> None:
    data = pictures.one_of_each()[suffix]
    whole = decode(data).rgb.tobytes()
    near_end = range(len(data) - 24, len(data))
    refused = 0

    for cut in [*range(0, len(data), max(1, len(data) // 150)), *near_end]:
        try:
            assert decode(data[:cut]).rgb.tobytes() == whole, f"silent at byte {cut}"
        except DecodeError:
            refused += 1

    assert refused > 40


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png"])
def test_a_tail_of_zeros_is_refused(suffix: str) -> None:
    data = pictures.one_of_each()[suffix]

    for cut in range(40, len(data) - 2, 37):
        with pytest.raises(DecodeError):
            decode(data[:cut].ljust(len(data), b"\0"))


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photo() -> None:
    # A camera's thumbnail is a whole JPEG, end marker included, in the header of the photo.
    exif = b"Exif\0\0" + pictures.jpeg((16, 16))
    data = pictures.jpeg((256, 192), exif=exif)

    decode(data)
    with pytest.raises(DecodeError, match="no valid end"):
        decode(pictures.zero_tailed(data))


def test_a_flipped_bit_among_png_pixels_is_refused() -> None:
    data = bytearray(pictures.png(compress_level=0))
    data[3000] ^= 1

    with pytest.raises(DecodeError, match="no valid end"):
        decode(bytes(data))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_after_the_end_do_not_count(suffix: str) -> None:
    data = pictures.one_of_each()[suffix]

    padded = decode(data + bytes(100) + b"a phone's video")

    assert padded.rgb.tobytes() == decode(data).rgb.tobytes()


def test_the_limit_of_pixels_is_inclusive() -> None:
    data = pictures.png((64, 48))

    assert decode(data, max_pixels=64 * 48).width == 64
    with pytest.raises(DecodeError, match="64 x 48"):
        decode(data, max_pixels=64 * 48 - 1)


def test_a_whole_bomb_goes_off_only_where_it_is_allowed() -> None:
    data = pictures.bomb_png(20, whole=True)

    picture = decode(data, max_pixels=20_000_000)

    assert len(data) < 20_000
    assert (picture.width, picture.height) == (20_000, 1_000)
    with pytest.raises(DecodeError, match=r"20\.0 megapixels"):
        decode(data, max_pixels=19_999_999)


@pytest.mark.parametrize("suffix", [".tif", ".webp"])
def test_pillows_own_limit_does_not_overrule_ours(suffix: str) -> None:
    # These two ask it while they load, and it refuses at twice its value.
    Image.MAX_IMAGE_PIXELS = 1000

    picture = decode(pictures.one_of_each()[suffix])

    assert picture.width * picture.height > 2 * 1000


# --- manners ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(b"MM\0*\0\0\0\x08\0\x09" + bytes(6), id="directory cut off"),
        pytest.param(b"no directory at all", id="no directory"),
    ],
)
def test_broken_metadata_costs_neither_the_picture_nor_a_warning(exif: bytes) -> None:
    # Pillow looks into the EXIF of a JPEG while it opens it, into others' when it is asked.
    files = [pictures.jpeg(exif=b"Exif\0\0" + exif), pictures.png(exif=b"Exif\0\0" + exif)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        widths = [decode(data).width for data in files]

    assert widths == [64, 64]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_holds_on_to_nothing_of_the_file(suffix: str) -> None:
    data = bytes(bytearray(pictures.one_of_each()[suffix]))
    alone = sys.getrefcount(data)

    picture = decode(data)

    assert sys.getrefcount(data) == alone
    assert type(picture.rgb) is Image.Image
    assert picture.rgb.info == {}


def test_threads_decode_all_formats_at_once() -> None:
    files = list(pictures.one_of_each().values()) * 4
    expected = [decode(data).rgb.tobytes() for data in files]

    with ThreadPoolExecutor(4) as pool:
        decoded = list(pool.map(lambda data: decode(data).rgb.tobytes(), files))

    assert decoded == expected


def test_importing_the_room_loads_no_pillow() -> None:
    code = "import sys, toolkit.images.decode; print({'PIL', 'xxhash'} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


@given(
    suffix=st.sampled_from(SUFFIXES),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=8),
    keep=st.floats(0, 1),
)
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_any_damage_ends_as_picture_or_decode_error(
    suffix: str, flips: list[tuple[float, int]], keep: float
) -> None:
    data = bytearray(pictures.one_of_each()[suffix])
    for place, mask in flips:
        # Squared: the headers, where most can go wrong, are hit most.
        data[int(place**2 * len(data))] ^= mask
    damaged = bytes(data[: int(len(data) * (1 - keep**4))])

    try:
        picture = decode(damaged, max_pixels=1_000_000)
    except DecodeError:
        return
    assert (picture.rgb.mode, picture.rgb.size) == ("RGB", (picture.width, picture.height))


# --- reading ----------------------------------------------------------------------------------


def test_the_key_is_xxh3_of_all_bytes() -> None:
    # The value that the xxHash project documents for no input at all.
    assert image_key(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert len(image_key(b"x")) == 16
    assert image_key(b"x") != image_key(b"y")


def test_a_file_is_read_with_the_stat_that_belongs_to_it(tmp_path: Path) -> None:
    path = tmp_path / "näme.jpg"
    path.write_bytes(b"12345")

    data, stat = read_file(os.fsencode(path))

    assert data == b"12345"
    assert (stat.size, stat.mtime_ns) == (5, path.stat().st_mtime_ns)


def test_an_empty_file_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()

    data, stat = read_file(os.fsencode(tmp_path / "empty.jpg"))

    assert (data, stat.size) == (b"", 0)


def test_a_missing_file_is_unreadable_by_name_and_error(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/gone\xff.jpg"

    with pytest.raises(UnreadableError, match=r"gone\\xff\.jpg: No such file.*ENOENT"):
        read_file(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_forbidden_file_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "secret.jpg"
    path.touch(mode=0)

    with pytest.raises(UnreadableError, match="EACCES"):
        read_file(os.fsencode(path))


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"EISDIR|not a regular file"):
        read_file(os.fsencode(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
@pytest.mark.timeout(10)
def test_a_pipe_without_a_writer_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)

    with pytest.raises(UnreadableError, match="not a regular file"):
        read_file(os.fsencode(path))


@contextmanager
def touched_without_end(path: Path) -> Iterator[None]:
    """Give the file a new time of change again and again, by another thread."""
    first, stop = threading.Event(), threading.Event()

    def touch() -> None:
        time_ns = 0
        while not stop.is_set():
            time_ns += 1000
            os.utime(path, ns=(time_ns, time_ns))
            first.set()

    thread = threading.Thread(target=touch)
    thread.start()
    first.wait(10)
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_file_that_changes_under_the_reader_is_told(tmp_path: Path) -> None:
    path = tmp_path / "live.jpg"
    with path.open("wb") as file:
        file.truncate(64 * 2**20)  # Takes long enough to read, and no disk.

    with touched_without_end(path), pytest.raises(ChangedError, match="changed while it was read"):
        read_file(os.fsencode(path))


# --- simplejpeg -------------------------------------------------------------------------------


def by_pillow(data: bytes, least_edge: int | None = None) -> bytes | str:
    """Pixels, or the reason for none, without simplejpeg."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "simplejpeg", None)
        return outcome_of(data, least_edge)


def outcome_of(data: bytes, least_edge: int | None = None) -> bytes | str:
    try:
        return decode(data, least_edge=least_edge).rgb.tobytes()
    except DecodeError as error:
        return str(error)


@needs_simplejpeg
@pytest.mark.parametrize("size", [(640, 480), (333, 201), (17, 9), (8, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"quality": 30},
        {"restart_marker_blocks": 3, "quality": 98},
        {"optimize": True, "quality": 100},
    ],
    ids=str,
)
def test_simplejpeg_gives_the_pixels_of_pillow(
    size: tuple[int, int], subsampling: str, options: dict[str, Any]
) -> None:
    buffer = io.BytesIO()
    pictures.texture(size).save(buffer, "JPEG", subsampling=subsampling, **options)
    data = buffer.getvalue()

    assert _plain_jpeg(data, size) is not None
    assert outcome_of(data) == by_pillow(data)


@needs_simplejpeg
@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_other_colours_of_jpeg_are_those_of_pillow(mode: str) -> None:
    buffer = io.BytesIO()
    keep = {"keep_rgb": True} if mode == "RGB" else {}
    pictures.texture((64, 48)).convert(mode).save(buffer, "JPEG", **keep)
    data = buffer.getvalue()

    assert outcome_of(data) == by_pillow(data)


@needs_simplejpeg
@given(
    where=st.integers(2, 10**6),
    value=st.integers(0, 255),
    cut=st.integers(0, 3000),
    is_progressive=st.booleans(),
)
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_damage_has_one_outcome_with_and_without_simplejpeg(
    where: int, value: int, cut: int, is_progressive: bool
) -> None:
    buffer = io.BytesIO()
    pictures.texture((64, 48)).save(buffer, "JPEG", progressive=is_progressive)
    data = bytearray(buffer.getvalue())
    data[where % len(data)] = value
    data = data[: len(data) - cut % len(data)] if cut > 1500 else data

    assert outcome_of(bytes(data)) == by_pillow(bytes(data))


# --- reduced ----------------------------------------------------------------------------------

#: Shorter edge of a JPEG to the part of its size at which it is decoded for a least edge of 20.
PARTS = {
    5: 1,
    20: 1,
    39: 1,
    40: 2,
    41: 2,
    79: 2,
    80: 4,
    81: 4,
    159: 4,
    160: 8,
    161: 8,
    # libjpeg has no sixteenth.
    320: 8,
}


def coloured_jpeg(mode: str, size: tuple[int, int], **options: Any) -> bytes:
    return pictures.encoded(pictures.texture(size).convert(mode), "JPEG", **options)


@pytest.mark.parametrize(("edge", "part"), PARTS.items(), ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_reduced_while_no_edge_becomes_too_short(mode: str, edge: int, part: int) -> None:
    # 7 more, so that the longer edge is no multiple where the shorter one is.
    for size in ((edge + 7, edge), (edge, edge + 7)):
        picture = decode(coloured_jpeg(mode, size), least_edge=20)

        assert (picture.rgb.mode, picture.format) == ("RGB", "JPEG")
        assert picture.rgb.size == (-(-size[0] // part), -(-size[1] // part))
        assert min(picture.rgb.size) >= min(20, edge)
        assert (picture.width, picture.height) == size


@pytest.mark.parametrize("orientation", [1, 6, 8])
@pytest.mark.parametrize("size", [(161, 80), (80, 161)], ids=str)
def test_a_reduced_jpeg_is_upright_and_keeps_the_size_of_the_whole(
    size: tuple[int, int], orientation: int
) -> None:
    how = pictures.STORED[orientation]
    upright = pictures.texture(size)
    stored = upright if how is None else upright.transpose(how)
    data = pictures.encoded(stored, "JPEG", exif=pictures.exif_block(orientation))

    picture = decode(data, least_edge=40)

    assert picture.rgb.size == (-(-size[0] // 2), -(-size[1] // 2))
    assert (picture.width, picture.height) == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_orientation_of_a_reduced_jpeg_is_undone(orientation: int) -> None:
    picture = decode(pictures.turned(orientation), least_edge=8)

    assert picture.rgb.size == (16, 8)
    assert (picture.width, picture.height) == (32, 16)
    centres = [picture.rgb.getpixel(at) for at in ((4, 2), (12, 2), (4, 6), (12, 6))]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    # Lossy colours come back within a few steps.
    np.testing.assert_allclose(np.array(centres, int), expected, atol=12)


@pytest.mark.parametrize("part", [2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_reduced_jpeg_is_the_same_picture(mode: str, part: int) -> None:
    data = coloured_jpeg(mode, (320, 240), quality=95)
    means = np.asarray(decode(data).rgb.reduce(part), np.int16)

    reduced = np.asarray(decode(data, least_edge=240 // part).rgb, np.int16)

    # libjpeg leaves out frequencies where reduce() takes means: a few steps apart.
    assert np.abs(reduced - means).mean() < 2.5


def test_reduced_adobe_cmyk_is_not_a_negative() -> None:
    picture = decode(pictures.cmyk_jpeg((0, 255, 255, 0)), least_edge=12)

    assert picture.rgb.size == (16, 12)
    np.testing.assert_allclose(picture.rgb.getpixel((0, 0)), (255, 0, 0), atol=15)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if not suffix.startswith(".jp")])
def test_other_formats_are_never_reduced(suffix: str) -> None:
    data = pictures.one_of_each()[suffix]

    picture = decode(data, least_edge=6)

    assert (picture.width, picture.height) == picture.rgb.size == (64, 48)
    assert picture.rgb.tobytes() == decode(data).rgb.tobytes()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"orientation": 6}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_is_not_reduced_has_the_pixels_of_pillow(
    mode: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    exif = pictures.exif_block(options.pop("orientation", 1))
    data = coloured_jpeg(mode, (333, 201), exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB").tobytes()

    # Half of 201 is less than 101.
    for least_edge in (None, 101, 201, 1000):
        assert outcome_of(data, least_edge) == expected, least_edge


@needs_simplejpeg
@pytest.mark.parametrize("least_edge", [6, 12, 24, 25, 48, 49])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_reduced_pixels_are_the_same_with_and_without_simplejpeg(
    mode: str, least_edge: int
) -> None:
    data = coloured_jpeg(mode, (64, 48))

    assert outcome_of(data, least_edge) == by_pillow(data, least_edge)


@needs_simplejpeg
@pytest.mark.parametrize("part", [2, 4, 8])
@pytest.mark.parametrize("size", [(640, 480), (333, 207), (201, 499), (17, 16)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "quality": 40}], ids=str)
def test_simplejpeg_reduces_to_the_pixels_of_pillow(
    size: tuple[int, int], part: int, subsampling: str, options: dict[str, Any]
) -> None:
    data = coloured_jpeg("RGB", size, subsampling=subsampling, **options)
    least_edge = -(-min(size) // part)
    reduced = (-(-size[0] // part), -(-size[1] // part))

    assert _plain_jpeg(data, reduced) is not None
    assert outcome_of(data, least_edge) == by_pillow(data, least_edge)


def test_the_limit_of_pixels_counts_those_of_the_whole_picture() -> None:
    data = pictures.jpeg((64, 48))

    assert decode(data, max_pixels=64 * 48, least_edge=6).rgb.size == (8, 6)
    with pytest.raises(DecodeError, match="megapixels"):
        decode(data, max_pixels=64 * 48 - 1, least_edge=6)


@given(
    where=st.integers(2, 10**6),
    value=st.integers(0, 255),
    cut=st.integers(0, 3000),
    is_progressive=st.booleans(),
)
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_what_is_damaged_is_refused_reduced_and_in_full(
    where: int, value: int, cut: int, is_progressive: bool
) -> None:
    data = bytearray(pictures.jpeg((64, 48), progressive=is_progressive))
    data[where % len(data)] = value
    # With an end of its own, so that it is left to the decoder to find what is missing.
    data = data[: len(data) - cut % len(data)] + b"\xff\xd9" if cut > 1500 else data

    whole, reduced = outcome_of(bytes(data)), outcome_of(bytes(data), 12)

    assert isinstance(whole, str) == isinstance(reduced, str)
