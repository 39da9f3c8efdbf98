"""Writing a version of an index, and making it the one that is read.

Law: a version is written under a hidden name, every file fsynced, and renamed when it is
complete; only then may the one atomic replace of ``CURRENT`` publish it. Dying anywhere
leaves the published version as it was, and what is left over is swept by the next writer.
There is one writer at a time: the caller holds the index's lock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from toolkit.embedding.store import sync_folder
from toolkit.errors import DamagedIndexError, DiskFullError, StorageError
from toolkit.faults import point
from toolkit.index.ahead import GraphAhead
from toolkit.index.draft import Draft, Progress, VectorSource
from toolkit.index.items import ItemRow
from toolkit.index.version import (
    CURRENT,
    LOCK,
    MANIFEST,
    VERSIONS,
    IndexVersion,
    current_name,
    open_current,
    try_lock,
)

__all__ = ["IndexVersion", "open_current", "publish", "write_version"]

logger = logging.getLogger(__name__)


def write_version(
    index_dir: Path,
    *,
    rows: Iterable[ItemRow],
    vectors: VectorSource,
    dim: int,
    dtype: str = "f16",
    encoder: dict[str, Any],
    extra: dict[str, Any],
    previous: IndexVersion | None = None,
    threads: int = 1,
    progress: Progress | None = None,
    ahead: GraphAhead | None = None,
) -> Path:
    """Write a new version beside the published one; nobody reads it before :func:`publish`.

    Rows stream through in chunks; only the graph is held in memory. What the previous version
    of the same encoder holds is taken from there: vectors always, the graph when at most
    :data:`~toolkit.index.draft.MAX_CHANGED` of the rows changed.

    Args:
        index_dir: Folder of the index.
        rows: The items, in the order of their keys; each image key once.
        vectors: Where the unit vectors come from; asked only for what is new.
        dim: Components of a vector.
        dtype: Precision of the graph: ``f32``, ``f16`` or ``i8``.
        encoder: Kept in the manifest; its ``fingerprint`` says which vectors are alike.
        extra: Kept in the manifest.
        previous: The published version, open.
        threads: For the graph.
        progress: Told how far it is.
        ahead: Where the graph was begun; what it began upon is kept.

    Returns:
        The version's folder.

    Raises:
        DiskFullError: If the disk is full; what was half written is removed.
        StorageError: If the vectors do not fit the rows, or a file cannot be written.
    """
    versions = index_dir / VERSIONS
    with _disk_errors(index_dir):
        versions.mkdir(parents=True, exist_ok=True)
        number = _sweep(index_dir)
        final, draft = versions / f"v{number:06d}", versions / f".v{number:06d}.partial"
        try:
            draft.mkdir()
            with contextlib.closing(Draft(draft, dim, dtype, threads, progress)) as writing:
                writing.items(rows, _alike(previous, encoder, dim))
                writing.vectors(vectors)
                writing.graph(ahead)
                writing.manifest(encoder, extra)
            os.rename(draft, final)
            sync_folder(versions)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return final


def publish(index_dir: Path, version: Path, keep: int = 2) -> None:
    """Make a version the one that is read, then remove older ones.

    Args:
        index_dir: Folder of the index.
        version: What :func:`write_version` returned.
        keep: Versions to keep, this one included; more stay while somebody has them open.

    Raises:
        DiskFullError: If the disk is full; the published version stays.
        StorageError: If the version is not complete, or cannot be published.
    """
    if not (version / MANIFEST).exists():
        raise StorageError(f"{version} is no complete version; write it again")
    temporary = index_dir / f".{CURRENT}"
    with _disk_errors(index_dir):
        with temporary.open("w", encoding="ascii") as file:
            file.write(version.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        point("before-swap")
        os.replace(temporary, index_dir / CURRENT)
        sync_folder(index_dir)
    point("after-swap")
    others = sorted((path for path in _complete(index_dir) if path != version), key=_number)
    for path in others[: len(others) - (keep - 1)]:
        _discard(path)


def _alike(previous: IndexVersion | None, encoder: dict[str, Any], dim: int) -> IndexVersion | None:
    """The previous version, if its vectors can be used again."""
    if previous is None or previous.dim != dim:
        return None
    if previous.manifest["encoder"]["fingerprint"] != encoder["fingerprint"]:
        return None
    try:
        previous.verify()
    except (DamagedIndexError, OSError) as error:
        logger.warning("%s; taking every vector from the store instead", error)
        return None
    return previous


def _number(version: Path) -> int:
    return int(version.name[1:])


def _complete(index_dir: Path) -> list[Path]:
    return [path for path in (index_dir / VERSIONS).iterdir() if not path.name.startswith(".")]


def _sweep(index_dir: Path) -> int:
    """Remove what killed writers left; the number of the next version."""
    for path in (index_dir / VERSIONS).glob(".*"):
        shutil.rmtree(path, ignore_errors=True)
    name = current_name(index_dir)
    published = _number(Path(name)) if name else 0
    for path in _complete(index_dir):
        if _number(path) > published:
            _discard(path)
    return 1 + max([published, *map(_number, _complete(index_dir))])


def _discard(version: Path) -> None:
    """Remove a version, unless somebody has it open."""
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32":  # there, an open file forbids the renaming
            handle = os.open(version / LOCK, os.O_RDWR)
            stack.callback(os.close, handle)
            if not try_lock(handle, shared=False):
                return
        gone = version.with_name(f".{version.name}.gone")
        with contextlib.suppress(OSError):
            os.rename(version, gone)
            shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        full = (errno.ENOSPC, errno.EDQUOT, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
        code = error.errno if isinstance(error, OSError) else error.sqlite_errorcode
        if code in full:
            raise DiskFullError(str(folder), 0, shutil.disk_usage(folder).free) from error
        raise StorageError(f"cannot write the index in {folder}: {error}") from error
