"""How far the vectors of a faster encoder lie from exact ones: measured on a sample of a build.

Law: what is sampled depends on the order of the images alone. Exact vectors come from the store,
and those that it lacks go there, so that no build pays for them again.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import sqlite3
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.catalog import transaction
from toolkit.config import Settings
from toolkit.dispatch.check import check_outcome
from toolkit.dispatch.local import LocalExecutor, warm_executor
from toolkit.embedding.spec import EncoderRequest
from toolkit.embedding.store import VectorStore
from toolkit.embedding.weights import known_spec
from toolkit.errors import ToolkitError
from toolkit.images.decode import DECODE_VERSION
from toolkit.index.quality import neighbour_overlap
from toolkit.records import Batch, Item, Outcome

logger = logging.getLogger(__name__)

#: Images whose exact vectors are looked at, too.
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
            if item := self._items.get(embedded.item_id):
                self._items[item.id] = dataclasses.replace(item, key=embedded.key)
                self._vectors[item.id] = outcome.vectors[embedded.row].copy()

    def measure(
        self,
        request: EncoderRequest,
        settings: Settings,
        catalog: sqlite3.Connection,
        run_id: str,
    ) -> Fidelity | None:
        """Compare the sample with exact vectors; ``None`` if that cannot be done.

        Args:
            request: The faster encoder.
            settings: Of the build.
            catalog: Open; exact vectors that have to be made are stored.
            run_id: Of the build.
        """
        items = tuple(item for id_, item in self._items.items() if id_ in self._vectors)
        if not items:
            return None
        try:
            exact = _exact_vectors(request.exact, items, settings, catalog, run_id)
        # Whatever model, store or catalog have against it: a build is worth more than a measure.
        except (ToolkitError, OSError, sqlite3.Error) as error:
            logger.warning("how exact the vectors are was not measured: %s", error)
            return None
        pairs = [(self._vectors[id_], right) for id_, right in exact.items()]
        if not pairs:
            return None
        fast, right = (np.stack(side) for side in zip(*pairs, strict=True))
        cosines = (fast.astype(np.float64) * right).sum(axis=1)
        overlap = neighbour_overlap(fast, right, K) if len(pairs) > 1 else 1.0
        return Fidelity(len(pairs), float(cosines.mean()), float(cosines.min()), overlap)


def _exact_vectors(
    request: EncoderRequest,
    items: tuple[Item, ...],
    settings: Settings,
    catalog: sqlite3.Connection,
    run_id: str,
) -> dict[int, NDArray[np.float32]]:
    """Exact vectors by item; without those that were not stored and cannot be made any more."""
    keys = {item.id: item.key for item in items if item.key is not None}
    wanted = list(keys.values())
    spec = known_spec(request, settings.data_dir)
    store = VectorStore(catalog, settings.data_dir, spec) if spec else None
    if store is None or not store.has(wanted).issuperset(wanted):
        with warm_executor(request, settings) as executor:
            store = VectorStore(catalog, settings.data_dir, executor.start())
            stored = store.has(wanted)
            if lacking := tuple(item for item in items if item.key not in stored):
                _embed(lacking, executor, store, catalog, run_id)
    stored = store.has(wanted)
    there = {id_: key for id_, key in keys.items() if key in stored}
    rows = itertools.chain.from_iterable(store.read(there.values()))
    return dict(zip(there, rows, strict=True))


def _embed(
    items: tuple[Item, ...],
    executor: LocalExecutor,
    store: VectorStore,
    catalog: sqlite3.Connection,
    run_id: str,
) -> None:
    """Embed images and store their vectors."""
    spec = executor.start()
    outcome = executor.embed(Batch(0, spec.fingerprint, items), {})
    check_outcome(outcome, items, spec)
    if outcome.embedded:
        with store.writer(run_id) as writer:
            first = writer.append(outcome.vectors)
            with transaction(catalog):
                # Without the failures: each of these images has a vector in this build.
                writer.record(dataclasses.replace(outcome, failed=()), first, DECODE_VERSION)
