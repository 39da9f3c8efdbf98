from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from starlette.applications import Starlette

from tests.servers import Server, free_port
from tests.support import wait_until
from tests.test_monitor_snapshot import CATS, register, waiting
from toolkit import config
from toolkit.cluster.registry import WorkerState
from toolkit.journal import RunJournal, list_runs
from toolkit.monitor import guards, orders
from toolkit.monitor.guards import read_only_reason
from toolkit.monitor.http import lifespan, middleware, routes
from toolkit.monitor.openapi import DESCRIPTION
from toolkit.places import index_dir, index_lock, runs_dir
from toolkit.run_record import RunRecord, RunState
from toolkit.samples import PHOTOS

ROOT = Path(__file__).parents[1]

#: How a monitor is started, but for its port.
LAUNCHERS = {
    "toolkit monitor": ("-m", "toolkit.cli", "monitor", "--port"),
    "streamlit run": ("-m", "streamlit", "run", str(ROOT / "monitor_app.py"), "--server.port"),
}

#: What asks for a websocket.
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
}

RUN = "20260101-000000-aaaaaa"
ORDER = {"dataset_names": ["cats"]}

#: The monitor without its page, as a process of its own.
SERVE = """
import sys, uvicorn
from starlette.applications import Starlette
from toolkit.monitor.http import lifespan, middleware, routes
app = Starlette(routes=routes(), middleware=middleware("127.0.0.1"), lifespan=lifespan)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> str:
        """The one sentence of an answer that is an error."""
        assert self.status >= 400, self.text
        sentence = self.json["error"]
        assert isinstance(sentence, str)
        assert "\n" not in sentence
        assert "Traceback" not in sentence
        return sentence


class Door:
    """The monitor's HTTP side under a real server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request; headers are written with underscores, ``None`` leaves one out."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {} if data is None else {"Content-Type": "application/json"}
        given.update({name.replace("_", "-"): text for name, text in headers.items()})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, data, given)
            response = connection.getresponse()
            got = {name.lower(): text for name, text in response.getheaders()}
            return Answer(response.status, got, response.read().decode())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)


@contextlib.contextmanager
def serving(listening_on: str = "127.0.0.1", names: Sequence[str] = ()) -> Iterator[Door]:
    app = Starlette(
        routes=routes(), middleware=middleware(listening_on, lambda: names), lifespan=lifespan
    )
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, "the HTTP server")
        yield Door(port)
    finally:
        server.should_exit = True
        thread.join(timeout=30)


@contextlib.contextmanager
def launched(how: str, folder: Path) -> Iterator[tuple[Door, subprocess.Popen[bytes]]]:
    """A monitor as users start it, with its page."""
    door, log = Door(free_port()), folder / "monitor.log"
    env = {**os.environ, "REDIS_PORT": str(free_port()), "TOOLKIT_DATA_DIR": str(folder)}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, *LAUNCHERS[how], str(door.port)], stdout=out, stderr=out, env=env
        )
    try:
        wait_until(lambda: _listens(door), "the monitor")
        yield door, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=LAUNCHERS)
def page(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    with launched(request.param, tmp_path_factory.mktemp("monitor")) as (door, _):
        yield door


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """A monitor on this machine alone; there is no Redis unless a test starts one."""
    monkeypatch.setenv("REDIS_PORT", str(free_port()))
    with serving() as door:
        yield door


@pytest.fixture
def cats() -> Path:
    """Three photos as a dataset."""
    folder = config.resolve().datasets_dir / "cats"
    folder.mkdir(parents=True)
    for photo in sorted((PHOTOS / "animals").iterdir())[:3]:
        shutil.copy(photo, folder)
    return folder


def nothing_was_started() -> bool:
    return list_runs(runs_dir(config.resolve().data_dir)) == []


def a_run(state: RunState = RunState.RUNNING) -> RunJournal:
    record = RunRecord(RUN, "cats", state, stage="embed", done=3, total=9)
    return RunJournal(runs_dir(config.resolve().data_dir), record, {})


# What a foreign page, or a mistake, may send.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "[half"}, 403),
        ({"Host": ""}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": ""}, 415),
    ],
)
def test_what_a_foreign_page_can_send_starts_nothing(
    door: Door, cats: Path, headers: dict[str, str], status: int
) -> None:
    answer = door.post("/api/build_index", ORDER, **headers)

    assert answer.status == status
    assert answer.error
    assert nothing_was_started()


