"""Whether an outcome may be believed: every road's is looked at before it is stored."""

from __future__ import annotations

import numpy as np

from toolkit.embedding.spec import EncoderSpec
from toolkit.errors import AnswerError
from toolkit.records import Item, Outcome

#: Largest difference of a vector's length from 1; float32 keeps seven digits.
LENGTH_TOLERANCE = 1e-3


def check_outcome(outcome: Outcome, items: tuple[Item, ...], spec: EncoderSpec) -> None:
    """Refuse what does not answer exactly these items with this encoder's vectors.

    Args:
        outcome: What came.
        items: What was asked.
        spec: The encoder that was asked.

    Raises:
        AnswerError: With what is wrong.
    """
    if outcome.fingerprint != spec.fingerprint:
        raise AnswerError(
            f"another encoder answered ({outcome.fingerprint[:12]} instead of "
            f"{spec.fingerprint[:12]}); build again"
        )
    answered = [e.item_id for e in outcome.embedded] + [f.item_id for f in outcome.failed]
    if sorted(answered) != sorted(item.id for item in items):
        raise AnswerError(f"{len(answered)} items were answered, not the {len(items)} sent")
    known = {item.id: item.key for item in items}
    for embedded in outcome.embedded:
        if known[embedded.item_id] not in (None, embedded.key) or len(embedded.key) != 16:
            raise AnswerError(f"the vector of item {embedded.item_id} is of another content")
    _check_vectors(outcome, spec.dim)


def _check_vectors(outcome: Outcome, dim: int) -> None:
    n = len(outcome.embedded)
    if sorted(e.row for e in outcome.embedded) != list(range(n)):
        raise AnswerError("rows are missing or named twice")
    if not n:
        return
    if outcome.vectors.shape != (n, dim):
        raise AnswerError(f"vectors of shape {outcome.vectors.shape}, not {(n, dim)}")
    lengths = np.linalg.norm(outcome.vectors.astype(np.float64), axis=1)
    if not np.all(np.abs(lengths - 1) < LENGTH_TOLERANCE):  # false for what is not finite, too
        raise AnswerError("vectors that are not finite, or not of length 1")
