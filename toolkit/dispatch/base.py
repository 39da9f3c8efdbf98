"""The contract of a road: what an executor takes, what it gives back, and when it gives up.

Law: an executor never decides the fate of an image. It answers a batch, or says that the
batch was lost and which images had been begun; the dispatcher does the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeAlias

from toolkit.errors import RoadError
from toolkit.records import Batch, Item, Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """A batch was answered.

    Attributes:
        outcome: The answer.
        again: Items it does not answer, because this road could not see them as they were
            sent; it can now.
        elsewhere: Items it does not answer, which this road cannot take at all.
    """

    outcome: Outcome
    again: tuple[Item, ...] = ()
    elsewhere: tuple[Item, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """A batch will not be answered.

    Attributes:
        batch_id: The batch.
        suspects: Ids of the items that were begun and not finished.
        error: What happened to the process that had it.
        is_innocent: Whether no image can have done it: the way there broke, not the process
            that embeds.
    """

    batch_id: int
    suspects: frozenset[int]
    error: RoadError
    is_innocent: bool = False


Event: TypeAlias = Finished | Lost


class Executor(Protocol):
    """One road from batches to outcomes.

    Attributes:
        road: Name in the accounting: ``local`` or ``workers``.
        is_shared: Whether all batches in flight go down with the process that one kills.
    """

    road: str
    is_shared: bool

    @property
    def window(self) -> int:
        """Batches it wants in flight at once; 0 while it can do nothing."""

    @property
    def n_processes(self) -> int:
        """Batches it embeds at once; near the end of a run they should be of one size."""

    @property
    def batch_bytes(self) -> int:
        """File bytes above which a batch is cut."""

    def submit(self, batch: Batch) -> None:
        """Take a batch; it will be answered by :meth:`events`.

        Raises:
            RoadError: If this road cannot take it.
        """

    def events(self, timeout_s: float) -> list[Event]:
        """What happened, waiting up to ``timeout_s`` seconds for the first event.

        Asking again says that the outcomes given before are stored: a road may wait for
        that before it computes more, so that a death repeats one batch at most.
        """

    def close(self) -> None:
        """Stop and leave nothing behind; batches in flight are dropped."""
