"""How pictures travel to a worker: by their path where it sees them, else as bytes.

Law: nobody configures it. A worker that cannot read a path, or finds another content there,
says so, and the picture goes out again as bytes; bytes lie under keys that expire, never in
a message, and no more of them at a time than :data:`MAX_BYTES_IN_FLIGHT`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from toolkit.cluster.registry import WorkInfo
from toolkit.dispatch.base import Finished
from toolkit.dispatch.leases import Lease
from toolkit.errors import ChangedError, UnreadableError
from toolkit.images.decode import read_file
from toolkit.images.golden import format_digests
from toolkit.records import Failed, FailureKind, Item, Outcome

#: File bytes above which a batch that travels as bytes is cut.
BYTES_BATCH = 8 << 20

#: The same for one that travels by path: only the share of work that a death repeats counts.
PATHS_BATCH = 64 << 20

#: Bytes of pictures on the server at once, for one run.
MAX_BYTES_IN_FLIGHT = 24 << 20

#: Share of a batch that a worker could not see above which all that follows goes as bytes.
BLIND_SHARE = 0.5


class Transport:
    """Decides for each item, and learns from what comes back."""

    def __init__(self) -> None:
        self._is_blind = False
        self._by_bytes: set[int] = set()

    @property
    def batch_bytes(self) -> int:
        """File bytes above which a batch is to be cut."""
        return BYTES_BATCH if self._is_blind else PATHS_BATCH

    def n_bytes(self, items: Sequence[Item]) -> int:
        """Bytes of pictures that these items would put on the server, about."""
        return sum(item.size for item in items if self._goes_by_bytes(item) and _fits(item))

    def load(self, lease: Lease) -> dict[int, bytes]:
        """Fill in what of a batch is sent; the bytes of what does not go by path."""
        blobs: dict[int, bytes] = {}
        failed: list[Failed] = []
        elsewhere: list[Item] = []
        for item in lease.batch.items:
            if not self._goes_by_bytes(item):
                continue
            if not _fits(item):
                elsewhere.append(item)
                continue
            try:
                blobs[item.id], _ = read_file(item.path)
            except (UnreadableError, ChangedError) as error:
                kind = (
                    FailureKind.UNREADABLE
                    if isinstance(error, UnreadableError)
                    else (FailureKind.CHANGED)
                )
                failed.append(Failed(item.id, kind, str(error), item.key))
        out = {failure.item_id for failure in failed} | {item.id for item in elsewhere}
        lease.sent = tuple(item for item in lease.batch.items if item.id not in out)
        lease.failed, lease.elsewhere = tuple(failed), tuple(elsewhere)
        lease.blobs = tuple(blobs)
        lease.n_bytes = sum(map(len, blobs.values()))
        return blobs

    def finished(
        self, lease: Lease, outcome: Outcome, unseen: set[int], worker: WorkInfo | None
    ) -> Finished:
        """Part an answer into what is settled, what goes out as bytes, and what goes elsewhere.

        Args:
            lease: The batch, as it was sent.
            outcome: The answer to what the worker looked at.
            unseen: Items it did not look at: their paths are not for it.
            worker: What the worker says of itself.
        """
        by_bytes = set(lease.blobs)
        missing = set(format_digests()) - set(worker.formats) if worker else set()
        blind, foreign = set(unseen), set()
        for failure in outcome.failed:
            is_unseen = failure.kind in (FailureKind.UNREADABLE, FailureKind.CHANGED)
            if is_unseen and failure.item_id not in by_bytes:
                blind.add(failure.item_id)
            elif failure.kind is FailureKind.DECODE and missing:
                foreign.add(failure.item_id)
        self._learn(lease, blind)
        failed = tuple(f for f in outcome.failed if f.item_id not in blind | foreign)
        # A worker's clocks and inodes are not ours.
        embedded = tuple(dataclasses.replace(e, stat=None) for e in outcome.embedded)
        failed = tuple(dataclasses.replace(f, stat=None) for f in failed)
        settled = dataclasses.replace(outcome, embedded=embedded, failed=failed + lease.failed)
        again = tuple(item for item in lease.sent if item.id in blind)
        elsewhere = tuple(item for item in lease.sent if item.id in foreign)
        return Finished(settled, again, elsewhere + lease.elsewhere)

    def _learn(self, lease: Lease, blind: set[int]) -> None:
        self._by_bytes |= blind
        by_path = len(lease.sent) - len(lease.blobs)
        if by_path and len(blind) / by_path > BLIND_SHARE:
            self._is_blind = True

    def _goes_by_bytes(self, item: Item) -> bool:
        return self._is_blind or item.id in self._by_bytes


def _fits(item: Item) -> bool:
    return item.size <= MAX_BYTES_IN_FLIGHT
