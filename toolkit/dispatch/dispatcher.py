"""The dispatcher: a window of batches in flight, and what becomes of those that are lost.

Law: only a road error moves or repeats work; a bad image is the image's fault on every road.
An item fails here only after it killed or hung a process *alone*, the last time in this
machine's own.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator

from toolkit.dispatch.base import Event, Executor, Finished, Lost
from toolkit.dispatch.check import check_outcome
from toolkit.dispatch.local import BATCH_BYTES
from toolkit.dispatch.roads import Roads
from toolkit.embedding.spec import EncoderSpec
from toolkit.errors import AnswerError, ExecutorDiedError, RunCancelledError
from toolkit.records import Batch, Failed, FailureKind, Item, Outcome

logger = logging.getLogger(__name__)

#: Images of one batch. A death repeats at most one where a single process embeds.
BATCH_ITEMS = 64

#: Images of the smallest batch that is cut because a run nears its end.
LEAST_ITEMS = 8

#: Seconds between two looks at the cancel flag while nothing happens.
POLL_S = 0.5

#: The same for each of two roads while both have something in flight.
_BOTH_POLL_S = 0.05

#: Losses in a row, with nothing finished between, after which the road itself is to blame:
#: halving a batch of 64 down to one image takes 7.
MAX_LOSSES_IN_A_ROW = 12

#: Why an image fails that no worker can take while only workers may.
_OUT_OF_REACH = (
    "no worker can take it: none reads its path, and it is too large to be sent or of a format "
    "that none decodes; let the workers read its folder (TOOLKIT_WORKER_ROOTS), or build without "
    "requiring workers"
)

#: Told of a loss: the sentence, and how many images are under suspicion.
OnLoss = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    batch: Batch
    executor: Executor
    is_alone: bool


class Dispatcher:
    """Sends items down the roads until each is answered.

    Args:
        roads: Which road to take now.
        spec: The encoder that must answer.
        max_retries: Times an item that was begun when a process died goes out again.
        cancelled: Asked between batches.
        on_loss: Told of every batch that is lost.
    """

    def __init__(
        self,
        roads: Roads,
        spec: EncoderSpec,
        *,
        max_retries: int = 3,
        cancelled: Callable[[], bool] = lambda: False,
        on_loss: OnLoss = lambda reason, n_suspects: None,
    ) -> None:
        self._roads, self._spec = roads, spec
        self._cancelled, self._on_loss = cancelled, on_loss
        #: A suspect is not judged before it was alone once, whatever the setting.
        self._attempts_alone = max(1, max_retries)
        self._ids = itertools.count()
        self._new: Iterator[Item] = iter(())
        self._held: Item | None = None
        self._n_left, self._is_more = 0, True
        self._again: collections.deque[tuple[Item, ...]] = collections.deque()
        self._alone: collections.deque[Item] = collections.deque()
        self._here: collections.deque[tuple[Item, ...]] = collections.deque()
        self._died_alone: collections.Counter[int] = collections.Counter()
        self._in_flight: dict[int, _Sent] = {}
        self._losses = 0

    def run(self, items: Iterator[Item], n_items: int) -> Iterator[tuple[str, Outcome]]:
        """Every outcome and its road; the consumer stores one before it asks for the next.

        Args:
            items: What is to be embedded.
            n_items: How many they are, about.

        Raises:
            RunCancelledError: If ``cancelled`` said so.
            RoadError: If no road can be had, or one loses everything it is given.
        """
        self._new, self._n_left, self._is_more = items, n_items, True
        while self._fill() or self._in_flight:
            for executor, event in self._happened():
                match event:
                    case Finished():
                        yield executor.road, self._finished(executor, event)
                    case Lost():
                        yield from ((executor.road, o) for o in self._lost(executor, event))

    # Out.

    def _fill(self) -> bool:
        """Send until the windows are full; whether anything is left to send."""
        if self._cancelled():
            raise RunCancelledError("the run was cancelled")
        road = self._roads.choose()
        self._fill_suspects(road)
        while road is not None and self._has_room(road):
            items = self._next_again(road) if self._again else self._cut(road)
            if not items:
                break
            self._send(road, items)
        while self._here and (local := self._roads.local()) and self._has_room(local):
            self._send(local, self._here.popleft())
        return bool(self._again or self._alone or self._here or self._is_more)

    def _fill_suspects(self, road: Executor | None) -> None:
        while self._alone:
            item = self._alone[0]
            is_last = self._died_alone[item.id] >= self._attempts_alone - 1
            where = self._roads.local() if is_last and self._roads.may_run_locally else road
            if where is None:
                return
            # A suspect takes whoever is in flight beside it down with it: it waits.
            if not self._has_room(where) or (where.is_shared and self._count(where)):
                return
            self._send(where, (self._alone.popleft(),), is_alone=True)

    def _has_room(self, road: Executor) -> bool:
        if road.is_shared:
            sent = [sent for sent in self._in_flight.values() if sent.executor is road]
            waits = bool(self._alone) and not self._again
            if any(s.is_alone for s in sent) or (sent and waits):
                return False
        return self._count(road) < road.window

    def _count(self, road: Executor) -> int:
        return sum(sent.executor is road for sent in self._in_flight.values())

    def _next_again(self, road: Executor) -> tuple[Item, ...]:
        """What goes out again, cut anew: it may have been cut for the other road."""
        first, *rest = parts(self._again.popleft(), road.batch_bytes)
        self._again.extendleft(reversed(rest))
        return first

    def _cut(self, road: Executor) -> tuple[Item, ...]:
        """The next items, as many as suit the road."""
        most = batch_items(self._n_left, road.n_processes)
        found: list[Item] = []
        n_bytes = 0
        while len(found) < most and (item := self._next()) is not None:
            if found and n_bytes + item.size > road.batch_bytes:
                self._held = item
                break
            found.append(item)
            n_bytes += item.size
        self._n_left -= len(found)
        return tuple(found)

    def _next(self) -> Item | None:
        item, self._held = self._held or next(self._new, None), None
        self._is_more = item is not None
        return item

    def _send(self, executor: Executor, items: tuple[Item, ...], *, is_alone: bool = False) -> None:
        batch = Batch(next(self._ids), self._spec.fingerprint, items)
        self._in_flight[batch.id] = _Sent(batch, executor, is_alone)
        executor.submit(batch)

    # Back.

    def _happened(self) -> list[tuple[Executor, Event]]:
        active = {id(sent.executor): sent.executor for sent in self._in_flight.values()}
        if not active:
            self._roads.wait()
        wait_s = POLL_S if len(active) == 1 else _BOTH_POLL_S
        return [
            (executor, event) for executor in active.values() for event in executor.events(wait_s)
        ]

    def _finished(self, executor: Executor, event: Finished) -> Outcome:
        sent = self._in_flight.pop(event.outcome.batch_id)
        apart = {item.id for item in event.again + event.elsewhere}
        items = tuple(item for item in sent.batch.items if item.id not in apart)
        try:
            check_outcome(event.outcome, items, self._spec)
        except AnswerError as error:
            raise ExecutorDiedError(f"the embedding process cannot be believed: {error}") from error
        self._losses = 0
        if event.again:
            self._again.append(event.again)
        if not self._roads.may_run_locally:
            failed = tuple(
                Failed(i.id, FailureKind.UNREADABLE, _OUT_OF_REACH, i.key) for i in event.elsewhere
            )
            return dataclasses.replace(event.outcome, failed=event.outcome.failed + failed)
        self._here.extend(parts(event.elsewhere, BATCH_BYTES))
        return event.outcome

    def _lost(self, executor: Executor, loss: Lost) -> list[Outcome]:
        sent = self._in_flight.pop(loss.batch_id)
        batch = sent.batch
        if loss.is_innocent:
            self._repeat(sent, loss)
            return []
        self._count_loss(loss)
        self._on_loss(str(loss.error), len(loss.suspects))
        if sent.is_alone:
            return self._alone_again(batch, loss)
        logger.warning(
            "batch %d was lost: %s; %d of its %d images go out alone",
            *(batch.id, loss.error, len(loss.suspects), len(batch.items)),
        )
        self._suspect(batch, loss.suspects)
        return []

    def _count_loss(self, loss: Lost) -> None:
        self._losses += 1
        if self._losses > MAX_LOSSES_IN_A_ROW:
            raise ExecutorDiedError(
                f"the embedding process was lost {self._losses} times in a row without finishing "
                f"a batch ({loss.error}); see its log"
            ) from loss.error

    def _repeat(self, sent: _Sent, loss: Lost) -> None:
        """The road broke, not a process over an image: the same again, on whatever road is open."""
        logger.info("batch %d comes back from its road: %s", sent.batch.id, loss.error)
        self._on_loss(str(loss.error), 0)
        if sent.is_alone:
            self._alone.appendleft(sent.batch.items[0])
            return
        if not self._roads.may_run_locally:
            self._count_loss(loss)
        if sent.executor.window and self._roads.may_run_locally:
            # The workers are there, and this batch never comes back from them.
            self._here.append(sent.batch.items)
        else:
            self._again.append(sent.batch.items)

    def _alone_again(self, batch: Batch, loss: Lost) -> list[Outcome]:
        (item,) = batch.items
        self._died_alone[item.id] += 1
        if self._died_alone[item.id] < self._attempts_alone:
            self._alone.appendleft(item)
            return []
        # A verdict is progress: the road proves itself on its golden pictures at each start.
        self._losses = 0
        return [self._give_up(batch, loss)]

    def _suspect(self, batch: Batch, suspects: frozenset[int]) -> None:
        if not suspects and len(batch.items) == 1:
            suspects = frozenset(item.id for item in batch.items)
        if suspects:
            self._alone.extend(item for item in batch.items if item.id in suspects)
            rest = tuple(item for item in batch.items if item.id not in suspects)
            if rest:
                self._again.append(rest)
        else:
            middle = len(batch.items) // 2
            self._again.extend((batch.items[:middle], batch.items[middle:]))

    def _give_up(self, batch: Batch, loss: Lost) -> Outcome:
        (item,) = batch.items
        reason = (
            f"stops the decoder, alone as well: {loss.error}; "
            "not tried again unless retry_failed is set"
        )
        failed = Failed(item.id, FailureKind.CRASH, reason, item.key)
        return Outcome.empty(batch.id, self._spec.fingerprint, (failed,))


def batch_items(n_left: int, n_processes: int) -> int:
    """Images of the next batch: fewer near the end, so that all processes end together.

    Guided self-scheduling of Polychronopoulos and Kuck (1987), for more than one process.

    Args:
        n_left: Images that are not sent yet.
        n_processes: Batches that are embedded at once.
    """
    if n_processes == 1:
        return BATCH_ITEMS
    return min(BATCH_ITEMS, max(LEAST_ITEMS, math.ceil(n_left / (2 * n_processes))))


def parts(items: tuple[Item, ...], batch_bytes: int) -> list[tuple[Item, ...]]:
    """Items in groups of up to ``batch_bytes`` bytes; one item at least."""
    found: list[list[Item]] = []
    size = 0
    for item in items:
        if not found or size + item.size > batch_bytes:
            found.append([])
            size = 0
        found[-1].append(item)
        size += item.size
    return [tuple(part) for part in found]
