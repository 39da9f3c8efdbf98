"""Servers that are away, frozen, emptied or full while a build runs: the result never shows it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import toolkit as tk
from tests.clusters import (
    ROOT,
    Running,
    Worker,
    World,
    assert_books,
    assert_clean,
    assert_empty,
    assert_same_table,
    built,
    write_slow,
)
from tests.servers import Certificates, Relay, Server, black_hole, free_port
from tests.support import CHEAP, wait_until
from toolkit.cluster.amqp import MOST_RECONNECT_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the embedded server needs POSIX"),
]

N_PHOTOS = 192

#: Three times 1.5 s, 3 s, 10 s and 2 s: what may pass until local work begins, until a frozen
#: server is noticed, until the workers are used again, and until an interpreter has ended.
LOCAL_S, NOTICED_S, USED_AGAIN_S, EXIT_S = 4.5, 9.0, 30.0, 6.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        write_slow(world.datasets / "photos", N_PHOTOS)
        yield world


@pytest.fixture(scope="module")
def expected(world: World) -> list[tuple[Any, ...]]:
    """The index that this machine makes without workers."""
    return world.reference("photos")


@pytest.fixture(scope="module")
def worker(world: World) -> Worker:
    return world.worker()


@pytest.fixture
def whole(world: World, worker: Worker, expected: object) -> Iterator[World]:
    """The world with a worker that is ready and a server that answers, before and after."""
    with world.entered():
        worker.wait_until_usable()
        yield world


def assert_as_if_local(world: World, run: Running, expected: list[tuple[Any, ...]]) -> None:
    """The whole of what a fault must leave as it was."""
    result = run.result()
    assert_books(result)
    assert_same_table(built(result.record.index), expected)
    assert_clean(world, run.run_id)
    assert_empty(world)


def events_of(run_id: str, kind: str) -> list[dict[str, Any]]:
    """What a run's journal says of one kind of event."""
    return [event for event in tk.attach(run_id)._view.events() if event["event"] == kind]


def at_work(world: World, run: Running) -> None:
    """Wait until a worker has a batch of the run."""
    run.until(lambda: bool(world.claims(run.run_id)), "a batch at work")


@contextlib.contextmanager
def absent(folder: Path) -> Iterator[dict[str, str]]:
    yield {"REDIS_PORT": str(free_port())}


@contextlib.contextmanager
def unreachable(folder: Path) -> Iterator[dict[str, str]]:
    with black_hole() as port:
        yield {"REDIS_PORT": str(port)}


@contextlib.contextmanager
def wrong_password(folder: Path) -> Iterator[dict[str, str]]:
    with Server(password="right") as server:
        yield {"REDIS_URL": f"redis://:wrong@127.0.0.1:{server.port}"}


@contextlib.contextmanager
def plain_word_to_tls(folder: Path) -> Iterator[dict[str, str]]:
    with Server(certificates=Certificates.make(folder / "tls")) as server:
        yield {"REDIS_PORT": str(server.port)}


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[dict[str, str]]:
    with Server() as server:
        server.freeze()
        yield {"REDIS_PORT": str(server.port)}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (absent, "nothing listens there"),
        (unreachable, "does not answer in time"),
        (wrong_password, "wants a password, another one"),
        (plain_word_to_tls, "speaks TLS and the other does not"),
        (frozen, "does not answer in time"),
    ],
)
def test_build_begins_locally_at_once_and_names_the_cause_once(
    world: World,
    expected: list[tuple[Any, ...]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Path], contextlib.AbstractContextManager[dict[str, str]]],
    words: str,
) -> None:
    with world.entered(), fault(tmp_path) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)

        run = tk.build_index("photos", name="photos", limit=20, **CHEAP)

        (road,), (plan,) = events_of(run.run_id, "road"), events_of(run.run_id, "plan")
        assert_books(run)
        assert_same_table(built("photos"), expected[:20])
    assert road["at"] - plan["at"] < LOCAL_S
    assert (run.record.batches["workers"], run.record.moves) == (0, [])
    assert words in str(run.record.fallback_reason)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert words in warnings[0]


