"""Search: a picture or an indexed path, an index, and what is near.

The picture is embedded by this process's child, as in a notebook: whatever it does to a
decoder, the page stays.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import streamlit as st

from toolkit import config, display
from toolkit.monitor.views.parts import part, plain
from toolkit.monitor.views.rights import is_trusted
from toolkit.search import Index, published_names

#: Neighbours shown.
K = 24

_PICTURE, _PATH = "a picture", "a path"


@part()
def show() -> None:
    """The search box and its answer."""
    settings = config.resolve()
    names = published_names(settings.data_dir)
    if not names:
        st.info("No index is published yet; start a build first.")
        return
    left, right = st.columns(2)
    name = left.selectbox("Index", names, key="search_index")
    # Paths are not for everybody: the answer tells whether a file is there.
    ways = [_PICTURE, _PATH] if is_trusted() else [_PICTURE]
    way = right.segmented_control("Search by", ways, default=_PICTURE, key="search_by")
    # As soon as there is something to search by: a button could be faster than the upload.
    if way == _PATH and _PATH in ways:
        path = st.text_input(
            "Path", key="search_path", help="A file that is indexed is not embedded again."
        )
        if path.strip():
            _answer(name, path.strip())
    elif picture := st.file_uploader("Picture", key="search_picture", label_visibility="collapsed"):
        # By a file, not by its pixels: one that is indexed is known by its bytes.
        with tempfile.TemporaryDirectory(prefix="toolkit-search-") as folder:
            file = Path(folder) / "upload"
            file.write_bytes(picture.getvalue())
            _answer(name, str(file))


def _answer(name: str, path: str) -> None:
    with (
        st.spinner("searching; the first picture waits for the model"),
        Index.open(name, config.resolve()) as index,
    ):
        hits = index.search(path, k=K, include_self=True)
    st.caption(plain(f"{len(hits)} nearest in {name}, {'exact' if hits.exact else 'approximate'}"))
    st.html(display.hits_html(hits))
