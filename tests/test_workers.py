"""When workers are used, when not, and what a build with them costs: real workers, no faults."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
from tests.pictures import write_photos
from tests.support import CHEAP, wait_until
from toolkit.cluster import registry
from toolkit.errors import ExecutorUnavailableError, RunCancelledError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the embedded server needs POSIX"),
]

N_PHOTOS = 192


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        write_slow(world.datasets / "photos", N_PHOTOS)
        write_slow(world.datasets / "others", 128, seed=5000)
        yield world


@pytest.fixture(scope="module")
def expected(world: World) -> list[tuple[Any, ...]]:
    """The index that this machine makes without workers."""
    return world.reference("photos")


@pytest.fixture(scope="module")
def solo(world: World) -> Worker:
    """A solo worker that serves two encoders."""
    both = [CHEAP, {**CHEAP, "global_pool": "avg"}]
    env = {"TOOLKIT_WORKER_ENCODERS": json.dumps(both)}
    return world.worker(pool="solo", plain=True, env=env)


@pytest.fixture
def inside(world: World) -> Iterator[World]:
    with world.entered():
        yield world


@pytest.fixture
def apart(
    inside: World, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A namespace of its own, in which no worker is but those of the test."""
    monkeypatch.setenv("TOOLKIT_NAMESPACE", "".join(filter(str.isalnum, request.node.name))[:60])
    n = len(inside.workers)
    yield inside
    for worker in inside.workers[n:]:
        worker.reap()


def own(**env: str) -> dict[str, str]:
    """The environment of a worker in this test's namespace."""
    return {"TOOLKIT_NAMESPACE": os.environ["TOOLKIT_NAMESPACE"], **env}


def another_release(world: World) -> None:
    info = registry.WorkerInfo(
        id="newer", pid=1, host="h", version="9", protocol=99, queues=("v99.x",), ttl_s=600
    )
    with world.server.client(1) as client:
        registry.announce(client, world.keys, info)


def no_worker(world: World) -> None:
    """There is none."""


def another_queue(world: World) -> None:
    world.worker(plain=True, env=own(), flags=("-Q", "elsewhere"))


def other_weights(world: World) -> None:
    world.worker(env=own(), encoder={"seed": 1})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (no_worker, "no worker is registered"),
        (another_release, "speaks protocol 99"),
        (another_queue, "consumes elsewhere, not v1."),
        (other_weights, "serves test_vit with other weights"),
    ],
)
def test_worker_that_cannot_serve_is_not_used_and_the_reason_is_told(
    apart: World, expected: list[tuple[Any, ...]], setting: Any, words: str
) -> None:
    setting(apart)

    run = tk.build_index("photos", name="photos", limit=40, **CHEAP)
    with pytest.raises(ExecutorUnavailableError, match=words):
        tk.build_index("others", name="others", distributed="require", **CHEAP)

    assert_books(run)
    assert_same_table(built("photos"), expected[:40])
    assert run.record.batches == {"workers": 0, "local": 1}
    assert words in str(run.record.fallback_reason)
    required = tk.runs()[0]
    assert required.record.index == "others"
    assert (required.state, required.accounting.embedded) == ("failed", 0)
    assert required.record.batches == {"workers": 0, "local": 0}


