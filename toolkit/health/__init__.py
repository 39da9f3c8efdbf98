"""What works on this machine and on the way to the workers, with evidence and a cure for each.

Law: nothing is believed that was not tried, nothing that was found broken is raised, and a
look leaves nothing behind: no message, no key, no file.
"""

from __future__ import annotations

from toolkit.health.checkup import (
    check_celery_worker,
    check_health,
    check_redis_connection,
    try_dispatch,
)
from toolkit.health.report import Check, HealthReport, Status

__all__ = [
    "Check",
    "HealthReport",
    "Status",
    "check_celery_worker",
    "check_health",
    "check_redis_connection",
    "try_dispatch",
]
