"""What was stored is there, byte for byte, whatever happened to the process that stored it."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_catalog import fill, small_disk
from toolkit.catalog import open_catalog, transaction
from toolkit.embedding.spec import EncoderSpec
from toolkit.embedding.store import (
    READ_ROWS,
    SegmentWriter,
    VectorStore,
    remember_failures,
    segment_folder,
    usage,
)
from toolkit.errors import DiskFullError, StorageError
from toolkit.records import Embedded, Failed, FailureKind, Outcome

Vectors = NDArray[np.float32]

DIM = 3
SPEC = EncoderSpec.imported(DIM, "test")


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


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def vectors_of(numbers: Sequence[int], dim: int = DIM) -> Vectors:
    """The vector of an image, which tells its number: ``[n, n + 0.5, n + 0.5, …]``."""
    out = np.add.outer(np.array(numbers, np.float32), np.full(dim, 0.5, np.float32))
    out[:, 0] -= 0.5
    return out.astype(np.float32)


def an_outcome(numbers: Sequence[int], failed: Sequence[Failed] = (), dim: int = DIM) -> Outcome:
    embedded = tuple(Embedded(n, key_of(n), row, 640, 480, "JPEG") for row, n in enumerate(numbers))
    return Outcome(0, SPEC.fingerprint, embedded, tuple(failed), vectors_of(numbers, dim))


def put(catalog: sqlite3.Connection, writer: SegmentWriter, outcome: Outcome) -> None:
    """Append and commit, as a build does."""
    first = writer.append(outcome.vectors)
    with transaction(catalog):
        writer.record(outcome, first, decode_version=1)


def put_run(
    catalog: sqlite3.Connection, store: VectorStore, run: str, *batches: Sequence[int]
) -> None:
    """One run that stores these batches."""
    with store.writer(run) as writer:
        for numbers in batches:
            put(catalog, writer, an_outcome(numbers))


def read(store: VectorStore, numbers: Sequence[int]) -> Vectors:
    return np.concatenate(list(store.read(key_of(n) for n in numbers)))


def segments(data: Path) -> list[Path]:
    return sorted(segment_folder(data, SPEC.fingerprint).glob("*"))


def test_vectors_come_back_in_any_order_from_several_segments(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "first", [1, 2, 3], [4])
    put_run(catalog, store, "second", [10, 11])
    asked = [11, 2, 4, 2, 10, 1, 3]

    found = read(VectorStore(catalog, data, SPEC), asked)

    assert found.dtype == np.float32
    assert found.tobytes() == vectors_of(asked).tobytes()


def test_more_keys_than_one_portion_come_in_several(
    catalog: sqlite3.Connection, store: VectorStore
) -> None:
    put_run(catalog, store, "run", range(READ_ROWS + 1))

    lengths = [len(part) for part in store.read(key_of(n) for n in range(READ_ROWS + 1))]

    assert lengths == [READ_ROWS, 1]
    assert list(store.read([])) == []


def test_segment_that_grows_while_it_is_read_is_read_to_its_end(
    catalog: sqlite3.Connection, store: VectorStore
) -> None:
    with store.writer("run") as writer:
        put(catalog, writer, an_outcome([1]))
        first = read(store, [1])
        put(catalog, writer, an_outcome([2, 3]))
        all_three = read(store, [3, 1, 2])

    assert first.tolist() == vectors_of([1]).tolist()
    assert all_three.tolist() == vectors_of([3, 1, 2]).tolist()


def test_has_tells_stored_from_unknown_for_this_encoder_only(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "run", [1, 2])
    other = VectorStore(catalog, data, EncoderSpec.imported(DIM, "other"))

    assert store.has([key_of(1), key_of(3)]) == {key_of(1)}
    assert other.has([key_of(1)]) == set()
    assert store.has([]) == set()


def test_key_that_is_not_stored_is_named(store: VectorStore) -> None:
    with pytest.raises(StorageError, match=f"{key_of(7).hex()}; build again"):
        list(store.read([key_of(7)]))


def test_same_encoder_keeps_its_number(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    other = VectorStore(catalog, data, EncoderSpec.imported(DIM, "other"))
    again = VectorStore(catalog, data, SPEC)

    assert again.encoder_id == store.encoder_id != other.encoder_id


def test_tail_that_no_commit_names_is_ignored_and_next_run_stores_it_anew(
    catalog: sqlite3.Connection, store: VectorStore
) -> None:
    with store.writer("run") as writer:
        put(catalog, writer, an_outcome([1]))
        writer.append(vectors_of([2]))

    before = store.has([key_of(2)])
    put_run(catalog, store, "next", [2])

    assert before == set()
    assert read(store, [1, 2]).tolist() == vectors_of([1, 2]).tolist()


def test_twin_keeps_the_first(catalog: sqlite3.Connection, store: VectorStore) -> None:
    put_run(catalog, store, "first", [1])
    late = Outcome(
        *(0, SPEC.fingerprint, (Embedded(1, key_of(1), 0, 1, 1, "PNG"),), ()),
        vectors=np.full((1, DIM), 9, np.float32),
    )

    with store.writer("second") as writer:
        put(catalog, writer, late)

    assert read(store, [1]).tolist() == vectors_of([1]).tolist()


def test_two_runs_of_one_name_never_write_over_each_other(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "import-1", [1])
    put_run(catalog, store, "import-1", [2])
    other = VectorStore(catalog, data, EncoderSpec.imported(DIM, "other"))
    put_run(catalog, other, "import-1", [3])

    assert read(store, [1, 2]).tolist() == vectors_of([1, 2]).tolist()
    assert read(other, [3]).tolist() == vectors_of([3]).tolist()


def test_transaction_that_was_rolled_back_does_not_mislead_the_next(
    catalog: sqlite3.Connection, store: VectorStore
) -> None:
    with store.writer("mine") as mine, store.writer("other") as other:
        first = mine.append(vectors_of([1]))
        with pytest.raises(RuntimeError), transaction(catalog):  # noqa: PT012  half done
            mine.record(an_outcome([1]), first, decode_version=1)
            raise RuntimeError
        # It takes the number in the catalog that the first one had.
        put(catalog, other, an_outcome([10]))
        put(catalog, mine, an_outcome([2]))

    assert store.has([key_of(1)]) == set()
    assert read(store, [10, 2]).tolist() == vectors_of([10, 2]).tolist()


def test_run_that_stored_nothing_leaves_no_file(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    failed = Failed(1, FailureKind.DECODE, "no picture", key_of(1))
    with store.writer("nothing"):
        pass
    with store.writer("only failures") as writer, transaction(catalog):
        writer.record(an_outcome([], [failed]), 0, decode_version=1)
    with store.writer("not committed") as writer:
        writer.append(vectors_of([1]))

    assert segments(data) == []
    assert catalog.execute("SELECT count(*) FROM segments").fetchone() == (0,)


def test_batch_without_a_vector_can_be_appended(
    catalog: sqlite3.Connection, store: VectorStore
) -> None:
    with store.writer("run") as writer:
        put(catalog, writer, an_outcome([]))
        put(catalog, writer, an_outcome([5]))

    assert read(store, [5]).tolist() == vectors_of([5]).tolist()


def test_size_and_format_of_a_picture_are_kept(
    catalog: sqlite3.Connection, store: VectorStore
) -> None:
    put_run(catalog, store, "run", [1])

    assert catalog.execute("SELECT * FROM images").fetchall() == [(key_of(1), 640, 480, "JPEG")]


def test_only_failures_of_content_are_remembered(catalog: sqlite3.Connection) -> None:
    kinds = list(FailureKind)
    failed = [Failed(n, kind, "why", key_of(n)) for n, kind in enumerate(kinds)]

    with transaction(catalog):
        remember_failures(catalog, [*failed, Failed(9, FailureKind.DECODE, "no key")], 3, 100)

    rows = catalog.execute("SELECT image_key, decode_version, kind FROM failures").fetchall()
    assert rows == [(key_of(n), 3, kind.value) for n, kind in enumerate(kinds) if kind.is_permanent]


def test_full_disk_is_one_clear_error_and_what_was_stored_stays(tmp_path: Path) -> None:
    dim = 256
    spec = EncoderSpec.imported(dim, "wide")
    with (
        small_disk(tmp_path / "disk") as disk,
        contextlib.closing(open_catalog(disk)) as catalog,
    ):
        store = VectorStore(catalog, disk, spec)
        with store.writer("run") as writer:
            put(catalog, writer, an_outcome([1, 2], dim=dim))
            with pytest.raises(DiskFullError) as caught:
                writer.append(np.zeros((4096, dim), np.float32))
            # What was half written is given back.
            put(catalog, writer, an_outcome([3], dim=dim))

        found = read(store, [1, 3, 2])

    assert caught.value.needed_bytes == 4096 * dim * 4
    assert caught.value.path.startswith(str(disk))
    assert found.tobytes() == vectors_of([1, 3, 2], dim).tobytes()


def test_disk_without_room_for_a_first_segment_is_named(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk") as disk,
        contextlib.closing(open_catalog(disk)) as catalog,
    ):
        store = VectorStore(catalog, disk, SPEC)
        fill(disk)

        with pytest.raises(DiskFullError), store.writer("run") as writer:
            writer.append(vectors_of([1]))


def test_segment_that_is_gone_or_cut_short_says_what_to_do(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "run", [1, 2])
    (segment,) = segments(data)

    os.truncate(segment, DIM * 4 + 1)
    whole = read(VectorStore(catalog, data, SPEC), [1])
    with pytest.raises(StorageError, match=r"1 rows of at least 2 are left.*store gc"):
        read(VectorStore(catalog, data, SPEC), [1, 2])
    segment.unlink()
    with pytest.raises(StorageError, match=r"is gone: .*store gc"):
        read(VectorStore(catalog, data, SPEC), [1])

    assert whole.tolist() == vectors_of([1]).tolist()


#: Stores 1; appends 2 and dies before, or after, the commit that names it.
DYING = """
import os, signal, sys
from pathlib import Path
from tests.test_store import SPEC, an_outcome, put, vectors_of
from toolkit.catalog import open_catalog
from toolkit.embedding.store import VectorStore
catalog = open_catalog(Path(sys.argv[1]))
with VectorStore(catalog, Path(sys.argv[1]), SPEC).writer("dying") as writer:
    put(catalog, writer, an_outcome([1]))
    if sys.argv[2] == "after":
        put(catalog, writer, an_outcome([2]))
    else:
        writer.append(vectors_of([2]))
    os.kill(os.getpid(), signal.SIGKILL)
