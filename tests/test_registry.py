from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import pytest
import redis

from tests.servers import Server
from tests.support import wait_until
from toolkit.cluster import registry
from toolkit.cluster.judge import judge
from toolkit.cluster.protocol import PROTOCOL, Keys, queue_name
from toolkit.cluster.registry import WorkerInfo, WorkerState, WorkerView, WorkInfo

KEYS = Keys("ours")
CATS = "c" * 64
DOGS = "d" * 64


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client
        # This server is the test's own: nobody else's keys can be on it.
        for key in client.scan_iter():
            client.delete(key)


def an_info(name: str = "box-1", **changes: object) -> WorkerInfo:
    info = WorkerInfo(
        id=name,
        pid=17,
        host="box",
        version="0.1.0",
        protocol=PROTOCOL,
        pool="solo",
        queues=(queue_name(CATS),),
        encoders={CATS: "test_vit"},
        visibility_timeout_s=660.0,
        supervised=True,
        roots=("/photos",),
        beat_s=2.0,
        ttl_s=6.0,
        started_s=12.5,
        reason="its model",
    )
    return dataclasses.replace(info, **changes)  # type: ignore[arg-type]


def a_work(**changes: object) -> WorkInfo:
    work = WorkInfo(
        pid=18,
        state=WorkerState.BUSY,
        device="cpu",
        run="20260101-000000-abcdef",
        batch=7,
        done=3,
        busy_s=1.5,
        progress_s=0.5,
        images=640,
        rate=21.5,
        formats={"JPEG": "aa", "PNG": "bb"},
        golden=(CATS,),
        encoders=(CATS,),
    )
    return dataclasses.replace(work, **changes)  # type: ignore[arg-type]


def register(client: redis.Redis, name: str, keys: Keys = KEYS, **changes: object) -> None:
    registry.announce(client, keys, an_info(name, **changes))
    registry.announce_work(client, keys, name, a_work(), 6.0)


def states(client: redis.Redis, *, dead: bool = True) -> dict[str, str]:
    return {view.id: view.state for view in registry.list_workers(client, KEYS, dead=dead)}


def test_what_a_worker_says_is_read_back(client: redis.Redis) -> None:
    registry.announce(client, KEYS, an_info())
    registry.announce_work(client, KEYS, "box-1", a_work(), 6.0)

    (view,) = registry.list_workers(client, KEYS)

    assert (view.info, view.work, view.state) == (an_info(), a_work(), "busy")
    assert (view.pid, view.host, view.device, view.reason) == (17, "box", "cpu", "its model")
    assert 0 <= view.beat_age_s < 2


def test_nobody_is_registered_on_an_empty_server(client: redis.Redis) -> None:
    assert registry.list_workers(client, KEYS, dead=True) == []


def test_the_age_of_a_beat_comes_from_its_time_to_live(client: redis.Redis) -> None:
    register(client, "box-1")
    client.pexpire(KEYS.worker("box-1"), 2000)

    (view,) = registry.list_workers(client, KEYS)

    # 6 s to live at the beat, 2 s left now.
    assert view.beat_age_s == pytest.approx(4.0, abs=0.5)


def test_a_worker_starts_until_its_embedding_process_speaks(client: redis.Redis) -> None:
    registry.announce(client, KEYS, an_info("silent"))
    registry.announce(client, KEYS, an_info("loading"))
    registry.announce_work(client, KEYS, "loading", WorkInfo(reason="weights"), 6.0)

    silent, loading = sorted(registry.list_workers(client, KEYS), key=lambda v: v.id, reverse=True)

    assert (silent.state, silent.reason) == ("starting", "its model")
    assert (loading.state, loading.reason) == ("starting", "weights")


def test_a_worker_that_consumes_is_ready_though_the_server_was_emptied(
    client: redis.Redis,
) -> None:
    registry.announce(client, KEYS, an_info("box-1", reason=None))

    assert states(client) == {"box-1": "ready"}


def test_a_worker_whose_embedding_process_fell_silent_is_stale(client: redis.Redis) -> None:
    register(client, "box-1")
    client.pexpire(KEYS.work("box-1"), 1)

    wait_until(lambda: states(client) == {"box-1": "stale"}, "the worker being stale", 5)

    # What it did last is still known.
    assert registry.list_workers(client, KEYS)[0].work == a_work()


