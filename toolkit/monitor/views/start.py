"""Starting a build: a button, and a form that says what will happen before it does."""

from __future__ import annotations

from typing import Any

import streamlit as st

from toolkit import config
from toolkit.images.datasets import list_datasets
from toolkit.monitor import orders
from toolkit.monitor.views.parts import plain, sentences
from toolkit.monitor.views.rights import may_act


def show() -> None:
    """The button; the form opens over the page."""
    with sentences():
        if st.button("Start a build", type="primary", icon=":material/play_arrow:", key="start"):
            _form()


@st.dialog("Start a build")
def _form() -> None:
    with sentences():
        settings = config.resolve()
        if not may_act("start"):
            return
        names = [name for name, _ in list_datasets(settings.datasets_dir)]
        if not names:
            st.info(plain(f"There is no dataset: no folder lies in {settings.datasets_dir}."))
            st.code("toolkit build FOLDER", language="sh")
            return
        # Names are options of widgets, which read them as they are.
        chosen = st.multiselect("Datasets", names, key="start_datasets")
        model = st.text_input("Model", settings.model, key="start_model", help="Any timm name.")
        name = st.text_input(
            "Name of the index", key="start_name", placeholder="the datasets' names, joined by +"
        )
        distributed = st.toggle("Use workers if they work", value=True, key="start_distributed")
        st.caption("It goes on when this page, or its server, is closed.")
        if st.button("Start", type="primary", disabled=not chosen, key="start_now"):
            order = {"dataset_names": chosen, "distributed": distributed}
            _start(order | _given(name=name, model=model))


def _given(**texts: str) -> dict[str, str]:
    return {key: text.strip() for key, text in texts.items() if text.strip()}


def _start(order: dict[str, Any]) -> None:
    with st.spinner("starting"):
        started = orders.start_build(order, config.resolve())
    st.toast(plain(f"started run {started['run_id']}"))
    st.rerun()