def test_our_own_page_is_let_in(door: Door) -> None:
    origin = f"http://127.0.0.1:{door.port}"

    answer = door.post("/api/build_index", {"dataset_names": ["none"]}, Origin=origin)

    assert answer.status == 404


def test_a_foreign_name_reads_nothing_either(door: Door) -> None:
    answer = door.get("/api/runs", Host="evil.example")

    assert answer.status == 403
    assert "not called 'evil.example'" in answer.error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example:{port}", "http://evil.example:{port}"),  # a name that leads here
        ("evil.example:{port}", None),
        ("localhost:{port}", "http://localhost:3000"),  # what else this machine serves
        ("localhost:{port}", "http://evil.example"),
        ("localhost:{port}", "null"),
    ],
)
def test_a_foreign_page_cannot_drive_ours_by_its_websocket(
    page: Door, host: str, origin: str | None
) -> None:
    headers = {"Host": host.format(port=page.port)}
    if origin is not None:
        headers["Origin"] = origin.format(port=page.port)

    begun = time.monotonic()
    answer = page.get("/_stcore/stream", **UPGRADE, **headers)

    assert answer.status == 403
    # Nobody outside was asked for our address.
    assert time.monotonic() - begun < 2


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_our_own_page_opens_with_its_websocket(page: Door, host: str) -> None:
    ours = f"{host}:{page.port}"

    plain = page.get("/", Host=ours)
    stream = page.get("/_stcore/stream", **UPGRADE, Host=ours, Origin=f"http://{ours}")

    assert plain.status == 200
    assert "<html" in plain.text
    assert stream.status == 101


def test_a_proxy_in_front_is_let_in_by_its_name() -> None:
    with serving(names=["monitor.example"]) as door:
        named = door.get(
            "/api/openapi.json", Host="monitor.example", Origin="https://monitor.example"
        )
        other = door.get("/api/openapi.json", Host="other.example")

    assert named.status == 200
    assert "server.allowedHosts" in other.error


@pytest.mark.slow
@pytest.mark.parametrize("how", LAUNCHERS)
def test_streamlits_own_setting_names_the_proxy(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".streamlit").mkdir()
    names = '["monitor.example", "localhost"]'
    (tmp_path / ".streamlit" / "config.toml").write_text(f"[server]\nallowedHosts = {names}\n")

    with launched(how, tmp_path) as (door, _):
        named = {"Host": "monitor.example", "Origin": "https://monitor.example"}
        page = door.get("/", **named)
        stream = door.get("/_stcore/stream", **UPGRADE, **named)
        other = door.get("/", Host="other.example")

    assert (page.status, stream.status, other.status) == (200, 101, 403)


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_a_read_only_monitor_takes_no_picture(method: str) -> None:
    with serving("0.0.0.0") as door:
        answer = door.ask(method, "/_stcore/upload_file/session/file", b"x" * 1000)

    assert answer.status == 403
    assert "read-only" in answer.error


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"dataset_names": ["../../etc"]}, 404),
        ({"dataset_names": ["/etc"]}, 404),
        ({"dataset_names": [".."]}, 404),
        ({"dataset_names": ["."]}, 404),
        ({"dataset_names": ["~"]}, 404),
        ({"dataset_names": [""]}, 404),
        ({"dataset_names": ["cats/"]}, 404),
        ({"dataset_names": ["\ud800"]}, 404),
        ({"dataset_names": ["cats\u0000"]}, 404),
        ({"dataset_names": ["list.txt"]}, 404),
        ({"dataset_names": ["cats", "cats"]}, 400),
        ({"dataset_names": []}, 400),
        ({"dataset_names": "cats"}, 400),
        ({"dataset_names": [1]}, 400),
        ({"dataset_names": [["cats"]]}, 400),
        ({"dataset_names": ["cats"] * 101}, 400),
        ({}, 400),
        ([], 400),
        (b"", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 60_000, 400),
        (b'{"dataset_names": ' + b"1" * 5000 + b"}", 400),
        ({**ORDER, "replace": True}, 400),
        ({**ORDER, "distributed": "require"}, 400),
        ({**ORDER, "distributed": 1}, 400),
        ({**ORDER, "distributed": None}, 400),
        ({**ORDER, "name": ""}, 400),
        ({**ORDER, "name": "a\nb"}, 400),
        ({**ORDER, "name": "\ud800"}, 400),
        ({**ORDER, "name": "a/b"}, 400),
        ({**ORDER, "name": "../b"}, 400),
        ({**ORDER, "name": ".b"}, 400),
        ({**ORDER, "name": None}, 400),
        ({**ORDER, "model": "local-dir:/etc"}, 400),
        ({**ORDER, "model": "hf-hub:some/body"}, 400),
        ({**ORDER, "model": 3}, 400),
        (b'{"dataset_names": ["' + b"x" * 10_000_000 + b'"]}', 413),
    ],
)
def test_a_body_that_is_not_allowed_starts_nothing(
    door: Door, cats: Path, body: Any, status: int
) -> None:
    (cats.parent / "list.txt").write_text("cats/a.jpg\n")

    answer = door.post("/api/build_index", body)

    assert answer.status == status
    assert answer.error
    assert nothing_was_started()


