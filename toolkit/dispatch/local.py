"""The local road: one supervised child process, kept warm between builds and queries.

Law: a crash or a hang of the child costs what it had in flight, never this process. The
child is started anew on the next batch.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from toolkit import errors
from toolkit.config import Settings
from toolkit.dispatch.base import Event, Finished, Lost
from toolkit.dispatch.wire import read_frame, write_frame
from toolkit.embedding.exports import MOST_CRASHES, is_installed
from toolkit.embedding.spec import EncoderRequest, EncoderSpec
from toolkit.embedding.weights import find_weights
from toolkit.errors import (
    ExecutorDiedError,
    ExecutorStalledError,
    ExecutorUnavailableError,
    RoadError,
    ToolkitError,
)
from toolkit.faults import point
from toolkit.records import Batch, Outcome

if sys.platform == "linux":
    import fcntl

logger = logging.getLogger(__name__)

#: Seconds a model may take to load: weights may come over a slow line.
LOAD_TIMEOUT_S = 900.0

#: File bytes above which a batch is cut. Files are read by path here, so only the share of
#: the work that one death repeats counts.
BATCH_BYTES = 64 << 20

#: Room in the pipe to a child, on Linux: 8 MiB of pictures pass in 2 ms instead of 10.
PIPE_BYTES = 1 << 20

#: Seconds without a question after which a child ends by itself: it holds a model in memory.
IDLE_EXIT_S = 600.0

#: Set in the environment of every child.
_IN_CHILD = "TOOLKIT_IN_CHILD"

#: How a process ends by a fault of its own code. A kill from outside, for want of memory or by
#: hand, says nothing about what it ran. The numbers are those of Windows: access violation,
#: illegal instruction.
_CRASHES = {
    -getattr(signal, name, 0) for name in ("SIGSEGV", "SIGILL", "SIGABRT", "SIGBUS", "SIGFPE")
} - {0} | {0xC0000005, 0xC000001D}

_Frame = tuple[dict[str, Any], list[bytes]] | None


class LocalExecutor:
    """Runs batches in a child process of this one.

    Args:
        request: The encoder the child loads.
        settings: ``data_dir``, ``device``, ``threads``, ``max_pixels`` and ``stall_s``.
        idle_exit_s: Seconds without a batch after which the child ends; ``None``: never.
    """

    road = "local"
    is_shared = True
    #: One batch is computed while the next one is decoded.
    window = 2
    n_processes = 1
    batch_bytes = BATCH_BYTES

    def __init__(
        self,
        request: EncoderRequest,
        settings: Settings,
        *,
        idle_exit_s: float | None = IDLE_EXIT_S,
    ) -> None:
        self._request, self._settings = request, settings
        self._idle_exit_s = idle_exit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: queue.SimpleQueue[_Frame] = queue.SimpleQueue()
        self._in_flight: dict[int, Batch] = {}
        self._begun: set[int] = set()
        self._unacknowledged = 0
        #: Items that were decoded, or failed, since nothing was in flight.
        self.n_done = 0
        self._last_sign = time.monotonic()
        self._spec: EncoderSpec | None = None
        self.device = self.engine = ""
        #: What the child makes of the golden pictures, float32 of shape ``(n, dim)``.
        self.golden = np.empty((0, 0), np.float32)

    @property
    def log_path(self) -> Path:
        """Where the child's messages and crash dumps go."""
        return self._settings.data_dir / "logs" / "embedder.log"

    @property
    def pid(self) -> int | None:
        """Process id of the child, ``None`` while there is none."""
        return self._process.pid if self._process else None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._in_flight

    def start(self) -> EncoderSpec:
        """Start the child if need be and wait until its model is loaded.

        A child that crashes while OpenVINO may be at work in it is started again, at last without
        it: torch runs the model then, here and in later processes.

        Raises:
            ModelError: If the model cannot be made; the child's own words.
            ExecutorUnavailableError: If the child dies or hangs before it is ready.
        """
        if self._process is not None and self._process.poll() is None and self._spec:
            return self._spec
        crashes: list[str] = []
        while (frame := self._load(crashes)) is None:
            how = self._how_it_ended()
            if not self._may_spare_an_engine() or len(crashes) == MOST_CRASHES:
                raise ExecutorUnavailableError(
                    f"the embedding process ended while it loaded {self._request.model} "
                    f"({how}); see {self.log_path}"
                )
            crashes.append(how)
            if len(crashes) == MOST_CRASHES:
                logger.warning(
                    "the embedding process was %s each time it loaded %s; torch runs it now "
                    "instead of OpenVINO; see %s",
                    how,
                    self._request.model,
                    self.log_path,
                )
        if frame[0]["type"] == "error":
            self._kill()
            raise _rebuilt(frame[0])
        self._spec = EncoderSpec.from_json(frame[0]["spec"])
        self.device, self.engine = frame[0]["device"], frame[0]["engine"]
        self.golden = np.frombuffer(frame[1][0], "<f4").reshape(-1, self._spec.dim)
        return self._spec

    def _load(self, crashes: Sequence[str]) -> _Frame:
        """The first answer of a new child; ``None`` if it ended before."""
        self._kill()
        self._spawn(crashes)
        try:
            return self._frames.get(timeout=LOAD_TIMEOUT_S)
        except queue.Empty:
            self._kill()
            raise ExecutorUnavailableError(
                f"the model {self._request.model} was not loaded within {LOAD_TIMEOUT_S:.0f} s; "
                f"see {self.log_path}"
            ) from None

    def _may_spare_an_engine(self) -> bool:
        """Whether a child that ended crashed, and need not run what it crashed over."""
        # Taken once: another thread may close us.
        process = self._process
        has_crashed = process is not None and process.poll() in _CRASHES
        return has_crashed and self._settings.engine != "torch" and is_installed()

    def submit(
        self,
        batch: Batch,
        blobs: Mapping[int, bytes] | None = None,
        *,
        max_pixels: int | None = None,
    ) -> None:
        """Take a batch.

        Args:
            batch: What to embed.
            blobs: The bytes of items that have no file here.
            max_pixels: The limit of whoever asks, when it is another than in the settings.

        Raises:
            ExecutorUnavailableError: If no child can be had.
        """
        blobs = blobs or {}
        self.start()
        if not self._in_flight:
            self._last_sign, self.n_done = time.monotonic(), 0
        self._in_flight[batch.id] = batch
        head = {
            "type": "batch",
            "batch": batch.to_json(),
            "blob_ids": list(blobs),
            "max_pixels": max_pixels or self._settings.max_pixels,
        }
        self._ask(head, list(blobs.values()))

    def events(self, timeout_s: float) -> list[Event]:
        """See :class:`toolkit.dispatch.base.Executor`."""
        while self._unacknowledged:
            self._unacknowledged -= 1
            self._ask({"type": "stored"})
        deadline = time.monotonic() + timeout_s
        while self._in_flight:
            stalls = self._last_sign + self._settings.stall_s
            now = time.monotonic()
            if now >= stalls:
                return [
                    *self._lose(
                        ExecutorStalledError(f"no progress for {self._settings.stall_s:g} s")
                    )
                ]
            try:
                frame = self._frames.get(timeout=max(0.0, min(deadline, stalls) - now))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    return []
                continue
            event = self._take(frame)
            if event:
                return event
        return []

    def give_up(self, error: RoadError) -> list[Lost]:
        """Stop the child over what it has in flight, which is lost for the reason given."""
        return self._lose(error)

    def close(self) -> None:
        """Stop the child; batches in flight are dropped."""
        self._kill()
        self._in_flight.clear()
        self._begun.clear()

    def embed(self, items: Batch, blobs: Mapping[int, bytes]) -> Outcome:
        """Run one batch alone, for a query: wait for it and give its outcome.

        Raises:
            RoadError: If the child died or hung over it.
        """
        self.submit(items, blobs)
        while True:
            for event in self.events(timeout_s=1.0):
                if isinstance(event, Lost):
                    raise event.error
                return event.outcome

    def _take(self, frame: _Frame) -> list[Event]:
        self._last_sign = time.monotonic()
        if frame is None:
            return [*self._lose(ExecutorDiedError(self._how_it_ended()))]
        head, blobs = frame
        if head["type"] == "stamp":
            if head["stage"] == "start":
                self._begun.add(head["item"])
            elif head["stage"] == "done":
                self._begun.discard(head["item"])
                self.n_done += 1
                point("after-decode")
            return []
        outcome = Outcome.from_json(head, blobs[0])
        self._in_flight.pop(outcome.batch_id, None)
        self._unacknowledged += 1
        return [Finished(outcome)]

    def _lose(self, error: RoadError) -> list[Lost]:
        self._kill()
        lost = [
            Lost(batch.id, frozenset(i.id for i in batch.items if i.id in self._begun), error)
            for batch in self._in_flight.values()
        ]
        self._in_flight.clear()
        self._begun.clear()
        return lost

    def _spawn(self, crashes: Sequence[str]) -> None:
        if _IN_CHILD in os.environ:
            # Something that a child imports called us: each child would start another one.
            raise ExecutorUnavailableError(
                "an embedding process was asked to start another one: a module that is imported at "
                "every start of Python runs a build or a query; put that under "
                "`if __name__ == '__main__':`"
            )
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                # -P: a file h2.py beside a notebook must not be taken for a library's module.
                [sys.executable, "-P", "-m", "toolkit.dispatch.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, _IN_CHILD: "1"},
                # A notebook's Interrupt goes to its whole process group.
                start_new_session=True,
            )
        assert self._process.stdin is not None  # both were asked for above
        assert self._process.stdout is not None
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a user may have just so many large pipes
                fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._frames = queue.SimpleQueue()
        threading.Thread(
            target=_pump, args=(self._process.stdout, self._frames), daemon=True
        ).start()
        engine = self._settings.engine
        self._ask(
            {
                "type": "load",
                "request": self._request.to_json(),
                "data_dir": str(self._settings.data_dir),
                "device": self._settings.device,
                "engine_dir": None if engine == "torch" else str(self._settings.engine_dir),
                "threads": self._settings.threads,
                "batch_size": self._settings.batch_size,
                "crashes": list(crashes),
                "max_pixels": self._settings.max_pixels,
                "idle_exit_s": self._idle_exit_s,
            }
        )

    def _ask(self, head: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        if self._process is None or self._process.stdin is None:
            return
        # A child that just died is found out by the end of its answers, in one place.
        with contextlib.suppress(OSError):
            write_frame(self._process.stdin, head, blobs)

    def _how_it_ended(self) -> str:
        if self._process is None:
            return "it is gone"
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"ended with code {code}"

    def _kill(self) -> None:
        process, self._process = self._process, None
        self._unacknowledged = 0
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if os.name == "nt":
                process.kill()
            else:
                # Its own session: whatever it started goes with it.
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _pump(answers: IO[bytes], frames: queue.SimpleQueue[_Frame]) -> None:
    """Move frames from a child's pipe to a queue; ``None`` at its end."""
    with contextlib.suppress(OSError, ValueError):
        while (frame := read_frame(answers)) is not None:
            frames.put(frame)
    frames.put(None)


def _rebuilt(head: dict[str, Any]) -> ToolkitError:
    """The error that a child met, as the class it was."""
    kind = getattr(errors, head["class"], None)
    if isinstance(kind, type) and issubclass(kind, ToolkitError):
        return kind(*head["args"])
    return ExecutorUnavailableError(f"{head['class']}: {head['args']}")


#: Settings that a child is made with, or watched by.
_CHILD_SETTINGS = (
    "data_dir",
    "device",
    "engine",
    "engine_dir",
    "threads",
    "batch_size",
    "max_pixels",
    "stall_s",
)

_warm: dict[tuple[object, ...], LocalExecutor] = {}
_warm_lock = threading.Lock()


@contextlib.contextmanager
def warm_executor(request: EncoderRequest, settings: Settings) -> Iterator[LocalExecutor]:
    """Borrow this process's child for an encoder; it stays warm for the next borrower.

    One child is kept: a model in memory is large. Whoever comes while it is lent gets another
    one, for as long as that takes. A child that is left with batches in flight is stopped, so
    that no borrower meets another's answers.
    """
    weights = find_weights(request, settings.data_dir)
    key = (
        request,
        # Weights that were replaced are another encoder's.
        str(weights and weights.identity),
        *(getattr(settings, name) for name in _CHILD_SETTINGS),
    )
    with _warm_lock:
        executor = _warm.pop(key, None)
        _close_all()
    if executor is None:
        executor = LocalExecutor(request, settings)
    try:
        yield executor
    finally:
        with _warm_lock:
            if executor.is_idle and not _warm:
                _warm[key] = executor
            else:
                executor.close()


@atexit.register
def close_warm() -> None:
    """Stop the child that is kept warm."""
    with _warm_lock:
        _close_all()


def _close_all() -> None:
    while _warm:
        _warm.popitem()[1].close()
