"""What a run is: its state, its books and how far it is; values only, with a JSON form.

Law: ``found = indexed + duplicates + failed + excluded + pending``, and pending is 0 when a
run says done.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

from toolkit.errors import AccountingError

#: Images over which a rate is worth telling.
LEAST_IMAGES = 64

#: Bounds of what a sound record counts, and of its times in seconds since the epoch.
MOST_COUNT, MOST_TIME_S = 1e15, 1e11

#: Attributes of a record and keys of a move that are points in time.
_TIMES = ("at", "started", "updated", "ended", "stage_started")

#: What a move says; see :attr:`RunRecord.moves`.
_MOVE: dict[str, Any] = {
    "at": float,
    **dict.fromkeys(("from", "to", "reason"), str),
    "batches": int,
    "eta_s": tuple[float | None, float | None],
}


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
        stage: ``scan``, ``load`` (the model), ``embed``, ``fidelity``, ``index``, ``publish`` or
            empty.
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
        images: How many each road embedded.
        road_seconds: Wall time during which each road was the one taken.
        moves: When work moved from one road to another: ``at``, ``from``, ``to``, ``reason``,
            ``batches`` that the road left behind had done, ``eta_s`` before and after.
        fallback_reason: The first reason for not using workers, or ``None``.
        recall_at_10: Of the published index, or ``None``.
        fidelity: How far a faster encoder moved the vectors of this run, in words, or ``None``.
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
    images: dict[str, int] = dataclasses.field(default_factory=dict)
    road_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    moves: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fallback_reason: str | None = None
    recall_at_10: float | None = None
    fidelity: str | None = None
    losses: tuple[int, int] | None = None
    error: str | None = None

    @property
    def progress(self) -> Progress:
        """How far the stage is, at the rate since it began."""
        return self.progress_after(0.0)

    def progress_after(self, silent_s: float) -> Progress:
        """How far it is if nothing came of it for so many seconds since its last write."""
        elapsed = self.updated + silent_s - self.stage_started
        rate = self.done / elapsed if elapsed > 0 and self.stage_started else 0.0
        eta = max(0, self.total - self.done) / rate if rate and self.total else None
        return Progress(self.state, self.stage, self.done, self.total, rate, eta)

    def rate(self, road: str) -> float | None:
        """Images per second on a road, where enough went over it to tell."""
        seconds = self.road_seconds.get(road, 0.0)
        n = self.images.get(road, 0)
        return n / seconds if seconds and n >= LEAST_IMAGES else None

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
            "fidelity": self.fidelity,
            "seconds": round(self.seconds, 3),
            "error": self.error,
        }

    @property
    def is_sound(self) -> bool:
        """Whether every part is of its kind and within bounds, whoever wrote it."""
        own = {name: getattr(self, name) for name in _KINDS}
        books = {name: getattr(self.accounting, name) for name in _BOOKS}
        return (
            _fit(own, _KINDS)
            and _fit(books, _BOOKS)
            and all(_fit(move, _MOVE) for move in self.moves)
            and self.batches.keys() >= {"workers", "local"}
        )

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


_KINDS, _BOOKS = typing.get_type_hints(RunRecord), typing.get_type_hints(Accounting)


def _fit(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> bool:
    return all(_fits(values[name], kinds[name], name) for name in values.keys() & kinds.keys())


def _fits(value: Any, kind: Any, name: str = "") -> bool:
    """Whether a value that was read from JSON is what an annotation says."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is types.UnionType:
        return any(_fits(value, part, name) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items()
        )
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is tuple:
        is_long_enough = isinstance(value, list | tuple) and len(value) == len(parts)
        return is_long_enough and all(map(_fits, value, parts))
    if kind in (int, float):
        most = MOST_TIME_S if name in _TIMES else MOST_COUNT
        # What was measured with a clock that was set back meanwhile is less than nothing.
        least = -most if kind is float and name not in _TIMES else 0
        return type(value) in (int, kind) and least <= value < most
    return isinstance(value, kind)
