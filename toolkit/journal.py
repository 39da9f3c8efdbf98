"""The journal of a run: who drives it writes, everybody else reads.

Law: the process that drives a run is the only writer of its state and holds its lock, which
dies with it; others read, or leave a cancel request.

A run is a folder: ``request.json`` (the call, so that it can be made again), ``run.json``
(replaced whole), ``events.jsonl`` and ``run.log`` (appended), ``failures.jsonl``, ``cancel``
(exists or not), ``owner.lock``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from toolkit.errors import RunError, RunNotFoundError, StorageError
from toolkit.machine import mapped_write
from toolkit.run_record import RunRecord, RunState

#: Runs kept on disk; older ones that have ended are removed when a new one starts.
KEEP_RUNS = 100

#: Seconds in which a process must take up a queued run; after that nobody will.
QUEUED_S = 60.0

#: Seconds between two writes of the progress.
PROGRESS_INTERVAL_S = 0.5


#: What else hears of a run's changes: called with the record after every write.
Sink = Callable[[RunRecord], None]


class RunJournal:
    """The writing end of a run, held by the one process that drives it.

    Args:
        runs_dir: Folder of all runs.
        record: The run; its folder is made when it is new.
        request: The call as JSON, for a new run.

    Raises:
        RunError: If another process drives this run.
        StorageError: If its folder cannot be made.
    """

    def __init__(
        self, runs_dir: Path, record: RunRecord, request: dict[str, Any] | None = None
    ) -> None:
        self.record = record
        self.folder = runs_dir / record.run_id
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {self.folder}: {error.strerror}") from error
        self._sinks: tuple[Sink, ...] = ()
        # A reader that asks whether we live holds the lock for an instant: wait that long.
        self._lock = FileLock(self.folder / "owner.lock", timeout=2)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RunError(f"run {record.run_id} is driven by another process") from error
        record.pid, record.host = os.getpid(), socket.gethostname()
        record.started = record.started or time.time()
        if request is not None:
            with mapped_write(self.folder):
                (self.folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        self.write()
        _prune(runs_dir)

    def add_sink(self, sink: Sink) -> None:
        """Let somebody else hear of every write from now on."""
        self._sinks = (*self._sinks, sink)

    def stage(self, name: str, total: int = 0) -> None:
        """Enter a stage."""
        self.record.stage, self.record.done, self.record.total = name, 0, total
        self.record.stage_started = time.time()
        self.write()

    def progress(self, done: int, total: int | None = None) -> None:
        """Say how far the stage is; written at most every :data:`PROGRESS_INTERVAL_S`."""
        self.record.done = done
        if total is not None:
            self.record.total = total
        if time.time() - self.record.updated >= PROGRESS_INTERVAL_S:
            self.write()

    def event(self, kind: str, **data: Any) -> None:
        """Append one line that a person may ask about later."""
        line = json.dumps({"at": time.time(), "event": kind, **data}, default=str)
        path = self.folder / "events.jsonl"
        with mapped_write(path), open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def failures(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the table of what failed, one row a file."""
        path = self.folder / "failures.jsonl"
        with mapped_write(path), open(path, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")

    def end(self, state: RunState, error: str | None = None) -> None:
        """Write the last state and let go of the run, which a full disk does not prevent."""
        self.record.state, self.record.error = state, error
        self.record.ended = time.time()
        self.record.stage = ""
        try:
            self.write()
            self.event("end", state=state, error=error)
        finally:
            self.release()

    def release(self) -> None:
        """Let another process drive this run."""
        self._lock.release()

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked this run to stop."""
        return (self.folder / "cancel").exists()

    def write(self) -> None:
        """Replace ``run.json`` and tell the sinks."""
        self.record.updated = time.time()
        temporary = self.folder / "run.json.tmp"
        with mapped_write(temporary):
            temporary.write_text(json.dumps(self.record.to_json()), encoding="utf-8")
            os.replace(temporary, self.folder / "run.json")
        for sink in self._sinks:
            sink(self.record)


class RunView:
    """The reading end of a run; works from any process that sees the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self) -> RunRecord:
        """The run as it is now; ``interrupted`` when its owner is gone.

        Raises:
            RunNotFoundError: If there is no such run.
        """
        record = self._read()
        if record.state.is_live and not self.has_owner:
            # Read again: it may have ended, and let go, between the two looks.
            record = self._read()
            waits = record.state is RunState.QUEUED and time.time() - record.updated < QUEUED_S
            if record.state.is_live and not waits:
                record.state = RunState.INTERRUPTED
                record.error = record.error or "its process died; build again to go on from there"
        return record

    def request(self) -> dict[str, Any]:
        """The call, as JSON.

        Raises:
            RunNotFoundError: If there is no such run.
        """
        try:
            text = (self.folder / "request.json").read_text(encoding="utf-8")
            request: dict[str, Any] = json.loads(text)
        except (OSError, ValueError) as error:
            raise RunNotFoundError(
                f"run {self.folder.name!r} does not say what it was asked ({error})"
            ) from error
        return request

    def _read(self) -> RunRecord:
        try:
            text = (self.folder / "run.json").read_text(encoding="utf-8")
            return RunRecord.from_json(json.loads(text))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunNotFoundError(
                f"no run {self.folder.name!r} that this release can read ({error}); "
                "`toolkit runs` lists them"
            ) from error

    @property
    def has_owner(self) -> bool:
        """Whether a process drives this run: its lock dies with it."""
        return is_locked(self.folder / "owner.lock")

    def request_cancel(self) -> None:
        """Ask the driver to stop; it looks once a batch."""
        (self.folder / "cancel").touch()

    def failures(self) -> list[dict[str, Any]]:
        """Every failed file with path, reason and kind."""
        return list(_json_lines(self.folder / "failures.jsonl"))

    def events(self) -> list[dict[str, Any]]:
        """What happened, oldest first."""
        return list(_json_lines(self.folder / "events.jsonl"))

    def log(self) -> str:
        """The run's log file."""
        try:
            return (self.folder / "run.log").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""


