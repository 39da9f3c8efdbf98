"""The graph that is begun while vectors are made: what it holds, and what it leaves to others."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.indexes import Vectors, key_of, named, published, random_units, write
from tests.support import wait_until
from toolkit.index import ahead as ahead_room
from toolkit.index.ahead import GraphAhead
from toolkit.index.build import open_current, publish
from toolkit.index.version import IndexVersion

DIM = 16

VECTORS = named(random_units(300, DIM))


def begun_with(names: list[str], base: IndexVersion | None = None) -> GraphAhead:
    """A graph begun ahead that has taken these rows."""
    ahead = GraphAhead(DIM, "f32", 2, base)
    ahead.offer([key_of(name) for name in names], np.stack([VECTORS[name] for name in names]))
    wait_until(lambda: len(ahead) == len(names), "rows added ahead", 20)
    return ahead


def assert_whole(version: IndexVersion) -> None:
    """The graph holds each vector under the number of its row, and nothing else."""
    graph = version.graph.raw
    assert len(graph) == version.n
    assert np.array_equal(graph.get(np.arange(version.n)), version.vectors)
    # What several threads have built need not lead to each of them, only to almost all.
    found = graph.search(version.vectors, 1, threads=1).keys[:, 0]
    assert np.mean(found == np.arange(version.n)) > 0.97


@pytest.mark.parametrize("some", [slice(0, 300), slice(100, 200), slice(None, None, -3)])
def test_rows_that_were_added_ahead_get_their_numbers(tmp_path: Path, some: slice) -> None:
    ahead = begun_with([*VECTORS][some])
    with published(tmp_path, VECTORS, dim=DIM, dtype="f32", ahead=ahead) as version:
        assert_whole(version)
        assert version.manifest["removed_since_rebuild"] == 0
        assert version.manifest["counts"]["added"] == 300


def test_only_what_is_missing_is_added_later(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []

    def progress(step: str, done: int, total: int) -> None:
        if step == "graph":
            reports.append((done, total))

    ahead = begun_with([*VECTORS][:290])
    published(tmp_path, VECTORS, dim=DIM, dtype="f32", ahead=ahead, progress=progress).close()
    assert reports == [(10, 10)]


def test_the_published_graph_grows_ahead_too(tmp_path: Path) -> None:
    names = [*VECTORS]
    first = {name: VECTORS[name] for name in names if not name.endswith("7")}
    second = {name: VECTORS[name] for name in names[1:]}
    with published(tmp_path, first, dim=DIM, dtype="f32") as base:
        ahead = begun_with([name for name in names if name.endswith("7")], base)
        with published_on(tmp_path, base, second, ahead) as version:
            assert_whole(version)
            assert version.manifest["removed_since_rebuild"] == 1
            assert version.manifest["counts"] | {"copies": 0} == {
                "copies": 0, "added": 30, "removed": 1, "kept": 269,
            }  # fmt: skip


def test_rows_that_come_to_nothing_are_taken_out(tmp_path: Path) -> None:
    ahead = begun_with([*VECTORS])
    some = {name: VECTORS[name] for name in [*VECTORS][:250]}
    with published(tmp_path, some, dim=DIM, dtype="f32", ahead=ahead) as version:
        assert_whole(version)
        assert version.manifest["removed_since_rebuild"] == 50


def test_a_content_that_comes_twice_is_added_once(tmp_path: Path) -> None:
    ahead = begun_with([*VECTORS][:20])
    names = [*VECTORS][10:30]
    ahead.offer([key_of(name) for name in names], np.stack([VECTORS[name] for name in names]))
    wait_until(lambda: len(ahead) == 30, "rows added ahead", 20)
    with published(tmp_path, VECTORS, dim=DIM, dtype="f32", ahead=ahead) as version:
        assert_whole(version)


def test_a_damaged_version_is_not_grown(tmp_path: Path) -> None:
    names = [*VECTORS]
    first = {name: VECTORS[name] for name in names[:280]}
    with published(tmp_path, first, dim=DIM, dtype="f32") as base:
        data = bytearray(base.graph_path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        base.graph_path.write_bytes(data)
        ahead = GraphAhead(DIM, "f32", 2, base)
        ahead.offer([key_of(names[280])], VECTORS[names[280]][None])
        with published_on(tmp_path, base, VECTORS, ahead) as version:
            assert_whole(version)
            assert version.manifest["counts"]["kept"] == 0


def test_more_than_may_wait_is_left_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_room, "MAX_WAITING", 100)
    ahead = GraphAhead(DIM, "f32", 2, None)
    names = [*VECTORS]
    # More than may ever wait, so that this does not depend on who is faster.
    ahead.offer([key_of(name) for name in names[:101]], random_units(101, DIM))
    ahead.offer([key_of(name) for name in names[101:150]], np.stack([*VECTORS.values()])[101:150])
    wait_until(lambda: len(ahead) == 49, "rows added ahead", 20)
    with published(tmp_path, VECTORS, dim=DIM, dtype="f32", ahead=ahead) as version:
        assert_whole(version)


def test_a_content_that_a_batch_holds_twice_is_added_once(tmp_path: Path) -> None:
    ahead = GraphAhead(DIM, "f32", 2, None)
    names = [*[*VECTORS][:5], *[*VECTORS][:3], *[*VECTORS][5:9]]
    ahead.offer([key_of(name) for name in names], np.stack([VECTORS[name] for name in names]))
    wait_until(lambda: len(ahead) == 9, "rows added ahead", 20)
    with published(tmp_path, VECTORS, dim=DIM, dtype="f32", ahead=ahead) as version:
        assert_whole(version)
        assert version.manifest["removed_since_rebuild"] == 0


def test_a_batch_that_gave_nothing_costs_nothing(tmp_path: Path) -> None:
    names = [*VECTORS][20:30]
    with begun_with([*VECTORS][:20]) as ahead:
        ahead.offer([], np.empty((0, 0), np.float32))
        ahead.offer([key_of(name) for name in names], np.stack([VECTORS[name] for name in names]))
        wait_until(lambda: len(ahead) == 30, "rows added ahead", 20)


def test_a_new_graph_does_not_take_the_place_of_one_that_may_grow(tmp_path: Path) -> None:
    reports: list[int] = []
    names = [*VECTORS]
    first = {name: VECTORS[name] for name in names[:290]}
    with published(tmp_path, first, dim=DIM, dtype="f32") as base:
        ahead = begun_with(names[290:])

        def progress(step: str, done: int, total: int) -> None:
            if step == "graph":
                reports.append(total)

        with published_on(tmp_path, base, VECTORS, ahead, progress=progress) as version:
            assert_whole(version)
    # Not the 290 that the published graph holds.
    assert reports == [10]


def test_its_thread_ends_with_it() -> None:
    with begun_with([*VECTORS]):
        assert graph_threads()
    assert not graph_threads()


def test_nothing_offered_is_no_thread_and_no_graph(tmp_path: Path) -> None:
    ahead = GraphAhead(DIM, "f32", 2, None)
    assert not graph_threads()
    with published(tmp_path, VECTORS, dim=DIM, dtype="f32", ahead=ahead) as version:
        assert_whole(version)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness")
def test_it_steps_back_for_everybody_else() -> None:
    with begun_with([*VECTORS]):
        (thread,) = graph_threads()
        assert thread.native_id is not None
        assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == 19
        assert os.getpriority(os.PRIO_PROCESS, 0) < 19


def published_on(
    folder: Path, base: IndexVersion, rows: dict[str, Vectors], ahead: GraphAhead, **given: Any
) -> IndexVersion:
    """A version on top of one that is open, as a build writes it."""
    options = {"dim": DIM, "dtype": "f32", "previous": base, "ahead": ahead, **given}
    publish(folder, write(folder, rows, **options))
    return open_current(folder)


def graph_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "graph"]
