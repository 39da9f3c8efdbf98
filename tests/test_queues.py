from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis

from tests.servers import Server
from toolkit import config
from toolkit.cluster import queues
from toolkit.cluster.app import create_app
from toolkit.cluster.connection import Address, resolve_address
from toolkit.cluster.protocol import EMBED_TASK, Keys, queue_name
from toolkit.cluster.queues import PRIORITIES

KEYS = Keys("ours")
CATS, DOGS = queue_name("c" * 64), queue_name("d" * 64)
RUN, OTHER = "20260101-000000-aaaaaa", "20260101-000000-bbbbbb"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(params=[(0, 1), (0, 0)], ids=["two databases", "one database"])
def ends(request: pytest.FixtureRequest, server: Server) -> Iterator[Ends]:
    """The two databases, and Celery's own ways to send and to take."""
    ends = Ends(server, *request.param)
    yield ends
    ends.close()


class Ends:
    def __init__(self, server: Server, broker_db: int, backend_db: int) -> None:
        self.server, self.databases = server, (broker_db, backend_db)
        self.broker, self.backend = server.client(broker_db), server.client(backend_db)
        self._open: list[Any] = []
        self._apps: dict[str, Any] = {}

    def app(self, namespace: str = "ours") -> Any:
        if namespace not in self._apps:
            settings = config.resolve(
                redis_host=self.server.host,
                redis_port=self.server.port,
                redis_broker_db=self.databases[0],
                redis_backend_db=self.databases[1],
                namespace=namespace,
            )
            self._apps[namespace] = create_app(settings)
        return self._apps[namespace]

    def send(
        self, task_id: str, queue: str = CATS, namespace: str = "ours", **options: Any
    ) -> None:
        self.app(namespace).send_task(
            EMBED_TASK, kwargs={"batch": task_id}, task_id=task_id, queue=queue, **options
        )

    def take(self, n: int = 1, queue: str = CATS, namespace: str = "ours") -> list[Any]:
        """Take messages as a worker does that never acknowledges them."""
        connection = self.app(namespace).connection()
        self._open.append(connection)
        taken: list[Any] = []
        consumer = kombu.Consumer(
            connection.channel(),
            [self.app(namespace).amqp.queues[queue]],
            callbacks=[lambda _, message: taken.append(message)],
            accept=["json"],
        )
        consumer.qos(prefetch_count=n)
        consumer.consume()
        while len(taken) < n:
            connection.drain_events(timeout=5)
        return taken

    def close(self) -> None:
        # Channels give back what they hold while their server still answers.
        for connection in self._open:
            connection.close()
        for app in self._apps.values():
            app.close()
        for client in (self.broker, self.backend):
            # This server is the test's own: nobody else's keys can be on it.
            for key in client.scan_iter():
                client.delete(key)
            client.close()


def everything(client: redis.Redis) -> dict[bytes, bytes | None]:
    return {key: client.dump(key) for key in client.scan_iter()}


def ids(ends: Ends, keys: Keys = KEYS) -> list[str]:
    return [message.id for message in queues.messages(ends.broker, keys)]


def test_what_waits_and_what_is_held_are_counted_apart(ends: Ends) -> None:
    for n, priority in enumerate((0, 0, 3, 5, 9)):
        ends.send(f"{RUN}/{n}/1", priority=priority)
    ends.take(1)

    depth = queues.depth(ends.broker, KEYS, CATS)

    # 5 is counted with 3; one of priority 0 was taken.
    assert depth.by_priority == {0: 1, 3: 2, 6: 0, 9: 1}
    assert (depth.ready, depth.unacked) == (4, 1)


def test_every_queue_with_messages_is_found_once_by_its_name(ends: Ends) -> None:
    ends.send(f"{RUN}/1/1", CATS, priority=0)
    ends.send(f"{RUN}/2/1", CATS, priority=9)
    ends.send(f"{RUN}/3/1", DOGS)
    ends.take(1, DOGS)
    ends.send("somebody's", "celery")
    ends.send(f"{OTHER}/1/1", CATS, namespace="theirs")

    found = queues.queues(ends.broker, KEYS)

    assert [(q.queue, q.ready, q.unacked) for q in found] == [(CATS, 2, 0), (DOGS, 0, 1)]


def n_scans(client: redis.Redis) -> int:
    return int(client.info("commandstats").get("cmdstat_scan", {}).get("calls", 0))


