"""What the monitor shows, as it is at one moment: plain values, whatever is broken.

Law: a look never raises and never waits for more than a server's silence; what cannot be had
is empty, and :attr:`Snapshot.problems` says why in a sentence. Without any server the runs on
this disk are still seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from toolkit.cluster import queues
from toolkit.cluster.connection import (
    connect,
    connect_broker,
    mapped_errors,
    resolve_address,
)
from toolkit.cluster.judge import judge
from toolkit.cluster.mirror import list_news
from toolkit.cluster.protocol import Keys
from toolkit.cluster.registry import WorkerState, WorkerView, WorkInfo, list_workers
from toolkit.config import Settings
from toolkit.errors import RunNotFoundError, SettingError, ToolkitError
from toolkit.journal import list_runs
from toolkit.monitor.watch import PATIENCE_S, WAIT_S, Health, HealthWatch
from toolkit.places import runs_dir
from toolkit.run_record import Progress, RunRecord

#: Workers and runs that are shown one by one; all of them are counted.
MOST_ROWS = 50

#: Seconds after which a run that embeds and says nothing is taken to stand still.
SILENT_S = 10.0

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class ServerRow:
    """The Redis server.

    Attributes:
        address: Where it is looked for, without its password.
        ok: Whether it answers.
        reason: What is wrong and the cure, ``None`` if nothing is.
    """

    address: str
    ok: bool
    reason: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class QueueRow:
    """One queue: messages that wait, and that workers hold."""

    queue: str
    ready: int
    unacked: int


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker, alive or lately dead.

    Attributes:
        id: Its name in the registry.
        host: Its machine.
        pid: Its main process.
        pool: ``prefork``, ``solo`` or ``threads``.
        device: Where it computes, empty while that is not known.
        encoders: timm names of what it serves.
        state: See :class:`toolkit.cluster.registry.WorkerState`.
        is_alive: Whether its main process beats.
        is_supervised: Whether something starts it again when it dies.
        run: Run of the batch in hand, or empty.
        batch: The batch in hand.
        done: Images of it that are done.
        busy_s: Seconds since it took the batch.
        images: Embedded since its start.
        rate: Images per second over its last batches; 0 while it has none in hand.
        beat_age_s: Seconds since its last beat.
        reason: Why it is of no use now, with the cure; ``None`` if it is.
    """

    id: str
    host: str
    pid: int
    pool: str
    device: str
    encoders: tuple[str, ...]
    state: WorkerState
    is_alive: bool
    is_supervised: bool
    run: str
    batch: int
    done: int
    busy_s: float
    images: int
    rate: float
    beat_age_s: float
    reason: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class RunRow:
    """A run, live or ended.

    Attributes:
        record: All that its journal says.
        is_here: Whether it is on this disk, with its failures and its log; else on the server.
        silent_s: Seconds since it was written last, by the clock of where it was read; 0 for
            one that ended.
    """

    record: RunRecord
    is_here: bool
    silent_s: float = 0.0

    @property
    def progress(self) -> Progress:
        """How far it is; one that stands still gets slower and slower."""
        stands = self.record.stage == "embed" and self.silent_s > SILENT_S
        return self.record.progress_after(self.silent_s if stands else 0.0)

    def to_json(self) -> dict[str, Any]:
        """The keys of ``toolkit runs --json``, and how far it is."""
        record, progress = self.record, self.progress
        more = ("host", "encoder", "road", "device", "started", "ended")
        return {
            **record.summary(),
            **{name: getattr(record, name) for name in more},
            "stage": progress.stage,
            "done": progress.done,
            "total": progress.total,
            "rate": round(progress.rate, 2),
            "eta_s": progress.eta_s,
            "is_here": self.is_here,
        }

    def totals(self) -> dict[tuple[str, str], float]:
        """What it has done so far: (what, road) → how much."""
        record = self.record
        done = {("failed", ""): float(record.accounting.failed)}
        for road in record.batches:
            done["batches", road] = float(record.batches[road])
            done["images", road] = float(record.images.get(road, 0))
            done["seconds", road] = float(record.road_seconds.get(road, 0.0))
        return done


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything at one moment.

    Attributes:
        at: Seconds since the epoch, by this machine's clock.
        server: The server.
        health: The doctor's quick look, as of :attr:`Health.age_s` seconds ago.
        queues: Every queue that holds something or is consumed, by name.
        workers: Those alive, then those that died lately, by id; :data:`MOST_ROWS` at most.
        n_workers: How many there are in each state, those not in ``workers`` included.
        runs: Live ones, then the newest; :data:`MOST_ROWS` at most.
        more_runs: The other runs, which are counted and not shown one by one.
        problems: What could not be looked at (``server``, ``queues``, ``workers``,
            ``mirror``, ``runs``) → why.
    """

    at: float
    server: ServerRow
    health: Health
    queues: tuple[QueueRow, ...] = ()
    workers: tuple[WorkerRow, ...] = ()
    n_workers: Mapping[WorkerState, int] = dataclasses.field(default_factory=dict)
    runs: tuple[RunRow, ...] = ()
    more_runs: tuple[RunRow, ...] = ()
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ready(self) -> int:
        """Messages that wait."""
        return sum(row.ready for row in self.queues)

    @property
    def unacked(self) -> int:
        """Messages that workers hold."""
        return sum(row.unacked for row in self.queues)

    @property
    def all_runs(self) -> tuple[RunRow, ...]:
        """Every run, in the order of ``runs``."""
        return (*self.runs, *self.more_runs)

    @property
    def n_runs(self) -> int:
        """How many runs there are."""
        return len(self.all_runs)

    @property
    def live(self) -> tuple[RunRow, ...]:
        """Those of ``runs`` that somebody drives."""
        return tuple(row for row in self.runs if row.record.state.is_live)

    @property
    def n_live(self) -> int:
        """How many runs somebody drives."""
        return sum(row.record.state.is_live for row in self.all_runs)

    @property
    def rate(self) -> float:
        """Images per second of all live runs together, by whatever road."""
        live = (row.progress for row in self.all_runs if row.record.state.is_live)
        return sum(progress.rate for progress in live if progress.stage == "embed")


def take(settings: Settings, *, health: bool = True, patient: bool = False) -> Snapshot:
    """Look at everything once.

    Args:
        settings: Server, namespace and data folder.
        health: Whether to ask the doctor too, who sends a picture through the queue now and
            then; a look that nobody sees can do without.
        patient: Whether to wait for the doctor's answer where there is no fresh one.
    """
    problems: dict[str, str] = {}
    seen = _look_at_server(settings, problems)
    views = sorted(seen.views, key=lambda view: not view.is_alive)
    signs = seen.server, tuple((view.id, _sign(view)) for view in views)
    wait_s = PATIENCE_S if patient else WAIT_S
    runs = _runs(settings, seen.mirrored, problems)
    return Snapshot(
        at=time.time(),
        server=seen.server,
        health=_watch(settings).health(signs, wait_s) if health else Health(),
        queues=seen.queues,
        workers=tuple(_worker(view, settings) for view in views[:MOST_ROWS]),
        n_workers=Counter(view.state for view in views),
        runs=tuple(runs[:MOST_ROWS]),
        more_runs=tuple(runs[MOST_ROWS:]),
        problems=problems,
    )


def find_row(run_id: str, settings: Settings, record: RunRecord) -> RunRow:
    """A run that was found, as :func:`take` shows it."""
    is_here = (runs_dir(settings.data_dir) / run_id).is_dir()
    # Of another machine's clock nothing is known here.
    return _run(record, is_here, time.time() - record.updated if is_here else 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """What the server says."""

    server: ServerRow
    queues: tuple[QueueRow, ...] = ()
    views: tuple[WorkerView, ...] = ()
    mirrored: tuple[RunRow, ...] = ()


def _look_at_server(settings: Settings, problems: dict[str, str]) -> _Seen:
    keys = Keys(settings.namespace)
    try:
        address = resolve_address(settings)
    except SettingError as error:
        problems["server"] = str(error)
        return _Seen(ServerRow("", False, str(error)))
    with connect(address) as backend, connect_broker(address) as broker:

        def part(name: str, look: Callable[[], _T]) -> _T | None:
            with _noted(problems, name), mapped_errors(address):
                return look()
            return None

        # What follows would wait for a frozen server once more each.
        if not part("server", backend.ping):
            return _Seen(ServerRow(str(address), False, problems.get("server")))
        views = part("workers", lambda: list_workers(backend, keys, dead=True)) or []
        news = part("mirror", lambda: list_news(backend, keys)) or []
        consumed = {name for view in views for name in view.info.queues}
        known = _known_queues(settings)
        depths = part("queues", lambda: known.depths(broker, keys, consumed))
    rows = () if depths is None else _queue_rows(views, depths)
    mirrored = tuple(_run(record, False, silent_s) for silent_s, record in news)
    return _Seen(ServerRow(str(address), True), rows, tuple(views), mirrored)


def _queue_rows(views: list[WorkerView], depths: list[queues.QueueDepth]) -> tuple[QueueRow, ...]:
    # An empty list is no key: what is consumed and holds nothing is known from the workers.
    idle = {name for view in views if view.is_alive for name in view.info.queues}
    rows = {name: QueueRow(name, 0, 0) for name in idle}
    rows.update({d.queue: QueueRow(d.queue, d.ready, d.unacked) for d in depths})
    return tuple(rows[name] for name in sorted(rows))


@contextlib.contextmanager
def _noted(problems: dict[str, str], name: str) -> Iterator[None]:
    """Let a part of a look fail, and note why."""
    try:
        yield
    except ToolkitError as error:
        problems[name] = str(error)
    except Exception as error:
        logger.exception("the monitor could not look at %s", name)
        problems[name] = f"{name} cannot be shown ({type(error).__name__}: {error})"


def _runs(
    settings: Settings, mirrored: tuple[RunRow, ...], problems: dict[str, str]
) -> list[RunRow]:
    """Every run that is known, live ones first, then the newest."""
    rows = {row.record.run_id: row for row in mirrored}
    with _noted(problems, "runs"):
        for view in list_runs(runs_dir(settings.data_dir)):
            with contextlib.suppress(RunNotFoundError):  # another release's, or just removed
                record = view.record()
                if record.is_sound:
                    silent_s = time.time() - record.updated
                    rows[view.folder.name] = _run(record, True, silent_s)
    newest = sorted(rows.values(), key=lambda row: row.record.run_id, reverse=True)
    return sorted(newest, key=lambda row: not row.record.state.is_live)


def _run(record: RunRecord, is_here: bool, silent_s: float) -> RunRow:
    return RunRow(record, is_here, max(0.0, silent_s) if record.state.is_live else 0.0)


def _worker(view: WorkerView, settings: Settings) -> WorkerRow:
    work, state = view.work or WorkInfo(), view.state
    is_busy = state is WorkerState.BUSY
    return WorkerRow(
        id=view.id,
        host=view.host,
        pid=view.pid,
        pool=view.info.pool,
        device=view.device,
        encoders=tuple(view.info.encoders.values()),
        state=state,
        is_alive=view.is_alive,
        is_supervised=view.info.supervised,
        run=work.run,
        batch=work.batch,
        done=work.done,
        busy_s=work.busy_s,
        images=work.images,
        rate=work.rate if is_busy else 0.0,
        beat_age_s=view.beat_age_s,
        reason=_why_not(view, work, settings),
    )


def _why_not(view: WorkerView, work: WorkInfo, settings: Settings) -> str | None:
    if view.state is WorkerState.BUSY and work.progress_s > settings.stall_s:
        return (
            f"no progress for {work.progress_s:.0f} s in batch {work.batch} of run {work.run} "
            f"(TOOLKIT_STALL_S is {settings.stall_s:g}); its watchdog will end the attempt"
        )
    # Held against an encoder of its own: which one a build needs, that build will say.
    fingerprint, model = next(iter(view.info.encoders.items()), ("", ""))
    limit_s = settings.visibility_timeout_s
    return judge(view, fingerprint, model, visibility_timeout_s=limit_s)


def _sign(view: WorkerView) -> str:
    """What of a worker's state makes another verdict; batches come and go."""
    works = view.state in (WorkerState.READY, WorkerState.BUSY)
    return "works" if works else view.state


@functools.lru_cache(maxsize=4)
def _watch(settings: Settings) -> HealthWatch:
    return HealthWatch(settings)


@functools.lru_cache(maxsize=4)
def _known_queues(settings: Settings) -> queues.KnownQueues:
    return queues.KnownQueues()
