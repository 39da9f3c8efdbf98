"""Whether a worker embeds as this machine does: asked before its first batch counts.

Law: vectors of the golden pictures come from the worker's own process that embeds, and are
held against those that settled the encoder here. A worker that was caught with an answer
that cannot be believed gets no second chance from this run.
"""

from __future__ import annotations

import logging

import numpy as np
import redis
from numpy.typing import NDArray

from toolkit.cluster.protocol import Keys
from toolkit.cluster.registry import WorkerView, read_golden
from toolkit.embedding.spec import EncoderSpec, SpecCache, agree
from toolkit.images.golden import format_digests

logger = logging.getLogger(__name__)


class Passport:
    """Remembers which workers are believed.

    Args:
        spec: The encoder.
        specs: Where its golden vectors are.
    """

    def __init__(self, spec: EncoderSpec, specs: SpecCache) -> None:
        self._spec = spec
        self._golden = specs.golden(spec)
        self._verdicts: dict[str, str | None] = {}

    def refuses(self, view: WorkerView, client: redis.Redis, keys: Keys) -> str | None:
        """Why a worker is not believed; ``None`` if it is."""
        if view.id not in self._verdicts:
            work = view.work
            if work is None or self._spec.fingerprint not in work.golden:
                return f"{view} has not shown what it makes of the golden pictures yet"
            vectors = read_golden(client, keys, view.id, self._spec.fingerprint)
            if vectors is None:
                return f"{view} has not shown what it makes of the golden pictures yet"
            verdict = self._look(view, vectors)
            self._verdicts[view.id] = verdict
            if verdict:
                logger.warning("refused: %s", verdict)
        return self._verdicts[view.id]

    def caught(self, worker_id: str, reason: str) -> None:
        """Believe nothing more from a worker."""
        logger.warning("refused: worker %s answered %s", worker_id, reason)
        self._verdicts[worker_id] = f"worker {worker_id} answered {reason}; restart it"

    def is_believed(self, worker_id: str) -> bool:
        """Whether an answer of this worker may be looked at."""
        return self._verdicts.get(worker_id, "not looked at") is None

    def _look(self, view: WorkerView, vectors: NDArray[np.float32]) -> str | None:
        if self._golden is None:
            return f"{view} cannot be held against golden vectors: there are none on this machine"
        devices = {self._golden[1], view.device.partition(":")[0]}
        if not agree(self._golden[0], vectors, devices):
            return (
                f"{view} makes other vectors of the golden pictures than this machine: other "
                "weights, precision or library versions; give both the versions of "
                "constraints.txt and restart it"
            )
        theirs = view.work.formats if view.work else {}
        other = [
            name for name, digest in format_digests().items() if theirs.get(name, digest) != digest
        ]
        if other:
            return (
                f"{view} decodes {', '.join(sorted(other))} to other pixels than this machine; "
                "give both the same versions of pillow and pillow-heif and restart it"
            )
        return None
