"""One cluster for a data folder: found again, topped up, reaped, ended whole."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Server
from tests.support import wait_until
from toolkit import config
from toolkit.cluster.connection import connect, resolve_address
from toolkit.cluster.local import (
    LocalCluster,
    cluster_down,
    cluster_status,
    cluster_up,
    ensure_workers,
)
from toolkit.cluster.processes import birth, marked
from toolkit.cluster.state import ClusterState, read_state, state_file, write_state
from toolkit.config import Settings
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ClusterError, SettingError
from toolkit.machine import usable_cpus

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no local cluster on Windows")

REQUEST = EncoderRequest("test_vit", pretrained=False)
OTHER = EncoderRequest("test_vit", pretrained=False, seed=7)

#: A notebook's kernel, as far as a cluster sees it.
KERNEL = """
import sys, toolkit.cluster.local as local
cluster = local.LocalCluster(int(sys.argv[1]), model="test_vit", pretrained=False)
print(cluster.address.url, flush=True)
if sys.argv[2] == "stay":
    sys.stdin.read()
"""


def a_cluster(n_workers: int, settings: Settings | None = None) -> LocalCluster:
    """A cluster for the cheap model."""
    return LocalCluster(n_workers, model="test_vit", pretrained=False, settings=settings)


@pytest.fixture(autouse=True)
def _leave_nothing(settings: Settings) -> Iterator[None]:
    """End the cluster of a test, whatever the test did."""
    yield
    cluster_down(settings)


def state(settings: Settings) -> ClusterState:
    """What is written down."""
    found = read_state(settings.data_dir)
    assert found is not None
    return found


def pids(settings: Settings) -> list[int]:
    """The supervisors that are written down."""
    return [worker.process.pid for worker in state(settings).workers]


def start_kernel(n_workers: int, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KERNEL, str(n_workers), how]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(pid: int) -> None:
    """End a process as the out-of-memory killer does."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: birth(pid) is None, f"the end of process {pid}")


def test_builds_find_the_server_of_a_cluster(settings: Settings) -> None:
    cluster = a_cluster(0)

    address = resolve_address(config.resolve())
    with connect(address) as client:
        assert client.ping() is True
    assert address == cluster.address
    assert repr(cluster) == f"LocalCluster({address}, 0 workers)"
    assert cluster.workers == []


def test_second_cluster_is_the_first_one(settings: Settings) -> None:
    first, second = a_cluster(0), cluster_up(0, REQUEST, settings)

    assert second.address.url == first.address.url


def test_two_kernels_that_start_at_once_get_one_server(settings: Settings) -> None:
    kernels = [start_kernel(0, "leave") for _ in range(3)]

    said = [kernel.communicate(timeout=60) for kernel in kernels]

    assert [errors for _, errors in said] == ["", "", ""]
    assert len({address for address, _ in said}) == 1


def test_cluster_survives_interrupt_and_end_of_its_kernel(settings: Settings) -> None:
    with start_kernel(0, "stay") as kernel:
        assert kernel.stdout is not None
        url = kernel.stdout.readline().strip()
        os.killpg(kernel.pid, signal.SIGINT)
        kernel.communicate(timeout=60)

    again = a_cluster(0)

    assert again.address.url == url


def test_end_of_a_block_is_the_end_of_its_cluster(settings: Settings) -> None:
    with a_cluster(0) as cluster:
        server = state(settings).server.process

    assert not server.is_alive
    assert not state_file(settings.data_dir).exists()
    assert repr(cluster) == "LocalCluster(down)"
    with pytest.raises(ClusterError, match="toolkit cluster up"):
        _ = cluster.address


def test_block_leaves_a_cluster_that_it_found(settings: Settings) -> None:
    found = a_cluster(0)

    with a_cluster(0):
        pass

    with connect(found.address) as client:
        assert client.ping() is True


def test_down_says_whether_there_was_something(settings: Settings) -> None:
    a_cluster(0)

    assert (cluster_down(settings), cluster_down(settings)) == (True, False)


def test_frozen_server_goes_down_all_the_same(settings: Settings) -> None:
    a_cluster(0)
    server = state(settings).server.process
    os.kill(server.pid, signal.SIGSTOP)

    status = cluster_status(settings)
    cluster_down(settings)

    assert "does not answer" in status["server"]["error"]
    assert not server.is_alive


def test_server_that_died_is_replaced(settings: Settings) -> None:
    cluster = a_cluster(0)
    before = state(settings).server
    kill(before.process.pid)
    assert cluster_status(settings) == {"server": None, "workers": []}

    a_cluster(0)

    with connect(cluster.address) as client:
        assert client.ping() is True
    assert state(settings).server.password != before.password


@pytest.mark.parametrize("n", [-1, 257])
def test_number_of_workers_that_cannot_be(settings: Settings, n: int) -> None:
    with pytest.raises(SettingError, match="from 0 to 256"):
        a_cluster(n)

    assert not state_file(settings.data_dir).exists()


