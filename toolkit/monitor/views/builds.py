"""Builds: how far the live ones are, how the others ended, and what can be done with one."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime

import pandas as pd
import streamlit as st

from toolkit import display
from toolkit.monitor.snapshot import SILENT_S, RunRow, Snapshot
from toolkit.monitor.views import actions, failures
from toolkit.monitor.views.latest import latest
from toolkit.monitor.views.parts import part, plain, told
from toolkit.run_record import RunRecord, RunState
from toolkit.text import one_line, seconds_text

#: Seconds between two looks.
EVERY_S = 3.0

#: Moves of a run that are shown, the newest first.
MOVES = 10

#: Builds in trouble that the first screen tells of, and for how many seconds after their end.
TROUBLES, TROUBLED_S = 3, 3600.0


def card(row: RunRow) -> None:
    """A live build: how far, how fast, how long still, by which road, what failed."""
    record = row.record
    with st.container(border=True, key=f"card_{record.run_id}", gap="xsmall"):
        head, action = st.columns([4, 1], vertical_alignment="center")
        head.markdown(f"**{plain(record.index)}**")
        with action:
            actions.cancel(row, "card")
        st.progress(_share(row), text=plain(display.progress_text(row.progress)))
        lines = [display.roads_text(record)] if any(record.batches.values()) else []
        lines += [_last_move(record)] if record.moves else []
        if row.silent_s > SILENT_S:
            st.warning(f"Nothing new for {plain(seconds_text(row.silent_s))}.")
        st.caption("  \n".join([*map(told, lines), _where(row, record.run_id)]))
        _failed(row, "card")


def none_live(snapshot: Snapshot) -> None:
    """That nothing is being built, and how the last build ended."""
    with st.container(border=True):
        if not snapshot.runs:
            st.markdown("**No build yet.** Start one above, or type:")
            st.code("toolkit build FOLDER", language="sh")
            return
        record = snapshot.runs[0].record
        st.markdown(f"**No build is running.** Started last: {_title(record)}")
        st.caption(plain(display.books_text(record)))
        if record.error and not _is_troubled(snapshot.runs[0], snapshot):
            st.error(told(record.error))
        _failed(snapshot.runs[0], "last")


def troubles(snapshot: Snapshot) -> None:
    """Builds that ended badly of late, and were not made good by a later one."""
    troubled = [row for row in snapshot.runs if _is_troubled(row, snapshot)]
    for row in troubled[:TROUBLES]:
        record = row.record
        st.error(f"{_title(record)} {told(record.error or '')}")
        if record.state is RunState.HELD:
            actions.release(row, "trouble")
    if len(troubled) > TROUBLES:
        st.caption(f"and {len(troubled) - TROUBLES} more under Builds")


def _is_troubled(row: RunRow, snapshot: Snapshot) -> bool:
    record = row.record
    is_late = time.time() - (record.ended or record.updated) < TROUBLED_S
    is_bad = record.state in (RunState.FAILED, RunState.HELD, RunState.INTERRUPTED)
    return is_bad and is_late and _is_newest(row, snapshot)


def _is_newest(row: RunRow, snapshot: Snapshot) -> bool:
    """Whether no later build of the same index is known."""
    index, run_id = row.record.index, row.record.run_id
    return all(r.record.run_id <= run_id for r in snapshot.runs if r.record.index == index)


def _failed(row: RunRow, place: str) -> None:
    """How many failed; the button leads to which and why."""
    record = row.record
    if record.accounting.failed and st.button(
        f"{record.accounting.failed:,} failed: which and why",
        key=f"failed_{place}_{record.run_id}",
        icon=":material/error:",
        on_click=_lead_to,
        args=(record.run_id,),
    ):
        st.rerun()  # the tabs are in another part of the page


def _lead_to(run_id: str) -> None:
    st.session_state["build"] = run_id
    st.session_state["tab"] = "Builds"


@part(EVERY_S)
def show() -> None:
    """The table of all builds, and one of them in full."""
    snapshot = latest()
    rows = snapshot.runs
    if not rows:
        st.info("No build has been made yet, on this machine or with this server.")
        return
    st.dataframe(
        pd.DataFrame(map(_line, rows)),
        hide_index=True,
        key="builds",
        placeholder="",
        height=min(len(rows) + 1, 11) * 35 + 3,
        column_config={
            "progress": st.column_config.ProgressColumn(
                format="%d%%", min_value=0, max_value=100, width="small"
            ),
            "left": st.column_config.Column(width=80),
            "why": st.column_config.Column(width="large"),
            "started": st.column_config.DatetimeColumn(format="distance"),
        },
    )
    if snapshot.n_runs > len(rows):
        st.caption(f"the newest {len(rows)} of {snapshot.n_runs}; `toolkit runs` lists all")
    by_id = {row.record.run_id: row for row in rows}
    run_id = st.selectbox(
        "One build", list(by_id), key="build", format_func=lambda r: _label(by_id.get(r), r)
    )
    if run_id in by_id:
        _in_full(by_id[run_id], snapshot)


def _in_full(row: RunRow, snapshot: Snapshot) -> None:
    record = row.record
    if record.state.is_live:
        st.progress(_share(row), text=plain(display.progress_text(row.progress)))
    st.markdown(f"{_title(record)} {_where(row)}")
    if record.error:
        st.error(told(record.error))
    lines = [display.books_text(record), display.roads_text(record)]
    lines += [_move_text(move) for move in reversed(record.moves[-MOVES:])]
    st.caption("  \n".join(map(told, lines)))
    with st.container(horizontal=True):
        if record.state.is_live:
            actions.cancel(row, "full")
        if record.state is RunState.HELD and _is_newest(row, snapshot):
            actions.release(row, "full")
    if not row.is_here:
        st.caption(plain(f"What failed and the log are on {record.host}."))
        return
    failures.show(record.run_id)


def _line(row: RunRow) -> dict[str, object]:
    record, at = row.record, row.progress
    is_live = record.state.is_live
    return {
        "state": str(record.state),
        "index": one_line(record.index),
        "progress": round(100 * _share(row)) if is_live else None,
        "stage": at.stage,
        "images/s": round(at.rate, 1) if is_live and at.rate else None,
        "left": seconds_text(at.eta_s) if is_live and at.eta_s is not None else "",
        **{
            name: getattr(record.accounting, name)
            for name in ("found", "indexed", "duplicates", "failed", "excluded")
        },
        "by workers": record.batches.get("workers", 0),
        "local": record.batches.get("local", 0),
        "moves": len(record.moves),
        "took": seconds_text(max(0.0, record.seconds)),
        "started": datetime.fromtimestamp(record.started, UTC),
        "why": one_line(record.error or record.fallback_reason or ""),
        "host": record.host,
        "run": record.run_id,
    }


def _share(row: RunRow) -> float:
    at = row.progress
    return max(0.0, min(1.0, at.done / at.total)) if at.total > 0 else 0.0


def _label(row: RunRow | None, run_id: str) -> str:
    return f"{one_line(row.record.index)} · {row.record.state} · {run_id}" if row else run_id


_COLOURS = {
    RunState.DONE: "green",
    RunState.HELD: "orange",
    RunState.FAILED: "red",
    RunState.INTERRUPTED: "red",
}


def _title(record: RunRecord) -> str:
    colour = _COLOURS.get(record.state, "blue" if record.state.is_live else "gray")
    took = plain(seconds_text(max(0.0, record.seconds)))
    return f"**{plain(record.index)}** :{colour}-badge[{record.state}] {took}"


def _where(row: RunRow, *more: str) -> str:
    place = "" if row.is_here else f"on {row.record.host}"
    parts = [row.record.encoder, row.record.device, place, *more]
    return plain(" · ".join(part for part in parts if part))


def _last_move(record: RunRecord) -> str:
    return _move_text(record.moves[-1])


def _move_text(move: dict[str, object]) -> str:
    with contextlib.suppress(LookupError, TypeError, ValueError):
        ago = seconds_text(max(0.0, time.time() - float(str(move["at"]))))
        return f"{ago} ago: {display.move_text(move)}"
    return "it moved, in words of another release"
