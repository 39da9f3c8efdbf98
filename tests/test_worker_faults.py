"""Workers that die, freeze, leave and join in the middle of a build: the result never shows it.

Intervals are scaled down (a beat of 0.3 s, silence of 1 s is death); each wait may take three
times what the scaled bar says.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import toolkit as tk
from tests.clusters import (
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
from tests.support import CHEAP, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the embedded server needs POSIX"),
]

#: Some batches more than two workers have in flight at once.
N_PHOTOS = 192

#: TTL of 1 s, and 2 s to notice and hand on, three times.
BACK_AT_WORK_S = 9.0


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
def survivor(world: World) -> Worker:
    """A worker to which nothing is done."""
    return world.worker()


@pytest.fixture
def inside(world: World) -> Iterator[World]:
    with world.entered():
        yield world


@pytest.fixture
def victim(world: World, request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A worker of the kind that the test names, to be broken."""
    worker = world.worker(**getattr(request, "param", {}))
    yield worker
    worker.reap()
    # What it said of itself expires; the next test is not to count it.
    wait_until(lambda: worker.id not in [v.id for v in world.views()], "its end", 20)


def assert_as_if_local(world: World, run: Running, expected: list[tuple[Any, ...]]) -> None:
    """The whole of what a fault must leave as it was."""
    result = run.result()
    assert_books(result)
    assert_same_table(built(result.record.index), expected)
    assert_clean(world, run.run_id)
    assert_empty(world)


def kill_main(victim: Worker) -> None:
    victim.kill("main")


def kill_pool(victim: Worker) -> None:
    victim.kill("pool")


def kill_supervisor(victim: Worker) -> None:
    victim.kill("supervisor")


def stop_pool(victim: Worker) -> None:
    victim.kill("pool", signal.SIGSTOP)


def interrupt_twice(victim: Worker) -> None:
    what = victim.pid("supervisor")
    os.kill(what, signal.SIGINT)
    time.sleep(0.3)  # two signals at once are one
    os.kill(what, signal.SIGINT)


PREFORK: dict[str, Any] = {"pool": "prefork"}
PLAIN: dict[str, Any] = {"pool": "solo", "plain": True}


@pytest.mark.parametrize(
    ("victim", "harm"),
    [
        (PREFORK, kill_main),
        (PREFORK, kill_pool),
        (PREFORK, kill_supervisor),
        (PREFORK, stop_pool),
        (PLAIN, interrupt_twice),
    ],
    indirect=["victim"],
)
def test_batch_of_a_worker_that_goes_is_done_by_another(
    inside: World,
    survivor: Worker,
    victim: Worker,
    harm: Callable[[Worker], None],
    expected: list[tuple[Any, ...]],
) -> None:
    name = victim.id
    run = Running("photos", name="photos")
    run.until(lambda: bool(inside.claimed_by(run.run_id, victim)), "a batch at the victim")
    (batch,) = inside.claimed_by(run.run_id, victim)

    harm(victim)

    def is_handed_on() -> bool:
        return not inside.claims(run.run_id).get(batch, "").endswith(f"/{name}")

    run.until(is_handed_on, "the batch to be handed on", BACK_AT_WORK_S)
    assert_as_if_local(inside, run, expected)
    record = run.build.record
    assert (record.batches["local"], record.moves, record.fallback_reason) == (0, [], None)
    assert run.build.accounting.embedded == N_PHOTOS


