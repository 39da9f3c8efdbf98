"""Each way in which workers can be of no use, made for real and told apart with its cure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import SCALED, Worker, World
from tests.pictures import jpeg
from tests.support import save_random_weights, wait_until
from tests.test_health import CHEAP, REQUEST, START, look, named
from toolkit import health
from toolkit.cluster.connection import resolve_address
from toolkit.cluster.protocol import EMBED_TASK, queue_name
from toolkit.cluster.registry import WorkInfo
from toolkit.config import Settings
from toolkit.dispatch.celery import CeleryExecutor
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.spec import EncoderSpec
from toolkit.health.canary import check_canary, send_canary
from toolkit.health.case import Case
from toolkit.health.machine import Here
from toolkit.health.workers import Answers, muster
from toolkit.records import Batch, Item

#: Beats as fast as those of the other tests, and a long time until their silence is believed.
PATIENT = {"TOOLKIT_BEAT_TTL_S": "6"}


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    with World() as world:
        yield world


@pytest.fixture(scope="module")
def spec(place: World) -> EncoderSpec:
    """What the cheap model comes to; from now on that is on record in the world."""
    with place.entered(), warm_executor(REQUEST, place.settings) as executor:
        return executor.start()


@pytest.fixture
def world(place: World, spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A server with nobody on it, and this process as its client."""
    # What a worker of that world takes, which does not know this test's own.
    monkeypatch.delenv("TOOLKIT_NAMESPACE", raising=False)
    for name, value in PATIENT.items():
        monkeypatch.setenv(name, value)
    with place.entered():
        os.environ.update(PATIENT)
        yield place
        for worker in place.workers:
            worker.reap()
        for db in (0, 1):
            with place.server.client(db) as client:
                # This server is the tests' own: nobody else's keys can be on it.
                for key in client.scan_iter():
                    client.delete(key)


def is_quiet(world: World, **options: Any) -> bool:
    """Whether the worker is known and listens: the line that says ready comes before that."""
    if named(look(**options))["task"].status != "ok":
        return False
    # That look sent it a picture, and its next beat may be the first to say that it is done.
    wait_until(lambda: ": 0 busy" in health.check_celery_worker(**CHEAP).detail, "an idle worker")
    return True


@contextlib.contextmanager
def a_batch(
    spec: EncoderSpec, settings: Settings, path: Path, *, n: int = 1, n_items: int = 1
) -> Iterator[str]:
    """Batches of a build on their way to the workers."""
    run_id = f"run-{path.stem}"
    executor = CeleryExecutor(run_id, spec, "test_vit", settings)
    executor.start(5)
    items = [Item(i, os.fsencode(path), path.stat().st_size) for i in range(n_items)]
    for number in range(n):
        executor.submit(Batch(number, spec.fingerprint, tuple(items)))
    try:
        yield run_id
    finally:
        executor.close()


@pytest.mark.slow
def test_no_worker(world: World) -> None:
    report = look(deep=True)

    check = named(report)["workers"]
    assert report.verdict == "local"
    assert report.reason == check.detail
    assert "no worker is registered at redis://127.0.0.1" in check.detail
    assert check.cure == START
    assert not health.check_celery_worker(**CHEAP)
    # A server without workers is none of ours: nothing is written there.
    with world.server.client(0) as broker, world.server.client(1) as backend:
        assert (broker.dbsize(), backend.dbsize()) == (0, 0)


@pytest.mark.slow
def test_worker_that_works_is_proved_with_pictures_and_nothing_stays(world: World) -> None:
    picture = world.datasets / "pets" / "cat.jpg"
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(jpeg())
    worker = world.worker(env=PATIENT)
    wait_until(lambda: is_quiet(world), "a worker that listens")
    n_embedded = worker.log.count(" 1 embedded, 0 failed")

    report = look(deep=True)

    found = named(report)
    assert (report.verdict, report.reason) == ("distributed", None)
    assert found["workers"].detail == "1 usable: 0 busy, 1 idle"
    assert found["task"].detail == f"{EMBED_TASK} is registered with 1 of 1 Celery workers"
    assert found["consuming"].status == "ok"
    assert found["canary"].status == "ok"
    assert "by its bytes" in found["canary"].detail
    assert "differs from this machine's by 0 a component" in found["canary"].detail
    assert (found["canary"].latency_ms or 1e9) < 5000
    assert f"read {picture} by its path" in found["paths"].detail
    # Of somebody's picture no more than the header is looked at.
    assert worker.log.count(" 1 embedded, 0 failed") == n_embedded + 1
    assert [c.name for c in report.checks if c.status in ("fail", "skip")] == []
    assert health.check_celery_worker(**CHEAP)
    assert health.check_redis_connection()
    _assert_nothing_of_a_look(world)


