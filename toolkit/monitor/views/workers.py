"""Who works, who waits, who is of no use and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd
import streamlit as st

from toolkit.cluster.registry import WorkerState
from toolkit.monitor.snapshot import Snapshot, WorkerRow
from toolkit.monitor.views.latest import latest
from toolkit.monitor.views.parts import part, plain, told
from toolkit.text import seconds_text

#: Seconds between two looks.
EVERY_S = 2.0

#: Workers in trouble whose reason is told on the first screen.
REASONS = 3

_COLOURS = {
    WorkerState.BUSY: "blue",
    WorkerState.READY: "green",
    WorkerState.STARTING: "gray",
    WorkerState.STALE: "orange",
    WorkerState.REFUSED: "red",
    WorkerState.DEAD: "red",
}


def summary(snapshot: Snapshot) -> None:
    """How many do what, and the first reasons of those that do nothing."""
    st.markdown(f"**Workers** {_badges(snapshot.n_workers)}")
    if not snapshot.server.ok:
        st.caption("The server does not answer, so nobody knows who is there.")
        return
    if "workers" in snapshot.problems:
        st.error(told(snapshot.problems["workers"]))
    if not snapshot.workers:
        st.caption("None is registered. Start some on this machine, or one on any other:")
        st.code("toolkit cluster up\ntoolkit worker", language="sh")
        return
    # A row has 35 pixels; beyond eight workers the table scrolls.
    height = 35 * min(len(snapshot.workers) + 1, 9) + 3
    frame = pd.DataFrame(map(_short, snapshot.workers))
    st.dataframe(
        frame,
        hide_index=True,
        height=height,
        key="workers_summary",
        placeholder="",
        column_config=_WIDTHS,
    )
    troubled = [row for row in snapshot.workers if row.reason and row.state in _TROUBLE]
    for row in troubled[:REASONS]:
        st.warning(f"**{plain(row.id)}**: {told(row.reason)}")
    if len(troubled) > REASONS:
        st.caption(f"and {len(troubled) - REASONS} more under Workers")


#: In pixels: left to itself, a column stays as wide as what it held first.
_WIDTHS = {
    "state": st.column_config.Column(width=60),
    "worker": st.column_config.Column(width=130),
    "doing": st.column_config.Column(width=150),
    "images/s": st.column_config.Column(width=68),
}

_TROUBLE = (WorkerState.STALE, WorkerState.REFUSED, WorkerState.DEAD, WorkerState.BUSY)


@part(EVERY_S)
def show() -> None:
    """Everything that every worker says."""
    snapshot = latest()
    if not snapshot.workers:
        st.info("No worker is registered." if snapshot.server.ok else "The server is out of reach.")
        return
    st.dataframe(
        pd.DataFrame(map(_long, snapshot.workers)),
        hide_index=True,
        key="workers",
        height="content",
        placeholder="",
        column_config={"why not": st.column_config.Column(width="large")},
    )
    n = sum(snapshot.n_workers.values())
    if n > len(snapshot.workers):
        st.caption(f"{len(snapshot.workers)} of {n}; `toolkit doctor` counts them all.")


def _badges(n_workers: Mapping[WorkerState, int]) -> str:
    found: Iterable[tuple[WorkerState, int]] = ((s, n_workers.get(s, 0)) for s in _COLOURS)
    return " ".join(f":{_COLOURS[s]}-badge[{n} {said(s)}]" for s, n in found if n)


def said(state: WorkerState) -> str:
    """A state in the words of the page."""
    return "idle" if state is WorkerState.READY else str(state)


def _short(row: WorkerRow) -> dict[str, object]:
    return {
        "state": said(row.state),
        "worker": row.id,
        "doing": _doing(row),
        "images/s": round(row.rate, 1) if row.rate else None,
    }


def _long(row: WorkerRow) -> dict[str, object]:
    return {
        "state": said(row.state),
        "worker": row.id,
        "doing": _doing(row),
        "why not": row.reason or "",
        "run": row.run if row.state is WorkerState.BUSY else "",
        "images/s": round(row.rate, 1) if row.rate else None,
        "images": row.images,
        "encoders": ", ".join(row.encoders),
        "device": row.device,
        "host": row.host,
        "pid": row.pid,
        "pool": row.pool,
        "last beat": f"{row.beat_age_s:.1f} s ago",
        "restarts": "yes" if row.is_supervised else "no",
    }


def _doing(row: WorkerRow) -> str:
    if row.state is WorkerState.DEAD:
        return f"silent for {seconds_text(row.beat_age_s)}"
    if row.state is WorkerState.BUSY:
        return f"batch {row.batch} for {seconds_text(row.busy_s)}"
    return ""
