"""The last hour of the queues, sampled before anybody looks and the same for everyone who does.

Law: a series is kept on the server, where several monitors add to one, and by each monitor for
itself, for the time when there is no server. A server on which no worker was ever registered
is none of ours: nothing is written there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import threading
import time
from collections import deque
from typing import Any

from starlette.concurrency import run_in_threadpool

from toolkit import config
from toolkit.cluster.connection import connect, mapped_errors, resolve_address
from toolkit.cluster.protocol import Keys
from toolkit.cluster.reading import answers, json_value, seconds
from toolkit.cluster.registry import WorkerState
from toolkit.config import Settings
from toolkit.errors import ToolkitError
from toolkit.monitor.snapshot import Snapshot, take
from toolkit.run_record import MOST_COUNT

#: Seconds between two samples.
INTERVAL_S = 5.0

#: Seconds that are shown, and samples that are kept of them.
SPAN_S, KEEP = 3600.0, 720

#: Seconds for which the server keeps a series that nobody adds to.
KEEP_S = 7200

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One moment.

    Attributes:
        at: Seconds since the epoch, by the reader's clock.
        ready: Messages that wait; ``None`` while the server cannot be asked.
        unacked: Messages that workers hold; ``None`` likewise.
        busy: Workers at a batch; ``None`` likewise.
        workers: Workers alive; ``None`` likewise.
        rate: Images per second of all live runs.
    """

    at: float
    ready: int | None
    unacked: int | None
    busy: int | None
    workers: int | None
    rate: float


class History:
    """The series of one monitor; what it has put on the server, others see as well."""

    def __init__(self) -> None:
        self._own: deque[Sample] = deque(maxlen=KEEP)
        self._lock = threading.Lock()

    def sample(self, settings: Settings) -> Sample:
        """Take one sample, and put it on the server unless another monitor just did.

        Raises:
            ToolkitError: If the server fails just then; the sample is kept here.
        """
        snapshot = take(settings, health=False)
        sample = _sample(snapshot)
        with self._lock:
            self._own.append(sample)
        if snapshot.server.ok:
            _share(sample, settings)
        return sample

    def recent(self, settings: Settings) -> list[Sample]:
        """The last hour, the oldest first; what this monitor has seen where there is no server."""
        with self._lock:
            own = list(self._own)
        try:
            shared = _shared(settings)
        except ToolkitError:
            shared = []
        # One of each moment: two monitors sample at different ones.
        moments = {round(sample.at / INTERVAL_S): sample for sample in (*own, *shared)}
        now = time.time()
        recent = (moments[moment] for moment in sorted(moments))
        return [sample for sample in recent if now - SPAN_S <= sample.at <= now + INTERVAL_S]


#: The series of this process.
HISTORY = History()


async def sample_forever(history: History = HISTORY) -> None:
    """Take a sample every :data:`INTERVAL_S` seconds, whatever happens to the server."""
    while True:
        begun = time.monotonic()
        try:
            await run_in_threadpool(lambda: history.sample(config.resolve()))
        except ToolkitError as error:
            logger.info("no sample was put on the server: %s", error)
        except Exception:
            logger.exception("no sample was taken")
        await asyncio.sleep(max(0.5, INTERVAL_S - (time.monotonic() - begun)))


def _sample(snapshot: Snapshot) -> Sample:
    def known(part: str, n: int) -> int | None:
        return n if snapshot.server.ok and part not in snapshot.problems else None

    states = snapshot.n_workers
    return Sample(
        at=snapshot.at,
        ready=known("queues", snapshot.ready),
        unacked=known("queues", snapshot.unacked),
        busy=known("workers", states.get(WorkerState.BUSY, 0)),
        workers=known("workers", sum(states.values()) - states.get(WorkerState.DEAD, 0)),
        rate=round(snapshot.rate, 2),
    )


def _share(sample: Sample, settings: Settings) -> None:
    """Add a sample to the series on the server, by the server's clock."""
    address, keys = resolve_address(settings), Keys(settings.namespace)
    with mapped_errors(address), connect(address) as client:
        if not client.hlen(keys.workers):
            return
        # Shorter than the interval, so that the one who has it gets it again.
        if not client.set(keys.samples_lock, "1", nx=True, px=round(INTERVAL_S * 900)):
            return
        at = seconds(client.time())
        row = [at, *dataclasses.astuple(sample)[1:]]
        pipe = client.pipeline()
        pipe.rpush(keys.samples, json.dumps(row))
        pipe.ltrim(keys.samples, -KEEP, -1)
        pipe.expire(keys.samples, KEEP_S)
        pipe.execute()


def _shared(settings: Settings) -> list[Sample]:
    """The series on the server, by this machine's clock."""
    address, keys = resolve_address(settings), Keys(settings.namespace)
    with mapped_errors(address), connect(address) as client:
        pipe: Any = client.pipeline(transaction=False)
        pipe.time()
        pipe.lrange(keys.samples, -KEEP, -1)
        now, rows = answers(pipe)
    ahead_s = seconds(now) - time.time()
    found = (_understood(text, ahead_s) for text in rows or ())
    return [sample for sample in found if sample is not None]


def _understood(text: bytes, ahead_s: float) -> Sample | None:
    """A sample as somebody wrote it; ``None`` if this release cannot read it."""
    row = json_value(text)
    if not isinstance(row, list) or len(row) != len(dataclasses.fields(Sample)):
        return None
    at, ready, unacked, busy, workers, rate = row
    counts = ready, unacked, busy, workers
    # Numbers beyond that are nobody's, and a chart could not draw them.
    are_sound = (type(n) in (int, float) and abs(n) < MOST_COUNT for n in (at, rate))
    are_counts = (n is None or (type(n) is int and 0 <= n < MOST_COUNT) for n in counts)
    if not (all(are_sound) and all(are_counts)):
        return None
    return Sample(at - ahead_s, ready, unacked, busy, workers, float(rate))
