"""The hard limit of a batch, in every pool.

The soft one is kept by :class:`toolkit.worker.embedder.Embedder`, which stops its child and
goes on. This one is for the case in which that itself hangs: prefork's own limit kills the
pool's process; the other pools have none, so their whole process ends, with a dump of what
it did, and its supervisor starts another.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator

from toolkit.config import Settings
from toolkit.worker.process import is_pool_process


@contextlib.contextmanager
def hard_limit(settings: Settings) -> Iterator[None]:
    """End this process if what is inside takes longer than ``CELERY_TASK_TIME_LIMIT``."""
    if is_pool_process():
        yield
        return
    # From a thread in C: it fires also while something holds the interpreter's lock.
    faulthandler.dump_traceback_later(settings.celery_task_time_limit, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