def _assert_nothing_of_a_look(world: World) -> None:
    with world.server.client(0) as broker, world.server.client(1) as backend:
        left = [*map(bytes.decode, broker.scan_iter()), *map(bytes.decode, backend.scan_iter())]
    assert [name for name in left if "doctor" in name or "reply" in name or "run:" in name] == []
    assert [name for name in left if "unacked" in name] == []


@pytest.mark.slow
def test_worker_that_cannot_see_the_pictures_gets_bytes(world: World) -> None:
    picture = world.datasets / "pets" / "cat.jpg"
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(jpeg())
    world.worker(env={**PATIENT, "TOOLKIT_WORKER_ROOTS": "/elsewhere"})

    report = look()

    check = named(report)["paths"]
    assert report.verdict == "distributed"
    assert check.status == "warn"  # on this very machine it could see them
    assert f"a worker does not see {picture}" in check.detail
    assert check.cure == f"TOOLKIT_WORKER_ROOTS={world.datasets} {START}"


@pytest.mark.slow
def test_dispatch_shows_rubbish_refused_and_a_picture_done(world: World) -> None:
    world.worker(env=PATIENT)

    rows = health.try_dispatch(**CHEAP)

    assert [(row["what"], row["state"]) for row in rows] == [
        ("a message that is no batch", "refused"),
        ("rubbish bytes", "failed"),
        ("a real picture", "done"),
    ]
    assert "not a picture" in rows[1]["detail"]
    assert rows[2]["detail"] == "a vector of 64 components"
    assert len({row["id"] for row in rows}) == 3
    assert all(0 <= row["seconds"] < 5 for row in rows)
    _assert_nothing_of_a_look(world)


@pytest.mark.slow
def test_stopped_worker_is_found_while_it_still_counts_as_alive(world: World) -> None:
    worker = world.worker(env=PATIENT)
    wait_until(lambda: is_quiet(world), "a worker that listens")
    worker.kill("main", signal.SIGSTOP)

    report = look()

    check = named(report)["consuming"]
    assert named(report)["workers"].status == "ok"  # it is taken at its word there
    assert report.verdict == "local"
    assert "has been silent for" in check.detail
    assert check.cure == f"kill -CONT {worker.pid('main')}"
    _assert_nothing_of_a_look_is_sent(world)


def _assert_nothing_of_a_look_is_sent(world: World) -> None:
    with world.server.client(0) as broker:
        assert [key for key in broker.scan_iter("*:v1.*") if broker.llen(key)] == []


@pytest.mark.slow
def test_pool_process_that_hangs_is_told(world: World) -> None:
    worker = world.worker(env=PATIENT)
    wait_until(lambda: is_quiet(world), "a worker that listens")
    worker.kill("pool", signal.SIGSTOP)

    report = look()

    check = named(report)["consuming"]
    assert report.verdict == "local"
    assert "took a batch and did not begin it" in check.detail
    assert check.cure == f"kill {worker.pid('main')}"


@pytest.mark.slow
def test_worker_on_another_queue(world: World) -> None:
    worker = world.worker(plain=True, pool="solo", flags=("-Q", "v1.other"), env=PATIENT)

    report = look()

    check = named(report)["workers"]
    assert report.verdict == "local"
    assert "consumes v1.other, not v1." in check.detail
    # Nothing starts it again: what was killed has to be started by hand.
    assert check.cure == f"kill {worker.pid('main')}; {START}"


