"""Versions on disk: what is written, what is taken over, and what survives any end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.indexes import (
    Vectors,
    a_row,
    directions,
    key_of,
    named,
    published,
    random_units,
    source_of,
    write,
)
from toolkit.errors import (
    DamagedIndexError,
    DiskFullError,
    FormatVersionError,
    IndexNotFoundError,
    RunCancelledError,
    StorageError,
)
from toolkit.index.build import IndexVersion, open_current, publish, write_version
from toolkit.index.items import Copy, ItemRow


def names_of(index: IndexVersion) -> list[str]:
    return [row.image_key.decode().lstrip(".") for row in index.iter_rows()]


def rows_found(index: IndexVersion) -> list[int]:
    """The row that the graph, not the scan, holds nearest to each row's own vector."""
    q, rows = index.graph.candidates(np.asarray(index.vectors), 1)
    assert q.tolist() == list(range(index.n))
    return [int(row) for row in rows]


def versions(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "versions"))


# What is written.


def test_rows_come_back_as_they_were_given(tmp_path: Path) -> None:
    rows = [a_row("b", "c", "a"), a_row("z", label=None)]
    odd = ItemRow(key_of("odd"), "d", b"\xff\x00?#.jpg", "", 1, 2, "PNG", (Copy("e", b"\xff"),))
    vectors = dict(zip(["b", "z", "odd"], directions(0, 90, 180), strict=True))

    index = published(tmp_path / "an index?", vectors, rows=[*rows, odd])

    assert list(index.iter_rows()) == [*rows, odd]
    assert index.rows([2, 0, 2]) == [odd, rows[0], odd]
    np.testing.assert_array_equal(index.vectors, directions(0, 90, 180))
    assert (index.n, index.dim, index.manifest["extra"]) == (3, 2, {"name": "n"})
    assert index.manifest["counts"] == {"copies": 5, "added": 3, "removed": 0, "kept": 0}


def test_rows_are_found_by_content_and_by_any_of_their_paths(tmp_path: Path) -> None:
    rows = [a_row("b"), a_row("z", "c", "a")]
    index = published(tmp_path, named(directions(0, 90)) | _pair("b", "z"), rows=rows)

    assert (index.key_of(key_of("z")), index.key_of(key_of("y"))) == (1, None)
    assert (index.key_of_path(b"d/a.jpg"), index.key_of_path(b"d/y.jpg")) == (1, None)


def _pair(*names: str) -> dict[str, Vectors]:
    return dict(zip(names, directions(0, 90), strict=True))


def test_vectors_cannot_be_written_to(tmp_path: Path) -> None:
    index = published(tmp_path, named(directions(0)))

    with pytest.raises(ValueError, match="read-only"):
        index.vectors[0, 0] = 2.0


@pytest.mark.parametrize("n", [0, 1])
def test_the_smallest_indexes_work(tmp_path: Path, n: int) -> None:
    index = published(tmp_path, named(directions(30)[:n]))

    found = index.search(directions(0), k=1)

    assert index.n == len(index.graph) == n
    assert found.keys.tolist() == [[0 if n else -1]]


