"""What every part of the page stands on: refreshing, sentences for errors, plain text."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator

import streamlit as st

from toolkit.errors import ToolkitError
from toolkit.monitor.guards import RefusedError
from toolkit.text import one_line

logger = logging.getLogger(__name__)

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!~|<>$^&:=\"'])")

#: Beginnings of an icon, an emoji, an arrow, a dash or a comparison.
_SIGNS = re.compile(r"material(?=/)|:(?=[\w+-]+:)|[-<>~](?=[-=>])")

_COMMAND = re.compile(r"(`[^`]+`)")


def part(every_s: float | None = None) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a function a part of the page that is drawn again by itself.

    Args:
        every_s: Seconds between two drawings; ``None`` draws it when somebody did something.
    """

    def as_part(draw: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(draw)
        def guarded() -> None:
            with sentences():
                draw()

        drawn: Callable[[], None] = st.fragment(guarded, run_every=every_s)
        return drawn

    return as_part


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Show what goes wrong as a sentence; the rest of the page goes on."""
    try:
        yield
    except RefusedError as refusal:
        st.error(told(refusal.sentence))
    except (ToolkitError, OSError) as error:
        st.error(told(error))
    except Exception as error:
        logger.exception("a part of the page could not be drawn")
        kind = type(error).__name__
        st.error(plain(f"This part cannot be shown ({kind}); the monitor's own log says why."))


def plain(text: object) -> str:
    """A text as markdown that shows just that text, on one line."""
    # Streamlit looks for icons, emojis and arrows after the markdown was read: a joiner of no
    # width parts what it would take for one.
    parted = _SIGNS.sub("\\g<0>\u2060", one_line(str(text)))
    return _MARKDOWN.sub(r"\\\1", parted)


def told(sentence: object) -> str:
    """A sentence of ours as markdown: commands in it can be copied, the rest is plain."""
    parts = _COMMAND.split(one_line(str(sentence)))
    return "".join(p if _COMMAND.fullmatch(p) else plain(p) for p in parts)
