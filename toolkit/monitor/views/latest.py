"""One look for all parts and all viewers of the page."""

from __future__ import annotations

import streamlit as st

from toolkit import config
from toolkit.config import Settings
from toolkit.monitor.history import HISTORY, INTERVAL_S, Sample
from toolkit.monitor.snapshot import Snapshot, take

#: Seconds for which a look serves everybody; less than between two drawings of a part.
AGE_S = 0.8


def latest() -> Snapshot:
    """What is going on now."""
    return _taken(config.resolve())


def samples() -> list[Sample]:
    """The last hour, the oldest first."""
    return _recent(config.resolve())


# An underscore keeps the settings out of the key: there is one look at a time.
@st.cache_resource(ttl=AGE_S, max_entries=1, show_spinner=False)
def _taken(_settings: Settings) -> Snapshot:
    return take(_settings)


@st.cache_resource(ttl=INTERVAL_S - 0.5, max_entries=1, show_spinner=False)
def _recent(_settings: Settings) -> list[Sample]:
    return HISTORY.recent(_settings)
