"""Workers, their children and the server killed and frozen at random moments, over and over.

One minute of it, with intervals scaled down, runs with the other tests; the soak takes five
minutes for each seed, with the intervals that are shipped.
"""

from __future__ import annotations

import collections
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import toolkit as tk
from tests.clusters import (
    SCALED,
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

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the embedded server needs POSIX")

#: Photos of a build: several batches for each of two workers.
N_PHOTOS = 384

#: Seconds until a batch is at work again, or the workers are, after each fault.
BARS_S = {
    "main killed": 8.0,
    "pool killed": 8.0,
    "child killed": 8.0,
    "worker stopped": 8.0,
    "server killed": 10.0,
    "server frozen": 10.0,
}

#: The soak's own figures, gathered over its seeds.
_took: dict[str, list[float]] = collections.defaultdict(list)


class Storm:
    """Does harm to builds, one thing after the other, and notes how long each one is felt.

    Args:
        world: Whose server is harmed.
        workers: Supervised ones.
        chance: Chooses what happens when.
    """

    def __init__(self, world: World, workers: list[Worker], chance: random.Random) -> None:
        self._world, self._workers, self._chance = world, workers, chance
        self.took: dict[str, list[float]] = collections.defaultdict(list)
        self.run_ids: list[str] = []

    def pass_over(self, expected: list[tuple[Any, ...]]) -> None:
        """Harm one build from its beginning to its end."""
        run = Running("photos", name="photos")
        while not run.is_over:
            hour = time.monotonic() + self._chance.uniform(0.3, 3.0)
            wait_until(lambda hour=hour: time.monotonic() > hour or run.is_over, "its hour")
            if not run.is_over:
                self._strike(run)
        result = run.result()
        assert_books(result)
        assert result.accounting.failed == 0
        assert_same_table(built("photos"), expected)
        self.run_ids.append(run.run_id)

    def _strike(self, run: Running) -> None:
        fault = self._chance.choice(list(BARS_S))
        victim = self._chance.choice(self._workers)
        if fault.startswith("server"):
            is_over = self._harm_server(fault, run)
        else:
            is_over = self._harm_worker(fault, victim, run)
        at = time.monotonic()
        try:
            if is_over is not None:
                what = f"the end of: {fault}"
                wait_until(lambda: is_over() or run.is_over, what, 3 * BARS_S[fault])
                if not run.is_over:
                    self.took[fault].append(time.monotonic() - at)
        finally:
            if fault == "worker stopped":
                victim.kill_all(signal.SIGCONT)

    def _harm_server(self, fault: str, run: Running) -> Callable[[], bool]:
        if fault == "server killed":
            self._world.server.restart()
        else:
            self._world.server.freeze()
            away = time.monotonic() + self._chance.uniform(0.5, 4.0)
            wait_until(lambda: time.monotonic() > away, "a thaw")
            self._world.server.thaw()
        before = self._claims(run)
        return lambda: not self._claims(run) <= before

    def _harm_worker(self, fault: str, victim: Worker, run: Running) -> Callable[[], bool] | None:
        which = fault.partition(" ")[0]
        # Attempts and all: a batch may go out again, and to the same worker.
        held = {claim for claim in self._claims(run) if claim[1].endswith(f"/{victim.id}")}
        if fault == "worker stopped":
            victim.kill_all(signal.SIGSTOP)
        elif (pid := victim.find(which)) is None:
            return None  # it is being started again
        else:
            victim.send(pid, signal.SIGKILL)

        return (lambda: held.isdisjoint(self._claims(run))) if held else None

    def _claims(self, run: Running) -> set[tuple[int, str]]:
        return set(self._world.claims(run.run_id).items())


def storm(world: World, seed: int, seconds: float) -> dict[str, list[float]]:
    """Builds in a storm of so many seconds; how long each fault was felt."""
    write_slow(world.datasets / "photos", N_PHOTOS)
    expected = world.reference("photos")
    workers = [world.worker(), world.worker()]
    weather = Storm(world, workers, random.Random(seed))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with world.entered():
            weather.pass_over(expected)
    with world.entered():
        for worker in workers:
            worker.wait_until_usable()
        # A build that ended while the server was away could take nothing with it. This is what
        # 60 s of silence do; the next build clears away the rest.
        with world.server.client(1) as backend:
            backend.delete(*map(world.keys.run, weather.run_ids))
        calm = tk.build_index("photos", name="calm", **CHEAP)
        assert (calm.state, calm.record.batches["local"], calm.record.moves) == ("done", 0, [])
        assert_clean(world, calm.run_id, *weather.run_ids)
        assert_empty(world)
        for worker in workers:
            assert worker.stop() == 0
        wait_until(lambda: not any(w.living() for w in workers), "the end of the workers", 20)
        assert world.processes() == []
    return weather.took


@pytest.mark.slow
def test_builds_in_a_minute_of_random_faults_lose_and_repeat_nothing() -> None:
    with World() as world:
        took = storm(world, seed=3, seconds=60)

    assert sum(map(len, took.values())) >= 5
    for fault, seconds in took.items():
        assert max(seconds) < 3 * BARS_S[fault], fault


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, list[float]]]:
    """The figures of all seeds, told at the end."""
    yield _took
    write = request.config.get_terminal_writer().line
    write()
    for fault, seconds in sorted(_took.items()):
        write(
            f"{fault:<15} n {len(seconds):4d}  median {statistics.median(seconds):5.1f} s  "
            f"worst {max(seconds):5.1f} s  bar {BARS_S[fault]:4.1f} s"
        )


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_five_minutes_of_random_faults_keep_the_bars(
    figures: dict[str, list[float]], seed: int
) -> None:
    shipped = {"TOOLKIT_THREADS": SCALED["TOOLKIT_THREADS"]}

    with World(shipped) as world:
        took = storm(world, seed, seconds=300)

    for fault, seconds in took.items():
        figures[fault].extend(seconds)
    late = {fault: max(s) for fault, s in took.items() if max(s) > BARS_S[fault]}
    assert late == {}
