"""Vectors on disk, addressed by the content of the picture and the encoder that made them.

Law: a vector is appended to a segment, fsynced, and only then committed in the catalog; a
tail that no commit names is ignored. A pair (encoder, image key) is stored once, for ever,
until :func:`gc`.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit.catalog import transaction
from toolkit.embedding.spec import EncoderSpec
from toolkit.errors import StorageError
from toolkit.machine import mapped_write
from toolkit.records import Embedded, Failed, Outcome

#: Rows gathered at once when vectors are read back.
READ_ROWS = 4096


class Usage(NamedTuple):
    """What one encoder's vectors take on disk."""

    fingerprint: str
    model: str
    n_vectors: int
    n_bytes: int


class VectorStore:
    """The vectors of one encoder.

    Args:
        catalog: Open catalog of the data folder.
        data_dir: The data folder; segments lie in ``vectors/<fingerprint[:16]>/``.
        spec: The encoder.

    Attributes:
        encoder_id: Its number in the catalog, for joins.
    """

    def __init__(self, catalog: sqlite3.Connection, data_dir: Path, spec: EncoderSpec) -> None:
        self._db = catalog
        self._dim = spec.dim
        self._folder = segment_folder(data_dir, spec.fingerprint)
        self._maps: dict[str, NDArray[np.float32]] = {}
        row = self._find(spec.fingerprint)
        if row is None:
            with transaction(self._db):
                self._db.execute(
                    "INSERT OR IGNORE INTO encoders(fingerprint, dim, spec) VALUES (?, ?, ?)",
                    (spec.fingerprint, spec.dim, json.dumps(spec.to_json())),
                )
            row = self._find(spec.fingerprint)
        assert row is not None  # inserted above, or by another build at the same moment
        self.encoder_id = row

    def _find(self, fingerprint: str) -> int | None:
        query = "SELECT id FROM encoders WHERE fingerprint = ?"
        row = self._db.execute(query, (fingerprint,)).fetchone()
        return int(row[0]) if row else None

    def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these image keys are stored already."""
        marks = ",".join("?" * len(keys))
        query = f"SELECT image_key FROM vectors WHERE encoder_id = ? AND image_key IN ({marks})"
        return {key for (key,) in self._db.execute(query, (self.encoder_id, *keys))}

    def read(self, keys: Iterable[bytes]) -> Iterator[NDArray[np.float32]]:
        """Vectors in the order of the keys, a chunk at a time.

        Yields:
            float32, shape ``(m, dim)`` with ``m`` up to :data:`READ_ROWS`.

        Raises:
            StorageError: If a key is not stored, or a segment is gone.
        """
        waiting: list[bytes] = []
        for key in keys:
            waiting.append(key)
            if len(waiting) == READ_ROWS:
                yield self._gather(waiting)
                waiting = []
        if waiting:
            yield self._gather(waiting)

    def _gather(self, keys: list[bytes]) -> NDArray[np.float32]:
        out = np.empty((len(keys), self._dim), np.float32)
        by_segment: dict[str, list[tuple[int, int]]] = {}
        for place, (segment, row) in enumerate(self._places(keys)):
            by_segment.setdefault(segment, []).append((place, row))
        for segment, pairs in by_segment.items():
            places, rows = np.array(pairs, np.int64).T
            out[places] = self._map(segment, int(rows.max()) + 1)[rows]
        return out

    def _places(self, keys: list[bytes]) -> Iterator[tuple[str, int]]:
        # By name, not by number: a segment that was rewritten meanwhile has another name.
        query = (
            "SELECT name, row FROM vectors JOIN segments ON segments.id = segment_id"
            " WHERE vectors.encoder_id = ? AND image_key = ?"
        )
        for key in keys:
            place = self._db.execute(query, (self.encoder_id, key)).fetchone()
            if place is None:
                raise StorageError(f"the store holds no vector of image {key.hex()}; build again")
            yield place

    def _map(self, segment: str, n_rows: int) -> NDArray[np.float32]:
        """A segment with at least so many rows; one that has grown is mapped again."""
        if segment not in self._maps or len(self._maps[segment]) < n_rows:
            path = self._folder / segment
            try:
                n_there = path.stat().st_size // (4 * self._dim)
            except OSError as error:
                raise _lost(path, "gone") from error
            if n_there < n_rows:
                raise _lost(path, f"cut short, {n_there} rows of at least {n_rows} are left")
            self._maps[segment] = np.memmap(path, "<f4", "r", shape=(n_there, self._dim))
        return self._maps[segment]

    def writer(self, run_id: str) -> SegmentWriter:
        """A new segment for one run; made on the first append, removed if nothing came."""
        return SegmentWriter(self._db, self._folder, self.encoder_id, run_id, self._dim)


class SegmentWriter:
    """Appends the vectors of one run; a context manager."""

    def __init__(
        self, catalog: sqlite3.Connection, folder: Path, encoder_id: int, run_id: str, dim: int
    ) -> None:
        self._db, self._encoder_id, self._dim = catalog, encoder_id, dim
        # A name nobody else takes, so that no run ever writes over what another one committed.
        self._path = folder / f"{run_id}-{secrets.token_hex(4)}.f32"
        self._file: io.FileIO | None = None
        self._n_rows = 0

    def append(self, vectors: NDArray[np.float32]) -> int:
        """Write rows and fsync them; the number of the first. Nothing is committed yet.

        Raises:
            DiskFullError: If there is no space; what was stored before stays.
            StorageError: If the disk refuses the write.
        """
        first = self._n_rows
        data = memoryview(np.ascontiguousarray(vectors, "<f4").tobytes())
        with mapped_write(self._path, len(data)):
            file = self._open()
            try:
                file.seek(first * self._dim * 4)
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                # Half a row helps nobody, and a full disk has no room to tell of it.
                file.truncate(first * self._dim * 4)
                raise
        self._n_rows += len(vectors)
        return first

    def record(
        self, outcome: Outcome, first_row: int, decode_version: int, max_pixels: int = 0
    ) -> None:
        """Name the rows of an outcome in the catalog; call inside a transaction.

        A vector that is stored already stays as it is: the first valid result wins.
        """
        if outcome.embedded:
            self._record_embedded(outcome.embedded, first_row)
        remember_failures(self._db, outcome.failed, decode_version, max_pixels)

    def _record_embedded(self, embedded: Sequence[Embedded], first_row: int) -> None:
        segment_id = self._segment_id()
        if segment_id is None:
            insert = "INSERT INTO segments(encoder_id, name) VALUES (?, ?)"
            cursor = self._db.execute(insert, (self._encoder_id, self._path.name))
            segment_id = cursor.lastrowid
        self._db.executemany(
            "INSERT OR IGNORE INTO vectors(encoder_id, image_key, segment_id, row)"
            " VALUES (?, ?, ?, ?)",
            [(self._encoder_id, e.key, segment_id, first_row + e.row) for e in embedded],
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO images(image_key, width, height, format) VALUES (?, ?, ?, ?)",
            [(e.key, e.width, e.height, e.format) for e in embedded],
        )
        keys = [(e.key,) for e in embedded]
        self._db.executemany("DELETE FROM failures WHERE image_key = ?", keys)

    def _segment_id(self) -> int | None:
        # Asked each time, not remembered: the transaction that named it may be rolled back.
        query = "SELECT id FROM segments WHERE name = ?"
        row = self._db.execute(query, (self._path.name,)).fetchone()
        return int(row[0]) if row else None

    def _open(self) -> io.FileIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self._path, "x")
            # The segment, its folder and the folder of all of them may be new.
            for folder in list(self._path.parents)[:3]:
                sync_folder(folder)
        return self._file

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            if self._segment_id() is None:
                self._path.unlink(missing_ok=True)


def remember_failures(
    catalog: sqlite3.Connection, failed: Iterable[Failed], decode_version: int, max_pixels: int
) -> None:
    """Keep by content what will fail again under this recipe and limit; in a transaction."""
    catalog.executemany(
        "INSERT OR REPLACE INTO failures(image_key, decode_version, max_pixels, kind, reason)"
        " VALUES (?, ?, ?, ?, ?)",
        [
            (f.key, decode_version, max_pixels, f.kind.value, f.reason)
            for f in failed
            if f.key is not None and f.kind.is_permanent
        ],
    )


def _lost(path: Path, how: str) -> StorageError:
    return StorageError(
        f"a segment of the store is {how}: {path}; `toolkit store gc` forgets what it held, then "
        "build again: only that is embedded anew"
    )


def segment_folder(data_dir: Path, fingerprint: str) -> Path:
    """Where the segments of an encoder lie."""
    return data_dir / "vectors" / fingerprint[:16]


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive the machine's death; nothing where that is unknown."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def usage(catalog: sqlite3.Connection, data_dir: Path) -> list[Usage]:
    """What each encoder's vectors take, the largest first."""
    rows = catalog.execute(
        "SELECT fingerprint, spec, (SELECT count(*) FROM vectors WHERE encoder_id = encoders.id)"
        " FROM encoders"
    )
    found = []
    for fingerprint, spec, n in rows:
        folder = segment_folder(data_dir, fingerprint)
        size = sum(f.stat().st_size for f in folder.iterdir()) if folder.is_dir() else 0
        architecture = EncoderSpec.from_json(json.loads(spec)).architecture
        found.append(Usage(fingerprint, architecture, int(n), size))
    return sorted(found, key=lambda u: -u.n_bytes)
