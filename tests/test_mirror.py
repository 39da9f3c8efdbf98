from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.servers import Server, free_port
from toolkit import config
from toolkit.cluster import mirror
from toolkit.cluster.connection import Address
from toolkit.cluster.mirror import Mirror
from toolkit.cluster.protocol import Keys
from toolkit.driver import find
from toolkit.errors import RunNotFoundError, ServerError
from toolkit.journal import RunJournal
from toolkit.run_record import Accounting, RunRecord, RunState

KEYS = Keys("ours")
RUN = "20260101-000000-aaaaaa"


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def client(shared: Server) -> Iterator[redis.Redis]:
    with shared.client(1) as client:
        client.hset(KEYS.workers, "box-1", "{}")
        yield client
        # This server is the test's own: nobody else's keys can be on it.
        for key in client.scan_iter():
            client.delete(key)


def address_of(server: Server) -> Address:
    return Address(server.url, 0, 1, "a test")


def a_record(run_id: str = RUN, state: RunState = RunState.RUNNING) -> RunRecord:
    return RunRecord(
        run_id,
        "cats",
        state,
        stage="embed",
        done=3,
        total=9,
        started=1000.0,
        updated=1010.5,
        host="box",
        accounting=Accounting(found=9, pending=9),
        moves=[{"at": 1.5, "from": "workers", "to": "local", "batches": 2, "reason": "gone"}],
    )


def age(client: redis.Redis, run_id: str, seconds: float) -> None:
    """Make a record as old as it would be after that many seconds of silence."""
    entry = json.loads(client.hget(KEYS.runs, run_id) or "")
    client.hset(KEYS.runs, run_id, json.dumps({**entry, "at": entry["at"] - seconds}))


def test_a_record_is_read_back_as_it_was(shared: Server, client: redis.Redis) -> None:
    Mirror(address_of(shared), KEYS)(a_record())

    found = mirror.find_mirrored(client, KEYS, RUN)

    assert found == a_record()
    assert mirror.list_mirrored(client, KEYS) == [a_record()]
    assert mirror.find_mirrored(client, KEYS, "another") is None


def test_a_journal_is_followed_from_its_first_stage_to_its_end(
    shared: Server, client: redis.Redis, tmp_path: Path
) -> None:
    journal = RunJournal(tmp_path, RunRecord(RUN, "cats"))
    journal.add_sink(Mirror(address_of(shared), KEYS))

    journal.stage("embed", total=7)
    in_between = mirror.find_mirrored(client, KEYS, RUN)
    journal.end(RunState.DONE)

    assert in_between is not None
    assert (in_between.stage, in_between.total) == ("embed", 7)
    assert mirror.find_mirrored(client, KEYS, RUN) == journal.record


def test_nothing_is_written_where_no_worker_is_registered(
    shared: Server, client: redis.Redis
) -> None:
    client.delete(KEYS.workers)
    client.hset("theirs:workers", "box-1", "{}")

    Mirror(address_of(shared), KEYS)(a_record())
    Mirror(address_of(shared), KEYS)(a_record(state=RunState.DONE))

    assert list(client.scan_iter()) == [b"theirs:workers"]


def test_a_run_that_outlives_the_workers_still_gets_its_end(
    shared: Server, client: redis.Redis
) -> None:
    sink = Mirror(address_of(shared), KEYS)
    sink(a_record())
    client.delete(KEYS.workers)

    sink(a_record(state=RunState.DONE))

    (found,) = mirror.list_mirrored(client, KEYS)
    assert found.state == RunState.DONE


def test_two_namespaces_on_one_server_never_see_each_other(
    shared: Server, client: redis.Redis
) -> None:
    theirs = Keys("theirs")
    client.hset(theirs.workers, "box-1", "{}")
    Mirror(address_of(shared), theirs)(a_record())
    mirror.request_cancel(client, theirs, RUN)

    assert mirror.list_mirrored(client, KEYS) == []
    assert not mirror.is_cancelled(client, KEYS, RUN)
    assert len(mirror.list_mirrored(client, theirs)) == 1


def test_a_live_run_that_fell_silent_is_interrupted(shared: Server, client: redis.Redis) -> None:
    sink = Mirror(address_of(shared), KEYS)
    for run_id, state in (("a", RunState.RUNNING), ("b", RunState.RUNNING), ("c", RunState.DONE)):
        sink(a_record(run_id, state))
    age(client, "a", 61)
    age(client, "b", 50)
    age(client, "c", 61)

    found = mirror.list_mirrored(client, KEYS)

    assert [(r.run_id, r.state) for r in found] == [
        ("c", "done"),
        ("b", "running"),
        ("a", "interrupted"),
    ]
    assert found[2].error == "its process on box fell silent"


