"""The journal of a run: one writer, readers everywhere, books that add up."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import wait_until
from tests.test_catalog import fill, small_disk
from toolkit.errors import AccountingError, DiskFullError, RunError, RunNotFoundError
from toolkit.journal import (
    KEEP_RUNS,
    QUEUED_S,
    RunJournal,
    RunView,
    find_run,
    is_locked,
    list_runs,
    new_run_id,
)
from toolkit.run_record import Accounting, RunRecord, RunState

#: Drives a run until it is told to end, or for ever.
DRIVER = """
import sys
from pathlib import Path
from toolkit.journal import RunJournal, RunRecord, RunState
journal = RunJournal(Path(sys.argv[1]), RunRecord("r1", "cats", RunState.RUNNING))
print("driving", flush=True)
sys.stdin.read(1)
journal.end(RunState.DONE)
"""

#: Drives runs that end at once, with records so large that whoever reads one is slow about it.
ENDING = """
import sys
from pathlib import Path
from toolkit.journal import RunJournal, RunRecord, RunState
for number in range(8):
    many = {str(n): n for n in range(100_000)}
    record = RunRecord(f"r{number}", "cats", RunState.RUNNING, excluded_by=many)
    RunJournal(Path(sys.argv[1]), record).end(RunState.DONE)
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "data" / "runs"


@pytest.fixture
def driver(runs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that drives run r1; it ends when it reads a byte."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(runs)], stdin=pipe, stdout=pipe
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"driving\n"
        yield process
        process.kill()


def a_journal(runs: Path, run_id: str = "r1", state: RunState = RunState.RUNNING) -> RunJournal:
    return RunJournal(runs, RunRecord(run_id, "cats", state))


def a_dead_run(runs: Path, run_id: str, **fields: Any) -> Path:
    """A run that nobody drives, as its last driver left it."""
    (runs / run_id).mkdir(parents=True)
    record = dataclasses.replace(RunRecord(run_id, "cats", RunState.DONE), **fields)
    (runs / run_id / "run.json").write_text(json.dumps(record.to_json()))
    (runs / run_id / "owner.lock").touch()
    return runs / run_id


def test_record_survives_the_trip_through_its_file() -> None:
    record = RunRecord(
        "r1",
        "cats",
        RunState.HELD,
        accounting=Accounting(found=3, indexed=1, duplicates=1, failed=1, kept=1),
        excluded_by={"hidden": 2},
        moves=[{"at": 1.5, "from": "local", "to": "workers"}],
        recall_at_10=0.99,
        error="é",
    )

    back = RunRecord.from_json(json.loads(json.dumps(record.to_json())))

    assert back == record


def test_record_of_a_newer_release_is_read_as_far_as_it_is_known() -> None:
    value = RunRecord("r1", "cats", accounting=Accounting(found=1)).to_json()
    value["weather"] = "fine"
    value["accounting"]["eaten"] = 7

    back = RunRecord.from_json(value)

    assert (back.run_id, back.accounting) == ("r1", Accounting(found=1))


def test_reader_sees_what_the_driver_wrote(runs: Path) -> None:
    journal = a_journal(runs)
    journal.record.accounting.found = 5

    journal.stage("embed", total=10)
    live = RunView(journal.folder).record()
    journal.end(RunState.DONE)
    ended = RunView(journal.folder).record()

    assert (live.state, live.stage, live.total, live.pid) == ("running", "embed", 10, os.getpid())
    assert (ended.state, ended.stage, ended.accounting.found) == ("done", "", 5)
    assert ended.ended is not None
    assert ended.seconds >= 0


def test_progress_is_written_now_and_then_and_the_last_word_always(runs: Path) -> None:
    written: list[int] = []
    journal = a_journal(runs)
    journal.add_sink(lambda record: written.append(record.done))
    journal.stage("embed", 1000)

    for done in range(1000):
        journal.progress(done)
    journal.end(RunState.DONE)

    # The stage and the end; in between one write each half second.
    assert written[0] == 0
    assert written[-1] == 999
    assert len(written) < 30


def test_progress_is_written_once_the_interval_has_passed(runs: Path) -> None:
    journal = a_journal(runs)
    journal.record.updated -= 1

    journal.progress(7, total=9)
    record = RunView(journal.folder).record()
    journal.release()

    assert (record.done, record.total) == (7, 9)


def test_rate_and_eta_come_from_the_stage() -> None:
    record = RunRecord("r1", "c", done=30, total=90, stage_started=100.0, updated=110.0)
    late = dataclasses.replace(record, done=120)
    endless = dataclasses.replace(record, total=0)
    new = dataclasses.replace(record, done=0, updated=100.0)

    assert (record.progress.rate, record.progress.eta_s) == (3.0, 20.0)
    # A file that changed is done twice: more than the total is never less than no time.
    assert late.progress.eta_s == 0
    assert endless.progress.eta_s is None
    assert (new.progress.rate, new.progress.eta_s) == (0.0, None)


def test_summary_has_the_keys_that_json_output_promises() -> None:
    keys = (
        "run_id index state found indexed duplicates failed excluded pending embedded reused "
        "batches fallback_reason moves recall_at_10 seconds"
    ).split()
    record = RunRecord("r1", "cats", started=1.0, updated=3.5)

    summary = json.loads(json.dumps(record.summary()))

    assert [key for key in keys if key not in summary] == []
    assert summary["batches"] == {"workers": 0, "local": 0}
    assert summary["seconds"] == 2.5


@pytest.mark.parametrize("found", [9, 11])
def test_books_that_do_not_add_up_are_told_with_every_figure(found: int) -> None:
    books = Accounting(found=found, indexed=4, duplicates=3, failed=2, excluded=1)

    with pytest.raises(AccountingError) as caught:
        books.check("r1")

    assert f"found={found}, indexed=4, duplicates=3, failed=2, excluded=1" in str(caught.value)
    assert caught.value.run_id == "r1"


def test_books_that_add_up_pass_and_pending_does_not() -> None:
    Accounting(found=10, indexed=4, duplicates=3, failed=2, excluded=1, kept=1).check()

    with pytest.raises(AccountingError, match="pending=1"):
        Accounting(found=11, indexed=4, duplicates=3, failed=2, excluded=1, pending=1).check()


def test_killed_driver_is_seen_by_every_reader(runs: Path, driver: subprocess.Popen[bytes]) -> None:
    view = RunView(runs / "r1")
    before = view.record()

    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=30)
    after = view.record()

    assert (before.state, before.pid) == (RunState.RUNNING, driver.pid)
    assert after.state is RunState.INTERRUPTED
    assert "build again" in str(after.error)
    # Whoever takes it up now drives it.
    journal = a_journal(runs)
    assert view.record().pid == os.getpid()
    journal.release()


