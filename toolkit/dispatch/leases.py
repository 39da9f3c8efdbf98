"""What a batch on its way to the workers owes us, and by when. Pure: no server, no clock.

Law: the client owns every deadline. A batch goes out again when its claimer fell silent or
does something else, when nobody claimed it and it is nowhere to be found, or at its limit.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from toolkit.cluster.registry import WorkerState, WorkerView
from toolkit.records import Batch, Failed, Item

#: Seconds beyond the hard limit that a worker has to say that it kept it.
LIMIT_GRACE_S = 15.0


@dataclasses.dataclass(slots=True)
class Lease:
    """One batch in flight.

    Attributes:
        batch: What the dispatcher gave us.
        attempt: Counts from 1 with every sending.
        sent: What of the batch went to the workers in this attempt.
        failed: What could not be read here, where bytes were wanted.
        elsewhere: What is too large to be sent.
        n_bytes: Bytes of pictures that are on the server for it.
        first_sent_at: By our monotonic clock, in its first attempt.
        sent_at: By our monotonic clock, ``None`` while it waits to be sent.
        claimed_by: The worker that has it.
        claimed_at: By our monotonic clock.
        blobs: Ids of the items that went as bytes.
        missed_at: When it was first seen to be in no queue and with no worker.
    """

    batch: Batch
    attempt: int = 0
    sent: tuple[Item, ...] = ()
    failed: tuple[Failed, ...] = ()
    elsewhere: tuple[Item, ...] = ()
    n_bytes: int = 0
    first_sent_at: float = 0.0
    sent_at: float | None = None
    claimed_by: str | None = None
    claimed_at: float = 0.0
    blobs: tuple[int, ...] = ()
    missed_at: float | None = None

    def recall(self) -> None:
        """Let it wait to be sent again."""
        self.sent_at = self.claimed_by = None


class Due(enum.Enum):
    """What has to be done about a lease."""

    NOTHING = enum.auto()
    LOOK = enum.auto()
    SEND_AGAIN = enum.auto()


def due(
    lease: Lease,
    run_id: str,
    workers: Mapping[str, WorkerView],
    now: float,
    *,
    claim_grace_s: float,
    beat_ttl_s: float,
    limit_s: float,
) -> tuple[Due, str]:
    """What has to be done about a lease, and why.

    Args:
        lease: The batch.
        run_id: Whose it is.
        workers: Those alive, by id.
        now: By the clock of the lease's own times.
        claim_grace_s: Seconds within which somebody who is idle claims a batch.
        beat_ttl_s: Seconds after which a worker's word about itself is no longer old news.
        limit_s: Hard limit of a batch.

    Returns:
        ``LOOK`` where only the queue can tell whether the batch is still on its way.
    """
    if lease.sent_at is None:
        return Due.NOTHING, ""
    if lease.claimed_by is None:
        waited = now - lease.sent_at
        return (
            (Due.LOOK, f"nobody claimed it in {waited:.1f} s")
            if waited > claim_grace_s
            else (
                Due.NOTHING,
                "",
            )
        )
    view, had_s = workers.get(lease.claimed_by), now - lease.claimed_at
    if view is None or view.state in (WorkerState.DEAD, WorkerState.STALE):
        # A worker is seen a moment after its first claim.
        if view is None and had_s < claim_grace_s:
            return Due.NOTHING, ""
        return Due.SEND_AGAIN, f"worker {lease.claimed_by} fell silent"
    if had_s > limit_s + LIMIT_GRACE_S:
        return Due.SEND_AGAIN, f"worker {lease.claimed_by} has had it for {had_s:.0f} s"
    work = view.work
    is_at_it = work is not None and (work.run, work.batch) == (run_id, lease.batch.id)
    if had_s > beat_ttl_s and not is_at_it:
        return Due.SEND_AGAIN, f"worker {lease.claimed_by} is at something else: its answer is lost"
    return Due.NOTHING, ""
