"""The scripts: thin skins, started as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.servers import Server
from tests.support import CHEAP_FLAGS, wait_until

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    ("script", "command"),
    [("start_worker.py", "worker"), ("verify_distributed.py", "verify")],
)
def test_a_script_takes_the_options_of_its_command(script: str, command: str) -> None:
    scripted = run(sys.executable, SCRIPTS / script, "--help")
    typed = run(sys.executable, "-m", "toolkit.cli", command, "--help")

    assert scripted.returncode == 0, scripted.stderr
    # The first lines tell how it was called.
    assert scripted.stdout.partition("\n\n")[2] == typed.stdout.partition("\n\n")[2] != ""


def test_the_shell_script_takes_the_toolkit_of_the_active_environment() -> None:
    active = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    done = run("sh", SCRIPTS / "start_worker.sh", "--help", PATH=active)

    assert done.returncode == 0, done.stderr
    assert "--pool" in done.stdout


def test_the_shell_script_says_so_where_there_is_no_toolkit(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "start_worker.sh"
    script.parent.mkdir()
    script.write_bytes((SCRIPTS / "start_worker.sh").read_bytes())

    done = run("/bin/sh", script, PATH="/usr/bin:/bin")

    assert done.returncode == 2
    assert "conda activate" in done.stderr


def test_the_windows_script_asks_for_solo_and_passes_everything_on() -> None:
    written = (SCRIPTS / "start_worker.bat").read_bytes()

    # cmd.exe loses its place at labels in a file with the line ends of Unix.
    assert written.count(b"\n") == written.count(b"\r\n") > 10
    assert b'"%TOOLKIT%" worker --pool solo %*\r\nexit /b %ERRORLEVEL%' in written


@pytest.mark.slow
@pytest.mark.parametrize(
    "starter",
    [(sys.executable, str(SCRIPTS / "start_worker.py")), ("sh", str(SCRIPTS / "start_worker.sh"))],
    ids=["py", "sh"],
)
def test_a_worker_that_a_script_started_becomes_ready_and_stops(
    starter: Sequence[str], server: Server, tmp_path: Path
) -> None:
    active = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, **server.settings_env(), "PATH": active}
    log = tmp_path / "worker.log"
    with open(log, "wb") as file:
        worker = subprocess.Popen(
            [*starter, *CHEAP_FLAGS, "--pool", "solo"],
            stdout=file,
            stderr=file,
            env=env,
            start_new_session=True,
        )
    try:
        wait_until(lambda: " ready: queue v1." in log.read_text(), "the ready line")

        worker.send_signal(signal.SIGTERM)

        assert worker.wait(timeout=30) == 0, log.read_text()
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGTERM)
            worker.wait(timeout=30)
