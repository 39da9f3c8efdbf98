"""Whether Flower runs, and what to look for there."""

from __future__ import annotations

import streamlit as st

from toolkit.monitor.launch import flower_url
from toolkit.monitor.views.parts import part

#: Seconds between two looks.
EVERY_S = 5.0

_THERE = """
**Only there:** every Celery task by its id with arguments, runtime and traceback; the settings,
the pool and the resource use of each worker as Celery reports them.

**Not to be believed there:** a busy worker with `--pool=solo` counts as offline after 4 s; its
list of queues is what workers said earlier, and knows no queue that nobody serves. What waits
and what is held is right on this page, which asks the server.
"""


@part(EVERY_S)
def show() -> None:
    """Link to Flower, or the command that starts it."""
    url = _url()
    if url is None:
        st.info("Flower does not run on this machine. This starts it, read-only:")
        st.code("toolkit flower", language="sh")
    else:
        st.link_button("Open Flower", url, icon="🌸")
    st.markdown(_THERE)


@st.cache_data(ttl=EVERY_S - 0.5, show_spinner=False)
def _url() -> str | None:
    return flower_url()
