"""The search graph: the one room with usearch, which shields the others from its traps.

Law: keys are row numbers; threads are always said; a graph that lies on disk is mapped, not
read, unless it is to be changed. No progress callback is handed to usearch: an exception in
one (Ctrl-C is enough) aborts the interpreter.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DamagedIndexError, StorageError
from toolkit.machine import free_bytes, usable_cpus

#: Bytes of a component in the graph, by dtype.
DTYPE_BYTES = {"f32": 4, "f16": 2, "i8": 1}

#: Rows that a search of the graph keeps in view. Of a million clustered vectors of 256
#: components it finds .965 of the ten nearest with 64, .989 with 128 and .9993 with 256, in 0.55,
#: 0.63 and 0.77 ms.
EXPANSION = 256

# Above every row number: where keys wait while a renaming would collide with itself.
_ASIDE = 1 << 40


class VectorIndex:
    """A usearch graph over unit vectors, nearest by cosine.

    Attributes:
        raw: The usearch handle.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    @classmethod
    def create(cls, dim: int, dtype: str) -> VectorIndex:
        """An empty graph.

        Args:
            dim: Components of a vector.
            dtype: How they are held: ``f32``, ``f16`` or ``i8``.
        """
        from usearch.index import Index  # deferred: builds that only compare need no usearch

        return cls(Index(ndim=dim, metric="cos", dtype=dtype))

    @classmethod
    def open(cls, path: Path, *, view: bool) -> VectorIndex:
        """Open a saved graph.

        Args:
            path: The file.
            view: Map it read-only instead of reading it into memory.

        Raises:
            DamagedIndexError: If it is missing or is no graph.
        """
        from usearch.index import Index  # deferred: see create

        cure = "build the index again with replace=True (--replace): nothing is embedded again"
        try:
            raw = Index.restore(path, view=view)
        except (RuntimeError, ValueError) as error:
            raise DamagedIndexError(f"{path} is no search graph ({error}); {cure}") from error
        if raw is None:  # what usearch says of a missing file
            raise DamagedIndexError(f"{path} is missing or is no search graph; {cure}")
        raw.expansion_search = EXPANSION  # type: ignore[misc]  # it has a setter
        return cls(raw)

    def __len__(self) -> int:
        return len(self.raw)

    def add(self, keys: NDArray[np.int64], vectors: NDArray[np.float32], threads: int) -> None:
        """Add rows.

        Args:
            keys: Row numbers, none of them there yet, shape ``(m,)``.
            vectors: float32, shape ``(m, dim)``.
            threads: At most so many; with more than one the graph differs from run to run.
        """
        self.raw.add(keys, vectors, threads=threads)

    def remove(self, keys: NDArray[np.int64]) -> None:
        """Take rows out; the file keeps their room until it is built anew."""
        if len(keys):
            self.raw.remove(keys, threads=1)

    def renumber(self, old: NDArray[np.int64], new: NDArray[np.int64]) -> None:
        """Give rows other numbers, all at once: ``old`` and ``new`` may overlap."""
        moved = old != new
        old, new = old[moved], new[moved]
        if len(old):
            self.raw.rename(old, new + _ASIDE)
            self.raw.rename(new + _ASIDE, new)

    def candidates(
        self, queries: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows that the graph holds for near, as pairs.

        Args:
            queries: float32, shape ``(m, dim)``.
            count: Rows wanted for each; there may be fewer.

        Returns:
            Numbers of the queries, ascending, and the rows; both int64, shape ``(p,)``.
        """
        threads = min(len(queries), usable_cpus())
        found = self.raw.search(queries, count, threads=threads)
        # A single query is answered with another type, without padding or counts.
        keys = np.atleast_2d(found.keys)
        counts = np.asarray(getattr(found, "counts", [keys.shape[1]]))
        # Places beyond a query's count hold key 0, which is a real row.
        valid = np.arange(keys.shape[1]) < counts[:, None]
        return np.nonzero(valid)[0], keys[valid].astype(np.int64)

    def save(self, path: Path) -> None:
        """Write the graph; the caller fsyncs.

        Raises:
            OSError: ``ENOSPC``, if the disk is full.
            StorageError: If it cannot be written for another reason.
        """
        size = int(self.raw.serialized_length)
        try:
            self.raw.save(path)
            reason = "the file is short"
        except RuntimeError as error:
            reason = str(error)
        # usearch does not say why a write failed, nor look whether the last one did.
        written = path.stat().st_size if path.exists() else 0
        if written == size:
            return
        if free_bytes(path.parent) < size - written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        raise StorageError(f"cannot write {path}: {reason}; {written} of {size} bytes are there")
