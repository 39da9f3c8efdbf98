"""One published version of an index, open for reading.

Law: a reader keeps the version that it opened, whole, whatever is published meanwhile; a
shared lock on the version's ``lock`` file says that somebody is there. Opening reads the
manifest only: tables, vectors and graph are mapped when they are first asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from toolkit.errors import (
    DamagedIndexError,
    EncoderMismatchError,
    FormatVersionError,
    IndexNotFoundError,
    QueryError,
)
from toolkit.index.items import ItemRow, ItemTable
from toolkit.index.nearest import Exclude, exact_top_k, graph_top_k, unit
from toolkit.index.vector_index import VectorIndex

if sys.platform != "win32":
    import fcntl

#: Raised by one when a release changes the files; older releases then refuse the version.
FORMAT_VERSION = 1

#: Names inside an index folder, and inside a version.
CURRENT, VERSIONS = "CURRENT", "versions"
MANIFEST, ITEMS, VECTORS, GRAPH, LOCK = (
    *("manifest.json", "items.sqlite", "vectors.npy", "graph.usearch", "lock"),
)

#: Rows up to which a search compares with every one of them.
EXACT_ROWS = 50_000

_CURE = "build the index again with replace=True (--replace): stored vectors are not embedded again"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """Answers to ``m`` queries, nearest first, ties by row.

    Attributes:
        keys: Row numbers, int64, shape ``(m, k)``; ``-1`` where there are fewer.
        scores: Cosine similarities, float32, shape ``(m, k)``; ``nan`` where there are fewer.
        exact: Whether every row was compared, rather than those that the graph proposed.
    """

    keys: NDArray[np.int64]
    scores: NDArray[np.float32]
    exact: bool


class IndexVersion:
    """A version, open; made by :func:`open_current`.

    Attributes:
        path: Its folder.
        manifest: What was written beside it.
        n: Rows.
        dim: Components of a vector.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], lock: int) -> None:
        self.path, self.manifest = path, manifest
        self.n, self.dim = int(manifest["n"]), int(manifest["dim"])
        self._open = contextlib.ExitStack()
        self._open.callback(os.close, lock)
        # A version that is dropped unclosed lets go of its lock too.
        self._close = weakref.finalize(self, self._open.close)

    def close(self) -> None:
        """Let go: the version may be removed once a newer one is published."""
        self._close()

    def __enter__(self) -> IndexVersion:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def items_path(self) -> Path:
        """The file of the item table, for joins."""
        return self.path / ITEMS

    @property
    def graph_path(self) -> Path:
        """The file of the search graph, for a copy that may be changed."""
        return self.path / GRAPH

    @functools.cached_property
    def vectors(self) -> NDArray[np.float32]:
        """Unit vectors, float32, shape ``(n, dim)``; mapped read-only, row = key."""
        return map_vectors(self.path / VECTORS, (self.n, self.dim))

    @functools.cached_property
    def graph(self) -> VectorIndex:
        """The search graph, mapped."""
        return VectorIndex.open(self.graph_path, view=True)

    @functools.cached_property
    def _items(self) -> ItemTable:
        return self._open.enter_context(contextlib.closing(ItemTable(self.items_path)))

    def rows(self, keys: Sequence[int]) -> list[ItemRow]:
        """The items of these rows, in their order."""
        return self._items.rows(keys)

    def iter_rows(self) -> Iterator[ItemRow]:
        """Every item, in the order of the rows."""
        return iter(self._items)

    def key_of(self, image_key: bytes) -> int | None:
        """The row that holds a content, if one does."""
        return self._items.key_of(image_key)

    def key_of_path(self, path: bytes) -> int | None:
        """The row that lists a path, if one does."""
        return self._items.key_of_path(path)

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        mask: NDArray[np.bool_] | None = None,
        exclude: Exclude | None = None,
    ) -> SearchResult:
        """The ``k`` rows nearest to each query by cosine.

        Up to :data:`EXACT_ROWS` rows (that the mask lets through) are all compared; above, the
        graph proposes and float32 vectors decide.

        Args:
            queries: float32, shape ``(m, dim)``, of any length but 0.
            k: Rows wanted of each query, 1 or more; more than there are is fine.
            mask: Which rows may be answered, bool, shape ``(n,)``.
            exclude: For each query the rows that it must not get.

        Raises:
            EncoderMismatchError: If the queries are of another dimension.
            QueryError: If they are not finite or of length 0, or ``k`` or the mask is wrong.
        """
        queries = self._checked(queries, k, mask)
        rows = None if mask is None else np.flatnonzero(mask)
        if (self.n if rows is None else len(rows)) > EXACT_ROWS:
            near = graph_top_k(self.graph, self.vectors, queries, k, mask=mask, exclude=exclude)
            if near is not None:
                return SearchResult(*near, exact=False)
        found = exact_top_k(self.vectors, queries, k, rows=rows, exclude=exclude)
        return SearchResult(*found, exact=True)

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            DamagedIndexError: If one differs; the message names it.
        """
        for name, written in self.manifest["files"].items():
            if checksum(self.path / name) != written["xxh3_128"]:
                raise DamagedIndexError(f"{self.path / name} is not what was written; {_CURE}")

    def _checked(
        self, queries: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None
    ) -> NDArray[np.float32]:
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            name = self.path.parent.parent.name
            raise EncoderMismatchError(name, f"{self.dim}-d vectors", f"of shape {queries.shape}")
        if k < 1:
            raise QueryError(f"k={k}: ask for 1 row or more")
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (self.n,)):
            raise QueryError(
                f"a mask of {mask.dtype} {mask.shape} does not fit; give one bool for each of the "
                f"{self.n} rows"
            )
        wrong = ~np.isfinite(queries).all(axis=1) | ~queries.any(axis=1)
        if wrong.any():
            raise QueryError(
                f"query {int(np.argmax(wrong))} is zero or not finite: it has no direction; "
                "embed the picture again"
            )
        return unit(queries)


def open_current(index_dir: Path) -> IndexVersion:
    """Open the version that is published now.

    Raises:
        IndexNotFoundError: If none is.
        FormatVersionError: If a newer release wrote it.
        DamagedIndexError: If a file of it is missing or is not what was written.
    """
    while True:
        name = current_name(index_dir)
        if name is None:
            raise IndexNotFoundError(index_dir.name)
        try:
            return _open_version(index_dir / VERSIONS / name)
        except DamagedIndexError:
            # Unless a newer one was published meanwhile, and this one removed.
            if current_name(index_dir) == name:
                raise


def current_name(index_dir: Path) -> str | None:
    """Name of the published version, if there is one."""
    try:
        return (index_dir / CURRENT).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DamagedIndexError(f"{index_dir / CURRENT} names no version; {_CURE}") from error


def _open_version(path: Path) -> IndexVersion:
    try:
        lock = os.open(path / LOCK, os.O_RDONLY)
    except FileNotFoundError as error:
        raise DamagedIndexError(f"{path}, which {CURRENT} names, is not there; {_CURE}") from error
    try:
        if not try_lock(lock, shared=True):
            raise DamagedIndexError(f"{path} is being removed; {_CURE}")
        return IndexVersion(path, _read_manifest(path), lock)
    except BaseException:
        os.close(lock)
        raise


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        found = manifest["format_version"]
        if found > FORMAT_VERSION:
            raise FormatVersionError(str(file), found, FORMAT_VERSION)
        sizes = {name: written["bytes"] for name, written in manifest["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedIndexError(f"{file} cannot be read ({error!r}); {_CURE}") from error
    for name, size in sizes.items():
        there = (path / name).stat().st_size if (path / name).exists() else 0
        if there != size:
            raise DamagedIndexError(
                f"{path / name} has {there} bytes where {size} were written; {_CURE}"
            )
    return manifest


def map_vectors(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A file of vectors, mapped read-only.

    Raises:
        DamagedIndexError: If it is missing, or holds something else.
    """
    try:
        vectors: NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise DamagedIndexError(f"{path} cannot be read ({error}); {_CURE}") from error
    if vectors.shape != shape or vectors.dtype != np.float32:
        raise DamagedIndexError(
            f"{path} holds {vectors.dtype} {vectors.shape}, not float32 {shape}; {_CURE}"
        )
    return vectors


def checksum(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def try_lock(handle: int, *, shared: bool) -> bool:
    """Lock an open file without waiting; whether that worked.

    Where the system or the disk knows no such locks, readers are let in, and nothing may be
    removed under them.
    """
    if sys.platform == "win32":
        return shared
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return shared
    return True
