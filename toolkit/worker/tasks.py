"""The one Celery task: a batch in, an answer out.

Law: it never raises over a picture and never leaves a batch without an answer, unless nobody
waits for one any more.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import shared_task

from toolkit import config
from toolkit.cluster.protocol import EMBED_TASK
from toolkit.dispatch.base import Finished, Lost
from toolkit.dispatch.job import Job
from toolkit.errors import ServerError, ToolkitError
from toolkit.records import Batch, Item
from toolkit.worker.limits import hard_limit
from toolkit.worker.presence import link
from toolkit.worker.process import embedder

logger = logging.getLogger(__name__)


@shared_task(name=EMBED_TASK, ignore_result=True)
def generate_embeddings_task(job: dict[str, Any]) -> str:
    """Embed a batch and hand the answer to the run that waits for it.

    Args:
        job: See :class:`toolkit.dispatch.job.Job`.

    Returns:
        One word for the log of Celery and for Flower: what came of it.
    """
    given = Job.from_json(job)
    with hard_limit(config.resolve()):
        embedder().wait_until_loaded()
        try:
            verdict = link().claim(given)
        except ServerError as error:
            # Its client will notice that nobody claims it, and send it again.
            logger.warning("%s: batch %s is left unclaimed", error, given.task_id)
            return "unclaimed"
        if verdict != "ok":
            logger.info("batch %s is not wanted any more: %s", given.task_id, verdict)
            return verdict
        logger.info("batch %s: %d images", given.task_id, len(given.batch.items))
        return _embed(given)


def _embed(job: Job) -> str:
    try:
        blobs = link().blobs(job, job.blobs)
        if blobs is None:
            return _lost(job, "the bytes of its pictures are gone from the server", again=True)
        outside = _outside(job)
        event = embedder().run(_readable(job, outside), blobs)
    except ToolkitError as error:
        return _lost(job, str(error), again=True)
    if isinstance(event, Lost):
        logger.warning("batch %s was lost: %s", job.task_id, event.error)
        return _lost(job, str(event.error), suspects=sorted(event.suspects))
    return _done(job, event, outside)


def _done(job: Job, event: Finished, outside: list[int]) -> str:
    outcome = event.outcome
    what = {"outcome": outcome.to_json(), "unseen": outside}
    verdict = link().answer(job, "done", what, outcome.blob())
    logger.info(
        "batch %s: %d embedded, %d failed, %.1f s: %s",
        *(job.task_id, len(outcome.embedded), len(outcome.failed), outcome.seconds, verdict),
    )
    return "done" if verdict == "ok" else verdict


def _lost(job: Job, reason: str, *, suspects: list[int] | None = None, again: bool = False) -> str:
    link().answer(job, "lost", {"reason": reason, "suspects": suspects or [], "again": again})
    return "lost"


def _outside(job: Job) -> list[int]:
    """Items that lie outside of the folders that may be read here."""
    settings = config.resolve()
    roots = [bytes(root) for root in settings.worker_roots or (settings.datasets_dir,)]
    given = set(job.blobs)
    return [
        item.id for item in job.batch.items if item.id not in given and not _is_under(item, roots)
    ]


def _is_under(item: Item, roots: list[bytes]) -> bool:
    # As text alone: a link inside of a root may lead where its owner wants it to.
    return b"/../" not in item.path and any(
        item.path.startswith(root.rstrip(b"/") + b"/") for root in roots
    )


def _readable(job: Job, outside: list[int]) -> Job:
    if not outside:
        return job
    without = set(outside)
    items = tuple(item for item in job.batch.items if item.id not in without)
    batch = Batch(job.batch.id, job.batch.fingerprint, items)
    return Job(job.run_id, job.attempt, batch, job.blobs, job.max_pixels)
