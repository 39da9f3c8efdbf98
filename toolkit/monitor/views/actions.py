"""What can be done with a build, each asked for twice: by a button, and by one under it."""

from __future__ import annotations

import streamlit as st

from toolkit import config, driver
from toolkit.monitor import orders
from toolkit.monitor.snapshot import RunRow
from toolkit.monitor.views.parts import plain
from toolkit.monitor.views.rights import may_act


def cancel(row: RunRow, place: str) -> None:
    """Stop a live one."""
    run_id = row.record.run_id
    with st.popover("Cancel…", key=f"cancel_{place}_{run_id}"):
        st.markdown("What is embedded by now is kept; the published index stays as it is.")
        if may_act(f"cancel_{place}_{run_id}") and st.button(
            "Stop this build", type="primary", key=f"stop_{place}_{run_id}"
        ):
            orders.cancel(run_id, {}, config.resolve())
            st.toast("it will stop after the batch in hand")


def release(row: RunRow, place: str) -> None:
    """Publish one that the guard held."""
    record = row.record
    removed, failing = record.losses or (0, 0)
    with st.popover("Publish all the same…", key=f"release_{place}_{record.run_id}"):
        st.markdown(
            f"It builds again and accepts that **{removed:,}** images leave the index and "
            f"**{failing:,}** files newly fail. No file of yours is touched."
        )
        if not row.is_here:
            st.info(plain(f"It can be released on {record.host} only."))
        elif may_act(f"release_{place}_{record.run_id}") and st.button(
            "Publish", type="primary", key=f"publish_{place}_{record.run_id}"
        ):
            with st.spinner("starting"):
                started = driver.find(record.run_id, config.resolve()).publish(wait=False)
            st.toast(plain(f"started run {started.run_id}"))
