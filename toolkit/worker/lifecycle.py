"""What happens when a process of a worker starts, ends or dies; told by Celery's signals."""

from __future__ import annotations

import logging
import os
from typing import Any

from billiard.process import current_process
from celery import signals

from toolkit import config
from toolkit.cluster.protocol import EMBED_TASK
from toolkit.dispatch.job import Job
from toolkit.worker import process
from toolkit.worker.presence import link

logger = logging.getLogger(__name__)


@signals.worker_process_init.connect
def _pool_process_starts(**_: Any) -> None:
    if _is_of_a_pool():
        process.start(config.resolve(), parent=os.getppid())


@signals.worker_process_shutdown.connect
def _pool_process_ends(**_: Any) -> None:
    if _is_of_a_pool():
        process.stop()


def _is_of_a_pool() -> bool:
    # The pool "solo" sends these signals too, in the worker's main process.
    return bool(current_process().name != "MainProcess")


@signals.task_failure.connect
def _task_fails(sender: Any, args: Any, exception: BaseException, **_: Any) -> None:
    """Tell the client at once, where it would find out by a silence of seconds.

    In prefork's main process: its pool's process died, or was killed at the hard limit.
    Elsewhere: a message that is no batch, or a mistake of ours.
    """
    if getattr(sender, "name", "") != EMBED_TASK or not args:
        return
    try:
        job = Job.from_json(args[0])
    except ValueError as error:
        logger.error("a message was refused: %s", error)
        return
    what = {"reason": f"{type(exception).__name__}: {exception}", "suspects": [], "again": True}
    link().answer(job, "lost", what)
