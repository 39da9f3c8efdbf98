"""Processes that outlive their starter are found again, ended whole, and never mistaken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wait_until
from toolkit.cluster.processes import (
    Process,
    _birth_by_ps,
    birth,
    end,
    marked,
    spawn,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no local cluster on Windows")

#: Sleeps, and starts a child that sleeps in a session of its own; both ignore a polite end.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) < 2:
    subprocess.Popen([sys.executable, "-c", sys.orig_argv[2], "child"], start_new_session=True)
time.sleep(600)
"""

#: Ends politely, and leaves a note.
POLITE = """
import pathlib, signal, sys, time
def leave(*_):
    pathlib.Path("note").write_text("took leave")
    sys.exit()
signal.signal(signal.SIGTERM, leave)
pathlib.Path("ready").touch()
time.sleep(600)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Process]]:
    """What a test starts; ended after it."""
    processes: list[Process] = []
    yield processes
    end(processes, grace_s=0)


def a_process(folder: Path, started: list[Process], code: str) -> Process:
    process = spawn(
        [sys.executable, "-c", code], log=folder / "log", cwd=folder, env=dict(os.environ)
    )
    started.append(process)
    return process


@pytest.mark.parametrize("born", [birth, _birth_by_ps])
def test_birth_tells_a_process_from_those_that_ended(born: object) -> None:
    assert callable(born)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        first, again = born(child.pid), born(child.pid)
        child.kill()
        wait_until(lambda: born(child.pid) is None, "a zombie to count as ended")

    assert first == again is not None
    assert born(child.pid) is None


def test_process_has_a_session_of_its_own_and_outlives_its_starter(
    tmp_path: Path, started: list[Process]
) -> None:
    code = (
        "import os, sys; from pathlib import Path; from toolkit.cluster.processes import spawn\n"
        "p = spawn([sys.executable, '-c', 'import time; time.sleep(600)'], log=Path('log'),"
        " cwd=Path.cwd(), env=dict(os.environ)); print(p.pid, p.born, p.mark, sep='|')"
    )
    starter = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    pid, born, mark = starter.stdout.strip().split("|")
    process = Process(int(pid), born, mark)
    started.append(process)

    assert starter.stderr == ""
    assert process.is_alive
    assert os.getsid(process.pid) == process.pid


@pytest.mark.slow
def test_end_takes_all_that_was_started_whatever_session_it_moved_to(
    tmp_path: Path, started: list[Process]
) -> None:
    process = a_process(tmp_path, started, STUBBORN)
    wait_until(lambda: len(marked([process.mark])) == 2, "the child to start")
    wait_until(lambda: len({os.getsid(pid) for pid in marked([process.mark])}) == 2, "its session")

    end([process], grace_s=0.5)

    assert marked([process.mark]) == []
    assert not process.is_alive


@pytest.mark.slow
def test_orphans_of_a_killed_process_are_ended(tmp_path: Path, started: list[Process]) -> None:
    process = a_process(tmp_path, started, STUBBORN)
    wait_until(lambda: len(marked([process.mark])) == 2, "the child to start")
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not process.is_alive, "the process to end")
    assert len(marked([process.mark])) == 1

    end([process], grace_s=0.5)

    assert marked([process.mark]) == []


def test_end_lets_a_process_take_leave(tmp_path: Path, started: list[Process]) -> None:
    process = a_process(tmp_path, started, POLITE)
    wait_until((tmp_path / "ready").exists, "the process to start")

    end([process])

    assert (tmp_path / "note").read_text() == "took leave"


def test_stranger_under_a_used_number_is_left_alone(tmp_path: Path, started: list[Process]) -> None:
    stranger = a_process(tmp_path, started, "import time; time.sleep(600)")
    record = Process(stranger.pid, "boot 1", "a mark that nobody has")

    end([record], grace_s=0)

    assert not record.is_alive
    assert stranger.is_alive


def test_mark_is_carried_by_its_own_process_alone(tmp_path: Path, started: list[Process]) -> None:
    process = a_process(tmp_path, started, "import time; time.sleep(600)")
    other = a_process(tmp_path, started, "import time; time.sleep(600)")

    # A mark is there from exec on, which comes a moment after the process.
    wait_until(lambda: len(marked([process.mark, other.mark])) == 2, "both marks to be found")

    assert marked([process.mark]) == [process.pid]
    assert marked([other.mark]) == [other.pid]
    assert marked([]) == []
