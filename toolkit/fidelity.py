"""How far the vectors of a faster encoder lie from exact ones: measured on a sample of a build.

Law: what is sampled depends on the order of the images alone. It measures and changes nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.config import Settings
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import RoadError, ToolkitError
from toolkit.index.quality import neighbour_overlap
from toolkit.records import Batch, Item, Outcome

logger = logging.getLogger(__name__)

#: Images that are embedded exactly, too.
SAMPLE = 128

#: Neighbours that are compared.
K = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Fidelity:
    """What a faster encoder kept of the exact vectors.

    Attributes:
        n: Images of the sample.
        mean_cosine: Of a vector and the exact one of the same image.
        min_cosine: The least of them.
        top10_overlap: Share of the 10 nearest images within the sample, or of as many as it
            has, that are the same by both.
    """

    n: int
    mean_cosine: float
    min_cosine: float
    top10_overlap: float

    def __str__(self) -> str:
        images = "1 image" if self.n == 1 else f"{self.n} images"
        words = (
            f"against exact vectors, {images}: cosine {self.mean_cosine:.4f} in the mean, "
            f"{self.min_cosine:.4f} at least"
        )
        if self.n <= K + 1:  # the nearest are all the others, by any vectors
            return words
        return f"{words}; {self.top10_overlap:.0%} of the {K} nearest the same"

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)


class Sample:
    """A few of a build's images, with the vectors they got; every image has the same chance."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._n_offered = 0
        self._items: dict[int, Item] = {}
        self._vectors: dict[int, NDArray[np.float32]] = {}

    def offer(self, item: Item) -> None:
        """Consider an image that goes out to be embedded."""
        self._n_offered += 1
        # A file that changed under the build comes once more.
        if len(self._items) < SAMPLE or item.id in self._items:
            self._items[item.id] = item
        elif self._random.randrange(self._n_offered) < SAMPLE:
            gone = self._random.choice(list(self._items))
            del self._items[gone]
            self._vectors.pop(gone, None)
            self._items[item.id] = item

    def saw(self, outcome: Outcome) -> None:
        """Keep what became of those that were chosen."""
        for embedded in outcome.embedded:
            if embedded.item_id in self._items:
                self._vectors[embedded.item_id] = outcome.vectors[embedded.row].copy()

    def measure(self, request: EncoderRequest, settings: Settings) -> Fidelity | None:
        """Embed the sample exactly and compare; ``None`` if that cannot be done."""
        items = tuple(item for id_, item in self._items.items() if id_ in self._vectors)
        if not items:
            return None
        try:
            with warm_executor(request.exact, settings) as executor:
                spec = executor.start()
                exact = executor.embed(Batch(0, spec.fingerprint, items), {})
        except (RoadError, ToolkitError) as error:
            logger.warning("how exact the vectors are was not measured: %s", error)
            return None
        pairs = [(self._vectors[e.item_id], exact.vectors[e.row]) for e in exact.embedded]
        if not pairs:
            return None
        fast, right = (np.stack(side) for side in zip(*pairs, strict=True))
        cosines = (fast.astype(np.float64) * right).sum(axis=1)
        overlap = neighbour_overlap(fast, right, K) if len(pairs) > 1 else 1.0
        return Fidelity(len(pairs), float(cosines.mean()), float(cosines.min()), overlap)
