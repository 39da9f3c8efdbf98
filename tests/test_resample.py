"""The compiled resize: Pillow's pixels or nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from toolkit.images import resample
from toolkit.images.resample import Box

pytest.importorskip("numba")

Pixels = NDArray[np.uint8]

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture(autouse=True)
def _ready(_engines: Path) -> None:
    assert resample.load(_engines / "kernels")


def noise(width: int, height: int, seed: int = 0) -> Pixels:
    """Every difference there can be between neighbours: what a rounding error would show in."""
    shape = (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def by_pillow(pixels: Pixels, size: tuple[int, int], box: Box, name: str) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size, FILTERS[name]).crop(box))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(
    ("had", "wanted"),
    [
        ((1024, 768), (341, 256)),
        ((768, 1024), (256, 341)),
        ((2592, 1944), (341, 256)),
        ((64, 64), (224, 224)),
        ((300, 40), (200, 40)),
        ((40, 60), (40, 80)),
        ((1, 1), (5, 7)),
        ((3000, 4), (500, 2)),
        ((129, 191), (64, 95)),
        ((256, 258), (255, 256)),
    ],
    ids=str,
)
def test_pixels_are_those_of_pillow(
    name: str, had: tuple[int, int], wanted: tuple[int, int]
) -> None:
    pixels = noise(*had)
    width, height = wanted
    for box in (Box(0, 0, width, height), Box(width // 3, height // 4, width, height // 2 + 1)):
        ours = resample.resize(pixels, wanted, box, name)
        assert ours is not None
        assert np.array_equal(ours, by_pillow(pixels, wanted, box, name))


@pytest.mark.parametrize("name", FILTERS)
def test_any_size_gives_pixels_of_pillow(name: str) -> None:
    rng = np.random.default_rng(1)
    n_done = 0
    for seed in range(600):
        width, height = (int(edge) for edge in rng.integers(1, 500, 2))
        if seed % 5 == 0:
            height = width + int(rng.integers(-4, 5))
            height = max(1, height)
        # As models want it: to one edge, both sides alike; and squeezed, as far as Pillow allows.
        edge = int(rng.integers(1, 300))
        wanted = (max(1, edge * width // height), edge)
        if seed % 4 == 0:
            wanted = (edge, int(rng.integers(1, 300)))
        if seed % 10 == 0:  # almost as it was: a pixel more or less decides what Pillow does
            wanted = (max(1, width - int(rng.integers(-1, 3))), max(1, height - 2))
        if wanted[0] > 2000:
            continue
        pixels, box = noise(width, height, seed), Box(0, 0, *wanted)
        ours = resample.resize(pixels, wanted, box, name)
        if ours is not None:
            n_done += 1
            right = by_pillow(pixels, wanted, box, name)
            assert np.array_equal(ours, right), (width, height, wanted)
    assert n_done > 200


@pytest.mark.parametrize("whole", [0, 255])
def test_what_overshoots_is_clipped(whole: int) -> None:
    pixels = noise(90, 70)
    pixels[:, 45:] = whole
    box = Box(0, 0, 180, 140)
    ours = resample.resize(pixels, (180, 140), box, "bicubic")
    assert ours is not None
    assert np.array_equal(ours, by_pillow(pixels, (180, 140), box, "bicubic"))


def test_arrays_that_cannot_be_written_to_are_read() -> None:
    pixels = np.asarray(Image.fromarray(noise(90, 70)))
    assert not pixels.flags.writeable
    assert resample.resize(pixels, (9, 7), Box(0, 0, 9, 7), "bicubic") is not None


def test_threads_do_not_meet() -> None:
    pictures = [noise(400 + n, 300, n) for n in range(8)]

    def small(pixels: Pixels) -> Pixels:
        found = resample.resize(pixels, (133, 100), Box(10, 5, 120, 95), "bicubic")
        assert found is not None
        return found

    alone = [small(pixels) for pixels in pictures]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for one, other in zip(alone, pool.map(small, pictures), strict=True):
                assert np.array_equal(one, other)


def test_what_pillow_does_in_another_way_is_left_to_it() -> None:
    box = Box(0, 0, 4, 8)
    assert resample.resize(noise(10, 20), (4, 8), box, "lanczos") is None
    assert resample.resize(noise(10, 21), (4, 8), box, "bicubic") is None
    assert resample.resize(noise(10, 20), (4, 7), Box(0, 0, 4, 7), "bicubic") is None
    assert resample.resize(noise(10, 20), (4, 8), box, "bicubic") is not None
    # A model that squashes to 224 makes this one a little wider and a little less high.
    assert resample.resize(noise(223, 225), (224, 224), Box(0, 0, 224, 224), "bicubic") is None


def test_kernels_that_differ_from_pillow_are_not_used(tmp_path: Path) -> None:
    right = resample._kernels
    assert right is not None

    def too_bright(*given: Any) -> None:
        right.down(*given)
        given[-1][0, 0, 0] ^= 1

    wrong = cast(ModuleType, SimpleNamespace(across=right.across, down=too_bright))
    with pytest.raises(ArithmeticError, match="differs from Pillow's"):
        resample._checked(wrong)


def said_by(cache: Path, tmp_path: Path) -> str:
    """What a new process says of its kernels."""
    code = (
        "import sys, logging; from pathlib import Path; logging.basicConfig()\n"
        "from toolkit.images import resample; print(resample.load(Path(sys.argv[1])))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(cache)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    return ran.stdout.strip()


@pytest.mark.parametrize("harm", ["cut", "garbage", "empty"])
def test_a_damaged_cache_costs_time_only(tmp_path: Path, harm: str) -> None:
    cache = tmp_path / "kernels"
    assert said_by(cache, tmp_path) == "True"
    files = [*cache.rglob("*.nb?")]
    assert files
    how: dict[str, Callable[[bytes], bytes]] = {
        "cut": lambda data: data[: len(data) // 2],
        "garbage": lambda data: bytes(len(data)),
        "empty": lambda data: b"",
    }
    for file in files:
        file.write_bytes(how[harm](file.read_bytes()))

    said = said_by(cache, tmp_path)

    assert said == "True"
    assert said_by(cache, tmp_path) == "True"


def test_kernels_that_are_not_compiled_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert said_by(tmp_path / "kernels", tmp_path) == "False"


def test_a_cache_that_cannot_be_made_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert said_by(tmp_path / "file" / "kernels", tmp_path) == "False"
