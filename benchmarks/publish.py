"""Seconds to add a few images to a large index: ``python benchmarks/publish.py --dim 256``.

The vectors are drawn around 2,000 centres, as those of photographs are. Each step is timed by
the progress reports of the writer, so the figures are those of a real build.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.index.build import open_current, publish, write_version
from toolkit.index.items import Copy, ItemRow
from toolkit.index.nearest import unit

N_CENTRES = 2000

#: Of the centres, and of what is drawn around them.
SEED = 0

#: Gives the vectors of some numbers, float32 ``(m, dim)``.
Take = Callable[[list[int]], NDArray[np.float32]]

# Vectors given at once.
_CHUNK = 4096


def clustered(n: int, dim: int, block: int = 0) -> NDArray[np.float32]:
    """Unit vectors, float32 ``(n, dim)``, each near one of the centres.

    Blocks have the same centres and different vectors: what is too large to be drawn at once
    is drawn block by block.
    """
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((N_CENTRES, dim), np.float32)
    if block:
        rng = np.random.default_rng((SEED, block))
    noise = rng.standard_normal((n, dim), np.float32)
    return unit(centres[rng.integers(N_CENTRES, size=n)] + 0.7 * noise)


def row(number: int) -> ItemRow:
    """The item of a vector; its content key is its number."""
    path = b"photos/%d.jpg" % number
    key = number.to_bytes(16, "big")
    return ItemRow(key, "photos", path, "a", 64, 48, "JPEG", (Copy("photos", path, "a"),))


class Steps:
    """When each step of a writer ended."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.ended: dict[str, float] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        """Note the time; the last report of a step stands."""
        self.ended[step] = time.perf_counter()

    def seconds(self, written: float, published: float) -> dict[str, float]:
        """What each step took."""
        marks = [self.started, *self.ended.values(), written, published]
        names = [*(f"until last of {step}" for step in self.ended), "save, recall, seal", "publish"]
        spans = itertools.pairwise(marks)
        return {name: end - begin for name, (begin, end) in zip(names, spans, strict=True)}


@dataclass(frozen=True)
class Built:
    """What one version took, and what its manifest says."""

    n: int
    seconds: float
    steps: dict[str, float]
    counts: dict[str, int]
    recall_at_10: float

    def show(self) -> None:
        """Print it."""
        print(f"{self.n} rows: {self.seconds:.2f} s")
        for name, seconds in self.steps.items():
            print(f"    {name:24} {seconds:6.2f} s")
        print("   ", self.counts, "recall@10", self.recall_at_10)


def build(folder: Path, numbers: NDArray[np.int64], take: Take, dim: int, threads: int) -> Built:
    """Write and publish a version of these rows, on top of the published one.

    Nothing is held that grows with the rows but their numbers.
    """

    def source(keys: Iterable[bytes]) -> Iterator[NDArray[np.float32]]:
        wanted = (int.from_bytes(key, "big") for key in keys)
        while chunk := list(itertools.islice(wanted, _CHUNK)):
            yield take(chunk)

    previous = open_current(folder) if (folder / "CURRENT").exists() else None
    steps = Steps()
    version = write_version(
        folder,
        rows=(row(int(number)) for number in numbers),
        vectors=source,
        dim=dim,
        encoder={"fingerprint": "bench"},
        extra={},
        previous=previous,
        threads=threads,
        progress=steps,
    )
    written = time.perf_counter()
    publish(folder, version)
    published = time.perf_counter()
    with open_current(folder) as index:
        return Built(
            len(numbers),
            published - steps.started,
            steps.seconds(written, published),
            index.manifest["counts"],
            index.manifest["recall_at_10"],
        )


def main() -> None:
    """Build once, add rows spread over the whole order, and say what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    total = given.rows + given.new
    vectors = clustered(total, given.dim)
    numbers = np.arange(total)
    added = np.linspace(0, total - 1, given.new, dtype=int)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for some in (np.delete(numbers, added), numbers):
            build(folder, some, vectors.__getitem__, given.dim, given.threads).show()
        started = time.perf_counter()
        with open_current(folder) as index:
            index.search(vectors[:1], 10)
        print(f"open and first search: {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
