"""The two roads of a build, and which of them it takes now.

Law: local runs only while no usable worker exists, or for an image's last attempt; and every
change from one to the other is told, with its reason, to whoever keeps the journal.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from toolkit.cluster.local import ensure_workers
from toolkit.config import Settings
from toolkit.dispatch.base import Executor
from toolkit.dispatch.celery import CeleryExecutor
from toolkit.dispatch.local import LocalExecutor, warm_executor
from toolkit.embedding.spec import EncoderRequest, EncoderSpec
from toolkit.errors import BuildFailedError, ClusterError, ExecutorUnavailableError

if TYPE_CHECKING:
    from types import TracebackType

logger = logging.getLogger(__name__)

#: Seconds within which the workers must show that they are there, or the build begins locally.
SETTLE_S = 1.2

#: Seconds of a wait for a road to open.
_MOMENT_S = 0.1

#: Told of each change: from road, to road, device of the new one, why.
OnMove = Callable[[str | None, str, str, str | None], None]


class Roads:
    """Chooses a road for each moment of a build; a context manager.

    Args:
        request: The encoder.
        spec: What it came to.
        settings: Of the build.
        run_id: The build.
        distributed: ``True``: workers if they work; ``False``: local; ``"require"``: workers.
        on_move: Told of the first choice and of each change.
        cancelled: Asked while workers are waited for.
    """

    def __init__(
        self,
        request: EncoderRequest,
        spec: EncoderSpec,
        settings: Settings,
        run_id: str,
        *,
        distributed: bool | str,
        on_move: OnMove,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._request, self._spec, self._settings = request, spec, settings
        self._run_id, self._distributed, self._on_move = run_id, distributed, on_move
        self._cancelled = cancelled
        self._stack = contextlib.ExitStack()
        self._local: LocalExecutor | None = None
        self._workers: CeleryExecutor | None = None
        self._now: Executor | None = None
        self._why_not: str | None = None
        self._loading: _Loading | None = None
        self._waits_since: float | None = None

    def __enter__(self) -> Roads:
        reason = self._switched_off()
        if reason is None and self._distributed:
            self._workers = self._meet_workers()
        elif self._is_required:
            raise ExecutorUnavailableError(f"{reason}, and workers are required")
        self._why_not = reason if self._distributed else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def workers_cancelled(self) -> bool:
        """Whether somebody asked through the server that this run stops."""
        return self._workers is not None and self._workers.is_cancelled

    @property
    def may_run_locally(self) -> bool:
        """Whether images may be embedded in this machine's own process."""
        return not self._is_required

    def choose(self) -> Executor | None:
        """The road to take now; ``None`` while neither is open.

        Raises:
            BuildFailedError: If the local model is not the one that the build began with.
            ExecutorUnavailableError: If workers are required and none comes.
            RoadError: If no local process can be had.
        """
        standing = self._workers.standing if self._workers else None
        if self._workers is not None and standing is not None and standing.n_usable:
            self._waits_since = None
            return self._take(self._workers, None)
        if self._is_required:
            self._be_patient()
            return None
        local = self.local()
        reason = standing.reason if standing is not None else self._why_not
        return self._take(local, reason) if local is not None else None

    def open(self) -> None:
        """Wait until a road is open, or the run is cancelled.

        Raises:
            RoadError: As :meth:`choose`.
        """
        while self.choose() is None and not self._cancelled():
            self.wait()

    def wait(self) -> None:
        """Wait a moment for a road to open."""
        if self._loading is not None and self._local is None:
            self._loading.wait(_MOMENT_S)
        else:
            time.sleep(_MOMENT_S)  # the thread that looks for workers wakes nobody

    def local(self) -> LocalExecutor | None:
        """The road that is always there; ``None`` while its model is being loaded.

        Raises:
            BuildFailedError: If its model is not the one that the build began with.
            RoadError: If no process can be had.
        """
        if self._local is None:
            if self._loading is None:
                self._loading = _Loading(self._request, self._settings)
                self._stack.callback(self._loading.close)
            loaded = self._loading.result()
            if loaded is None:
                return None
            if loaded[1].fingerprint != self._spec.fingerprint:
                raise BuildFailedError(
                    f"the weights of {self._request.model} changed while the build began; build "
                    "again",
                    self._run_id,
                )
            self._local = loaded[0]
        return self._local

    @property
    def _is_required(self) -> bool:
        return self._distributed == "require"

    def _switched_off(self) -> str | None:
        if not self._settings.distributed_available:
            return "the workers are switched off (DISTRIBUTED_AVAILABLE=false)"
        return None

    def _meet_workers(self) -> CeleryExecutor:
        executor = CeleryExecutor(self._run_id, self._spec, self._request.model, self._settings)
        self._stack.callback(executor.close)
        if not executor.start(SETTLE_S).n_usable:
            self._bring_workers()
        return executor

    def _bring_workers(self) -> None:
        """Let this machine's own cluster serve this encoder, if it does not yet."""
        try:
            if ensure_workers(self._request, self._settings):
                logger.info("run %s: workers for %s start", self._run_id, self._request.model)
        except ClusterError as error:
            logger.warning("run %s: %s", self._run_id, error)

    def _be_patient(self) -> None:
        """Wait for workers, for so long and no longer."""
        assert self._workers is not None  # required, so it was opened
        reason, patience_s = self._workers.standing.reason, self._settings.require_wait_s
        if self._waits_since is None:
            self._waits_since = time.monotonic()
            logger.warning("run %s waits for workers: %s", self._run_id, reason)
        if time.monotonic() - self._waits_since > patience_s:
            raise ExecutorUnavailableError(
                f"no worker could take the work in {patience_s:g} s (TOOLKIT_REQUIRE_WAIT_S): "
                f"{reason}"
            )

    def _take(self, road: Executor, reason: str | None) -> Executor:
        before, self._now = self._now, road
        if before is not road:
            device = road.device if isinstance(road, LocalExecutor) else self._devices()
            self._on_move(before.road if before else None, road.road, device, reason)
        return road

    def _devices(self) -> str:
        return self._workers.devices if self._workers else ""


class _Loading:
    """The local road while its model is loaded, in a thread: the workers' answers go on."""

    def __init__(self, request: EncoderRequest, settings: Settings) -> None:
        self._context = warm_executor(request, settings)
        self._executor = self._context.__enter__()
        self._spec: EncoderSpec | None = None
        self._error: BaseException | None = None
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._load, name="load", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait for it."""
        self._is_done.wait(timeout_s)

    def result(self) -> tuple[LocalExecutor, EncoderSpec] | None:
        """What was loaded, ``None`` as long as it is not; raises what went wrong."""
        if not self._is_done.is_set():
            return None
        if self._error is not None:
            raise self._error
        assert self._spec is not None  # one of the two is set by then
        return self._executor, self._spec

    def close(self) -> None:
        """Give the executor back; one that still loads is stopped."""
        if not self._is_done.is_set():
            self._executor.close()
            self._thread.join()
        self._context.__exit__(None, None, None)

    def _load(self) -> None:
        try:
            self._spec = self._executor.start()
        except BaseException as error:
            self._error = error
        finally:
            self._is_done.set()
