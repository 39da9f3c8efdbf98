"""The cluster of this machine: an embedded server, and workers beside it.

Law: one cluster for each data folder, whoever asks and how often. It outlives the process that
started it; only :meth:`LocalCluster.down`, the end of a ``with`` block or ``toolkit cluster
down`` end it, and they end all of it.
"""

from __future__ import annotations

import logging
import time
from html import escape
from types import TracebackType
from typing import Any, Self

from toolkit import config
from toolkit.cluster.connection import (
    Address,
    connect,
    mapped_errors,
    own_address,
    resolve_address,
)
from toolkit.cluster.launch import alone, end_workers, serves, start
from toolkit.cluster.processes import end, marked
from toolkit.cluster.protocol import Keys
from toolkit.cluster.registry import WorkerState, WorkerView, list_workers
from toolkit.cluster.state import WorkerRecord, read_state, state_file
from toolkit.config import Settings
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ClusterError, ServerError

logger = logging.getLogger(__name__)


class LocalCluster:
    """A server and workers on this machine, started here or found running.

    It outlives this process, a kernel's restart and an Interrupt; :meth:`down` ends it. As a
    context manager it ends with the block what began with it: all of the cluster, or, where one
    was running already, the workers that it added.

    Args:
        n_workers: Workers there shall be for the encoder; those that live count.
        model: timm name; ``None`` is the setting ``TOOLKIT_MODEL``.
        settings: Instead of those of this moment.
        **encoder: What else :func:`toolkit.build_index` takes of an encoder: ``pretrained``, ….

    Raises:
        ClusterError: If no server can be started.
        SettingError: If ``n_workers`` is no number from 0 to 256.
    """

    def __init__(
        self,
        n_workers: int = 2,
        *,
        model: str | None = None,
        settings: Settings | None = None,
        **encoder: Any,
    ) -> None:
        self._settings = settings or config.resolve()
        self._request = EncoderRequest(model=model or self._settings.model, **encoder)
        self._was_running = own_address(self._settings) is not None
        self._added = start(n_workers, self._request, self._settings)
        _warn_if_passed_by(self._settings)

    @property
    def address(self) -> Address:
        """Where its server is.

        Raises:
            ClusterError: If it is down.
        """
        address = own_address(self._settings)
        if address is None:
            raise ClusterError("this cluster is down; start it again with `toolkit cluster up`")
        return address

    @property
    def workers(self) -> list[WorkerView]:
        """The workers that have registered with its server.

        Raises:
            ClusterError: If it is down.
            ServerError: If its server does not answer.
        """
        return _registered(self.address, self._settings)

    def add_workers(self, n: int, model: str | None = None, **encoder: Any) -> None:
        """Start more workers, for the cluster's encoder or for another one."""
        request = EncoderRequest(model=model, **encoder) if model else self._request
        self._added += start(n, request, self._settings, beside=True)

    def wait_until_ready(self, timeout_s: float = 120.0) -> Self:
        """Wait until every worker is ready; a build need not, it starts without them.

        Raises:
            ClusterError: If it is down.
            TimeoutError: If one is not ready after ``timeout_s`` seconds; says what it waits for.
        """
        deadline = time.monotonic() + timeout_s
        while waiting := [
            row
            for row in cluster_status(self._settings)["workers"]
            if row["state"] not in (WorkerState.READY, WorkerState.BUSY)
        ]:
            if time.monotonic() > deadline:
                reasons = [f"{view}: {view.reason}" for view in self.workers if view.reason]
                raise TimeoutError(
                    f"{len(waiting)} workers are not ready after {timeout_s:g} s "
                    f"({'; '.join(reasons) or 'they have not registered'}); `toolkit logs "
                    "worker-1` shows what they say"
                )
            time.sleep(0.1)  # the registry is polled: nobody tells us
        return self

    def down(self) -> None:
        """End its workers and its server, whoever started them."""
        cluster_down(self._settings)

    close = down

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._was_running:
            end_workers(self._added, self._settings)
        else:
            self.down()

    def __repr__(self) -> str:
        status = cluster_status(self._settings)
        if status["server"] is None:
            return "LocalCluster(down)"
        return f"LocalCluster({status['server']['address']}, {len(status['workers'])} workers)"

    def _repr_html_(self) -> str:
        rows = [
            "".join(f"<td>{escape(str(value))}</td>" for value in worker.values())
            for worker in cluster_status(self._settings)["workers"]
        ]
        return f"{escape(repr(self))}<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def cluster_up(n_workers: int, request: EncoderRequest, settings: Settings) -> LocalCluster:
    """Start the cluster of this machine, or what it lacks; see :class:`LocalCluster`."""
    return LocalCluster(n_workers, settings=settings, **request.to_json())


