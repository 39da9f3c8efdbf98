"""What a build has to do: the scan held against the store and against the published index.

Law: everything is a statement over tables (the scan, the catalog, the item table of the
published version, attached as ``prev``), so a plan for millions of files takes no memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import xxhash

from toolkit.images.scan import Scan
from toolkit.index.items import Copy, ItemRow
from toolkit.records import FailureKind, Item, show_path
from toolkit.run_record import Accounting

#: Rows fetched at once.
_CHUNK = 1000

#: A build over a published index that would remove more than this share of its items, or
#: newly fail more than that share of its files, is held: a disk is more likely gone than
#: that many pictures are.
MAX_REMOVED, MAX_NEWLY_FAILED = 0.10, 0.05

_EMPTY_PREVIOUS = """
CREATE TABLE prev.items(key INTEGER PRIMARY KEY, image_key BLOB);
CREATE TABLE prev.copies(key INTEGER, dataset TEXT, path BLOB, label TEXT);
"""

# A row of the scan is good when it will stand in the index: it has a vector, or keeps one.
_GOOD = "(failure IS NULL OR kept = 1)"
_HAS_VECTOR = (
    "EXISTS (SELECT 1 FROM vectors AS v"
    " WHERE v.encoder_id = :encoder AND v.image_key = scan.image_key)"
)

# One pass, which asks of each file once where it was published; see Changes.
_CHANGES = """
WITH seen AS (
    SELECT id, image_key, failure IS 'unreadable' AS lost,
        path IN (SELECT path FROM prev.copies) AS published,
        EXISTS (SELECT 1 FROM prev.copies AS c JOIN prev.items AS i USING (key)
            WHERE c.path = scan.path AND i.image_key = scan.image_key) AS same
    FROM temp.scan),
outside AS (
    SELECT EXISTS (SELECT 1 FROM prev.items AS i JOIN prev.copies AS c USING (key)
            WHERE i.image_key = seen.image_key
            AND c.path NOT IN (SELECT path FROM temp.scan)) AS moved,
        image_key IN (SELECT image_key FROM prev.items) OR EXISTS (SELECT 1 FROM temp.scan AS s
            WHERE s.image_key = seen.image_key AND s.id < seen.id) AS known
    FROM seen WHERE NOT lost AND NOT published)
SELECT count(*) FILTER (WHERE lost), count(*) FILTER (WHERE NOT lost AND same),
    count(*) FILTER (WHERE NOT lost AND published AND NOT same),
    (SELECT count(*) FROM outside WHERE moved),
    (SELECT count(*) FROM outside WHERE NOT moved AND known), (SELECT count(*) FROM outside)
FROM seen
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """How the files differ from the published index, in files.

    Attributes:
        new: Neither the path nor the content is known to the index.
        changed: The path is known, its content is another.
        moved: The content is known under a path that is gone.
        duplicate: The content is there under another path.
        unchanged: Path and content are as published.
        unreadable: Cannot be read now; keeps its vector when it had one.
        deleted: Published paths that are gone and did not move.
    """

    new: int = 0
    changed: int = 0
    moved: int = 0
    duplicate: int = 0
    unchanged: int = 0
    unreadable: int = 0
    deleted: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Losses:
    """What publishing a build would cost the published index.

    Attributes:
        n_items: Images of the published index.
        n_files: Their files.
        removed: Images of which no file would be left.
        failing: Published files that newly cannot be read.
    """

    n_items: int
    n_files: int
    removed: int
    failing: int

    def reason(self) -> str | None:
        """Why the guard should hold the build, or ``None``."""
        if self.removed > MAX_REMOVED * self.n_items:
            return (
                f"{self.removed} of the {self.n_items} images of the published index would be gone"
            )
        if self.failing > MAX_NEWLY_FAILED * self.n_files:
            return f"{self.failing} of the {self.n_files} published files cannot be read any more"
        return None

    def within(self, accepted: tuple[int, int] | None) -> bool:
        """Whether somebody has accepted losses (removed, failing) as large as these."""
        return accepted is not None and (
            self.removed <= accepted[0] and self.failing <= accepted[1]
        )


