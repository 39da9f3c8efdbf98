"""The long form: builds killed at random moments, over and over, must lose and repeat nothing."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

import toolkit as tk
from tests.pictures import write_photos
from tests.support import INDEX, build, table, wait_until
from toolkit.dispatch.dispatcher import BATCH_ITEMS
from toolkit.driver import Build

pytestmark = pytest.mark.soak

N_PHOTOS, N_KILLS, SEEDS = 1500, 12, range(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_builds_killed_at_random_lose_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    write_photos(tmp_path / "datasets" / "photos", N_PHOTOS, seed=seed * N_PHOTOS)
    tk.configure(data_dir=tmp_path / "whole")
    build("photos")
    with tk.open_index(INDEX) as index:
        expected = table(index)
    tk.configure(data_dir=tmp_path / "killed")

    embedded = sum(_killed(build("photos", wait=False), chance) for _ in range(N_KILLS))
    last = build("photos")

    with tk.open_index(INDEX) as index:
        assert table(index) == expected
    assert last.state == "done"
    # A death may hide the books of one batch, which is stored, or repeat one, which is not.
    assert abs(embedded + last.accounting.embedded - N_PHOTOS) <= N_KILLS * BATCH_ITEMS


def _killed(run: Build, chance: random.Random) -> int:
    """Kill a build, or its child, after a while that chance chooses; what it had embedded."""
    end = time.monotonic() + chance.uniform(0.0, 6.0)
    wait_until(lambda: time.monotonic() > end or not run.state.is_live, "its hour")
    if run.state.is_live:
        os.kill(run.record.pid, signal.SIGKILL)
    wait_until(lambda: not run.state.is_live, "its end")
    return run.accounting.embedded