def test_the_precision_of_the_graph_is_what_was_asked(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("f32", "f16", "i8"):
        index = published(tmp_path / dtype, named(random_units(64, 256)), dim=256, dtype=dtype)
        sizes[dtype] = index.graph_path.stat().st_size
        assert index.manifest["dtype"] == dtype

    assert sizes["f32"] - sizes["f16"] == 64 * 256 * 2
    assert sizes["f16"] - sizes["i8"] == 64 * 256


# What is taken over from the version before.


def test_only_new_contents_are_asked_of_the_source(tmp_path: Path) -> None:
    before = named(random_units(50, 8), "m")
    new = {"a": random_units(1, 8, seed=1)[0], "z": random_units(1, 8, seed=2)[0]}
    after = dict(sorted({**before, **new}.items()))
    asked: list[str] = []
    published(tmp_path, before, dim=8).close()

    index = published(tmp_path, after, dim=8, asked=asked)

    assert asked == ["a", "z"]
    assert names_of(index) == list(after)
    np.testing.assert_array_equal(index.vectors, np.stack(list(after.values())))
    assert rows_found(index) == list(range(52))


def test_rows_that_go_and_move_keep_their_vectors(tmp_path: Path) -> None:
    before = named(random_units(50, 8))
    names = list(before)
    # The first five go, the others turn round.
    after = {name: before[name] for name in reversed(names[5:])}
    published(tmp_path, before, dim=8).close()

    asked: list[str] = []
    index = published(tmp_path, after, dim=8, asked=asked)

    assert asked == []
    np.testing.assert_array_equal(index.vectors, np.stack(list(after.values())))
    assert rows_found(index) == list(range(45))
    assert index.manifest["counts"] == {"copies": 45, "added": 0, "removed": 5, "kept": 45}
    assert index.manifest["removed_since_rebuild"] == 5


def test_the_graph_is_built_anew_once_too_much_was_removed(tmp_path: Path) -> None:
    rest = named(random_units(100, 8))
    holes = []
    published(tmp_path, rest, dim=8).close()

    for _ in range(4):
        rest = dict(list(rest.items())[8:])
        with published(tmp_path, rest, dim=8) as index:
            holes.append(index.manifest["removed_since_rebuild"])
            assert rows_found(index) == list(range(len(rest)))

    # 8 of 92, 16 of 84; 24 of 76 are more than a fifth; then 8 of 68 again.
    assert holes == [8, 16, 0, 8]


def test_another_precision_takes_the_vectors_but_not_the_graph(tmp_path: Path) -> None:
    vectors = named(random_units(64, 64))
    published(tmp_path, vectors, dim=64, dtype="f32").close()

    asked: list[str] = []
    index = published(tmp_path, vectors, dim=64, dtype="i8", asked=asked)

    assert asked == []
    assert index.graph_path.stat().st_size < 64 * 64 * 4
    assert rows_found(index) == list(range(64))


@pytest.mark.parametrize("other", [{"fingerprint": "g"}, {"dim": 3}])
def test_nothing_is_taken_from_another_encoder(tmp_path: Path, other: dict[str, object]) -> None:
    published(tmp_path, named(directions(0, 90))).close()
    vectors = named(random_units(2, 3) if "dim" in other else directions(10, 20))

    asked: list[str] = []
    index = published(tmp_path, vectors, asked=asked, **other)

    assert asked == list(vectors)
    np.testing.assert_array_equal(index.vectors, np.stack(list(vectors.values())))


@pytest.mark.parametrize("name", ["items.sqlite", "vectors.npy", "graph.usearch"])
def test_nothing_is_taken_from_a_damaged_version(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = named(directions(0, 90))
    index = published(tmp_path, vectors)
    flip_last_byte(index.path / name)

    asked: list[str] = []
    mended = published(tmp_path, vectors, asked=asked)

    assert asked == list(vectors)
    np.testing.assert_array_equal(mended.vectors, directions(0, 90))
    assert name in caplog.text


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (directions(0), "fewer"),
        (directions(0, 1, 2), "more"),
        (random_units(2, 3), r"\(2, 3\)"),
        (directions(0, 90) * np.float32(2), "length 2"),
        (directions(0, np.nan), "length nan"),
        (directions(0, 90).astype(np.float64), "float64"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(
    tmp_path: Path, given: Vectors, complaint: str
) -> None:
    with pytest.raises(StorageError, match=complaint):
        write_version(
            tmp_path,
            rows=[a_row("a"), a_row("b")],
            vectors=lambda keys: iter([given]),
            dim=2,
            encoder={"fingerprint": "f"},
            extra={},
        )

    assert versions(tmp_path) == []


def test_an_error_in_a_report_of_progress_stops_the_writing(tmp_path: Path) -> None:
    def cancel(step: str, done: int, total: int) -> None:
        if step == "graph":
            raise RunCancelledError(f"at {done} of {total}")

    with pytest.raises(RunCancelledError, match="at 3 of 3"):
        write(tmp_path, named(directions(0, 1, 2)), progress=cancel)

    assert versions(tmp_path) == []


# Opening.


def test_an_index_that_was_never_published(tmp_path: Path) -> None:
    write(tmp_path / "cats", named(directions(0)))

    with pytest.raises(IndexNotFoundError, match="'cats'"):
        open_current(tmp_path / "cats")


@pytest.mark.parametrize("name", ["manifest.json", "items.sqlite", "vectors.npy", "graph.usearch"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_damage_is_noticed_when_opening(tmp_path: Path, name: str, how: str) -> None:
    file = published(tmp_path, named(directions(0, 90))).path / name
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])

    with pytest.raises(DamagedIndexError, match=rf"{name}.*--replace"):
        open_current(tmp_path)


@pytest.mark.parametrize("content", ["v000009\n", "", "\N{SNOWMAN}"])
def test_a_pointer_to_nowhere_is_damage(tmp_path: Path, content: str) -> None:
    published(tmp_path, named(directions(0))).close()
    (tmp_path / "CURRENT").write_text(content, encoding="utf-8")

    with pytest.raises(DamagedIndexError, match=r"CURRENT.*--replace"):
        open_current(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    file = published(tmp_path, named(directions(0))).path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 2}))

    with pytest.raises(FormatVersionError, match="format 2"):
        open_current(tmp_path)


def test_a_changed_byte_is_found_by_verifying(tmp_path: Path) -> None:
    index = published(tmp_path, named(directions(0, 90)))
    index.verify()
    flip_last_byte(index.path / "vectors.npy")

    with pytest.raises(DamagedIndexError, match=r"vectors\.npy"):
        index.verify()


# Publishing.


def test_two_versions_are_kept(tmp_path: Path) -> None:
    for degrees in (1, 2, 3, 4):
        published(tmp_path, named(directions(degrees))).close()

    assert versions(tmp_path) == ["v000003", "v000004"]


def test_a_version_that_is_open_stays_until_it_is_closed(tmp_path: Path) -> None:
    reader = published(tmp_path, named(directions(1)))

    for degrees in (2, 3, 4):
        published(tmp_path, named(directions(degrees))).close()
    held = versions(tmp_path)
    answer = reader.search(directions(1), k=1)
    reader.close()
    published(tmp_path, named(directions(5))).close()

    assert held == ["v000001", "v000003", "v000004"]
    assert answer.scores.tolist() == [[1.0]]
    assert versions(tmp_path) == ["v000004", "v000005"]


def test_a_version_that_nobody_holds_any_more_is_let_go(tmp_path: Path) -> None:
    # Dropped without being closed, as in a notebook.
    published(tmp_path, named(directions(1)))

    published(tmp_path, named(directions(2))).close()
    published(tmp_path, named(directions(3))).close()

    assert versions(tmp_path) == ["v000002", "v000003"]


def test_an_incomplete_version_is_not_published(tmp_path: Path) -> None:
    published(tmp_path, named(directions(1))).close()
    (tmp_path / "versions" / "v000002").mkdir()

    with pytest.raises(StorageError, match="no complete version"):
        publish(tmp_path, tmp_path / "versions" / "v000002")

    assert open_current(tmp_path).path.name == "v000001"


def test_readers_never_see_half_a_version(tmp_path: Path) -> None:
    # Every version holds n equal vectors at n degrees; keep=1 removes under the readers' hands.
    published(tmp_path, named(directions(1))).close()
    done, seen, wrong = threading.Event(), [set[int](), set[int]()], []

    def read(seen: set[int]) -> None:
        try:
            while not done.is_set():
                with open_current(tmp_path) as index:
                    index.verify()
                    found = index.search(directions(index.n), k=index.n)
                    assert found.scores.tolist() == [[1.0] * index.n]
                    seen.add(index.n)
        except BaseException as error:
            wrong.append(error)

    readers = [threading.Thread(target=read, args=(mine,)) for mine in seen]
    for reader in readers:
        reader.start()
    for n in range(2, 32):
        publish(tmp_path, write(tmp_path, named(directions(*[n] * n))), keep=1)
    done.set()
    for reader in readers:
        reader.join()

    assert wrong == []
    assert all(len(mine) > 3 for mine in seen)


@pytest.mark.slow
def test_a_reader_sent_to_a_version_that_goes_looks_again(tmp_path: Path) -> None:
    # Copies are published as fast as another process can, each removing the one before.
    first = published(tmp_path, named(directions(1))).path
    for number in range(2, 302):
        shutil.copytree(first, tmp_path / f"v{number:06d}")
    script = (
        "import pathlib, sys; from toolkit.index.build import publish\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for copy in sorted(folder.glob('v0*')):\n"
        "    publish(folder, copy.rename(folder / 'versions' / copy.name), keep=1)"
    )
    opened: set[str] = set()

    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], cwd=Path(__file__).parents[1]
    ) as publisher:
        while publisher.poll() is None:
            with open_current(tmp_path) as index:
                opened.add(index.path.name)

    assert publisher.returncode == 0
    assert len(opened) > 10


