"""A run, driven in this process or in one of its own, and watched from anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import config, display
from toolkit.errors import (
    BuildFailedError,
    BuildHeldError,
    RunCancelledError,
    RunNotFoundError,
    ServerError,
)
from toolkit.journal import RunJournal, RunView, find_run, new_run_id
from toolkit.pipeline import run_build
from toolkit.places import check_index_free, index_dir, runs_dir
from toolkit.request import BuildRequest
from toolkit.run_record import Accounting, Progress, RunRecord, RunState
from toolkit.search import Index

if TYPE_CHECKING:
    import pandas as pd

    from toolkit.cluster.mirror import MirroredRun

#: Seconds a detached build may take until its journal appears.
DETACH_TIMEOUT_S = 30.0


class Build:
    """A run of a build, live or ended; works from any process that sees its folder or its server.

    Of a run on another machine the record can be read and a stop be asked for; its failures,
    log and index are on that machine.
    """

    def __init__(self, view: RunView | MirroredRun, settings: config.Settings) -> None:
        self._view, self._settings = view, settings

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._view.folder.name

    @property
    def record(self) -> RunRecord:
        """Everything the journal says, as it is now."""
        return self._view.record()

    @property
    def state(self) -> RunState:
        """What it is doing or how it ended."""
        return self.record.state

    @property
    def accounting(self) -> Accounting:
        """The books, in files."""
        return self.record.accounting

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self.record.progress

    @property
    def failures(self) -> pd.DataFrame:
        """A row per failed file: path, kind, reason, dataset. ``.to_csv()`` writes it."""
        import pandas as pd  # deferred: `import toolkit` is to take less than 0.3 s

        return pd.DataFrame(self._view.failures(), columns=["path", "kind", "reason", "dataset"])

    @property
    def index(self) -> Index:
        """The index it published, opened.

        Raises:
            IndexNotFoundError: If nothing is published under that name.
        """
        return Index.open(self.record.index, self._settings)

    def cancel(self) -> None:
        """Ask it to stop; what is embedded by then is kept.

        Raises:
            RunNotFoundError: If it has ended already.
        """
        if not (state := self.state).is_live:
            raise RunNotFoundError(f"run {self.run_id} is {state}: there is nothing to stop")
        self._view.request_cancel()

    def wait(self, timeout_s: float | None = None) -> Build:
        """Wait until it ends, showing how far it is.

        Raises:
            TimeoutError: If it is still live after ``timeout_s`` seconds.
            RunError: As :func:`build_index` raises it.
        """
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        with display.progress() as show:
            while (record := self.record).state.is_live:
                show(record)
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"run {self.run_id} is {record.state} after {timeout_s:g} s")
                time.sleep(0.2)  # a file is polled: no other process can wake us
            show(record)
        _raise_if_failed(record)
        return self

    def publish(self, *, wait: bool = True) -> Build:
        """Release a held build: build again, accepting losses as large as those it found.

        Should more be lost by now, the new build is held in its turn.

        Args:
            wait: ``False`` starts a process that outlives this one and returns at once.

        Raises:
            RunNotFoundError: If it is not held.
            BuildInProgressError: If another run builds this index.
        """
        record = self.record
        if record.state is not RunState.HELD:
            raise RunNotFoundError(f"run {self.run_id} is {record.state}, not held")
        request = BuildRequest.from_json(self._view.request())
        removed, failing = record.losses or (0, 0)
        accepted = dataclasses.replace(request, accept_losses=(removed, failing))
        return (run_here if wait else detach)(accepted, self._settings)

    def logs(self) -> str:
        """The run's log."""
        return self._view.log()

    def __repr__(self) -> str:
        return display.run_text(self.record)

    def _repr_html_(self) -> str:
        return display.run_html(self.record, self._view.failures())


