"""Seconds to add a few images to a large index: ``python benchmarks/publish.py --dim 256``.

The vectors are drawn around 2,000 centres, as those of photographs are. Each step is timed by
the progress reports of the writer, so the figures are those of a real build.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.index.build import open_current, publish, write_version
from toolkit.index.items import Copy, ItemRow
from toolkit.index.nearest import unit

N_CENTRES = 2000


def clustered(n: int, dim: int) -> NDArray[np.float32]:
    """Unit vectors, float32 ``(n, dim)``, each near one of the centres."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((N_CENTRES, dim), np.float32)
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

    def show(self, label: str, written: float, published: float) -> None:
        """Print what each step took."""
        marks = [self.started, *self.ended.values(), written, published]
        names = [*(f"until last of {step}" for step in self.ended), "save, recall, seal", "publish"]
        print(f"{label}: {published - self.started:.2f} s")
        for name, begin, end in zip(names, marks, marks[1:], strict=False):
            print(f"    {name:24} {end - begin:6.2f} s")


def build(folder: Path, numbers: list[int], vectors: NDArray[np.float32], threads: int) -> None:
    """Write and publish a version of these rows, on top of the published one."""

    def source(keys: Iterable[bytes]) -> Iterator[NDArray[np.float32]]:
        wanted = [int.from_bytes(key, "big") for key in keys]
        for start in range(0, len(wanted), 4096):
            yield vectors[wanted[start : start + 4096]]

    previous = open_current(folder) if (folder / "CURRENT").exists() else None
    steps = Steps()
    version = write_version(
        folder,
        rows=map(row, numbers),
        vectors=source,
        dim=vectors.shape[1],
        encoder={"fingerprint": "bench"},
        extra={},
        previous=previous,
        threads=threads,
        progress=steps,
    )
    written = time.perf_counter()
    publish(folder, version)
    steps.show(f"{len(numbers)} rows", written, time.perf_counter())
    with open_current(folder) as index:
        print("   ", index.manifest["counts"], "recall@10", index.manifest["recall_at_10"])


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
    added = set(np.linspace(0, total - 1, given.new, dtype=int).tolist())
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        build(folder, [n for n in range(total) if n not in added], vectors, given.threads)
        build(folder, list(range(total)), vectors, given.threads)
        started = time.perf_counter()
        with open_current(folder) as index:
            index.search(vectors[:1], 10)
        print(f"open and first search: {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