def test_fast_build_is_served_by_a_worker_that_was_started_for_it(inside: World) -> None:
    fast = {"precision": "bf16", "decode": "reduced"}
    env = {"TOOLKIT_NAMESPACE": "fast"}
    flags = [f"--{name}={value}" for name, value in fast.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_NAMESPACE", "fast")
        worker = inside.worker(env=env, flags=flags)
        alone = tk.build_index("others", name="alone", distributed=False, **CHEAP, **fast)
        expected = built("alone")
        for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
            (inside.folder / "data" / name).unlink(missing_ok=True)

        run = tk.build_index("others", name="others", distributed="require", **CHEAP, **fast)

        with pytest.raises(ExecutorUnavailableError, match="serves test_vit with other weights"):
            tk.build_index("photos", name="exact", distributed="require", **CHEAP)
        worker.stop()
    assert alone.record.batches["workers"] == run.record.batches["local"] == 0
    assert_same_table(built("others"), expected)
    assert run.record.fidelity is not None


def test_worker_that_is_busy_with_another_build_counts_as_available(
    inside: World, solo: Worker, expected: list[tuple[Any, ...]]
) -> None:
    # Another encoder, another dataset; one solo worker, which answers no ping meanwhile.
    other = Running("others", name="others", global_pool="avg")
    other.until(lambda: bool(inside.claims(other.run_id)), "a worker that is busy")
    run = Running("photos", name="photos")

    runs = other.result(), run.result()

    for one in runs:
        assert_books(one)
        assert one.record.batches["local"] == 0
        assert (one.record.moves, one.record.fallback_reason) == ([], None)
    assert_same_table(built("photos"), expected)
    assert len(built("others")) == 128
    assert_clean(inside, other.run_id, run.run_id)
    assert_empty(inside)


def test_nothing_that_nobody_lost_is_sent_twice(
    inside: World, solo: Worker, expected: list[tuple[Any, ...]]
) -> None:
    run = tk.build_index("photos", name="photos", **CHEAP)

    # The second batch in flight waits longer than somebody idle would let it.
    assert "goes out again" not in run.logs()
    assert_same_table(built("photos"), expected)
    assert run.record.batches["local"] == 0


def test_worker_that_joins_in_mid_build_is_used_within_seconds(
    apart: World, expected: list[tuple[Any, ...]]
) -> None:
    write_slow(apart.datasets / "many", 600)
    run = Running("many", name="many")
    run.until(lambda: run.build.record.road == "local", "the local road")

    apart.worker(env=own())
    at = time.monotonic()

    run.until(lambda: bool(apart.claims(run.run_id)), "a batch at the new worker", 15)
    used_s = time.monotonic() - at
    result = run.result()
    assert used_s < 5
    assert_books(result)
    assert result.record.batches["workers"] > 0
    assert [(m["from"], m["to"]) for m in result.record.moves] == [("local", "workers")]
    assert [row[-1] for row in built("many")[:N_PHOTOS]] == [row[-1] for row in expected]


def test_worker_that_sees_other_pictures_under_the_same_paths_gets_the_right_ones(
    apart: World, expected: list[tuple[Any, ...]]
) -> None:
    if os.geteuid() != 0 or not _can_unshare():
        pytest.skip("only root may give a process another view of a folder")
    write_photos(apart.folder / "elsewhere", N_PHOTOS, seed=70_000)
    other_view = f"mount --bind {apart.folder / 'elsewhere'} {apart.datasets / 'photos'}"
    prefix = ("unshare", "-m", "sh", "-c", f'{other_view} && exec "$@"', "sh")
    apart.worker(env=own(), prefix=prefix)

    run = tk.build_index("photos", name="photos", **CHEAP)

    assert_books(run)
    assert_same_table(built("photos"), expected)
    assert run.record.batches["local"] == 0
    assert_clean(apart, run.run_id)


def _can_unshare() -> bool:
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


#: A client in a process of its own, that says how much it read while it built.
READER = """
import re, sys, toolkit as tk
def read():
    return int(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1])
tk.build_index("warm", name="warm", model="test_vit", pretrained=False)
before = read()
run = tk.build_index("large", name="large", model="test_vit", pretrained=False)
print(run.record.batches["workers"], run.record.batches["local"], read() - before)
"""


def test_client_reads_almost_nothing_of_photos_that_a_worker_reads_by_path(
    inside: World, solo: Worker
) -> None:
    write_photos(inside.datasets / "warm", 10, seed=80_000)
    large = inside.datasets / "large"
    large.mkdir()
    noise = np.random.default_rng(0)
    for number in range(24):
        pixels = noise.integers(0, 256, (1100, 1000, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(large / f"{number}.bmp")
    n_bytes = sum(file.stat().st_size for file in large.iterdir())

    done = subprocess.run(
        [sys.executable, "-c", READER],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    n_workers, n_local, n_read = map(int, done.stdout.split())
    assert (n_workers > 0, n_local) == (True, 0)
    assert n_bytes > 24 * 3_000_000
    assert n_read < 0.05 * n_bytes


def test_cancelled_build_starts_no_further_batch_and_leaves_nothing(
    inside: World, solo: Worker
) -> None:
    run = Running("photos", name="photos")
    run.until(lambda: bool(inside.claims(run.run_id)), "a batch at work")
    begun = set(inside.claims(run.run_id))

    run.build.cancel()

    with pytest.raises(RunCancelledError):
        run.result()
    wait_until(lambda: [v.state for v in inside.views()] == ["ready"], "an idle worker", 20)
    logged = re.findall(rf"batch {run.run_id}/(\d+)/\d+: \d+ images", solo.log)
    assert set(map(int, logged)) == begun
    assert_clean(inside, run.run_id)
    assert_empty(inside)


def test_build_that_was_killed_is_gone_on_with_and_cleared_away(
    inside: World, solo: Worker, expected: list[tuple[Any, ...]]
) -> None:
    dead = tk.build_index("photos", name="photos", wait=False, **CHEAP)
    wait_until(lambda: dead.accounting.embedded > 0, "a stored batch")
    os.kill(dead.record.pid, signal.SIGKILL)
    wait_until(lambda: not dead.state.is_live, "its end")
    # What 60 s of silence do.
    with inside.server.client(1) as backend:
        backend.delete(inside.keys.run(dead.run_id))

    run = tk.build_index("photos", name="photos", **CHEAP)

    assert_books(run)
    assert_same_table(built("photos"), expected)
    assert run.accounting.reused >= dead.accounting.embedded > 0
    assert run.accounting.embedded + run.accounting.reused == N_PHOTOS
    assert run.record.batches["local"] == 0
    assert_clean(inside, run.run_id, dead.run_id)
    assert_empty(inside)


def test_no_process_is_left_when_a_worker_has_been_stopped(apart: World) -> None:
    worker = apart.worker(env=own())
    n = len(worker.living())

    code = worker.stop()

    assert (code, n >= 4) == (0, True)
    wait_until(lambda: worker.living() == [], "the end of its processes", 5)
    assert apart.views() == []