def new_run_id() -> str:
    """An id that sorts by time, to the millisecond, and is unique between processes."""
    seconds, rest = divmod(time.time_ns(), 1_000_000_000)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(seconds))
    return f"{stamp}-{rest // 1_000_000:03x}{secrets.token_hex(3)}"


def list_runs(runs_dir: Path) -> list[RunView]:
    """Every run on disk, the newest first."""
    if not runs_dir.is_dir():
        return []
    folders = sorted((f for f in runs_dir.iterdir() if (f / "run.json").exists()), reverse=True)
    return [RunView(folder) for folder in folders]


def find_run(runs_dir: Path, run_id: str | None = None) -> RunView:
    """A run by its id, or the newest live one.

    Raises:
        RunNotFoundError: If there is none.
    """
    if run_id is None:
        for view in list_runs(runs_dir):
            with contextlib.suppress(RunNotFoundError):
                if view.record().state.is_live:
                    return view
        raise RunNotFoundError("no run is live; `toolkit runs` lists those that ended")
    view = RunView(runs_dir / run_id)
    # A run's id is a folder's name: nothing that leads elsewhere is one.
    if Path(run_id).name != run_id or not (view.folder / "run.json").is_file():
        raise RunNotFoundError(f"no run {run_id!r}; `toolkit runs` lists them")
    return view


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock file."""
    if not path.exists():
        return False
    if sys.platform == "win32":
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True
    import fcntl  # not on Windows

    with open(path, "rb") as file:
        try:
            # Shared, so that two who ask at once do not take each other for the owner.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            # Half written while its driver lives, or whatever a dying machine left there.
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _prune(runs_dir: Path) -> None:
    for view in list_runs(runs_dir)[KEEP_RUNS:]:
        if not view.has_owner:
            shutil.rmtree(view.folder, ignore_errors=True)