def test_cluster_that_builds_pass_by_says_so(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with Server() as elsewhere:
        passed_by = config.resolve(redis_url=elsewhere.url)

        a_cluster(0, passed_by)
        write_state(settings.data_dir, dataclasses.replace(state(settings), n_workers=1))

        assert f"127.0.0.1:{elsewhere.port}" in caplog.text
        assert "REDIS_URL" in caplog.text
        assert ensure_workers(REQUEST, passed_by) is False


def test_no_cluster_starts_no_workers_for_a_build(settings: Settings) -> None:
    assert ensure_workers(REQUEST, settings) is False
    assert not state_file(settings.data_dir).exists()


@pytest.mark.slow
def test_workers_become_ready_and_are_listed(settings: Settings) -> None:
    cluster = a_cluster(1)
    early = cluster_status(settings)["workers"]

    wait_until(lambda: [bool(w.info.encoders) for w in cluster.workers] == [True], "it", 120)

    (worker,) = cluster.workers
    (row,) = cluster_status(settings)["workers"]
    assert [w["state"] for w in early] == ["starting"]
    assert row["id"] == worker.id
    assert row["encoders"] == ["test_vit"]
    assert row["beat_age_s"] < settings.beat_ttl_s
    assert "<td>ready</td>" in cluster._repr_html_()
    assert worker.info.roots == ("/",)
    json.dumps(row)


@pytest.mark.slow
def test_workers_outlive_a_kernel_and_are_not_started_twice(settings: Settings) -> None:
    _, errors = start_kernel(2, "leave").communicate(timeout=60)
    first = pids(settings)

    a_cluster(2)

    assert errors == ""
    assert len(first) == 2
    assert pids(settings) == first


@pytest.mark.slow
def test_dead_worker_is_replaced_and_nothing_of_it_stays(settings: Settings) -> None:
    cluster = a_cluster(2)
    dead, kept = state(settings).workers
    wait_until(lambda: len(cluster.workers) == 2, "two registered workers", 120)
    kill(dead.process.pid)

    a_cluster(2)

    assert len(pids(settings)) == 2
    assert kept.process.pid in pids(settings)
    assert marked([dead.process.mark]) == []
    assert {worker.number for worker in state(settings).workers} == {1, 2}


@pytest.mark.slow
def test_workers_of_a_dead_server_are_ended(settings: Settings) -> None:
    a_cluster(1)
    (old,) = state(settings).workers
    kill(state(settings).server.process.pid)

    a_cluster(1)

    (new,) = state(settings).workers
    assert marked([old.process.mark]) == []
    assert new.process.is_alive


@pytest.mark.slow
def test_down_ends_every_process(settings: Settings) -> None:
    cluster = a_cluster(2)
    processes = [state(settings).server.process, *(w.process for w in state(settings).workers)]
    wait_until(lambda: len(cluster.workers) == 2, "two registered workers", 120)

    cluster.down()

    assert not any(process.is_alive for process in processes)
    assert marked([process.mark for process in processes]) == []


@pytest.mark.slow
def test_build_with_another_encoder_gets_workers_for_it(settings: Settings) -> None:
    a_cluster(1)

    told = [ensure_workers(REQUEST, settings), ensure_workers(OTHER, settings)]
    told.append(ensure_workers(OTHER, settings))

    assert told == [True, True, True]
    assert [worker.encoder for worker in state(settings).workers] == [
        REQUEST.to_json(),
        OTHER.to_json(),
    ]


@pytest.mark.slow
def test_workers_of_another_namespace_do_not_count(settings: Settings) -> None:
    a_cluster(1)

    a_cluster(1, config.resolve(namespace="mine"))

    assert len(pids(settings)) == 2


@pytest.mark.slow
def test_block_ends_the_workers_that_it_added(settings: Settings) -> None:
    a_cluster(1)
    before = pids(settings)

    with a_cluster(1) as inner:
        inner.add_workers(1)
        during = pids(settings)

    assert len(during) == 2
    assert pids(settings) == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
@pytest.mark.parametrize(("given", "threads"), [({}, 1), ({"threads": 5}, 5)])
def test_workers_share_the_processors_unless_told(
    settings: Settings, given: dict[str, object], threads: int
) -> None:
    n_workers = usable_cpus()

    a_cluster(n_workers, config.resolve(**given))

    environments = [
        Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids(settings)
    ]
    assert len(environments) == n_workers
    assert all(f"TOOLKIT_THREADS={threads}".encode() in env for env in environments)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("visible", "given", "devices"),
    [
        ("0,7", {}, ["cuda:0", "cuda:1", "cuda:0"]),
        ("0,7", {"device": "cpu"}, ["cpu", "cpu", "cpu"]),
        ("3", {}, ["auto", "auto", "auto"]),
        ("-1", {}, ["auto", "auto", "auto"]),
    ],
)
def test_workers_take_the_gpus_in_turn(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    given: dict[str, object],
    devices: list[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    a_cluster(3, config.resolve(**given))

    def commands() -> list[list[bytes]]:
        return [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in pids(settings)]

    wait_until(lambda: all(b"--devices" in command for command in commands()), "their commands")
    found = [command[command.index(b"--devices") + 1].decode() for command in commands()]
    assert sorted(found) == sorted(devices)
