from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.servers import Server, free_port
from tests.support import wait_until
from toolkit import config
from toolkit.cluster.connection import resolve_address
from toolkit.cluster.mirror import Mirror
from toolkit.cluster.protocol import PROTOCOL, Keys, queue_name
from toolkit.cluster.registry import WorkerInfo, WorkerState, WorkInfo, announce, announce_work
from toolkit.config import Settings
from toolkit.journal import RunJournal
from toolkit.monitor import metrics
from toolkit.monitor.history import History, _sample, sample_forever
from toolkit.monitor.snapshot import RunRow, Snapshot, WorkerRow, find_row, take
from toolkit.monitor.watch import PATIENCE_S, HealthWatch
from toolkit.places import runs_dir
from toolkit.run_record import Accounting, RunRecord, RunState

CATS = queue_name("c" * 64)
RUN = "20260101-000000-aaaaaa"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        for name, value in server.settings_env().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with server.client(1) as client:
        yield client


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a server that is not there."""
    monkeypatch.setenv("REDIS_PORT", str(free_port()))
    return config.resolve()


def register(client: redis.Redis, worker_id: str, ttl_s: float = 60.0, **work: Any) -> None:
    settings = config.resolve()
    info = WorkerInfo(
        worker_id,
        pid=7,
        host="box",
        protocol=PROTOCOL,
        pool="solo",
        queues=(CATS,),
        encoders={"c" * 64: "test_vit"},
        visibility_timeout_s=settings.visibility_timeout_s,
        ttl_s=ttl_s,
    )
    keys = Keys(settings.namespace)
    announce(client, keys, info)
    announce_work(client, keys, worker_id, WorkInfo(**work), ttl_s)


def a_run(run_id: str = RUN, **given: Any) -> RunJournal:
    """A live run that this process drives."""
    record = RunRecord(run_id, "cats", RunState.RUNNING, **given)
    return RunJournal(runs_dir(config.resolve().data_dir), record, {})


def waiting(client: redis.Redis, settings: Settings, n: int) -> None:
    """Messages that nobody takes."""
    message = json.dumps({"headers": {"id": f"{RUN}/0/1"}})
    client.lpush(f"{settings.namespace}:{CATS}", *[message] * n)


def the_worker(snapshot: Snapshot) -> WorkerRow:
    (row,) = snapshot.workers
    return row


def test_without_a_server_runs_on_this_disk_are_seen(nowhere: Settings) -> None:
    journal = a_run(stage="embed", done=3, total=9, batches={"workers": 0, "local": 1})

    snapshot = take(nowhere)

    assert not snapshot.server.ok
    assert "nothing listens there" in (snapshot.server.reason or "")
    assert [(row.record.run_id, row.is_here) for row in snapshot.live] == [(RUN, True)]
    assert snapshot.live[0].progress.done == 3
    assert snapshot.health.verdict == "local"
    journal.release()


def test_queues_and_workers_are_as_the_server_has_them(
    server: Server, client: redis.Redis, settings: Settings
) -> None:
    settings = config.resolve()
    register(client, "box-1", state=WorkerState.BUSY, run=RUN, batch=4, busy_s=2.0, rate=12.5)
    with server.client(0) as broker:
        waiting(broker, settings, 3)

    snapshot = take(settings, health=False)

    assert [(row.queue, row.ready, row.unacked) for row in snapshot.queues] == [(CATS, 3, 0)]
    row = the_worker(snapshot)
    assert (row.state, row.run, row.batch, row.rate) == (WorkerState.BUSY, RUN, 4, 12.5)
    assert (row.host, row.pid, row.pool, row.encoders) == ("box", 7, "solo", ("test_vit",))
    assert row.reason is None
    assert snapshot.n_workers == {WorkerState.BUSY: 1}


def test_a_queue_that_is_consumed_and_empty_is_shown(server: Server, client: redis.Redis) -> None:
    register(client, "box-1", state=WorkerState.READY)

    snapshot = take(config.resolve(), health=False)

    assert [(row.queue, row.ready) for row in snapshot.queues] == [(CATS, 0)]


def test_a_worker_that_died_stays_and_says_so(server: Server, client: redis.Redis) -> None:
    register(client, "box-1", ttl_s=0.05, state=WorkerState.READY)
    settings = config.resolve()
    gone = Keys(settings.namespace).worker("box-1")
    wait_until(lambda: not client.exists(gone), "the end of the worker's key")

    snapshot = take(settings, health=False)

    row = the_worker(snapshot)
    assert (row.state, row.is_alive) == (WorkerState.DEAD, False)
    assert "has been silent for" in (row.reason or "")


def test_a_worker_that_hangs_says_in_what(server: Server, client: redis.Redis) -> None:
    register(client, "box-1", state=WorkerState.BUSY, run=RUN, batch=4, progress_s=99.0)

    snapshot = take(config.resolve(), health=False)

    assert f"no progress for 99 s in batch 4 of run {RUN}" in (the_worker(snapshot).reason or "")


def test_a_run_of_another_machine_is_seen_and_one_of_this_disk_counts(
    server: Server, client: redis.Redis
) -> None:
    settings = config.resolve()
    register(client, "box-1", state=WorkerState.READY)
    journal = a_run(host="here")
    mirror = Mirror(resolve_address(settings), Keys(settings.namespace))
    mirror(RunRecord(RUN, "stale", RunState.RUNNING))
    other = RunRecord("20260101-000000-bbbbbb", "dogs", RunState.DONE, ended=1.0)
    mirror(other)

    runs = take(settings, health=False).runs

    assert [(row.record.index, row.is_here) for row in runs] == [("cats", True), ("dogs", False)]
    journal.release()


def test_what_nobody_understands_on_the_server_is_passed_over(
    server: Server, client: redis.Redis
) -> None:
    settings = config.resolve()
    keys = Keys(settings.namespace)
    broken = {**RunRecord(RUN, "cats").to_json(), "batches": ["no", "dict"], "moves": "none"}
    client.hset(keys.runs, RUN, json.dumps({"at": time.time(), "record": broken}))
    client.hset(keys.workers, "box-1", "no JSON")
    client.set(f"{settings.namespace}:samples", "no list")

    snapshot = take(settings, health=False)

    assert snapshot.server.ok
    assert (snapshot.runs, snapshot.workers, dict(snapshot.problems)) == ((), (), {})
    assert History().recent(settings) == []
    assert "toolkit_server_up 1" in metrics.render(snapshot, metrics.Totals())


def test_the_databases_fail_one_by_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_BROKER_DB", "999")

    snapshot = take(config.resolve(), health=False)

    assert snapshot.server.ok
    assert list(snapshot.problems) == ["queues"]
    assert "REDIS_BROKER_DB" in snapshot.problems["queues"]


def test_many_workers_and_runs_are_counted_and_the_live_ones_shown(
    server: Server, client: redis.Redis
) -> None:
    for n in range(60):
        register(client, f"box-{n}", state=WorkerState.READY)
    oldest = a_run("20260101-000000-000000")
    for n in range(1, 61):
        a_run(f"20260101-000000-{n:06}").end(RunState.DONE)
    begun = time.monotonic()

    snapshot = take(config.resolve(), health=False)

    assert time.monotonic() - begun < 3.0
    assert (len(snapshot.workers), snapshot.n_workers) == (50, {WorkerState.READY: 60})
    assert (len(snapshot.runs), snapshot.n_runs) == (50, 61)
    assert snapshot.runs[0].record.run_id == oldest.record.run_id
    assert snapshot.runs[1].record.run_id.endswith("000060")
    oldest.release()


def test_a_frozen_server_keeps_nobody_waiting_for_long(server: Server) -> None:
    server.freeze()
    begun = time.monotonic()

    snapshot = take(config.resolve(), health=False)

    assert time.monotonic() - begun < 3.0
    assert not snapshot.server.ok
    assert "does not answer in time" in (snapshot.server.reason or "")
    server.thaw()


def test_the_verdict_follows_the_server_soon(server: Server, client: redis.Redis) -> None:
    watch = HealthWatch(config.resolve())
    before = watch.health("up", PATIENCE_S)
    server.kill()

    unchanged = watch.health("up")

    assert "no worker is registered" in (before.reason or "")
    assert unchanged.checks == before.checks
    wait_until(lambda: "nothing listens" in (watch.health("down").reason or ""), "the news", 5)


def test_a_server_without_workers_is_left_alone(server: Server, client: redis.Redis) -> None:
    settings = config.resolve()
    history = History()

    history.sample(settings)

    assert list(client.scan_iter()) == []
    assert [(s.ready, s.workers) for s in history.recent(settings)] == [(0, 0)]


def test_two_monitors_give_one_series(server: Server, client: redis.Redis) -> None:
    settings = config.resolve()
    register(client, "box-1", state=WorkerState.BUSY)
    with server.client(0) as broker:
        waiting(broker, settings, 3)
    first, second = History(), History()

    first.sample(settings)
    second.sample(settings)

    assert client.llen(f"{settings.namespace}:samples") == 1
    # A monitor that has just begun sees what the others have seen.
    (sample,) = History().recent(settings)
    assert (sample.ready, sample.unacked, sample.busy, sample.workers) == (3, 0, 1, 1)
    assert abs(sample.at - time.time()) < 10


def test_the_series_is_an_hour_long(server: Server, client: redis.Redis) -> None:
    settings = config.resolve()
    register(client, "box-1", state=WorkerState.READY)
    series, now = f"{settings.namespace}:samples", time.time()
    rows = [json.dumps([now - 5 * n, n, 0, 0, 1, 0.0]) for n in range(800, 0, -1)]
    client.rpush(series, *rows)

    History().sample(settings)

    assert client.llen(series) == 720
    assert 0 < client.ttl(series) <= 7200
    recent = History().recent(settings)
    assert len(recent) == 720
    assert [s.ready for s in recent[-2:]] == [1, 0]


def test_a_dead_server_leaves_a_gap_and_no_hole(server: Server, client: redis.Redis) -> None:
    settings = config.resolve()
    register(client, "box-1", state=WorkerState.READY)
    history = History()
    history.sample(settings)
    server.kill()

    history.sample(settings)

    ready = [s.ready for s in history._own]
    assert ready == [0, None]
    assert history.recent(settings)[-1].ready is None


def test_the_sampler_begins_at_once_and_can_be_ended(server: Server, client: redis.Redis) -> None:
    history = History()

    async def sample_once() -> None:
        sampling = asyncio.create_task(sample_forever(history))
        while not history._own:  # its first sample, in a thread
            await asyncio.sleep(0.01)
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling

    asyncio.run(asyncio.wait_for(sample_once(), 20))

    assert len(history._own) == 1


def the_value(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"toolkit_{name} ")]
    return float(line.rpartition(" ")[2])


def test_totals_never_shrink_when_a_run_is_forgotten() -> None:
    totals = metrics.Totals()
    now = time.time() + 1
    old = RunRecord(RUN, "cats", images={"local": 5}, started=now)
    old.batches = {"workers": 0, "local": 1}
    new = RunRecord("20260101-000000-bbbbbb", "dogs", images={"local": 2}, started=now)
    new.accounting = Accounting(failed=3)

    totals.update([RunRow(old, True)])
    totals.update([RunRow(old, True), RunRow(new, True)])
    sums = totals.update([RunRow(new, True)])

    assert sums["images", "local"] == 7
    assert sums["batches", "local"] == 1
    assert sums["failed", ""] == 3


def test_a_monitor_that_starts_counts_from_nothing() -> None:
    ended = RunRecord(RUN, "cats", RunState.DONE, images={"local": 500}, started=1.0)
    live = RunRecord("20260101-000000-bbbbbb", "dogs", images={"local": 100}, started=2.0)
    totals = metrics.Totals()
    at_first = totals.update([RunRow(live, True)])["images", "local"]
    live.images = {"local": 130}

    # One that was known elsewhere is seen late, as after a server that was away.
    sums = totals.update([RunRow(live, True), RunRow(ended, False)])

    assert at_first == 0
    assert sums["images", "local"] == 30


def test_every_live_run_counts_and_not_those_alone_that_are_shown(nowhere: Settings) -> None:
    totals = metrics.Totals()
    journals = [a_run(f"20260101-000000-{n:06}", stage="embed", done=100) for n in range(60)]
    for journal in journals:
        journal.record.images = {"local": 100}
        journal.record.stage_started = time.time() - 10
        journal.write()

    snapshot = take(nowhere, health=False)

    text = metrics.render(snapshot, totals)
    assert (len(snapshot.live), snapshot.n_live, snapshot.n_runs) == (50, 60, 60)
    assert 60 * 5 < snapshot.rate <= 60 * 10
    assert the_value(text, "runs_live") == 60
    assert the_value(text, 'images_embedded_total{road="local"}') == 6000
    for journal in journals:
        journal.release()


def test_what_could_not_be_looked_at_is_left_out_and_never_zero(
    server: Server, client: redis.Redis
) -> None:
    settings = config.resolve()
    register(client, "box-1", state=WorkerState.BUSY)
    a_run().end(RunState.DONE)
    # As with managed servers, where not every command is allowed.
    client.execute_command("ACL", "SETUSER", "default", "-scan", "-hgetall")  # type: ignore[no-untyped-call]

    snapshot = take(settings, health=False)

    text = metrics.render(snapshot, metrics.Totals())
    history = History()
    history._own.append(_sample(snapshot))
    (sample,) = history.recent(settings)
    assert set(snapshot.problems) == {"workers", "mirror", "queues"}
    assert snapshot.queues == ()
    assert "toolkit_server_up 1" in text
    assert not any(name in text for name in ("queue_ready", "queue_unacked", "toolkit_workers"))
    assert "runs_live" not in text
    assert (sample.ready, sample.unacked, sample.busy, sample.workers) == (None,) * 4


def aged(journal: RunJournal, seconds: float) -> None:
    """Make a run look as if it had written nothing for so long."""
    file = journal.folder / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "updated": record["updated"] - seconds}))


def test_a_run_that_stands_still_gets_slower_and_says_for_how_long(nowhere: Settings) -> None:
    journal = a_run(stage="embed", done=300, total=1000, stage_started=time.time() - 700)
    journal.write()
    aged(journal, 600.0)

    (row,) = take(nowhere, health=False).live

    assert 600 <= row.silent_s < 620
    assert 300 / 720 < row.progress.rate <= 300 / 700
    assert row.progress.eta_s == pytest.approx(700 / row.progress.rate)
    found = find_row(RUN, nowhere, row.record)
    assert found.progress.rate == pytest.approx(row.progress.rate, rel=0.1)
    journal.release()


def test_a_run_elsewhere_that_stands_still_is_judged_by_the_servers_clock(
    server: Server, client: redis.Redis
) -> None:
    settings = config.resolve()
    keys = Keys(settings.namespace)
    # Its own clock is an hour ahead.
    ahead = time.time() + 3600
    record = RunRecord(RUN, "cats", RunState.RUNNING, stage="embed", done=300)
    record.stage_started, record.updated = ahead - 100, ahead
    entry = {"at": time.time() - 200, "record": record.to_json()}
    client.hset(keys.runs, RUN, json.dumps(entry))
    client.set(keys.run(RUN), "1")

    (row,) = take(settings, health=False).live

    assert 200 <= row.silent_s < 220
    assert 300 / 320 < row.progress.rate <= 1.0


@pytest.mark.parametrize(
    "row",
    [
        [10**400, 1, 1, 1, 1, 1.0],
        [1e300, 1, 1, 1, 1, 1.0],
        [4e9, 1, 1, 1, 1, 1.0],
        ["now", 1, 1, 1, 1, 1.0],
        [None, 10**400, 1, 1, 1, 1.0],
        [None, 1, -1, 1, 1, 1.0],
        [None, 1, 1, 1.5, 1, 1.0],
        [None, 1, 1, True, 1, 1.0],
        [None, 1, 1, 1, "1", 1.0],
        [None, 1, 1, 1, 1, 10**400],
        [None, 1, 1, 1, 1, None],
        [None, 1, 1, 1],
    ],
    ids=str,
)
def test_odd_samples_are_passed_over(
    server: Server, client: redis.Redis, row: list[object]
) -> None:
    settings, now = config.resolve(), time.time()
    sound = [now, 1, 2, None, None, 3.0]
    # None stands for a time that would be sound.
    odd = [now - 60 if row[0] is None else row[0], *row[1:]]
    client.rpush(f"{settings.namespace}:samples", json.dumps(odd), json.dumps(sound))

    (sample,) = History().recent(settings)

    assert (sample.ready, sample.unacked, sample.busy, sample.rate) == (1, 2, None, 3.0)


def test_an_old_series_is_not_shown_as_the_last_hour(server: Server, client: redis.Redis) -> None:
    settings, now = config.resolve(), time.time()
    rows = [json.dumps([now - 6900 + 5 * n, 1, 1, 1, 1, 1.0]) for n in range(200)]
    client.rpush(f"{settings.namespace}:samples", *rows, json.dumps([now, 7, 1, 1, 1, 1.0]))

    (sample,) = History().recent(settings)

    assert sample.ready == 7


def test_who_asks_for_the_doctors_answer_alone_gets_one(server: Server) -> None:
    assert take(config.resolve(), patient=True).health.verdict == "local"


def test_a_slow_look_keeps_a_patient_reader_alone_waiting(server: Server) -> None:
    server.freeze()  # each look takes seconds now
    watch = HealthWatch(config.resolve())
    begun = time.monotonic()

    passing = watch.health("signs", wait_s=0.05)
    waited_s = time.monotonic() - begun
    patient = watch.health("signs", wait_s=PATIENCE_S)

    assert (passing.verdict, waited_s < 0.5) == (None, True)
    assert "does not answer in time" in (patient.reason or "")
    server.thaw()


def test_an_old_look_is_not_handed_out(server: Server) -> None:
    watch = HealthWatch(config.resolve())
    watch.health("signs", PATIENCE_S)
    watch._looked_at -= 3600
    watch._due_at -= 3600
    server.freeze()

    passing = watch.health("signs", wait_s=0.05)
    patient = watch.health("signs", PATIENCE_S)

    assert passing.verdict is None
    assert "does not answer in time" in (patient.reason or "")
    assert patient.age_s < 5
    server.thaw()


def test_what_changes_all_the_time_makes_neither_looks_nor_waiting_without_end(
    server: Server,
) -> None:
    server.freeze()
    watch = HealthWatch(config.resolve())
    watch.health("first", PATIENCE_S)
    looked_at = watch._looked_at
    begun = time.monotonic()

    for n in range(200):
        watch.health(f"news {n}")

    assert time.monotonic() - begun < 1.0
    assert watch._looked_at == looked_at
    server.thaw()
