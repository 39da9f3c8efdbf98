"""Whether a viewer may change something, by the rules of the HTTP door."""

from __future__ import annotations

import streamlit as st

from toolkit.monitor import guards
from toolkit.monitor.views.parts import sentences, told

_TRUSTED = "knows_the_token"


def notice() -> None:
    """Say it where nobody may change anything."""
    with sentences():
        if reason := _read_only_reason():
            st.info(told(reason[0].upper() + reason[1:]), icon="🔒")


def may_act(key: str) -> bool:
    """Whether this viewer may; says why not, or asks for the token.

    Args:
        key: Of the place that asks, different for each.
    """
    if reason := _read_only_reason():
        st.info(told(reason))
        return False
    if is_trusted():
        return True
    given = st.text_input("Token (TOOLKIT_MONITOR_TOKEN)", type="password", key=f"{key}_token")
    if given and guards.is_token(given):
        st.session_state[_TRUSTED] = True
        return True
    if given:
        st.error("That is not the token.")
    return False


def is_trusted() -> bool:
    """Whether this viewer may do what a user of this machine may; asks for nothing."""
    knows = guards.token() is None or bool(st.session_state.get(_TRUSTED))
    return knows and _read_only_reason() is None


def _read_only_reason() -> str | None:
    return guards.read_only_reason(st.get_option("server.address"))
