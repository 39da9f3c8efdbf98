"""What is tried, one thing after the other; each rests on those before it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.cluster.connection import connect, connect_broker, mapped_errors, resolve_address
from toolkit.cluster.mirror import forget_run
from toolkit.cluster.protocol import Keys
from toolkit.cluster.registry import WorkerState, WorkerView, list_workers
from toolkit.cluster.state import read_state
from toolkit.config import Settings
from toolkit.dispatch.base import Finished, Lost
from toolkit.dispatch.celery import CeleryExecutor
from toolkit.dispatch.local import warm_executor
from toolkit.dispatch.roads import SETTLE_S
from toolkit.embedding.spec import EncoderRequest, EncoderSpec, agree
from toolkit.errors import ModelError, ServerError, ToolkitError
from toolkit.health import Status, check_health
from toolkit.images.datasets import Source
from toolkit.journal import RunJournal, new_run_id
from toolkit.pipeline import run_build
from toolkit.places import runs_dir
from toolkit.query import embed_bytes
from toolkit.records import Batch, Item
from toolkit.request import BuildRequest
from toolkit.run_record import RunRecord
from toolkit.samples import PHOTOS
from toolkit.search import Index
from toolkit.verify.bench import Bench
from toolkit.verify.door import DoorError, open_door
from toolkit.verify.report import Step

#: Pictures of which an index is built, the first by path.
N_PICTURES = 24

#: Seconds for which a worker may take over one picture; it may have a batch in hand.
ANSWER_S = 60.0

#: The picture that goes through a worker by itself, below the sample photos.
_SAMPLE = "monuments/colosseum.webp"

#: Name of the index that is built, in folders where there is no other.
_INDEX = "verify"

#: What a user sees of a row.
_COLUMNS = ["key", "dataset", "path", "paths", "label", "width", "height"]


class _FailError(Exception):
    """Ends a step: what was tried does not work."""


class _SkipError(Exception):
    """Ends a step: it cannot be tried, after what came before."""


class Trials:
    """Tries a set-up.

    Args:
        settings: Of the user.
        sources: What to build from.
        bench: Where to build.
    """

    def __init__(self, settings: Settings, sources: tuple[Source, ...], bench: Bench) -> None:
        self._settings, self._sources, self._bench = settings, sources, bench
        self._address = resolve_address(settings)
        # A data folder of its own has no cluster of its own: the address goes with it.
        pinned = dataclasses.replace(settings, redis_url=self._address.url)
        self._here = dataclasses.replace(pinned, data_dir=bench.local)
        self._there = dataclasses.replace(pinned, data_dir=bench.workers)
        self._is_up = False
        self._views: list[WorkerView] = []
        self._request = EncoderRequest(settings.model)
        self._spec: EncoderSpec | None = None
        self._local: RunRecord | None = None

    def run(self) -> Iterator[Step]:
        """Try one thing after the other."""
        yield _step("Redis", self._reach_server)
        yield _step("workers", self._meet_workers)
        yield _step("weights", self._match_encoder)
        yield _step("availability", self._ask_health)
        yield _step("one embedding", self._embed_one)
        yield _step("fallback build", self._fall_back)
        yield _step("distributed build", self._build_on_workers)
        yield _step("HTTP", self._ask_http)

    def _reach_server(self) -> str:
        address = self._address
        with mapped_errors(address), connect_broker(address) as broker:
            broker.ping()
        with mapped_errors(address), connect(address) as backend:
            info: Any = backend.info("server")
            started = time.perf_counter()
            backend.ping()
            latency_ms = 1000 * (time.perf_counter() - started)
        self._is_up = True
        name = info.get("server_name", "redis")
        return (
            f"{address} from {address.source}: {name} {info.get(f'{name}_version')} answers in "
            f"{latency_ms:.1f} ms, databases {address.broker_db} and {address.backend_db}"
        )

    def _meet_workers(self) -> str:
        if not self._is_up:
            raise _SkipError("there is no server to ask")
        found = self._registered()
        deadline = time.monotonic() + self._settings.require_wait_s
        while found and all(view.state is WorkerState.STARTING for view in found):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)  # a registry is polled: no worker can wake us
            found = self._registered()
        self._views = [v for v in found if v.state in (WorkerState.READY, WorkerState.BUSY)]
        if not found:
            raise _FailError(
                f"no worker is registered at {self._address}; start some with `toolkit cluster up` "
                "on this machine, or `toolkit worker` on any other"
            )
        told = "; ".join(map(_told, found))
        if not self._views:
            raise _FailError(f"none of {len(found)} can work: {told}")
        return told

    def _registered(self) -> list[WorkerView]:
        with mapped_errors(self._address), connect(self._address) as client:
            return list_workers(client, Keys(self._settings.namespace))

    def _match_encoder(self) -> str:
        """Find what this machine has to ask for to get an encoder that the workers serve."""
        if not self._views:
            raise _SkipError("there is no worker to ask")
        served = {name: model for v in self._views for name, model in v.info.encoders.items()}
        why = "this machine makes another encoder of that model"
        for fingerprint in sorted(served, key=lambda name: served[name] != self._settings.model):
            for request in self._candidates(served[fingerprint]):
                try:
                    with warm_executor(request, self._here) as executor:
                        spec = executor.start()
                except ModelError as error:
                    why = str(error)
                    continue
                if spec.fingerprint == fingerprint:
                    self._request, self._spec = request, spec
                    return f"{spec.describe()}: encoder {fingerprint[:12]} here and there"
        raise _FailError(
            f"the workers serve {', '.join(served.values())} with other weights than this machine "
            f"has: {why}; give both the same weights and the same release"
        )

    def _candidates(self, model: str) -> list[EncoderRequest]:
        """What a worker may have been started with; it says no more than the model's name."""
        state = read_state(self._settings.data_dir)
        started = [EncoderRequest.from_json(w.encoder) for w in (state.workers if state else ())]
        plain = [EncoderRequest(model), EncoderRequest(model, pretrained=False)]
        return [*(request for request in started if request.model == model), *plain]

    def _ask_health(self) -> str:
        if not self._is_up:
            raise _SkipError("there is no server to ask")
        # In the folder in which the model was loaded just now.
        report = check_health(settings=self._here, **self._request.to_json())
        said = [f"{report.verdict} for {self._request.model}"]
        for check in report.checks:
            if check.status in (Status.WARN, Status.FAIL):
                said.append(f"{check.name}: {check.detail}" + f" → {check.cure}" * bool(check.cure))
        if report.verdict != "distributed":
            raise _FailError("; ".join(said))
        return "; ".join(said)

    def _embed_one(self) -> str:
        spec, data = self._needs_encoder(), (PHOTOS / _SAMPLE).read_bytes()
        road = CeleryExecutor(new_run_id(), spec, self._request.model, self._here)
        started = time.perf_counter()
        try:
            theirs, how = _through_a_worker(road, spec, len(data))
            took_s, devices = time.perf_counter() - started, road.devices
        finally:
            road.close()
        ours, _ = embed_bytes([data], self._request, self._here)
        return f"{_SAMPLE} {how} in {took_s:.2f} s; {_compared(ours, theirs, devices)}"

    def _fall_back(self) -> str:
        url = f"redis://127.0.0.1:{_closed_port()}"
        away = dataclasses.replace(self._here, redis_url=url, distributed_available=True)
        record = self._build(away)
        self._local = record
        if record.batches["workers"] or not record.fallback_reason:
            raise _FailError(f"it did not fall back, or gave no reason: {record.summary()}")
        return f"{_books(record)} locally; reason on record: {record.fallback_reason}"

    def _build_on_workers(self) -> str:
        self._needs_encoder()
        if self._local is None:
            raise _SkipError("there is no local build to hold it against")
        record = self._build(self._there)
        n_workers, n_local = record.batches["workers"], record.batches["local"]
        said = f"{_books(record)}; {n_workers} batches on workers, {n_local} locally"
        if n_local or not n_workers:
            raise _FailError(f"{said}: {record.fallback_reason}")
        return f"{said}; {self._compared_builds(record.device)}"

    def _compared_builds(self, devices: str) -> str:
        with Index.open(_INDEX, self._here) as ours, Index.open(_INDEX, self._there) as theirs:
            if not ours.to_pandas()[_COLUMNS].equals(theirs.to_pandas()[_COLUMNS]):
                raise _FailError("the table is not that of the local build; please report this")
            return _compared(np.array(ours.vectors), np.array(theirs.vectors), devices)

    def _build(self, settings: Settings) -> RunRecord:
        request = BuildRequest(self._sources, _INDEX, self._request, limit=N_PICTURES)
        record = RunRecord(new_run_id(), _INDEX)
        journal = RunJournal(runs_dir(settings.data_dir), record, request.to_json())
        run_build(request, settings, journal)
        return record

    def _ask_http(self) -> str:
        if importlib.util.find_spec("streamlit") is None:
            raise _SkipError(
                "the monitor is not installed; install it: pip install "
                "'image-index-toolkit[monitor]'"
            )
        there = dataclasses.replace(self._here, datasets_dir=self._bench.datasets)
        order = {
            "dataset_names": [self._bench.dataset.name],
            "model": self._request.model,
            "pretrained": self._request.pretrained,
        }
        started = time.perf_counter()
        try:
            with open_door(there, _closed_port(), self._bench.top / "monitor.log") as door:
                opened_s = time.perf_counter() - started
                run = door.build(order)
        except DoorError as error:
            raise _FailError(str(error)) from error
        with (
            contextlib.suppress(ServerError),  # nothing was mirrored there
            mapped_errors(self._address),
            connect(self._address) as client,
        ):
            # It is no build of the user's.
            forget_run(client, Keys(self._settings.namespace), run["run_id"])
        n_workers, reason = run["batches"]["workers"], run["fallback_reason"]
        said = (
            f"the monitor answered after {opened_s:.1f} s; POST /api/build_index: run "
            f"{run['run_id']} {run['state']}, {run['indexed']} indexed; batches: {n_workers} by "
            f"workers, {run['batches']['local']} local"
        )
        if run["state"] != "done" or not (n_workers or reason):
            raise _FailError(f"{said}: {run['error'] or 'it gives no reason'}")
        return f"{said}; reason on record: {reason}" if reason else said

    def _needs_encoder(self) -> EncoderSpec:
        if self._spec is None:
            raise _SkipError("there is no worker whose encoder this machine has")
        return self._spec


