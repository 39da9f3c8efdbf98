"""The journal of a run: its state, its books, its events.

Law: the process that drives a run is the only writer of its state and holds its lock, which
dies with it; everyone else reads, or leaves a cancel request. ``found = indexed + duplicates +
failed + excluded + pending``, and pending is 0 when a run says done.

A run is a folder: ``request.json`` (the call, so that it can be made again), ``run.json``
(replaced whole), ``events.jsonl`` and ``run.log`` (appended),
``failures.jsonl``, ``cancel`` (exists or not), ``owner.lock``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
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

from toolkit.errors import AccountingError, RunError, RunNotFoundError, StorageError
from toolkit.machine import mapped_write

#: Runs kept on disk; older ones that have ended are removed when a new one starts.
KEEP_RUNS = 100

#: Seconds in which a process must take up a queued run; after that nobody will.
QUEUED_S = 60.0

#: Seconds between two writes of the progress.
PROGRESS_INTERVAL_S = 0.5


class RunState(enum.StrEnum):
    """What a run is doing, or how it ended.

    ``held``: the guard refused to publish. ``interrupted``: its owner died or was stopped.
    """

    QUEUED = "queued"
    RUNNING = "running"
    HELD = "held"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def is_live(self) -> bool:
        """Whether somebody should be driving it."""
        return self in (RunState.QUEUED, RunState.RUNNING)


@dataclasses.dataclass(slots=True)
class Accounting:
    """The books of a run, in files.

    Attributes:
        found: Every regular file that was met, plus folders that could not be listed.
        indexed: Contents in the index, each counted once.
        duplicates: Further files of a content that is indexed.
        failed: Files without a vector, each with path and reason.
        excluded: Files that a rule left out.
        pending: Files whose fate is not known yet.
        embedded: Images that went through the model in this run.
        reused: Contents whose vector was stored already.
        kept: Files that could not be read now and keep their old vector; among ``indexed``.
    """

    found: int = 0
    indexed: int = 0
    duplicates: int = 0
    failed: int = 0
    excluded: int = 0
    pending: int = 0
    embedded: int = 0
    reused: int = 0
    kept: int = 0

    def check(self, run_id: str = "") -> None:
        """Raise if the books do not add up, or something is pending.

        Raises:
            AccountingError: With every figure. It is a bug, and nothing is published.
        """
        known = self.indexed + self.duplicates + self.failed + self.excluded
        if known + self.pending != self.found or self.pending:
            raise AccountingError(f"the books do not add up, please report this: {self}", run_id)


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        state: What it is doing or how it ended.
        stage: ``scan``, ``load`` (the model), ``embed``, ``index``, ``publish`` or empty.
        done: Images done in this stage.
        total: Where that is heading, 0 when unknown.
        rate: Images per second since the stage began, 0 when unknown.
        eta_s: Seconds until the stage is done, or ``None``.
    """

    state: RunState
    stage: str
    done: int
    total: int
    rate: float
    eta_s: float | None


@dataclasses.dataclass(slots=True)
class RunRecord:
    """What ``run.json`` holds; see :class:`Accounting` for the books.

    Attributes:
        run_id: Sorts by time of start.
        index: Name of the index.
        state: See :class:`RunState`.
        stage: ``scan``, ``load`` (the model), ``embed``, ``index``, ``publish`` or empty.
        done: Progress within the stage, in ``unit``.
        total: Where ``done`` is heading, 0 when unknown.
        stage_started: Seconds since the epoch.
        started: Seconds since the epoch.
        updated: Seconds since the epoch of the last write.
        ended: Seconds since the epoch, or ``None``.
        pid: Process that drives it.
        host: Machine of that process.
        encoder: The encoder, in words.
        road: The road that embeds now.
        device: The device of that road.
        folder: Folder of the index.
        embed_seconds: Wall time of the embedding stage.
        excluded_by: Files left out, by rule.
        batches: How many each road did.
        moves: When work moved from one road to another, and why.
        fallback_reason: The first reason for not using workers, or ``None``.
        recall_at_10: Of the published index, or ``None``.
        losses: When held: images that would be removed, and files that newly fail.
        error: One sentence when it failed or was held.
    """

    run_id: str
    index: str
    state: RunState = RunState.QUEUED
    stage: str = ""
    done: int = 0
    total: int = 0
    stage_started: float = 0.0
    started: float = 0.0
    updated: float = 0.0
    ended: float | None = None
    pid: int = 0
    host: str = ""
    encoder: str = ""
    road: str = ""
    device: str = ""
    folder: str = ""
    embed_seconds: float = 0.0
    accounting: Accounting = dataclasses.field(default_factory=Accounting)
    excluded_by: dict[str, int] = dataclasses.field(default_factory=dict)
    batches: dict[str, int] = dataclasses.field(default_factory=lambda: {"workers": 0, "local": 0})
    moves: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fallback_reason: str | None = None
    recall_at_10: float | None = None
    losses: tuple[int, int] | None = None
    error: str | None = None

    @property
    def progress(self) -> Progress:
        """How far the stage is, at the rate since it began."""
        elapsed = self.updated - self.stage_started
        rate = self.done / elapsed if elapsed > 0 and self.stage_started else 0.0
        eta = max(0, self.total - self.done) / rate if rate and self.total else None
        return Progress(self.state, self.stage, self.done, self.total, rate, eta)

    @property
    def seconds(self) -> float:
        """Wall time so far, or until it ended."""
        return (self.ended or self.updated) - self.started

    def summary(self) -> dict[str, Any]:
        """The keys that ``--json`` promises, in their order."""
        books = self.accounting
        return {
            "run_id": self.run_id,
            "index": self.index,
            "state": self.state.value,
            "found": books.found,
            "indexed": books.indexed,
            "duplicates": books.duplicates,
            "failed": books.failed,
            "excluded": books.excluded,
            "pending": books.pending,
            "embedded": books.embedded,
            "reused": books.reused,
            "kept": books.kept,
            "batches": self.batches,
            "fallback_reason": self.fallback_reason,
            "moves": self.moves,
            "recall_at_10": self.recall_at_10,
            "seconds": round(self.seconds, 3),
            "error": self.error,
        }

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RunRecord:
        """Read back :meth:`to_json`; keys of a newer release are passed over."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: item for name, item in value.items() if name in names}
        known["state"] = RunState(known["state"])
        books = {field.name for field in dataclasses.fields(Accounting)}
        figures = {name: n for name, n in known["accounting"].items() if name in books}
        known["accounting"] = Accounting(**figures)
        return cls(**known)


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
    """An id that sorts by time and is unique between processes."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)


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
