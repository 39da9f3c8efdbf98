"""What a scan reads, what it believes unread, and which content it finds in a file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import xxhash

from tests.test_walk import DENIED
from toolkit.catalog import open_catalog, transaction
from toolkit.images.datasets import Source
from toolkit.images.identity import PROBE_BYTES
from toolkit.images.scan import Scan
from toolkit.images.walk import RULE_LIMIT, RULE_OTHER, Rules
from toolkit.records import FailureKind, FileStat

#: More than the two ends that a scan reads, so that reading it whole is a decision.
LARGE = 3 * PROBE_BYTES


class Row(NamedTuple):
    key: bytes | None
    known: bool
    failure: str | None
    reason: str | None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    return tmp_path / "d"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_catalog(tmp_path / "data")) as connection:
        yield connection


def a_large(middle: bytes = b"m", start: bytes = b"s") -> bytes:
    """Bytes whose middle no probe reads."""
    data = bytearray(LARGE)
    data[: len(start)] = start
    data[LARGE // 2 : LARGE // 2 + len(middle)] = middle
    return bytes(data)


def key_of(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def older(*paths: Path, seconds: float = 10) -> None:
    """Let seconds pass for these files: their content is older than the racy moment."""
    for path in paths:
        then = time.time_ns() - int(seconds * 1e9)
        os.utime(path, ns=(then, then))


def let_time_pass(catalog: sqlite3.Connection) -> None:
    """As though the last scan had seen every file long after its last change."""
    catalog.execute("UPDATE files SET seen_ns = seen_ns + 10000000000")


def scanned(
    catalog: sqlite3.Connection, *roots: Path, sources: Sequence[Source] = (), **options: Any
) -> Scan:
    """A scan that is run and remembered."""
    scan = Scan(catalog, sources or [Source(r.name, root=os.fsencode(r)) for r in roots])
    scan.run(Rules(), **options)
    with transaction(catalog):
        scan.remember()
    return scan


def rows(catalog: sqlite3.Connection) -> dict[str, Row]:
    """Name of each file of the last scan to what is known of it."""
    query = "SELECT path, image_key, known, failure, reason FROM temp.scan ORDER BY source, path"
    return {
        os.fsdecode(os.path.basename(path)): Row(key, bool(known), failure, reason)
        for path, key, known, failure, reason in catalog.execute(query)
    }


def bytes_read() -> int:
    """What this process has asked of read calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def id_of(catalog: sqlite3.Connection, path: Path) -> int:
    query = "SELECT id FROM temp.scan WHERE path = ?"
    return int(catalog.execute(query, (os.fsencode(path),)).fetchone()[0])


def test_large_new_file_is_read_at_its_ends_only(catalog: sqlite3.Connection, root: Path) -> None:
    with open(root / "a.jpg", "wb") as file:
        file.truncate(1 << 30)
    before = bytes_read()

    scanned(catalog, root)

    assert bytes_read() - before < 1 << 20
    assert rows(catalog) == {"a.jpg": Row(None, False, None, None)}


@pytest.mark.parametrize("size", [0, 1, PROBE_BYTES])
def test_small_file_gets_its_key_at_once(
    catalog: sqlite3.Connection, root: Path, size: int
) -> None:
    (root / "a.jpg").write_bytes(b"x" * size)

    scanned(catalog, root)

    assert rows(catalog)["a.jpg"].key == key_of(b"x" * size)


@pytest.mark.parametrize("size", [PROBE_BYTES + 1, 2 * PROBE_BYTES, 2 * PROBE_BYTES + 1])
def test_file_just_too_large_for_that_is_left_to_the_decoder(
    catalog: sqlite3.Connection, root: Path, size: int
) -> None:
    (root / "a.jpg").write_bytes(b"x" * size)

    scanned(catalog, root)

    assert rows(catalog)["a.jpg"].key is None


def test_unchanged_file_is_believed_unread(catalog: sqlite3.Connection, root: Path) -> None:
    (root / "a.jpg").write_bytes(b"small")
    (root / "b.jpg").write_bytes(a_large())
    scan = scanned(catalog, root)
    with transaction(catalog):
        scan.identify(id_of(catalog, root / "b.jpg"), b"decoder's", None)
    let_time_pass(catalog)
    before = bytes_read()

    scanned(catalog, root)

    # /proc itself is the only thing read.
    assert bytes_read() - before < 4096
    assert rows(catalog) == {
        "a.jpg": Row(key_of(b"small"), True, None, None),
        "b.jpg": Row(b"decoder's", True, None, None),
    }


