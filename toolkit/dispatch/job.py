"""A batch on its way to a worker: what the one argument of the Celery task holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from toolkit.records import Batch


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One attempt at one batch of one run.

    Attributes:
        run_id: Whose batch it is.
        attempt: Counts from 1; only the attempt that its lease names is worked on.
        batch: What to embed.
        blobs: Ids of the items whose bytes are on the server; the others are read by path.
        max_pixels: The limit of whoever asks: it decides what is a failure.
    """

    run_id: str
    attempt: int
    batch: Batch
    blobs: tuple[int, ...]
    max_pixels: int

    @property
    def task_id(self) -> str:
        """Id of the Celery task; by it the queues tell whose message they hold."""
        return f"{self.run_id}/{self.batch.id}/{self.attempt}"

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "run": self.run_id,
            "attempt": self.attempt,
            "batch": self.batch.to_json(),
            "blobs": list(self.blobs),
            "max_pixels": self.max_pixels,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Job:
        """Read back :meth:`to_json`.

        Raises:
            ValueError: If it is not a job.
        """
        try:
            return cls(
                str(value["run"]),
                int(value["attempt"]),
                Batch.from_json(value["batch"]),
                tuple(int(item_id) for item_id in value["blobs"]),
                int(value["max_pixels"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a batch of this protocol: {error!r}") from error
