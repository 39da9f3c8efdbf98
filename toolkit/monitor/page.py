"""The page, which Streamlit runs from top to bottom for each viewer.

The first screen answers in five seconds: is it working, how far, how long still, what failed,
who is working. Everything else lies in tabs, of which only the open one is drawn.
"""

import streamlit as st

from toolkit.monitor.views import (
    builds,
    flower,
    logs,
    overview,
    queue,
    rights,
    search,
    start,
    workers,
)

_TABS = {
    "Builds": builds.show,
    "Queue": queue.show,
    "Workers": workers.show,
    "Search": search.show,
    "Logs": logs.show,
    "Flower": flower.show,
}

#: Streamlit leaves a hand's breadth free above a page, and stacks columns in a narrow window:
#: there the figures stand two by two, so that the builds come into view.
_STYLE = """
.stMainBlockContainer { padding-top: 2.5rem; padding-bottom: 2rem; }
.st-key-figures .stColumn { min-width: calc(50% - 1rem) !important; }
@media (min-width: 640px) { .st-key-figures .stColumn { min-width: 0 !important; } }
"""

st.set_page_config(page_title="Toolkit monitor", page_icon="🖼️", layout="wide")
st.html(f"<style>{_STYLE}</style>")
with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
    st.markdown("### Image index toolkit")
    start.show()
rights.notice()
overview.show()
tabs = st.tabs(list(_TABS), key="tab", on_change="rerun")
for tab, draw in zip(tabs, _TABS.values(), strict=True):
    if tab.open:
        with tab:
            draw()