def test_file_changed_just_before_a_scan_is_read_again(
    catalog: sqlite3.Connection, root: Path
) -> None:
    (root / "a.jpg").write_bytes(b"new")
    scanned(catalog, root)
    scanned(catalog, root)

    (row,) = rows(catalog).values()

    assert row == Row(key_of(b"new"), False, None, None)


@pytest.mark.parametrize("ahead_ns", [0, 1_999_000_000])
def test_content_swapped_within_the_clock_tick_is_seen(
    catalog: sqlite3.Connection, root: Path, ahead_ns: int
) -> None:
    (root / "a.jpg").write_bytes(b"old")
    scanned(catalog, root)
    stat = FileStat.of(os.stat(root / "a.jpg"))
    (root / "a.jpg").write_bytes(b"new")
    # A file system whose clock stood still: all that the catalog knows of the file still fits.
    stamp = os.stat(root / "a.jpg")
    catalog.execute(
        "UPDATE files SET mtime_ns = ?, ctime_ns = ?, seen_ns = ?",
        (stamp.st_mtime_ns, stamp.st_ctime_ns, stamp.st_ctime_ns + ahead_ns),
    )

    scanned(catalog, root)

    assert stat.size == 3
    assert rows(catalog)["a.jpg"].key == key_of(b"new")


