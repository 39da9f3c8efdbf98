"""catalog.sqlite: what is known of files, images, vectors and failures.

Law: on a local disk, WAL, one writer at a time, readers never wait. The tables are described
in :data:`SCHEMA`; rooms above own the statements that they run on them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from toolkit.errors import DiskFullError, FormatVersionError, StorageError
from toolkit.machine import free_bytes

#: Raised by one when a release changes the tables; older releases then refuse the folder.
FORMAT_VERSION = 1

#: Seconds a writer waits for another build's commit.
BUSY_TIMEOUT_S = 60.0

SCHEMA = """
-- A file as it was last seen. `probe` is xxh3 of size, first and last 64 KB; `image_key` is
-- xxh3_128 of all bytes, NULL until somebody has read them.
CREATE TABLE IF NOT EXISTS files(
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, seen_ns INTEGER NOT NULL,
    probe BLOB, image_key BLOB) WITHOUT ROWID;
-- Every content that was ever read whole, by its probe; a file that changes back is known.
CREATE TABLE IF NOT EXISTS probes(
    probe BLOB NOT NULL, image_key BLOB NOT NULL, PRIMARY KEY(probe, image_key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images(
    image_key BLOB PRIMARY KEY, width INTEGER NOT NULL, height INTEGER NOT NULL,
    format TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS encoders(
    id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, dim INTEGER NOT NULL,
    spec TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS segments(
    id INTEGER PRIMARY KEY, encoder_id INTEGER NOT NULL REFERENCES encoders,
    name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS vectors(
    encoder_id INTEGER NOT NULL, image_key BLOB NOT NULL, segment_id INTEGER NOT NULL,
    row INTEGER NOT NULL, PRIMARY KEY(encoder_id, image_key)) WITHOUT ROWID;
-- Content that will never be a picture under this decode recipe and limit of pixels.
CREATE TABLE IF NOT EXISTS failures(
    image_key BLOB NOT NULL, decode_version INTEGER NOT NULL, max_pixels INTEGER NOT NULL,
    kind TEXT NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY(image_key, decode_version)) WITHOUT ROWID;
"""


def open_catalog(data_dir: Path) -> sqlite3.Connection:
    """Open the catalog of a data folder, making it when it is missing.

    The connection is in autocommit mode: wrap writes in :func:`transaction`.

    Raises:
        FormatVersionError: If a newer release wrote it.
        StorageError: If it is damaged or cannot be written.
    """
    path = data_dir / "catalog.sqlite"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot use the data folder {data_dir}: {error.strerror}; set TOOLKIT_DATA_DIR to a "
            "folder that can be written"
        ) from error
    # Two processes that make it at once: the switch to WAL does not wait for the other's lock.
    with FileLock(data_dir / "catalog.lock"), mapped_errors(path):
        connection = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > FORMAT_VERSION:
        raise FormatVersionError(str(path), found, FORMAT_VERSION)
    connection.execute("PRAGMA journal_mode=WAL")
    # A commit must survive the machine's death: promise 3 counts what is stored.
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA temp_store=FILE")
    if found < FORMAT_VERSION:
        connection.executescript(SCHEMA)
        connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit on success, roll back on any error; a full disk becomes DiskFullError."""
    path = Path(connection.execute("PRAGMA database_list").fetchone()[2])
    with mapped_errors(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


#: What SQLite says when the disk is full; the last when it makes the file readers share.
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)


@contextlib.contextmanager
def mapped_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite says of the disk into this package's errors."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in _FULL:
            raise DiskFullError(str(path), 0, free_bytes(path.parent)) from error
        raise StorageError(f"cannot use {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise StorageError(
            f"{path} is damaged ({error}); move it away: the next build makes a new one "
            "and embeds again"
        ) from error
