"""Client, server and workers on machines of their own, which share no folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import machines
from tests.clusters import (
    Worker,
    assert_books,
    assert_clean,
    assert_empty,
    assert_same_table,
    built,
    write_slow,
)
from tests.machines import Machine, Network, Remote, Site, time_shift
from tests.pictures import write_photos
from toolkit.driver import Build

pytestmark = pytest.mark.slow

#: Dataset → the table of its index.
Tables = dict[str, list[tuple[Any, ...]]]

#: Bytes that the server may hold, and pictures of 3 MB that are more than twice as much.
MOST_ON_SERVER, N_LARGE = 64 << 20, 48

#: Three times 1.5 s, 3 s and 10 s: what may pass until local work begins, until a server is
#: missed, and until the workers are used again.
LOCAL_S, NOTICED_S, USED_AGAIN_S = 4.5, 9.0, 30.0

#: Three times the seconds in which the local road loads its model.
LOADED_S = 12.0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    reason = machines.why_not()
    if reason is not None:
        pytest.skip(reason)
    with Network() as network:
        yield network


@pytest.fixture(scope="module")
def host(network: Network) -> Machine:
    """Where the server runs."""
    return network.machine()


@pytest.fixture(scope="module")
def desk(network: Network) -> Machine:
    """Where builds are started."""
    return network.machine()


@pytest.fixture(scope="module")
def site(host: Machine) -> Iterator[Site]:
    with Site(host) as site:
        yield site


@pytest.fixture(scope="module")
def workers(network: Network, site: Site) -> list[Worker]:
    """Two, of which one speaks TLS; neither has the pictures."""
    started = []
    for url in (site.url(), site.tls_url):
        machine = network.machine()
        env = own(site, machine, REDIS_URL=url)
        started.append(
            Worker(site, env=env, prefix=machine.without(site.datasets)).start(wait=False)
        )
    for worker in started:
        worker.wait_until_ready()
    return started


@pytest.fixture(scope="module")
def expected(site: Site) -> Tables:
    """The index of each dataset that a machine with the pictures makes alone."""
    folders = [site.datasets / name for name in ("photos", "many", "mixed", "wide")]
    photos, many, mixed, wide = folders
    write_slow(photos, 64)
    noise = np.random.default_rng(0)
    for number in range(N_LARGE):
        pixels = noise.integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"large_{number:02d}.bmp")
    write_slow(many, 1000)
    for folder, n, side in ((mixed, 60, 3700), (wide, 8, 1850)):
        write_photos(folder, n)
        Image.effect_noise((side, side), 50).convert("RGB").save(folder / f"{folder.name}.bmp")
    return {folder.name: site.reference(folder.name) for folder in folders}


@pytest.fixture
def inside(site: Site) -> Iterator[Site]:
    """This process sees what the client's machine stores."""
    with site.entered():
        yield site


def own(site: Site, machine: Machine, **env: str) -> dict[str, str]:
    """The environment of a worker on a machine, which keeps what it stores to itself."""
    folder = str(site.folder / machine.name)
    private = {"TOOLKIT_DATA_DIR": folder, "TOOLKIT_WORKER_ROOTS": str(site.datasets)}
    return {**private, **site.slow, **env}


def planned_at(run: Build) -> float:
    """When it was known what is to be embedded, in seconds since the epoch."""
    return next(event["at"] for event in run._view.events() if event["event"] == "plan")


def assert_as_if_local(site: Site, run: Build, expected: Tables) -> None:
    """Where and how it was made never shows in the result, nor on the server."""
    assert_books(run)
    assert_same_table(built(run.record.index), expected[run.record.index])
    assert_clean(site, run.run_id)
    assert_empty(site)


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_workers_that_share_no_folder_make_the_index_of_the_local_road(
    inside: Site,
    desk: Machine,
    workers: list[Worker],
    expected: Tables,
    is_encrypted: bool,
) -> None:
    url = inside.tls_url if is_encrypted else inside.url()

    client = Remote(desk, "photos", REDIS_URL=url)

    run = client.result()
    assert_as_if_local(inside, run, expected)
    assert (client.answer["batches"]["local"], client.answer["moves"]) == (0, [])
    assert client.answer["fallback_reason"] is None
    assert all(f"batch {run.run_id}/" in worker.log for worker in workers)
    with inside.server.client() as server:
        peak = server.info("memory")["used_memory_peak"]
    assert N_LARGE * 3_000_000 > 2 * MOST_ON_SERVER > 2 * peak