def test_a_database_is_searched_once_in_a_while(ends: Ends) -> None:
    ends.send(f"{RUN}/1/1", CATS)
    known, before = queues.KnownQueues(), n_scans(ends.broker)
    known.depths(ends.broker, KEYS)
    after = n_scans(ends.broker)
    ends.send(f"{RUN}/2/1", CATS)
    ends.send(f"{RUN}/3/1", DOGS)

    consumed, unknown = (known.depths(ends.broker, KEYS, names) for names in ([DOGS], []))

    assert [(q.queue, q.ready) for q in consumed] == [(CATS, 2), (DOGS, 1)]
    assert unknown == consumed
    assert after > before
    assert n_scans(ends.broker) == after


def test_a_queue_of_which_workers_hold_messages_is_known_without_a_search(ends: Ends) -> None:
    known = queues.KnownQueues()
    assert known.depths(ends.broker, KEYS) == []
    ends.send(f"{RUN}/1/1", DOGS)
    ends.take(1, DOGS)

    (found,) = known.depths(ends.broker, KEYS)

    assert (found.queue, found.ready, found.unacked) == (DOGS, 0, 1)


def test_an_unknown_queue_is_empty(ends: Ends) -> None:
    depth = queues.depth(ends.broker, KEYS, CATS)

    assert depth == queues.QueueDepth(CATS, dict.fromkeys(PRIORITIES, 0), 0)
    assert queues.queues(ends.broker, KEYS) == []
    assert list(queues.messages(ends.broker, KEYS)) == []


def test_messages_come_in_the_order_in_which_workers_get_them(ends: Ends) -> None:
    for n, priority in ((1, 0), (2, 0), (3, 9), (4, 3), (5, 0)):
        ends.send(f"{RUN}/{n}/2", priority=priority, expires=60)
    ends.take(1)

    found = list(queues.messages(ends.broker, KEYS))

    assert [message.batch_id for message in found] == [1, 2, 5, 4, 3]
    assert [message.where for message in found] == ["unacked"] + ["ready"] * 4
    assert {(m.run_id, m.attempt, m.queue) for m in found} == {(RUN, 2, CATS)}
    assert all(m.age_s is not None and 0 <= m.age_s < 10 for m in found)


def test_what_was_taken_first_comes_first(ends: Ends) -> None:
    for n in range(3):
        ends.send(f"{RUN}/{n}/1")
    tags = [message.delivery_tag for message in ends.take(3)]
    now_s = ends.broker.time()[0]
    ages = {tags[0]: 10, tags[1]: 30, tags[2]: 20}
    ends.broker.zadd("ours:unacked_index", {tag: now_s - s for tag, s in ages.items()})

    found = list(queues.messages(ends.broker, KEYS))

    assert [message.batch_id for message in found] == [1, 2, 0]
    assert [message.age_s for message in found] == pytest.approx([30, 20, 10], abs=2)


def test_a_long_queue_is_read_whole(ends: Ends) -> None:
    for n in range(3):
        ends.send(f"{RUN}/{n}/1")
    (newest, *_) = ends.broker.lrange(f"ours:{CATS}", 0, -1)
    many = [newest.replace(f"{RUN}/2/1".encode(), f"{RUN}/{n}/1".encode()) for n in range(3, 1203)]
    ends.broker.lpush(f"ours:{CATS}", *many)

    found = [message.batch_id for message in queues.messages(ends.broker, KEYS)]

    assert found == list(range(1203))


def test_a_message_without_an_expiry_has_no_age(ends: Ends) -> None:
    ends.send(f"{RUN}/1/1")

    (message,) = queues.messages(ends.broker, KEYS)

    assert message.age_s is None


def test_a_message_waits_until_a_worker_takes_it(ends: Ends) -> None:
    task_id = f"{RUN}/1/1"
    ends.send(task_id, priority=6)
    waits = queues.is_waiting(ends.broker, KEYS, CATS, task_id)
    ends.take(1)

    still_waits = queues.is_waiting(ends.broker, KEYS, CATS, task_id)

    assert (waits, still_waits) == (True, False)


def test_removing_a_run_takes_its_messages_and_no_others(ends: Ends) -> None:
    for run in (RUN, OTHER, RUN + "x"):
        for n, priority in enumerate((0, 3, 9)):
            ends.send(f"{run}/{n}/1", priority=priority)
            ends.send(f"{run}/{n + 3}/1", DOGS)
    ends.send(f"{RUN}/1/1", namespace="theirs")
    ends.send(f"{RUN}/1/1", "celery")
    ends.take(1)
    ends.take(1, DOGS)

    n = queues.remove_run(ends.broker, KEYS, RUN)

    assert n == 6
    assert sorted(ids(ends)) == sorted(f"{r}/{n}/1" for r in (OTHER, RUN + "x") for n in range(6))
    # Nobody holds anything: both that were taken were of the run.
    assert not ends.broker.exists("ours:unacked", "ours:unacked_index")
    assert ends.broker.llen("ours:celery") == 1
    assert ids(ends, Keys("theirs")) == [f"{RUN}/1/1"]


