"""Named points where a test may kill this process, to see what the disk holds then.

Law: does nothing unless ``TOOLKIT_FAULT_POINT`` names the point, as ``name`` or
``name:N`` for its N-th passing. A kill at the exact line cannot be aimed from outside.
"""

from __future__ import annotations

import os
import signal

_passed: dict[str, int] = {}


def point(name: str) -> None:
    """Die here without any cleaning up, if the environment asks for this point."""
    wanted = os.environ.get("TOOLKIT_FAULT_POINT")
    if not wanted:
        return
    target, _, nth = wanted.partition(":")
    if target != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)
