"""What the benchmarks share: photos as a camera gives them, the machine, medians and ratios."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from toolkit.images.datasets import Source
from toolkit.images.walk import Found, Rules, walk
from toolkit.machine import usable_cpus
from toolkit.samples import PHOTOS

#: Of the grain that is laid over photos, so that their JPEG is no smaller than a camera's.
SEED = 0

#: Standard deviation of the grain in grey levels.
GRAIN = 4.0

_LIBRARIES = (
    *("torch", "timm", "openvino", "pillow", "simplejpeg", "numba"),
    *("celery", "numpy", "usearch"),
)

# These are set on some machines, and slow numpy down.
for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)


@dataclass(frozen=True)
class Kind:
    """Photos of one kind: their size, and how the JPEG is written."""

    name: str
    size: tuple[int, int]
    is_progressive: bool = False


SMALL = Kind("1024x768", (1024, 768))
LARGE = Kind("5 MP baseline", (2592, 1944))
LARGE_PROGRESSIVE = Kind("5 MP progressive", (2592, 1944), is_progressive=True)


def photos_of(kind: Kind, target: Path, n: int, source: Path = PHOTOS) -> list[str]:
    """Write ``n`` photos, each a content of its own, and give their paths in order.

    They are those of ``source`` in turn, in one size, with grain and with another quality each
    time round.
    """
    target.mkdir(parents=True)
    files = files_of(source)
    noise = np.random.default_rng(SEED)
    width, height = kind.size
    grain = noise.normal(0, GRAIN, (height, width, 1)).astype(np.int16)
    for number in range(n):
        with Image.open(files[number % len(files)]) as image:
            photo = image.convert("RGB").resize(kind.size, Image.Resampling.LANCZOS)
        pixels = np.asarray(photo, np.int16) + np.roll(grain, number * 31, axis=(0, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            target / f"{number:05d}.jpg",
            quality=90 - number // len(files),
            progressive=kind.is_progressive,
        )
    return files_of(target)


def files_of(folder: Path) -> list[str]:
    """Every photo, in the order of an index."""
    found = walk(Source("bench", os.fsencode(folder.absolute())), Rules())
    return [os.fsdecode(p) for p in sorted(f.path for f in found if isinstance(f, Found))]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {
        "processor": _processor(),
        "cores": usable_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
        "seed": SEED,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


@dataclass
class Figures:
    """Figures of several ways that took turns: each has one of every round.

    Attributes:
        title: What was measured.
        unit: Of the figures.
        rounds: Way → its figure in each round.
    """

    title: str
    unit: str = "images/s"
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, way: str, figure: float) -> None:
        """Note one figure, and show that something goes on."""
        self.rounds.setdefault(way, []).append(figure)
        print(f"  {self.title}: {way} {figure:.1f} {self.unit}", file=sys.stderr, flush=True)

    def median(self, way: str) -> float:
        """Of a way's rounds."""
        return statistics.median(self.rounds[way])

    def ratio(self, way: str, other: str) -> float:
        """Median over the rounds of one way's figure through another's of the same round."""
        pairs = zip(self.rounds[way], self.rounds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def lines(self, against: Mapping[str, Sequence[tuple[str, float]]]) -> Iterator[str]:
        """A table of Markdown: the medians, and the ratios that have a bar."""
        yield f"### {self.title}"
        yield ""
        yield f"| way | median, {self.unit} | rounds | ratio |"
        yield "|---|---|---|---|"
        for way, rounds in self.rounds.items():
            ratios = [
                f"{self.ratio(way, other):.2f} times {other} (bar {bar:g})"
                for other, bar in against.get(way, ())
                if other in self.rounds
            ]
            shown = ", ".join(f"{figure:.1f}" for figure in rounds)
            yield f"| {way} | **{self.median(way):.1f}** | {shown} | {'; '.join(ratios)} |"
        yield ""

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"title": self.title, "unit": self.unit, "rounds": self.rounds}


def write_report(lines: Sequence[str], figures: Mapping[str, Any], json_file: Path | None) -> None:
    """Print a report under the machine it is from, and write its figures as JSON."""
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(
        f"{about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, "
        f"{about['system']}, Python {about['python']}; {versions}; seed {SEED}\n"
    )
    print("\n".join(lines))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"machine": about, **figures}, indent=1) + "\n")
