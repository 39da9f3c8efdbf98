"""Machines with addresses of their own on one: network namespaces that a switch joins.

Law: nothing is put into the network of this machine itself. A run's namespaces go when it ends,
and what a run that was killed left goes when the next one begins.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

import toolkit as tk
from tests.clusters import Running, World
from tests.servers import Certificates, Relay
from tests.support import build_cli

#: Only these machines see each other, so that any two runs may use it at once.
_NETWORK = "10.213.0"

#: Of a namespace: whose it is, and a letter for each machine.
_NAME = re.compile(r"^tk(\d+)[a-z]\b", re.MULTILINE)

#: What makes `setns` check that it was given a network.
_CLONE_NEWNET = 0x40000000

#: A process that finds it as its ``sitecustomize`` lives at another time.
_SHIFT = """
import datetime, time
OFFSET = {offset_s}
now, now_ns, plain = time.time, time.time_ns, datetime.datetime
time.time = lambda: now() + OFFSET
time.time_ns = lambda: now_ns() + OFFSET * 10**9
class Kind(type):
    def __instancecheck__(cls, value):
        return isinstance(value, plain)
class Shifted(plain, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return plain.now(tz) + datetime.timedelta(seconds=OFFSET)
    @classmethod
    def utcnow(cls):
        return plain.utcnow() + datetime.timedelta(seconds=OFFSET)
datetime.datetime = Shifted
"""


def why_not() -> str | None:
    """Why no machines can be made here, ``None`` if they can."""
    if sys.platform != "linux":
        return "only Linux has network namespaces"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    for tool in ("ip", "tc", "unshare", "mount"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed"
    try:
        with Network() as network:
            network.machine()
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    return None


class Network:
    """A switch, and the machines at its ports; a context manager."""

    def __init__(self) -> None:
        self._letters = iter("abcdefghijklmnopqrstuvwxyz")
        self._made: list[str] = []
        self._switch = ""

    def machine(self) -> Machine:
        """Connect another machine."""
        name = self._namespace()
        machine = Machine(name, f"{_NETWORK}.{len(self._made)}", self._switch)
        # Both ends are born where they belong: this machine never sees them.
        _ip("-n", self._switch, "link", "add", name, "type", "veth",
            "peer", "name", "eth0", "netns", name)  # fmt: skip
        _ip("-n", self._switch, "link", "set", name, "master", "switch")
        _ip("-n", name, "address", "add", f"{machine.address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        machine.plug()
        return machine

    def close(self) -> None:
        """Take all of it away; the switch goes with its namespace."""
        while self._made:
            _remove(self._made.pop())

    def __enter__(self) -> Self:
        _remove_leftovers()
        try:
            self._switch = self._namespace()
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _namespace(self) -> str:
        name = f"tk{os.getpid()}{next(self._letters)}"
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")
        return name


class Machine:
    """One machine: an address, a name, and a cable that can be pulled.

    Attributes:
        name: Its host name.
        address: Where the others reach it.
    """

    def __init__(self, name: str, address: str, switch: str) -> None:
        self.name, self.address, self._switch = name, address, switch

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command that is to run there; the process keeps its number."""
        return self._prefix("")

    def without(self, folder: Path) -> tuple[str, ...]:
        """The same, where a folder of this machine's is empty: it is not shared with that one."""
        return self._prefix(f"mount -t tmpfs none '{folder}' && ")

    def unplug(self) -> None:
        """Pull the cable: what is connected stays so, and no packet arrives any more."""
        _ip("-n", self._switch, "link", "set", self.name, "down")

    def plug(self) -> None:
        """Put it back."""
        _ip("-n", self._switch, "link", "set", self.name, "up")

    @contextlib.contextmanager
    def slow_line(self, rate: str) -> Iterator[None]:
        """Let no more than, say, ``20mbit`` a second leave it."""
        queueing = ("qdisc", "replace", "dev", "eth0", "root")
        limit = ("tbf", "rate", rate, "burst", "64kb", "latency", "100ms")
        _run("tc", "-n", self.name, *queueing, *limit)
        try:
            yield
        finally:
            _run("tc", "-n", self.name, "qdisc", "delete", "dev", "eth0", "root")

    def _prefix(self, first: str) -> tuple[str, ...]:
        # `ip netns exec` gives a process mounts of its own as well.
        script = f'echo {self.name} >/proc/sys/kernel/hostname && {first}exec "$@"'
        return ("ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", script, "sh")


class Site(World):
    """A world whose server runs on a machine of its own, with a password, plain and under TLS.

    Args:
        host: The server's machine.
    """

    password = "pass/word@site"

    def __init__(self, host: Machine) -> None:
        self._host = host
        # All addresses of that machine: the door comes from its loopback.
        super().__init__(password=self.password, bind="0.0.0.0", prefix=host.prefix)
        self._certificates = Certificates.make(self.folder / "tls", [f"IP:{host.address}"])
        self._door = _door(host, self.server.plain_port, self._certificates)

    @property
    def env(self) -> dict[str, str]:
        """See :class:`tests.clusters.World`; no sabotage but where :attr:`slow` is given."""
        return {**super().env, "REDIS_URL": self.url(), "PYTHONPATH": ""}

    @property
    def slow(self) -> dict[str, str]:
        """Added to the environment of a process that is to mind marks such as ``SLOW``."""
        return {"PYTHONPATH": super().env["PYTHONPATH"]}

    @property
    def tls_url(self) -> str:
        """``REDIS_URL`` of the way in that is encrypted."""
        door = self.server.url.replace("redis://", "rediss://")
        where = f"@{self._host.address}:{self._door.port}"
        return f"{door.partition('@')[0]}{where}?ssl_ca_certs={self._certificates.authority}"

    def url(self, password: str | None = None) -> str:
        """``REDIS_URL`` of the plain way in, perhaps with another password."""
        account = f":{password}" if password else self.server.url.split("/")[2].partition("@")[0]
        return f"redis://{account}@{self._host.address}:{self.server.plain_port}"

    def close(self) -> None:
        """See :class:`tests.clusters.World`."""
        super().close()
        self._door.close()


class Remote(Running):
    """``toolkit build`` on a machine of its own, watched from here.

    Args:
        machine: Where it runs.
        datasets: What it builds, and how it is called.
        env: What is different in its environment.
    """

    def __init__(self, machine: Machine, datasets: str, **env: str) -> None:
        self._machine = machine
        self.answer: dict[str, Any] = {}
        super().__init__(datasets, env=env)

    def local_start(self, since: float) -> float:
        """Wait until a process that embeds is started there; when, in seconds since the epoch."""
        found: list[float] = []

        def is_there() -> bool:
            found.extend(at for at in _embedding_since() if at > since)
            return bool(found)

        self.until(is_there, "a process that embeds on the client's machine", 30)
        return found[0]

    def _run(self, datasets: Any, options: dict[str, Any]) -> None:
        try:
            flags = (datasets, "--name", datasets)
            self.answer = build_cli(*flags, prefix=self._machine.prefix, **options)
            assert self.answer["exit"] == 0, self.answer["stderr"]
            self._ended.append(tk.attach(self.answer["run_id"]))
        except BaseException as error:
            self._ended.append(error)


def time_shift(folder: Path, offset_s: int) -> Path:
    """A folder for ``PYTHONPATH`` that puts a process's clock wrong by so much."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(_SHIFT.format(offset_s=offset_s))
    return folder


def _embedding_since() -> Iterator[float]:
    """When each process that embeds for this one or its children was started."""
    # The system's own word on when it booted is cut to whole seconds.
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "toolkit.dispatch.child" in process.cmdline():
                yield process.create_time() - psutil.boot_time() + booted


class _Door(Relay):
    """A relay that others reach, not only its own machine."""

    def __init__(self, host: str, target: int, certificates: Certificates) -> None:
        self._outside = socket.create_server((host, 0))
        super().__init__(target, certificates=certificates)
        self.port = self._outside.getsockname()[1]

    async def _serve(self) -> None:
        self._listener.close()
        self._listener = self._outside
        await super()._serve()


def _door(machine: Machine, target: int, certificates: Certificates) -> Relay:
    """A relay on another machine: a thread that is there makes it, and its thread stays there."""

    def make() -> Relay:
        with open(f"/run/netns/{machine.name}", "rb") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return _Door(machine.address, target, certificates)

    with concurrent.futures.ThreadPoolExecutor(1) as there:
        return there.submit(make).result()


def _remove_leftovers() -> None:
    """Remove the namespaces of runs that are gone."""
    for found in _NAME.finditer(_ip("netns", "list")):
        if not psutil.pid_exists(int(found[1])):
            _remove(found[0])


def _remove(name: str) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):  # somebody else was faster
        _ip("netns", "delete", name)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
