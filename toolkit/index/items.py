"""The item table of an index: which content stands in which row, and where its files lie.

Law: written once, then only read. Keys are row numbers ``0 .. n - 1``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DamagedIndexError

#: ``copies`` holds every path of a content, the first one included.
SCHEMA = """
CREATE TABLE items(
    key INTEGER PRIMARY KEY, image_key BLOB NOT NULL, dataset TEXT NOT NULL,
    path BLOB NOT NULL, label TEXT, width INTEGER NOT NULL, height INTEGER NOT NULL,
    format TEXT NOT NULL);
CREATE TABLE copies(
    key INTEGER NOT NULL, place INTEGER NOT NULL, dataset TEXT NOT NULL,
    path BLOB NOT NULL, label TEXT, PRIMARY KEY(key, place)) WITHOUT ROWID;
"""

# Made after the rows are in: sorting once is faster than inserting into a tree.
_INDEXES = """
CREATE UNIQUE INDEX items_by_image_key ON items(image_key);
CREATE INDEX copies_by_path ON copies(path);
"""

#: Rows inserted or fetched at once.
_CHUNK = 500


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """One file with the content of a row.

    Attributes:
        dataset: Name of its dataset.
        path: Where it lies, as the bytes of the file system.
        label: Its label, if it has one.
    """

    dataset: str
    path: bytes
    label: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ItemRow:
    """One content.

    Attributes:
        image_key: xxh3_128 of its bytes; unique in an index.
        dataset: Dataset of its first file.
        path: Its first file.
        label: Label of its first file.
        width: Pixels, upright.
        height: Pixels, upright.
        format: Name of the file format, as Pillow calls it.
        copies: Every file with this content, the first one included, in order.
    """

    image_key: bytes
    dataset: str
    path: bytes
    label: str | None
    width: int
    height: int
    format: str
    copies: tuple[Copy, ...]


def write_items(path: Path, rows: Iterable[ItemRow]) -> tuple[int, int]:
    """Write a table, a chunk at a time; the number of its rows and of their copies.

    Raises:
        sqlite3.Error: If the disk refuses, or two rows have one image key.
    """
    n_rows = n_copies = 0
    with contextlib.closing(sqlite3.connect(path)) as db:
        # Nobody sees the file before it is complete and fsynced: no journal is needed.
        db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + SCHEMA)
        numbered = enumerate(rows)
        while chunk := list(itertools.islice(numbered, _CHUNK)):
            copies = [copy for numbered_row in chunk for copy in _copies(*numbered_row)]
            db.executemany("INSERT INTO items VALUES (?,?,?,?,?,?,?,?)", map(_item, chunk))
            db.executemany("INSERT INTO copies VALUES (?,?,?,?,?)", copies)
            n_rows += len(chunk)
            n_copies += len(copies)
        db.executescript(_INDEXES)
        db.commit()
    return n_rows, n_copies


def _item(numbered: tuple[int, ItemRow]) -> tuple[Any, ...]:
    key, row = numbered
    return (
        *(key, row.image_key, row.dataset, row.path),
        *(row.label, row.width, row.height, row.format),
    )


def _copies(key: int, row: ItemRow) -> Iterator[tuple[Any, ...]]:
    for place, copy in enumerate(row.copies):
        yield key, place, copy.dataset, copy.path, copy.label


class ItemTable:
    """A written table, read-only.

    Raises:
        DamagedIndexError: From every method, if the file is damaged or gone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._damage_named():
            self._db = sqlite3.connect(_uri(path), uri=True, check_same_thread=False)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def rows(self, keys: Sequence[int]) -> list[ItemRow]:
        """The rows of these keys, in their order.

        Raises:
            KeyError: If a key is no row.
        """
        found: dict[int, ItemRow] = {}
        wanted = iter(dict.fromkeys(keys))
        while chunk := list(itertools.islice(wanted, _CHUNK)):
            marks = ",".join("?" * len(chunk))
            found.update(self._select(f"WHERE i.key IN ({marks})", chunk))
        return [found[key] for key in keys]

    def __iter__(self) -> Iterator[ItemRow]:
        for _, row in self._select():
            yield row

    def key_of(self, image_key: bytes) -> int | None:
        """The row that holds a content."""
        return self._key("SELECT key FROM items WHERE image_key = ?", image_key)

    def key_of_path(self, path: bytes) -> int | None:
        """The row that lists a path; the first one, should several do."""
        return self._key("SELECT min(key) FROM copies WHERE path = ?", path)

    def image_keys(self) -> Iterator[bytes]:
        """Every image key, in the order of the rows."""
        with self._damage_named():
            for (image_key,) in self._db.execute("SELECT image_key FROM items ORDER BY key"):
                yield image_key

    def origins(self, older: Path, n: int) -> NDArray[np.int64]:
        """Where each row's content stands in an older table.

        Args:
            older: The older table's file.
            n: Rows of this table.

        Returns:
            int64, shape ``(n,)``: the row there, ``-1`` where the content is new.
        """
        out = np.full(n, -1, np.int64)
        with self._damage_named():
            self._db.execute("ATTACH DATABASE ? AS older", (_uri(older),))
            pairs = self._db.execute(
                "SELECT i.key, o.key FROM main.items AS i JOIN older.items AS o USING (image_key)"
            )
            while chunk := pairs.fetchmany(10_000):
                new, old = np.array(chunk, np.int64).T
                out[new] = old
            self._db.execute("DETACH DATABASE older")
        return out

    def _key(self, query: str, value: bytes) -> int | None:
        with self._damage_named():
            row = self._db.execute(query, (value,)).fetchone()
        return None if row is None else row[0]

    def _select(self, where: str = "", values: Sequence[int] = ()) -> Iterator[tuple[int, ItemRow]]:
        query = (
            "SELECT i.*, c.dataset, c.path, c.label FROM items AS i JOIN copies AS c USING (key)"
            f" {where} ORDER BY i.key, c.place"
        )
        with self._damage_named():
            joined = self._db.execute(query, values)
            for (key, *item), group in itertools.groupby(joined, key=lambda row: row[:8]):
                fields: tuple[Any, ...] = (*item, tuple(Copy(*row[8:]) for row in group))
                yield key, ItemRow(*fields)

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise DamagedIndexError(
                f"{self._path} cannot be read ({error}); build the index again with replace=True "
                "(--replace): stored vectors are not embedded again"
            ) from error


def _uri(path: Path) -> str:
    # Immutable: no lock files beside it, so that a read-only or network disk will do.
    return f"{path.absolute().as_uri()}?mode=ro&immutable=1"
