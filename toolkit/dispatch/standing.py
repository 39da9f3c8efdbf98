"""What the workers are good for now, and whether they are given anything."""

from __future__ import annotations

import dataclasses
import time

#: Seconds for which nothing is sent to workers that took nothing, doubled each time.
_DISTRUST_S = 2.0

#: Doublings of it, at most.
_MOST_DOUBLINGS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """What the workers are good for now.

    Attributes:
        n_usable: Workers that can serve this encoder.
        reason: Why there is none, with the cure.
    """

    n_usable: int = 0
    reason: str | None = "the server was not asked yet"


class Trust:
    """Whether workers that are registered and idle, and took nothing, are given anything.

    Attributes:
        reason: Why they are not.
        needs_proof: Whether they get one batch, to show that they take it.
        last_claim: When a worker last took a batch, by our monotonic clock.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.needs_proof = False
        self.last_claim = 0.0
        self._until, self._n = 0.0, 0

    @property
    def is_withheld(self) -> bool:
        """Whether they get nothing now."""
        return time.monotonic() < self._until

    def withhold(self, reason: str) -> None:
        """Give them nothing for a while, twice as long as the last time."""
        self.reason, self.needs_proof = reason, True
        self._until = time.monotonic() + _DISTRUST_S * 2**self._n
        self._n = min(self._n + 1, _MOST_DOUBLINGS)

    def was_claimed(self) -> None:
        """One of them took a batch, or answered one."""
        self.last_claim = time.monotonic()
        self.needs_proof, self._n = False, 0
