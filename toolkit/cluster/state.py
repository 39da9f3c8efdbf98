"""What is written down of this machine's own cluster, so that any process finds it again.

Law: the file holds a password: its owner alone may read it, and it is replaced whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from toolkit.cluster.processes import Process
from toolkit.machine import mapped_write

#: The only address of such a server.
HOST = "127.0.0.1"


@dataclasses.dataclass(frozen=True, slots=True)
class ServerRecord:
    """A server that was started.

    Attributes:
        process: The server.
        port: On :data:`HOST`.
        password: Random, of this start.
        started: When, in seconds since the epoch.
    """

    process: Process
    port: int
    password: str = dataclasses.field(repr=False)
    started: float

    @property
    def url(self) -> str:
        """Its address with the password, without a database."""
        return f"redis://:{quote(self.password, safe='')}@{HOST}:{self.port}"


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker that was started, by its supervisor.

    Attributes:
        process: The supervisor.
        number: Its log is ``logs/worker-N.log``.
        encoder: The encoder it was started for, as
            :meth:`toolkit.embedding.spec.EncoderRequest.to_json` gives it.
        place: Namespace, databases and limits, in which other clients must agree with it.
    """

    process: Process
    number: int
    encoder: dict[str, Any]
    place: str


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterState:
    """A cluster of this machine.

    Attributes:
        server: Its server.
        n_workers: Workers it was asked to have for an encoder.
        workers: Those it started.
    """

    server: ServerRecord
    n_workers: int
    workers: tuple[WorkerRecord, ...] = ()


def state_file(data_dir: Path) -> Path:
    """Where a cluster of this machine notes its server and its workers."""
    return data_dir / "cluster" / "state.json"


def read_state(data_dir: Path) -> ClusterState | None:
    """The cluster that was started last and not stopped; ``None`` if there is none.

    Its processes may have ended since.
    """
    try:
        value = json.loads(state_file(data_dir).read_text(encoding="utf-8"))
        server = ServerRecord(**{**value["server"], "process": _process(value["server"])})
        workers = tuple(WorkerRecord(**{**w, "process": _process(w)}) for w in value["workers"])
        return ClusterState(server, int(value["n_workers"]), workers)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_state(data_dir: Path, state: ClusterState) -> None:
    """Write it down.

    Raises:
        StorageError: If that cannot be.
    """
    path = state_file(data_dir)
    with mapped_write(path):
        # Readable by its owner alone from the first byte on.
        handle, written = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(state), file, indent=1)
        os.replace(written, path)


def _process(record: dict[str, Any]) -> Process:
    return Process(**record["process"])
