"""Real servers to break: started on a free port, frozen, killed, restarted, always reaped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import redis

from tests.support import wait_until
from toolkit.cluster.server import find_binary


class Server:
    """A server of its own: free port, own folder, own session. A context manager; it starts there.

    It also listens on a unix socket, by which :meth:`client` reaches it whatever its address,
    password and encryption are; only freezing it shuts that door as well.

    Args:
        password: What it asks for, ``None`` for nothing.
        certificates: Speak TLS on ``port``. The embedded binary cannot, so a :class:`Relay` does.
        bind: The address it listens on.
        prefix: Put before its command, such as ``("ip", "netns", "exec", "box")``.
        port: Port to use instead of a free one.
        options: Its own settings, such as ``maxmemory="8mb"``, ``appendonly="yes"`` (restarts
            keep the data) or ``protected_mode="yes"``.
    """

    def __init__(
        self,
        *,
        password: str | None = None,
        certificates: Certificates | None = None,
        bind: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        port: int = 0,
        **options: str,
    ) -> None:
        self.password, self.certificates, self.host = password, certificates, bind
        # Short, for the path of a unix socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="tks-", dir="/tmp"))
        self.plain_port = port or free_port()
        self._prefix, self._options = tuple(prefix), options
        self._process: subprocess.Popen[bytes] | None = None
        self._relay: Relay | None = None

    @property
    def port(self) -> int:
        """The port that clients are told: TLS if the server has certificates."""
        return self._relay.port if self._relay else self.plain_port

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")

    @property
    def url(self) -> str:
        """``REDIS_URL`` of it."""
        scheme = "rediss" if self.certificates else "redis"
        account = f":{quote(self.password, safe='')}@" if self.password else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        query = f"?ssl_ca_certs={self.certificates.authority}" if self.certificates else ""
        return f"{scheme}://{account}{host}:{self.port}{query}"

    def settings_env(self) -> dict[str, str]:
        """The environment of a client or worker that is to use it."""
        if self.password or self.certificates:
            return {"REDIS_URL": self.url}
        return {"REDIS_HOST": self.host, "REDIS_PORT": str(self.port)}

    def client(self, db: int = 0) -> redis.Redis:
        """A plain client, for looking and for breaking things; to be closed."""
        path = str(self.folder / "socket")
        return redis.Redis(unix_socket_path=path, db=db, password=self.password, socket_timeout=10)

    def start(self) -> Self:
        """Start it and wait until it answers."""
        assert self._process is None, "the server runs already"
        settings = {
            "port": str(self.plain_port),
            "bind": self.host,
            "unixsocket": str(self.folder / "socket"),
            "dir": str(self.folder),
            "save": '""',
            "protected-mode": "no",
            **{name.replace("_", "-"): value for name, value in self._options.items()},
        }
        if self.password:
            settings["requirepass"] = json.dumps(self.password)
        file = self.folder / "server.conf"
        file.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, str(find_binary()), str(file)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, f"an answer of the server in {self.folder}", 20)
        if self.certificates and self._relay is None:
            self._relay = Relay(self.plain_port, certificates=self.certificates)
        return self

    def stop(self) -> None:
        """End it as a service manager would; its data is saved if it saves data at all."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL: connections break, what was not written is lost."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start it again on the same port, after ending it with SIGKILL if it still runs."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Let it accept connections and never answer."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """End :meth:`freeze`."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()
        if self._relay:
            self._relay.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answers(self) -> bool:
        assert self._process is not None  # it was just started
        code = self._process.poll()
        assert code is None, f"the server ended with code {code}: {self.log}"
        with self.client() as client, contextlib.suppress(redis.ConnectionError):
            return bool(client.ping())
        return False

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
            # A frozen one takes SIGTERM only once it runs again.
            process.send_signal(signal.SIGCONT)
        process.wait(timeout=20)


@dataclasses.dataclass(frozen=True)
class Certificates:
    """An authority, and a certificate of its own for 127.0.0.1 and localhost."""

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path, hosts: Sequence[str] = ("IP:127.0.0.1", "DNS:localhost")) -> Self:
        """Have openssl make them in a new folder."""
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(f"subjectAltName={','.join(hosts)}\n")
        _openssl(folder, "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tests-authority "
                 "-keyout ca.key -out ca.crt")  # fmt: skip
        _openssl(folder, "req -newkey rsa:2048 -nodes -subj /CN=tests-server "
                 "-keyout server.key -out server.csr")  # fmt: skip
        _openssl(folder, "x509 -req -days 2 -in server.csr -CA ca.crt -CAkey ca.key "
                 "-CAcreateserial -extfile hosts -out server.crt")  # fmt: skip
        return cls(folder / "ca.crt", folder / "server.crt", folder / "server.key")


def _openssl(folder: Path, arguments: str) -> None:
    subprocess.run(
        ["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True, timeout=60
    )


class Relay:
    """A relay before a server on 127.0.0.1; it can speak TLS, and swallow what passes.

    Args:
        target: The server's port.
        certificates: Speak TLS to clients.
    """

    def __init__(self, target: int, *, certificates: Certificates | None = None) -> None:
        self._target, self._age = target, 0
        self._tls: ssl.SSLContext | None = None
        if certificates:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificates.certificate, certificates.key)
        self._loop = asyncio.new_event_loop()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def swallow(self) -> None:
        """Half-open every connection there is: it stays, and nothing passes. New ones work."""
        self._age += 1

    def close(self) -> None:
        """Break every connection and stop."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(timeout=20)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        server = await asyncio.start_server(self._connected, sock=self._listener, ssl=self._tls)
        await self._end.wait()
        server.close()
        # The runner cancels what is still connected.

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
            both = (self._pump(reader, server_writer), self._pump(server_reader, writer))
            try:
                await asyncio.gather(*both)
            finally:
                server_writer.close()
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        age = self._age
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if age == self._age:
                    writer.write(data)
                    await writer.drain()
        writer.close()


def free_port() -> int:
    """A port on which nothing listens.

    Below those that the system gives to connections: one of these may be taken again before the
    server that it is for has started, or starts again.
    """
    while True:
        port = secrets.randbelow(20_000) + 10_000
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port whose connections are never completed: the listener's backlog is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = int(listener.getsockname()[1])
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield port


@contextlib.contextmanager
def mute_port() -> Iterator[int]:
    """A port that takes connections and never says a word, under any protocol."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield int(listener.getsockname()[1])
