"""The search graph of the next version, begun while its vectors are still being made.

Law: it runs at the lowest priority that the system knows for a thread, and a row waits for
nobody. Rows that it did not get to are added once all vectors are there, and whatever stops it
costs this head start and nothing else. In memory it holds the graph, which the last step of a
build holds anyway, and the image keys of its rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit.index.vector_index import VectorIndex
from toolkit.index.version import IndexVersion

logger = logging.getLogger(__name__)

#: Rows that wait to be added, at most: 20 MB of 1280-d vectors. More are left for later.
MAX_WAITING = 4096

# The least a thread can ask for. Where the system groups processes by session, it yields to
# those of its own alone; what it does is then not to do later.
_NICENESS = 19


class Begun(NamedTuple):
    """A graph to which more will be added.

    Attributes:
        graph: In memory.
        base: The version whose rows it holds under their numbers; ``None``: none's.
        numbers: Of the other rows, by image key; they follow those of ``base``.
    """

    graph: VectorIndex
    base: IndexVersion | None
    numbers: dict[bytes, int]


class GraphAhead:
    """Adds vectors to a graph behind the back of whoever makes them; a context manager.

    Args:
        dim: Components of a vector.
        dtype: Precision of the graph.
        threads: At most so many.
        base: The published version, open, if its graph is to grow; ``None`` begins a new one.
    """

    def __init__(self, dim: int, dtype: str, threads: int, base: IndexVersion | None) -> None:
        self._dim, self._dtype, self._threads, self._base = dim, dtype, threads, base
        self._waiting: queue.SimpleQueue[tuple[list[bytes], NDArray[np.float32]] | None]
        self._waiting = queue.SimpleQueue()
        # Each is counted by one thread alone.
        self._n_offered = self._n_seen = 0
        self._is_over = False
        self._begun: Begun | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GraphAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def __len__(self) -> int:
        """Rows that were added so far."""
        return len(self._begun.numbers) if self._begun else 0

    def offer(self, keys: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        """Give rows that were stored; returns at once.

        Args:
            keys: Their image keys.
            vectors: float32, shape ``(len(keys), dim)``; not to be changed afterwards.
        """
        if not keys:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="graph", daemon=True)
            self._thread.start()
        if self._n_offered - self._n_seen + len(keys) <= MAX_WAITING:
            self._n_offered += len(keys)
            self._waiting.put((list(keys), vectors))

    def take(self) -> Begun | None:
        """The graph with the rows that are in it by now; no more are added here."""
        self._stop()
        begun, self._begun = self._begun, None
        return begun

    def _stop(self) -> None:
        self._is_over = True
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    def _work(self) -> None:
        if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        # Broad: the build goes on without it, and meets again what matters to it.
        try:
            self._add_all()
        except Exception as error:
            self._begun = None
            logger.info("the search graph is not begun ahead: %s", error)

    def _add_all(self) -> None:
        base, numbers = self._base, dict[bytes, int]()
        if base is None:
            graph, n_held = VectorIndex.create(self._dim, self._dtype), 0
        else:
            base.verify()
            if self._is_over:
                return
            graph, n_held = VectorIndex.open(base.graph_path, view=False), base.n
        self._begun = Begun(graph, base, numbers)
        while (some := self._waiting.get()) is not None and not self._is_over:
            keys, vectors = some
            fresh = {key: row for row, key in enumerate(keys) if key not in numbers}
            first = n_held + len(numbers)
            rows = vectors[list(fresh.values())]
            graph.add(np.arange(first, first + len(rows)), rows, self._threads)
            numbers.update({key: first + n for n, key in enumerate(fresh)})
            self._n_seen += len(keys)
