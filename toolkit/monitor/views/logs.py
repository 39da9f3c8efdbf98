"""The end of a log: of a build, a worker, the server, or Flower."""

from __future__ import annotations

import os
from pathlib import Path

import streamlit as st

from toolkit import config
from toolkit.log_files import log_path, logs_dir
from toolkit.monitor.views.latest import latest
from toolkit.monitor.views.parts import part
from toolkit.text import one_line

#: Seconds between two looks.
EVERY_S = 2.0

#: Of a log this much is read, and so many lines are shown.
TAIL_BYTES, TAIL_LINES = 64 << 10, 200


@part(EVERY_S)
def show() -> None:
    """Choose a log and watch it grow."""
    settings = config.resolve()
    processes = sorted(path.stem for path in logs_dir(settings.data_dir).glob("*.log"))
    runs = sorted((p.parent.name for p in settings.data_dir.glob("runs/*/run.log")), reverse=True)
    if not (processes or runs):
        st.info("Nothing has written a log on this machine yet.")
        return
    indexes = {row.record.run_id: row.record.index for row in latest().runs}
    name = st.selectbox(
        "Log of",
        [*runs, *processes],
        key="log",
        help="Of this machine only.",
        format_func=lambda log: f"{one_line(indexes[log])} · {log}" if log in indexes else log,
    )
    st.code(
        tail(log_path(name, settings)) or "empty so far", language=None, height=480, wrap_lines=True
    )


def tail(path: Path) -> str:
    """The last lines of a file, however long it is."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])