# Dying, and full disks.


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
@pytest.mark.parametrize(
    ("point", "published_name"),
    [("during-index-save", "v000001"), ("before-swap", "v000001"), ("after-swap", "v000002")],
)
def test_death_at_any_point_leaves_a_whole_index(
    tmp_path: Path, point: str, published_name: str
) -> None:
    published(tmp_path, named(directions(1))).close()
    script = (
        "import pathlib, sys; from tests.indexes import *\n"
        "published(pathlib.Path(sys.argv[1]), named(directions(2, 3)))"
    )

    died = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        env={**os.environ, "TOOLKIT_FAULT_POINT": point},
        cwd=Path(__file__).parents[1],
        check=False,
    )
    with open_current(tmp_path) as index:
        index.verify()
        name = index.path.name
    published(tmp_path, named(directions(4))).close()

    assert died.returncode == -9
    assert name == published_name
    kept = [published_name, f"v{int(published_name[1:]) + 1:06d}"]
    assert versions(tmp_path)[-2:] == kept
    assert not [path for path in versions(tmp_path) if path.startswith(".")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    ("n", "dim", "what"), [(40_000, 2, "items"), (1200, 1024, "vectors"), (600, 1024, "graph")]
)
def test_a_full_disk_costs_only_the_new_version(
    small_disk: Path, n: int, dim: int, what: str
) -> None:
    published(small_disk, named(directions(1))).close()
    vectors = named(random_units(n, dim))
    steps: list[str] = []

    with pytest.raises(DiskFullError) as caught:
        write(
            small_disk,
            vectors,
            dim=dim,
            dtype="f32",
            progress=lambda step, done, total: steps.append(f"{step} {done} {total}"),
        )

    # It filled up where the case meant it to.
    assert {"items": not steps, "vectors": steps == [], "graph": f"graph {n} {n}" in steps}[what]
    assert caught.value.path == str(small_disk)
    assert caught.value.free_bytes > 3_000_000  # what was half written is gone
    assert versions(small_disk) == ["v000001"]
    open_current(small_disk).verify()


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_does_not_publish(small_disk: Path) -> None:
    published(small_disk, named(directions(1))).close()
    version = write(small_disk, named(directions(2)))
    fill(small_disk)

    with pytest.raises(DiskFullError):
        publish(small_disk, version)

    assert open_current(small_disk).path.name == "v000001"


def test_opening_looks_at_sizes_only(tmp_path: Path) -> None:
    # So that it takes no longer for a large index.
    index = published(tmp_path, named(directions(0)))
    for name in ("vectors.npy", "graph.usearch"):
        flip_last_byte(index.path / name)

    with open_current(tmp_path) as again:
        assert again.n == 1


def test_importing_the_builder_is_light() -> None:
    script = (
        "import sys, toolkit.index.build, toolkit.index.curate\n"
        "print([m for m in ('usearch', 'torch', 'pandas', 'pyarrow') if m in sys.modules])"
    )

    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip

    assert ran.stdout.strip() == "[]"


def test_the_source_is_asked_in_row_order(tmp_path: Path) -> None:
    vectors = {"z": directions(1)[0], "a": directions(2)[0], "m": directions(3)[0]}
    asked: list[str] = []

    version = write_version(
        tmp_path,
        rows=[a_row(name) for name in vectors],
        vectors=source_of(vectors, asked),
        dim=2,
        encoder={"fingerprint": "f"},
        extra={},
    )
    publish(tmp_path, version)

    assert asked == ["z", "a", "m"]
    np.testing.assert_array_equal(open_current(tmp_path).vectors, directions(1, 2, 3))
