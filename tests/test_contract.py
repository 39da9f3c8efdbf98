"""One contract, every road: the child of this process, and workers of each kind.

A road that passes is one that the dispatcher may take without knowing which it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.clusters import Worker, World, write_slow
from tests.pictures import jpeg, write_photos
from tests.support import CHEAP, wait_until
from toolkit import config
from toolkit.cluster import queues
from toolkit.cluster.protocol import Keys
from toolkit.config import Settings
from toolkit.dispatch.base import Event, Finished, Lost
from toolkit.dispatch.celery import CeleryExecutor
from toolkit.dispatch.local import LocalExecutor
from toolkit.embedding.spec import EncoderRequest, EncoderSpec
from toolkit.errors import ExecutorDiedError
from toolkit.images.identity import image_key
from toolkit.records import Batch, Embedded, Failed, Item

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the embedded server needs POSIX"),
]

REQUEST = EncoderRequest(**CHEAP)  # type: ignore[arg-type]

#: How the worker of a road is started; the local road has none.
WORKERS: dict[str, dict[str, object]] = {
    "local": {},
    "prefork": {"pool": "prefork"},
    "solo": {"pool": "solo"},
    # What the instructions of Celery say, word for word.
    "plain": {"pool": "solo", "plain": True},
}

_numbers = itertools.count()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        yield world


@pytest.fixture(scope="module", params=WORKERS)
def road_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def worker(world: World, road_name: str) -> Worker | None:
    """The worker at the end of the road, alone in a namespace of its own."""
    if road_name == "local":
        return None
    env = {"TOOLKIT_NAMESPACE": road_name}
    return world.worker(env=env, **WORKERS[road_name])


@pytest.fixture(scope="module")
def local(world: World) -> Iterator[LocalExecutor]:
    """The local road; what it makes of a picture is what every road must."""
    with world.entered():
        executor = LocalExecutor(REQUEST, config.resolve())
        yield executor
        executor.close()


@pytest.fixture(scope="module")
def spec(local: LocalExecutor) -> EncoderSpec:
    return local.start()


@pytest.fixture
def settings(world: World, road_name: str) -> Iterator[Settings]:
    with world.entered():
        yield config.resolve(namespace=road_name)


@pytest.fixture
def executor(
    worker: Worker | None, local: LocalExecutor, spec: EncoderSpec, settings: Settings
) -> Iterator[LocalExecutor | CeleryExecutor]:
    """The road under test, open."""
    if worker is None:
        yield local
        return
    road = CeleryExecutor(f"run{next(_numbers)}", spec, REQUEST.model, settings)
    road.start(10)
    wait_until(lambda: road.standing.n_usable == 1, f"a usable worker: {road.standing}", 20)
    yield road
    road.close()


@pytest.fixture
def folder(world: World, request: pytest.FixtureRequest) -> Path:
    """A folder that workers may read."""
    folder = world.datasets / f"folder{next(_numbers)}"
    folder.mkdir()
    return folder


def an_item(path: Path | bytes, number: int, key: bytes | None = None) -> Item:
    name = os.fsencode(path)
    size = os.path.getsize(name) if os.path.exists(name) else 0
    return Item(number, name, size, key)


def items_of(paths: Iterable[Path], first: int = 0) -> tuple[Item, ...]:
    return tuple(an_item(path, number) for number, path in enumerate(paths, first))


def a_batch(spec: EncoderSpec, items: Iterable[Item]) -> Batch:
    return Batch(next(_numbers), spec.fingerprint, tuple(items))


def run_all(executor: LocalExecutor | CeleryExecutor, batches: Iterable[Batch]) -> list[Event]:
    """Send all at once, and again what a road could not see; every event, in order."""
    waiting = {}
    for batch in batches:
        waiting[batch.id] = batch
        executor.submit(batch)
    events: list[Event] = []

    def is_done() -> bool:
        for event in executor.events(0.2):
            events.append(event)
            number = event.outcome.batch_id if isinstance(event, Finished) else event.batch_id
            batch = waiting.pop(number)
            if isinstance(event, Finished) and event.again:
                again = Batch(next(_numbers), batch.fingerprint, event.again)
                waiting[again.id] = again
                executor.submit(again)
        return not waiting

    wait_until(is_done, f"the answer to {len(waiting)} batches", 60)
    return events


def answers(events: Iterable[Event]) -> tuple[list[Embedded], list[Failed], np.ndarray]:
    """What all answers together hold; row ``n`` of the vectors is that of ``embedded[n]``."""
    events = list(events)
    assert [event for event in events if isinstance(event, Lost)] == []
    outcomes = [event.outcome for event in events if isinstance(event, Finished)]
    embedded = [one for outcome in outcomes for one in outcome.embedded]
    vectors = [outcome.vectors[one.row] for outcome in outcomes for one in outcome.embedded]
    return embedded, [f for o in outcomes for f in o.failed], np.array(vectors)


def test_every_picture_is_answered_once_in_order_with_its_key_and_the_vector_of_the_local_road(
    executor: LocalExecutor | CeleryExecutor, local: LocalExecutor, spec: EncoderSpec, folder: Path
) -> None:
    paths = write_photos(folder, 20, seed=10)
    expected = local.embed(a_batch(spec, items_of(paths)), {})

    (event,) = run_all(executor, [a_batch(spec, items_of(paths))])

    embedded, failed, vectors = answers([event])
    assert [one.item_id for one in embedded] == list(range(20))
    assert [one.key for one in embedded] == [image_key(path.read_bytes()) for path in paths]
    assert {(one.width, one.height, one.format) for one in embedded} == {(64, 48, "JPEG")}
    assert vectors.tobytes() == expected.vectors.tobytes()
    assert failed == []


def test_two_batches_that_are_sent_at_once_are_both_answered(
    executor: LocalExecutor | CeleryExecutor, spec: EncoderSpec, folder: Path
) -> None:
    paths = write_photos(folder, 12, seed=100)
    first, second = a_batch(spec, items_of(paths[:8])), a_batch(spec, items_of(paths[8:], 8))

    events = run_all(executor, [first, second])

    by_batch = {e.outcome.batch_id: answers([e])[0] for e in events if isinstance(e, Finished)}
    assert [one.item_id for one in by_batch[first.id]] == list(range(8))
    assert [one.item_id for one in by_batch[second.id]] == list(range(8, 12))


def test_bad_files_fail_each_in_its_own_way_and_spare_their_neighbours(
    executor: LocalExecutor | CeleryExecutor, spec: EncoderSpec, folder: Path
) -> None:
    good, bad, other = write_photos(folder, 3, seed=200)
    bad.write_bytes(b"This is no picture at all.\n")
    was = image_key(jpeg(seed=999))
    items = [
        *(an_item(good, 0), an_item(bad, 1), an_item(folder / "gone.jpg", 2)),
        *(an_item(other, 3, key=was), an_item(b"", 4), an_item(folder, 5)),
    ]

    events = run_all(executor, [a_batch(spec, items)])

    embedded, failed, _ = answers(events)
    assert [one.item_id for one in embedded] == [0]
    assert {one.item_id: one.kind.value for one in failed} == {
        1: "decode",
        2: "unreadable",
        3: "changed",
        4: "unreadable",
        5: "unreadable",
    }
    assert all(one.reason for one in failed)
    assert next(one.key for one in failed if one.item_id == 1) == image_key(bad.read_bytes())


def test_largest_number_and_oddest_name_survive_the_trip(
    executor: LocalExecutor | CeleryExecutor, spec: EncoderSpec, folder: Path
) -> None:
    # A float would round the number; no text holds the name.
    number = 2**53 + 1
    name = os.fsencode(folder) + b"/\xff\xfe \n'\"\\ \xf0\x9f\x90\x88.jpg"
    Path(os.fsdecode(name)).write_bytes(jpeg(seed=300))

    events = run_all(executor, [a_batch(spec, [an_item(name, number)])])

    embedded, failed, _ = answers(events)
    assert failed == []
    assert [(one.item_id, one.key) for one in embedded] == [(number, image_key(jpeg(seed=300)))]


def test_picture_that_only_the_client_can_read_is_embedded_all_the_same(
    executor: LocalExecutor | CeleryExecutor,
    local: LocalExecutor,
    spec: EncoderSpec,
    tmp_path: Path,
) -> None:
    # Outside of the folders that a worker reads.
    paths = write_photos(tmp_path / "private", 5, seed=400)
    expected = local.embed(a_batch(spec, items_of(paths)), {})

    events = run_all(executor, [a_batch(spec, items_of(paths))])

    embedded, failed, vectors = answers(events)
    assert failed == []
    assert [one.item_id for one in embedded] == list(range(5))
    assert vectors.tobytes() == expected.vectors.tobytes()


def test_killed_process_loses_its_batch_says_what_it_had_begun_and_is_replaced(
    executor: LocalExecutor | CeleryExecutor,
    worker: Worker | None,
    world: World,
    road_name: str,
    local: LocalExecutor,
    spec: EncoderSpec,
    folder: Path,
) -> None:
    batch = a_batch(spec, items_of(write_slow(folder, 64, seed=500)))
    executor.submit(batch)
    # Slow pictures: the first ones are done, most are not begun.
    if worker is None:
        wait_until(lambda: bool(executor.events(0.05)) or local.n_done > 3, "some progress")
        assert local.pid is not None
        os.kill(local.pid, signal.SIGKILL)
    else:
        wait_until(lambda: _done(world, road_name) > 3, "some progress")
        worker.kill("child")

    lost: list[Event] = []
    wait_until(lambda: bool(lost.extend(executor.events(0.2)) or lost), "the loss", 20)
    events = run_all(executor, [dataclasses.replace(batch, id=next(_numbers))])

    (loss,) = lost
    assert isinstance(loss, Lost)
    assert (loss.batch_id, loss.is_innocent) == (batch.id, False)
    assert isinstance(loss.error, ExecutorDiedError)
    assert "SIGKILL" in str(loss.error)
    # None where the kill fell between the last decoding and the model.
    assert len(loss.suspects) <= 4
    assert len(answers(events)[0]) == 64


def _done(world: World, road_name: str) -> int:
    """Pictures that the worker has done of its batch, as it says itself."""
    return max((v.work.done for v in world.views(road_name) if v.work), default=0)


def _states(world: World, road_name: str) -> list[str]:
    return [view.state for view in world.views(road_name)]


def test_close_leaves_nothing_behind(
    executor: LocalExecutor | CeleryExecutor,
    worker: Worker | None,
    world: World,
    road_name: str,
    local: LocalExecutor,
    settings: Settings,
    spec: EncoderSpec,
    folder: Path,
) -> None:
    # One batch is at work, and one waits.
    paths = write_slow(folder, 128, seed=600)
    executor.submit(a_batch(spec, items_of(paths[:64])))
    executor.submit(a_batch(spec, items_of(paths[64:], 64)))
    if worker is None:
        wait_until(lambda: bool(executor.events(0.05)) or local.n_done > 3, "some progress")
    else:
        wait_until(lambda: _done(world, road_name) > 3, "some progress")

    executor.close()

    if worker is None:
        assert local.pid is None
        return
    keys = Keys(settings.namespace)
    with world.server.client(1) as backend, world.server.client(0) as broker:
        assert list(backend.scan_iter(f"{keys.prefix}run:*")) == []
        assert list(queues.messages(broker, keys)) == []
        # What the worker computes meanwhile finds nobody, and leaves nothing either.
        wait_until(
            lambda: [v.state for v in world.views(road_name)] == ["ready"], "an idle worker", 20
        )
        assert list(backend.scan_iter(f"{keys.prefix}run:*")) == []
        assert list(queues.messages(broker, keys)) == []


def test_ready_line_says_whether_somebody_restarts_the_worker(
    worker: Worker | None, settings: Settings, spec: EncoderSpec, road_name: str
) -> None:
    if worker is None:
        pytest.skip("the local road has no worker")

    (line,) = [line for line in worker.log.splitlines() if " ready: " in line]

    assert f"v1.{spec.fingerprint[:12]}" in line
    assert "device cpu, model test_vit" in line
    assert ("no supervisor restarts it" in line) == (road_name == "plain")
