"""What every test stands on: folders of its own, and no settings from outside."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pictures
from toolkit import config
from toolkit.config import Settings


@pytest.fixture(autouse=True, scope="session")
def _heic_encoder() -> None:
    """Start the HEIC encoder before usearch is imported: x265 refuses to after that.

    Only writing is hurt, which tests alone do; reading a HEIC works in either order.
    """
    pictures.heic()


@pytest.fixture(autouse=True, scope="session")
def _engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported models, which the processes of one run of the tests share: they change nothing."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engines"
    # What a module's fixture starts is older than a test's own settings.
    os.environ["TOOLKIT_ENGINE_DIR"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, _engines: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings come from the test alone, and nothing is written outside its folder."""
    for name in list(os.environ):
        if name.startswith(("TOOLKIT_", "REDIS_", "CELERY_", "DISTRIBUTED_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TOOLKIT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("TOOLKIT_DATASETS_DIR", str(tmp_path / "datasets"))
    monkeypatch.setenv("TOOLKIT_ENGINE_DIR", str(_engines))
    # Should a server listen on this machine's default port, its workers are none of ours.
    monkeypatch.setenv("TOOLKIT_NAMESPACE", f"test-{secrets.token_hex(6)}")
    monkeypatch.chdir(tmp_path)
    before = dict(config._configured)
    yield
    config._configured.clear()
    config._configured.update(before)


@pytest.fixture
def settings() -> Settings:
    """The settings of this test."""
    return config.resolve()
