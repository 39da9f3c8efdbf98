"""The command: what it prints, how it exits, and how it is ended."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import World
from tests.servers import free_port
from tests.support import CHEAP_FLAGS, run_cli, wait_until

QUICK = ("doctor", *CHEAP_FLAGS, "--quick")


@pytest.fixture(scope="module")
def busy_world() -> Iterator[World]:
    """A server with one worker."""
    with World() as world:
        with world.entered():
            world.worker(env={"TOOLKIT_BEAT_TTL_S": "6"})
        yield world


@pytest.fixture(autouse=True)
def _nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", str(free_port()))
    # What a worker of the world takes, which does not know this test's own.
    monkeypatch.delenv("TOOLKIT_NAMESPACE", raising=False)


def test_without_a_server_it_is_local_and_exits_with_0() -> None:
    begun = time.monotonic()

    done = run_cli(*QUICK)

    assert time.monotonic() - begun < 4  # 0.6 s on a quiet machine
    assert done.returncode == 0
    assert done.stderr == ""
    first, *_ = done.stdout.splitlines()
    assert first.startswith("local: a build would run on this machine alone (redis://localhost")
    assert "→ unset REDIS_PORT; toolkit cluster up --model test_vit --random-weights" in done.stdout


def test_requiring_workers_makes_local_a_failure() -> None:
    done = run_cli(*QUICK, "--require", "distributed")

    assert done.returncode == 1


def test_broken_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    done = run_cli(*QUICK, env={"TOOLKIT_DATA_DIR": str(tmp_path / "file" / "data")})

    assert done.returncode == 1
    assert done.stdout.startswith("broken: a build would fail (cannot write ")


def test_wrong_use_exits_with_2() -> None:
    done = run_cli("doctor", "--model", "../x")

    assert done.returncode == 2
    assert "is no name of a timm model" in done.stderr


def test_json_has_the_documented_form() -> None:
    done = run_cli(*QUICK, "--json")

    found = json.loads(done.stdout)
    assert set(found) == {"verdict", "checks"}
    assert found["verdict"] == "local"
    assert all(
        set(check) == {"name", "status", "detail", "cure", "latency_ms"}
        for check in found["checks"]
    )
    assert {check["status"] for check in found["checks"]} <= {"ok", "warn", "fail", "skip"}


@pytest.mark.slow
def test_dispatch_without_a_server_says_so() -> None:
    done = run_cli("doctor", *CHEAP_FLAGS, "--dispatch", "--json")

    (row,) = json.loads(done.stdout)["dispatch"]
    assert (row["state"], row["what"]) == ("not sent", "anything")
    assert "nothing listens there" in row["detail"]


@pytest.mark.slow
def test_with_a_worker_it_is_distributed_and_shows_what_was_sent(busy_world: World) -> None:
    with busy_world.entered():
        done = run_cli("doctor", *CHEAP_FLAGS, "--dispatch", "--require", "distributed")

    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "distributed: a build would use the workers"
    header, *rows = lines[-4:]
    assert header.split() == ["what", "id", "state", "seconds", "detail"]
    assert [word for row in rows for word in ("refused", "failed", "done") if word in row] == [
        *("refused", "failed", "done")
    ]
    assert all("doctor-" in row for row in rows)


@pytest.mark.slow
def test_watching_goes_on_until_ctrl_c_and_sees_a_change(busy_world: World) -> None:
    with busy_world.entered():
        env: dict[str, Any] = {**os.environ, "REDIS_PORT": str(busy_world.server.port)}
        outer, inner = pty.openpty()
        command = [sys.executable, "-m", "toolkit.cli", "doctor", *CHEAP_FLAGS, "--watch"]
        process = subprocess.Popen(command, stdout=inner, stderr=inner, env=env)
        os.close(inner)
        said: list[bytes] = []
        try:
            _read_until(outer, said, b"distributed: a build would")
            busy_world.server.freeze()
            _read_until(outer, said, b"does not answer in time")
            busy_world.server.thaw()
            said.clear()
            _read_until(outer, said, b"distributed: a build would")
            process.send_signal(signal.SIGINT)
            wait_until(lambda: process.poll() is not None, "its end", 20)
        finally:
            busy_world.server.thaw()
            process.kill()
            process.wait()
            os.close(outer)

    assert process.returncode == 0


def _read_until(terminal: int, said: list[bytes], wanted: bytes) -> None:
    deadline = time.monotonic() + 60
    while wanted not in b"".join(said):
        assert time.monotonic() < deadline, b"".join(said).decode(errors="replace")
        said.append(os.read(terminal, 4096))
