"""A worker's entry in the registry: who it is, said again and again by threads of its own.

Law: each of the two processes of a worker speaks for itself alone, so that one that died or
was stopped falls silent whatever the other does. A server that is away or was emptied costs
nothing: the next beat says everything again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

from toolkit import config
from toolkit.cluster import registry
from toolkit.cluster.connection import Address, connect, mapped_errors, resolve_address
from toolkit.cluster.protocol import Keys
from toolkit.config import Settings
from toolkit.errors import ServerError
from toolkit.worker.embedder import Embedder
from toolkit.worker.redis_link import RedisLink

logger = logging.getLogger(__name__)

#: In the environment of a worker's processes: the name they share.
ID_VARIABLE = "TOOLKIT_WORKER_ID"

#: In the environment of a worker that is started again when it dies: who does that.
SUPERVISOR_VARIABLE = "TOOLKIT_SUPERVISOR_PID"

#: Seconds between two looks at whether the process that started this one lives.
_PARENT_POLL_S = 0.5


@functools.cache
def worker_id() -> str:
    """Name of the worker that this process is part of; made up by the first one that asks."""
    if ID_VARIABLE not in os.environ:
        host = socket.gethostname()
        os.environ[ID_VARIABLE] = f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
    return os.environ[ID_VARIABLE]


@functools.cache
def link() -> RedisLink:
    """This process's line to the runs."""
    settings = config.resolve()
    return RedisLink(resolve_address(settings), Keys(settings.namespace), worker_id())


class Beat:
    """Says something every few seconds until it is stopped, from a thread of its own.

    Args:
        say: One beat; what the server does to it is caught and logged.
        interval_s: Seconds between two beats.
        parent: Process without which this one is to end at once, if there is one.
    """

    def __init__(
        self, say: Callable[[], None], interval_s: float, *, parent: int | None = None
    ) -> None:
        self._say, self._interval_s, self._parent = say, interval_s, parent
        self._wake, self._is_over = threading.Event(), False
        self._is_heard = True
        self._thread = threading.Thread(target=self._main, name="beat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def now(self) -> None:
        """Beat at once, because something changed."""
        self._wake.set()

    def stop(self) -> None:
        """End; the last beat stays until it expires."""
        self._is_over = True
        self._wake.set()
        self._thread.join(timeout=10)

    def _main(self) -> None:
        while not self._is_over:
            self._beat()
            deadline = time.monotonic() + self._interval_s
            while (left := deadline - time.monotonic()) > 0:
                if self._wake.wait(min(left, _PARENT_POLL_S)):
                    self._wake.clear()
                    break
                self._end_with_parent()

    def _beat(self) -> None:
        try:
            self._say()
        except ServerError as error:
            if self._is_heard:
                logger.warning("%s; trying again every %.1f s", error, self._interval_s)
            self._is_heard = False
        else:
            if not self._is_heard:
                logger.warning("the server is back")
            self._is_heard = True

    def _end_with_parent(self) -> None:
        # Whoever started us is gone: nobody would ever stop this process.
        if self._parent is not None and os.name != "nt" and os.getppid() != self._parent:
            os._exit(1)


class WorkBeat:
    """The beats of the process that embeds.

    Args:
        embedder: What it speaks for.
        settings: Server, namespace and intervals.
        parent: See :class:`Beat`.
    """

    def __init__(self, embedder: Embedder, settings: Settings, parent: int | None = None) -> None:
        self._embedder, self._ttl_s = embedder, settings.beat_ttl_s
        self._address: Address = resolve_address(settings)
        self._keys = Keys(settings.namespace)
        self._client = connect(self._address)
        self.beat = Beat(self._say, settings.beat_s, parent=parent)

    def _say(self) -> None:
        name, golden = worker_id(), self._embedder.golden
        info = self._embedder.info()
        with mapped_errors(self._address):
            gone = registry.renew_golden(self._client, self._keys, name, golden, self._ttl_s)
            for fingerprint in gone:
                vectors = golden[fingerprint].golden
                registry.publish_golden(
                    self._client, self._keys, name, fingerprint, vectors, self._ttl_s
                )
            info = dataclasses.replace(info, golden=tuple(golden))
            registry.announce_work(self._client, self._keys, name, info, self._ttl_s)


def withdraw(settings: Settings) -> None:
    """Remove this worker's entry; without a server it expires by itself."""
    address = resolve_address(settings)
    with contextlib.suppress(ServerError), mapped_errors(address), connect(address) as client:
        registry.withdraw(client, Keys(settings.namespace), worker_id())