def wrong_password(site: Site, host: Machine) -> str:
    return site.url(password="wrong")


def pulled_cable(site: Site, host: Machine) -> str:
    host.unplug()
    return site.url()


@pytest.mark.parametrize(
    ("fault", "words"),
    [(wrong_password, "wants a password, another one"), (pulled_cable, "does not answer in time")],
)
def test_build_begins_locally_at_once_and_names_the_cause(
    inside: Site,
    host: Machine,
    desk: Machine,
    expected: Tables,
    fault: Callable[[Site, Machine], str],
    words: str,
) -> None:
    since = time.time()
    try:
        # Slow, so that the process is there long enough to be seen.
        client = Remote(desk, "photos", REDIS_URL=fault(inside, host), **inside.slow)
        begun = client.local_start(since)
        run = client.result()
    finally:
        host.plug()

    assert begun - planned_at(run) < LOCAL_S
    assert_as_if_local(inside, run, expected)
    assert (run.record.batches["workers"], run.record.moves) == (0, [])
    assert words in client.answer["fallback_reason"]
    assert client.answer["stderr"].count("WARNING") == 1


def test_pulled_cable_moves_the_work_here_and_back_once_it_is_plugged_in(
    inside: Site, host: Machine, desk: Machine, workers: list[Worker], expected: Tables
) -> None:
    for worker in workers:  # a cable was pulled before
        worker.wait_until_usable()
    # So many that local work does not end before the workers are connected again.
    client = Remote(desk, "many", **inside.slow)
    client.until(lambda: bool(inside.claims(client.run_id)), "a batch at work")

    host.unplug()
    try:
        moved_s = NOTICED_S + LOADED_S
        client.until(lambda: client.build.record.road == "local", "the local road", moved_s)
    finally:
        host.plug()
    client.until(lambda: client.build.record.road == "workers", "the workers", USED_AGAIN_S)

    run = client.result()
    assert_as_if_local(inside, run, expected)
    moves = [(move["from"], move["to"]) for move in run.record.moves]
    assert moves[:2] == [("workers", "local"), ("local", "workers")]
    assert "does not answer in time" in run.record.moves[0]["reason"]


def test_worker_whose_clock_is_wrong_is_used_like_any_other(
    inside: Site, network: Network, desk: Machine, expected: Tables
) -> None:
    # A clock that is fast sees a message as old, one that is slow a beat as young.
    env = {"TOOLKIT_NAMESPACE": "clocks"}
    started = []
    for offset_s in (600, -600):
        machine = network.machine()
        shifted = str(time_shift(inside.folder / f"shift{offset_s}", offset_s))
        given = own(inside, machine, PYTHONPATH=shifted, **env)
        prefix = machine.without(inside.datasets)
        worker = Worker(inside, pool="solo", env=given, prefix=prefix)
        started.append(worker.start(wait=False))
    for worker in started:
        worker.wait_until_ready()

    client = Remote(desk, "photos", **env)

    run = client.result()
    assert_as_if_local(inside, run, expected)
    assert (run.record.batches["local"], run.record.moves) == (0, [])
    assert all(f"batch {run.run_id}/" in worker.log for worker in started)
    assert "goes out again" not in run.logs()
    for worker in started:
        worker.reap()


def test_picture_too_large_to_be_sent_is_embedded_here_and_the_rest_by_workers(
    inside: Site, desk: Machine, workers: list[Worker], expected: Tables
) -> None:
    assert (inside.datasets / "mixed" / "mixed.bmp").stat().st_size > 40_000_000

    client = Remote(desk, "mixed")

    run = client.result()
    assert_as_if_local(inside, run, expected)
    assert run.record.images == {"workers": 60, "local": 1}
    assert run.accounting.embedded == 61


def test_slow_line_is_no_reason_to_leave_the_workers(
    inside: Site, desk: Machine, workers: list[Worker], expected: Tables
) -> None:
    # One picture takes several seconds, in which the server says nothing.
    assert (inside.datasets / "wide" / "wide.bmp").stat().st_size > 10_000_000

    with desk.slow_line("20mbit"):
        client = Remote(desk, "wide")
        run = client.result()

    assert_as_if_local(inside, run, expected)
    assert (run.record.batches["local"], run.record.moves) == (0, [])
