"""A build killed at its worst moments, and what the disk holds then."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import toolkit as tk
from tests.pictures import jpeg, write_photos
from tests.support import INDEX, build, build_cli, table, wait_until
from toolkit.dispatch.dispatcher import BATCH_ITEMS

pytestmark = pytest.mark.slow

#: More than two batches, so that a death in the second one leaves one stored.
N_PHOTOS = 2 * BATCH_ITEMS + 12

#: Where a build is killed, and how many images at least are stored by then.
POINTS = [
    ("after-decode", 0),
    ("after-embed", 0),
    ("before-commit", 0),
    ("after-commit", BATCH_ITEMS),
    ("after-embed:2", BATCH_ITEMS),
    ("before-commit:2", BATCH_ITEMS),
    ("during-index-save", N_PHOTOS),
    ("before-swap", N_PHOTOS),
    ("after-swap", N_PHOTOS),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "photos"
    write_photos(folder, N_PHOTOS, seed=0)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(
    photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[object, ...]]:
    tk.configure(data_dir=tmp_path_factory.mktemp("whole"))
    try:
        build(photos, name=INDEX)
        with tk.open_index(INDEX) as index:
            return table(index)
    finally:
        tk.configure(data_dir=None)


@pytest.mark.parametrize(("point", "stored"), POINTS)
def test_next_build_after_a_kill_equals_an_uninterrupted_one(
    photos: Path, uninterrupted: list[tuple[object, ...]], point: str, stored: int
) -> None:
    killed = build_cli(photos, "--name", INDEX, env={"TOOLKIT_FAULT_POINT": point})
    published = point == "after-swap"

    seen = [name["name"] for name in tk.indexes()]
    (dead,) = tk.runs()
    again = build(photos, name=INDEX)

    with tk.open_index(INDEX) as index:
        assert table(index) == uninterrupted
    assert killed["exit"] == -signal.SIGKILL
    assert dead.state == "interrupted"
    assert seen == ([INDEX] if published else [])
    # What was stored is not paid again, and what was not is one batch and no more.
    assert again.accounting.embedded == N_PHOTOS - again.accounting.reused
    assert again.accounting.reused >= stored
    assert again.accounting.reused % BATCH_ITEMS == 0 or again.accounting.reused == N_PHOTOS


@pytest.mark.parametrize("point", ["during-index-save", "before-swap", "after-swap"])
def test_reader_never_sees_half_an_index(photos: Path, tmp_path: Path, point: str) -> None:
    own = tmp_path / "datasets" / "photos"
    write_photos(own, 10, seed=0)
    build("photos")
    (own / "new.jpg").write_bytes(jpeg(seed=9999))
    sizes, stop = set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            with tk.open_index(INDEX) as index:
                sizes.add((len(index), len(index.vectors), len(index.to_pandas())))

    reader = threading.Thread(target=read)
    reader.start()
    killed = build_cli("photos", env={"TOOLKIT_FAULT_POINT": point})
    again = build("photos")
    stop.set()
    reader.join(timeout=30)

    assert killed["exit"] == -signal.SIGKILL
    assert again.accounting.embedded == 0
    assert sizes <= {(10, 10, 10), (11, 11, 11)}
    assert not reader.is_alive()


def test_killed_build_leaves_no_process_behind(photos: Path) -> None:
    build_cli(photos, "--name", INDEX, env={"TOOLKIT_FAULT_POINT": "after-commit"})

    (dead,) = tk.runs()

    assert dead.state == "interrupted"
    # The child hears of its parent's death by the end of its pipe.
    wait_until(lambda: _ours() == [], "the end of every process", deadline_s=10)
    assert _ours() == []


def _ours() -> list[int]:
    """Whoever was started over this test's data folder: it is in their environment."""
    mark = ("TOOLKIT_DATA_DIR", os.environ["TOOLKIT_DATA_DIR"])
    others = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in others if pid != os.getpid() and mark in _environment(pid).items()]


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    return dict(
        line.split("=", 1) for line in raw.decode(errors="replace").split("\0") if "=" in line
    )
