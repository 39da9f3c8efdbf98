"""What waits and what is held: now, over the last hour, and how dead runs are cleared away."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from toolkit import config
from toolkit.cluster.overview import purge
from toolkit.monitor.history import Sample
from toolkit.monitor.views.latest import latest, samples
from toolkit.monitor.views.parts import part, told
from toolkit.monitor.views.rights import may_act

#: Seconds between two looks: as often as samples are taken.
EVERY_S = 5.0

#: Batches up to which the chart's scale reaches at least.
LEAST_SCALE = 4


@part(EVERY_S)
def show() -> None:
    """The chart, the table and the broom."""
    snapshot, past = latest(), samples()
    if len(past) > 1:
        st.altair_chart(_chart(past), height=240)
    else:
        st.caption("The chart of the last hour begins with the second sample, 5 s apart.")
    if not snapshot.server.ok:
        st.error(told(snapshot.server.reason))
        return
    if "queues" in snapshot.problems:
        st.error(told(snapshot.problems["queues"]))
    rows = [dataclasses.asdict(row) for row in snapshot.queues]
    if rows:
        frame = pd.DataFrame(rows).rename(
            columns={"ready": "waiting", "unacked": "held by workers"}
        )
        st.dataframe(frame, hide_index=True, key="queues")
    else:
        st.caption("No queue holds anything and no worker consumes one.")
    st.code("toolkit queue show", language="sh")
    _broom()


def _chart(past: Sequence[Sample]) -> alt.Chart:
    """What waited and what was held; a time without a server is a gap."""
    points: list[dict[str, Any]] = [
        {"time": datetime.fromtimestamp(sample.at, UTC), "what": what, "batches": n}
        for sample in past
        for what, n in (("waiting", sample.ready), ("held by workers", sample.unacked))
    ]
    most = max((point["batches"] or 0 for point in points), default=0)
    whole = alt.Axis(format="d", tickMinStep=1, title=None)
    clock = alt.Axis(format="%H:%M:%S", title=None, tickCount=6)
    chart: alt.Chart = (
        alt.Chart(pd.DataFrame(points))
        .mark_line()
        .encode(
            x=alt.X("time:T", axis=clock),
            # A line that stays at 0 would have no scale of its own.
            y=alt.Y("batches:Q", axis=whole, scale=alt.Scale(domain=[0, max(most, LEAST_SCALE)])),
            color=alt.Color("what:N", legend=alt.Legend(title=None, orient="bottom")),
        )
    )
    return chart


def _broom() -> None:
    with st.popover("Purge dead runs…", icon=":material/cleaning_services:", key="purge"):
        st.markdown(
            "Removes the batches and keys of runs whose client is gone. "
            "Nothing of a live run is touched."
        )
        if may_act("purge") and st.button("Purge", type="primary", key="purge_now"):
            removed = purge(config.resolve())
            n = sum(int(row["messages"]) for row in removed)
            # Above the page: what is written here goes with the next look.
            st.toast(f"{n} batches of {len(removed)} dead runs were removed")
