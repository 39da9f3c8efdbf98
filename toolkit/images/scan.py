"""The files of one build, and which content each of them holds.

Law: a stat that is unchanged is believed, everything else is read: size, first and last
64 KB of what is new, and the whole file only where that matches something known. What is
then still unknown is hashed by whoever decodes it, so that no file is read twice.

The scan is a temporary table of the catalog's connection, so memory does not grow with it.
"""

from __future__ import annotations

import collections
import itertools
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import xxhash

from toolkit.images.datasets import Source
from toolkit.images.identity import PROBE_BYTES, image_key, probe_of_ends
from toolkit.images.walk import RULE_LIMIT, RULE_TWICE, Excluded, Found, Rules, Unreadable, walk
from toolkit.records import FailureKind, FileStat

#: A file that changed less than this before it was seen may change again unnoticed: the
#: clocks of file systems tick that coarsely (FAT: 2 s).
RACY_NS = 2_000_000_000

#: Files read at once while probing; they wait for the disk, not for the processor.
_READERS = 8
_CHUNK = 2000

_TABLE = """
CREATE TEMP TABLE scan(
    id INTEGER PRIMARY KEY, source INTEGER NOT NULL, path BLOB NOT NULL, label TEXT NOT NULL,
    size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER,
    probe BLOB, image_key BLOB, known INTEGER NOT NULL DEFAULT 0,
    failure TEXT, reason TEXT);
"""

T = TypeVar("T")


class _Reading(NamedTuple):
    """What reading a file, in part or whole, told."""

    stat: FileStat | None = None
    probe: bytes | None = None
    key: bytes | None = None
    failure: FailureKind | None = None
    reason: str = ""


