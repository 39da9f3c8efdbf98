"""The first screen: is it working, how far, how long still, what failed, who is working."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from toolkit import config
from toolkit.cluster.registry import WorkerState
from toolkit.health import Check, Status
from toolkit.monitor.history import Sample
from toolkit.monitor.snapshot import Snapshot
from toolkit.monitor.views import builds, workers
from toolkit.monitor.views.latest import latest, samples
from toolkit.monitor.views.parts import part, plain, told

#: Seconds between two looks.
EVERY_S = 1.0

#: Live builds that have a card of their own; the others are in the table of builds.
CARDS = 4

#: Samples in a sparkline: ten minutes.
SPARK = 120

#: What a verdict says of a build that names no model.
_MEANINGS = {
    "distributed": "Working: a build with {model} uses the workers.",
    "local": "Working, but a build with {model} would use this machine alone.",
    "broken": "Not working: a build with {model} would fail.",
}


@part(EVERY_S)
def show() -> None:
    """All of it, from one look."""
    snapshot = latest()
    # A place of its own for each: what grows in one takes no other one along.
    with st.container():
        _verdict(snapshot)
    with st.container(key="figures"):
        _figures(snapshot, samples()[-SPARK:])
    left, right = st.columns([3, 2])
    with left:
        _builds(snapshot)
    with right:
        workers.summary(snapshot)


def _verdict(snapshot: Snapshot) -> None:
    health = snapshot.health
    checks = [check for check in health.checks if check.status in (Status.FAIL, Status.WARN)]
    failed = [check for check in checks if check.status is Status.FAIL]
    if health.verdict is None:
        st.info("Looking at the server, the workers and this machine …")
        return
    reason = f" {told(health.reason)}" if health.reason else ""
    box = {"distributed": st.success, "local": st.warning}.get(health.verdict, st.error)
    meaning = _MEANINGS[health.verdict].format(model=plain(config.resolve().model))
    box(f"**{meaning}**{reason}")
    for check in failed:
        # The first one's detail is the reason above.
        _cure(check, with_detail=check.detail != health.reason)
    remarks = [check for check in checks if check not in failed]
    if remarks:
        with st.expander(f"{len(remarks)} more to mend when there is time"):
            for check in remarks:
                _cure(check, with_detail=True)


def _cure(check: Check, *, with_detail: bool) -> None:
    if with_detail:
        st.markdown(f"**{plain(check.name)}**: {told(check.detail)}")
    if check.cure:
        st.code(check.cure, language="sh")


def _figures(snapshot: Snapshot, past: Sequence[Sample]) -> None:
    is_up, n_workers = snapshot.server.ok, snapshot.n_workers
    n_alive = sum(n_workers.values()) - n_workers.get(WorkerState.DEAD, 0)
    is_counted = is_up and "queues" not in snapshot.problems
    busy = (
        f"{n_workers.get(WorkerState.BUSY, 0)} of {n_alive}"
        if is_up and "workers" not in snapshot.problems
        else "?"
    )
    figures: dict[str, tuple[str | int, list[float | None]]] = {
        "Batches waiting": (snapshot.ready if is_counted else "?", [s.ready for s in past]),
        "Held by workers": (snapshot.unacked if is_counted else "?", [s.unacked for s in past]),
        "Workers busy": (busy, [s.busy for s in past]),
        "Images/s": (f"{snapshot.rate:.1f}", [s.rate for s in past]),
    }
    columns = st.columns(len(figures))
    for place, (name, (value, points)) in zip(columns, figures.items(), strict=True):
        known = [n for n in points if n is not None]
        line = known if len(known) > 1 and any(known) else None
        place.metric(name, value, chart_data=line, border=True, height="stretch")


def _builds(snapshot: Snapshot) -> None:
    live = snapshot.live
    for row in live[:CARDS]:
        builds.card(row)
    if snapshot.n_live > CARDS:
        st.caption(f"and {snapshot.n_live - CARDS} more under Builds")
    if not live:
        builds.none_live(snapshot)
    builds.troubles(snapshot)
    if "runs" in snapshot.problems:
        st.error(told(snapshot.problems["runs"]))