def test_frozen_server_is_noticed_and_used_again_once_it_thaws(
    whole: World, expected: list[tuple[Any, ...]]
) -> None:
    run = Running("photos", name="photos")
    at_work(whole, run)

    whole.server.freeze()
    try:
        run.until(lambda: run.build.record.road == "local", "the local road", NOTICED_S)
    finally:
        whole.server.thaw()
    run.until(lambda: run.build.record.road == "workers", "the workers", USED_AGAIN_S)

    assert_as_if_local(whole, run, expected)
    moves = [(move["from"], move["to"]) for move in run.build.record.moves]
    assert moves[:2] == [("workers", "local"), ("local", "workers")]
    assert "does not answer in time" in run.build.record.moves[0]["reason"]


def test_server_that_is_killed_and_restarted_three_times_loses_nothing(
    whole: World, expected: list[tuple[Any, ...]]
) -> None:
    # So many that local work does not end before the workers are connected again.
    write_slow(whole.datasets / "many", 5 * N_PHOTOS)
    run = Running("many", name="many")
    for _ in range(3):
        at_work(whole, run)

        whole.server.restart()

    run.until(lambda: bool(whole.claims(run.run_id)), "the workers", USED_AGAIN_S)
    result = run.result()
    assert_books(result)
    assert [row[-1] for row in built("many")[:N_PHOTOS]] == [row[-1] for row in expected]
    assert result.record.batches["workers"] > 0
    assert_clean(whole, run.run_id)
    assert_empty(whole)


def test_server_that_keeps_its_data_gives_out_nothing_twice_after_a_restart(
    world: World, expected: list[tuple[Any, ...]]
) -> None:
    with World(appendonly="yes") as other, other.entered():
        other.worker(env={"TOOLKIT_WORKER_ROOTS": "/tmp"})
        run = Running(world.datasets / "photos", name="photos")
        at_work(other, run)

        other.server.restart()

        assert_as_if_local(other, run, expected)
        assert run.build.accounting.embedded == N_PHOTOS


def test_answer_that_meets_a_dead_server_is_not_lost_for_good(
    whole: World, expected: list[tuple[Any, ...]]
) -> None:
    run = Running("photos", name="photos")
    at_work(whole, run)

    # Away for longer than the batch takes: its answer finds nobody.
    whole.server.kill()
    run.until(lambda: run.build.record.road == "local", "the local road", NOTICED_S)
    run.until(lambda: run.build.record.batches["local"] > 0, "a batch of this machine")
    whole.server.start()

    run.until(lambda: run.build.record.road == "workers", "the workers", USED_AGAIN_S)
    assert_as_if_local(whole, run, expected)


def test_worker_does_not_stay_away_the_longer_the_server_was(
    whole: World, worker: Worker, expected: list[tuple[Any, ...]]
) -> None:
    tries, connects = worker.log.count("Trying again"), worker.log.count("Connected to redis")
    whole.server.kill()
    # Celery's own steps grow by two seconds with each.
    wait_until(lambda: worker.log.count("Trying again") >= tries + 4, "four tries to connect", 30)
    whole.server.start()
    is_back = lambda: worker.log.count("Connected to redis") > connects  # noqa: E731  # one use
    wait_until(is_back, "the worker's connection", 3 * MOST_RECONNECT_S)
    worker.wait_until_usable()

    run = Running("photos", name="photos")

    assert_as_if_local(whole, run, expected)
    assert run.build.record.batches["local"] == 0
    assert "Trying again in 2.00 seconds" in worker.log
    assert "Trying again in 4.00 seconds" not in worker.log


#: A notebook that outlives its server; it says when it has done all it was asked.
NOTEBOOK = """
import json, sys, time
import toolkit as tk
run = tk.build_index("photos", name="photos", model="test_vit", pretrained=False)
print(json.dumps({"state": run.state, "batches": run.record.batches, "at": time.time()}))
"""