class Scan:
    """The files of one build.

    Table ``temp.scan`` has a row per file that is taken or cannot be read: ``image_key`` is
    NULL while nobody has read the whole file, ``known`` is 1 where the catalog's stat was
    believed, ``failure`` and ``reason`` say why it will have no vector.

    Attributes:
        sources: The datasets, in the order given.
        excluded: Files left out, by rule.
    """

    def __init__(self, catalog: sqlite3.Connection, sources: Sequence[Source]) -> None:
        self._db = catalog
        self._started_ns = time.time_ns()
        self.sources = tuple(sources)
        self.excluded: collections.Counter[str] = collections.Counter()

    def run(
        self,
        rules: Rules,
        *,
        limit: int | None = None,
        follow_links: bool = False,
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Walk every source, then identify what was found.

        Args:
            rules: What is taken.
            limit: Take only that many images, the first by path of each source in turn.
            follow_links: Whether symbolic links are followed.
            progress: Told the number of files seen so far.
        """
        self._db.execute("DROP TABLE IF EXISTS temp.scan")
        self._db.execute(_TABLE)
        self._walk(rules, follow_links, progress)
        self._db.execute("CREATE INDEX temp.scan_by_path ON scan(path)")
        self._take_each_path_once()
        if limit is not None:
            self._cut(limit)
        self._believe_unchanged()
        self._probe_the_rest()
        self._read_lookalikes()

    @property
    def n_found(self) -> int:
        """Every regular file that was met, those left out included."""
        (n,) = self._db.execute("SELECT count(*) FROM temp.scan").fetchone()
        return int(n) + self.excluded.total()

    def remember(self) -> None:
        """Write what was learnt into the catalog; call inside a transaction."""
        self._db.execute(
            "INSERT OR REPLACE INTO files SELECT path, size, mtime_ns, ctime_ns, inode, ?, probe,"
            " image_key FROM temp.scan WHERE known = 0 AND failure IS NULL GROUP BY path",
            (self._started_ns,),
        )
        self._db.execute(
            "INSERT OR IGNORE INTO probes SELECT probe, image_key FROM temp.scan"
            " WHERE known = 0 AND probe IS NOT NULL AND image_key IS NOT NULL"
        )

    def identify(self, item_id: int, key: bytes, seen: FileStat | None) -> None:
        """Note the content of a file, as whoever decoded it computed it; inside a transaction."""
        self._db.execute(
            "UPDATE temp.scan SET image_key = ? WHERE path = (SELECT path FROM temp.scan"
            " WHERE id = ?)",
            (key, item_id),
        )
        self._db.execute(
            "UPDATE files SET image_key = ? WHERE path = (SELECT path FROM temp.scan WHERE id = ?)",
            (key, item_id),
        )
        self._db.execute(
            "INSERT OR IGNORE INTO probes SELECT probe, image_key FROM temp.scan"
            " WHERE id = ? AND probe IS NOT NULL",
            (item_id,),
        )
        if seen is not None:
            self._db.execute(
                "UPDATE files SET size = ?, mtime_ns = ?, ctime_ns = ?, inode = ?"
                " WHERE path = (SELECT path FROM temp.scan WHERE id = ?)",
                (seen.size, seen.mtime_ns, seen.ctime_ns, seen.inode, item_id),
            )

    def fail(self, item_id: int, kind: FailureKind, reason: str) -> None:
        """Note that a file will have no vector."""
        self._db.execute(
            "UPDATE temp.scan SET failure = ?, reason = ? WHERE path = (SELECT path FROM temp.scan"
            " WHERE id = ?)",
            (kind, reason, item_id),
        )

    def reread(self, item_id: int) -> bytes | None:
        """Read a file again that changed under the build; its new key, or ``None``."""
        (path,) = self._db.execute("SELECT path FROM temp.scan WHERE id = ?", (item_id,)).fetchone()
        reading = _read_whole(path)
        if reading.key is not None:
            self._note([(item_id, reading)])
        return reading.key

    def _walk(self, rules: Rules, follow_links: bool, progress: Callable[[int], None]) -> None:
        n = 0
        for number, source in enumerate(self.sources):
            found = walk(source, rules, follow_links=follow_links)
            for chunk in _chunks(found, _CHUNK):
                self._insert(number, chunk)
                n += len(chunk)
                progress(n)

    def _insert(self, source: int, chunk: Iterable[Found | Excluded | Unreadable]) -> None:
        rows: list[tuple[object, ...]] = []
        for entry in chunk:
            match entry:
                case Excluded(rule=rule):
                    self.excluded[rule] += 1
                case Unreadable(path=path, label=label, reason=reason, kind=kind):
                    rows.append((source, path, label, *[None] * 4, kind, reason))
                case Found(path=path, label=label, stat=s):
                    rows.append(
                        (source, path, label, s.size, s.mtime_ns, s.ctime_ns, s.inode, None, None)
                    )
        self._db.executemany(
            "INSERT INTO temp.scan(source, path, label, size, mtime_ns, ctime_ns, inode, failure,"
            " reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )

    def _take_each_path_once(self) -> None:
        """A file that two datasets hold, or a list names twice, is one file, not a duplicate."""
        again = self._db.execute(
            "DELETE FROM temp.scan WHERE id > (SELECT min(id) FROM temp.scan AS s"
            " WHERE s.path = scan.path)"
        )
        if again.rowcount:
            self.excluded[RULE_TWICE] += again.rowcount

    def _cut(self, limit: int) -> None:
        cut = self._db.execute(
            "DELETE FROM temp.scan WHERE id NOT IN"
            " (SELECT id FROM temp.scan ORDER BY source, path LIMIT ?)",
            (limit,),
        )
        if cut.rowcount:
            self.excluded[RULE_LIMIT] += cut.rowcount

    def _believe_unchanged(self) -> None:
        self._db.execute(
            "UPDATE temp.scan SET probe = f.probe, image_key = f.image_key, known = 1"
            " FROM files AS f WHERE f.path = scan.path AND f.size = scan.size"
            " AND f.mtime_ns = scan.mtime_ns AND f.ctime_ns = scan.ctime_ns"
            " AND f.inode = scan.inode AND max(f.mtime_ns, f.ctime_ns) < f.seen_ns - ?",
            (RACY_NS,),
        )

    def _probe_the_rest(self) -> None:
        self._read("probe IS NULL AND failure IS NULL", _probe)
        self._db.execute("CREATE INDEX temp.scan_by_probe ON scan(probe)")

    def _read_lookalikes(self) -> None:
        """Read whole what has the same size, start and end as something else."""
        self._read(
            "image_key IS NULL AND failure IS NULL AND ("
            "EXISTS (SELECT 1 FROM probes AS p WHERE p.probe = scan.probe)"
            " OR EXISTS (SELECT 1 FROM temp.scan AS s"
            " WHERE s.probe = scan.probe AND s.id <> scan.id))",
            _read_whole,
        )

    def _read(self, where: str, read: Callable[[bytes], _Reading]) -> None:
        """Read the files of the rows that fulfil a condition, a chunk at a time."""
        query = f"SELECT id, path FROM temp.scan WHERE id > ? AND {where} ORDER BY id LIMIT ?"
        last = 0
        with ThreadPoolExecutor(_READERS, thread_name_prefix="scan") as pool:
            while rows := self._db.execute(query, (last, _CHUNK)).fetchall():
                readings = pool.map(read, [path for _, path in rows])
                self._note(list(zip([row_id for row_id, _ in rows], readings, strict=True)))
                last = rows[-1][0]

    def _note(self, readings: list[tuple[int, _Reading]]) -> None:
        for row_id, (seen, probe, key, failure, reason) in readings:
            if failure is not None:
                self.fail(row_id, failure, reason)
            elif seen is not None:
                self._db.execute(
                    "UPDATE temp.scan SET size = ?, mtime_ns = ?, ctime_ns = ?, inode = ?,"
                    " probe = ifnull(?, probe), image_key = ?, known = 0 WHERE id = ?",
                    (seen.size, seen.mtime_ns, seen.ctime_ns, seen.inode, probe, key, row_id),
                )


def _probe(path: bytes) -> _Reading:
    """Size, first and last 64 KB; a file no longer than that gets its key at once."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            seen = FileStat.of(os.fstat(file.fileno()))
            head = file.read(PROBE_BYTES)
            if seen.size <= PROBE_BYTES:
                return _Reading(seen, probe_of_ends(len(head), head, b""), image_key(head))
            # From the start: a file that has become shorter must not make this an error.
            file.seek(seen.size - PROBE_BYTES)
            return _Reading(seen, probe_of_ends(seen.size, head, file.read(PROBE_BYTES)), None)
    except OSError as error:
        return _failed(error)


def _read_whole(path: bytes) -> _Reading:
    try:
        with open(path, "rb", opener=_open_regular) as file:
            seen = FileStat.of(os.fstat(file.fileno()))
            digest = xxhash.xxh3_128()
            while block := file.read(1 << 20):
                digest.update(block)
            return _Reading(seen, None, digest.digest())
    except OSError as error:
        return _failed(error)


def _failed(error: OSError) -> _Reading:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        # Not unreadable: a file that is gone keeps no vector.
        return _Reading(failure=FailureKind.CHANGED, reason="vanished while the build ran")
    reason = f"cannot be read: {error.strerror or error}"
    return _Reading(failure=FailureKind.UNREADABLE, reason=reason)


def _open_regular(path: str, flags: int) -> int:
    """Open without waiting: a FIFO that took the place of a file must not hang the scan."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("is not a regular file")
    return handle


def _chunks(items: Iterable[T], n: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, n)):
        yield chunk