def test_a_worker_is_dead_once_its_time_to_live_is_over(client: redis.Redis) -> None:
    register(client, "gone", ttl_s=0.05)
    register(client, "here")

    wait_until(lambda: states(client)["gone"] == "dead", "the worker being dead", 5)

    assert states(client, dead=False) == {"here": "busy"}


def test_the_long_dead_are_forgotten(client: redis.Redis) -> None:
    now_s = client.time()[0]
    for name, silent_s in (("recent", 590), ("old", 610)):
        register(client, name)
        client.delete(KEYS.worker(name))
        text = json.dumps({**an_info(name).to_json(), "last_seen": now_s - silent_s})
        client.hset(KEYS.workers, name, text)

    listed = registry.list_workers(client, KEYS, dead=True)

    assert [(view.id, round(view.beat_age_s, -1)) for view in listed] == [("recent", 590)]
    assert set(client.hkeys(KEYS.workers)) == {b"recent", b"recent:work"}


def test_the_last_words_of_an_embedding_process_go_with_its_worker(client: redis.Redis) -> None:
    register(client, "box-1")
    registry.withdraw(client, KEYS, "box-1")
    registry.announce_work(client, KEYS, "box-1", a_work(), 6.0)

    registry.list_workers(client, KEYS)

    assert client.hlen(KEYS.workers) == 0


def test_two_namespaces_on_one_server_never_see_each_other(client: redis.Redis) -> None:
    theirs = Keys("theirs")
    register(client, "box-1")
    register(client, "box-1", theirs)

    registry.withdraw(client, KEYS, "box-1")

    assert registry.list_workers(client, KEYS, dead=True) == []
    assert [v.state for v in registry.list_workers(client, theirs)] == ["busy"]


def test_a_worker_that_is_buried_is_dead_at_once_and_says_how_it_ended(
    client: redis.Redis,
) -> None:
    register(client, "box-1")

    registry.bury(client, KEYS, "box-1", "was killed by SIGKILL after 7 s")

    (view,) = registry.list_workers(client, KEYS, dead=True)
    told = judge(view, CATS, "test_vit", visibility_timeout_s=660)
    assert (view.state, registry.list_workers(client, KEYS)) == ("dead", [])
    assert "was killed by SIGKILL after 7 s; its supervisor starts another one" in str(told)
    assert {key.decode() for key in client.scan_iter()} == {"ours:workers"}


def test_a_worker_that_withdraws_leaves_no_key_and_no_other_worker_notices(
    client: redis.Redis,
) -> None:
    vectors = np.ones((2, 4), np.float32)
    for name in ("box-1", "box-2"):
        register(client, name)
        registry.publish_golden(client, KEYS, name, CATS, vectors, 60)

    registry.withdraw(client, KEYS, "box-1")

    left = {key.decode() for key in client.scan_iter()}
    assert left == {
        "ours:workers",
        "ours:worker:box-2",
        "ours:worker:box-2:work",
        KEYS.golden("box-2", CATS),
    }
    assert states(client) == {"box-2": "busy"}


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[1, 2]",
        b'"text"',
        b"{",
        b"[" * 100_000,
        b'{"last_seen": NaN, "ttl_s": Infinity, "pid": "x", "queues": 3, "encoders": [1]}',
        b'{"last_seen": 1' + b"0" * 400 + b', "encoders": {"a": {}}}',
    ],
)
def test_garbage_in_the_registry_is_passed_over(client: redis.Redis, garbage: bytes) -> None:
    register(client, "box-1")
    client.hset(KEYS.workers, "bad", garbage)
    client.hset(KEYS.workers, b"\xff\xfe", garbage)
    client.hset(KEYS.workers, "bad:work", garbage)
    client.set(KEYS.worker("bad"), garbage)
    client.lpush(KEYS.work("bad"), garbage)

    listed = registry.list_workers(client, KEYS)

    assert [view.id for view in listed] == ["box-1"]


def test_keys_of_another_type_are_passed_over(client: redis.Redis) -> None:
    client.lpush(KEYS.workers, "not a hash")
    client.lpush(KEYS.golden("box-1", CATS), "not a blob")

    assert registry.list_workers(client, KEYS, dead=True) == []
    assert registry.read_golden(client, KEYS, "box-1", CATS) is None


