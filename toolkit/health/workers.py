"""The workers: who is registered, who of them could serve this encoder, and why the others not."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from toolkit.cluster.connection import mapped_errors
from toolkit.cluster.judge import judge
from toolkit.cluster.protocol import EMBED_TASK, PROTOCOL, queue_name
from toolkit.cluster.reading import answers, shown
from toolkit.cluster.registry import WorkerState, WorkerView, list_workers
from toolkit.dispatch.passport import Passport
from toolkit.embedding.spec import SpecCache
from toolkit.health.case import Case
from toolkit.health.report import Check, Status

if TYPE_CHECKING:
    import redis

#: Seconds for which Celery's own channel is listened to; a busy solo worker never answers.
INSPECT_S = 1.0

#: Celery's channel for control.
_CHANNEL = "celery.pidbox"

#: Workers that are named one by one in a sentence.
_NAMED = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Crew:
    """The registered workers, as a build would judge them.

    Attributes:
        usable: Those it would give batches to.
        refused: The others, each with the reason.
        hung: Those of ``usable`` that are at a batch and make no progress.
    """

    usable: tuple[WorkerView, ...]
    refused: tuple[tuple[WorkerView, str], ...]
    hung: tuple[WorkerView, ...]

    @property
    def busy(self) -> list[WorkerView]:
        """Those that are at a batch and get on with it."""
        return [v for v in self.usable if v.state is WorkerState.BUSY and v not in self.hung]

    @property
    def idle(self) -> list[WorkerView]:
        """Those that wait for a batch."""
        return [view for view in self.usable if view.state is WorkerState.READY]


def muster(case: Case, backend: redis.Redis) -> Crew:
    """Who is registered, and of those that died who died lately."""
    views = list_workers(backend, case.keys, dead=True)
    specs = SpecCache(case.settings.data_dir / "specs")
    passport = Passport(case.spec, specs) if case.spec else None
    usable, refused = [], []
    for view in views:
        reason = _why_not(view, case)
        if reason is None and passport is not None:
            reason = passport.refuses(view, backend, case.keys)
        if reason is None:
            usable.append(view)
        else:
            refused.append((view, reason))
    hung = [view for view in usable if _is_hung(view, case.settings.stall_s)]
    return Crew(tuple(usable), tuple(refused), tuple(hung))


def at_work(crew: Crew, now: Iterable[WorkerView], stall_s: float) -> list[WorkerView]:
    """Which of the usable workers are at a batch by now, and get on with it."""
    known = {view.id for view in crew.usable}
    return [
        view
        for view in now
        if view.id in known and view.state is WorkerState.BUSY and not _is_hung(view, stall_s)
    ]


def check_workers(case: Case, crew: Crew) -> Check:
    """Whether a worker is there that a build would give batches to."""
    if crew.hung:
        return _hung(case, crew)
    alive = [(view, reason) for view, reason in crew.refused if view.is_alive]
    if crew.usable:
        detail = f"{len(crew.usable)} usable: {len(crew.busy)} busy, {len(crew.idle)} idle"
        if not alive:
            return Check("workers", Status.OK, detail)
        detail += f"; {len(alive)} not: {_sentences(alive)}"
        return Check("workers", Status.WARN, detail, _cure(case, *alive[0]))
    if alive:
        detail = f"none of {len(alive)} can be used: {_sentences(alive)}"
        return Check("workers", Status.FAIL, detail, _cure(case, *alive[0]))
    nobody = f"no worker is registered at {case.address} in namespace {case.keys.namespace}"
    if crew.refused:
        nobody += f"; {_sentences(list(crew.refused))}"
    return Check("workers", Status.FAIL, nobody, case.start)


@dataclasses.dataclass(frozen=True, slots=True)
class Answers:
    """What Celery's own channel says; a worker that is silent there may be busy.

    Attributes:
        nodes: Celery workers that are bound to that channel in this namespace, of whatever app;
            one that was killed stays among them for a while.
        ours: Those that answered and know our task.
        strangers: Those that take from our queues and do not know it.
    """

    nodes: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()


def inspect(case: Case, crew: Crew, broker: redis.Redis) -> Answers:
    """Ask the Celery workers of this namespace for their tasks and their queues."""
    nodes = _nodes(case, broker)
    if not nodes:
        return Answers()
    from toolkit.cluster.app import create_app  # 0.2 s that a look without workers is spared

    app = create_app(case.settings)
    try:
        with mapped_errors(case.address):
            # With a limit it returns as soon as all have answered.
            asked = app.control.inspect(timeout=INSPECT_S, limit=len(nodes))
            tasks = asked.registered() or {}
            asked = app.control.inspect(timeout=INSPECT_S, limit=len(tasks))
            queues = (asked.active_queues() or {}) if tasks else {}
    finally:
        app.close()
    knowing = {node for node, names in tasks.items() if EMBED_TASK in map(_bare, names)}
    wanted = _queues(case, crew)
    taking = {node for node, found in queues.items() if wanted & {q["name"] for q in found}}
    return Answers(nodes, tuple(sorted(knowing)), tuple(sorted(taking - knowing)))


def _nodes(case: Case, broker: redis.Redis) -> tuple[str, ...]:
    """Names of the Celery workers that may answer, read where Celery binds them."""
    pipe = broker.pipeline(transaction=False)
    pipe.smembers(f"{case.keys.prefix}_kombu.binding.{_CHANNEL}")
    (members,) = answers(pipe)
    bound = (shown(member).rpartition("\x16")[2] for member in members or ())
    return tuple(sorted(name.removesuffix(f".{_CHANNEL}") for name in bound))


def check_task(case: Case, crew: Crew, said: Answers) -> Check:
    """Whether those that take from our queues know our task."""
    if said.strangers:
        (first, *_) = said.strangers
        detail = (
            f"{', '.join(said.strangers)} takes batches from our queue and does not know "
            f"{EMBED_TASK}: it was started with another app (-A), and every batch it takes is lost"
        )
        stop = f"celery -A toolkit control shutdown --destination {shlex.quote(first)}"
        status = Status.WARN if crew.usable else Status.FAIL
        return Check("task", status, detail, f"{stop}; {case.start}")
    if said.ours:
        n = f"{len(said.ours)} of {len(said.nodes)}"
        detail = f"{EMBED_TASK} is registered with {n} Celery workers"
        return Check("task", Status.OK, detail)
    if not said.nodes:
        return Check("task", Status.SKIP, "no Celery worker is connected in this namespace")
    silent = f"{', '.join(said.nodes[:_NAMED])} did not answer in {INSPECT_S:g} s"
    if crew.busy:
        silent += "; a busy solo worker never does"
    return Check("task", Status.SKIP, silent)


def _why_not(view: WorkerView, case: Case) -> str | None:
    # While the encoder was never loaded here, a worker is taken at its word.
    claimed = (known for known, name in view.info.encoders.items() if name == case.request.model)
    fingerprint = case.spec.fingerprint if case.spec else next(claimed, "")
    limit_s = case.settings.visibility_timeout_s
    return judge(view, fingerprint, case.request.model, visibility_timeout_s=limit_s)


def _sentences(refused: list[tuple[WorkerView, str]]) -> str:
    """What is wrong with the first few; the cure goes to a place of its own."""
    return "; ".join(reason.partition("; ")[0] for _, reason in refused[:_NAMED])


def _is_hung(view: WorkerView, stall_s: float) -> bool:
    # Its own watch would have ended it by then.
    work = view.work
    return work is not None and view.state is WorkerState.BUSY and work.progress_s > stall_s


def _hung(case: Case, crew: Crew) -> Check:
    sentences = [
        f"{view} hangs in batch {view.work.batch} of run {view.work.run}: no progress for "
        f"{view.work.progress_s:.0f} s (TOOLKIT_STALL_S is {case.settings.stall_s:g})"
        for view in crew.hung[:_NAMED]
        if view.work
    ]
    n_sound = len(crew.usable) - len(crew.hung)
    status = Status.WARN if n_sound else Status.FAIL
    detail = "; ".join([*sentences, *([f"{n_sound} more can be used"] if n_sound else [])])
    return Check("workers", status, detail, case.restart(crew.hung[0]))


def _cure(case: Case, view: WorkerView, reason: str) -> str:
    """The command that mends what is wrong with one worker."""
    info = view.info
    if not view.is_alive:
        return case.start
    if info.protocol != PROTOCOL:
        return f"pip install --upgrade image-index-toolkit; {case.restart(view)}"
    match view.state:
        case WorkerState.REFUSED:
            command = re.search(r"`(toolkit [^`]+)`", reason)
            return command[1] if command else case.restart(view)
        case WorkerState.STARTING:
            return "toolkit doctor --watch"
        case WorkerState.STALE:
            return case.restart(view)
    limit_s = case.settings.visibility_timeout_s
    if info.visibility_timeout_s != limit_s and "visibility" in reason:
        theirs = (info.visibility_timeout_s - 60) / 2
        return f"export CELERY_TASK_TIME_LIMIT={theirs:g}"
    if case.request.model not in info.encoders.values():
        return case.start
    return case.restart(view)


def _queues(case: Case, crew: Crew) -> set[str]:
    """The queues that clients of this encoder, or of any registered one, send to."""
    views = [*crew.usable, *(view for view, _ in crew.refused)]
    known = {queue_name(name) for view in views for name in view.info.encoders}
    return known | ({case.queue} if case.queue else set())


def _bare(task: str) -> str:
    """A task's name without the options that Celery shows behind it."""
    return task.partition(" ")[0]
