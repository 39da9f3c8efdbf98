"""Cosine neighbours by arithmetic: the exact scan, and the re-ranking of what a graph proposes.

Law: an answer is ordered by score descending, ties by row. A float32 product only chooses who
is looked at; the scores come from float64 and are rounded once, so they do not depend on how
the rows were cut into blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolkit.index.vector_index import VectorIndex

Vectors: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]
#: For each query the rows that must not be in its answer.
Exclude: TypeAlias = Sequence[Sequence[int]] | NDArray[np.int64]

#: Candidates that the graph is asked for, per neighbour wanted, and the least of them.
OVERFETCH, MIN_CANDIDATES = 4, 40

#: Candidates beyond which a scan of every row is the better way.
MAX_CANDIDATES = 4096

#: What a float32 product of unit vectors may be off by, and then some.
MARGIN = 1e-5

# Below every cosine.
_LOWEST = -2.0

_BLOCK_ROWS, _BLOCK_QUERIES, _BLOCK_PAIRS = 8192, 256, 1024


def unit(vectors: ArrayLike) -> Vectors:
    """Vectors scaled to length 1: float32, shape as given; divided in float64."""
    wide = np.asarray(vectors, np.float64)
    scaled = wide / np.linalg.norm(wide, axis=-1, keepdims=True)
    return np.ascontiguousarray(scaled, np.float32)


def exact_top_k(
    vectors: Vectors,
    queries: Vectors,
    k: int,
    *,
    rows: Rows | None = None,
    exclude: Exclude | None = None,
) -> tuple[Rows, Vectors]:
    """The true nearest rows, by comparing with every one.

    Args:
        vectors: Unit vectors, float32, shape ``(n, dim)``; may be a memory map.
        queries: Unit vectors, float32, shape ``(m, dim)``.
        k: Neighbours of each.
        rows: Look only at these, ascending; at all by default.
        exclude: For each query the rows to leave out.

    Returns:
        Row numbers int64 and cosines float32, both ``(m, k)``; where there are fewer, ``-1``
        and ``nan``.
    """
    answers = [
        _exact_block(
            vectors,
            queries[start : start + _BLOCK_QUERIES],
            k,
            rows,
            None if exclude is None else exclude[start : start + _BLOCK_QUERIES],
        )
        for start in range(0, len(queries), _BLOCK_QUERIES)
    ]
    if not answers:
        return _blank(0, k)
    return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])


def _exact_block(
    vectors: Vectors, queries: Vectors, k: int, rows: Rows | None, exclude: Exclude | None
) -> tuple[Rows, Vectors]:
    q_out, rows_out = _pairs(exclude)
    # The k-th best of any block is a lower bound for the k-th best of all.
    floor = np.full(len(queries), _LOWEST, np.float32)
    q_found, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for ids, block in _blocks(vectors, rows):
        scores = queries @ block.T
        place = np.minimum(np.searchsorted(ids, rows_out), len(ids) - 1)
        here = ids[place] == rows_out
        scores[q_out[here], place[here]] = -np.inf
        if len(ids) >= k:
            kth = np.partition(scores, len(ids) - k, axis=1)[:, len(ids) - k]
            floor = np.maximum(floor, kth)
        q, place = np.nonzero(scores >= (floor - MARGIN)[:, None])
        q_found.append(q)
        found.append(ids[place])
    return best_pairs(vectors, queries, k, np.concatenate(q_found), np.concatenate(found))


def _blocks(vectors: Vectors, rows: Rows | None) -> Iterator[tuple[Rows, Vectors]]:
    n = len(vectors) if rows is None else len(rows)
    for start in range(0, n, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, n)
        if rows is None:
            yield np.arange(start, stop), vectors[start:stop]
        else:
            yield rows[start:stop], vectors[rows[start:stop]]


def graph_top_k(
    graph: VectorIndex,
    vectors: Vectors,
    queries: Vectors,
    k: int,
    *,
    mask: NDArray[np.bool_] | None = None,
    exclude: Exclude | None = None,
) -> tuple[Rows, Vectors] | None:
    """The nearest of what the graph proposes, re-ranked by the vectors themselves.

    Asks for more until every query has ``k`` rows that the mask lets through.

    Args:
        graph: The graph over ``vectors``.
        vectors: Unit vectors, float32, shape ``(n, dim)``.
        queries: Unit vectors, float32, shape ``(m, dim)``.
        k: Neighbours of each.
        mask: Which rows may be answered, shape ``(n,)``; at least one.
        exclude: For each query the rows to leave out.

    Returns:
        As :func:`exact_top_k`; ``None`` when that would be the better way.
    """
    n = len(vectors)
    allowed = n if mask is None else int(np.count_nonzero(mask))
    q_out, rows_out = _pairs(exclude)
    most_out = int(np.bincount(q_out, minlength=1).max())
    count = (max(MIN_CANDIDATES, OVERFETCH * k) + most_out) * n // max(allowed, 1)
    while count <= MAX_CANDIDATES:
        q, rows = graph.candidates(queries, min(count, n))
        keep = ~np.isin(q * n + rows, q_out * n + rows_out)
        if mask is not None:
            keep &= mask[rows]
        enough = np.bincount(q[keep], minlength=len(queries)) >= min(k, allowed - most_out)
        if enough.all() or count >= n:
            return best_pairs(vectors, queries, k, q[keep], rows[keep])
        count *= OVERFETCH
    return None


def best_pairs(
    vectors: Vectors, queries: Vectors, k: int, q: Rows, rows: Rows
) -> tuple[Rows, Vectors]:
    """The ``k`` best of the pairs (query, row) that are given, as :func:`exact_top_k`."""
    keys, best = _blank(len(queries), k)
    scores = pair_scores(queries, vectors, q, rows)
    order = np.lexsort((rows, -scores, q))
    q, rows, scores = q[order], rows[order], scores[order]
    place = np.arange(len(q)) - np.searchsorted(q, q)
    keep = place < k
    keys[q[keep], place[keep]] = rows[keep]
    best[q[keep], place[keep]] = scores[keep]
    return keys, best


def pair_scores(a: Vectors, b: Vectors, i: Rows, j: Rows) -> Vectors:
    """Cosines of ``a[i]`` with ``b[j]``: float32, shape ``(p,)``, computed in float64."""
    out = np.empty(len(i), np.float32)
    for start in range(0, len(i), _BLOCK_PAIRS):
        part = slice(start, start + _BLOCK_PAIRS)
        x, y = a[i[part]].astype(np.float64), b[j[part]].astype(np.float64)
        # Row sums, not a matrix product: equal rows then have equal scores wherever they are.
        length = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
        out[part] = np.clip((x * y).sum(axis=1) / length, -1.0, 1.0)
    return out


def _pairs(exclude: Exclude | None) -> tuple[Rows, Rows]:
    if exclude is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    q = np.repeat(np.arange(len(exclude)), [len(rows) for rows in exclude])
    return q, np.array([row for rows in exclude for row in rows], np.int64)


def _blank(m: int, k: int) -> tuple[Rows, Vectors]:
    return np.full((m, k), -1, np.int64), np.full((m, k), np.nan, np.float32)
