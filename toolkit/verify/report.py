"""What a verification found, and what a reader of it has to know of the machine."""

from __future__ import annotations

import dataclasses
import platform
from importlib import metadata
from typing import Any

from toolkit import config
from toolkit.config import Settings
from toolkit.machine import usable_cpus

#: Packages whose versions change what happens.
_PACKAGES = ("torch", "timm", "celery", "kombu", "redis", "usearch", "numpy", "pillow")


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One thing that was tried.

    Attributes:
        name: What was tried.
        status: ``ok``, ``fail`` or ``skip``.
        seconds: Wall time it took.
        detail: What came of it, with the cure where there is one.
    """

    name: str
    status: str
    seconds: float
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class VerifyReport:
    """Everything that was tried, and where.

    Attributes:
        machine: Versions, platform, and the settings that somebody changed.
        steps: In the order in which they ran.
        kept: Folder of logs and indexes that were kept for a look, if something failed.
    """

    machine: dict[str, str]
    steps: tuple[Step, ...]
    kept: str | None

    @property
    def is_ok(self) -> bool:
        """Whether nothing failed; what was skipped does not count."""
        return all(step.status != "fail" for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """What ``toolkit verify --json`` prints."""
        return {"ok": self.is_ok, **dataclasses.asdict(self)}


def machine(settings: Settings) -> dict[str, str]:
    """Versions, platform, and the settings that are not the default, passwords masked."""
    changed = [name for name, source in settings.sources.items() if source != "default"]
    return {
        "toolkit": metadata.version("image-index-toolkit"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": str(usable_cpus()),
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "settings": ", ".join(f"{name}={config.shown(settings, name)}" for name in changed),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
