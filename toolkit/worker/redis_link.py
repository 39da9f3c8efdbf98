"""What a worker says to the run whose batch it has: claims and answers, each one atomic.

Law: a batch is worked on only while its run lives, nobody cancelled it and this attempt is
the one that counts; an answer that came too late never reaches the client.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from toolkit.cluster.connection import Address, connect, mapped_errors
from toolkit.cluster.protocol import BLOB_TTL_S, RUN_TTL_S, Keys
from toolkit.dispatch.job import Job
from toolkit.errors import ServerError

logger = logging.getLogger(__name__)

#: Seconds for which a worker tries to hand over what it computed.
ANSWER_PATIENCE_S = 60.0

#: Seconds between two tries.
_RETRY_S = 0.3

_CLAIM = """
local state = redis.call('GET', KEYS[1])
if not state then return 'gone' end
if state == 'cancelled' then return 'cancelled' end
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return 'stale' end
local claim = redis.call('HGET', KEYS[3], ARGV[1])
if claim and string.sub(claim, 1, #ARGV[2] + 1) == ARGV[2] .. '/' then return 'taken' end
redis.call('HSET', KEYS[3], ARGV[1], ARGV[2] .. '/' .. ARGV[3])
redis.call('RPUSH', KEYS[4], ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[5])
redis.call('EXPIRE', KEYS[4], ARGV[5])
return 'ok'
"""

_ANSWER = """
if not redis.call('GET', KEYS[1]) then return 'gone' end
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return 'stale' end
if #ARGV[5] > 0 then redis.call('SET', KEYS[4], ARGV[5], 'EX', ARGV[6]) end
redis.call('RPUSH', KEYS[3], ARGV[3])
redis.call('EXPIRE', KEYS[3], ARGV[4])
return 'ok'
"""


class RedisLink:
    """Speaks to runs on behalf of one worker.

    Args:
        address: The server.
        keys: The namespace.
        worker_id: Who speaks.
    """

    def __init__(self, address: Address, keys: Keys, worker_id: str) -> None:
        self._address, self._keys, self._worker_id = address, keys, worker_id
        self.client: redis.Redis = connect(address, answer_timeout_s=5.0)

    def claim(self, job: Job) -> str:
        """Take a batch.

        Returns:
            ``ok``, or why not: ``gone`` (the run), ``cancelled``, ``stale`` (another attempt
            counts), ``taken`` (another worker has this attempt).

        Raises:
            ServerError: If the server cannot be asked.
        """
        keys, run = self._keys, job.run_id
        names = [keys.run(run), keys.leases(run), keys.claims(run), keys.answers(run)]
        say = self._said(job, "claim", {})
        with mapped_errors(self._address):
            verdict = self.client.eval(
                _CLAIM,
                len(names),
                *names,
                job.batch.id,
                job.attempt,
                self._worker_id,
                say,
                RUN_TTL_S,
            )
        return _text(verdict)

    def answer(self, job: Job, kind: str, what: Mapping[str, Any], blob: bytes = b"") -> str:
        """Hand over an answer; tried again while the server is away.

        Returns:
            ``ok``, or why nobody wants it: ``gone``, ``stale``; ``lost`` when the server
            stayed away for :data:`ANSWER_PATIENCE_S`.
        """
        keys, run = self._keys, job.run_id
        names = [
            *(keys.run(run), keys.leases(run), keys.answers(run)),
            keys.vectors(run, job.batch.id, job.attempt),
        ]
        say = self._said(job, kind, what)
        arguments: list[int | str | bytes] = [
            job.batch.id,
            job.attempt,
            say,
            RUN_TTL_S,
            blob,
            BLOB_TTL_S,
        ]
        deadline = time.monotonic() + ANSWER_PATIENCE_S
        while True:
            try:
                with mapped_errors(self._address):
                    return _text(self.client.eval(_ANSWER, len(names), *names, *arguments))
            except ServerError as error:
                if time.monotonic() > deadline:
                    logger.error("%s: nobody took the answer to %s", error, job.task_id)
                    return "lost"
            time.sleep(_RETRY_S)  # the server is away: nothing can wake us

    def blobs(self, job: Job, item_ids: Sequence[int]) -> dict[int, bytes] | None:
        """The bytes that the client sent along; ``None`` when some of them are gone.

        Raises:
            ServerError: If the server cannot be asked.
        """
        if not item_ids:
            return {}
        names = [self._keys.blob(job.run_id, job.batch.id, item_id) for item_id in item_ids]
        with mapped_errors(self._address):
            found: list[Any] = self.client.mget(names)
        if any(blob is None for blob in found):
            return None
        return dict(zip(item_ids, found, strict=True))

    def _said(self, job: Job, kind: str, what: Mapping[str, Any]) -> str:
        head = {"type": kind, "batch": job.batch.id, "attempt": job.attempt}
        return json.dumps({**head, "worker": self._worker_id, **what})


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
