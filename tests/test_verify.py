"""`toolkit verify` on set-ups that work, and on such as fail in one known way."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import SCALED, Worker, World, assert_empty
from tests.pictures import write_photos
from tests.servers import free_port
from tests.support import run_cli, wait_until
from toolkit import config
from toolkit.verify import Step, verify

pytestmark = pytest.mark.slow

STEPS = ["Redis", "workers", "weights", "availability", "one embedding", "fallback build"]
STEPS += ["distributed build", "HTTP"]
PASSWORD = "not-to-be-shown"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(password=PASSWORD) as made:
        made.worker()
        yield made


@pytest.fixture
def client(world: World) -> Iterator[World]:
    with world.entered():
        yield world


def by_name(steps: tuple[Step, ...]) -> dict[str, Step]:
    return {step.name: step for step in steps}


def test_a_live_set_up_gets_a_report_to_paste_and_nothing_of_it_stays(client: World) -> None:
    write_photos(client.datasets / "mine", 5, seed=1)
    (client.datasets / "mine" / "no picture.jpg").write_text("a text")
    data_dir = client.settings.data_dir

    done = run_cli("verify", "mine")

    lines = {line[6:24].strip(): line for line in done.stdout.splitlines() if line[:5].islower()}
    status = {name: lines[name].split()[0] for name in STEPS}
    assert status == dict.fromkeys(STEPS, "ok"), done.stdout
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all 8 work")
    # The worker reads under its own roots alone, and the sample is elsewhere.
    assert "as bytes" in lines["one embedding"]
    assert "5 indexed, 1 failed" in lines["fallback build"]
    assert "nothing listens there" in lines["fallback build"]
    assert "5 indexed, 1 failed" in lines["distributed build"]
    assert ", 0 locally; max |Δ| 0.0e+00" in lines["distributed build"]
    assert re.search(r"run \S+ done, 24 indexed; batches: [1-9] by workers, 0 local", lines["HTTP"])
    assert "torch 2." in done.stdout
    assert "redis_url=redis://:***@127.0.0.1" in done.stdout
    assert PASSWORD not in done.stdout + done.stderr
    # A build that falls back on purpose is no news.
    assert "WARNING" not in done.stderr
    assert {path.name for path in data_dir.glob("*")} & {"indexes", "vectors", "runs"} == set()
    assert list(data_dir.glob("verify-*")) == []
    # Nor does a monitor of the user's show a build that was none of theirs.
    with client.server.client(client.settings.redis_backend_db) as backend:
        assert backend.hlen(client.keys.runs) == 0
    assert_empty(client)


def test_workers_that_still_start_are_waited_for() -> None:
    with World({**SCALED, "TOOLKIT_REQUIRE_WAIT_S": "60"}) as other:
        starting = Worker(other).start(wait=False)
        with other.entered():
            wait_until(lambda: bool(other.views()), "a worker that starts")

            report = verify()

            assert starting.n_ready == 1
            assert by_name(report.steps)["workers"].status == "ok"


def test_a_dataset_that_is_not_there_is_wrong_use(client: World) -> None:
    done = run_cli("verify", "nowhere")

    assert done.returncode == 2
    assert "no dataset 'nowhere'" in done.stderr
    assert list(client.settings.data_dir.glob("verify-*")) == []


def test_workers_that_are_switched_off_are_no_working_set_up(client: World) -> None:
    settings = dataclasses.replace(client.settings, distributed_available=False)

    report = verify(settings=settings)

    steps = by_name(report.steps)
    failed = {step.name for step in report.steps if step.status == "fail"}
    assert failed == {"availability", "distributed build"}
    assert "DISTRIBUTED_AVAILABLE" in steps["availability"].detail
    assert "switched off" in steps["distributed build"].detail
    assert steps["fallback build"].status == steps["HTTP"].status == "ok"
    assert "DISTRIBUTED_AVAILABLE" in steps["HTTP"].detail
    assert (Path(report.kept or "") / "verify.log").is_file()


def test_without_a_server_it_fails_and_shows_that_builds_go_on() -> None:
    env = {"REDIS_PORT": str(free_port())}

    done = run_cli("verify", "--json", env=env)

    report = json.loads(done.stdout)
    status = {step["name"]: step["status"] for step in report["steps"]}
    detail = {step["name"]: step["detail"] for step in report["steps"]}
    assert done.returncode == 1
    assert not report["ok"]
    assert status == {
        **dict.fromkeys(STEPS, "skip"),
        "Redis": "fail",
        "fallback build": "ok",
        "HTTP": "ok",
    }
    assert "toolkit cluster up" in detail["Redis"]
    assert Path(report["kept"]).is_relative_to(config.resolve().data_dir)


def test_workers_with_other_weights_are_told_from_working_ones() -> None:
    with World() as other:
        other.worker(encoder={"seed": 1})
        with other.entered():
            report = verify()

    steps = by_name(report.steps)
    assert steps["workers"].status == "ok"
    assert steps["weights"].status == "fail"
    assert "test_vit with other weights than this machine has" in steps["weights"].detail
    assert steps["distributed build"].status == "skip"
