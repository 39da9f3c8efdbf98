"""The canary: one real picture through the real queue, and what its fate says of the workers."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.cluster.registry import WorkerView, list_workers
from toolkit.config import Settings
from toolkit.embedding.spec import EncoderSpec, agree
from toolkit.health.case import Case
from toolkit.health.fault import find_fault
from toolkit.health.machine import SAMPLE, Here
from toolkit.health.report import Check, Status
from toolkit.health.trial import ANSWER_S, Answer, Traces, Trial
from toolkit.health.workers import Answers, Crew, at_work
from toolkit.images.decode import IMAGE_SUFFIXES
from toolkit.records import Item

if TYPE_CHECKING:
    import redis

#: Entries of the datasets folder among which a picture is looked for.
_MOST_ENTRIES = 2000

#: Bytes of the largest picture that is taken for a trial.
_MOST_BYTES = 8 << 20

_RUBBISH = b"\x00 this is no picture \xff" * 100

#: Workers that are named one by one in a sentence.
_NAMED = 3

#: Id of the one item that is sent at a time.
_ITEM = 0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """What came of the canary.

    Attributes:
        crew: The workers, as they were when it was sent.
        answer: What came back; ``None`` if it was not sent.
        traces: Where it was when it was given up.
        why_not: Why it was not sent.
        picture: The picture of the datasets folder that was sent after it, if there is one.
        is_seen: Whether a worker read that by its path; ``None`` if nobody said.
    """

    crew: Crew
    answer: Answer | None = None
    traces: Traces = dataclasses.field(default_factory=Traces)
    why_not: str = ""
    picture: Path | None = None
    is_seen: bool | None = None

    @property
    def was_taken(self) -> bool:
        """Whether a worker began it."""
        return bool((self.answer and self.answer.was_begun) or self.traces.claimed_by)


def send_canary(case: Case, crew: Crew, *, deep: bool = True) -> Sent:
    """Send a picture, and then one of the datasets folder, if a worker is idle.

    Args:
        case: What is looked at.
        crew: The workers.
        deep: Whether to send it also while others are busy, behind whose batches it may wait.

    Raises:
        ServerError: If the server cannot be used.
    """
    if not crew.usable:
        return Sent(crew, why_not="no worker can be used")
    if not crew.idle:
        return Sent(crew, why_not=f"none of {len(crew.usable)} workers is idle")
    if crew.busy and not deep:
        return Sent(crew, why_not=f"{len(crew.busy)} of {len(crew.usable)} workers are busy")
    if case.spec is None:
        return Sent(crew, why_not="the encoder was never loaded here: no answer could be believed")
    with Trial(case, case.spec) as trial:
        if not trial.standing.n_usable:
            return Sent(crew, why_not=trial.standing.reason or "no worker can be used")
        answer = trial.send([_item(SAMPLE)])
        sent = Sent(crew, answer, trial.traces())
    picture = _dataset_picture(case.settings)
    if not answer.was_begun or picture is None:
        return sent
    is_seen = _is_seen(case, case.spec, picture)
    return dataclasses.replace(sent, picture=picture, is_seen=is_seen)


def _is_seen(case: Case, spec: EncoderSpec, picture: Path) -> bool | None:
    """Whether a worker reads a file by its path.

    Whose picture it is nobody knows: a look must not have a worker stumble over it. With this
    limit it is refused once its header is read.
    """
    settings = dataclasses.replace(case.settings, max_pixels=1)
    with Trial(dataclasses.replace(case, settings=settings), spec) as trial:
        answer = trial.send([_item(picture)], by_path_alone=True)
    if answer.unseen:
        return False
    return True if answer.was_begun and not answer.lost else None


def check_canary(
    case: Case, sent: Sent, said: Answers, here: Here, backend: redis.Redis
) -> list[Check]:
    """The checks ``consuming``, ``canary`` and ``paths``."""
    answer, crew = sent.answer, sent.crew
    if answer is None:
        names = ("consuming", "canary", "paths")
        return [Check(name, Status.SKIP, sent.why_not) for name in names]
    paths = _paths(case, sent)
    if sent.was_taken:
        taken = Check("consuming", Status.OK, "a worker took what was sent")
        return [taken, _canary(case, crew, answer, sent.traces, here), paths]
    # What was true of the workers before the wait is old news.
    now = list_workers(backend, case.keys, dead=True)
    if why := _busy(case, sent, now):
        return [*(Check(name, Status.SKIP, why) for name in ("consuming", "canary")), paths]
    could = {view.id for view in crew.usable}
    suspects = [view for view in now if view.id in could]
    fault = find_fault(case, suspects, said, sent.traces, answer.seconds)
    return [fault, Check("canary", Status.SKIP, "no worker took it"), paths]


def _busy(case: Case, sent: Sent, now: list[WorkerView]) -> str | None:
    """Why nobody is to blame that the picture was not taken: others come first."""
    n_waiting, n_held = sent.traces.others
    working = at_work(sent.crew, now, case.settings.stall_s)
    if not (n_waiting or n_held or working):
        return None
    return (
        f"busy: {n_waiting} batches of builds wait before the picture, workers hold {n_held}, "
        f"{len(working)} of {len(sent.crew.usable)} workers are at one"
    )


def _canary(case: Case, crew: Crew, answer: Answer, traces: Traces, here: Here) -> Check:
    took_ms = round(answer.seconds * 1000, 1)
    if _ITEM in answer.vectors:
        how = "by its bytes" if _ITEM in answer.unseen else "by its path"
        sent = f"{SAMPLE.name} went to a worker {how} and came back as a vector"
        return _compared(sent, answer.vectors[_ITEM], crew, here, took_ms)
    if _ITEM in answer.failed:
        reason = f"a worker cannot embed {SAMPLE.name}: {answer.failed[_ITEM]}"
        return Check("canary", Status.FAIL, reason, case.restart(crew.usable[0]), took_ms)
    if answer.lost is not None:
        reason = f"{SAMPLE.name} was lost with its worker: {answer.lost.error}"
        return Check("canary", Status.FAIL, reason, case.restart(crew.usable[0]), took_ms)
    slow = f"worker {traces.claimed_by} has been at {SAMPLE.name} for {answer.seconds:.1f} s"
    return Check("canary", Status.WARN, slow, "toolkit doctor --watch", took_ms)


def _compared(
    sent: str, vector: NDArray[np.float32], crew: Crew, here: Here, took_ms: float
) -> Check:
    if here.vector is None:
        detail = f"{sent}; not held against one of this machine"
        return Check("canary", Status.OK, detail, latency_ms=took_ms)
    devices = {here.device, *(view.device.partition(":")[0] for view in crew.usable)}
    difference = float(np.abs(here.vector - vector).max())
    if agree(here.vector[None], vector[None], devices):
        detail = f"{sent} that differs from this machine's by {difference:.1g} a component"
        return Check("canary", Status.OK, detail, latency_ms=took_ms)
    detail = f"{sent} that is off by {difference:.1g} a component from this machine's"
    return Check("canary", Status.FAIL, detail, "pip install -r constraints.txt", took_ms)


def _paths(case: Case, sent: Sent) -> Check:
    crew, folder, picture = sent.crew, case.settings.datasets_dir, sent.picture
    told = ", ".join(
        f"{view.id} {'reads' if _reads(view, folder) else 'gets bytes of'} {folder}"
        for view in crew.usable[:_NAMED]
    )
    if picture is None:
        why = f"no picture under {folder} to try" if sent.was_taken else "no worker took anything"
        return Check("paths", Status.SKIP, f"{why} ({told})")
    if sent.is_seen is None:
        return Check("paths", Status.SKIP, f"no answer about {picture} ({told})")
    if sent.is_seen:
        return Check("paths", Status.OK, f"a worker read {picture} by its path ({told})")
    detail = f"a worker does not see {picture}: pictures travel as bytes ({told})"
    if any(view.host == socket.gethostname() for view in crew.usable):
        # On one machine the bytes are a detour.
        cure = f"TOOLKIT_WORKER_ROOTS={shlex.quote(str(folder))} {case.start}"
        return Check("paths", Status.WARN, detail, cure)
    return Check("paths", Status.OK, detail)


def try_roads(case: Case, spec: EncoderSpec) -> list[dict[str, Any]]:
    """Send rubbish and a real picture, and tell what became of each.

    Returns:
        Of each ``what``, ``id``, ``state``, ``seconds`` and ``detail``.

    Raises:
        ServerError: If the server cannot be used.
    """
    with Trial(case, spec) as trial, tempfile.TemporaryDirectory() as folder:
        if not trial.standing.n_usable:
            reason = trial.standing.reason
            return [sent_row("anything", trial.run_id, "not sent", 0.0, reason or "no worker")]
        rubbish = Path(folder) / "rubbish.jpg"
        rubbish.write_bytes(_RUBBISH)
        task_id, state, took_s = trial.send_rubbish()
        rows = [sent_row("a message that is no batch", task_id, state, took_s, _MEANINGS[state])]
        for what, path in (("rubbish bytes", rubbish), ("a real picture", SAMPLE)):
            number = trial.next_number
            answer = trial.send([_item(path)])
            state, detail = _state(answer)
            rows.append(sent_row(what, f"{trial.run_id}/{number}", state, answer.seconds, detail))
        return rows


_MEANINGS = {
    "refused": "taken off the queue and thrown away",
    "waiting": "nobody took it off the queue; it was removed again",
    "held": "taken off the queue and not finished; it was removed again",
}


def _state(answer: Answer) -> tuple[str, str]:
    if _ITEM in answer.vectors:
        return "done", f"a vector of {len(answer.vectors[_ITEM])} components"
    if _ITEM in answer.failed:
        return "failed", answer.failed[_ITEM]
    reason = answer.lost.error if answer.lost else f"no answer in {ANSWER_S:g} s"
    return "lost", str(reason)


def sent_row(what: str, task_id: str, state: str, took_s: float, detail: str) -> dict[str, Any]:
    """What became of one thing that was sent."""
    return {
        "what": what,
        "id": task_id,
        "state": state,
        "seconds": round(took_s, 2),
        "detail": detail,
    }


def _item(path: Path) -> Item:
    return Item(_ITEM, os.fsencode(path.absolute()), path.stat().st_size)


def _dataset_picture(settings: Settings) -> Path | None:
    """A picture of the datasets folder, if one is found soon."""
    entries = settings.datasets_dir.rglob("*")
    for path in itertools.islice(entries, _MOST_ENTRIES):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            if 0 < path.stat().st_size <= _MOST_BYTES:
                return path
    return None


def _reads(view: WorkerView, folder: Path) -> bool:
    return any(folder.is_relative_to(root) for root in view.info.roots)
