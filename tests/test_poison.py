"""Pictures that crash, hang or seize the process that decodes them: they alone fail."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

import toolkit as tk
from tests.clusters import (
    Worker,
    World,
    assert_books,
    assert_clean,
    assert_empty,
    built,
)
from tests.pictures import jpeg, write_photos
from tests.support import CHEAP
from toolkit import config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the embedded server needs POSIX"),
]

#: Ways to be poison → what is said of it. ``GRAB`` holds the interpreter's lock: no thread of
#: its process can say or do anything.
KINDS = {"CRASH": "SIGSEGV", "HANG": "no progress for 3 s", "GRAB": "no progress for 3 s"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        write_photos(world.datasets / "photos", 63, seed=0)
        yield world


@pytest.fixture(scope="module")
def expected(world: World) -> list[bytes]:
    """The vectors of the harmless neighbours, as this machine makes them."""
    return [row[-1] for row in world.reference("photos")]


@pytest.fixture(scope="module")
def worker(world: World) -> Worker:
    # Solo: Celery itself would bring no limit to bear there.
    return world.worker(pool="solo")


def test_poison_is_tried_alone_on_the_worker_and_at_last_here_and_the_worker_lives(
    world: World, expected: list[bytes], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, n_ready = worker.pid("main"), worker.n_ready
    poison = world.datasets / "photos" / "photo_0030b.jpg"
    poison.write_bytes(jpeg(seed=555) + b"CRASH")
    with world.entered():
        monkeypatch.setenv("CELERY_MAX_RETRIES", "2")

        run = tk.build_index("photos", name="photos", **CHEAP)
        again = tk.build_index("photos", name="photos", **CHEAP)

        events = tk.attach(run.run_id)._view.events()
        assert_books(run)
        assert [row[-1] for row in built("photos")] == expected
        assert_clean(world, run.run_id)
        assert_empty(world)
    poison.unlink()
    (failure,) = run.failures.to_dict("records")
    assert (failure["path"], failure["kind"]) == (str(poison), "crash")
    assert "SIGSEGV" in failure["reason"]
    # Among others, alone on the worker, alone here: never more often than retries and one.
    assert len([event for event in events if event["event"] == "lost"]) == 3
    assert (run.record.batches["local"], run.record.moves) == (1, [])
    assert (worker.pid("main"), worker.n_ready) == (main, n_ready)
    # Remembered: the second build lets it kill nothing.
    assert (again.accounting.failed, sum(again.record.batches.values())) == (1, 0)


def test_poison_of_every_kind_in_one_batch_is_told_apart_from_its_neighbours(
    world: World, expected: list[bytes], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = world.datasets / "photos"
    bad = {kind: photos / f"photo_00{n}0b.jpg" for n, kind in enumerate(KINDS, 1)}
    for kind, path in bad.items():
        path.write_bytes(jpeg(seed=len(kind)) + kind.encode())
    with world.entered():
        monkeypatch.setenv("CELERY_MAX_RETRIES", "1")
        at = time.monotonic()

        run = tk.build_index("photos", name="photos", **CHEAP)

        took_s = time.monotonic() - at
        stall_s = config.resolve().stall_s
        assert_books(run)
        assert [row[-1] for row in built("photos")] == expected
        reasons = run.failures.set_index("path")["reason"]
        assert_clean(world, run.run_id)
        assert_empty(world)
    for path in bad.values():
        path.unlink()
    assert sorted(reasons.index) == sorted(map(str, bad.values()))
    for kind, words in KINDS.items():
        assert words in reasons[str(bad[kind])]
    # The bar of one image that hangs, for two of them.
    assert took_s < 2 * (4 * stall_s + 30)
