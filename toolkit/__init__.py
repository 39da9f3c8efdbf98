"""Folders of images to a searchable vector index, from a notebook.

::

    folders ─scan→ items ─plan→ (in the store already? skip) ─cut→ batches ─dispatch→ executor
       executor ─embed→ outcome ─check→ store (durable, append-only) ─→ usearch index
       index ─verify recall→ publish (atomic swap) ─→ open, search

>>> import toolkit as tk
>>> build = tk.build_index("~/Pictures")
>>> index = tk.open_index("Pictures")
>>> index.search("cat.jpg", k=12)

Everything is loaded on first use: importing this costs no torch and less than 0.3 s.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit import errors as errors
    from toolkit.api import (
        attach,
        build_index,
        compare,
        datasets,
        embed,
        indexes,
        open_index,
        plan,
        runs,
    )
    from toolkit.cluster.local import LocalCluster
    from toolkit.config import Settings, configure
    from toolkit.driver import Build
    from toolkit.health import HealthReport, check_health
    from toolkit.hits import Hit, Hits
    from toolkit.housekeeping import (
        export_index,
        import_index,
        pull_model,
        store_gc,
        store_usage,
    )
    from toolkit.images.walk import DEFAULT_EXCLUDES
    from toolkit.search import Index

    settings: Settings

#: Where each public name lives.
_HOMES = {
    "toolkit.api": (
        *("attach", "build_index", "compare", "datasets", "embed"),
        *("indexes", "open_index", "plan", "runs"),
    ),
    "toolkit.cluster.local": ("LocalCluster",),
    "toolkit.config": ("Settings", "configure"),
    "toolkit.driver": ("Build",),
    "toolkit.health": ("HealthReport", "check_health"),
    "toolkit.hits": ("Hit", "Hits"),
    "toolkit.housekeeping": (
        *("export_index", "import_index", "pull_model", "store_gc", "store_usage"),
    ),
    "toolkit.images.walk": ("DEFAULT_EXCLUDES",),
    "toolkit.search": ("Index",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DEFAULT_EXCLUDES",
    "Build",
    "HealthReport",
    "Hit",
    "Hits",
    "Index",
    "LocalCluster",
    "Settings",
    "attach",
    "build_index",
    "check_health",
    "compare",
    "configure",
    "datasets",
    "embed",
    "errors",
    "export_index",
    "import_index",
    "indexes",
    "open_index",
    "plan",
    "pull_model",
    "runs",
    "settings",
    "store_gc",
    "store_usage",
]

# A library stays quiet unless its user configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name == "settings":
        # Resolved at each look: the environment may have changed since the last one.
        return importlib.import_module("toolkit.config").resolve()
    if name == "app":  # where `celery -A toolkit` looks
        return importlib.import_module("toolkit.cluster.app").worker_app()
    if name == "errors":
        return importlib.import_module("toolkit.errors")
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