def test_what_is_wrong_with_a_name_is_said_in_words(door: Door, cats: Path) -> None:
    answer = door.post("/api/build_index", {**ORDER, "name": "a/b"})

    assert answer.error == (
        "name is not 'a/b'; use 1 to 200 characters on one line, without a slash and without a "
        "dot at the start"
    )


def half_a_body(port: int) -> socket.socket:
    """A request whose last bytes never come."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(
        b"POST /api/build_index HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    return connection


def test_a_body_that_does_not_come_is_not_waited_for(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "BODY_S", 0.5)

    begun = time.monotonic()
    with half_a_body(door.port) as connection:
        said = b"".join(iter(lambda: connection.recv(4096), b"")).decode()

    assert said.startswith("HTTP/1.1 408")
    assert "the body did not come in 0.5 s: 1 bytes did" in said
    assert time.monotonic() - begun < 5


@pytest.mark.slow
@pytest.mark.parametrize("how", LAUNCHERS)
def test_half_a_body_does_not_keep_the_monitor_alive(how: str, tmp_path: Path) -> None:
    with launched(how, tmp_path) as (door, process), half_a_body(door.port):
        assert door.get("/api/openapi.json").status == 200  # the body's first half is there too

        process.terminate()
        process.wait(timeout=8)


def test_while_a_build_is_being_started_others_are_answered_at_once(door: Door, cats: Path) -> None:
    begun = time.monotonic()
    with orders._starting:
        answers = [door.post("/api/build_index", ORDER) for _ in range(3)]
        metrics = door.get("/metrics")

    assert [answer.status for answer in answers] == [429] * 3
    assert answers[0].error == "another build is being started; try again in a moment"
    assert answers[0].headers["retry-after"] == "1"
    assert metrics.status == 200
    assert time.monotonic() - begun < 5
    assert nothing_was_started()


def test_a_body_without_a_length_is_cut_off_too(door: Door) -> None:
    parts = (b"x" * 10_000 for _ in range(100))

    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=60)
    with contextlib.closing(connection):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
            connection.request("POST", "/api/build_index", parts, headers, encode_chunked=True)
        status = connection.getresponse().status

    assert status == 413


# The token, and who may do what where.


def test_with_a_token_only_who_knows_it_changes_anything(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLKIT_MONITOR_TOKEN", "geheim")
    order = {"dataset_names": ["none"]}

    without = door.post("/api/build_index", order)
    wrong = door.post("/api/build_index", order, Authorization="Bearer falsch")
    right = door.post("/api/build_index", order, Authorization="Bearer geheim")

    assert [a.status for a in (without, wrong, right)] == [401, 401, 404]
    assert without.headers["www-authenticate"] == "Bearer"
    assert "geheim" not in without.text + wrong.text + right.text
    assert door.get("/api/runs").status == 200


def test_who_knows_the_token_may_call_us_by_any_name(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLKIT_MONITOR_TOKEN", "geheim")

    answer = door.get("/metrics", Host="proxy.example", Authorization="Bearer geheim")

    assert answer.status == 200


@pytest.mark.parametrize("listening_on", ["0.0.0.0", "192.0.2.7", "::", ""])
def test_where_others_reach_it_a_monitor_without_a_token_is_read_only(
    listening_on: str, monkeypatch: pytest.MonkeyPatch, cats: Path
) -> None:
    monkeypatch.setenv("REDIS_PORT", str(free_port()))
    with serving(listening_on) as door:
        refused = door.post("/api/build_index", ORDER)
        cancelled = door.post(f"/api/runs/{RUN}/cancel", {})
        read = door.get("/api/runs")
        monkeypatch.setenv("TOOLKIT_MONITOR_TOKEN", "geheim")
        order = {"dataset_names": ["none"]}
        allowed = door.post("/api/build_index", order, Authorization="Bearer geheim")

    assert (refused.status, cancelled.status, read.status) == (403, 403, 200)
    assert "read-only; set TOOLKIT_MONITOR_TOKEN" in refused.error
    assert allowed.status == 404
    assert nothing_was_started()


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_on_this_machine_alone_no_token_is_needed(address: str) -> None:
    assert read_only_reason(address) is None


# Runs.


def test_a_live_run_is_told_of_and_cancelled(door: Door) -> None:
    journal = a_run()
    journal.failures([{"path": "/x.jpg", "kind": "decode", "reason": "bad", "dataset": "cats"}])

    (listed,) = door.get("/api/runs").json
    one = door.get(f"/api/runs/{RUN}").json
    told = door.post(f"/api/runs/{RUN}/cancel", {})

    assert (listed["run_id"], listed["state"], listed["done"]) == (RUN, "running", 3)
    assert one == {**listed, "failures": one["failures"]}
    assert [row["path"] for row in one["failures"]] == ["/x.jpg"]
    assert told.status == 202
    assert told.json["run_id"] == RUN
    assert journal.is_cancelled
    journal.release()


def test_what_has_ended_cannot_be_cancelled(door: Door) -> None:
    a_run().end(RunState.DONE)

    answer = door.post(f"/api/runs/{RUN}/cancel", {})

    assert answer.status == 409
    assert "is done: there is nothing to stop" in answer.error


@pytest.mark.parametrize(
    "run_id", ["none", "..", "%2e%2e%2f", "a" * 300, "%00", "a%0a", "<script>"]
)
def test_a_run_that_is_not_there_is_not_found(door: Door, run_id: str) -> None:
    read = door.get(f"/api/runs/{run_id}")
    cancelled = door.post(f"/api/runs/{run_id}/cancel", {})

    assert (read.status, cancelled.status) == (404, 404)
    assert read.error
    assert cancelled.error


def test_an_index_that_is_being_built_is_a_conflict_with_its_run(door: Door, cats: Path) -> None:
    journal = a_run()
    folder = index_dir(config.resolve().data_dir, "cats")
    folder.mkdir(parents=True)

    with index_lock(folder, "cats", RUN):
        answer = door.post("/api/build_index", ORDER)

    assert answer.status == 409
    assert answer.json["run_id"] == RUN
    assert f"is being built by run {RUN}" in answer.error
    journal.release()


@pytest.mark.slow  # the model is loaded to say what it is
def test_a_run_that_fails_at_once_says_why(door: Door, cats: Path) -> None:
    for photo in cats.iterdir():
        photo.unlink()

    answer = door.post("/api/build_index", {**ORDER, "distributed": False})

    # Whether it failed before or after the answer is a matter of milliseconds.
    run_id = answer.json["run_id"]
    wait_until(lambda: door.get(f"/api/runs/{run_id}").json["state"] == "failed", "its end")
    assert answer.status in (202, 422)
    assert "there is no image in cats" in door.get(f"/api/runs/{run_id}").json["error"]


@pytest.mark.slow
def test_a_build_that_has_ended_leaves_no_process(door: Door, cats: Path) -> None:
    cheap = {"model": "test_vit", "pretrained": False, "distributed": False}

    answer = door.post("/api/build_index", {**ORDER, **cheap})

    url = answer.json["url"]
    wait_until(lambda: door.get(url).json["state"] == "done", "its end")
    wait_until(lambda: not _children(answer.json["run_id"]), "the end of its process", 10)


def _children(run_id: str) -> list[psutil.Process]:
    """This process's children that drive a run, or are zombies."""
    return [child for child in psutil.Process().children() if _drives(child, run_id)]


