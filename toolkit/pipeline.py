"""One build, from folders to a published index: scan → plan → dispatch → store → index → publish.

Law: everything before the swap can die at any moment and costs at most one batch; the swap
is one atomic replace; and nothing is published whose books do not add up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sqlite3
from collections.abc import Iterator
from typing import Any

from toolkit.catalog import open_catalog, transaction
from toolkit.config import Settings
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.spec import EncoderSpec
from toolkit.embedding.store import VectorStore
from toolkit.embedding.weights import known_spec
from toolkit.embedding_stage import EmbeddingStage, last_rate
from toolkit.errors import (
    BuildFailedError,
    BuildHeldError,
    DamagedIndexError,
    DiskFullError,
    IndexConflictError,
    IndexNotFoundError,
    RunCancelledError,
)
from toolkit.images.decode import DECODE_VERSION
from toolkit.images.scan import Scan
from toolkit.images.walk import Rules
from toolkit.index.ahead import GraphAhead
from toolkit.index.build import publish, write_version
from toolkit.index.draft import may_grow
from toolkit.index.vector_index import DTYPE_BYTES
from toolkit.index.version import IndexVersion, open_current
from toolkit.journal import RunJournal
from toolkit.machine import free_bytes
from toolkit.places import data_in_use, index_dir, index_lock
from toolkit.planning import Losses, Plan
from toolkit.request import BuildRequest, PlanReport
from toolkit.run_record import Accounting, RunState

logger = logging.getLogger(__name__)

#: Share by which free space must exceed what a build will write.
SPACE_MARGIN = 1.2

#: Bytes of an index per row for links and paths, besides its components.
_ROW_BYTES = 600


def plan_build(request: BuildRequest, settings: Settings) -> PlanReport:
    """Scan and compare, write nothing.

    Raises:
        DatasetError: If a dataset is missing.
        DiskFullError: If there is no room for what the build would write.
        IndexConflictError: If the name is taken by another index.
    """
    spec = known_spec(request.encoder, settings.data_dir)
    with (
        contextlib.closing(open_catalog(settings.data_dir)) as catalog,
        contextlib.closing(_Build(request, settings, catalog)) as build,
    ):
        build.check_conflict(spec)
        build.scan_files()
        with build.planned(spec) as plan:
            report = build.report(plan, spec, plan.accounting())
        build.check_space(report)
        return report


def run_build(request: BuildRequest, settings: Settings, journal: RunJournal) -> None:
    """Run one build to its end; the journal tells how it went.

    Raises:
        BuildFailedError: If nothing could be indexed.
        BuildHeldError: If the guard held it.
        BuildInProgressError: If another run builds this index.
        RunCancelledError: If somebody cancelled it.
        KeyboardInterrupt: If it was interrupted; what is stored is kept.
        ToolkitError: Whatever else stopped it.
    """
    folder = index_dir(settings.data_dir, request.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            index_lock(folder, request.name, journal.record.run_id),
            data_in_use(settings.data_dir),
            contextlib.closing(open_catalog(settings.data_dir)) as catalog,
        ):
            journal.record.state, journal.record.folder = RunState.RUNNING, str(folder)
            journal.stage("scan")
            build = _Build(request, settings, catalog, journal)
            with contextlib.closing(build):
                build.run()
    except BaseException as error:
        journal.end(_state_after(error), str(error) or type(error).__name__)
        raise
    journal.end(RunState.DONE)


def _state_after(error: BaseException) -> RunState:
    match error:
        case BuildHeldError():
            return RunState.HELD
        case RunCancelledError():
            return RunState.CANCELLED
        case KeyboardInterrupt():
            return RunState.INTERRUPTED
    return RunState.FAILED


class _Build:
    def __init__(
        self,
        request: BuildRequest,
        settings: Settings,
        catalog: sqlite3.Connection,
        journal: RunJournal | None = None,
    ) -> None:
        self._request, self._settings, self._db = request, settings, catalog
        self._folder = index_dir(settings.data_dir, request.name)
        self._scan = Scan(catalog, request.sources)
        if journal is not None:
            self._journal = journal
        self._previous: IndexVersion | None = None
        # To build anew is the cure of a damaged index.
        harmless = (IndexNotFoundError, *[DamagedIndexError] * request.replace)
        with contextlib.suppress(*harmless):
            self._previous = open_current(self._folder)

    def close(self) -> None:
        """Let go of the published version."""
        if self._previous is not None:
            self._previous.close()

    # The steps, in the order in which they run.

    def run(self) -> None:
        """All of it, from the scan to the swap."""
        journal, request = self._journal, self._request
        spec = known_spec(request.encoder, self._settings.data_dir)
        self.check_conflict(spec)
        self.scan_files(journal.progress)
        journal.record.excluded_by = dict(self._scan.excluded)
        if spec is None:
            # The model says what it is; it loads once, and the build goes on with it.
            journal.stage("load")
            with warm_executor(request.encoder, self._settings) as executor:
                spec = executor.start()
            self.check_conflict(spec)
        journal.record.encoder = spec.describe()
        with self.planned(spec) as plan:
            with transaction(self._db):
                self._scan.remember()
                if request.retry_failed:
                    plan.forget_failures()
            journal.record.accounting = books = plan.accounting()
            report = self.report(plan, spec, books)
            journal.event("plan", **dataclasses.asdict(report))
            logger.info("run %s: %s", journal.record.run_id, report)
            self.check_space(report)
            with self._graph_ahead(report, spec) as ahead:
                stage = EmbeddingStage(
                    request, self._settings, self._db, self._scan, journal, ahead.offer
                )
                n_embedded = stage.run(plan, spec, report.to_embed)
                self._stop_if_cancelled()
                self._close_books(plan, n_embedded, report)
                self._publish(plan, spec, ahead)

    def _graph_ahead(self, report: PlanReport, spec: EncoderSpec) -> GraphAhead:
        """The graph to begin while the vectors are made; its basis, as far as the plan tells."""
        older, dtype = self._previous, self._request.dtype
        if older is not None:
            changes = report.changes
            n_changed = changes.new + changes.changed + changes.deleted
            if older.dim != spec.dim or not may_grow(
                older, dtype, report.reused + report.to_embed, n_changed
            ):
                older = None
        return GraphAhead(spec.dim, dtype, self._settings.threads, older)

    def check_conflict(self, spec: EncoderSpec | None) -> None:
        """Refuse to build another index over a published one."""
        if self._previous is None or self._request.replace:
            return
        known = self._previous.manifest["extra"]["sources"]
        given = [source.identity for source in self._request.sources]
        if sorted(known) != sorted(given):
            raise IndexConflictError(
                self._request.name, f"was built from {', '.join(known)}, not {', '.join(given)}"
            )
        fingerprint = self._previous.manifest["encoder"]["fingerprint"]
        if spec is not None and spec.fingerprint != fingerprint:
            held = EncoderSpec.from_json(self._previous.manifest["encoder"]["spec"])
            raise IndexConflictError(
                self._request.name, f"holds {held.describe()}, not {spec.describe()}"
            )

    def scan_files(self, progress: Any = lambda n: None) -> None:
        """Walk and identify."""
        rules = Rules(self._request.include, self._request.exclude)
        follow = self._settings.follow_links
        self._scan.run(rules, limit=self._request.limit, follow_links=follow, progress=progress)

    @contextlib.contextmanager
    def planned(self, spec: EncoderSpec | None) -> Iterator[Plan]:
        """The plan against the store and the published index."""
        store = VectorStore(self._db, self._settings.data_dir, spec) if spec else None
        keeps = self._previous is not None and not self._request.replace
        plan = Plan(
            self._db,
            self._scan,
            encoder_id=store.encoder_id if store else -1,
            decode_version=DECODE_VERSION,
            max_pixels=self._settings.max_pixels,
            previous_items=self._previous.items_path if keeps and self._previous else None,
        )
        try:
            plan.settle(retry_failed=self._request.retry_failed)
            yield plan
        finally:
            plan.close()

    def report(self, plan: Plan, spec: EncoderSpec | None, books: Accounting) -> PlanReport:
        """The plan in figures; the books are those before anything is embedded."""
        n, reused = plan.n_to_embed() if books.pending else 0, books.reused
        rate = last_rate(self._settings.data_dir, spec.describe()) if spec else None
        dim = spec.dim if spec else 0
        row = dim * (4 + DTYPE_BYTES[self._request.dtype]) + _ROW_BYTES
        return PlanReport(
            changes=plan.changes(),
            found=books.found,
            excluded=dict(self._scan.excluded),
            failed=books.failed,
            reused=reused,
            to_embed=n,
            seconds=n / rate if rate else None,
            needed_bytes=n * dim * 4 + (n + reused) * row,
            free_bytes=free_bytes(self._settings.data_dir),
            held=self._losses(plan).reason(),
        )

    def _losses(self, plan: Plan) -> Losses:
        """What publishing would cost; files that were unreadable before are no news."""
        return plan.losses(self._kept_before)

    @property
    def _kept_before(self) -> int:
        """Files that could not be read when the published version was made."""
        if self._previous is None:
            return 0
        return int(self._previous.manifest["extra"].get("accounting", {}).get("kept", 0))

    def check_space(self, report: PlanReport) -> None:
        if report.free_bytes < SPACE_MARGIN * report.needed_bytes:
            where = str(self._settings.data_dir)
            raise DiskFullError(where, int(SPACE_MARGIN * report.needed_bytes), report.free_bytes)

    def _stop_if_cancelled(self) -> None:
        if self._journal.is_cancelled:
            raise RunCancelledError("the run was cancelled", self._journal.record.run_id)

    def _close_books(self, plan: Plan, n_embedded: int, report: PlanReport) -> None:
        journal, name = self._journal, self._request.name
        journal.failures(plan.failures())
        books = plan.accounting(n_embedded, report.reused)
        journal.record.accounting = books
        books.check(journal.record.run_id)
        if self._request.accept_changes and self._previous is not None:
            return
        losses = self._losses(plan)
        if losses.within(self._request.accept_losses):
            return
        if reason := losses.reason():
            journal.record.losses = losses.removed, losses.failing
            raise BuildHeldError(
                f"index {name!r} is held, nothing was published: {reason}. If a disk is not "
                "mounted, mount it and build again; if this is right, build again with "
                "accept_changes=True (--accept-changes)",
                journal.record.run_id,
            )
        if not books.indexed:
            raise BuildFailedError(self._nothing_indexed(plan), journal.record.run_id)

    def _nothing_indexed(self, plan: Plan) -> str:
        names = ", ".join(source.name for source in self._request.sources)
        first = next(plan.failures(), None)
        if first is not None:
            failed = self._journal.record.accounting.failed
            return f"no image of {names} could be read: all {failed} failed, the first is {first['path']}: {first['reason']}"  # noqa: E501  one sentence
        left_out = ", ".join(f"{n} by {rule!r}" for rule, n in self._scan.excluded.items())
        return f"there is no image in {names}" + (f"; left out: {left_out}" if left_out else "")

    def _publish(self, plan: Plan, spec: EncoderSpec, ahead: GraphAhead) -> None:
        journal, previous = self._journal, self._previous
        journal.stage("index", journal.record.accounting.indexed)
        n, digest = plan.rank()
        if previous is not None and self._is_published(digest, spec):
            journal.record.recall_at_10 = previous.manifest["recall_at_10"]
            return
        store = VectorStore(self._db, self._settings.data_dir, spec)
        version = write_version(
            self._folder,
            rows=plan.rows(),
            vectors=store.read,
            dim=spec.dim,
            dtype=self._request.dtype,
            encoder={"fingerprint": spec.fingerprint, "spec": spec.to_json()},
            extra=self._extra(digest),
            previous=previous,
            threads=self._settings.threads,
            progress=lambda step, done, total: journal.progress(done, total),
            ahead=ahead,
        )
        self._stop_if_cancelled()
        journal.stage("publish", n)
        publish(self._folder, version)
        logger.info("run %s published %d images as %s", journal.record.run_id, n, version)
        with open_current(self._folder) as published:
            journal.record.recall_at_10 = published.manifest["recall_at_10"]

    def _extra(self, digest: str) -> dict[str, Any]:
        return {
            "name": self._request.name,
            "sources": [source.identity for source in self._request.sources],
            "datasets": [source.name for source in self._request.sources],
            "request": self._request.encoder.to_json(),
            "table_digest": digest,
            "run_id": self._journal.record.run_id,
            "accounting": dataclasses.asdict(self._journal.record.accounting),
        }

    def _is_published(self, digest: str, spec: EncoderSpec) -> bool:
        assert self._previous is not None  # asked only then
        manifest = self._previous.manifest
        published = (
            manifest["extra"]["table_digest"],
            manifest["encoder"]["fingerprint"],
            manifest["dtype"],
            # The guard must find what was accepted, though no row has changed.
            self._kept_before,
        )
        kept = self._journal.record.accounting.kept
        return published == (digest, spec.fingerprint, self._request.dtype, kept)
