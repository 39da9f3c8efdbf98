"""The local road under native crashes, hangs and kills: an image is lost, never the build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import toolkit as tk
from tests.pictures import jpeg, write_photos
from tests.sabotage import write_sabotage
from tests.support import CHEAP, INDEX, build, wait_until
from toolkit import config
from toolkit.dispatch.local import close_warm, warm_executor
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ModelError, WeightsNotFoundError

pytestmark = pytest.mark.slow


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "datasets" / "photos"
    write_photos(folder, 20, seed=0)
    return folder


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sabotage(tmp_path / "sabotage")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.usefixtures("sabotage")
def test_native_crash_costs_that_one_image(photos: Path) -> None:
    # Alone once, which is the least there is.
    tk.configure(celery_max_retries=1)
    poison = photos / "p05.jpg"
    poison.write_bytes(jpeg(seed=555) + b"CRASH")

    run = build("photos")
    again = build("photos")

    (failure,) = run.failures.to_dict("records")
    assert (run.state, run.accounting.indexed, run.accounting.failed) == ("done", 20, 1)
    assert (failure["path"], failure["kind"]) == (str(poison), "crash")
    assert "SIGSEGV" in failure["reason"]
    # Remembered: the second build does not let it kill another process.
    assert (again.accounting.failed, again.record.batches["local"]) == (1, 0)


@pytest.mark.usefixtures("sabotage")
def test_hang_costs_that_one_image(photos: Path) -> None:
    tk.configure(stall_s=3, celery_max_retries=1)
    (photos / "p05.jpg").write_bytes(jpeg(seed=555) + b"HANG")

    run = build("photos")

    (failure,) = run.failures.to_dict("records")
    assert (run.state, run.accounting.indexed) == ("done", 20)
    assert "no progress for 3 s" in failure["reason"]


def test_killed_child_is_replaced_and_nothing_is_lost(photos: Path) -> None:
    write_photos(photos / "many", 600, seed=1000)
    request = EncoderRequest(**CHEAP)
    with warm_executor(request, config.resolve()) as executor:
        executor.start()
        first = executor.pid

    # The build takes the warm child; it is killed as soon as a batch is stored.
    assert first is not None
    killer = threading.Thread(target=_kill_when_embedding, args=(first,))
    killer.start()
    run = build("photos")
    killer.join(timeout=10)

    lost = [event for event in tk.attach(run.run_id)._view.events() if event["event"] == "lost"]
    assert (run.state, run.accounting.indexed, run.accounting.failed) == ("done", 620, 0)
    assert lost
    assert "SIGKILL" in lost[0]["reason"]


def _kill_when_embedding(pid: int) -> None:
    wait_until(lambda: any(run.accounting.embedded for run in tk.runs()), "an embedded image")
    os.kill(pid, signal.SIGKILL)


def test_interrupt_of_the_process_group_does_not_reach_the_child(photos: Path) -> None:
    # What Jupyter does: SIGINT to the whole group. A shell of its own stands for the kernel.
    code = (
        "import os, signal, toolkit.config as c\n"
        "from toolkit.dispatch.local import warm_executor\n"
        "from toolkit.embedding.spec import EncoderRequest\n"
        "with warm_executor(EncoderRequest('test_vit', pretrained=False), c.resolve()) as e:\n"
        "    e.start(); pid = e.pid\n"
        "try:\n"
        "    os.killpg(0, signal.SIGINT); signal.pause()\n"
        "except KeyboardInterrupt:\n"
        "    os.kill(pid, 0); print('alive')\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True
    )

    assert done.stdout == "alive\n", done.stderr


def test_child_is_kept_warm_for_the_next_query(photos: Path, tmp_path: Path) -> None:
    build("photos")
    (tmp_path / "query.jpg").write_bytes(jpeg(seed=4242))
    request = EncoderRequest(**CHEAP)

    with tk.open_index(INDEX) as index:
        index.search(tmp_path / "query.jpg")
        with warm_executor(request, config.resolve()) as executor:
            first = executor.pid
        (tmp_path / "query.jpg").write_bytes(jpeg(seed=4243))
        index.search(tmp_path / "query.jpg")
        with warm_executor(request, config.resolve()) as executor:
            second = executor.pid

    assert first is not None
    assert first == second


def test_child_ends_with_its_parent(photos: Path) -> None:
    build("photos")
    with warm_executor(EncoderRequest(**CHEAP), config.resolve()) as executor:
        pid = executor.pid
    assert pid is not None

    close_warm()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_unknown_model_is_named_with_what_is_close(photos: Path) -> None:
    with pytest.raises(ModelError, match="test_vit"):
        build("photos", model="test_vitt")


def test_missing_weights_are_an_error_with_its_cure(photos: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="toolkit model pull test_vit"):
        build("photos", pretrained=True)
    assert tk.indexes() == []
