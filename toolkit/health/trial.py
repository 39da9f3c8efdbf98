"""A few pictures sent to the workers exactly as a build sends them, under a run of their own.

Law: the road is the one that builds take, so what works here works there; and it ends with
nothing of its run on the server.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from toolkit.cluster import queues
from toolkit.cluster.connection import connect, connect_broker, mapped_errors
from toolkit.cluster.protocol import EMBED_TASK
from toolkit.dispatch.base import Event, Finished, Lost
from toolkit.records import Batch, Item

if TYPE_CHECKING:
    from toolkit.embedding.spec import EncoderSpec
    from toolkit.health.case import Case

#: Seconds within which workers that are idle must answer.
ANSWER_S = 5.0

#: Seconds for which the workers may take to be seen.
_SETTLE_S = 2.0

_POLL_S = 0.05


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What came back.

    Attributes:
        seconds: From sending to the last answer.
        vectors: Item → float32 of shape ``(dim,)``.
        failed: Item → why it has no vector.
        unseen: Items whose path the worker could not read; they went as bytes after that.
        lost: What was given up, ``None`` if nothing was or nobody has said.
    """

    seconds: float
    vectors: dict[int, NDArray[np.float32]]
    failed: dict[int, str]
    unseen: frozenset[int]
    lost: Lost | None

    @property
    def was_begun(self) -> bool:
        """Whether a worker had it in hand: it answered, or its embedding process died of it."""
        return bool(self.vectors or self.failed or (self.lost and not self.lost.is_innocent))


@dataclasses.dataclass(frozen=True, slots=True)
class Traces:
    """Where what was sent is now.

    Attributes:
        is_waiting: In the queue: nobody took it.
        is_held: Off the queue, and not acknowledged: somebody took it.
        claimed_by: The worker that began it.
        others: Batches of live runs in the same queue: those that wait, those workers hold.
    """

    is_waiting: bool = False
    is_held: bool = False
    claimed_by: str | None = None
    others: tuple[int, int] = (0, 0)


class Trial:
    """A run without an index; a context manager.

    Args:
        case: The server and the settings.
        spec: The encoder.
    """

    def __init__(self, case: Case, spec: EncoderSpec) -> None:
        from toolkit.dispatch.celery import CeleryExecutor  # Celery takes 0.2 s to import

        self._case, self._spec = case, spec
        #: Of every message that is sent.
        self.run_id = f"doctor-{secrets.token_hex(4)}"
        self._executor = CeleryExecutor(self.run_id, spec, case.request.model, case.settings)
        #: Of the next batch.
        self.next_number = 0
        self.standing = self._executor.standing

    def __enter__(self) -> Self:
        self.standing = self._executor.start(_SETTLE_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.close()

    def send(self, items: Sequence[Item], *, by_path_alone: bool = False) -> Answer:
        """Send pictures; those whose path the worker does not see go again as bytes.

        Args:
            items: What is sent, at once.
            by_path_alone: Whether to leave it at their paths.
        """
        begun = time.monotonic()
        vectors: dict[int, NDArray[np.float32]] = {}
        failed: dict[int, str] = {}
        unseen: set[int] = set()
        lost: Lost | None = None
        left = tuple(items)
        while left:
            self._executor.submit(Batch(self._number(), self._spec.fingerprint, left))
            event = self._event(begun + ANSWER_S)
            left = ()
            match event:
                case Lost():
                    lost = event
                case Finished():
                    outcome = event.outcome
                    vectors |= {e.item_id: outcome.vectors[e.row] for e in outcome.embedded}
                    failed |= {f.item_id: f.reason for f in outcome.failed}
                    failed |= {item.id: "no worker takes it" for item in event.elsewhere}
                    unseen |= {item.id for item in event.again}
                    left = () if by_path_alone else event.again
        return Answer(time.monotonic() - begun, vectors, failed, frozenset(unseen), lost)

    def send_rubbish(self) -> tuple[str, str, float]:
        """Send a message that holds no batch.

        Returns:
            Its id; what became of it: ``refused`` (a worker took it and threw it away),
            ``waiting`` or ``held``; and after how many seconds.

        Raises:
            ServerError: If the server cannot be used.
        """
        from toolkit.cluster.app import create_app  # as above

        case, task_id = self._case, f"{self.run_id}/{self._number()}/1"
        app = create_app(case.settings)
        begun = time.monotonic()
        try:
            with mapped_errors(case.address):
                app.send_task(
                    EMBED_TASK,
                    args=["rubbish"],
                    task_id=task_id,
                    queue=case.queue,
                    ignore_result=True,
                    retry=False,
                )
        finally:
            app.close()
        while (found := self.traces()).is_waiting or found.is_held:
            if time.monotonic() - begun > ANSWER_S:
                state = "waiting" if found.is_waiting else "held"
                return task_id, state, time.monotonic() - begun
            time.sleep(_POLL_S)  # Celery tells nobody what it throws away
        return task_id, "refused", time.monotonic() - begun

    def traces(self) -> Traces:
        """Look for what was sent.

        Raises:
            ServerError: If the server cannot be asked.
        """
        address, keys = self._case.address, self._case.keys
        with mapped_errors(address), connect_broker(address) as broker, connect(address) as backend:
            found = list(queues.messages(broker, keys))
            claims = backend.hgetall(keys.claims(self.run_id))
            others = {m.run_id for m in found} - {"", self.run_id}
            live = others - queues.dead_runs(backend, keys, others)
        places = {m.where for m in found if m.run_id == self.run_id}
        theirs = [m.where for m in found if m.run_id in live and m.queue == self._case.queue]
        worker = next(iter(claims.values()), b"").decode().partition("/")[2] or None
        n = theirs.count("ready"), theirs.count("unacked")
        return Traces("ready" in places, "unacked" in places, worker, n)

    def _number(self) -> int:
        self.next_number += 1
        return self.next_number - 1

    def _event(self, deadline: float) -> Event | None:
        while (left_s := deadline - time.monotonic()) > 0:
            for event in self._executor.events(left_s):
                return event
        return None
