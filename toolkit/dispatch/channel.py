"""What a run writes and reads on the server; every command of the client's end is in here.

Law: each call is one command, or one round trip of them, and either happens or raises
:class:`~toolkit.errors.ServerError`. Nothing is decided here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from toolkit.cluster import queues
from toolkit.cluster.app import create_app
from toolkit.cluster.connection import connect, connect_broker, mapped_errors, resolve_address
from toolkit.cluster.protocol import BLOB_TTL_S, EMBED_TASK, RUN_TTL_S, Keys, queue_name
from toolkit.cluster.registry import WorkerView, list_workers, read_golden
from toolkit.config import Settings
from toolkit.dispatch.job import Job
from toolkit.errors import ServerError

logger = logging.getLogger(__name__)

#: Seconds after which Celery drops a message unread; whoever sent it is gone long before.
EXPIRES_S = 86_400

#: Bytes that are written at once: a line of 2 Mbit/s passes them before the answer is missed.
PIECE_BYTES = 256 << 10


class Channel:
    """One run's part of the server.

    Args:
        run_id: The run.
        fingerprint: Its encoder, which names the queue.
        settings: Server and namespace.
    """

    def __init__(self, run_id: str, fingerprint: str, settings: Settings) -> None:
        self.run_id, self.keys = run_id, Keys(settings.namespace)
        self.address = resolve_address(settings)
        self.client: redis.Redis = connect(self.address)
        self._broker = connect_broker(self.address)
        self._queue = queue_name(fingerprint)
        self._app = create_app(settings)
        self._producer: Any = None
        self._was_used = False
        self._heard_at = 0.0

    def workers(self) -> dict[str, WorkerView]:
        """Those that are registered and alive, by id."""
        with mapped_errors(self.address):
            return {view.id: view for view in list_workers(self.client, self.keys)}

    def golden(self, worker_id: str, fingerprint: str) -> NDArray[np.float32] | None:
        """A worker's vectors of the golden pictures, shape ``(n, dim)``, if it shows any."""
        with mapped_errors(self.address):
            return read_golden(self.client, self.keys, worker_id, fingerprint)

    def keep_alive(self, attempts: Mapping[int, int]) -> tuple[bool, bool]:
        """Say that the run lives and what it has out, also to a server that forgot it.

        Args:
            attempts: The attempt that counts, by batch.

        Returns:
            Whether somebody asked the run to stop; whether the server had known the run.
        """
        keys, run = self.keys, self.run_id
        pipe = self.client.pipeline()
        pipe.get(keys.cancel(run))
        pipe.set(keys.run(run), "running", ex=RUN_TTL_S, get=True)
        if attempts:
            known: dict[Any, Any] = dict(attempts)
            pipe.hset(keys.leases(run), mapping=known)
        for name in (keys.leases(run), keys.claims(run), keys.answers(run)):
            pipe.expire(name, RUN_TTL_S)
        with mapped_errors(self.address):
            cancelled, before, *_ = pipe.execute()
            if not self._was_used:
                self._sweep()
        return cancelled is not None, before is not None

    def send(self, job: Job, blobs: Mapping[int, bytes]) -> None:
        """Lease an attempt at a batch, put its pictures down, and publish it."""
        keys, run, number = self.keys, job.run_id, job.batch.id
        pipe = self.client.pipeline()
        pipe.set(keys.run(run), "running", ex=RUN_TTL_S)
        pipe.hset(keys.leases(run), str(number), job.attempt)
        pipe.expire(keys.leases(run), RUN_TTL_S)
        with mapped_errors(self.address):
            for item_id, blob in blobs.items():
                self._put(keys.blob(run, number, item_id), blob)
            pipe.execute()
            self._publish(job)

    def listen(self, timeout_s: float) -> dict[str, Any] | None:
        """The next thing that a worker says, waiting for it; ``None`` if none says anything."""
        with mapped_errors(self.address):
            found = self.client.blpop([self.keys.answers(self.run_id)], timeout=timeout_s)
        if found is None:
            return None
        try:
            said = json.loads(found[1])
        except ValueError:
            said = None
        if not isinstance(said, dict):
            logger.warning("something on the answers of run %s is none", self.run_id)
            return None
        return said

    def vectors(self, batch_id: int, attempt: int) -> bytes:
        """The vectors of an answer, which are gone then; empty if they were gone before."""
        name = self.keys.vectors(self.run_id, batch_id, attempt)
        pipe = self.client.pipeline()
        pipe.get(name)
        pipe.delete(name)
        with mapped_errors(self.address):
            return bytes(pipe.execute()[0] or b"")

    def drop(self, batch_id: int, item_ids: tuple[int, ...]) -> None:
        """Forget a batch, so that no attempt at it counts any more, and its pictures."""
        keys, run = self.keys, self.run_id
        pipe = self.client.pipeline()
        pipe.hdel(keys.leases(run), str(batch_id))
        pipe.hdel(keys.claims(run), str(batch_id))
        for item_id in item_ids:
            pipe.unlink(keys.blob(run, batch_id, item_id))
        with mapped_errors(self.address):
            pipe.execute()

    def is_waiting(self, batch_id: int, attempt: int) -> bool:
        """Whether a batch waits in its queue, so that no worker has taken it."""
        task_id = f"{self.run_id}/{batch_id}/{attempt}"
        with mapped_errors(self.address):
            return queues.is_waiting(self._broker, self.keys, self._queue, task_id)

    def reset(self) -> None:
        """After an error: publish over a new connection."""
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(Exception):  # whatever a dead connection says at its end
                producer.connection.close()

    def withdraw(self) -> None:
        """Remove what the run has on the server, as far as that answers; the rest expires."""
        if self._was_used:
            with contextlib.suppress(ServerError), mapped_errors(self.address):
                queues.purge_run_keys(self.client, self.keys, self.run_id)
                queues.remove_run(self._broker, self.keys, self.run_id)

    def close(self) -> None:
        """Close every connection."""
        self.reset()
        self._app.close()
        self.client.close()
        self._broker.close()

    def _put(self, name: str, blob: bytes) -> None:
        """Put a picture down in pieces, each of which a slow line passes in time."""
        first, *rest = (blob[n : n + PIECE_BYTES] for n in range(0, len(blob) or 1, PIECE_BYTES))
        self.client.set(name, first, ex=BLOB_TTL_S)
        for piece in rest:
            self.client.append(name, piece)
        # Many pictures over a slow line take longer than a run lives unheard.
        if time.monotonic() - self._heard_at > RUN_TTL_S / 10:
            self.client.set(self.keys.run(self.run_id), "running", ex=RUN_TTL_S)
            self._heard_at = time.monotonic()

    def _sweep(self) -> None:
        """Remove what runs left whose client is gone."""
        self._was_used = True
        for dead, n in queues.purge_dead(self._broker, self.client, self.keys).items():
            logger.info("removed %d messages of run %s, whose client is gone", n, dead)

    def _publish(self, job: Job) -> None:
        if self._producer is None:
            connection = self._app.connection_for_write()
            self._producer = self._app.amqp.Producer(connection, auto_declare=False)
        self._app.send_task(
            EMBED_TASK,
            args=[job.to_json()],
            task_id=job.task_id,
            queue=self._queue,
            producer=self._producer,
            ignore_result=True,
            retry=False,
            # So late that no two clocks differ by as much: it says when the message was sent.
            expires=EXPIRES_S,
        )