def cluster_down(settings: Settings) -> bool:
    """End the workers and the server of this machine's cluster.

    Returns:
        Whether there was one.
    """
    with alone(settings.data_dir):
        state = read_state(settings.data_dir)
        if state is None:
            return False
        # The workers first, so that they can take leave of the server.
        end([worker.process for worker in state.workers])
        end([state.server.process])
        state_file(settings.data_dir).unlink(missing_ok=True)
    return True


def cluster_status(settings: Settings) -> dict[str, Any]:
    """What runs, as ``toolkit cluster status --json`` prints it.

    Returns:
        ``server``: its ``address``, ``pid`` and since when, ``None`` if there is none;
        ``workers``: of each ``id``, ``pid``, ``state``, ``device``, ``encoders``, ``beat_age_s``.
        A worker that has not registered yet has its supervisor's ``pid`` and no ``id``.
    """
    state, address = read_state(settings.data_dir), own_address(settings)
    if state is None or address is None:
        return {"server": None, "workers": []}
    server = {
        "address": str(address),
        "pid": state.server.process.pid,
        "started": state.server.started,
        "error": None,
    }
    views: list[WorkerView] = []
    try:
        views = _registered(address, settings)
    except ServerError as error:
        server["error"] = str(error)
    seen = {view.pid for view in views}
    silent = [
        worker
        for worker in state.workers
        if worker.process.is_alive and seen.isdisjoint(marked([worker.process.mark]))
    ]
    return {"server": server, "workers": [*map(_registered_row, views), *map(_silent_row, silent)]}


def ensure_workers(request: EncoderRequest, settings: Settings) -> bool:
    """Start workers for an encoder if the cluster of this machine is used and has none for it.

    Returns:
        Whether workers of this cluster were started for it, now or before.
    """
    state, own = read_state(settings.data_dir), own_address(settings)
    if state is None or own is None or resolve_address(settings).url != own.url:
        return False
    if not any(serves(worker, request, settings) for worker in state.workers):
        start(state.n_workers, request, settings)
    return state.n_workers > 0


def _registered(address: Address, settings: Settings) -> list[WorkerView]:
    with mapped_errors(address), connect(address) as client:
        return list_workers(client, Keys(settings.namespace))


def _registered_row(view: WorkerView) -> dict[str, Any]:
    return {
        "id": view.id,
        "pid": view.pid,
        "state": str(view.state),
        "device": view.device or None,
        "encoders": sorted(view.info.encoders.values()),
        "beat_age_s": round(view.beat_age_s, 1),
    }


def _silent_row(worker: WorkerRecord) -> dict[str, Any]:
    return {
        "id": None,
        "pid": worker.process.pid,
        "state": "starting",
        "device": None,
        "encoders": [worker.encoder["model"]],
        "beat_age_s": None,
    }


def _warn_if_passed_by(settings: Settings) -> None:
    used, own = resolve_address(settings), own_address(settings)
    if own is not None and used.url != own.url:
        logger.warning(
            "builds use the server at %s, for %s says so, and not this cluster; "
            "take that setting back to use it",
            used,
            used.source,
        )
