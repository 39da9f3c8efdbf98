"""How many images an accelerator is given at once: what is fastest there and has room."""

from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.embedding.encoder import Encoder
from toolkit.embedding.spec import EncoderSpec, Preprocessing

SPEC = EncoderSpec(
    "corners",
    "random",
    Preprocessing((3, 8, 8), "bicubic", (0.0,) * 3, (1.0,) * 3, 1.0, "center"),
    3,
    "full",
    "fp32",
    "features",
    None,
    0,
    3,
)


class Device:
    """A device with a price for each launch, a price for each image, and so much room."""

    device, engine, n_lanes, micro_batch = "device", "none", 1, 1

    def __init__(self, launch_s: float, image_s: float, room: int) -> None:
        self._launch_s, self._image_s, self._room = launch_s, image_s, room
        self.sizes: list[int] = []

    def enter_lane(self) -> None:
        pass

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.sizes.append(len(pixels))
        if len(pixels) > self._room:
            raise MemoryError(f"no room for {len(pixels)}")
        time.sleep(self._launch_s + len(pixels) * self._image_s)
        return pixels[:, 0, 0].astype(np.float32) + 1


@pytest.mark.parametrize(
    ("launch_s", "image_s", "room", "best"),
    [
        (0.05, 0.0, 1000, 32),  # launches alone count: the more at once the better
        (0.0, 0.01, 1000, 4),  # images alone count: nothing is gained by more
        (0.05, 0.0, 20, 16),  # no room for 32
        (0.05, 0.0, 3, 1),  # room for none of them: what it had stays
    ],
)
def test_the_fastest_that_has_room_is_taken(
    launch_s: float, image_s: float, room: int, best: int
) -> None:
    device = Device(launch_s, image_s, room)
    encoder = Encoder(SPEC, device)

    encoder.tune((4, 8, 16, 32))

    assert encoder.micro_batch == best
    device.sizes.clear()
    if best <= room:
        assert encoder.encode(np.zeros((best + 1, 8, 8, 3), np.uint8)).shape == (best + 1, 3)
        assert device.sizes == [best, best]