def _drives(child: psutil.Process, run_id: str) -> bool:
    try:
        return run_id in " ".join(child.cmdline())
    except psutil.ZombieProcess:
        return True
    except psutil.NoSuchProcess:  # it has just gone
        return False


@pytest.mark.slow
def test_a_build_outlives_the_monitor_that_started_it(
    cats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_PORT", str(free_port()))
    (cats / "broken.jpg").write_bytes(b"no picture")
    door = Door(free_port())
    monitor = subprocess.Popen(
        [sys.executable, "-P", "-c", SERVE, str(door.port)], start_new_session=True
    )
    try:
        wait_until(lambda: _listens(door), "the monitor")
        answer = door.post("/api/build_index", ORDER)
    finally:
        os.killpg(monitor.pid, signal.SIGKILL)
        monitor.wait()

    assert answer.status == 202, answer.text
    assert answer.json["url"] == f"/api/runs/{answer.json['run_id']}"
    (view,) = list_runs(runs_dir(config.resolve().data_dir))
    wait_until(lambda: not view.record().state.is_live, "the end of the build", 120)
    with serving() as later:
        run = later.get(answer.json["url"]).json
        text = later.get("/metrics").text
    assert (run["state"], run["index"], run["indexed"], run["failed"]) == ("done", "cats", 3, 1)
    assert "nothing listens there" in run["fallback_reason"]
    assert [Path(row["path"]).name for row in run["failures"]] == ["broken.jpg"]
    assert 'toolkit_images_embedded_total{road="local"} 3' in text
    assert "toolkit_images_failed_total 1" in text
    assert 'toolkit_batch_seconds_count{road="local"} 1' in text


def _listens(door: Door) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        return door.get("/api/runs").status == 200
    return False


# Health, metrics, and the description.


def test_health_is_the_doctors(door: Door) -> None:
    health = door.get("/api/health").json

    assert health["verdict"] == "local"
    redis = next(check for check in health["checks"] if check["name"] == "redis")
    assert redis["status"] == "fail"
    assert "toolkit cluster up" in redis["cure"]


def test_metrics_are_what_the_server_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as server, server.client(0) as broker, server.client(1) as backend:
        for name, value in server.settings_env().items():
            monkeypatch.setenv(name, value)
        register(backend, "box-1", state=WorkerState.BUSY)
        register(backend, "box-2", state=WorkerState.READY)
        waiting(broker, config.resolve(), 3)
        with serving() as door:
            answer = door.get("/metrics")

    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    assert "toolkit_server_up 1" in lines
    assert f'toolkit_queue_ready{{queue="{CATS}"}} 3' in lines
    assert f'toolkit_queue_unacked{{queue="{CATS}"}} 0' in lines
    assert 'toolkit_workers{state="busy"} 1' in lines
    assert 'toolkit_workers{state="ready"} 1' in lines
    assert 'toolkit_workers{state="dead"} 0' in lines
    assert "# TYPE toolkit_images_embedded_total counter" in lines


def test_metrics_without_a_server_say_that_it_is_down(door: Door) -> None:
    text = door.get("/metrics").text

    assert "toolkit_server_up 0" in text
    assert "toolkit_queue_ready" not in text


def test_the_description_tells_of_every_answer(door: Door) -> None:
    a_run().end(RunState.DONE)
    described = door.get("/api/openapi.json").json
    schemas = described["components"]["schemas"]

    (run,) = door.get("/api/runs").json
    one = door.get(f"/api/runs/{RUN}").json
    health = door.get("/api/health").json

    assert described == DESCRIPTION
    assert run.keys() == set(schemas["Run"]["required"])
    assert one.keys() == set(schemas["RunWithFailures"]["required"])
    assert health.keys() == set(schemas["Health"]["required"])
    for path, methods in described["paths"].items():
        for method in {"get", "post", "put", "delete", "options"} - methods.keys():
            answer = door.ask(method.upper(), path.replace("{run_id}", RUN))
            assert answer.status == 405
            assert answer.headers["allow"].lower() in methods
            assert answer.error


@pytest.mark.slow
def test_what_is_described_is_what_happens(door: Door) -> None:
    a_run().end(RunState.DONE)
    url = f"http://127.0.0.1:{door.port}/api/openapi.json"

    # Requests without end, valid ones and others, and every check that there is.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", url, "--checks=all"),
            *("--max-examples=30", "--seed=1", "--no-color", "--continue-on-failure"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stdout
    assert "Tested: 6" in done.stdout
    assert [run.folder.name for run in list_runs(runs_dir(config.resolve().data_dir))] == [RUN]


def test_what_is_not_there_is_no_page(door: Door) -> None:
    answer = door.get("/api/nothing")

    assert answer.status == 404
    assert "/api/openapi.json" in answer.error


def test_no_torch_and_no_streamlit_is_loaded() -> None:
    code = (
        "import sys, toolkit.monitor.http\n"
        "assert not {'torch', 'timm', 'streamlit'} & sys.modules.keys(), sys.modules.keys()"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
