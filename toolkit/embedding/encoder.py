"""Pictures to vectors, with whatever model and engine it is given.

Law: no torch here. A vector is what plain timm gives for one picture at a time, to 1e-5 a
component. Batch size, neighbours and threads do not show in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolkit.embedding.preprocess import golden_pictures, prepare
from toolkit.embedding.spec import EncoderSpec

logger = logging.getLogger(__name__)

#: What twice as many images at once must gain: they also take twice the memory, and as many
#: pictures wait for each other.
LEAST_GAIN = 1.05

# Of a size; the first try also makes what it needs on the device.
_TRIES = 3


class Model(Protocol):
    """A network that is ready to run on one device.

    Attributes:
        device: A torch device, resolved.
        engine: Who runs it: ``torch`` or ``openvino``.
        micro_batch: Images that go through it at once.
        n_lanes: Runs of it side by side.
    """

    device: str
    engine: str
    micro_batch: int
    n_lanes: int

    def enter_lane(self) -> None:
        """Hear that the calling thread will run the model."""

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Shape ``(n, height, width, 3)`` to ``(n, dim)``, of any length.

        Raises:
            MemoryError: If the device has too little memory for so many at once.
        """


class Encoder:
    """Pictures to vectors; made by :func:`toolkit.embedding.loading.load_encoder`.

    Attributes:
        spec: What it is; its fingerprint names the vectors.
        model: What runs it.
        golden: Its vectors of the golden pictures, float32 of shape ``(n, dim)``.
        micro_batch: Images that go through the model at once; halved out of memory.
    """

    def __init__(self, spec: EncoderSpec, model: Model) -> None:
        self.spec, self.model = spec, model
        self.micro_batch = model.micro_batch
        self._lanes = ThreadPoolExecutor(model.n_lanes, "encode", initializer=model.enter_lane)
        self.golden = self.encode(np.stack([self.prepare(p) for p in golden_pictures()]))

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.spec.dim

    @property
    def at_once(self) -> int:
        """Images that :meth:`encode` should be given at once, to keep every lane at work."""
        return self.micro_batch * self.model.n_lanes

    def prepare(self, rgb: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one picture; may be called from several threads.

        Args:
            rgb: Upright: an image of mode ``RGB``, or an array of shape ``(height, width, 3)``.

        Returns:
            What the model looks at, shape ``(height, width, 3)``.
        """
        return prepare(rgb, self.spec.preprocessing)

    def tune(self, sizes: Sequence[int]) -> None:
        """Take the number of images at once that is fastest here.

        Args:
            sizes: To try, ascending. A larger one has to gain :data:`LEAST_GAIN`; the first that
                does not, or for which memory is too small, ends the search.
        """
        picture = self.prepare(golden_pictures()[0])
        best, rate = self.micro_batch, 0.0
        for size in sizes:
            self.micro_batch, pixels = size, np.repeat(picture[None], size, axis=0)
            try:
                seconds = min(self._seconds(pixels) for _ in range(_TRIES))
            except MemoryError:
                break
            if size / seconds < LEAST_GAIN * rate:
                break
            best, rate = size, size / seconds
        self.micro_batch = best
        logger.info("%s: %d images at once, %.0f a second", self.model.device, best, rate)

    def _seconds(self, pixels: NDArray[np.uint8]) -> float:
        began = time.perf_counter()
        self._lanes.submit(self._run, pixels).result()
        return time.perf_counter() - began

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model.

        Args:
            pixels: From :meth:`prepare`, shape ``(n, height, width, 3)``.

        Returns:
            Shape ``(n, dim)``, each row of length 1. A row is not finite where the model
            gave no vector that has a direction.
        """
        size, nothing = self.micro_batch, np.empty((0, self.dim), np.float32)
        chunks = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        try:
            vectors = np.concatenate([nothing, *self._lanes.map(self._run, chunks)])
        except MemoryError:
            if size == 1:
                raise
            self.micro_batch = size // 2
            logger.warning(
                "%s is out of memory; now %d at once", self.model.device, self.micro_batch
            )
            return self.encode(pixels)
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            rows: NDArray[np.float32] = (vectors / lengths).astype(np.float32)
        return rows

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        # Always the same shape: other shapes take other paths through the libraries, and the
        # bytes of a vector would depend on how many neighbours it has.
        padded = np.zeros((self.micro_batch, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        return self.model.run(padded)[: len(pixels)]
