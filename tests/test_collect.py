"""What no index uses is removed, and nothing that one uses is touched."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.test_catalog import fill, small_disk
from tests.test_store import (
    DIM,
    SPEC,
    an_outcome,
    key_of,
    put,
    put_run,
    read,
    segments,
    vectors_of,
)
from toolkit.catalog import open_catalog
from toolkit.embedding.collect import Collected, collect_unused
from toolkit.embedding.spec import EncoderSpec
from toolkit.embedding.store import VectorStore
from toolkit.errors import DiskFullError, StorageError

ROW = DIM * 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def catalog(data: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_catalog(data)) as connection:
        yield connection


@pytest.fixture
def store(catalog: sqlite3.Connection, data: Path) -> VectorStore:
    return VectorStore(catalog, data, SPEC)


def used(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    return [(SPEC.fingerprint, key_of(n)) for n in numbers]


def stored(catalog: sqlite3.Connection) -> list[bytes]:
    return [key for (key,) in catalog.execute("SELECT image_key FROM vectors ORDER BY image_key")]


def test_unused_vectors_go_and_used_ones_keep_their_bytes(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "first", range(10))
    put_run(catalog, store, "second", range(10, 20))
    keep = [19, 0, 7, 11, 3]

    collected = collect_unused(catalog, data, used(keep))

    assert collected == Collected(n_vectors=15, n_bytes=15 * ROW)
    assert read(VectorStore(catalog, data, SPEC), keep).tobytes() == vectors_of(keep).tobytes()
    assert stored(catalog) == sorted(key_of(n) for n in keep)
    assert sum(file.stat().st_size for file in segments(data)) == 5 * ROW


def test_segment_that_is_used_whole_stays_as_it_is(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "run", range(3))
    before = [(file.name, file.stat().st_ino) for file in segments(data)]

    collected = collect_unused(catalog, data, used(range(3)))

    assert collected == Collected(0, 0)
    assert [(file.name, file.stat().st_ino) for file in segments(data)] == before


def test_segment_that_nothing_uses_is_gone(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "first", [1])
    put_run(catalog, store, "second", [2])

    collected = collect_unused(catalog, data, used([2]))

    assert collected == Collected(1, ROW)
    assert len(segments(data)) == 1
    assert catalog.execute("SELECT count(*) FROM segments").fetchone() == (1,)


def test_another_encoder_s_vector_of_a_used_image_is_unused(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    other = VectorStore(catalog, data, EncoderSpec.imported(DIM, "other"))
    put_run(catalog, store, "run", [1])
    put_run(catalog, other, "run", [1])

    collected = collect_unused(catalog, data, used([1]))

    assert collected == Collected(1, ROW)
    assert store.has([key_of(1)]) == {key_of(1)}
    assert other.has([key_of(1)]) == set()


def test_bytes_that_no_commit_names_go(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "run", [1, 2])
    (segment,) = segments(data)
    with open(segment, "ab") as file:
        file.write(bytes(ROW + 5))
    (segment.parent / "dead.f32").write_bytes(bytes(7))

    collected = collect_unused(catalog, data, used([1, 2]))

    assert collected == Collected(0, ROW + 5 + 7)
    assert read(VectorStore(catalog, data, SPEC), [2, 1]).tolist() == vectors_of([2, 1]).tolist()


def test_store_that_is_open_reads_on_after_a_collection(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "run", [1, 2, 3])
    before = read(store, [3])

    collect_unused(catalog, data, used([3]))

    assert read(store, [3]).tolist() == before.tolist() == vectors_of([3]).tolist()


def test_collecting_again_and_storing_on_changes_nothing_that_is_used(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "run", range(6))

    for keep in ([0, 1, 3, 5], [1, 5], [1, 5]):
        collect_unused(catalog, data, used(keep))
    put_run(catalog, store, "run", [7])

    assert read(store, [5, 7, 1]).tolist() == vectors_of([5, 7, 1]).tolist()


def test_collection_that_died_anywhere_is_finished_by_the_next(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "run", range(4))
    (segment,) = segments(data)
    # Dead after the unused rows were forgotten, with the rewritten segment half there.
    catalog.execute("DELETE FROM vectors WHERE image_key IN (?, ?)", (key_of(0), key_of(2)))
    segment.with_name(f"{segment.stem}c.f32").write_bytes(b"half")
    between = read(VectorStore(catalog, data, SPEC), [3, 1])
    collect_unused(catalog, data, used([1, 3]))
    # Dead after the commit that names the rewritten one, with the old one still there.
    segment.write_bytes(bytes(4 * ROW))
    collect_unused(catalog, data, used([1, 3]))

    after = read(VectorStore(catalog, data, SPEC), [3, 1])
    assert between.tolist() == after.tolist() == vectors_of([3, 1]).tolist()
    assert [file.stat().st_size for file in segments(data)] == [2 * ROW]


def test_what_the_disk_has_lost_is_forgotten_so_that_it_can_be_embedded_again(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "first", [1, 2])
    put_run(catalog, store, "second", [3])
    first, second = sorted(segments(data), key=lambda file: -file.stat().st_size)
    os.truncate(first, ROW + 1)
    second.unlink()

    collect_unused(catalog, data, used([1, 2, 3]))

    assert stored(catalog) == [key_of(1)]
    put_run(catalog, store, "again", [2, 3])
    assert read(store, [1, 2, 3]).tolist() == vectors_of([1, 2, 3]).tolist()


def test_full_disk_stops_it_without_a_loss_and_empty_segments_go_first(tmp_path: Path) -> None:
    dim = 256
    spec = EncoderSpec.imported(dim, "wide")
    with (
        small_disk(tmp_path / "disk", "3m") as disk,
        contextlib.closing(open_catalog(disk)) as catalog,
    ):
        store = VectorStore(catalog, disk, spec)
        with store.writer("wide") as writer:
            put(catalog, writer, an_outcome(range(1000), dim=dim))
        fill(disk)
        keep = [(spec.fingerprint, key_of(n)) for n in range(1, 1000)]
        (disk / "ballast").write_bytes(bytes(os.path.getsize(disk / "ballast") - 200_000))

        with pytest.raises(DiskFullError):
            collect_unused(catalog, disk, keep)
        left = read(store, range(1, 1000))
        files = [f.name for f in (disk / "vectors").rglob("*.f32")]
        collect_unused(catalog, disk, [])

        assert left.tobytes() == vectors_of(range(1, 1000), dim).tobytes()
        assert len(files) == 1
        assert list((disk / "vectors").rglob("*.f32")) == []


@pytest.mark.slow
def test_time_grows_with_the_vectors_and_not_with_their_square(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    n = 30_000
    put_run(catalog, store, "run", range(n))
    # Each image once, from the second on: so every row moves.
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    catalog.set_progress_handler(count, 1000)
    collect_unused(catalog, data, used(range(1, n)))
    catalog.set_progress_handler(None, 0)

    # A full scan for each row would be some 10 billion steps; this is in thousands.
    assert steps < 20_000
    assert np.array_equal(read(store, [1, n - 1]), vectors_of([1, n - 1]))
    with pytest.raises(StorageError):
        read(store, [0])
