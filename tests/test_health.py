"""What the doctor says of this machine and of a server, each fault made for real."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Certificates, Server, black_hole, free_port
from toolkit import config, health
from toolkit.cluster.local import LocalCluster, cluster_down
from toolkit.config import Settings
from toolkit.embedding.spec import EncoderRequest
from toolkit.health import Check, HealthReport, machine

CHEAP: dict[str, Any] = {"model": "test_vit", "pretrained": False}
REQUEST = EncoderRequest(**CHEAP)
START = "toolkit worker --model test_vit --random-weights"
SECRET = "hush/hu@sh#1"


def look(**options: Any) -> HealthReport:
    """A report about the cheap model, which is not loaded unless that is asked for."""
    return health.check_health(**{**CHEAP, "deep": False, **options})


def named(report: HealthReport) -> dict[str, Check]:
    """The checks by their names."""
    return {check.name: check for check in report.checks}


def passed(report: HealthReport) -> list[str]:
    """Names of the checks that say yes."""
    return [check.name for check in report.checks if check]


# This machine.


def test_nothing_running_is_local_and_soon_known(settings: Settings) -> None:
    begun = time.monotonic()

    report = look(settings=dataclasses.replace(settings, redis_port=free_port()))

    found = named(report)
    assert time.monotonic() - begun < 1.0
    assert report.verdict == "local"
    assert report.reason == found["redis"].detail
    assert "nothing listens there" in found["redis"].detail
    assert found["redis"].cure == "toolkit cluster up --model test_vit --random-weights"
    assert {found[n].status for n in ("workers", "canary", "queue")} == {"skip"}
    assert passed(report) == ["settings", "disk", "torch", "versions"]


def test_switched_off_workers_are_not_looked_for() -> None:
    with Server() as server:
        report = look(settings=config.resolve(distributed_available=False, redis_port=server.port))

        (cure,) = {c.cure for c in report.checks if c.cure}
        assert report.verdict == "local"
        assert "switched off (DISTRIBUTED_AVAILABLE=false from argument)" in str(report.reason)
        assert cure == "export DISTRIBUTED_AVAILABLE=true"
        assert named(report)["redis"].status == "skip"


def test_address_that_is_none_is_broken() -> None:
    report = look(settings=config.resolve(redis_url=f"redis://:{SECRET}@host:6379"))

    assert report.verdict == "broken"
    assert named(report)["settings"].cure == "unset REDIS_URL"
    assert SECRET not in repr(report)


def test_folder_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    report = look(settings=config.resolve(data_dir=tmp_path / "file" / "data"), deep=True)

    found = named(report)
    assert report.verdict == "broken"
    assert found["disk"].status == "fail"
    assert str(tmp_path / "file") in found["disk"].detail
    assert str(found["disk"].cure).startswith("export TOOLKIT_DATA_DIR=")
    assert found["model"].status == "skip"


@pytest.mark.slow
def test_model_is_loaded_and_embeds_a_picture(settings: Settings) -> None:
    report = look(deep=True)

    found = named(report)
    assert found["model"].status == "ok"
    assert found["model"].detail.startswith("64-d vectors of test_vit with random weights on cpu")
    assert (found["model"].latency_ms or 0) > 100


def test_library_of_which_pip_has_no_record_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in the moments in which pip writes its records anew.
    for name in ("torch", "timm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    torch, versions = machine.check_torch(imports=False), machine.check_versions()

    assert torch, torch.detail
    assert "torch (version unknown)" in torch.detail
    assert versions.status == "skip"
    assert "pip has no record of" in versions.detail


@pytest.mark.slow
def test_torch_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libcudart.so.12: gone')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    # A model that was exported before does without it.
    monkeypatch.setenv("TOOLKIT_ENGINE", "torch")

    report = look(deep=True)

    found = named(report)
    assert report.verdict == "broken"
    assert found["torch"].status == "fail"
    assert "libcudart.so.12: gone" in found["torch"].detail
    assert found["model"].cure == "toolkit logs embedder"
    assert report.reason == found["torch"].detail


@pytest.mark.slow
def test_weights_that_are_missing_have_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    report = health.check_health("vit_base_patch16_224")

    model = named(report)["model"]
    assert report.verdict == "broken"
    assert model.status == "fail"
    assert "no weights at hand for 'vit_base_patch16_224'" in model.detail
    assert model.cure == "toolkit model pull vit_base_patch16_224"
    # Torch itself is fine, and that is said.
    assert named(report)["torch"].latency_ms is not None


def test_quick_look_says_that_weights_are_missing() -> None:
    report = health.check_health("vit_base_patch16_224", deep=False)

    model = named(report)["model"]
    assert model.status == "warn"
    assert model.cure == "toolkit model pull vit_base_patch16_224"


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"celery": "5.7.0", "redis": "8.1.0"}, []),
        ({"celery": "5.6.3"}, ["celery is 5.6.3, <5.8,>=5.7 is asked for"]),
        ({"celery": "5.8.0"}, ["celery is 5.8.0, <5.8,>=5.7 is asked for"]),
        ({"celery": "5.10"}, ["celery is 5.10, <5.8,>=5.7 is asked for"]),
        ({"redis": "6.4.0"}, []),
        ({"redis": "6.3"}, ["redis is 6.3, <9,>=6.4 is asked for"]),
    ],
)
def test_versions_are_held_against_what_is_asked(found: dict[str, str], wrong: list[str]) -> None:
    asked = ["celery<5.8,>=5.7", 'redis<9,>=6.4; extra == "worker"', "numpy>=1.26"]

    assert machine.unmet(asked, found) == wrong


# The server.


def test_unknown_host() -> None:
    check = health.check_redis_connection(settings=config.resolve(redis_host="nowhere.invalid"))

    assert not check
    assert "there is no host of that name" in check.detail
    assert check.cure == "export REDIS_HOST=HOST"


@pytest.mark.parametrize("given", [None, "wrong"])
def test_password_that_is_wrong_or_missing_is_never_shown(given: str | None) -> None:
    with Server(password=SECRET) as server:
        account = f":{given}@" if given else ""
        url = f"redis://{account}127.0.0.1:{server.port}"

        check = health.check_redis_connection(settings=config.resolve(redis_url=url))

        assert not check
        assert "it wants a password" in check.detail
        assert check.cure == f"export REDIS_URL=redis://:PASSWORD@127.0.0.1:{server.port}"
        assert SECRET not in str(check)


@pytest.mark.slow
def test_tls_on_one_side_only_and_an_authority_that_is_not_known(tmp_path: Path) -> None:
    certificates = Certificates.make(tmp_path / "tls")
    with Server(certificates=certificates) as server:
        plain = f"redis://127.0.0.1:{server.port}"
        unknown = f"rediss://127.0.0.1:{server.port}"
        wrong = f"rediss://127.0.0.1:{server.plain_port}"

        found = [
            health.check_redis_connection(settings=config.resolve(redis_url=url))
            for url in (server.url, plain, unknown, wrong)
        ]

        assert list(map(bool, found)) == [True, False, False, False]
        assert all("one side speaks TLS" in check.detail for check in found[1:])
        with_authority = f"export REDIS_URL={unknown}?ssl_ca_certs=FILE"
        without = f"export REDIS_URL=redis://127.0.0.1:{server.plain_port}"
        assert [check.cure for check in found[1:]] == [with_authority, with_authority, without]


def test_frozen_server_and_silent_network_are_soon_known() -> None:
    with Server() as server, black_hole() as port:
        server.freeze()
        begun = time.monotonic()

        found = [
            health.check_redis_connection(settings=config.resolve(redis_port=p))
            for p in (server.port, port)
        ]

        assert time.monotonic() - begun < 3.0
        assert all("does not answer in time" in check.detail for check in found)
        assert found[0].cure == f"redis-cli -h localhost -p {server.port} ping"


def test_database_that_is_not_there_is_told_from_a_server_that_is_not() -> None:
    with Server(databases="4") as server:
        settings = config.resolve(redis_port=server.port, redis_backend_db=7)

        report = look(settings=settings)
        check = health.check_redis_connection(settings=settings)

        found = named(report)
        assert found["redis"].status == "ok"
        assert found["databases"].status == "fail"
        assert found["databases"].cure == "export REDIS_BROKER_DB=0 REDIS_BACKEND_DB=0"
        assert check == found["databases"]


@pytest.mark.parametrize(
    ("options", "status", "says", "cure"),
    [
        ({}, "warn", "no limit", "CONFIG SET maxmemory 256mb"),
        (
            {"maxmemory": "64mb", "maxmemory_policy": "allkeys-lru"},
            "warn",
            "policy allkeys-lru drops batches",
            "CONFIG SET maxmemory-policy noeviction",
        ),
        ({"maxmemory": "64mb"}, "ok", "used of 67 MB, noeviction", None),
        ({"maxmemory": "1mb"}, "warn", "nearly full", "toolkit queue purge"),
    ],
)
def test_memory_and_policy(
    options: dict[str, str], status: str, says: str, cure: str | None
) -> None:
    with Server(**options) as server:
        report = look(settings=config.resolve(redis_port=server.port))

        check = named(report)["memory"]
        assert check.status == status
        assert says in check.detail
        assert (check.cure or "").endswith(cure or "")


@pytest.mark.parametrize(
    ("bind", "password", "protected", "status"),
    [
        ("127.0.0.1", None, "no", "ok"),
        ("0.0.0.0", None, "yes", "ok"),
        ("0.0.0.0", None, "no", "warn"),
        ("0.0.0.0", SECRET, "no", "ok"),
    ],
)
def test_open_server_without_a_password_is_warned_of(
    bind: str, password: str | None, protected: str, status: str
) -> None:
    with Server(bind=bind, password=password, protected_mode=protected) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")

        report = look(settings=config.resolve(redis_url=url))

        check = named(report)["exposure"]
        assert check.status == status
        assert SECRET not in repr(report)
        if status == "warn":
            assert f"CONFIG SET requirepass PASSWORD; export REDIS_URL={url}".replace(
                "redis://", "redis://:PASSWORD@"
            ) in str(check.cure)


def test_user_with_few_rights_is_no_error() -> None:
    with Server() as server:
        with server.client() as client:
            client.execute_command(
                *("ACL", "SETUSER", "few", "on", ">word", "~*", "&*"),
                *("+@all", "-@admin", "-@dangerous"),
            )
        url = f"redis://few:word@127.0.0.1:{server.port}"

        found = named(look(settings=config.resolve(redis_url=url)))

        assert found["memory"].status == "skip"
        assert found["workers"].status == "fail"
        assert "word" not in found["redis"].detail


def test_cluster_that_is_passed_by_is_told(settings: Settings) -> None:
    with Server() as elsewhere:
        try:
            LocalCluster(0, **CHEAP)

            check = named(look(settings=config.resolve(redis_port=elsewhere.port)))["settings"]

            assert check.status == "warn"
            assert check.cure == "unset REDIS_URL REDIS_HOST REDIS_PORT"
        finally:
            cluster_down(settings)
