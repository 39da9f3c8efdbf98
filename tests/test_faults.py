"""A process dies at the point that the environment names, and at no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

#: Passes three points, and says how far it came.
SCRIPT = """
from toolkit.faults import point
for name in ("first", "second", "first"):
    print(name, flush=True)
    point(name)
print("end", flush=True)
"""


@pytest.mark.parametrize(
    ("wanted", "reached"),
    [
        ("", ["first", "second", "first", "end"]),
        ("third", ["first", "second", "first", "end"]),
        ("fir", ["first", "second", "first", "end"]),
        ("second", ["first", "second"]),
        ("first:2", ["first", "second", "first"]),
        ("first:3", ["first", "second", "first", "end"]),
    ],
)
def test_process_dies_at_the_point_it_is_told(wanted: str, reached: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TOOLKIT_FAULT_POINT": wanted},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stdout.split() == reached
    assert done.returncode == (0 if "end" in reached else -signal.SIGKILL)