def _step(name: str, trial: Callable[[], str]) -> Step:
    started = time.perf_counter()
    try:
        status, detail = "ok", trial()
    except _SkipError as reason:
        status, detail = "skip", str(reason)
    except (_FailError, ToolkitError) as error:
        status, detail = "fail", str(error)
    return Step(name, status, round(time.perf_counter() - started, 2), detail)


def _through_a_worker(
    road: CeleryExecutor, spec: EncoderSpec, n_bytes: int
) -> tuple[NDArray[np.float32], str]:
    """A worker's vector of the sample, shape ``(1, dim)``, and how the picture went there."""
    standing = road.start(SETTLE_S)
    if not standing.n_usable:
        raise _FailError(f"no worker would be used: {standing.reason}")
    items, how = (Item(0, os.fsencode(PHOTOS / _SAMPLE), n_bytes),), "by its path"
    road.submit(Batch(0, spec.fingerprint, items))
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        for event in road.events(0.5):
            if isinstance(event, Lost):
                raise event.error
            if isinstance(event, Finished) and event.again:
                how = "as bytes, for the worker does not see its path,"
                road.submit(Batch(1, spec.fingerprint, event.again))
            elif event.outcome.failed:
                raise _FailError(f"a worker cannot embed it: {event.outcome.failed[0].reason}")
            else:
                return event.outcome.vectors, how
    raise _FailError(f"no answer in {ANSWER_S:.0f} s; `toolkit doctor` says who is at fault")


