"""Remove stored vectors that no index uses; the only place that ever removes one.

Law: a segment is rewritten beside the old one, and the old one goes after the commit that
names the new one, so a death at any moment loses nothing that is used.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit.catalog import transaction
from toolkit.embedding.store import segment_folder, sync_folder
from toolkit.machine import mapped_write

#: Rows copied at once.
_ROWS = 4096


class Collected(NamedTuple):
    """What was removed."""

    n_vectors: int
    n_bytes: int


def collect_unused(
    catalog: sqlite3.Connection, data_dir: Path, used: Iterable[tuple[str, bytes]]
) -> Collected:
    """Remove every vector that is not used, and the bytes that no vector needs.

    Call it while no build runs: a segment that a build has just begun looks unused.

    Args:
        catalog: Open catalog.
        data_dir: The data folder.
        used: Pairs of fingerprint and image key that must stay.

    Raises:
        DiskFullError: If there is no space for a rewritten segment; nothing used is lost.
    """
    catalog.execute("CREATE TEMP TABLE used(fingerprint TEXT, image_key BLOB)")
    catalog.execute("CREATE TEMP TABLE moved(new INTEGER, old INTEGER PRIMARY KEY)")
    try:
        catalog.executemany("INSERT INTO temp.used VALUES (?, ?)", used)
        catalog.execute("CREATE INDEX temp.used_by_key ON used(image_key, fingerprint)")
        with transaction(catalog):
            removed = catalog.execute(
                "DELETE FROM vectors WHERE NOT EXISTS (SELECT 1 FROM temp.used AS u"
                " JOIN encoders AS e ON e.fingerprint = u.fingerprint"
                " WHERE e.id = vectors.encoder_id AND u.image_key = vectors.image_key)"
            ).rowcount
        freed = 0
        for encoder_id, fingerprint, dim in catalog.execute(
            "SELECT id, fingerprint, dim FROM encoders"
        ).fetchall():
            folder = segment_folder(data_dir, fingerprint)
            if folder.is_dir():
                freed += _shrink(catalog, folder, encoder_id, dim)
    finally:
        catalog.execute("DROP TABLE temp.used")
        catalog.execute("DROP TABLE temp.moved")
    return Collected(removed, freed)


def _shrink(catalog: sqlite3.Connection, folder: Path, encoder_id: int, dim: int) -> int:
    """Rewrite the segments of one encoder that hold unused rows; bytes freed."""
    before = _size(folder)
    # The emptiest first: what they free may be what the others need to be rewritten.
    segments = catalog.execute(
        "SELECT s.id, s.name FROM segments AS s LEFT JOIN vectors AS v ON v.segment_id = s.id"
        " WHERE s.encoder_id = ? GROUP BY s.id ORDER BY count(v.row)",
        (encoder_id,),
    ).fetchall()
    for segment_id, name in segments:
        _rewrite(catalog, folder / name, segment_id, dim)
    query = "SELECT name FROM segments WHERE encoder_id = ?"
    named = {name for (name,) in catalog.execute(query, (encoder_id,))}
    for file in folder.iterdir():
        if file.name not in named:
            file.unlink()
    return before - _size(folder)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _rewrite(catalog: sqlite3.Connection, path: Path, segment_id: int, dim: int) -> None:
    rows = _rows(catalog, path, segment_id, dim)
    fresh = path.with_name(f"{path.stem}c.f32")
    if len(rows) and len(rows) * dim * 4 == path.stat().st_size:
        return
    if len(rows):
        _copy_rows(path, fresh, rows, dim)
    with transaction(catalog):
        if len(rows):
            _renumber(catalog, segment_id, rows)
            catalog.execute("UPDATE segments SET name = ? WHERE id = ?", (fresh.name, segment_id))
        else:
            catalog.execute("DELETE FROM segments WHERE id = ?", (segment_id,))
    path.unlink(missing_ok=True)


def _rows(catalog: sqlite3.Connection, path: Path, segment_id: int, dim: int) -> NDArray[np.int64]:
    """The rows of a segment that are used and there; what was lost from disk is forgotten."""
    n_there = path.stat().st_size // (4 * dim) if path.exists() else 0
    with transaction(catalog):
        catalog.execute(
            "DELETE FROM vectors WHERE segment_id = ? AND row >= ?", (segment_id, n_there)
        )
    query = "SELECT row FROM vectors WHERE segment_id = ? ORDER BY row"
    return np.array(catalog.execute(query, (segment_id,)).fetchall(), np.int64).reshape(-1)


def _copy_rows(path: Path, fresh: Path, rows: NDArray[np.int64], dim: int) -> None:
    # A tail that was cut by a death may not be a whole row.
    old = np.memmap(path, "<f4", "r", shape=(path.stat().st_size // (4 * dim), dim))
    try:
        with mapped_write(fresh, len(rows) * dim * 4), open(fresh, "wb") as file:
            for start in range(0, len(rows), _ROWS):
                file.write(old[rows[start : start + _ROWS]].tobytes())
            file.flush()
            os.fsync(file.fileno())
            sync_folder(path.parent)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _renumber(catalog: sqlite3.Connection, segment_id: int, rows: NDArray[np.int64]) -> None:
    """Give each used row its place in the rewritten segment; inside a transaction."""
    catalog.execute("DELETE FROM temp.moved")
    catalog.executemany("INSERT INTO temp.moved VALUES (?, ?)", enumerate(rows.tolist()))
    catalog.execute(
        "UPDATE vectors SET row = (SELECT new FROM temp.moved WHERE old = vectors.row)"
        " WHERE segment_id = ?",
        (segment_id,),
    )
