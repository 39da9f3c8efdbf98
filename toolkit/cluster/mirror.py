"""The copy of a run's record on the server, so that other machines see it and can cancel it.

Law: the mirror never hurts the run. It raises nothing, waits for one answer at most, and leaves
a server that failed alone for a while. A server on which no worker was ever registered is none
of ours: nothing is written there.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from toolkit.cluster.connection import Address, connect, mapped_errors, resolve_address
from toolkit.cluster.protocol import RUN_TTL_S, Keys
from toolkit.cluster.reading import answers, json_object, seconds, shown
from toolkit.config import Settings
from toolkit.errors import RunNotFoundError, ServerError
from toolkit.run_record import MOST_TIME_S, RunRecord, RunState

#: Seconds for which a server that failed is left alone.
BACK_OFF_S = 5.0

#: Seconds that the end of a run waits for its last record to be written.
END_TIMEOUT_S = 1.5

#: Runs that are kept on the server.
KEEP_RUNS = 100

#: Seconds for which a run is kept on the server.
KEEP_S = 7 * 86_400

#: Seconds for which a wish to cancel waits for its run.
CANCEL_TTL_S = 86_400

logger = logging.getLogger(__name__)


class Mirror:
    """A sink of :class:`toolkit.journal.RunJournal` that writes to the server.

    Args:
        address: The server.
        keys: The namespace.
    """

    def __init__(self, address: Address, keys: Keys) -> None:
        self._address, self._keys = address, keys
        self._client = connect(address)
        self._rests_until = 0.0

    def __call__(self, record: RunRecord) -> None:
        """Write a record; how a run ended is tried even while a server is left alone."""
        if record.state.is_live and time.monotonic() < self._rests_until:
            return
        try:
            with mapped_errors(self._address):
                self._write(record)
        except ServerError as error:
            self._rests_until = time.monotonic() + BACK_OFF_S
            logger.info("run %s is not mirrored for %g s: %s", record.run_id, BACK_OFF_S, error)

    def _write(self, record: RunRecord) -> None:
        keys = self._keys
        pipe = self._client.pipeline(transaction=False)
        pipe.time()
        pipe.hlen(keys.workers)
        pipe.hexists(keys.runs, record.run_id)
        now, n_workers, is_mirrored = pipe.execute()
        # A run that others see gets its end, also when that was the end of the workers.
        if not n_workers and not is_mirrored:
            return
        text = json.dumps({"at": seconds(now), "record": record.to_json()})
        pipe = self._client.pipeline(transaction=False)
        pipe.hset(keys.runs, record.run_id, text)
        pipe.expire(keys.runs, KEEP_S)
        pipe.execute()
        if not record.state.is_live:
            _prune(self._client, keys)
            self._client.close()


class Background:
    """Lets another sink hear in a thread of its own, so that a slow server keeps no run waiting.

    Only the newest record counts: what the server is too slow for is passed over.

    Args:
        sink: What hears.
    """

    def __init__(self, sink: Callable[[RunRecord], None]) -> None:
        self._sink = sink
        self._newest: RunRecord | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._main, name="mirror", daemon=True)
        self._thread.start()

    def __call__(self, record: RunRecord) -> None:
        """Let a record be heard; waits only for the one that says how the run ended."""
        # A copy: its driver goes on writing into it.
        self._newest = copy.deepcopy(record)
        self._wake.set()
        if not record.state.is_live:
            self._thread.join(timeout=END_TIMEOUT_S)

    def _main(self) -> None:
        is_live = True
        while is_live:
            self._wake.wait()
            self._wake.clear()
            if (record := self._newest) is not None:
                is_live = record.state.is_live
                self._sink(record)


def list_mirrored(backend: redis.Redis, keys: Keys) -> list[RunRecord]:
    """The runs on the server; see :func:`list_news`."""
    return [record for _, record in list_news(backend, keys)]


def list_news(backend: redis.Redis, keys: Keys) -> list[tuple[float, RunRecord]]:
    """The runs on the server, the newest first, each with the seconds since it was written.

    What cannot be understood is passed over. A live one that has been silent for
    :data:`~toolkit.cluster.protocol.RUN_TTL_S` seconds, by the server's clock, is
    ``interrupted``.
    """
    pipe = backend.pipeline(transaction=False)
    pipe.time()
    pipe.hgetall(keys.runs)
    now, said = answers(pipe)
    entries = [_understood(field, text) for field, text in (said or {}).items()]
    known = sorted((e for e in entries if e), key=lambda entry: entry[1].run_id, reverse=True)
    silent = [r for at, r in known if r.state.is_live and seconds(now) - at > RUN_TTL_S]
    pipe = backend.pipeline(transaction=False)
    for record in silent:
        pipe.exists(keys.run(record.run_id))
    # A long stage may write nothing, while its executor keeps the run's key alive.
    for record, lives in zip(silent, answers(pipe), strict=True):
        if not lives:
            record.state = RunState.INTERRUPTED
            record.error = record.error or f"its process on {record.host} fell silent"
    return [(max(0.0, seconds(now) - at), record) for at, record in known]


def forget_run(backend: redis.Redis, keys: Keys, run_id: str) -> None:
    """Take a run that has ended off the server."""
    backend.hdel(keys.runs, run_id)


def find_mirrored(backend: redis.Redis, keys: Keys, run_id: str) -> RunRecord | None:
    """A run on the server by its id, as :func:`list_mirrored` gives it."""
    found = (record for record in list_mirrored(backend, keys) if record.run_id == run_id)
    return next(found, None)


def request_cancel(backend: redis.Redis, keys: Keys, run_id: str) -> None:
    """Ask a run to stop, wherever its process is."""
    backend.set(keys.cancel(run_id), "1", ex=CANCEL_TTL_S)


def is_cancelled(backend: redis.Redis, keys: Keys, run_id: str) -> bool:
    """Whether somebody asked a run to stop."""
    return bool(backend.exists(keys.cancel(run_id)))


class MirroredRun:
    """The reading end of a run on another machine, in the shape of a journal's.

    Args:
        run_id: The run.
        settings: Server and namespace.
    """

    def __init__(self, run_id: str, settings: Settings) -> None:
        #: Its last part is the run's id, as of a run on this disk.
        self.folder = Path(run_id)
        self._address, self._keys = resolve_address(settings), Keys(settings.namespace)
        self._client = connect(self._address)

    def record(self) -> RunRecord:
        """The run as its driver last said.

        Raises:
            RunNotFoundError: If the server has forgotten it.
            ServerError: If the server cannot be asked.
        """
        with mapped_errors(self._address):
            record = find_mirrored(self._client, self._keys, self.folder.name)
        if record is None:
            raise RunNotFoundError(f"no run {self.folder.name!r}; `toolkit runs` lists them")
        return record

    def request_cancel(self) -> None:
        """Ask its driver to stop; it looks once a second.

        Raises:
            ServerError: If the server cannot be asked.
        """
        with mapped_errors(self._address):
            request_cancel(self._client, self._keys, self.folder.name)

    def request(self) -> dict[str, Any]:
        """The call, which only its own machine knows.

        Raises:
            RunNotFoundError: Always.
        """
        raise RunNotFoundError(f"run {self.folder.name} is on {self.record().host}: go there")

    def failures(self) -> list[dict[str, Any]]:
        """None: the table is on its own machine."""
        return []

    def events(self) -> list[dict[str, Any]]:
        """None: they are on its own machine."""
        return []

    def log(self) -> str:
        """Where the log is."""
        return f"the log of run {self.folder.name} is on {self.record().host}\n"


def mirrored_run(settings: Settings, run_id: str | None) -> MirroredRun | None:
    """A run on the server by its id, or the newest live one; ``None`` if there is none.

    Raises:
        ServerError: If the server cannot be asked.
    """
    address, keys = resolve_address(settings), Keys(settings.namespace)
    with mapped_errors(address), connect(address) as client:
        for record in list_mirrored(client, keys):
            if record.run_id == run_id or (run_id is None and record.state.is_live):
                return MirroredRun(record.run_id, settings)
    return None


def _understood(field: bytes, text: bytes) -> tuple[float, RunRecord] | None:
    """When a record was written, and the record; ``None`` if this release cannot read it."""
    entry = json_object(text) or {}
    try:
        record = RunRecord.from_json(entry["record"])
        at = float(entry["at"])
        # What a reader computes from it must not fail there.
        is_known = record.is_sound and 0 <= at < MOST_TIME_S and record.run_id == shown(field)
        return (at, record) if is_known else None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _prune(client: redis.Redis, keys: Keys) -> None:
    pipe = client.pipeline(transaction=False)
    pipe.time()
    pipe.hgetall(keys.runs)
    now, said = pipe.execute()
    written = {field: (_understood(field, text) or (0.0,))[0] for field, text in said.items()}
    newest = sorted(written, key=lambda field: written[field], reverse=True)
    old = [field for field in newest if written[field] < seconds(now) - KEEP_S]
    gone = {*newest[KEEP_RUNS:], *old}
    if gone:
        client.hdel(keys.runs, *gone)
