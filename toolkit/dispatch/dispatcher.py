"""The dispatcher: a window of batches in flight, and what becomes of those that are lost.

Law: only a road error moves or repeats work; a bad image is the image's fault on every road.
An item fails here only after it killed or hung a process *alone*.
"""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Iterator

import numpy as np

from toolkit.dispatch.base import Executor, Finished, Lost
from toolkit.errors import ExecutorDiedError, RunCancelledError
from toolkit.records import Batch, Failed, FailureKind, Item, Outcome

logger = logging.getLogger(__name__)

#: Seconds between two looks at the cancel flag while nothing happens.
POLL_S = 0.5

#: Losses in a row, with nothing finished between, after which the road itself is to blame:
#: halving a batch of 64 down to one image takes 7.
MAX_LOSSES_IN_A_ROW = 12

#: Told of a loss: the sentence, and how many images are under suspicion.
OnLoss = Callable[[str, int], None]


class Dispatcher:
    """Sends groups of items down a road until each is answered.

    Args:
        executor: The road.
        fingerprint: The encoder that must answer.
        cancelled: Asked between batches.
        on_loss: Told of every batch that is lost.
    """

    def __init__(
        self,
        executor: Executor,
        fingerprint: str,
        *,
        cancelled: Callable[[], bool] = lambda: False,
        on_loss: OnLoss = lambda reason, n_suspects: None,
    ) -> None:
        self._executor, self._fingerprint = executor, fingerprint
        self._cancelled, self._on_loss = cancelled, on_loss
        self._ids = itertools.count()
        self._again: collections.deque[tuple[Item, ...]] = collections.deque()
        self._alone: collections.deque[Item] = collections.deque()
        self._in_flight: dict[int, Batch] = {}
        self._is_alone = False
        self._losses = 0

    def run(self, groups: Iterator[tuple[Item, ...]]) -> Iterator[Outcome]:
        """Every outcome, as it comes; the consumer stores one before it asks for the next.

        Raises:
            RunCancelledError: If ``cancelled`` said so.
            RoadError: If the road cannot be had, or loses everything it is given.
        """
        more = True
        while more or self._in_flight or self._again or self._alone:
            if self._cancelled():
                raise RunCancelledError("the run was cancelled")
            more = self._fill(groups, more)
            for event in self._executor.events(POLL_S):
                match event:
                    case Finished(outcome):
                        self._check(outcome)
                        self._in_flight.pop(outcome.batch_id, None)
                        self._losses = 0
                        yield outcome
                    case Lost():
                        yield from self._lost(event)

    def _fill(self, groups: Iterator[tuple[Item, ...]], more: bool) -> bool:
        """Send until the window is full; whether the groups may hold more."""
        while len(self._in_flight) < self._executor.window:
            if self._alone and not self._again:
                # A suspect takes whoever is in flight beside it down with it: it waits.
                if not self._in_flight:
                    self._send((self._alone.popleft(),), alone=True)
                return more
            if self._in_flight and self._is_alone:
                return more
            group = self._again.popleft() if self._again else next(groups, None) if more else None
            if group is None:
                return False
            self._send(group, alone=False)
        return more

    def _check(self, outcome: Outcome) -> None:
        if outcome.fingerprint != self._fingerprint:
            raise ExecutorDiedError(
                f"the embedding process answered as another encoder ({outcome.fingerprint[:12]} "
                f"instead of {self._fingerprint[:12]}); build again"
            )

    def _send(self, items: tuple[Item, ...], *, alone: bool) -> None:
        batch = Batch(next(self._ids), self._fingerprint, items)
        self._in_flight[batch.id] = batch
        self._is_alone = alone
        self._executor.submit(batch)

    def _lost(self, loss: Lost) -> Iterator[Outcome]:
        batch = self._in_flight.pop(loss.batch_id)
        was_alone, self._is_alone = self._is_alone, False
        self._losses += 1
        if self._losses > MAX_LOSSES_IN_A_ROW:
            raise ExecutorDiedError(
                f"the embedding process was lost {self._losses} times in a row without finishing "
                f"a batch ({loss.error}); see its log"
            ) from loss.error
        if was_alone:
            # A verdict is progress: the road proves itself on its golden pictures at each start.
            self._losses = 0
            yield self._give_up(batch, loss)
            return
        self._on_loss(str(loss.error), len(loss.suspects))
        logger.warning(
            "batch %d was lost: %s; %d of its %d images go out alone",
            *(batch.id, loss.error, len(loss.suspects), len(batch.items)),
        )
        self._suspect(batch, loss.suspects)

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
        empty = np.empty((0, 0), np.float32)
        return Outcome(batch.id, self._fingerprint, (), (failed,), empty)
