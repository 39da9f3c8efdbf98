"""The stage of a build that embeds: down the roads, into the store, with the books kept open.

Law: what comes back is stored before it is counted, a batch at a time, so that a death costs
at most one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.catalog import transaction
from toolkit.config import Settings
from toolkit.dispatch.dispatcher import Dispatcher
from toolkit.dispatch.roads import Roads
from toolkit.embedding.spec import EncoderSpec
from toolkit.embedding.store import SegmentWriter, VectorStore
from toolkit.errors import RunCancelledError, RunNotFoundError
from toolkit.faults import point
from toolkit.fidelity import Sample
from toolkit.images.decode import DECODE_VERSION
from toolkit.images.scan import Scan
from toolkit.journal import RunJournal, list_runs
from toolkit.places import runs_dir
from toolkit.planning import Plan
from toolkit.records import Failed, FailureKind, Item, Outcome
from toolkit.request import BuildRequest
from toolkit.run_record import LEAST_IMAGES
from toolkit.text import fallback_text

logger = logging.getLogger(__name__)


class EmbeddingStage:
    """Embeds what a plan lacks.

    Args:
        request: The build.
        settings: Its settings.
        catalog: The open catalog.
        scan: The files of the build.
        journal: Hears of every step.
        stored: Given the image keys and the vectors of each batch once they are stored.
    """

    def __init__(
        self,
        request: BuildRequest,
        settings: Settings,
        catalog: sqlite3.Connection,
        scan: Scan,
        journal: RunJournal,
        stored: Callable[[list[bytes], NDArray[np.float32]], None] = lambda keys, vectors: None,
    ) -> None:
        self._request, self._settings, self._stored = request, settings, stored
        self._db, self._scan, self._journal = catalog, scan, journal
        #: Files that changed under the build and were read again.
        self._reread: set[int] = set()
        self._sample = Sample()
        self._embedded = 0
        self._told_at = 0.0

    def run(self, plan: Plan, spec: EncoderSpec, total: int) -> int:
        """Embed what a plan lacks.

        Args:
            plan: Settled.
            spec: What the vectors are.
            total: How many the plan lacks.

        Returns:
            How many were embedded.

        Raises:
            RunCancelledError: If somebody cancelled the run.
        """
        if total:
            self._embed(plan, spec, total)
            if not (spec.is_exact or self._journal.is_cancelled) and self._embedded:
                self._measure_fidelity()
        return self._embedded

    def _embed(self, plan: Plan, spec: EncoderSpec, total: int) -> None:
        store, journal = VectorStore(self._db, self._settings.data_dir, spec), self._journal
        journal.stage("load")
        with (
            Roads(
                self._request.encoder,
                spec,
                self._settings,
                journal.record.run_id,
                distributed=self._request.distributed,
                on_move=self._note_move,
                cancelled=lambda: journal.is_cancelled,
            ) as roads,
            store.writer(journal.record.run_id) as writer,
        ):
            roads.open()
            if journal.is_cancelled:
                raise RunCancelledError("the run was cancelled", journal.record.run_id)
            journal.stage("embed", total)
            self._told_at = time.monotonic()
            # Again until nothing is left: a file that changed under the build, or whose copy
            # failed, comes back with what is known of it now.
            while n_left := plan.n_to_embed():
                self._dispatch(plan, roads, store, writer, spec, n_left)
                # What one file was found to be, its copies are as well.
                plan.apply_failures()

    def _note_move(self, before: str | None, road: str, device: str, reason: str | None) -> None:
        """Write down which road is taken from now on, and why."""
        record, journal = self._journal.record, self._journal
        record.road, record.device = road, device
        journal.event("road", road=road, device=device, before=before, reason=reason)
        eta_s = [self._eta_s(name) for name in ("workers" if before is None else before, road)]
        if before is not None:
            move = {"at": time.time(), "from": before, "to": road, "reason": reason}
            record.moves.append({**move, "batches": record.batches[before], "eta_s": eta_s})
        if reason is not None:
            record.fallback_reason = record.fallback_reason or reason
            logger.warning("run %s: %s", record.run_id, fallback_text(reason, eta_s))
        else:
            logger.info("run %s embeds on the road %s, %s", record.run_id, road, device)
        journal.write()

    def _eta_s(self, road: str) -> float | None:
        """Seconds that what is left would take on a road, as far as anything tells."""
        record = self._journal.record
        rate = record.rate(road) or last_rate(self._settings.data_dir, record.encoder, road)
        return record.accounting.pending / rate if rate else None

    def _dispatch(
        self,
        plan: Plan,
        roads: Roads,
        store: VectorStore,
        writer: SegmentWriter,
        spec: EncoderSpec,
        n_items: int,
    ) -> None:
        journal = self._journal
        dispatcher = Dispatcher(
            roads,
            spec,
            max_retries=self._settings.celery_max_retries,
            cancelled=lambda: journal.is_cancelled or roads.workers_cancelled,
            on_loss=lambda reason, n: journal.event("lost", reason=reason, suspects=n),
        )
        for road, outcome in dispatcher.run(self._wanted(plan, store), n_items):
            point("after-embed")
            self._store(plan, writer, outcome)
            journal.record.batches[road] += 1
            self._tell(road, len(outcome.embedded), len(outcome.failed))

    def _tell(self, road: str, n_embedded: int, n_failed: int) -> None:
        """The books while they are open: what has a vector counts as indexed."""
        record, now = self._journal.record, time.monotonic()
        record.images[road] = record.images.get(road, 0) + n_embedded
        record.road_seconds[road] = record.road_seconds.get(road, 0.0) + now - self._told_at
        self._told_at = now
        books = record.accounting
        books.embedded = self._embedded
        books.pending -= n_embedded + n_failed
        books.indexed += n_embedded
        books.failed += n_failed
        record.embed_seconds = time.time() - record.stage_started
        self._journal.progress(record.done + n_embedded + n_failed)

    def _wanted(self, plan: Plan, store: VectorStore) -> Iterator[Item]:
        """What is to embed, less what another build has stored in the meantime."""
        for item in plan.to_embed():
            if item.key is None or not store.has([item.key]):
                self._sample.offer(item)
                yield item

    def _store(self, plan: Plan, writer: SegmentWriter, outcome: Outcome) -> None:
        first = writer.append(outcome.vectors) if outcome.embedded else 0
        failed = tuple(self._judged(failure) for failure in outcome.failed)
        point("before-commit")
        with transaction(self._db):
            outcome = dataclasses.replace(outcome, failed=failed)
            writer.record(outcome, first, DECODE_VERSION, self._settings.max_pixels)
            for embedded in outcome.embedded:
                self._scan.identify(embedded.item_id, embedded.key, embedded.stat)
            for failure in failed:
                self._note_failure(plan, failure)
        point("after-commit")
        self._embedded += len(outcome.embedded)
        self._sample.saw(outcome)
        rows = [embedded.row for embedded in outcome.embedded]
        self._stored([embedded.key for embedded in outcome.embedded], outcome.vectors[rows])

    def _measure_fidelity(self) -> None:
        """Say how far a faster encoder moved the vectors of this run."""
        self._journal.stage("fidelity")
        fidelity = self._sample.measure(
            self._request.encoder, self._settings, self._db, self._journal.record.run_id
        )
        if fidelity is not None:
            self._journal.record.fidelity = str(fidelity)
            self._journal.event("fidelity", **fidelity.to_json())

    def _judged(self, failure: Failed) -> Failed:
        """Fill in what only this side knows: the content of what killed its reader."""
        if failure.kind is FailureKind.CRASH and failure.key is None:
            return dataclasses.replace(failure, key=self._scan.reread(failure.item_id))
        return failure

    def _note_failure(self, plan: Plan, failure: Failed) -> None:
        if failure.key is not None:
            self._scan.identify(failure.item_id, failure.key, failure.stat)
        if failure.kind is FailureKind.CHANGED and failure.item_id not in self._reread:
            # Once more, with its content as it is now.
            self._reread.add(failure.item_id)
            if self._scan.reread(failure.item_id) is not None:
                return
        self._scan.fail(failure.item_id, failure.kind, failure.reason)
        if failure.kind is FailureKind.UNREADABLE:
            plan.keep(failure.item_id)


def last_rate(data_dir: Path, encoder: str, road: str | None = None) -> float | None:
    """Images per second of the newest run that embedded enough with an encoder to tell.

    Args:
        data_dir: The data folder.
        encoder: In words, as the record has it.
        road: The road meant, ``None`` for whatever that run took.
    """
    for view in list_runs(runs_dir(data_dir)):
        with contextlib.suppress(RunNotFoundError):
            record = view.record()
            if record.encoder != encoder:
                continue
            if road is not None and (rate := record.rate(road)):
                return rate
            if road is None and record.accounting.embedded >= LEAST_IMAGES:
                return record.accounting.embedded / max(record.embed_seconds, 1e-3)
    return None
