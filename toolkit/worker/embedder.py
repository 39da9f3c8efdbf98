"""The embedding process of a worker, and what the registry hears of it.

Law: torch lives in a supervised child, never in a process of Celery: whatever a picture does
to it, this process reports it. So a limit holds in every pool, and no fork meets torch.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Sequence

from toolkit.cluster.registry import WorkerState, WorkInfo
from toolkit.config import Settings
from toolkit.dispatch.base import Event, Finished
from toolkit.dispatch.job import Job
from toolkit.dispatch.local import LocalExecutor
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ExecutorStalledError, ExecutorUnavailableError, ToolkitError
from toolkit.images.golden import format_digests
from toolkit.records import Batch

logger = logging.getLogger(__name__)

#: Seconds before the second try to load what could not be loaded; doubled with each one more.
FIRST_RELOAD_S = 0.5

#: Most seconds between two tries.
MOST_RELOAD_S = 10.0

#: Batches over which the rate is taken.
_RATE_BATCHES = 8

#: Seconds between two looks at the limit while a batch is embedded.
_POLL_S = 0.5


class Embedder:
    """Loads the encoders of a worker and runs its batches, one after the other.

    Args:
        requests: The encoders to serve.
        settings: Those of :class:`~toolkit.dispatch.local.LocalExecutor`, and the limits.
    """

    def __init__(self, requests: Sequence[EncoderRequest], settings: Settings) -> None:
        self._settings = settings
        # A worker stays ready, however long nobody asks.
        self._executors = {
            request: LocalExecutor(request, settings, idle_exit_s=None) for request in requests
        }
        self._by_fingerprint: dict[str, LocalExecutor] = {}
        self._said = WorkInfo(pid=os.getpid(), formats=format_digests())
        self._since = self._stamp = time.monotonic()
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=_RATE_BATCHES)
        self._is_loaded = threading.Event()

    def load(self) -> None:
        """Load every encoder; tries again for ever, and says what is missing meanwhile."""
        for request, executor in self._executors.items():
            wait_s = FIRST_RELOAD_S
            while True:
                try:
                    spec = executor.start()
                    break
                # The second one is the system's: no memory, no process, no place for the log.
                except (ToolkitError, OSError) as error:
                    logger.error("cannot serve %s: %s", request.model, error)
                    self._say(state=WorkerState.REFUSED, reason=str(error))
                    # What is missing may be brought while we live: weights, disk, memory.
                    time.sleep(wait_s)
                    wait_s = min(2 * wait_s, MOST_RELOAD_S)
            self._by_fingerprint[spec.fingerprint] = executor
            self._say(state=WorkerState.STARTING, reason=None, device=executor.device)
        self._say(state=WorkerState.READY, encoders=tuple(self._by_fingerprint))
        self._is_loaded.set()

    def wait_until_loaded(self, timeout_s: float | None = None) -> bool:
        """Whether every encoder is loaded, waiting for it."""
        return self._is_loaded.wait(timeout_s)

    @property
    def golden(self) -> dict[str, LocalExecutor]:
        """What is loaded, by fingerprint; each has its vectors of the golden pictures."""
        return dict(self._by_fingerprint)

    def info(self) -> WorkInfo:
        """What there is to say now."""
        now = time.monotonic()
        busy = self._said.state is WorkerState.BUSY
        return dataclasses.replace(
            self._said,
            busy_s=now - self._since if busy else 0.0,
            progress_s=now - self._stamp if busy else 0.0,
            rate=_rate(self._recent),
        )

    def run(self, job: Job, blobs: dict[int, bytes]) -> Event:
        """Embed a batch, or say how it was lost.

        Raises:
            ExecutorUnavailableError: If no process serves this encoder here.
        """
        executor = self._by_fingerprint.get(job.batch.fingerprint)
        if executor is None:
            raise ExecutorUnavailableError(f"encoder {job.batch.fingerprint[:12]} is not served")
        self._since = self._stamp = time.monotonic()
        self._say(state=WorkerState.BUSY, run=job.run_id, batch=job.batch.id, done=0)
        try:
            event = self._run(executor, job, blobs)
            if isinstance(event, Finished):
                n = len(event.outcome.embedded)
                self._recent.append((n, time.monotonic() - self._since))
                self._say(images=self._said.images + n)
            return event
        finally:
            self._say(state=WorkerState.READY, run="", batch=0, done=0)

    def close(self) -> None:
        """Stop every child."""
        for executor in self._executors.values():
            executor.close()

    def _run(self, executor: LocalExecutor, job: Job, blobs: dict[int, bytes]) -> Event:
        # Loaded before the clock of the batch starts: a child that died is made anew here.
        executor.start()
        executor.submit(job.batch, blobs, max_pixels=job.max_pixels)
        limit_s = self._settings.celery_task_soft_time_limit
        deadline = time.monotonic() + limit_s
        while True:
            events = executor.events(_POLL_S)
            if not events and time.monotonic() > deadline:
                reason = f"not done within CELERY_TASK_SOFT_TIME_LIMIT = {limit_s:g} s"
                lost = executor.give_up(ExecutorStalledError(reason))
                # One that hangs was found long before: the batch as a whole is too much.
                events = [dataclasses.replace(event, suspects=frozenset()) for event in lost]
            self._note(executor, job.batch)
            for event in events:
                return event

    def _note(self, executor: LocalExecutor, batch: Batch) -> None:
        done = executor.n_done
        if done != self._said.done:
            self._stamp = time.monotonic()
            self._say(done=min(done, len(batch.items)))

    def _say(self, **changes: object) -> None:
        self._said = dataclasses.replace(self._said, **changes)  # type: ignore[arg-type]


def _rate(recent: Sequence[tuple[int, float]]) -> float:
    seconds = sum(seconds for _, seconds in recent)
    return sum(n for n, _ in recent) / seconds if seconds else 0.0
