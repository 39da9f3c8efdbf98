"""OpenVINO kills the process that loads a model: torch takes over, and nobody repairs anything."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import toolkit as tk
from tests.pictures import write_photos
from tests.sabotage import write_engine_sabotage
from tests.support import CHEAP, build
from toolkit import config
from toolkit.dispatch.local import LocalExecutor, close_warm
from toolkit.embedding.exports import is_installed
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ExecutorUnavailableError
from toolkit.health.machine import look_here
from toolkit.worker.embedder import Embedder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="the fast extra is not installed"),
]

REQUEST = EncoderRequest(**CHEAP)


@pytest.fixture
def deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The signals of which the next processes that use OpenVINO die, one each."""
    file = write_engine_sabotage(tmp_path / "sabotage")
    monkeypatch.setenv("PYTHONPATH", str(file.parent), prepend=os.pathsep)
    tk.configure(engine_dir=tmp_path / "engines", device="cpu")
    return file


@contextlib.contextmanager
def loaded(request: EncoderRequest = REQUEST) -> Iterator[LocalExecutor]:
    """A child of its own, as a new process would start it."""
    executor = LocalExecutor(request, config.resolve())
    try:
        executor.start()
        yield executor
    finally:
        executor.close()


def notes(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "engines").glob("*-crash.json"))


def said_of_the_model() -> str:
    """The doctor's words."""
    checks = look_here(REQUEST, config.resolve(), deep=True).checks
    return next(check.detail for check in checks if check.name == "model")


def test_a_build_over_which_openvino_crashes_is_done_by_torch(
    tmp_path: Path, deaths: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_photos(tmp_path / "datasets" / "photos", 5, seed=0)
    deaths.write_text("SIGSEGV " * 9)

    run = build("photos")
    close_warm()
    with loaded() as later:
        engine = later.engine

    assert (run.state, run.accounting.indexed, run.accounting.failed) == ("done", 5, 0)
    (warning,) = [
        record.getMessage() for record in caplog.records if "torch" in record.getMessage()
    ]
    assert "was killed by SIGSEGV each time it loaded test_vit" in warning
    # Two died of it; those that came later did not try.
    assert engine == "torch"
    assert len(deaths.read_text().split()) == 7


@pytest.mark.parametrize("ends", ["SIGILL SIGABRT", "SIGBUS SIGFPE"])
def test_every_kind_of_crash_is_survived(tmp_path: Path, deaths: Path, ends: str) -> None:
    deaths.write_text(ends)

    with loaded() as executor:
        assert executor.engine == "torch"
    assert len(notes(tmp_path)) == 1


def test_one_crash_condemns_nothing(tmp_path: Path, deaths: Path) -> None:
    deaths.write_text("SIGSEGV")

    with loaded() as executor:
        assert executor.engine == "openvino"
    assert notes(tmp_path) == []


def test_an_export_that_kills_whoever_reads_it_is_made_anew(tmp_path: Path, deaths: Path) -> None:
    with loaded():
        (model,) = (tmp_path / "engines").glob("*/model.xml")
    model.write_bytes(model.read_bytes() + b"CRASH")

    with loaded() as executor:
        assert executor.engine == "openvino"
    assert notes(tmp_path) == []
    assert not model.read_bytes().endswith(b"CRASH")


def test_a_kill_from_outside_condemns_nothing(tmp_path: Path, deaths: Path) -> None:
    deaths.write_text("SIGKILL SIGTERM")

    for how in ("SIGKILL", "SIGTERM"):
        with pytest.raises(ExecutorUnavailableError, match=how), loaded():
            pass

    with loaded() as executor:
        assert executor.engine == "openvino"
    assert notes(tmp_path) == []


def test_a_crash_in_bf16_leaves_the_exact_encoder_alone(tmp_path: Path, deaths: Path) -> None:
    with loaded():
        pass
    deaths.write_text("SIGSEGV SIGSEGV")

    with loaded(dataclasses.replace(REQUEST, precision="bf16")) as fast, loaded() as exact:
        assert (fast.engine, exact.engine) == ("torch", "openvino")


def test_a_worker_serves_what_openvino_crashes_over(deaths: Path) -> None:
    deaths.write_text("SIGSEGV SIGSEGV")
    embedder = Embedder([REQUEST], config.resolve())

    embedder.load()
    engines = [executor.engine for executor in embedder.golden.values()]
    embedder.close()

    assert engines == ["torch"]


def test_the_doctor_says_why_torch_runs_a_model_and_how_to_try_again(
    tmp_path: Path, deaths: Path
) -> None:
    deaths.write_text("SIGSEGV SIGSEGV")
    with loaded():
        pass
    (note,) = notes(tmp_path)

    before = said_of_the_model()
    note.unlink()
    close_warm()
    after = said_of_the_model()

    assert "by torch" in before
    assert "crashed (killed by SIGSEGV, then killed by SIGSEGV)" in before
    assert before.endswith(f"remove {note}")
    assert "by openvino" in after