"""

#: Stores fifty batches of one vector each: number, number + 1, ...
WRITING = """
import sys
from pathlib import Path
from tests.test_store import SPEC, put_run
from toolkit.catalog import open_catalog
from toolkit.embedding.store import VectorStore
catalog = open_catalog(Path(sys.argv[1]))
first = int(sys.argv[2])
batches = [[number] for number in range(first, first + 50)]
put_run(catalog, VectorStore(catalog, Path(sys.argv[1]), SPEC), sys.argv[2], *batches)
"""


def in_a_process(script: str, *args: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("when", "stored"), [("before", {1}), ("after", {1, 2})])
def test_killed_writer_loses_only_what_it_had_not_committed(
    data: Path, when: str, stored: set[int]
) -> None:
    process = in_a_process(DYING, data, when)

    code = process.wait(timeout=60)

    with contextlib.closing(open_catalog(data)) as catalog:
        store = VectorStore(catalog, data, SPEC)
        found = store.has([key_of(n) for n in (1, 2)])
        put_run(catalog, store, "next", [n for n in (1, 2) if key_of(n) not in found])
        vectors = read(store, [1, 2])
    assert code == -signal.SIGKILL
    assert found == {key_of(n) for n in stored}
    assert vectors.tolist() == vectors_of([1, 2]).tolist()


@pytest.mark.slow
def test_two_writers_at_once_store_everything_once(data: Path) -> None:
    # The second half of one is the first half of the other.
    processes = [in_a_process(WRITING, data, first) for first in (0, 25)]

    codes = [process.wait(timeout=120) for process in processes]

    with contextlib.closing(open_catalog(data)) as catalog:
        store = VectorStore(catalog, data, SPEC)
        vectors = read(store, range(75))
        (n,) = catalog.execute("SELECT count(*) FROM vectors").fetchone()
    assert codes == [0, 0]
    assert n == 75
    assert vectors.tobytes() == vectors_of(range(75)).tobytes()


def test_usage_counts_vectors_and_bytes_of_each_encoder(
    catalog: sqlite3.Connection, store: VectorStore, data: Path
) -> None:
    put_run(catalog, store, "run", [1])
    other = VectorStore(catalog, data, EncoderSpec.imported(DIM, "other"))
    put_run(catalog, other, "run", [1, 2])
    VectorStore(catalog, data, EncoderSpec.imported(DIM, "unused"))

    found = [(u.model, u.n_vectors, u.n_bytes) for u in usage(catalog, data)]

    assert found == [("imported", 2, 24), ("imported", 1, 12), ("imported", 0, 0)]