def test_a_silent_run_whose_key_is_kept_alive_goes_on(shared: Server, client: redis.Redis) -> None:
    Mirror(address_of(shared), KEYS)(a_record())
    age(client, RUN, 600)
    client.set(KEYS.run(RUN), "running")

    (found,) = mirror.list_mirrored(client, KEYS)

    assert found.state == RunState.RUNNING


def test_an_end_leaves_the_hundred_youngest_runs(shared: Server, client: redis.Redis) -> None:
    sink = Mirror(address_of(shared), KEYS)
    for n in range(103):
        sink(a_record(f"run-{n:03}"))
        age(client, f"run-{n:03}", 1000 - n)
    client.hset(KEYS.runs, "garbage", "{")

    sink(a_record("the-end", RunState.DONE))

    left = {record.run_id for record in mirror.list_mirrored(client, KEYS)}
    assert left == {"the-end", *(f"run-{n:03}" for n in range(4, 103))}
    assert client.hlen(KEYS.runs) == mirror.KEEP_RUNS
    assert 0 < client.ttl(KEYS.runs) <= mirror.KEEP_S


def test_an_end_forgets_what_is_a_week_old(shared: Server, client: redis.Redis) -> None:
    sink = Mirror(address_of(shared), KEYS)
    for run_id, seconds in (("old", 7 * 86_400 + 5), ("young", 7 * 86_400 - 60)):
        sink(a_record(run_id))
        age(client, run_id, seconds)

    sink(a_record("the-end", RunState.DONE))

    left = [record.run_id for record in mirror.list_mirrored(client, KEYS)]
    assert left == ["young", "the-end"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"[" * 50_000,
        b'{"at": 1, "record": null}',
        b'{"at": 1, "record": {"run_id": "bad", "index": "x", "state": "dreaming"}}',
        b'{"at": 1, "record": {"run_id": "bad", "index": "x", "state": "running"}}',
        b'{"at": 1, "record": {"run_id": 7, "index": "x", "state": "done", "accounting": {}}}',
        b'{"at": 1, "record": {"run_id": "bad", "index": "x", "state": "done", "accounting": {},'
        b' "updated": "now"}}',
        *(
            b'{"at": 1, "record": {"run_id": "bad", "index": "x", "state": "done", "accounting": {'
            b"}, %s}}" % odd
            for odd in (b'"batches": ["x"]', b'"moves": ["x"]', b'"road_seconds": {"local": NaN}')
        ),
    ],
)
def test_garbage_among_the_runs_is_passed_over(
    shared: Server, client: redis.Redis, garbage: bytes
) -> None:
    Mirror(address_of(shared), KEYS)(a_record())
    client.hset(KEYS.runs, "bad", garbage)

    assert mirror.list_mirrored(client, KEYS) == [a_record()]
    assert mirror.find_mirrored(client, KEYS, "bad") is None


@pytest.mark.parametrize(
    "odd",
    [
        {"images": {"local": 10**400}},
        {"batches": {"local": 10**400, "workers": 0}},
        {"batches": {}},
        {"batches": {"x": 1}},
        {"started": 1e20},
        {"started": "x"},
        {"started": -1.0},
        {"ended": "x"},
        {"updated": True},
        {"done": 1e308},
        {"done": 10**400},
        {"done": -1},
        {"done": "5", "total": "7"},
        {"index": None},
        {"stage": 5},
        {"host": 5},
        {"road": [1]},
        {"error": ["a"]},
        {"recall_at_10": "x"},
        {"embed_seconds": 1e300},
        {"accounting": {"failed": "abc"}},
        {"accounting": {"failed": [1]}},
        {"excluded_by": 5},
        {"excluded_by": {"rule": "many"}},
        {"losses": ["a", "b"]},
        {"losses": 5},
        {"losses": [1]},
        {"moves": [{"at": 1e308, "to": "local"}]},
        {"moves": [{"to": "local", "reason": 5}]},
        {"moves": [{"to": "local", "eta_s": [1, 1e308]}]},
        {"moves": [{"to": "local", "eta_s": []}]},
    ],
    ids=str,
)
def test_a_record_with_one_odd_part_is_passed_over(
    shared: Server, client: redis.Redis, odd: dict[str, Any]
) -> None:
    Mirror(address_of(shared), KEYS)(a_record())
    record = {**a_record("bad").to_json(), **odd}
    client.hset(KEYS.runs, "bad", json.dumps({"at": time.time(), "record": record}))

    assert mirror.list_mirrored(client, KEYS) == [a_record()]


