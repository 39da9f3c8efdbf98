"""Processes that outlive the one that started them: told apart, found again, ended whole.

Law: nothing is signalled by its number alone. A number is used again after its process has
ended; the moment of birth is not, and neither is the mark that a process hands on to all that
it starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

#: Environment variable that holds the mark of a process and of all that it started.
_MARK = "TOOLKIT_CLUSTER_MARK"

#: Seconds that a process has to end by itself before it is killed.
GRACE_S = 10.0

#: Seconds that the system has to clear away what was killed.
_KILL_S = 10.0

#: Kept, for Python warns of a process that is dropped while it runs; ours are meant to.
_children: list[subprocess.Popen[bytes]] = []


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """A process that is to be found again, by this process or by a later one.

    Attributes:
        pid: Its number.
        born: See :func:`birth`; empty if it ended at once.
        mark: What it hands on to all that it starts.
    """

    pid: int
    born: str
    mark: str

    @property
    def is_alive(self) -> bool:
        """Whether it runs, and not another one under its number."""
        return birth(self.pid) == self.born


def spawn(command: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str]) -> Process:
    """Start a process in its own session, which no Interrupt and no closed terminal reaches.

    Args:
        command: What to start.
        log: File that gets what it says, at the end.
        cwd: Its working directory.
        env: Its whole environment, to which a mark is added.
    """
    mark = secrets.token_hex(8)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=cwd,
            env={**env, _MARK: mark},
            start_new_session=True,
        )
    _children.append(child)
    return Process(child.pid, birth(child.pid) or "", mark)


def end(processes: Sequence[Process], grace_s: float = GRACE_S) -> None:
    """End processes and all that they started, by force what takes longer than ``grace_s``."""
    leaders = [process.pid for process in processes if process.is_alive]
    # Who leads ends its own people in good order; who lost its leader is told itself.
    orphans = marked([process.mark for process in processes if not process.is_alive])
    _signal([*leaders, *orphans], signal.SIGTERM)
    # What somebody stopped takes a signal only when it goes on.
    _signal([*leaders, *orphans], signal.SIGCONT)
    if not _wait_for_end(processes, grace_s):
        _signal(_family(processes), signal.SIGKILL)
        _wait_for_end(processes, _KILL_S)
    _children[:] = [child for child in _children if child.poll() is None]


def _family(processes: Sequence[Process]) -> set[int]:
    leaders = {process.pid for process in processes if process.is_alive}
    return leaders | set(marked([process.mark for process in processes]))


def _signal(pids: Iterable[int], what: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)


def _wait_for_end(processes: Sequence[Process], deadline_s: float) -> bool:
    deadline = time.monotonic() + deadline_s
    while _family(processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)  # between two looks at the table of processes
    return True


def birth(pid: int) -> str | None:
    """When a process was born, in words that only compare; ``None`` once it has ended."""
    if sys.platform == "win32":
        return None
    if not Path("/proc/self/stat").exists():
        return _birth_by_ps(pid)
    try:
        # The name in the second field may hold anything, a bracket too.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in "ZX":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {fields[19]}"


def _birth_by_ps(pid: int) -> str | None:
    # One locale and zone for all who ask, for the answers are compared.
    env = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    state, _, born = (
        subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        .stdout.strip()
        .partition(" ")
    )
    return None if not born or state.startswith("Z") else born.strip()


def marked(marks: Sequence[str]) -> list[int]:
    """The living processes of this user that carry one of these marks."""
    if not marks:
        return []
    if not Path("/proc/self/environ").exists():
        return _marked_by_ps(marks)
    wanted = {f"{_MARK}={mark}".encode() for mark in marks}
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # another user's, or it has just ended
                if wanted & set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
    return found


def _marked_by_ps(marks: Sequence[str]) -> list[int]:
    # -E and -ww: with the environment, uncut, as macOS's ps shows it for processes of one's own.
    lines = subprocess.run(
        ["ps", "-axwwE", "-o", "pid=,command="], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    wanted = [f"{_MARK}={mark}" for mark in marks]
    return [int(line.split()[0]) for line in lines if any(mark in line for mark in wanted)]
