"""Looking at a collection as a whole: pairs that look the same, and a map."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import QueryError
from toolkit.index.nearest import MARGIN, Rows, Vectors, pair_scores
from toolkit.index.quality import sample_rows
from toolkit.index.version import EXACT_ROWS, IndexVersion

#: Pairs of rows up to which every one is compared.
EXACT_PAIRS = EXACT_ROWS * EXACT_ROWS

#: Pairs found, beyond which a threshold is called too low: they would fill the memory.
MAX_PAIRS = 5_000_000

#: Rows whose neighbours are asked of the graph at once, and how many at first.
_GRAPH_ROWS, _FIRST_COUNT = 1024, 16

_BLOCK = 2048


def near_duplicates(
    version: IndexVersion, threshold: float, other: IndexVersion | None = None
) -> tuple[Rows, Rows, Vectors]:
    """Pairs of rows that look the same.

    Every pair is compared, up to :data:`EXACT_PAIRS`; above, each row asks the graph for its
    neighbours until they are too far, which finds nearly all.

    Args:
        version: The index.
        threshold: Least cosine similarity.
        other: Compare with this index, of the same encoder, instead of within.

    Returns:
        Rows ``i`` and ``j``, int64, and cosines, float32, each of shape ``(p,)``, ordered by
        ``(i, j)``. Within an index each pair stands once, ``i < j``.

    Raises:
        QueryError: If some :data:`MAX_PAIRS` pairs or more are that near.
    """
    within = other is None
    target = version if other is None else other
    if version.n * target.n <= EXACT_PAIRS:
        pieces = exact_pairs(version.vectors, target.vectors, threshold, within)
    else:
        pieces = graph_pairs(version.vectors, target, threshold, within)
    i, j = _gathered(pieces, threshold)
    if len(i):
        i, j = np.divmod(np.unique(i * target.n + j), target.n)
    scores = pair_scores(version.vectors, target.vectors, i, j)
    near = scores >= np.float32(threshold)
    return i[near], j[near], scores[near]


def _gathered(pieces: Iterator[tuple[Rows, Rows]], threshold: float) -> tuple[Rows, Rows]:
    left, right, total = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for i, j in pieces:
        total += len(i)
        if total > MAX_PAIRS:
            raise _too_many(threshold)
        left.append(i)
        right.append(j)
    return np.concatenate(left), np.concatenate(right)


def _too_many(threshold: float) -> QueryError:
    return QueryError(
        f"about {MAX_PAIRS} pairs or more have a similarity of at least {threshold}; "
        "choose a higher threshold"
    )


def exact_pairs(
    a: Vectors, b: Vectors, threshold: float, within: bool
) -> Iterator[tuple[Rows, Rows]]:
    """Every pair ``a[i]``, ``b[j]`` that may be as near as the threshold; memory of a block.

    Args:
        a: Unit vectors, float32, shape ``(n, dim)``.
        b: Unit vectors, float32, shape ``(m, dim)``.
        threshold: Least cosine; a little less comes through, for the caller to look at.
        within: ``a`` is ``b``: yield only ``i < j``.
    """
    for top in range(0, len(a), _BLOCK):
        for left in range(top if within else 0, len(b), _BLOCK):
            near = a[top : top + _BLOCK] @ b[left : left + _BLOCK].T >= threshold - MARGIN
            if within and left == top:
                near = np.triu(near, 1)
            i, j = np.nonzero(near)
            yield i + top, j + left


def graph_pairs(
    a: Vectors, target: IndexVersion, threshold: float, within: bool
) -> Iterator[tuple[Rows, Rows]]:
    """As :func:`exact_pairs`, of what a graph finds; within, a pair may come twice.

    Args:
        a: Unit vectors, float32, shape ``(n, dim)``.
        target: The index that is asked.
        threshold: Least cosine.
        within: ``a`` are the target's own vectors: yield only ``i < j``.

    Raises:
        QueryError: If far too many pairs are that near.
    """
    for start in range(0, len(a), _GRAPH_ROWS):
        rows, count = np.arange(start, min(start + _GRAPH_ROWS, len(a))), _FIRST_COUNT
        while len(rows):
            q, j = target.graph.candidates(a[rows], min(count, target.n))
            near = pair_scores(a, target.vectors, rows[q], j) >= threshold
            if np.count_nonzero(near) > MAX_PAIRS:
                raise _too_many(threshold)
            # A row all of whose neighbours are near may have more.
            full = np.bincount(q[near], minlength=len(rows)) >= count
            done = near & ~full[q]
            i, j = rows[q[done]], j[done]
            if within:
                apart = i != j
                i, j = np.minimum(i, j)[apart], np.maximum(i, j)[apart]
            yield i, j
            rows, count = rows[full], count * 4


def project(
    vectors: NDArray[np.float32], sample: int = 20_000, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The two directions in which vectors differ most (PCA), for a scatter plot.

    Args:
        vectors: float32, shape ``(n, dim)``, ``dim`` 2 or more.
        sample: Rows to draw, at most.
        seed: Of the sample.

    Returns:
        Row numbers int64, ascending, shape ``(m,)``, and their places float32, shape
        ``(m, 2)``. Of each direction and its opposite, the one whose largest component is
        positive.
    """
    rows = sample_rows(len(vectors), sample, seed)
    if not len(rows):
        return rows, np.empty((0, 2), np.float32)
    centred = vectors[rows] - vectors[rows].mean(axis=0)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    first_two = axes[:, :-3:-1]
    largest = np.abs(first_two).argmax(axis=0)
    first_two = first_two * np.sign(first_two[largest, [0, 1]])
    return rows, (centred @ first_two).astype(np.float32)