@pytest.mark.parametrize("at", [-1.0, 1e20, 10**400, "x"], ids=str)
def test_a_record_of_no_time_is_passed_over(client: redis.Redis, at: object) -> None:
    entry = {"at": at, "record": a_record("bad").to_json()}
    client.hset(KEYS.runs, "bad", json.dumps(entry))

    assert mirror.list_mirrored(client, KEYS) == []


def test_how_long_a_run_said_nothing_is_known(shared: Server, client: redis.Redis) -> None:
    Mirror(address_of(shared), KEYS)(a_record())
    age(client, RUN, 7.0)

    ((silent_s, record),) = mirror.list_news(client, KEYS)

    assert 7.0 <= silent_s < 9.0
    assert record == a_record()


def test_a_key_of_another_type_is_passed_over_and_never_hurts_the_run(
    shared: Server, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    client.set(KEYS.runs, "a text")
    caplog.set_level(logging.INFO)

    Mirror(address_of(shared), KEYS)(a_record())

    assert mirror.list_mirrored(client, KEYS) == []
    assert f"run {RUN} is not mirrored" in caplog.text


def test_a_record_of_a_newer_release_is_read_as_far_as_it_is_understood(
    shared: Server, client: redis.Redis
) -> None:
    Mirror(address_of(shared), KEYS)(a_record())
    entry = json.loads(client.hget(KEYS.runs, RUN) or "")
    entry["record"]["colour"] = "red"
    client.hset(KEYS.runs, RUN, json.dumps({**entry, "sign": "x"}))

    assert mirror.list_mirrored(client, KEYS) == [a_record()]


def test_a_wish_to_cancel_is_seen_and_expires(client: redis.Redis) -> None:
    before = mirror.is_cancelled(client, KEYS, RUN)

    mirror.request_cancel(client, KEYS, RUN)

    assert (before, mirror.is_cancelled(client, KEYS, RUN)) == (False, True)
    assert not mirror.is_cancelled(client, KEYS, RUN + "x")
    assert 86_000 < client.ttl(KEYS.cancel(RUN)) <= 86_400


def test_a_server_that_is_absent_costs_nothing() -> None:
    sink = Mirror(Address(f"redis://127.0.0.1:{free_port()}", 0, 1, "a test"), KEYS)
    begun = time.monotonic()

    for _ in range(20):
        sink(a_record())
    sink(a_record(state=RunState.DONE))

    assert time.monotonic() - begun < 0.5


@pytest.mark.slow
def test_a_frozen_server_costs_one_answer_and_then_nothing_for_a_while() -> None:
    with Server() as server, server.client(1) as client:
        client.hset(KEYS.workers, "box-1", "{}")
        warm, cold = Mirror(address_of(server), KEYS), Mirror(address_of(server), KEYS)
        warm(a_record())
        server.freeze()
        costs = []
        for sink in (warm, cold):
            for _ in range(10):
                begun = time.monotonic()
                sink(a_record())
                costs.append(time.monotonic() - begun)
        server.thaw()

        warm(a_record(state=RunState.DONE))

        first = [costs[0], costs[10]]
        assert all(0.9 < cost < 1.5 for cost in first), costs
        assert sum(costs) - sum(first) < 0.1
        (found,) = mirror.list_mirrored(client, KEYS)
        assert found == dataclasses.replace(a_record(), state=RunState.DONE)


def test_a_frozen_server_does_not_say_that_there_is_no_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Server() as server:
        for name, value in server.settings_env().items():
            monkeypatch.setenv(name, value)
        settings = config.resolve()
        with pytest.raises(RunNotFoundError, match="toolkit runs"):
            find(RUN, settings)
        server.freeze()

        with pytest.raises(ServerError, match="does not answer in time"):
            find(RUN, settings)

        server.thaw()


def test_without_a_server_there_is_no_other_place_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", str(free_port()))

    with pytest.raises(RunNotFoundError, match=RUN):
        find(RUN, config.resolve())
