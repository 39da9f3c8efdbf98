"""What Prometheus reads: a snapshot as its text format, and totals that only ever grow."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from toolkit.cluster.registry import WorkerState
from toolkit.monitor.snapshot import RunRow, Snapshot

#: What the answer is, as Prometheus asks for it.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: The roads, so that a total is there before the first batch takes one.
_ROADS = ("workers", "local")

Labels = Mapping[str, str]
Lines = Iterable[tuple[Labels, float]]


class Totals:
    """What all runs did together since this monitor started, at 0 as counters do.

    Runs are forgotten after a while, and a sum over those that are known would shrink then.
    So what each run has added is counted as it is seen; of a run that is older than the
    monitor, what it adds from its first sight on.
    """

    def __init__(self) -> None:
        self._begun = time.time()
        self._known: set[str] = set()
        self._seen: dict[tuple[str, str, str], float] = {}
        self._totals: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._lock = threading.Lock()

    def update(self, rows: Iterable[RunRow]) -> Mapping[tuple[str, str], float]:
        """Count what is new; (what, road) → how much."""
        with self._lock:
            for row in rows:
                run_id = row.record.run_id
                counts = run_id in self._known or row.record.started >= self._begun
                self._known.add(run_id)
                for (what, road), n in row.totals().items():
                    before = self._seen.get((run_id, what, road), 0.0)
                    self._totals[what, road] += max(0.0, n - before) if counts else 0.0
                    self._seen[run_id, what, road] = max(n, before)
            return dict(self._totals)


#: The totals of this process.
TOTALS = Totals()


def render(snapshot: Snapshot, totals: Totals = TOTALS) -> str:
    """A snapshot in Prometheus' text format."""
    sums = totals.update(snapshot.all_runs)
    text = _metric(
        "server_up", "gauge", "Whether the Redis server answers.", [({}, snapshot.server.ok)]
    )
    if snapshot.server.ok:
        text += _of_server(snapshot)
    if not snapshot.problems.keys() & {"mirror", "runs"}:
        meaning = "Builds that are being driven."
        text += _metric("runs_live", "gauge", meaning, [({}, snapshot.n_live)])
    text += _metric(
        "images_embedded_total",
        "counter",
        "Images that became a vector, by road.",
        [({"road": road}, sums.get(("images", road), 0)) for road in _ROADS],
    )
    text += _metric(
        "images_failed_total",
        "counter",
        "Files for which a build found no vector, those known to fail included.",
        [({}, sums.get(("failed", ""), 0))],
    )
    # A summary without quantiles is its sum and its count.
    name = "batch_seconds"
    text += _head(name, "summary", "Wall seconds of a road for a batch, side by side as they run.")
    for road in _ROADS:
        text += _line(f"{name}_sum", {"road": road}, sums.get(("seconds", road), 0))
        text += _line(f"{name}_count", {"road": road}, sums.get(("batches", road), 0))
    return text


def _of_server(snapshot: Snapshot) -> str:
    """What the server says; of what could not be looked at nothing is said, least of all 0."""
    text = ""
    if "queues" not in snapshot.problems:
        ready = [({"queue": row.queue}, row.ready) for row in snapshot.queues]
        unacked = [({"queue": row.queue}, row.unacked) for row in snapshot.queues]
        text += _metric("queue_ready", "gauge", "Batches that wait for a worker.", ready)
        text += _metric("queue_unacked", "gauge", "Batches that workers hold.", unacked)
    if "workers" not in snapshot.problems:
        workers = [({"state": s.value}, snapshot.n_workers.get(s, 0)) for s in WorkerState]
        meaning = "Registered workers, those that died lately too."
        text += _metric("workers", "gauge", meaning, workers)
    return text


def _metric(name: str, kind: str, meaning: str, lines: Lines) -> str:
    rows = (_line(name, labels, value) for labels, value in lines)
    return _head(name, kind, meaning) + "".join(rows)


def _head(name: str, kind: str, meaning: str) -> str:
    return f"# HELP toolkit_{name} {meaning}\n# TYPE toolkit_{name} {kind}\n"


def _line(name: str, labels: Labels, value: float) -> str:
    pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    shown = f"{{{pairs}}}" if pairs else ""
    return f"toolkit_{name}{shown} {float(value):.15g}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