def _told(view: WorkerView) -> str:
    models = ", ".join(sorted(view.info.encoders.values())) or "no model"
    reason = f", {view.reason}" if view.reason else ""
    return f"{view} {view.state}: {models} on {view.device or 'no device'}{reason}"


def _books(record: RunRecord) -> str:
    books = record.accounting
    rate = books.embedded / record.embed_seconds if record.embed_seconds else 0.0
    return f"{books.indexed} indexed, {books.failed} failed, {rate:.1f} images/s"


def _compared(ours: NDArray[np.float32], theirs: NDArray[np.float32], devices: str) -> str:
    """How far two sets of vectors lie apart; ends the step if that is too far."""
    if ours.shape != theirs.shape:
        raise _FailError(f"vectors of shape {theirs.shape}, {ours.shape} locally")
    most = float(np.abs(ours - theirs).max(initial=0.0))
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    least = float(((a * b).sum(axis=1) / lengths).min(initial=1.0))
    said = f"max |Δ| {most:.1e} and least cosine {least:.8f} to this machine's vectors"
    kinds = {"cpu", *(name.strip().partition(":")[0] for name in devices.split(",") if name)}
    if not agree(ours, theirs, kinds):
        raise _FailError(f"{said}: too far apart")
    return said


def _closed_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