class Plan:
    """What one build has to do.

    Args:
        catalog: The catalog's connection, which holds the scan.
        scan: The files, already run.
        encoder_id: Number of the encoder in the catalog; ``-1`` when nothing of it is stored.
        decode_version: Version of the decode recipe, for failures that are remembered.
        max_pixels: Limit of pixels; what failed under a lower one is tried again.
        previous_items: ``items.sqlite`` of the published version, or ``None``.
    """

    def __init__(
        self,
        catalog: sqlite3.Connection,
        scan: Scan,
        *,
        encoder_id: int,
        decode_version: int,
        max_pixels: int,
        previous_items: Path | None,
    ) -> None:
        self._db, self._scan = catalog, scan
        self._encoder = {"encoder": encoder_id}
        self._recipe = {"version": decode_version, "pixels": max_pixels}
        if ("prev",) in self._db.execute("SELECT name FROM pragma_database_list").fetchall():
            self._db.execute("DETACH DATABASE prev")
        self._db.execute("ATTACH DATABASE ? AS prev", (str(previous_items or ":memory:"),))
        if previous_items is None:
            self._db.executescript(_EMPTY_PREVIOUS)
        self._db.execute("CREATE INDEX temp.scan_by_key ON scan(image_key)")
        self._db.execute("ALTER TABLE temp.scan ADD COLUMN kept INTEGER NOT NULL DEFAULT 0")

    def close(self) -> None:
        """Let go of the published version's table."""
        self._db.execute("DETACH DATABASE prev")

    def settle(self, *, retry_failed: bool) -> None:
        """Decide what needs no reading: kept vectors of unreadable files, known failures."""
        self._list_below_unreadable_folders()
        self._keep_unreadable()
        if not retry_failed:
            self.apply_failures()

    def apply_failures(self) -> None:
        """Fail every file whose content is known to be no picture."""
        self._db.execute(
            "UPDATE temp.scan SET failure = f.kind, reason = f.reason FROM failures AS f"
            " WHERE f.image_key = scan.image_key AND f.decode_version = :version"
            " AND f.max_pixels >= :pixels"
            f" AND scan.failure IS NULL AND NOT {_HAS_VECTOR}",
            {**self._recipe, **self._encoder},
        )

    def forget_failures(self) -> None:
        """Forget what is known to fail among these files; call inside a transaction."""
        self._db.execute(
            "DELETE FROM failures WHERE image_key IN (SELECT image_key FROM temp.scan)"
        )

    def keep(self, item_id: int) -> None:
        """Keep the published vector of a file that turned out unreadable, if it has one."""
        self._keep_unreadable("AND id = :id", {"id": item_id})

    def changes(self) -> Changes:
        """How the files differ from the published index."""
        row = self._db.execute(_CHANGES).fetchone()
        unreadable, unchanged, changed, moved, duplicate, outside = row
        (gone,) = self._db.execute(
            "SELECT count(*) FROM prev.copies WHERE path NOT IN (SELECT path FROM temp.scan)"
        ).fetchone()
        return Changes(
            new=outside - moved - duplicate,
            changed=changed,
            moved=moved,
            duplicate=duplicate,
            unchanged=unchanged,
            unreadable=unreadable,
            deleted=max(0, gone - moved),
        )

    def n_to_embed(self) -> int:
        """Images that :meth:`to_embed` will yield, as far as is known now."""
        query = f"SELECT count(DISTINCT {_SAME}) FROM temp.scan WHERE {self._todo}"
        return self._scalar(query, self._encoder)

    def to_embed(self) -> Iterator[Item]:
        """One item for every content that needs a vector, in the order of the index."""
        self._db.execute("DROP TABLE IF EXISTS temp.todo")
        # A table of its own, numbered: the scan is written to while this is read by pages.
        self._db.execute("CREATE TEMP TABLE todo(place INTEGER PRIMARY KEY, id INTEGER)")
        self._db.execute(
            "INSERT INTO temp.todo(id) SELECT s.id FROM temp.scan AS s JOIN (SELECT min(id) AS id"
            f" FROM temp.scan WHERE {self._todo} GROUP BY {_SAME}) AS t USING (id)"
            " ORDER BY s.source, s.path",
            self._encoder,
        )
        last = 0
        query = (
            "SELECT t.place, s.id, s.path, s.size, s.image_key, s.probe FROM temp.todo AS t"
            " JOIN temp.scan AS s USING (id) WHERE t.place > ? ORDER BY t.place LIMIT ?"
        )
        while rows := self._db.execute(query, (last, _CHUNK)).fetchall():
            for _, *columns in rows:
                yield Item(*columns)
            last = rows[-1][0]

    @property
    def _todo(self) -> str:
        return f"failure IS NULL AND NOT {_HAS_VECTOR}"

    def accounting(self, embedded: int = 0, reused: int | None = None) -> Accounting:
        """The books as they stand.

        Args:
            embedded: Images that went through the model in this run.
            reused: Contents whose vector was stored before; ``None`` while nothing has been
                embedded: then these are all that are indexed.
        """
        indexed, files, failed, pending, kept = self._db.execute(
            f"SELECT count(DISTINCT v.image_key) FILTER (WHERE {_GOOD}),"
            f" count(v.image_key) FILTER (WHERE {_GOOD}),"
            " count(*) FILTER (WHERE failure IS NOT NULL AND kept = 0),"
            f" count(*) FILTER (WHERE {_GOOD} AND v.image_key IS NULL),"
            " count(*) FILTER (WHERE kept = 1)"
            " FROM temp.scan LEFT JOIN vectors AS v"
            " ON v.encoder_id = :encoder AND v.image_key = scan.image_key",
            self._encoder,
        ).fetchone()
        return Accounting(
            found=self._scan.n_found,
            indexed=indexed,
            duplicates=files - indexed,
            failed=failed,
            excluded=self._scan.excluded.total(),
            pending=pending,
            embedded=embedded,
            reused=indexed if reused is None else reused,
            kept=kept,
        )

    def failures(self) -> Iterator[dict[str, str]]:
        """Every file that cannot be used now, kept ones included: path, kind, reason, dataset."""
        query = (
            "SELECT source, path, failure, reason, kept FROM temp.scan WHERE failure IS NOT NULL"
            " ORDER BY source, path"
        )
        for source, path, kind, reason, kept in self._db.execute(query):
            yield {
                "path": show_path(path),
                "kind": kind,
                "reason": reason + (" (its old vector stays in the index)" if kept else ""),
                "dataset": self._scan.sources[source].name,
            }

    def losses(self, known_failing: int = 0) -> Losses:
        """What publishing would cost the published index.

        Args:
            known_failing: Files that could not be read when it was published.
        """
        return Losses(
            n_items=self._scalar("SELECT count(*) FROM prev.items"),
            n_files=self._scalar("SELECT count(*) FROM prev.copies"),
            removed=self._scalar(
                "SELECT count(*) FROM prev.items AS i"
                f" WHERE i.image_key NOT IN (SELECT image_key FROM temp.scan WHERE {_GOOD} AND"
                " image_key IS NOT NULL) AND NOT EXISTS (SELECT 1 FROM prev.copies AS c"
                f" JOIN temp.scan AS s ON s.path = c.path WHERE c.key = i.key AND {_GOOD})"
            ),
            failing=self._scalar(
                "SELECT count(*) FROM prev.copies WHERE path IN"
                " (SELECT path FROM temp.scan WHERE failure IS NOT NULL)"
            )
            - known_failing,
        )

    def rank(self) -> tuple[int, str]:
        """Fix the order of the item table; its length and a digest of its content.

        Rows are ordered by (dataset as given, path bytes) of their first file.
        """
        for table in ("ranked", "members"):
            self._db.execute(f"DROP TABLE IF EXISTS temp.{table}")
        # Numbered by their rows, in this order: nobody has to sort them again.
        self._db.execute(
            "CREATE TEMP TABLE ranked(place INTEGER PRIMARY KEY, id INTEGER, image_key BLOB)"
        )
        self._db.execute(
            "INSERT INTO temp.ranked(id, image_key) SELECT id, image_key FROM temp.scan"
            f" WHERE {_GOOD} ORDER BY source, path, id"
        )
        self._db.execute("CREATE INDEX temp.ranked_by_key ON ranked(image_key)")
        self._db.execute("CREATE TEMP TABLE members(first INTEGER PRIMARY KEY, image_key BLOB)")
        self._db.execute(
            "INSERT INTO temp.members SELECT min(place) AS first, image_key FROM temp.ranked"
            " GROUP BY image_key ORDER BY first"
        )
        digest = xxhash.xxh3_128()
        n = 0
        for row in self.rows():
            n += 1
            digest.update(repr((row.image_key, row.copies)).encode())
        return n, digest.hexdigest()

    def rows(self) -> Iterator[ItemRow]:
        """The item table, in order; after :meth:`rank`."""
        query = (
            "SELECT r.image_key, s.source, s.path, s.label, i.width, i.height, i.format"
            " FROM temp.members AS m JOIN temp.ranked AS r USING (image_key)"
            " JOIN temp.scan AS s ON s.id = r.id JOIN images AS i USING (image_key)"
            " ORDER BY m.first, r.place"
        )
        for key, group in itertools.groupby(self._db.execute(query), key=lambda row: row[0]):
            members = list(group)
            copies = tuple(
                Copy(self._scan.sources[source].name, path, label)
                for _, source, path, label, *_ in members
            )
            width, height, file_format = members[0][4:]
            first = copies[0]
            yield ItemRow(
                key, first.dataset, first.path, first.label, width, height, file_format, copies
            )

    def _list_below_unreadable_folders(self) -> None:
        """Published files below a folder that cannot be listed are unreadable, not deleted."""
        folders = self._db.execute(
            "SELECT source, path, reason FROM temp.scan"
            " WHERE failure = 'unreadable' AND size IS NULL"
        ).fetchall()
        for source, folder, reason in folders:
            # Every path that begins with "folder/": from there to the next byte after "/".
            low, high = folder + b"/", folder + b"0"
            self._db.execute(
                "INSERT INTO temp.scan(source, path, label, size, failure, reason)"
                " SELECT ?, path, ifnull(label, ''), 0, 'unreadable', ? FROM prev.copies AS c"
                " WHERE path >= ? AND path < ? AND dataset = ?"
                " AND NOT EXISTS (SELECT 1 FROM temp.scan AS s WHERE s.path = c.path)",
                (source, f"its folder {reason}", low, high, self._scan.sources[source].name),
            )

    def _keep_unreadable(self, which: str = "", values: dict[str, int] | None = None) -> None:
        self._db.execute(
            "UPDATE temp.scan SET image_key = i.image_key, kept = 1"
            " FROM prev.copies AS c JOIN prev.items AS i USING (key)"
            f" WHERE c.path = scan.path AND failure = '{FailureKind.UNREADABLE}' {which}"
            " AND EXISTS (SELECT 1 FROM vectors AS v WHERE v.encoder_id = :encoder"
            " AND v.image_key = i.image_key)",
            {**self._encoder, **(values or {})},
        )

    def _scalar(self, query: str, values: dict[str, int] | None = None) -> int:
        return int(self._db.execute(query, values or {}).fetchone()[0])


# Rows that are one image to embed: the same content, or the same path while it is unknown.
_SAME = "ifnull(image_key, path)"