@pytest.mark.parametrize("which", ["pool", "child"])
def test_worker_of_which_a_process_dies_while_it_starts_becomes_ready(
    inside: World, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A namespace of its own: no other worker is there.
    monkeypatch.setenv("TOOLKIT_NAMESPACE", "starting")
    worker = Worker(inside, env={"TOOLKIT_NAMESPACE": "starting"}).start(wait=False)
    wait_until(lambda: worker.find(which) is not None, f"its {which}")
    killed = worker.pid(which)

    worker.kill(which)

    wait_until(lambda: worker.find(which) not in (None, killed), f"another {which}", 5.0)
    worker.wait_until_ready()
    run = tk.build_index("photos", limit=8, **CHEAP)
    assert_books(run)
    assert (run.record.batches["local"], run.record.moves) == (0, [])
    assert worker.stop() == 0
    assert worker.living() == []


def test_worker_that_cannot_write_its_log_says_so_and_becomes_ready_when_it_can(
    inside: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLKIT_NAMESPACE", "logless")
    data = inside.folder / "logless"
    data.mkdir()
    (data / "logs").touch()
    env = {"TOOLKIT_NAMESPACE": "logless", "TOOLKIT_DATA_DIR": str(data)}
    worker = Worker(inside, env=env).start(wait=False)
    wait_until(lambda: [v.state for v in inside.views()] == ["refused"], "its refusal", 30)
    (refused,) = inside.views()

    (data / "logs").unlink()

    worker.wait_until_ready()
    assert str(data / "logs") in str(refused.reason)
    assert worker.stop() == 0


def test_twin_of_a_batch_that_was_handed_on_is_dropped(
    inside: World, survivor: Worker, victim: Worker, expected: list[tuple[Any, ...]]
) -> None:
    run = Running("photos", name="photos")
    run.until(lambda: bool(inside.claimed_by(run.run_id, victim)), "a batch at the victim")
    (batch,) = inside.claimed_by(run.run_id, victim)
    victim.kill_all(signal.SIGSTOP)
    run.until(
        lambda: batch not in inside.claimed_by(run.run_id, victim), "another owner", BACK_AT_WORK_S
    )

    victim.kill_all(signal.SIGCONT)

    wait_until(lambda: "stale" in victim.log or "gone" in victim.log, "the end of the twin")
    assert_as_if_local(inside, run, expected)
    assert run.build.accounting.embedded == N_PHOTOS


def test_batch_that_a_stopped_worker_swallowed_is_sent_again(
    world: World, survivor: Worker, victim: Worker, expected: list[tuple[Any, ...]]
) -> None:
    swallowed = False
    # Which of two idle workers is handed a batch is the server's choice.
    for _ in range(8):
        with world.entered():
            victim.wait_until_usable()
            victim.kill_all(signal.SIGSTOP)

            run = tk.build_index("photos", name="photos", limit=40, **CHEAP)

            swallowed = "nobody claimed it" in run.logs()
            victim.kill_all(signal.SIGCONT)
            assert_books(run)
            assert_same_table(built("photos"), expected[:40])
            # What it swallowed it finds as it goes on, and nobody waits for it any more.
            assert_empty(world)
            assert_clean(world, run.run_id)
        if swallowed:
            break
    assert swallowed
    assert (run.record.batches["local"], run.record.moves) == (0, [])


def test_worker_that_is_asked_to_stop_finishes_its_batch(
    inside: World, survivor: Worker, victim: Worker, expected: list[tuple[Any, ...]]
) -> None:
    run = Running("photos", name="photos")
    run.until(lambda: bool(inside.claimed_by(run.run_id, victim)), "a batch at the victim")
    (batch,) = inside.claimed_by(run.run_id, victim)

    code = victim.stop()

    assert code == 0
    assert re.search(rf"batch {run.run_id}/{batch}/1: \d+ embedded, 0 failed, .*: ok", victim.log)
    assert_as_if_local(inside, run, expected)
    # Nothing was done twice, and nothing was waited for.
    assert "goes out again" not in run.build.logs()
    assert run.build.record.batches["local"] == 0


def test_build_goes_on_locally_when_every_worker_is_gone(
    inside: World, expected: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A namespace of its own: no other worker is there.
    monkeypatch.setenv("TOOLKIT_NAMESPACE", "alone")
    worker = inside.worker(env={"TOOLKIT_NAMESPACE": "alone"})
    run = Running("photos", name="photos")
    run.until(lambda: bool(inside.claimed_by(run.run_id, worker)), "a batch at work")

    worker.kill_all()
    at = time.monotonic()

    run.until(lambda: run.build.record.road == "local", "the local road", 36)
    assert time.monotonic() - at < 12
    assert_as_if_local(inside, run, expected)
    record = run.build.record
    assert [(move["from"], move["to"]) for move in record.moves] == [("workers", "local")]
    assert record.moves[0]["batches"] == record.batches["workers"]
    assert record.fallback_reason == record.moves[0]["reason"] != ""