@pytest.mark.slow
def test_worker_that_never_becomes_ready_says_why(world: World) -> None:
    missing = {"model": "vit_base_patch16_224", "pretrained": True}
    worker = Worker(world, encoder=missing, env={**PATIENT, "HF_HUB_OFFLINE": "1"})
    worker.start(wait=False)
    wait_until(lambda: [str(v.state) for v in world.views()] == ["refused"], "a refusal", 90)

    report = look()

    check = named(report)["workers"]
    assert report.verdict == "local"
    assert "refuses to work: no weights at hand for 'vit_base_patch16_224'" in check.detail
    assert check.cure == "toolkit model pull vit_base_patch16_224"


@pytest.mark.slow
def test_worker_that_is_still_starting(world: World) -> None:
    worker = Worker(world, env=PATIENT).start(wait=False)
    wait_until(lambda: bool(world.views()), "a registered worker")
    os.kill(worker.pid("pool"), signal.SIGSTOP)

    report = look()

    check = named(report)["workers"]
    assert report.verdict == "local"
    assert "has been starting for" in check.detail
    assert "waits for" in check.detail
    assert check.cure == "toolkit doctor --watch"


@pytest.mark.slow
def test_worker_with_other_weights_is_not_believed(world: World, tmp_path: Path) -> None:
    save_random_weights(tmp_path / "weights.safetensors", seed=5)
    other = {"checkpoint_path": str(tmp_path / "weights.safetensors"), "pretrained": True}
    world.worker(encoder=other, env=PATIENT)

    report = look(deep=True)

    check = named(report)["workers"]
    assert report.verdict == "local"
    assert "serves test_vit with other weights, preprocessing or precision" in check.detail


@pytest.mark.slow
def test_solo_worker_that_is_busy_counts_and_one_that_hangs_does_not(
    world: World, spec: EncoderSpec
) -> None:
    # Its own watch would end it first, but that it is told to wait longer.
    worker = world.worker(pool="solo", env={**PATIENT, "TOOLKIT_STALL_S": "60"})
    picture = world.datasets / "hang.jpg"
    picture.write_bytes(jpeg() + b"HANG")
    with a_batch(spec, world.settings, picture) as run_id:
        wait_until(lambda: [str(v.state) for v in world.views()] == ["busy"], "a busy worker")
        busy = look()
        stall_s = world.settings.stall_s
        wait_until(lambda: (world.views()[0].work or WorkInfo()).progress_s > stall_s, "a hang")
        hung = look()

    found = named(busy)
    assert busy.verdict == "distributed", busy
    assert found["workers"].detail == "1 usable: 1 busy, 0 idle"
    assert found["canary"].detail == "none of 1 workers is idle"
    assert "workers hold 1" in found["queue"].detail
    assert "a busy solo worker never does" in found["task"].detail
    check = named(hung)["workers"]
    assert hung.verdict == "local"
    assert f"hangs in batch 0 of run {run_id}" in check.detail
    assert check.cure == f"kill {worker.pid('main')}"
    picture.unlink()


def slow_picture(world: World) -> Path:
    path = world.datasets / "slow.jpg"
    path.write_bytes(jpeg() + b"SLOW")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_workers_between_two_batches_of_a_build_are_not_accused(
    world: World, spec: EncoderSpec, pool: str
) -> None:
    world.worker(pool=pool, env=PATIENT)
    wait_until(lambda: is_quiet(world), "a worker that listens")
    case = Case(world.settings, REQUEST, resolve_address(world.settings), spec)
    picture = slow_picture(world)
    with world.server.client(1) as backend:
        crew = muster(case, backend)  # idle, as between two batches
        with a_batch(spec, world.settings, picture, n=4, n_items=128):
            sent = send_canary(case, crew)
            checks = check_canary(case, sent, Answers(), Here(()), backend)

    assert len(crew.idle) == 1
    assert [(check.name, str(check.status)) for check in checks] == [
        *(("consuming", "skip"), ("canary", "skip"), ("paths", "skip"))
    ]
    assert "batches of builds wait before the picture, workers hold" in checks[0].detail
    assert checks[0].detail.startswith("busy: ")
    assert all(check.cure is None for check in checks)
    picture.unlink()