@pytest.mark.slow
def test_second_driver_is_refused_while_the_first_lives(
    runs: Path, driver: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(RunError, match="r1 is driven by another process"):
        a_journal(runs)

    assert RunView(runs / "r1").record().pid == driver.pid


def test_run_that_ends_while_it_is_read_is_never_called_interrupted(runs: Path) -> None:
    seen: list[str] = []

    with subprocess.Popen([sys.executable, "-c", ENDING, str(runs)]) as process:
        for number in range(8):
            view = RunView(runs / f"r{number}")
            wait_until((view.folder / "run.json").exists, "the run")
            while (state := view.record().state).is_live:
                seen.append(state)
            seen.append(state)

    assert process.returncode == 0
    assert set(seen) <= {"running", "done"}


def test_readers_who_ask_at_once_do_not_take_each_other_for_the_owner(runs: Path) -> None:
    lock = a_dead_run(runs, "r1", state=RunState.RUNNING) / "owner.lock"

    with open(lock, "rb") as another_reader:
        fcntl.flock(another_reader, fcntl.LOCK_SH)
        answer = is_locked(lock)

    assert answer is False
    assert is_locked(runs / "r1" / "missing.lock") is False


def test_queued_run_waits_for_its_driver_but_not_for_ever(runs: Path) -> None:
    now = time.time()
    young = a_dead_run(runs, "young", state=RunState.QUEUED, updated=now)
    old = a_dead_run(runs, "old", state=RunState.QUEUED, updated=now - QUEUED_S - 1)

    states = [RunView(folder).record().state for folder in (young, old)]

    assert states == [RunState.QUEUED, RunState.INTERRUPTED]


def test_released_run_is_taken_up_with_its_state(runs: Path) -> None:
    first = a_journal(runs, state=RunState.QUEUED)
    first.release()

    second = RunJournal(runs, RunView(first.folder).record())
    second.record.state = RunState.RUNNING
    second.write()
    state = RunView(first.folder).record().state
    second.release()

    assert state is RunState.RUNNING


def test_cancel_request_reaches_the_driver(runs: Path) -> None:
    journal = a_journal(runs)
    before = journal.is_cancelled

    RunView(journal.folder).request_cancel()

    assert (before, journal.is_cancelled) == (False, True)
    journal.release()


def test_events_and_failures_are_read_in_order(runs: Path) -> None:
    journal = a_journal(runs)
    journal.event("lost", reason="two\nlines", path=Path("/é"))
    journal.failures([{"path": r"/\xff.jpg", "reason": "damaged"}, {"path": "/b"}])
    journal.end(RunState.FAILED, "it failed")

    events = RunView(journal.folder).events()
    failures = RunView(journal.folder).failures()

    assert [event["event"] for event in events] == ["lost", "end"]
    assert (events[0]["reason"], events[0]["path"]) == ("two\nlines", "/é")
    assert (events[1]["state"], events[1]["error"]) == ("failed", "it failed")
    assert [row["path"] for row in failures] == [r"/\xff.jpg", "/b"]


@pytest.mark.parametrize("tail", [b'{"at": 2, "eve', b'{"at": "\xff', b"\0\0\0\0", b"\xc3"])
def test_half_written_line_costs_itself_only(runs: Path, tail: bytes) -> None:
    journal = a_journal(runs)
    journal.event("first")
    for name in ("events.jsonl", "failures.jsonl"):
        with open(journal.folder / name, "ab") as file:
            file.write(tail + b"\n" + b'{"event": "last"}\n' + tail)
    journal.release()

    view = RunView(journal.folder)

    assert [event["event"] for event in view.events()] == ["first", "last"]
    assert view.failures() == [{"event": "last"}]


def test_run_that_wrote_nothing_has_no_events_failures_or_log(runs: Path) -> None:
    view = RunView(a_dead_run(runs, "r1"))

    assert (view.events(), view.failures(), view.log()) == ([], [], "")


def test_log_is_shown_whatever_bytes_it_holds(runs: Path) -> None:
    folder = a_dead_run(runs, "r1")
    (folder / "run.log").write_bytes(b"caf\xe9\n")

    assert RunView(folder).log() == "caf\ufffd\n"


def test_oldest_runs_go_when_there_are_too_many_but_never_a_live_one(runs: Path) -> None:
    live = a_journal(runs, "0000-live")
    for number in range(KEEP_RUNS + 5):
        a_dead_run(runs, f"{number:04d}")

    newest = a_journal(runs, "9999")

    left = [view.folder.name for view in list_runs(runs)]
    live.release()
    newest.release()
    # The newest hundred, and the old one that lives.
    kept = [f"{n:04d}" for n in range(KEEP_RUNS + 4, 5, -1)]
    assert left == ["9999", *kept, "0000-live"]


def test_runs_are_listed_newest_first_and_strangers_are_not(runs: Path) -> None:
    for name in ("20260101-000000-aaaaaa", "20260102-000000-aaaaaa"):
        a_dead_run(runs, name)
    (runs / "notes").mkdir()
    (runs / "file").touch()

    assert [view.folder.name[:8] for view in list_runs(runs)] == ["20260102", "20260101"]
    assert list_runs(runs / "missing") == []


def test_newest_live_run_is_found_without_an_id(runs: Path) -> None:
    live = [a_journal(runs, "a-live"), a_journal(runs, "b-live")]
    a_dead_run(runs, "c-done")
    a_dead_run(runs, "d-died", state=RunState.RUNNING)
    (a_dead_run(runs, "e-damaged") / "run.json").write_text("{")

    found = find_run(runs).folder.name
    for journal in live:
        journal.end(RunState.DONE)

    assert found == "b-live"
    with pytest.raises(RunNotFoundError, match="toolkit runs"):
        find_run(runs)


@pytest.mark.parametrize("run_id", ["", ".", "..", "../runs/r1", "r1/", "/", "r2", "r1\0"])
def test_what_is_no_run_is_not_found(runs: Path, run_id: str) -> None:
    folder = a_dead_run(runs, "r1")

    assert find_run(runs, "r1").folder == folder
    with pytest.raises(RunNotFoundError, match="toolkit runs"):
        find_run(runs, run_id)


@pytest.mark.parametrize("content", ["", "{", '{"run_id": "r1"}', '{"state": "unheard of"}'])
def test_damaged_record_is_one_clear_error(runs: Path, content: str) -> None:
    folder = a_dead_run(runs, "r1")
    (folder / "run.json").write_text(content)

    with pytest.raises(RunNotFoundError, match=r"'r1'.*toolkit runs"):
        RunView(folder).record()


def test_reader_never_sees_half_a_record(runs: Path) -> None:
    journal = a_journal(runs)

    def write() -> None:
        for n in range(300):
            journal.record.error = "x" * 100_000 * (n % 2)
            journal.write()

    writer = threading.Thread(target=write)
    writer.start()
    lengths = set()
    while writer.is_alive():
        lengths.add(len(RunView(journal.folder).record().error or ""))
    journal.release()

    assert lengths == {0, 100_000}


def test_ids_sort_by_time_and_do_not_repeat() -> None:
    ids = [new_run_id() for _ in range(200)]

    assert len(set(ids)) == 200
    assert [i[:18] for i in ids] == sorted(i[:18] for i in ids)


def test_newest_of_two_runs_of_one_second_comes_first(tmp_path: Path) -> None:
    names = []
    for _ in range(5):
        journal = RunJournal(tmp_path, RunRecord(new_run_id(), "dogs"))
        journal.release()
        names.append(journal.folder.name)
        time.sleep(0.002)

    assert [view.folder.name for view in list_runs(tmp_path)] == names[::-1]


def test_full_disk_is_a_clear_error_and_the_run_is_let_go(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        journal = a_journal(disk / "runs")
        journal.record.error = "x" * 100_000
        fill(disk)

        with pytest.raises(DiskFullError, match="the disk is full"):
            journal.end(RunState.FAILED)

        assert not RunView(journal.folder).has_owner
        wait_until(lambda: RunView(journal.folder).record().state == "interrupted", "the verdict")
