"""The files of a version while they are written; nobody reads them yet.

Law: memory is that of the graph plus a chunk of rows and a number per row, and a key for each
that was added ahead. The manifest is written last, from the files as they lie on disk.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from toolkit.embedding.store import sync_folder
from toolkit.errors import StorageError
from toolkit.faults import point
from toolkit.index.ahead import Begun, GraphAhead
from toolkit.index.items import ItemRow, ItemTable, write_items
from toolkit.index.quality import graph_recall
from toolkit.index.vector_index import VectorIndex
from toolkit.index.version import (
    FORMAT_VERSION,
    GRAPH,
    ITEMS,
    LOCK,
    MANIFEST,
    VECTORS,
    IndexVersion,
    checksum,
    map_vectors,
)

logger = logging.getLogger(__name__)

#: Gives the vectors of image keys, in their order, a chunk of float32 ``(m, dim)`` at a time.
VectorSource: TypeAlias = Callable[[Iterable[bytes]], Iterator[NDArray[np.float32]]]

#: Told the step (``vectors``, ``graph``), the rows done and the rows in all; may raise.
Progress: TypeAlias = Callable[[str, int, int], None]

#: Share of rows added, removed, or removed earlier, above which the graph is built anew.
MAX_CHANGED = 0.2

#: Rows of the index that measure the recall of a new graph.
RECALL_SAMPLE = 100

#: How far from 1 the length of a vector may be.
LENGTH_TOLERANCE = 1e-3

# Rows copied at once, and rows added to the graph between two reports of progress.
_COPY_ROWS, _ADD_ROWS = 4096, 1024

#: Libraries whose version a manifest notes.
_LIBRARIES = ("usearch", "numpy", "timm", "torch")


class Draft:
    """Writes one version; its methods are called once each, in the order they stand in.

    Args:
        folder: The version's folder, empty.
        dim: Components of a vector.
        dtype: Precision of the graph.
        threads: For the graph.
        progress: Told how far it is.
    """

    def __init__(
        self, folder: Path, dim: int, dtype: str, threads: int, progress: Progress | None
    ) -> None:
        self._folder, self._dim, self._dtype = folder, dim, dtype
        self._threads, self._progress = threads, progress or _silent

    def close(self) -> None:
        """Unmap the vectors: mapped files keep their room, and on Windows their name."""
        self._vectors = np.empty((0, self._dim), np.float32)

    def items(self, rows: Iterable[ItemRow], previous: IndexVersion | None) -> None:
        """Write the table, and find each row's content in a version of the same encoder."""
        (self._folder / LOCK).touch()
        self._previous = previous
        self._n, self._n_copies = write_items(self._folder / ITEMS, rows)
        self._origin = np.full(self._n, -1, np.int64)
        if previous is not None:
            with contextlib.closing(ItemTable(self._folder / ITEMS)) as table:
                self._origin = table.origins(previous.items_path, self._n)
        self._new = np.flatnonzero(self._origin < 0)
        n_before = previous.n if previous is not None else 0
        self._gone = np.setdiff1d(np.arange(n_before), self._origin)

    def vectors(self, source: VectorSource) -> None:
        """Write the vectors, row after row; new ones come from the source."""
        with (
            contextlib.closing(ItemTable(self._folder / ITEMS)) as table,
            (self._folder / VECTORS).open("wb") as file,
        ):
            fresh = _Fresh(source(self._new_keys(table)), self._dim)
            header = {"descr": "<f4", "fortran_order": False, "shape": (self._n, self._dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, self._n, _COPY_ROWS):
                origin = self._origin[start : start + _COPY_ROWS]
                file.write(self._block(origin, fresh).data)
                self._progress("vectors", start + len(origin), self._n)
            fresh.expect_end()
        self._vectors = map_vectors(self._folder / VECTORS, (self._n, self._dim))

    def _new_keys(self, table: ItemTable) -> Iterator[bytes]:
        for key, origin in zip(table.image_keys(), self._origin, strict=True):
            if origin < 0:
                yield key

    def _block(self, origin: NDArray[np.int64], fresh: _Fresh) -> NDArray[np.float32]:
        block = np.empty((len(origin), self._dim), "<f4")
        known = origin >= 0
        if self._previous is not None:
            block[known] = self._previous.vectors[origin[known]]
        block[~known] = fresh.take(int(np.count_nonzero(~known)))
        return block

    def graph(self, ahead: GraphAhead | None) -> None:
        """Write the graph: what was begun ahead, the previous one, or a new one, with all rows."""
        begun = ahead.take() if ahead else None
        if begun is not None and not self._is_useful(begun):
            begun = None  # let go of before another one is read
        begun = begun or self._begin()
        graph, numbers = begun.graph, self._numbers(begun)
        n_begun = len(begun.numbers) + (begun.base.n if begun.base else 0)
        unused = np.setdiff1d(np.arange(n_begun), numbers)
        graph.remove(unused)
        kept, missing = np.flatnonzero(numbers >= 0), np.flatnonzero(numbers < 0)
        graph.renumber(numbers[kept], kept)
        logger.info("%d of %d rows are in the graph, %d to add", len(kept), self._n, len(missing))
        for start in range(0, len(missing), _ADD_ROWS):
            keys = missing[start : start + _ADD_ROWS]
            graph.add(keys, self._vectors[keys], self._threads)
            self._progress("graph", start + len(keys), len(missing))
        graph.save(self._folder / GRAPH)
        self._removed = len(unused) + (_removed_since_rebuild(begun.base) if begun.base else 0)
        point("during-index-save")

    def _is_useful(self, begun: Begun) -> bool:
        if begun.base is not None:
            return begun.base is self._previous
        n_kept = self._n - len(self._new)
        return self._growing is None or len(begun.numbers) >= n_kept

    @property
    def _growing(self) -> IndexVersion | None:
        """The previous version, if its graph is worth changing."""
        n_changed = len(self._new) + len(self._gone)
        if self._previous and may_grow(self._previous, self._dtype, self._n, n_changed):
            return self._previous
        return None

    def _begin(self) -> Begun:
        older = self._growing
        if older is not None:
            return Begun(VectorIndex.open(older.graph_path, view=False), older, {})
        return Begun(VectorIndex.create(self._dim, self._dtype), None, {})

    def _numbers(self, begun: Begun) -> NDArray[np.int64]:
        """The number under which a graph holds each row of this version, -1 for none."""
        numbers = self._origin.copy() if begun.base else np.full(self._n, -1, np.int64)
        if begun.numbers:
            with contextlib.closing(ItemTable(self._folder / ITEMS)) as table:
                for row, key in enumerate(table.image_keys()):
                    if numbers[row] < 0:
                        numbers[row] = begun.numbers.get(key, -1)
        return numbers

    def manifest(self, encoder: dict[str, Any], extra: dict[str, Any]) -> None:
        """Make the files durable, measure the graph, and write the manifest."""
        recall = graph_recall(
            VectorIndex.open(self._folder / GRAPH, view=True), self._vectors, sample=RECALL_SAMPLE
        )
        manifest = {
            "format_version": FORMAT_VERSION,
            "n": self._n,
            "dim": self._dim,
            "dtype": self._dtype,
            "encoder": encoder,
            "counts": {
                "copies": self._n_copies,
                "added": len(self._new),
                "removed": len(self._gone),
                "kept": self._n - len(self._new),
            },
            "removed_since_rebuild": self._removed,
            "recall_at_10": recall,
            "files": {name: _sealed(self._folder / name) for name in (ITEMS, VECTORS, GRAPH)},
            "libraries": dict(_library_versions()),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "extra": extra,
        }
        path = self._folder / MANIFEST
        path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync_file(path)
        sync_folder(self._folder)


def may_grow(older: IndexVersion, dtype: str, n: int, n_changed: int) -> bool:
    """Whether the graph of a version is worth changing, rather than building a new one.

    Args:
        older: The version.
        dtype: Precision that the new graph shall have.
        n: Rows that it shall have.
        n_changed: Rows added and removed.
    """
    n_changed += _removed_since_rebuild(older)
    return older.manifest["dtype"] == dtype and n_changed <= MAX_CHANGED * n


def _removed_since_rebuild(version: IndexVersion) -> int:
    return int(version.manifest["removed_since_rebuild"])


class _Fresh:
    """Vectors from a source, taken in other portions than they come in."""

    def __init__(self, chunks: Iterator[NDArray[np.float32]], dim: int) -> None:
        self._chunks, self._dim = chunks, dim
        self._rest = np.empty((0, dim), np.float32)

    def take(self, n: int) -> NDArray[np.float32]:
        parts = [self._rest]
        while sum(map(len, parts)) < n:
            parts.append(self._next())
        rows = np.concatenate(parts)
        self._rest = rows[n:]
        return rows[:n]

    def expect_end(self) -> None:
        if len(self._rest) or next(self._chunks, None) is not None:
            raise StorageError("the source gave more vectors than it was asked for")

    def _next(self) -> NDArray[np.float32]:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise StorageError("the source gave fewer vectors than it was asked for")
        if chunk.ndim != 2 or chunk.shape[1] != self._dim or chunk.dtype != np.float32:
            raise StorageError(
                f"the source gave {chunk.dtype} {chunk.shape}, not float32 (m, {self._dim})"
            )
        lengths = np.sqrt(np.einsum("ij,ij->i", chunk, chunk))
        wrong = ~(np.abs(lengths - 1) <= LENGTH_TOLERANCE)  # true for nan as well
        if wrong.any():
            raise StorageError(
                f"the source gave a vector of length {lengths[wrong][0]:.6g}; cosine search needs "
                "length 1"
            )
        return chunk


def _sealed(path: Path) -> dict[str, Any]:
    """Make a file durable; its size and checksum."""
    _sync_file(path)
    return {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _library_versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _silent(step: str, done: int, total: int) -> None:
    pass