def test_edit_in_place_of_the_same_size_is_seen_though_its_date_was_put_back(
    catalog: sqlite3.Connection, root: Path
) -> None:
    path = root / "a.jpg"
    path.write_bytes(a_large(b"one"))
    older(path)
    scan = scanned(catalog, root)
    with transaction(catalog):
        scan.identify(id_of(catalog, path), key_of(a_large(b"one")), None)
    let_time_pass(catalog)
    stamp = os.stat(path)

    path.write_bytes(a_large(b"two"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    scanned(catalog, root)

    # Its ends are those of the old content, which is known: so it is read whole.
    assert rows(catalog)["a.jpg"].key == key_of(a_large(b"two"))


def test_copy_gets_the_key_of_its_original(catalog: sqlite3.Connection, root: Path) -> None:
    (root / "a.jpg").write_bytes(a_large())
    scan = scanned(catalog, root)
    with transaction(catalog):
        scan.identify(id_of(catalog, root / "a.jpg"), key_of(a_large()), None)
    let_time_pass(catalog)
    shutil.copy(root / "a.jpg", root / "copy.jpg")

    scanned(catalog, root)

    assert [row.key for row in rows(catalog).values()] == [key_of(a_large())] * 2


def test_renamed_folder_keeps_its_keys(
    catalog: sqlite3.Connection, root: Path, tmp_path: Path
) -> None:
    (root / "a.jpg").write_bytes(a_large())
    scan = scanned(catalog, root)
    with transaction(catalog):
        scan.identify(id_of(catalog, root / "a.jpg"), key_of(a_large()), None)

    scanned(catalog, root.rename(tmp_path / "renamed"))

    assert rows(catalog)["a.jpg"].key == key_of(a_large())


def test_new_files_that_look_alike_are_told_apart_by_all_their_bytes(
    catalog: sqlite3.Connection, root: Path
) -> None:
    contents = {"a": a_large(b"one"), "b": a_large(b"one"), "c": a_large(b"two")}
    for name, data in contents.items():
        (root / f"{name}.jpg").write_bytes(data)
    (root / "other.jpg").write_bytes(a_large(start=b"unlike"))

    scanned(catalog, root)

    found = {name: row.key for name, row in rows(catalog).items()}
    assert found == {
        **{f"{name}.jpg": key_of(data) for name, data in contents.items()},
        "other.jpg": None,
    }


def test_more_lookalikes_than_one_portion_are_all_read(
    catalog: sqlite3.Connection, root: Path
) -> None:
    n = 2100
    (root / "0000.jpg").write_bytes(a_large())
    for number in range(1, n):
        os.link(root / "0000.jpg", root / f"{number:04d}.jpg")

    scanned(catalog, root)

    assert {row.key for row in rows(catalog).values()} == {key_of(a_large())}
    assert len(rows(catalog)) == n


def test_one_file_in_two_datasets_is_taken_once_for_the_first(
    catalog: sqlite3.Connection, root: Path
) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "a.jpg").write_bytes(a_large())

    scan = scanned(catalog, root, root / "sub")
    keys = catalog.execute("SELECT source, image_key FROM temp.scan ORDER BY source").fetchall()
    with transaction(catalog):
        scan.identify(id_of(catalog, root / "sub" / "a.jpg"), b"key", None)

    assert keys == [(0, None)]
    assert scan.excluded == {"named twice": 1}
    assert catalog.execute("SELECT image_key FROM temp.scan").fetchall() == [(b"key",)]


def test_what_is_decoded_later_is_known_to_the_next_scan(
    catalog: sqlite3.Connection, root: Path
) -> None:
    path = root / "a.jpg"
    path.write_bytes(a_large())
    older(path)
    scan = scanned(catalog, root)
    with transaction(catalog):
        scan.identify(id_of(catalog, path), b"key", FileStat.of(os.stat(path)))
    let_time_pass(catalog)

    scanned(catalog, root)

    assert rows(catalog)["a.jpg"] == Row(b"key", True, None, None)


def test_file_that_was_read_in_another_version_is_not_believed(
    catalog: sqlite3.Connection, root: Path
) -> None:
    path = root / "a.jpg"
    path.write_bytes(a_large(b"one"))
    scan = scanned(catalog, root)
    first = FileStat.of(os.stat(path))
    path.write_bytes(a_large(b"two"))
    with transaction(catalog):
        # The decoder read "one" just before the change.
        scan.identify(id_of(catalog, path), key_of(a_large(b"one")), first)
    let_time_pass(catalog)

    scanned(catalog, root)

    assert rows(catalog)["a.jpg"].key == key_of(a_large(b"two"))


def test_file_that_changed_before_it_was_decoded_is_known_as_it_was_decoded(
    catalog: sqlite3.Connection, root: Path
) -> None:
    path = root / "a.jpg"
    path.write_bytes(a_large(b"one"))
    scan = scanned(catalog, root)
    path.write_bytes(a_large(b"two"))
    with transaction(catalog):
        scan.identify(id_of(catalog, path), b"two's", FileStat.of(os.stat(path)))
    let_time_pass(catalog)

    scanned(catalog, root)

    assert rows(catalog)["a.jpg"] == Row(b"two's", True, None, None)


def test_build_that_ended_before_decoding_leaves_no_key_behind(
    catalog: sqlite3.Connection, root: Path
) -> None:
    (root / "a.jpg").write_bytes(a_large())
    scanned(catalog, root)
    let_time_pass(catalog)

    scanned(catalog, root)

    assert rows(catalog)["a.jpg"] == Row(None, True, None, None)


@pytest.mark.parametrize(("limit", "taken"), [(1, ["a"]), (3, ["a", "b", "c"]), (9, list("abcd"))])
def test_limit_takes_the_first_by_path_and_counts_the_rest(
    catalog: sqlite3.Connection, root: Path, tmp_path: Path, limit: int, taken: list[str]
) -> None:
    (tmp_path / "e").mkdir()
    for path in (root / "b.jpg", root / "a.jpg", tmp_path / "e" / "d.jpg", tmp_path / "e/c.jpg"):
        path.write_bytes(path.name.encode())
    (root / "text.txt").touch()

    scan = scanned(catalog, root, tmp_path / "e", limit=limit)

    assert list(rows(catalog)) == [f"{name}.jpg" for name in taken]
    assert scan.n_found == 5
    assert scan.excluded[RULE_OTHER] == 1
    assert scan.excluded[RULE_LIMIT] == 4 - len(taken)


def test_file_that_vanishes_during_the_scan_is_a_failure(
    catalog: sqlite3.Connection, root: Path
) -> None:
    (root / "a.jpg").write_bytes(b"a")
    (root / "b.jpg").write_bytes(b"b")

    # Told after the walk and before the reading.
    scan = scanned(catalog, root, progress=lambda n: (root / "b.jpg").unlink())

    assert rows(catalog) == {
        "a.jpg": Row(key_of(b"a"), False, None, None),
        "b.jpg": Row(None, False, "changed", "vanished while the build ran"),
    }
    assert scan.n_found == 2
    assert catalog.execute("SELECT count(*) FROM files").fetchone() == (1,)


def test_pipe_that_takes_the_place_of_a_file_does_not_hang_the_scan(
    catalog: sqlite3.Connection, root: Path
) -> None:
    (root / "a.jpg").write_bytes(b"a")

    def swap(n: int) -> None:
        (root / "a.jpg").unlink()
        os.mkfifo(root / "a.jpg")

    scanned(catalog, root, progress=swap)

    (row,) = rows(catalog).values()
    assert row[2:] == ("unreadable", "cannot be read: is not a regular file")


def test_file_that_shrinks_after_it_was_opened_is_no_error(
    catalog: sqlite3.Connection, root: Path
) -> None:
    path = root / "a.jpg"
    path.write_bytes(a_large())
    breathe = (
        f"import os\nwhile True: os.truncate({str(path)!r}, 1), os.truncate({str(path)!r}, {LARGE})"
    )
    failures = set()

    with subprocess.Popen([sys.executable, "-S", "-c", breathe]) as breather:
        for _ in range(200):
            scanned(catalog, root)
            failures |= {row.failure for row in rows(catalog).values()}
        breather.kill()

    assert failures == {None}


def test_disk_error_is_unreadable_with_what_the_system_said(
    catalog: sqlite3.Connection, tmp_path: Path
) -> None:
    # The first page of a process's memory: a regular file that no read gets anything from.
    source = Source("l", entries=((b"/proc/self/mem", None),))

    scanned(catalog, sources=[source])

    (row,) = rows(catalog).values()
    assert row == Row(None, False, "unreadable", "cannot be read: Input/output error")
    assert catalog.execute("SELECT count(*) FROM files").fetchone() == (0,)


def test_file_without_permission_is_unreadable_and_what_is_known_of_it_stays(
    tmp_path: Path, root: Path
) -> None:
    script = (
        "import contextlib, json, os, sys\n"
        "from pathlib import Path\n"
        "from tests.test_scan import rows, scanned\n"
        "from toolkit.catalog import open_catalog\n"
        "with contextlib.closing(open_catalog(Path(sys.argv[1]))) as catalog:\n"
        "    scanned(catalog, Path(sys.argv[2]))\n"
        "    print(json.dumps([[r.key and r.key.hex(), *r[1:]] for r in rows(catalog).values()]))\n"
        "    print(catalog.execute('SELECT count(image_key) FROM files').fetchone()[0])\n"
    )
    command = [*DENIED, sys.executable, "-c", script, str(tmp_path / "data"), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    (root / "a.jpg").write_bytes(b"a")

    def scanned_by_another() -> list[Any]:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env=environment
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    first = scanned_by_another()
    (root / "a.jpg").chmod(0)
    second = scanned_by_another()

    assert first == [[[key_of(b"a").hex(), False, None, None]], 1]
    assert second == [[[None, False, "unreadable", "cannot be read: Permission denied"]], 1]


def test_listed_file_that_is_gone_and_one_that_is_refused_fail_apart(
    catalog: sqlite3.Connection, root: Path
) -> None:
    (root / "self.jpg").symlink_to("self.jpg")
    names = ("gone.jpg", "self.jpg")
    source = Source("l", entries=tuple((os.fsencode(root / name), "x") for name in names))

    scanned(catalog, sources=[source])

    assert {name: row.failure for name, row in rows(catalog).items()} == {
        "gone.jpg": FailureKind.CHANGED,
        "self.jpg": FailureKind.UNREADABLE,
    }


def test_changed_file_read_again_gets_its_new_key(catalog: sqlite3.Connection, root: Path) -> None:
    path = root / "a.jpg"
    path.write_bytes(a_large(b"one"))
    scan = scanned(catalog, root)
    path.write_bytes(a_large(b"two"))
    item = id_of(catalog, path)

    again = scan.reread(item)
    path.unlink()
    gone = scan.reread(item)

    assert again == key_of(a_large(b"two")) == rows(catalog)["a.jpg"].key
    assert gone is None


def test_odd_names_and_stamps_are_remembered(catalog: sqlite3.Connection, root: Path) -> None:
    path = os.fsencode(root) + b"/\xff\n.jpg"
    with open(path, "wb") as file:
        file.write(b"x")
    os.utime(path, ns=(0, -(10**18)))

    scanned(catalog, root)
    let_time_pass(catalog)
    scanned(catalog, root)

    ((found, known),) = catalog.execute("SELECT path, known FROM temp.scan").fetchall()
    assert (found, known) == (path, 1)


def test_progress_tells_how_many_files_were_seen(catalog: sqlite3.Connection, root: Path) -> None:
    for n in range(3):
        (root / f"{n}.jpg").write_bytes(b"x")
    (root / "text.txt").touch()
    told: list[int] = []

    scanned(catalog, root, progress=told.append)

    assert told == [4]
