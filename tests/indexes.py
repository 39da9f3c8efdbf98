"""Small indexes, made for real: rows, vectors, and versions on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.index.build import IndexVersion, open_current, publish, write_version
from toolkit.index.draft import VectorSource
from toolkit.index.items import Copy, ItemRow
from toolkit.index.nearest import unit

Vectors = NDArray[np.float32]


def key_of(name: str) -> bytes:
    """A content key that shows the name it is of."""
    return name.encode().rjust(16, b".")


def a_row(name: str, *other_names: str, label: str | None = "cat") -> ItemRow:
    """A content, and the files that hold it."""
    copies = tuple(Copy("d", f"d/{n}.jpg".encode(), label) for n in (name, *other_names))
    return ItemRow(key_of(name), "d", copies[0].path, label, 4, 3, "JPEG", copies)


def directions(*degrees: float) -> Vectors:
    """Unit vectors in the plane; the cosine of two is that of the angle between them."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def random_units(n: int, dim: int, seed: int = 0) -> Vectors:
    """Unit vectors in every direction, float32 ``(n, dim)``."""
    return unit(np.random.default_rng(seed).standard_normal((n, dim)))


def source_of(by_name: Mapping[str, Vectors], asked: list[str] | None = None) -> VectorSource:
    """A store of vectors that notes what it was asked for, and answers two at a time."""

    def source(keys: Iterable[bytes]) -> Iterator[Vectors]:
        names = [key.decode().lstrip(".") for key in keys]
        if asked is not None:
            asked.extend(names)
        for start in range(0, len(names), 2):
            yield np.stack([by_name[name] for name in names[start : start + 2]])

    return source


def write(
    folder: Path, by_name: Mapping[str, Vectors], *, asked: list[str] | None = None, **given: Any
) -> Path:
    """Write a version that holds these vectors, in the order of the mapping."""
    dim = given.pop("dim", 2)
    rows = given.pop("rows", None) or [a_row(name) for name in by_name]
    return write_version(
        folder,
        rows=rows,
        vectors=source_of(by_name, asked),
        dim=dim,
        encoder={"fingerprint": given.pop("fingerprint", "f")},
        extra={"name": "n"},
        **given,
    )


def published(folder: Path, by_name: Mapping[str, Vectors], **given: Any) -> IndexVersion:
    """Write a version on top of the published one, publish it, and open it."""
    if (folder / "CURRENT").exists():
        with open_current(folder) as previous:
            version = write(folder, by_name, previous=previous, **given)
    else:
        version = write(folder, by_name, **given)
    publish(folder, version)
    return open_current(folder)


def named(vectors: Vectors, prefix: str = "") -> dict[str, Vectors]:
    """Rows under names that sort as they stand."""
    return {f"{prefix}{i:05d}": vector for i, vector in enumerate(vectors)}