def test_server_that_dies_for_good_keeps_neither_the_build_nor_the_interpreter(
    world: World, expected: list[tuple[Any, ...]]
) -> None:
    with World() as other, other.entered():
        (other.datasets / "photos").mkdir()
        worker = other.worker()
        write_slow(other.datasets / "photos", N_PHOTOS)
        notebook = subprocess.Popen(
            [sys.executable, "-c", NOTEBOOK],
            env={**os.environ, "PYTHONPATH": f"{other.env['PYTHONPATH']}{os.pathsep}{ROOT}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        with notebook:
            wait_until(lambda: "images" in worker.log, "a batch at work")
            other.server.kill()
            said, _ = notebook.communicate(timeout=120)
            ended_at = time.time()

        said = json.loads(said)
        vectors = [row[-1] for row in built("photos")]
        other.server.start()
    assert (said["state"], notebook.returncode) == ("done", 0)
    assert said["batches"]["local"] > 0
    assert ended_at - said["at"] < EXIT_S
    assert vectors == [row[-1] for row in expected]


def flush(world: World, run: Running) -> None:
    # By somebody else, who should not: this package never does.
    with world.server.client() as client:
        client.flushall()


def delete_queue(world: World, run: Running) -> None:
    def deleted() -> bool:
        waiting = list(broker.scan_iter(f"{world.keys.prefix}v1.*"))
        return bool(waiting and broker.delete(*waiting))

    with world.server.client() as broker:
        # The workers may have taken what there was before the next one is sent.
        run.until(deleted, "a batch that waits")


def send_garbage(world: World, run: Running) -> None:
    answers = world.keys.answers(run.run_id)
    rubbish = ["", "[]", "nonsense", '{"batch": 1}', '{"batch": "x"}', "null"]
    claim = {"type": "claim", "batch": 999, "attempt": 1, "worker": "nobody"}
    done = {"type": "done", "batch": 0, "attempt": 1, "worker": "nobody", "unseen": []}
    with world.server.client(1) as backend:
        backend.rpush(answers, *rubbish, json.dumps(claim), json.dumps({**done, "outcome": {}}))


@pytest.mark.parametrize("harm", [flush, delete_queue, send_garbage])
def test_batch_goes_out_again_whatever_is_done_to_the_keys(
    whole: World, expected: list[tuple[Any, ...]], harm: Callable[[World, Running], None]
) -> None:
    run = Running("photos", name="photos")
    at_work(whole, run)

    harm(whole, run)
    at = time.monotonic()

    assert_as_if_local(whole, run, expected)
    assert time.monotonic() - at < USED_AGAIN_S
    assert run.build.record.batches["workers"] >= 2


def test_batch_whose_bytes_are_gone_goes_out_again(
    whole: World, expected: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    # Outside of the worker's folders, so that it goes as bytes.
    write_slow(tmp_path / "photos", N_PHOTOS)
    run = Running(tmp_path / "photos", name="photos")

    def blobs() -> list[bytes]:
        with whole.server.client(1) as backend:
            return list(backend.scan_iter(f"{whole.keys.run(run.run_id)}:blob:*"))

    run.until(lambda: len(blobs()) > 64, "bytes that wait for a worker")
    with whole.server.client(1) as backend:
        backend.delete(*blobs())

    result = run.result()
    assert_books(result)
    assert [row[-1] for row in built("photos")] == [row[-1] for row in expected]
    assert "gone from the server" in result.logs()
    assert result.record.batches["local"] == 0
    assert_clean(whole, run.run_id)
    assert_empty(whole)


def test_full_server_moves_the_work_here_and_back_once_there_is_room(
    whole: World, worker: Worker, expected: list[tuple[Any, ...]]
) -> None:
    run = Running("photos", name="photos")
    at_work(whole, run)

    with whole.server.client() as client:
        client.config_set("maxmemory", "1")
    try:
        run.until(lambda: run.build.record.road == "local", "the local road", NOTICED_S)
    finally:
        with whole.server.client() as client:
            client.config_set("maxmemory", "0")

    assert_as_if_local(whole, run, expected)
    assert "memory is full" in str(run.build.record.fallback_reason)
    worker.wait_until_usable()


def test_connections_that_are_half_open_lose_nothing(
    whole: World, expected: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Relay(whole.server.plain_port) as relay:
        env = {"REDIS_PORT": str(relay.port), "TOOLKIT_NAMESPACE": "relayed"}
        worker = whole.worker(env=env)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        run = Running("photos", name="photos")
        at_work(whole, run)

        relay.swallow()

        assert_as_if_local(whole, run, expected)
        worker.reap()
