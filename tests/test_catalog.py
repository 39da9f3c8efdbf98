"""The catalog: one file that many processes use, and what it says when it cannot be used."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolkit.catalog import FORMAT_VERSION, open_catalog, transaction
from toolkit.errors import DiskFullError, FormatVersionError, StorageError

INSERT = "INSERT INTO images VALUES (?, 1, 1, 'PNG')"


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "1m") -> Iterator[Path]:
    """A disk of its own that a test may fill; skips where mounting is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        # Lazily: what the code under test has mapped may outlive the test.
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    """Take the last byte of a small disk."""
    with contextlib.suppress(OSError), open(disk / "ballast", "ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def count(catalog: sqlite3.Connection) -> int:
    return int(catalog.execute("SELECT count(*) FROM images").fetchone()[0])


def test_what_was_committed_is_there_after_opening_again(tmp_path: Path) -> None:
    with contextlib.closing(open_catalog(tmp_path / "a" / "b")) as catalog, transaction(catalog):
        catalog.execute(INSERT, (b"key",))

    with contextlib.closing(open_catalog(tmp_path / "a" / "b")) as catalog:
        assert count(catalog) == 1
        assert catalog.execute("PRAGMA user_version").fetchone() == (FORMAT_VERSION,)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_transaction_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with contextlib.closing(open_catalog(tmp_path)) as catalog:
        with pytest.raises(error), transaction(catalog):  # noqa: PT012  half done
            catalog.execute(INSERT, (b"key",))
            raise error

        assert count(catalog) == 0
        with transaction(catalog):
            catalog.execute(INSERT, (b"key",))
        assert count(catalog) == 1


def test_reader_and_writer_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with (
        contextlib.closing(open_catalog(tmp_path)) as writer,
        contextlib.closing(open_catalog(tmp_path)) as reader,
    ):
        writer.execute("PRAGMA busy_timeout = 100")
        reader.execute("BEGIN")
        before = count(reader)
        with transaction(writer):
            writer.execute(INSERT, (b"key",))
        during = count(reader)
        reader.execute("COMMIT")

        assert (before, during, count(reader)) == (0, 0, 1)


@pytest.mark.slow
def test_processes_that_make_it_at_once_all_get_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from toolkit.catalog import open_catalog, transaction\n"
        "print('ready', flush=True)\n"
        "start = float(sys.stdin.readline())\n"
        "for n, folder in enumerate(sorted(Path(sys.argv[1]).iterdir())):\n"
        # All at the same instant, as near as can be.
        "    while time.time() < start + n / 50: pass\n"
        "    catalog = open_catalog(folder)\n"
        "    with transaction(catalog):\n"
        "        catalog.execute('INSERT INTO images VALUES (?, 1, 1, ?)', (sys.argv[2], 'x'))\n"
    )
    folders = [tmp_path / "many" / str(n) for n in range(60)]
    for folder in folders:
        folder.mkdir(parents=True)
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "many"), str(n)], stdin=pipe, stdout=pipe
        )
        for n in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()

    start = time.time() + 0.1
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{start}\n".encode())
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)

    assert [process.returncode for process in processes] == [0] * 4
    for folder in folders:
        with contextlib.closing(open_catalog(folder)) as catalog:
            assert count(catalog) == 4


def test_newer_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    with contextlib.closing(open_catalog(tmp_path)) as catalog:
        catalog.execute("PRAGMA user_version = 99")

    with pytest.raises(FormatVersionError) as caught:
        open_catalog(tmp_path)

    assert (caught.value.found, caught.value.supported) == (99, FORMAT_VERSION)


def test_damaged_catalog_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").write_bytes(b"this is no database at all" * 100)

    with pytest.raises(StorageError, match=r"catalog\.sqlite is damaged.*move it away"):
        open_catalog(tmp_path)


def test_data_folder_that_cannot_be_used_says_which_and_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "odd" / "catalog.sqlite").mkdir(parents=True)

    with pytest.raises(StorageError, match=r"file: File exists; set TOOLKIT_DATA_DIR"):
        open_catalog(tmp_path / "file")
    with pytest.raises(StorageError, match=r"cannot use .*odd/catalog\.sqlite"):
        open_catalog(tmp_path / "odd")


def test_disk_that_fills_up_in_a_transaction_keeps_what_was_there(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk") as disk,
        contextlib.closing(open_catalog(disk)) as catalog,
    ):
        with transaction(catalog):
            catalog.execute(INSERT, (b"key",))

        with pytest.raises(DiskFullError, match="the disk is full at"), transaction(catalog):
            catalog.executemany(INSERT, ((os.urandom(16),) for _ in range(100_000)))

        assert count(catalog) == 1


def test_full_disk_is_named_when_the_catalog_is_opened(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        open_catalog(disk).close()
        fill(disk)

        with pytest.raises(DiskFullError, match="0 MB are free"):
            open_catalog(disk)