def test_a_worker_may_acknowledge_what_was_removed_under_it(ends: Ends) -> None:
    ends.send(f"{RUN}/1/1")
    (message,) = ends.take(1)
    queues.remove_run(ends.broker, KEYS, RUN)

    message.ack()

    assert ids(ends) == []


def test_a_purge_removes_what_dead_runs_left_and_nothing_of_live_ones(ends: Ends) -> None:
    for run in (RUN, OTHER):
        for n in range(3):
            ends.send(f"{run}/{n}/1")
        ends.backend.set(KEYS.run(run), "running")
        ends.backend.hset(KEYS.leases(run), "0", "1")
        ends.backend.set(KEYS.vectors(run, 0, 1), b"vectors")
        ends.backend.set(KEYS.blob(run, 0, 7), b"picture")
    ends.take(1)
    ends.backend.delete(KEYS.run(RUN))

    removed = queues.purge_dead(ends.broker, ends.backend, KEYS)

    assert removed == {RUN: 3}
    assert ids(ends) == [f"{OTHER}/{n}/1" for n in range(3)]
    left = {key.decode() for key in ends.backend.scan_iter("ours:run:*")}
    assert left == {
        KEYS.run(OTHER),
        KEYS.leases(OTHER),
        KEYS.vectors(OTHER, 0, 1),
        KEYS.blob(OTHER, 0, 7),
    }


def test_a_purge_finds_keys_of_a_run_that_has_no_messages(ends: Ends) -> None:
    for n in range(1200):
        ends.backend.set(KEYS.blob(RUN, 0, n), b"picture")

    removed = queues.purge_dead(ends.broker, ends.backend, KEYS)

    assert removed == {RUN: 0}
    assert ends.backend.dbsize() == 0


def test_a_purge_touches_nothing_that_is_not_ours(ends: Ends) -> None:
    for client in (ends.broker, ends.backend):
        client.set("run:x:leases", "foreign")
        client.set("OURS:run:x:leases", "foreign")
        client.set("ours2:run:x:leases", "foreign")
        client.set("xours:run:x:leases", "foreign")
        client.set("ours:runs", "the mirror")
        client.set("ours:worker:w", "a worker")
        client.rpush(CATS, json.dumps({"headers": {"id": f"{RUN}/1/1"}}))
        client.rpush("celery", json.dumps({"headers": {"id": f"{RUN}/1/1"}}))
        client.rpush("ours:v1.UPPER", json.dumps({"headers": {"id": f"{RUN}/1/1"}}))
    ends.send(f"{RUN}/1/1", namespace="theirs")
    ends.send("5f0c3a4e-0000-4000-8000-000000000000")
    ends.send("5f0c3a4e-0000-4000-8000-000000000001", "celery")
    before = everything(ends.broker), everything(ends.backend)

    removed = queues.purge_dead(ends.broker, ends.backend, KEYS)

    assert removed == {}
    assert (everything(ends.broker), everything(ends.backend)) == before


@pytest.mark.parametrize("namespace", ["a*", "a[b]", "a?", "a\\"])
def test_a_namespace_is_never_read_as_a_pattern(ends: Ends, namespace: str) -> None:
    for key in ("ab:run:x:leases", "aa:run:x:leases", "a:run:x:leases", "a\\x:run:x:leases"):
        ends.backend.set(key, "foreign")
    ends.backend.set(Keys(namespace).leases(RUN), "mine")

    removed = queues.purge_dead(ends.broker, ends.backend, Keys(namespace))

    assert removed == {RUN: 0}
    assert len(list(ends.backend.scan_iter("*:run:x:leases"))) == 4


def test_every_key_of_one_run_goes(ends: Ends) -> None:
    for run in (RUN, RUN + "x"):
        for key in (KEYS.run(run), KEYS.cancel(run), KEYS.claims(run), KEYS.blob(run, 1, 2)):
            ends.backend.set(key, "x")

    queues.purge_run_keys(ends.backend, KEYS, RUN)

    left = {key.decode() for key in ends.backend.scan_iter()}
    run = RUN + "x"
    assert left == {KEYS.run(run), KEYS.cancel(run), KEYS.claims(run), KEYS.blob(run, 1, 2)}


GARBAGE = (
    b"",
    b"\xff\xfe",
    b"null",
    b"[1, 2]",
    b"{",
    b"[" * 50_000,
    b'{"headers": 3}',
    b'{"headers": {"id": 3, "expires": []}, "properties": 1}',
    b'{"headers": {"id": "a/b/c"}}',
    b'{"headers": {"id": "r/1/' + b"9" * 5000 + b'"}}',
    b'{"headers": {"id": "r/' + b"9" * 5000 + b'/1"}}',
    b'[[], "", 5]',
    b'[{"headers": {}}, "", null]',
)


