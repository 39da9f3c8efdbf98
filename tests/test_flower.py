"""Flower over this package's app: real, beside a real worker, and shut to everybody else."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.clusters import World
from tests.servers import Server, free_port
from tests.support import wait_until
from toolkit.config import Settings
from toolkit.monitor import launch

SCRIPTS = Path(__file__).parents[1] / "scripts"

#: What somebody may have set who wants less care taken.
CARELESS = {
    "FLOWER_ADDRESS": "0.0.0.0",
    "FLOWER_UNAUTHENTICATED_API": "1",
    "FLOWER_READ_ONLY": "0",
}


@contextlib.contextmanager
def flower(*command: str, env: Mapping[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """Flower on a free port, its address and its process."""
    port = free_port()
    command = command or (sys.executable, "-m", "toolkit.cli", "flower")
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **env},
    )
    try:
        wait_until(lambda: launch.flower_url(port) is not None, "an answer of Flower", 60)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)


def get(url: str, **given: Any) -> tuple[int, str]:
    request = urllib.request.Request(url, **given)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.slow
def test_whatever_the_environment_says_it_is_read_only_and_for_this_machine_alone() -> None:
    with Server() as server, flower(env={**server.settings_env(), **CARELESS}) as (url, process):
        api = get(f"{url}/api/workers")
        control = get(f"{url}/api/worker/shutdown/somebody", method="POST")
        listening = {
            c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN
        }
        loaded = Path(f"/proc/{process.pid}/maps").read_text()

    assert api[0] == 401
    assert control[0] in (401, 403)
    assert listening == {"127.0.0.1"}
    assert "libtorch" not in loaded


@pytest.mark.slow
def test_it_is_read_only_for_those_who_may_use_its_interface() -> None:
    access = {"FLOWER_BASIC_AUTH": "me:secret"}
    with (
        Server() as server,
        flower(env={**server.settings_env(), **access, **CARELESS}) as (url, _),
    ):
        me = {"Authorization": f"Basic {base64.b64encode(b'me:secret').decode()}"}
        look = get(f"{url}/api/workers", headers=me)
        control = get(f"{url}/api/worker/shutdown/somebody", method="POST", headers=me)

    assert look[0] == 200
    assert control[0] == 403


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [(sys.executable, str(SCRIPTS / "start_flower.py")), ("sh", str(SCRIPTS / "start_flower.sh"))],
    ids=["py", "sh"],
)
def test_it_names_our_worker_and_our_task(script: tuple[str, ...]) -> None:
    with World() as world, world.entered():
        worker = world.worker(pool="solo")
        path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        with flower(*script, env={**world.env, **path}) as (url, _):

            def workers() -> list[str]:
                return [
                    row["hostname"] for row in json.loads(get(f"{url}/workers?json=1")[1])["data"]
                ]

            wait_until(lambda: len(workers()) == 1, "the worker in Flower", 30)
            (name,) = workers()
            page = get(f"{url}/worker/{name}")
            ours = worker.id

    assert name.partition("@")[0] == ours
    assert page[0] == 200
    assert "toolkit.generate_embeddings_task" in page[1]


def test_a_flower_that_is_not_there_has_no_address() -> None:
    assert launch.flower_url(free_port()) is None


def test_something_else_is_not_taken_for_flower() -> None:
    with Server() as server:
        assert launch.flower_url(server.plain_port) is None


class Proxy(http.server.BaseHTTPRequestHandler):
    """Answers for everybody, and remembers whom it was asked for."""

    asked: list[str]

    def do_GET(self) -> None:  # the library asks for these two by their names
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    "ask",
    [
        "from toolkit.monitor.launch import flower_url\nassert flower_url({port}) is None",
        "from toolkit.verify.door import Door, DoorError\n"
        "try: Door('http://127.0.0.1:{port}', 'secret').build({{}})\n"
        "except DoorError as error: assert 'does not answer' in str(error), error\n"
        "else: raise AssertionError",
    ],
    ids=["Flower", "the monitor and its token"],
)
def test_no_proxy_hears_what_is_asked_of_this_machine(ask: str) -> None:
    Proxy.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        env = {**os.environ, "http_proxy": f"http://127.0.0.1:{proxy.server_port}"}
        # What the environment says is read once in a process.
        done = subprocess.run(
            [sys.executable, "-c", ask.format(port=free_port())],
            env={name: value for name, value in env.items() if name.lower() != "no_proxy"},
            capture_output=True,
            text=True,
        )
        proxy.shutdown()
        thread.join()

    assert done.returncode == 0, done.stderr
    assert Proxy.asked == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_to_the_monitor_ends_flower_too(how: signal.Signals, settings: Settings) -> None:
    if launch.flower_url() is not None:
        pytest.skip("a Flower runs on this machine already, and would be left alone")
    with Server() as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "toolkit.cli", "monitor", "--flower", f"--port={free_port()}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **server.settings_env()},
        )
        try:
            wait_until(lambda: launch.flower_url() is not None, "an answer of Flower", 60)
            (beside,) = psutil.Process(process.pid).children()

            process.send_signal(how)
            process.wait(timeout=20)
            outlived = beside.is_running()
            if outlived:
                beside.kill()
        finally:
            process.kill()
            process.wait()

    assert not outlived


@pytest.mark.slow
def test_flower_ends_with_the_monitor_that_started_it(settings: Settings) -> None:
    if launch.flower_url() is not None:
        pytest.skip("a Flower runs on this machine already, and would be left alone")
    with Server() as server:
        before = {name: os.environ.get(name) for name in server.settings_env()}
        os.environ.update(server.settings_env())
        try:
            with launch.flower_beside(settings):
                wait_until(lambda: launch.flower_url() is not None, "an answer of Flower", 60)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    assert launch.flower_url() is None
