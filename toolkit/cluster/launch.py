"""Starting what a cluster of this machine lacks, by one process at a time.

Law: whatever was started is written down before anything else happens, so that it can be found
and ended, and nothing that lives is started twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from toolkit import config
from toolkit.cluster.processes import end, spawn
from toolkit.cluster.protocol import ENCODERS_VARIABLE
from toolkit.cluster.server import find_binary, start_server
from toolkit.cluster.state import (
    ClusterState,
    WorkerRecord,
    read_state,
    state_file,
    write_state,
)
from toolkit.config import Settings
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ClusterError, SettingError
from toolkit.machine import n_gpus, usable_cpus

logger = logging.getLogger(__name__)

#: Seconds for which one waits while another process starts or stops the cluster.
LOCK_TIMEOUT_S = 60.0

#: Most workers that one call may ask for; each holds a model in memory.
MAX_WORKERS = 256

#: Least databases of a server, as usual.
_N_DATABASES = 16


def start(
    n: int, request: EncoderRequest, settings: Settings, *, beside: bool = False
) -> list[WorkerRecord]:
    """Have a server, and workers for an encoder beside it.

    Args:
        n: Workers there shall be; those that live count.
        request: The encoder.
        settings: Of the workers.
        beside: Whether to start ``n`` more instead.

    Returns:
        The workers that were started.

    Raises:
        ClusterError: If no server can be started.
        SettingError: If ``n`` is no number from 0 to 256.
    """
    if not 0 <= n <= MAX_WORKERS:
        raise SettingError("n_workers", n, f"a whole number from 0 to {MAX_WORKERS}")
    find_binary()
    with alone(settings.data_dir):
        state = _without_the_dead(_with_server(settings))
        state = dataclasses.replace(state, n_workers=max(state.n_workers, n))
        write_state(settings.data_dir, state)
        serving = [] if beside else [w for w in state.workers if serves(w, request, settings)]
        added: list[WorkerRecord] = []
        for _ in range(n - len(serving)):
            worker = _start_worker(n, state, request, settings)
            state = dataclasses.replace(state, workers=(*state.workers, worker))
            write_state(settings.data_dir, state)
            added.append(worker)
    return added


def serves(worker: WorkerRecord, request: EncoderRequest, settings: Settings) -> bool:
    """Whether a worker lives, was started for an encoder, and meets clients of these settings."""
    return (
        worker.process.is_alive
        and worker.encoder == request.to_json()
        and worker.place == _place(settings)
    )


def end_workers(workers: list[WorkerRecord], settings: Settings) -> None:
    """End some workers and leave the rest of the cluster as it is."""
    with alone(settings.data_dir):
        end([worker.process for worker in workers])
        state = read_state(settings.data_dir)
        if state is not None:
            write_state(settings.data_dir, _without_the_dead(state))


def _with_server(settings: Settings) -> ClusterState:
    """The cluster with a server that lives."""
    state = read_state(settings.data_dir)
    if state is not None and state.server.process.is_alive:
        return state
    if state is not None:
        logger.warning("the server of the local cluster had ended; starting it anew")
        # They hold the address and the password of the server that is gone.
        end([worker.process for worker in state.workers])
    databases = settings.redis_broker_db, settings.redis_backend_db
    n_databases = max(_N_DATABASES, *(number + 1 for number in databases))
    server = start_server(settings.data_dir, n_databases=n_databases)
    try:
        state = ClusterState(server, n_workers=0)
        write_state(settings.data_dir, state)
    except BaseException:
        end([server.process])  # nobody could find it again
        raise
    return state


def _start_worker(
    n_workers: int, state: ClusterState, request: EncoderRequest, settings: Settings
) -> WorkerRecord:
    taken = {worker.number for worker in state.workers}
    number = next(number for number in range(1, len(taken) + 2) if number not in taken)
    has_threads = settings.sources.get("threads", "default") != "default"
    threads = settings.threads if has_threads else max(1, usable_cpus() // n_workers)
    encoder = request.to_json()
    env = {
        **os.environ,
        **config.as_environment(settings),
        "REDIS_URL": state.server.url,
        "TOOLKIT_THREADS": str(threads),
        # It runs as the same user on the same machine: it may read what the build reads, unless
        # somebody wants it not to.
        "TOOLKIT_WORKER_ROOTS": os.pathsep.join(map(str, settings.worker_roots)) or os.sep,
        ENCODERS_VARIABLE: json.dumps([encoder]),
    }
    process = spawn(
        # -P: a file h2.py beside a notebook must not be taken for a library's module.
        [
            *(sys.executable, "-P", "-m", "toolkit.cli", "worker"),
            *("--devices", _device(number, settings)),
        ],
        log=settings.data_dir / "logs" / f"worker-{number}.log",
        cwd=state_file(settings.data_dir).parent,
        env=env,
    )
    return WorkerRecord(process, number, encoder, _place(settings))


def _device(number: int, settings: Settings) -> str:
    """What a worker runs on: each has a GPU of its own, as far as they go round."""
    if settings.device == "auto" and (n := n_gpus()) > 1:
        return f"cuda:{(number - 1) % n}"
    return settings.device


def _without_the_dead(state: ClusterState) -> ClusterState:
    dead = [worker for worker in state.workers if not worker.process.is_alive]
    # A supervisor that was killed leaves its worker behind.
    end([worker.process for worker in dead])
    alive = tuple(worker for worker in state.workers if worker not in dead)
    return dataclasses.replace(state, workers=alive)


def _place(settings: Settings) -> str:
    """What a worker and its clients must have in common to meet."""
    databases = f"{settings.redis_broker_db}/{settings.redis_backend_db}"
    return f"{settings.namespace} {databases} {settings.visibility_timeout_s:g}"


@contextlib.contextmanager
def alone(data_dir: Path) -> Iterator[None]:
    """Be the only one who starts or stops the cluster of a data folder."""
    folder = state_file(data_dir).parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(folder / "lock", timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise ClusterError(
            f"another process has been starting or stopping the cluster in {folder} for "
            f"{LOCK_TIMEOUT_S:.0f} s; wait for it or end it, then try again"
        ) from None
