"""What can be asked for over HTTP: a build to be started or stopped, and runs to be told of."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from toolkit import api
from toolkit.config import Settings
from toolkit.driver import Build, find
from toolkit.errors import BuildFailedError, BuildInProgressError
from toolkit.images.datasets import list_datasets
from toolkit.monitor.guards import RefusedError
from toolkit.monitor.snapshot import find_row, take

#: Datasets of one build.
MOST_DATASETS = 100

#: Of failures, one by one; the table on the run's own machine has them all.
MOST_FAILURES = 100

#: Texts as they are allowed, for the description as well.
PATTERNS = {
    "name": r"^[^./\u0000-\u001f\u007f][^/\u0000-\u001f\u007f]{0,199}$",
    # A name of timm's alone: no file, and no repository of anybody's.
    "model": r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$",
    "run_id": r"^[0-9A-Za-z\-]{1,64}$",
}

_IN_WORDS = {
    "name": "1 to 200 characters on one line, without a slash and without a dot at the start",
    "model": "the name of a model of timm's: letters, digits, dots, dashes and underscores",
    "run_id": "letters, digits and dashes",
}

_FLAGS = ("distributed", "pretrained")
_KEYS = {"dataset_names", "name", "model", *_FLAGS}

#: Two requests at one time must not both find an index free.
_starting = threading.Lock()


def start_build(body: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Start a build in a process of its own, which outlives the monitor.

    Raises:
        RefusedError: If something in the body is not allowed, a dataset is missing, the index or
            another start is under way, or the run failed before it was running.
        UsageError: If the call cannot be served as it was made.
    """
    call = _call(body, settings)
    # Whoever waited here would hold a thread that others need for an answer.
    if not _starting.acquire(blocking=False):
        raise RefusedError(
            429,
            "another build is being started; try again in a moment",
            headers={"Retry-After": "1"},
        )
    try:
        build = api.build_index(**call, wait=False)
    except BuildInProgressError as error:
        raise RefusedError(409, str(error), {"run_id": error.run_id}) from error
    except BuildFailedError as error:
        raise RefusedError(422, str(error), {"run_id": error.run_id}) from error
    finally:
        _starting.release()
    return _told(build)


def cancel(run_id: str, body: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Ask a run to stop.

    Raises:
        RefusedError: If it has ended, or the body holds anything.
        RunNotFoundError: If there is no such run.
    """
    if body:
        raise RefusedError(400, f"there is no key {next(iter(body))!r:.100}; send {{}}")
    build = find(_text("run_id", run_id, status=404), settings)
    if not (state := build.state).is_live:
        raise RefusedError(409, f"run {run_id} is {state}: there is nothing to stop")
    build.cancel()
    return _told(build)


def one_run(run_id: str, settings: Settings) -> dict[str, Any]:
    """A run, with what failed of it.

    Raises:
        RunNotFoundError: If there is no such run.
    """
    build = find(_text("run_id", run_id, status=404), settings)
    failures = build.failures.head(MOST_FAILURES).fillna("").to_dict("records")
    return {**find_row(run_id, settings, build.record).to_json(), "failures": failures}


def all_runs(settings: Settings) -> list[dict[str, Any]]:
    """The runs, live ones first, then the newest."""
    return [row.to_json() for row in take(settings, health=False).runs]


def _told(build: Build) -> dict[str, Any]:
    record = build.record
    return {
        "run_id": record.run_id,
        "index": record.index,
        "state": record.state,
        "url": f"/api/runs/{record.run_id}",
    }


def _call(body: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The arguments of a build as a body asks for it; every key of it is checked."""
    if unknown := sorted(body.keys() - _KEYS):
        keys = ", ".join(sorted(_KEYS))
        raise RefusedError(400, f"there is no key {unknown[0]!r:.100}; there are {keys}")
    flags = {flag: body.get(flag, True) for flag in _FLAGS}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise RefusedError(400, f"{flag} is true or false")
    return {
        "datasets": _folders(body.get("dataset_names"), settings.datasets_dir),
        **flags,
        **{key: _text(key, body[key]) for key in ("name", "model") if key in body},
    }


def _folders(names: Any, datasets_dir: Path) -> list[Path]:
    """The folders of datasets: of those in this list and no others, whatever a name looks like."""
    if not isinstance(names, list) or not 1 <= len(names) <= MOST_DATASETS:
        raise RefusedError(400, f"dataset_names is a list of 1 to {MOST_DATASETS} names")
    if not all(isinstance(name, str) for name in names):
        raise RefusedError(400, "dataset_names holds something that is no text")
    if len(set(names)) < len(names):
        raise RefusedError(400, "dataset_names has one name twice; name each dataset once")
    known = dict(list_datasets(datasets_dir))
    for name in names:
        if name not in known:
            there = ", ".join(list(known)[:10]) or "none"
            raise RefusedError(
                404,
                f"no dataset {name!r:.100} in {datasets_dir} (there: {there}); put its folder "
                "there, or start the monitor with another TOOLKIT_DATASETS_DIR",
            )
    return [known[name] for name in names]


def _text(key: str, value: Any, *, status: int = 400) -> str:
    if not isinstance(value, str) or not re.fullmatch(PATTERNS[key], value):
        raise RefusedError(status, f"{key} is not {value!r:.100}; use {_IN_WORDS[key]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON lets through
        raise RefusedError(status, f"{key} is not text: {error.reason}") from error
    return value