@pytest.mark.slow
def test_batches_of_a_dead_run_excuse_no_worker(world: World) -> None:
    worker = world.worker(env=PATIENT)
    wait_until(lambda: is_quiet(world), "a worker that listens")
    worker.kill("main", signal.SIGSTOP)
    (queue,) = world.views()[0].info.queues
    message = b'{"headers": {"id": "20260101-000000-abcdef/0/1"}}'
    with world.server.client(0) as broker:
        broker.lpush(f"{world.keys.prefix}{queue}", message)

        report = look()

    assert named(report)["consuming"].status == "fail"


@pytest.mark.slow
def test_quick_look_sends_nothing_while_a_worker_is_busy(world: World, spec: EncoderSpec) -> None:
    workers = [world.worker(pool="solo", env=PATIENT) for _ in range(2)]
    picture = slow_picture(world)
    with a_batch(spec, world.settings, picture, n_items=128):
        wait_until(lambda: "busy" in {str(v.state) for v in world.views()}, "a busy worker")

        report = look()

    assert report.verdict == "distributed"
    assert named(report)["consuming"].detail == "1 of 2 workers are busy"
    assert not any("doctor-" in worker.log for worker in workers)
    picture.unlink()


#: Somebody's worker, which takes from our queue and is no worker of ours.
STRANGER = """
import sys
from celery import Celery
url, prefix, queue = sys.argv[1:]
app = Celery("other", broker=url)
app.conf.broker_transport_options = {"global_keyprefix": prefix}
app.worker_main(["worker", "--pool=solo", "-Q", queue, "-n", "stranger@here", "-l", "warning"])
"""

#: A worker of ours whose owner changed what it takes.
PICKY = """
from toolkit.cluster.app import worker_app
app = worker_app()
app.conf.accept_content = ["text/plain"]
app.worker_main(["worker", "--pool=solo", "--loglevel=warning"])
"""


@contextlib.contextmanager
def a_program(code: str, *args: str, env: dict[str, str] | None = None) -> Iterator[int]:
    """A process of somebody else."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *args],
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_worker_of_another_app_that_takes_our_batches(world: World, spec: EncoderSpec) -> None:
    queue = queue_name(spec.fingerprint)
    url = f"redis://127.0.0.1:{world.server.port}/0"
    with a_program(STRANGER, url, world.keys.prefix, queue):
        wait_until(lambda: named(look())["task"].status == "fail", "the stranger", 30)

        check = named(look())["task"]

    assert f"stranger@here takes batches from our queue and does not know {EMBED_TASK}" in (
        check.detail
    )
    stop = "celery -A toolkit control shutdown --destination stranger@here"
    assert check.cure == f"{stop}; {START}"


@pytest.mark.slow
def test_worker_that_refuses_the_content_of_messages(world: World) -> None:
    look(deep=True)
    encoders = '[{"model": "test_vit", "pretrained": false}]'
    env = {**SCALED, **PATIENT, "TOOLKIT_WORKER_ENCODERS": encoders}
    with a_program(PICKY, env=env) as pid:
        wait_until(lambda: any(v.info.queues for v in world.views()), "a ready worker")
        with world.server.client(0) as broker:
            wait_until(lambda: bool(broker.keys("*_kombu.binding.v1.*")), "its consumer")

        report = look()

    check = named(report)["consuming"]
    assert report.verdict == "local"
    assert "thrown away unread" in check.detail
    assert "refuses its content type (application/json)" in check.detail
    assert check.cure == f"kill {pid}; {START}"


@pytest.mark.slow
def test_batches_of_a_client_that_is_gone_are_told(world: World) -> None:
    message = b'{"headers": {"id": "20260101-000000-abcdef/0/1"}}'
    name = f"{world.keys.prefix}v1.abc"
    with world.server.client(0) as broker:
        broker.lpush(name, message)
        broker.lpush(f"{name}\x06\x163", message)

        check = named(look())["queue"]

    assert check.status == "warn"
    assert "v1.abc: 2 wait (priority 0: 1, priority 3: 1), workers hold 0" in check.detail
    assert check.cure == "toolkit queue purge"
