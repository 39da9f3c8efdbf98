"""What failed of a build: pictures where there is one to see, reasons, and all of it as CSV."""

from __future__ import annotations

import os

import pandas as pd
import streamlit as st

from toolkit import config, display
from toolkit.errors import ImageError, RunNotFoundError
from toolkit.journal import find_run
from toolkit.monitor.views.parts import plain
from toolkit.places import runs_dir
from toolkit.records import FailureKind

#: Failures in the table, and those of them with a picture.
ROWS, PICTURES = 500, 30

#: Pixels of a picture that the page decodes by itself: 100 MB of memory at most.
PICTURE_PIXELS = 25_000_000

_COLUMNS = ["path", "kind", "reason", "dataset"]


def show(run_id: str) -> None:
    """The table of failures of a run on this machine."""
    try:
        folder = find_run(runs_dir(config.resolve().data_dir), run_id).folder
        stat = (folder / "failures.jsonl").stat()
    except (RunNotFoundError, FileNotFoundError):
        return
    rows = _rows(run_id, stat.st_mtime_ns)
    if not rows:
        st.caption("Nothing failed.")
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"**{len(rows):,} failed**")
        st.download_button(
            "All failures as CSV",
            lambda: _csv(rows),
            file_name=f"failures-{run_id}.csv",
            mime="text/csv",
            key=f"csv_{run_id}",
            on_click="ignore",
        )
    shown = pd.DataFrame(rows[:ROWS], columns=_COLUMNS)
    pictures = [_picture(row["path"], row["kind"]) for row in rows[:PICTURES]]
    if any(pictures):
        shown.insert(0, "picture", pd.Series(pictures, dtype=object))
    st.dataframe(
        shown,
        hide_index=True,
        key=f"failures_{run_id}",
        placeholder="",
        column_config={
            "picture": st.column_config.ImageColumn(width="small"),
            "path": st.column_config.Column(width="medium"),
            "reason": st.column_config.Column(width="large"),
        },
    )
    if len(rows) > ROWS:
        st.caption(plain(f"the first {ROWS} of {len(rows):,}; the CSV holds all"))


@st.cache_data(max_entries=8, show_spinner=False)
def _rows(run_id: str, mtime_ns: int) -> list[dict[str, str]]:
    """Failures of a run, read again when the file has changed."""
    view = find_run(runs_dir(config.resolve().data_dir), run_id)
    return [{c: str(row.get(c, "")) for c in _COLUMNS} for row in view.failures()]


def _csv(rows: list[dict[str, str]]) -> str:
    return pd.DataFrame(rows, columns=_COLUMNS).to_csv(index=False)


@st.cache_data(max_entries=500, ttl=600, show_spinner=False)
def _picture(path: str, kind: str) -> str | None:
    """A picture that another look can decode, if it is small and has killed no process."""
    if kind == FailureKind.CRASH:
        return None
    most = min(PICTURE_PIXELS, config.resolve().max_pixels)
    try:
        return display.thumbnail_url(os.fsencode(path), max_pixels=most)
    except (ImageError, ValueError):
        return None
