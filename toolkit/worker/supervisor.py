"""``toolkit worker``: one Celery worker for each device, started again when it dies.

Law: a worker that died is taken out of the registry at once, so that its batch is not waited
for; one that was asked to stop finishes its batch; and none outlives its supervisor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from toolkit.cluster.connection import connect, mapped_errors, resolve_address
from toolkit.cluster.protocol import ENCODERS_VARIABLE, Keys
from toolkit.cluster.registry import bury, withdraw
from toolkit.config import Settings, as_environment
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ServerError
from toolkit.machine import n_gpus
from toolkit.worker.bootsteps import EXIT_USAGE
from toolkit.worker.presence import ID_VARIABLE, SUPERVISOR_VARIABLE

logger = logging.getLogger(__name__)

#: Seconds before the second start after a death; doubled with each one that follows.
FIRST_WAIT_S = 0.5

#: Most seconds between two starts: whatever killed the last ones may be over by now.
MOST_WAIT_S = 5.0

#: Seconds after which a worker counts as having lived, and the waits begin anew.
LIVED_S = 30.0

#: Seconds that a worker may take to finish its batch once it was asked to stop.
STOP_S = 60.0

_POLL_S = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How workers are to be started.

    Attributes:
        encoders: What each of them serves.
        devices: A worker for each.
        pool: ``prefork``, ``solo`` or ``threads``.
        log_level: Of Celery and of the toolkit.
    """

    encoders: Sequence[EncoderRequest]
    devices: Sequence[str]
    pool: str
    log_level: str


def supervise(plan: Plan, settings: Settings) -> int:
    """Run workers until each of them ended by itself, or a signal says to stop.

    Returns:
        The exit code: 0 when they were asked to stop, else that of the last worker.
    """
    workers = [_Worker(plan, device, settings) for device in plan.devices]
    stop = _Stop(workers)
    try:
        while any([worker.look_after(stop.is_asked) for worker in workers]):
            time.sleep(_POLL_S)  # several children, and signals: there is no one thing to wait on
        return max(worker.exit_code for worker in workers)
    finally:
        for worker in workers:
            worker.kill()


def devices(asked: str) -> list[str]:
    """``auto``: each visible GPU, else what one worker finds; or what was named."""
    if asked != "auto":
        return [name.strip() for name in asked.split(",") if name.strip()]
    n = n_gpus()
    return [f"cuda:{index}" for index in range(n)] if n > 1 else ["auto"]


class _Worker:
    def __init__(self, plan: Plan, device: str, settings: Settings) -> None:
        self._plan, self._device, self._settings = plan, device, settings
        self._process: subprocess.Popen[bytes] | None = None
        self._name = ""
        self._started = self._next_start = 0.0
        self._wait_s = 0.0
        self._asked_at: float | None = None
        self.exit_code = 0

    def look_after(self, is_stopping: bool) -> bool:
        """Start it if it is time to; whether it still needs looking after."""
        if self._process is None:
            if is_stopping:
                return False
            if time.monotonic() >= self._next_start:
                self._start()
            return True
        code = self._process.poll()
        if code is None:
            self._insist()
            return True
        return self._ended(code, is_stopping)

    def signal(self, what: signal.Signals) -> None:
        """Pass a signal on to the worker."""
        self._asked_at = self._asked_at or time.monotonic()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(what)

    def kill(self) -> None:
        """Leave nothing of it behind."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "nt":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _start(self) -> None:
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        encoders = [request.to_json() for request in self._plan.encoders]
        environment = {
            **os.environ,
            **as_environment(dataclasses.replace(self._settings, device=self._device)),
            ENCODERS_VARIABLE: json.dumps(encoders),
            ID_VARIABLE: self._name,
            SUPERVISOR_VARIABLE: str(os.getpid()),
        }
        command = [
            *(sys.executable, "-P", "-m", "toolkit.worker.main"),
            *("--pool", self._plan.pool, "--concurrency", "1"),
            *("--loglevel", self._plan.log_level, "--hostname", f"{self._name}@%h"),
            *("--without-gossip", "--without-mingle"),
        ]
        # Its own group: a Ctrl-C reaches it through us, once.
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        self._started = time.monotonic()

    def _ended(self, code: int, is_stopping: bool) -> bool:
        self.kill()  # what it started goes with it
        lived_s = time.monotonic() - self._started
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        how = f"{how} after {lived_s:.0f} s"
        is_over = is_stopping or code in (0, EXIT_USAGE)
        self._take_out(None if is_over else how)
        self.exit_code = 0 if is_stopping else abs(code)
        if is_over:
            return False
        self._wait_s = (
            FIRST_WAIT_S
            if lived_s > LIVED_S or not self._wait_s
            else min(2 * self._wait_s, MOST_WAIT_S)
        )
        self._next_start = time.monotonic() + self._wait_s
        logger.warning(
            "worker %s %s; starting another one in %.1f s", self._name, how, self._wait_s
        )
        return True

    def _insist(self) -> None:
        if self._asked_at is not None and time.monotonic() - self._asked_at > STOP_S:
            logger.warning("worker %s did not stop in %.0f s; killing it", self._name, STOP_S)
            self.kill()

    def _take_out(self, how: str | None) -> None:
        """Tell others that it is gone, and how it ended if nobody asked it to."""
        address, keys = resolve_address(self._settings), Keys(self._settings.namespace)
        with contextlib.suppress(ServerError), mapped_errors(address), connect(address) as client:
            if how:
                bury(client, keys, self._name, how)
            else:
                withdraw(client, keys, self._name)


class _Stop:
    """Passes SIGTERM and SIGINT on, and remembers that one came."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self.is_asked = False
        self._workers = workers
        for what in (signal.SIGTERM, signal.SIGINT):
            signal.signal(what, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        for worker in self._workers:
            worker.signal(signal.Signals(number))
