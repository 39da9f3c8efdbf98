"""A monitor of its own, asked for a build over HTTP as any program would ask it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit import config
from toolkit.config import Settings

#: Seconds the monitor may take until it answers, and to end.
START_S, END_S = 60.0, 10.0

#: Seconds a build of a few pictures may take.
BUILD_S = 300.0

#: Seconds for one answer; a build that is asked for starts a process first.
_ANSWER_S = 60.0

#: Past the proxy that the environment names: it is not to be told the token.
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DoorError(Exception):
    """The monitor does not start, or refuses what it was asked for; a sentence."""


@dataclasses.dataclass(frozen=True, slots=True)
class Door:
    """A monitor that answers.

    Attributes:
        url: Where, without a slash at its end.
        token: What a change needs.
    """

    url: str
    token: str

    def build(self, order: dict[str, Any]) -> dict[str, Any]:
        """Ask for a build and follow it to its end, as ``/api/runs/{run_id}`` tells it.

        Raises:
            DoorError: If it is refused, or does not end.
        """
        run = self._ask("/api/build_index", order)
        deadline = time.monotonic() + BUILD_S
        while run["state"] in ("queued", "running"):
            if time.monotonic() > deadline:
                raise DoorError(f"run {run['run_id']} is {run['state']} after {BUILD_S:.0f} s")
            time.sleep(0.2)  # as any client of HTTP would
            run = self._ask(f"/api/runs/{run['run_id']}")
        # What the order was answered with does not hold the books.
        return self._ask(f"/api/runs/{run['run_id']}")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with _DIRECTLY.open(request, timeout=_ANSWER_S) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            said = json.loads(error.read() or b"{}").get("error", "")
            raise DoorError(f"{path} answers {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise DoorError(f"{path} does not answer: {error}") from error


@contextlib.contextmanager
def open_door(settings: Settings, port: int, log: Path) -> Iterator[Door]:
    """Start a monitor on this machine alone, and end it.

    Raises:
        DoorError: If it does not start.
    """
    token = secrets.token_urlsafe(16)
    environment = config.as_environment(settings) | {"TOOLKIT_MONITOR_TOKEN": token}
    with open(log, "ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "toolkit.cli", "monitor", f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **environment},
            # A Ctrl-C is ours to hear, and to hand on.
            start_new_session=True,
        )
    try:
        door = Door(f"http://127.0.0.1:{port}", token)
        _wait_until_open(door, process, log)
        yield door
    finally:
        process.terminate()
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_open(door: Door, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with _DIRECTLY.open(f"{door.url}/api/openapi.json", timeout=_ANSWER_S):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise DoorError(f"the monitor does not start: {' '.join(last) or error}") from error
        time.sleep(0.1)  # nothing says when a port opens
