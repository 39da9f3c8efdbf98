"""The step of a Celery worker that registers it, and lets it consume when it is able to.

A bootstep, so that a plain ``celery -A toolkit worker`` has it as well.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from importlib import metadata
from typing import Any, NoReturn

import click
from celery import bootsteps, signals
from celery.worker.state import maybe_shutdown

from toolkit import config
from toolkit.cluster import registry
from toolkit.cluster.connection import connect, mapped_errors, resolve_address
from toolkit.cluster.protocol import IDLE_QUEUE, PROTOCOL, Keys, queue_name
from toolkit.config import Settings
from toolkit.errors import ServerError
from toolkit.worker import process
from toolkit.worker.presence import SUPERVISOR_VARIABLE, Beat, withdraw, worker_id

logger = logging.getLogger(__name__)

#: Exit code of a worker that was asked for what cannot be.
EXIT_USAGE = 2

#: Seconds without the ready line after which a worker says what it waits for.
SAY_WHY_S = 20.0

_POLL_S = 0.1

_LOADING = "its models to be loaded"

#: Pools in which a task blocks the whole process, or never blocks at all.
_POOLS = ("prefork", "solo", "threads")


class Presence(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Registers the worker, and holds its consumer back until its models are loaded."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        self._settings = config.resolve()
        self._keys = Keys(self._settings.namespace)
        self._address = resolve_address(self._settings)
        self._client = connect(self._address)
        self._started = time.monotonic()
        self._reason: str | None = _LOADING
        self._queues: tuple[str, ...] = ()
        self._encoders: dict[str, str] = {}
        self._pool = ""
        super().__init__(worker, **options)

    def create(self, worker: Any) -> None:
        """Look at what was asked for; refuse what cannot work."""
        self._pool = _pool_name(worker)
        _refuse(worker, self._pool)
        if self._pool == "solo":
            # It sleeps that long inside of a signal's handler, where the batch cannot go on.
            worker.app.conf.worker_soft_shutdown_timeout = 0.0
        # Made up before the pool's process starts, which takes it over.
        worker_id()
        supervisor = os.environ.get(SUPERVISOR_VARIABLE)
        self._beat = Beat(
            self._say, self._settings.beat_s, parent=int(supervisor) if supervisor else None
        )

    def start(self, worker: Any) -> None:
        """Register; wait for the models; consume."""
        self._beat.start()
        if self._pool != "prefork":
            process.start(self._settings, parent=None)
        work = self._wait_until_ready(worker.pool)
        self._encoders = dict(zip(work.encoders, _models(), strict=False))
        self._reason = "its connection to consume"
        queues = _consume(worker.app, work.encoders)

        def consumes(**_: Any) -> None:
            self._queues, self._reason = queues, None
            self._beat.now()
            click.echo(_ready_line(self._settings, queues, self._encoders, work), err=True)

        # Not weakly: nothing else holds it.
        signals.worker_ready.connect(consumes, weak=False)

    def stop(self, worker: Any) -> None:
        """Take no new batch; the one in hand is still finished, by the pool, after this."""
        self._queues = ()
        self._reason = "nothing: it was asked to stop"
        self._beat.now()
        # Held weakly by the signal, and by the blueprint for as long as this process lives.
        signals.worker_shutdown.connect(self._leave)

    terminate = stop

    def _leave(self, **_: Any) -> None:
        """Leave the registry: the pool has ended."""
        self._beat.stop()
        if self._pool != "prefork":
            process.stop()
        withdraw(self._settings)

    def _wait_until_ready(self, pool: Any) -> registry.WorkInfo:
        said = False
        while True:
            maybe_shutdown()
            _replace_if_dead(pool)
            work = self._work()
            if work is not None and work.encoders:
                return work
            waited_s = time.monotonic() - self._started
            if waited_s > SAY_WHY_S and not said:
                said = True
                logger.warning("not ready after %.0f s, waiting for %s", waited_s, self._why(work))
            time.sleep(_POLL_S)  # the pool's process has no way to wake this one

    def _work(self) -> registry.WorkInfo | None:
        """What the process that embeds says; through the server in a pool of processes."""
        if self._pool != "prefork":
            return process.embedder().info()
        try:
            with mapped_errors(self._address):
                views = registry.list_workers(self._client, self._keys)
            work = next((view.work for view in views if view.id == worker_id()), None)
            self._reason = _LOADING
            return work
        except ServerError as error:
            self._reason = str(error)
            return None

    def _why(self, work: registry.WorkInfo | None) -> str:
        return (work and work.reason) or self._reason or _LOADING

    def _say(self) -> None:
        with mapped_errors(self._address):
            registry.announce(self._client, self._keys, self._info())

    def _info(self) -> registry.WorkerInfo:
        settings = self._settings
        return registry.WorkerInfo(
            id=worker_id(),
            pid=os.getpid(),
            host=socket.gethostname(),
            version=metadata.version("image-index-toolkit"),
            protocol=PROTOCOL,
            pool=self._pool,
            queues=self._queues,
            encoders=self._encoders,
            visibility_timeout_s=settings.visibility_timeout_s,
            supervised=SUPERVISOR_VARIABLE in os.environ,
            roots=tuple(str(root) for root in settings.worker_roots or (settings.datasets_dir,)),
            beat_s=settings.beat_s,
            ttl_s=settings.beat_ttl_s,
            started_s=time.monotonic() - self._started,
            reason=self._reason,
        )


def _replace_if_dead(pool: Any) -> None:
    """Make a pool anew whose process died while it started.

    Celery sees to that in its event loop, which begins once the worker is ready: it would never be.
    """
    if not pool.did_start_ok():
        pool.terminate()
        pool.start()


def _pool_name(worker: Any) -> str:
    pool = worker.pool_cls
    # "celery.concurrency.solo:TaskPool", or the class itself.
    module = pool.partition(":")[0] if isinstance(pool, str) else pool.__module__
    name = str(module).rpartition(".")[2]
    return "threads" if name == "thread" else name


def _refuse(worker: Any, pool: str) -> None:
    if pool not in _POOLS:
        _end(f"--pool={pool} cannot be watched; use --pool=prefork or --pool=solo")
    if pool == "prefork" and worker.pool_start_method == "fork" and "torch" in sys.modules:
        _end(
            "torch is loaded in this process, and a fork of it would hang for ever; use "
            "worker_pool_start_method=spawn, which is the default here, or --pool=solo"
        )
    if worker.concurrency != 1:
        _end(
            f"--concurrency={worker.concurrency} would load the models that many times; start "
            "more workers instead, and share the processors with TOOLKIT_THREADS"
        )


def _end(sentence: str) -> NoReturn:
    """What was asked for cannot be: a supervisor does not try it again."""
    click.echo(f"error: {sentence}", err=True)
    raise SystemExit(EXIT_USAGE)


def _models() -> list[str]:
    return [request.model for request in process.served()]


def _consume(app: Any, fingerprints: tuple[str, ...]) -> tuple[str, ...]:
    """Take the queues of these encoders, unless the command line named others."""
    queues = app.amqp.queues
    if set(queues.consume_from) == {IDLE_QUEUE}:
        queues.select([queue_name(fingerprint) for fingerprint in fingerprints])
    return tuple(queues.consume_from)


def _ready_line(
    settings: Settings,
    queues: tuple[str, ...],
    encoders: dict[str, str],
    work: registry.WorkInfo,
) -> str:
    roots = ", ".join(str(root) for root in settings.worker_roots or (settings.datasets_dir,))
    supervised = (
        ""
        if SUPERVISOR_VARIABLE in os.environ
        else ("; no supervisor restarts it (`toolkit worker` would)")
    )
    return (
        f"toolkit worker {worker_id()} ready: queue {', '.join(queues)}, device {work.device}, "
        f"model {', '.join(encoders.values())}; reads pictures under {roots}, takes all others "
        f"as bytes{supervised}"
    )
