"""Where things lie in the data folder, and who may write there at one time."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from filelock import BaseFileLock, FileLock, Timeout

from toolkit.errors import BuildInProgressError, SettingError

if sys.platform != "win32":
    import fcntl

#: Longest name of an index, in bytes of the folder's name.
MAX_NAME_BYTES = 200

#: Seconds that a writer waits for somebody who only looks whether the index is free.
LOOK_S = 0.2


def index_dir(data_dir: Path, name: str) -> Path:
    """Folder of an index; any name becomes a name that every file system takes.

    Raises:
        SettingError: If the name is empty or too long.
    """
    quoted = quote(name, safe="+@ ,()[]=", errors="surrogateescape")
    if quoted.startswith("."):  # neither hidden, nor a step up
        quoted = f"%2E{quoted[1:]}"
    if not 0 < len(quoted) <= MAX_NAME_BYTES:
        raise SettingError("name", name, f"1 to {MAX_NAME_BYTES} bytes, as they stand in a path")
    return data_dir / "indexes" / quoted


def runs_dir(data_dir: Path) -> Path:
    """Folder of all runs."""
    return data_dir / "runs"


@contextlib.contextmanager
def index_lock(folder: Path, name: str, run_id: str) -> Iterator[None]:
    """Be the only writer of an index.

    Raises:
        BuildInProgressError: If another run is.
    """
    with _acquired(folder, name, LOOK_S):
        (folder / "build.run").write_text(run_id, encoding="utf-8")
        yield


def check_index_free(folder: Path, name: str) -> None:
    """Make sure that nobody writes an index just now.

    Raises:
        BuildInProgressError: If a run does.
    """
    if folder.is_dir():
        _acquired(folder, name, 0).release()


def _acquired(folder: Path, name: str, timeout_s: float) -> BaseFileLock:
    lock, note = FileLock(folder / "build.lock", timeout=timeout_s), folder / "build.run"
    try:
        lock.acquire()
    except Timeout:
        other = note.read_text(encoding="utf-8").strip() if note.exists() else ""
        cure = f" (`toolkit attach {other}`) or stop it (`toolkit cancel {other}`)" if other else ""
        raise BuildInProgressError(
            f"index {name!r} is being built by {f'run {other}' if other else 'another run'}; wait "
            f"for it{cure}",
            other,
        ) from None
    return lock


@contextlib.contextmanager
def data_in_use(data_dir: Path, *, alone: bool = False) -> Iterator[None]:
    """Write vectors beside others, or remove some with nobody else at work.

    Raises:
        BuildInProgressError: If ``alone`` is wanted and somebody writes. Those who write
            wait for whoever is alone.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # no shared locks there: the collector must be run by itself
        yield
        return
    handle = os.open(data_dir / "in-use.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        yield
    except BlockingIOError as error:
        raise BuildInProgressError("a build is at work here; wait for it, or cancel it") from error
    finally:
        os.close(handle)
