"""How durations, names and reasons are said to people; plain text."""

from __future__ import annotations

from collections.abc import Sequence


def seconds_text(seconds: float | None) -> str:
    """A duration as people say it: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def one_line(text: str) -> str:
    """A text on one line: control characters as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fallback_text(reason: str, eta_s: Sequence[float | None]) -> str:
    """That the work is done on this machine, why, and what that does to the time left.

    Args:
        reason: Why no worker does it, with the cure.
        eta_s: Seconds that are left on workers, and locally; ``None`` where nobody knows.
    """
    before, after = eta_s
    if after is None:
        eta = ""
    elif before is None:
        eta = f", ETA {seconds_text(after)}"
    else:
        eta = f", ETA {seconds_text(before)} → {seconds_text(after)}"
    return f"no worker ({reason}); running locally{eta}"