def find(run_id: str | None, settings: config.Settings) -> Build:
    """A run by its id, or the newest live one: on this machine's disk, else on the server.

    Raises:
        RunNotFoundError: If there is none.
        ServerError: If it is not on this disk, and a server is there that does not say.
    """
    try:
        return Build(find_run(runs_dir(settings.data_dir), run_id), settings)
    except RunNotFoundError as error:
        # Deferred: as in _mirror.
        from toolkit.cluster.mirror import mirrored_run

        try:
            view = mirrored_run(settings, run_id)
        except ServerError as silence:
            # Where nothing listens there is no other place to look.
            if run_id is not None and silence.cause != "refused":
                raise silence from error
            view = None
        if view is None:
            raise error from None
        return Build(view, settings)


def run_here(request: BuildRequest, settings: config.Settings) -> Build:
    """Run a build in this process, showing how far it is."""
    journal = _journal(request, settings)
    build = Build(RunView(journal.folder), settings)
    _mirror(journal, request, settings)
    with _logged(journal), display.progress() as show:
        journal.add_sink(show)
        with contextlib.suppress(BuildHeldError):
            run_build(request, settings, journal)
    return build


def drive(run_dir: Path) -> None:
    """Run a build that another process queued; what a detached build's process does."""
    settings = config.resolve()
    view = RunView(run_dir)
    journal = RunJournal(run_dir.parent, view.record())
    request = BuildRequest.from_json(view.request())
    _mirror(journal, request, settings)
    with _logged(journal), contextlib.suppress(BuildHeldError):
        run_build(request, settings, journal)


def detach(request: BuildRequest, settings: config.Settings) -> Build:
    """Start a process that runs the build and outlives this one.

    Raises:
        BuildInProgressError: If another run builds this index.
        BuildFailedError: If the process does not start, or the build ends at once.
    """
    # The other process would find out too, after seconds and in a run of its own.
    check_index_free(index_dir(settings.data_dir, request.name), request.name)
    journal = _journal(request, settings)
    journal.release()
    folder = journal.folder
    environment = {**os.environ, **config.as_environment(settings)}
    with open(folder / "run.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "toolkit.cli", "drive", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    # Waited for as long as this process lives: else it would stay a zombie once it has ended.
    threading.Thread(target=process.wait, name=f"end of {folder.name}", daemon=True).start()
    build = Build(RunView(folder), settings)
    deadline = time.monotonic() + DETACH_TIMEOUT_S
    while build.state is RunState.QUEUED:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise BuildFailedError(
                f"the process of run {build.run_id} did not start; see its log: "
                f"{folder / 'run.log'}",
                build.run_id,
            )
        time.sleep(0.05)  # a file is polled: the other process has no other way to tell
    # What is wrong with the call shows at once; later ends are told by whoever waits.
    _raise_if_failed(build.record)
    return build


def _journal(request: BuildRequest, settings: config.Settings) -> RunJournal:
    record = RunRecord(new_run_id(), request.name)
    return RunJournal(runs_dir(settings.data_dir), record, request.to_json())


def _mirror(journal: RunJournal, request: BuildRequest, settings: config.Settings) -> None:
    """Let other machines see a run, if workers may have a part in it."""
    if request.distributed and settings.distributed_available:
        # Deferred: a build that stays on this machine needs no client library.
        from toolkit.cluster.connection import resolve_address
        from toolkit.cluster.mirror import Background, Mirror
        from toolkit.cluster.protocol import Keys

        mirror = Mirror(resolve_address(settings), Keys(settings.namespace))
        journal.add_sink(Background(mirror))


@contextlib.contextmanager
def _logged(journal: RunJournal) -> Iterator[None]:
    """Send the package's log to the run's file as well, while the run lasts."""
    handler = logging.FileHandler(journal.folder / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("toolkit")
    package.addHandler(handler)
    level = package.level
    package.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


def _raise_if_failed(record: RunRecord) -> None:
    if record.state is RunState.CANCELLED:
        raise RunCancelledError(f"run {record.run_id} was cancelled", record.run_id)
    if record.state in (RunState.FAILED, RunState.INTERRUPTED):
        raise BuildFailedError(f"run {record.run_id} {record.state}: {record.error}", record.run_id)
