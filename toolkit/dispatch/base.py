"""The contract of a road: what an executor takes, what it gives back, and when it gives up.

Law: an executor never decides the fate of an image. It answers a batch, or says that the
batch was lost and which images had been begun; the dispatcher does the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeAlias

from toolkit.errors import RoadError
from toolkit.records import Batch, Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """A batch was answered."""

    outcome: Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """A batch will not be answered.

    Attributes:
        batch_id: The batch.
        suspects: Ids of the items that were begun and not finished.
        error: What happened to the process that had it.
    """

    batch_id: int
    suspects: frozenset[int]
    error: RoadError


Event: TypeAlias = Finished | Lost


class Executor(Protocol):
    """One road from batches to outcomes.

    Attributes:
        road: Name in the accounting: ``local`` or ``workers``.
        window: Batches it wants in flight at once.
        batch_bytes: File bytes above which a batch is cut.
    """

    road: str
    window: int
    batch_bytes: int

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