def test_garbage_among_the_messages_is_counted_and_left_alone(ends: Ends) -> None:
    ends.broker.rpush(f"ours:{CATS}", *GARBAGE)
    ends.broker.hset("ours:unacked", mapping={f"tag-{n}": g for n, g in enumerate(GARBAGE)})
    before = everything(ends.broker)

    removed = queues.purge_dead(ends.broker, ends.backend, KEYS)

    found = list(queues.messages(ends.broker, KEYS))
    assert removed == {}
    assert len(found) == 2 * len(GARBAGE)
    assert {message.run_id for message in found} == {""}
    assert queues.depth(ends.broker, KEYS, CATS).ready == len(GARBAGE)
    assert everything(ends.broker) == before


def test_keys_of_another_type_are_passed_over(ends: Ends) -> None:
    for key in ("ours:unacked", "ours:unacked_index", f"ours:{CATS}\x06\x163"):
        ends.broker.set(key, "a text")
    ends.broker.set(f"ours:{DOGS}", "a text")
    ends.send(f"{RUN}/1/1")

    assert [found.queue for found in queues.queues(ends.broker, KEYS)] == [CATS]
    depth = queues.depth(ends.broker, KEYS, CATS)
    is_waiting = queues.is_waiting(ends.broker, KEYS, CATS, f"{RUN}/9/1")
    removed = queues.purge_dead(ends.broker, ends.backend, KEYS)

    assert (depth.ready, depth.unacked, is_waiting, removed) == (1, 0, False, {RUN: 1})


def test_what_is_held_can_be_removed_without_its_index(ends: Ends) -> None:
    ends.send(f"{RUN}/1/1")
    ends.take(1)
    ends.broker.delete("ours:unacked_index")
    ends.broker.set("ours:unacked_index", "a text")

    removed = queues.remove_run(ends.broker, KEYS, RUN)

    assert (removed, ids(ends)) == (1, [])
    # Whoever took the message stumbles over it as well.
    ends.broker.delete("ours:unacked_index")


def test_the_lines_shown_say_the_same_when_they_are_typed(ends: Ends) -> None:
    keys = Keys("its-own")
    for n, priority in enumerate((0, 0, 3, 9)):
        ends.send(f"{RUN}/{n}/1", priority=priority, namespace="its-own")
    ends.take(1, namespace="its-own")
    address = resolve_address(
        config.resolve(
            redis_host="127.0.0.1",
            redis_port=ends.server.port,
            redis_broker_db=ends.databases[0],
        )
    )

    lines = queues.show_lines(address, keys, CATS)

    assert all(line.isprintable() for line in lines)
    answers = []
    for line in lines:
        # redis-cli sends its arguments as they are; here bash hands them to us.
        typed = f"redis-cli() {{ printf '%s\\0' \"$@\"; }}; {line}"
        said = subprocess.run(["bash", "-c", typed], capture_output=True, check=True).stdout
        host, address_, port, number, n, database, *command = said.split(b"\0")[:-1]
        assert (host, address_, port) == (b"-h", b"127.0.0.1", b"-p")
        assert (int(number), n, database) == (ends.server.port, b"-n", b"0")
        answers.append(ends.broker.execute_command(*command))
    assert answers[:4] == [1, 1, 0, 1]
    assert f'"id": "{RUN}/1/1"'.encode() in answers[4][0]
    assert answers[5] == 1
    (tag_and_time,) = answers[6]
    assert len(tag_and_time) == 2


def test_the_lines_shown_hide_the_password_and_ask_for_it() -> None:
    secret = "s3cret/word"
    address = Address(
        "rediss://a%20da:s3cret%2Fword@box:7000?ssl_ca_certs=/etc/my+ca.pem", 2, 3, "REDIS_URL"
    )

    ask, *lines = queues.show_lines(address, KEYS, CATS)

    assert "REDISCLI_AUTH" in ask
    assert not any(secret in line or "s3cret" in line for line in (ask, *lines))
    expected = "redis-cli -h box -p 7000 -n 2 --user 'a da' --tls --cacert '/etc/my ca.pem' LLEN "
    assert lines[0].startswith(expected)


def test_the_lines_shown_for_a_unix_socket_name_its_path(tmp_path: Path) -> None:
    address = Address(f"unix://{tmp_path}/redis.sock", 1, 1, "REDIS_URL")

    lines = queues.show_lines(address, KEYS, CATS)

    assert lines[0] == f"redis-cli -s {tmp_path}/redis.sock -n 1 LLEN ours:{CATS}"