def test_a_worker_of_a_newer_release_is_listed_with_what_is_understood(
    client: redis.Redis,
) -> None:
    register(client, "box-1")
    newer = {**an_info().to_json(), "protocol": 9, "pool": {"kind": "new"}, "colour": "red"}
    client.hset(KEYS.workers, "box-1", json.dumps(newer))
    client.hset(KEYS.workers, "box-1:work", json.dumps({"state": "dreaming", "images": 5}))

    (view,) = registry.list_workers(client, KEYS)

    assert view.info == an_info(protocol=9, pool="")
    assert (view.work, view.state) == (WorkInfo(images=5), "starting")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, "6", True, None])
def test_what_is_no_number_is_not_taken_for_one(number: object) -> None:
    info = WorkerInfo.from_json({"id": "box-1", "ttl_s": number})

    assert info == WorkerInfo(id="box-1")


def test_the_list_takes_two_round_trips(client: redis.Redis) -> None:
    for n in range(5):
        register(client, f"box-{n}")
    before = client.info("stats")["total_reads_processed"]

    listed = registry.list_workers(client, KEYS)

    # The server reads once a round trip; asking for the figure is one more.
    assert client.info("stats")["total_reads_processed"] - before == 2 + 1
    assert len(listed) == 5


def test_golden_vectors_are_read_back_to_the_bit(client: redis.Redis) -> None:
    vectors = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    registry.publish_golden(client, KEYS, "box-1", CATS, vectors, 60)

    read = registry.read_golden(client, KEYS, "box-1", CATS)

    assert read is not None
    assert (read.dtype, read.shape, read.tobytes()) == (np.float32, (3, 5), vectors.tobytes())
    assert registry.read_golden(client, KEYS, "box-1", DOGS) is None
    assert registry.read_golden(client, KEYS, "box-2", CATS) is None


@pytest.mark.parametrize("blob", [b"", b"short", b"\xff" * 8, b"\2\0\0\0\2\0\0\0" + b"\0" * 15])
def test_golden_vectors_of_the_wrong_length_are_none(client: redis.Redis, blob: bytes) -> None:
    client.set(KEYS.golden("box-1", CATS), blob)

    assert registry.read_golden(client, KEYS, "box-1", CATS) is None


def test_golden_vectors_are_renewed_and_what_is_gone_is_named(client: redis.Redis) -> None:
    registry.publish_golden(client, KEYS, "box-1", CATS, np.ones((1, 2), np.float32), 5)

    gone = registry.renew_golden(client, KEYS, "box-1", [CATS, DOGS], 500)

    assert gone == [DOGS]
    assert client.ttl(KEYS.golden("box-1", CATS)) > 400


def a_view(
    work: WorkInfo | None = None, *, is_working: bool = True, **changes: object
) -> WorkerView:
    return WorkerView("box-1", an_info(**changes), work, True, is_working, 0.5)


def verdict(view: WorkerView) -> str | None:
    return judge(view, CATS, "test_vit", visibility_timeout_s=660.0)


@pytest.mark.parametrize("state", [WorkerState.READY, WorkerState.BUSY])
def test_a_worker_that_is_ready_or_busy_can_serve_its_encoder(state: WorkerState) -> None:
    assert verdict(a_view(a_work(state=state))) is None


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (a_view(a_work(), protocol=2, version="0.9"), "speaks protocol 2 (release 0.9)"),
        (a_view(a_work(), encoders={DOGS: "resnet18"}), "`toolkit worker --model test_vit`"),
        (
            a_view(a_work(), encoders={DOGS: "test_vit"}),
            "with other weights, preprocessing or precision",
        ),
        (a_view(a_work(), queues=("v1.none",)), f"consumes v1.none, not {queue_name(CATS)}"),
        (a_view(a_work(), visibility_timeout_s=60.0), "the same CELERY_TASK_TIME_LIMIT"),
        (a_view(None, encoders={}, queues=()), "waits for its model"),
        (a_view(None, reason=None, encoders={}, queues=()), "waits for its model to be loaded"),
        (a_view(a_work(state=WorkerState.REFUSED, reason="no weights")), "refuses to work: no w"),
        (a_view(a_work(), is_working=False), "over batch 7 of run 20260101-000000-abcdef"),
        (
            WorkerView("box-1", an_info(), a_work(), False, False, 61.0),
            "has been silent for 61 s",
        ),
    ],
)
def test_a_worker_that_cannot_serve_is_told_apart(view: WorkerView, words: str) -> None:
    said = verdict(view)

    assert said is not None
    assert words in said
    assert "worker box-1 (pid 17 on box)" in said
