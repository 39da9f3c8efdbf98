"""Where each process writes its log, found by the name that people see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from toolkit.config import Settings
from toolkit.errors import RunNotFoundError

#: Seconds between two looks at a log that is followed.
FOLLOW_S = 0.3


def logs_dir(data_dir: Path) -> Path:
    """Folder of the logs of processes; a run's own lies in its folder."""
    return data_dir / "logs"


def log_path(name: str, settings: Settings) -> Path:
    """The log of a run, ``server``, ``embedder`` or a worker of this machine's cluster.

    Raises:
        RunNotFoundError: If nothing of that name has a log here; it names what has.
    """
    folder = logs_dir(settings.data_dir)
    known = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if name in known:
        return known[name]
    run = settings.data_dir / "runs" / name
    if Path(name).name == name and (run / "run.json").is_file():
        return run / "run.log"
    processes = ", ".join(known) or "none yet"
    raise RunNotFoundError(
        f"no log of {name!r}; there are those of runs (`toolkit runs`) and of {processes}"
    )


def read(path: Path) -> str:
    """All of a log that is there by now."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def follow(path: Path) -> Iterator[str]:
    """A log as it grows, from its beginning; ends never."""
    place = 0
    while True:
        if path.exists():
            with open(path, encoding="utf-8", errors="replace") as file:
                # Started anew by somebody: from the beginning again.
                file.seek(place if path.stat().st_size >= place else 0)
                if text := file.read():
                    yield text
                place = file.tell()
        time.sleep(FOLLOW_S)  # a file is polled: its writer has no way to wake us
