"""The road to the workers: batches out through Celery, answers back through a list of our own.

Law: everything that speaks to the server happens in one thread of this room, so that a server
that hangs never keeps the build waiting; and the moment the workers cannot do the work, what
they have is given back, whatever the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from typing import Any

from toolkit.cluster.connection import mapped_errors
from toolkit.cluster.judge import judge
from toolkit.cluster.registry import WorkerState, WorkerView
from toolkit.config import Settings
from toolkit.dispatch.base import Event, Finished, Lost
from toolkit.dispatch.channel import Channel
from toolkit.dispatch.check import check_outcome
from toolkit.dispatch.job import Job
from toolkit.dispatch.leases import Due, Lease, due
from toolkit.dispatch.passport import Passport
from toolkit.dispatch.standing import Standing, Trust
from toolkit.dispatch.transport import MAX_BYTES_IN_FLIGHT, Transport
from toolkit.embedding.spec import EncoderSpec, SpecCache
from toolkit.errors import (
    AnswerError,
    ExecutorDiedError,
    RoadError,
    ServerError,
    WorkerLostError,
)
from toolkit.records import Batch, Outcome

logger = logging.getLogger(__name__)

#: Seconds for which answers are awaited at a time; a new batch waits as long to be sent.
_LISTEN_S = 0.1

#: Seconds for which a server may be away before what the workers have is given back.
SERVER_GRACE_S = 1.0

#: Most seconds between two looks at a server that cannot be used.
_MOST_BACK_OFF_S = 2.0

#: Batches in flight for each worker: the one it has, and the next one.
_PER_WORKER = 2

#: Seconds for which a worker may load a model in the middle of a batch.
_RELOAD_S = 60.0

#: Seconds that closing may take: the rest expires by itself.
_CLOSE_S = 3.0


class CeleryExecutor:
    """Runs batches on the workers that are registered for an encoder.

    Args:
        run_id: The run that asks.
        spec: The encoder.
        model: Its timm name, for what is said to people.
        settings: Server, namespace, limits and intervals.
    """

    road = "workers"
    is_shared = False

    def __init__(self, run_id: str, spec: EncoderSpec, model: str, settings: Settings) -> None:
        self._run_id, self._spec, self._model, self._settings = run_id, spec, model, settings
        self._channel = Channel(run_id, spec.fingerprint, settings)
        self._passport = Passport(spec, SpecCache(settings.data_dir / "specs"))
        self._transport = Transport()
        self._leases: dict[int, Lease] = {}
        self._inbox: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake, self._is_over = threading.Event(), False
        self._settled = threading.Event()
        self._views: dict[str, WorkerView] = {}
        self._trust = Trust()
        self._failing_since: float | None = None
        self._next_look = self._emptied_until = 0.0
        self._look_s = min(1.0, settings.beat_s / 2)
        self._claim_grace_s = max(1.0, settings.beat_ttl_s / 2)
        self.standing = Standing()
        self.is_cancelled = False
        self._thread = threading.Thread(target=self._main, name="workers", daemon=True)

    def start(self, timeout_s: float) -> Standing:
        """Begin to look for workers; what is known of them after at most ``timeout_s``."""
        self._thread.start()
        self._settled.wait(timeout_s)
        return self.standing

    @property
    def window(self) -> int:
        """See :class:`toolkit.dispatch.base.Executor`."""
        if self._trust.needs_proof:
            return min(1, self.standing.n_usable)
        return _PER_WORKER * self.standing.n_usable

    @property
    def n_processes(self) -> int:
        """Workers that can serve this encoder."""
        return max(1, self.standing.n_usable)

    @property
    def batch_bytes(self) -> int:
        """See :class:`toolkit.dispatch.base.Executor`."""
        return self._transport.batch_bytes

    @property
    def devices(self) -> str:
        """Where the workers compute."""
        return ", ".join(sorted({view.device for view in self._views.values() if view.device}))

    def submit(self, batch: Batch) -> None:
        """Take a batch; it goes out with the thread's next turn."""
        self._inbox.put(batch)
        self._wake.set()

    def events(self, timeout_s: float) -> list[Event]:
        """See :class:`toolkit.dispatch.base.Executor`."""
        try:
            found = [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._events.get_nowait())
        return found

    def close(self) -> None:
        """Take back what was sent and remove the run from the server, as far as it answers."""
        self._is_over = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_CLOSE_S)

    # The thread.

    def _main(self) -> None:
        try:
            while not self._is_over:
                try:
                    self._turn()
                except ServerError as error:
                    self._server_failed(error)
            self._channel.withdraw()
        except Exception as error:
            # Nobody would hear of it otherwise: the build goes on without workers.
            logger.exception("the thread that speaks to the workers failed; please report this")
            self._forsake(f"a mistake of this program: {error!r}", ExecutorDiedError(repr(error)))
        finally:
            self._channel.close()

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._look(now)
            self._next_look = now + self._look_s
        self._take_in()
        if not self._leases:
            # Nobody owes us an answer: wait for a batch, or for the next look.
            self._wake.wait(max(0.0, self._next_look - time.monotonic()))
            self._wake.clear()
            return
        if self.standing.n_usable:
            self._send_waiting()
        said = self._channel.listen(_LISTEN_S)
        if said is not None:
            self._hear(said)
        self._failing_since = None

    def _take_in(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                batch = self._inbox.get_nowait()
                self._leases[batch.id] = Lease(batch)
        if self._leases and not self.standing.n_usable:
            reason = self.standing.reason or "no worker is left"
            self._give_back(WorkerLostError(reason))

    def _look(self, now: float) -> None:
        """Who is there, and can they; keep our run alive; see to what is overdue."""
        views = self._channel.workers()
        reasons = {name: self._why_not(view) for name, view in views.items()}
        usable = [name for name, reason in reasons.items() if reason is None]
        if usable or self._leases:
            self._keep_alive(now)
        if not self._leases:
            # While something is in flight, only that it gets through says that the way is good.
            self._failing_since = None
        if now < self._emptied_until and len(usable) < self.standing.n_usable:
            # Somebody emptied the server: its workers say with their next beat that they live.
            return
        self._views = views
        self._set_standing(usable, [reason for reason in reasons.values() if reason])
        for lease in list(self._leases.values()):
            # What one of them shows may take all others back.
            if lease.batch.id in self._leases:
                self._see_to(lease, now)

    def _why_not(self, view: WorkerView) -> str | None:
        reason = judge(
            view,
            self._spec.fingerprint,
            self._model,
            visibility_timeout_s=self._settings.visibility_timeout_s,
        )
        if reason is not None:
            return reason
        with mapped_errors(self._channel.address):
            return self._passport.refuses(view, self._channel.client, self._channel.keys)

    def _set_standing(self, usable: list[str], reasons: list[str]) -> None:
        reason = None
        if not usable:
            reason = "; ".join(reasons[:3]) or (
                f"no worker is registered at {self._channel.address}; start some with `toolkit "
                "cluster up` on this machine, or `toolkit worker` on another one"
            )
        elif self._trust.is_withheld:
            usable, reason = [], self._trust.reason
        self.standing = Standing(len(usable), reason)
        self._settled.set()

    def _keep_alive(self, now: float) -> None:
        out = {n: lease.attempt for n, lease in self._leases.items() if lease.sent_at}
        cancelled, was_known = self._channel.keep_alive(out)
        self.is_cancelled = self.is_cancelled or cancelled
        if out and not was_known:
            logger.warning("run %s: the server was emptied; going on", self._run_id)
            self._emptied_until = now + self._settings.beat_ttl_s

    def _send_waiting(self) -> None:
        in_flight = sum(lease.n_bytes for lease in self._leases.values())
        for lease in list(self._leases.values()):
            if lease.sent_at is not None:
                continue
            needed = self._transport.n_bytes(lease.batch.items)
            if in_flight and needed and in_flight + needed > MAX_BYTES_IN_FLIGHT:
                return
            self._send(lease)
            in_flight += lease.n_bytes

    def _send(self, lease: Lease) -> None:
        blobs = self._transport.load(lease)
        if not lease.sent:
            nothing = Outcome.empty(lease.batch.id, self._spec.fingerprint)
            self._finish(lease, self._transport.finished(lease, nothing, set(), None))
            return
        lease.attempt += 1
        batch = dataclasses.replace(lease.batch, items=lease.sent)
        job = Job(self._run_id, lease.attempt, batch, lease.blobs, self._settings.max_pixels)
        self._channel.send(job, blobs)
        lease.sent_at, lease.claimed_by, lease.missed_at = time.monotonic(), None, None
        lease.first_sent_at = lease.first_sent_at or lease.sent_at

    def _hear(self, said: dict[str, Any]) -> None:
        try:
            lease = self._leases.get(int(said["batch"]))
            if lease is not None and said["attempt"] == lease.attempt:
                self._heard(lease, str(said["worker"]), said)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("an answer of no worker of ours was passed over: %r", error)

    def _heard(self, lease: Lease, worker: str, said: dict[str, Any]) -> None:
        self._trust.was_claimed()
        match said["type"]:
            case "claim":
                lease.claimed_by, lease.claimed_at = worker, time.monotonic()
            case "lost" if said["again"]:
                self._send_again(lease, f"worker {worker}: {said['reason']}")
            case "lost":
                error = ExecutorDiedError(str(said["reason"]))
                self._lose(lease, error, frozenset(int(n) for n in said["suspects"]))
            case "done":
                self._done(lease, worker, said)

    def _done(self, lease: Lease, worker: str, said: dict[str, Any]) -> None:
        try:
            vectors = self._channel.vectors(lease.batch.id, lease.attempt)
            outcome = Outcome.from_json(said["outcome"], vectors)
            unseen = {int(n) for n in said["unseen"]}
            if not self._is_believed(worker):
                self._send_again(lease, f"worker {worker} is not believed")
                return
            seen = tuple(item for item in lease.sent if item.id not in unseen)
            check_outcome(outcome, seen, self._spec)
        except (AnswerError, ValueError, KeyError, TypeError) as error:
            self._passport.caught(worker, str(error))
            self._send_again(lease, f"worker {worker} answered what cannot be believed: {error}")
            return
        view = self._views.get(worker)
        finished = self._transport.finished(lease, outcome, unseen, view.work if view else None)
        self._finish(lease, finished)

    def _is_believed(self, worker: str) -> bool:
        if worker not in self._views:
            # It came, and answered, since the last look.
            self._look(time.monotonic())
        return self._passport.is_believed(worker)

    def _finish(self, lease: Lease, finished: Finished) -> None:
        self._leases.pop(lease.batch.id, None)
        self._events.put(finished)
        self._channel.drop(lease.batch.id, lease.blobs)

    def _see_to(self, lease: Lease, now: float) -> None:
        what, why = due(
            lease,
            self._run_id,
            self._views,
            now,
            claim_grace_s=self._claim_grace_s / 2,
            beat_ttl_s=self._settings.beat_ttl_s,
            limit_s=self._settings.celery_task_time_limit,
        )
        if what is Due.LOOK:
            what = self._look_for(lease, now)
        if what is Due.SEND_AGAIN and self._is_swallowed(lease):
            self._withhold(
                f"batches sent to {self.standing.n_usable} workers vanish and nobody claims them: "
                "their clock is a day off, or they refuse what we send; `toolkit doctor "
                "--dispatch` shows it"
            )
        elif what is Due.SEND_AGAIN:
            self._send_again(lease, why)

    def _is_swallowed(self, lease: Lease) -> bool:
        """Whether a batch was taken and dropped twice, and nobody claimed any since."""
        is_second = lease.claimed_by is None and lease.attempt > 1
        return is_second and self._trust.last_claim < lease.first_sent_at

    def _withhold(self, reason: str) -> None:
        """Give the workers nothing for a while; what they have is done elsewhere."""
        self._trust.withhold(reason)
        self._set_standing([], [reason])
        self._give_back(WorkerLostError(reason))

    def _look_for(self, lease: Lease, now: float) -> Due:
        """Whether a batch that nobody claimed is on its way, lost, or ignored."""
        if not self._channel.is_waiting(lease.batch.id, lease.attempt):
            # Nowhere, or taken and not claimed: lost with its reader, if that lasts.
            lease.missed_at = lease.missed_at or now
            is_lost = now - lease.missed_at > self._claim_grace_s / 2
            return Due.SEND_AGAIN if is_lost else Due.NOTHING
        lease.missed_at = None
        usable = [v for v in self._views.values() if self._passport.is_believed(v.id)]
        if not usable:
            return Due.NOTHING
        if any(self._is_at_work(view) for view in usable):
            return Due.NOTHING
        if now - max(self._trust.last_claim, lease.sent_at or 0.0) > self._claim_grace_s:
            self._withhold(
                f"{len(usable)} workers are registered and idle, and none of them took a batch in "
                f"{self._claim_grace_s:.1f} s; `toolkit doctor` says which one is at fault"
            )
        return Due.NOTHING

    def _is_at_work(self, view: WorkerView) -> bool:
        """Whether a worker is busy and gets on, so that what waits will have its turn."""
        if view.state is not WorkerState.BUSY or view.work is None:
            return False
        # It may be loading its model anew after a picture killed it.
        return view.work.progress_s < self._settings.stall_s + _RELOAD_S

    # What becomes of a lease.

    def _send_again(self, lease: Lease, why: str) -> None:
        retries = self._settings.celery_max_retries
        if lease.attempt > retries:
            self._lose(lease, WorkerLostError(f"{why}; sent {lease.attempt} times"))
            return
        logger.warning("batch %d of run %s goes out again: %s", lease.batch.id, self._run_id, why)
        lease.recall()

    def _lose(self, lease: Lease, error: RoadError, suspects: frozenset[int] | None = None) -> None:
        self._leases.pop(lease.batch.id, None)
        with contextlib.suppress(ServerError):  # it expires
            self._channel.drop(lease.batch.id, lease.blobs)
        self._events.put(
            Lost(lease.batch.id, suspects or frozenset(), error, is_innocent=suspects is None)
        )

    def _give_back(self, error: RoadError) -> None:
        """Everything in flight, to be done elsewhere."""
        for lease in list(self._leases.values()):
            self._lose(lease, error)

    def _server_failed(self, error: ServerError) -> None:
        self._channel.reset()
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            logger.info("run %s: %s; trying again", self._run_id, error)
        failing_s = now - self._failing_since
        for lease in self._leases.values():
            if lease.claimed_by is None:
                # It may have been sent: another attempt makes the first one stale.
                lease.recall()
        if not self._leases or failing_s >= SERVER_GRACE_S or error.cause == "full":
            if self._leases:
                self._trust.withhold(str(error))
            self._forsake(str(error), error)
        self._wake.wait(min(_MOST_BACK_OFF_S, max(0.2, failing_s)))
        self._wake.clear()
        self._next_look = 0.0

    def _forsake(self, reason: str, error: RoadError) -> None:
        self.standing = Standing(0, reason)
        self._views = {}
        leases, self._leases = self._leases, {}
        with contextlib.suppress(queue.Empty):
            while True:
                batch = self._inbox.get_nowait()
                leases[batch.id] = Lease(batch)
        for batch_id in leases:
            self._events.put(Lost(batch_id, frozenset(), error, is_innocent=True))
        self._settled.set()
