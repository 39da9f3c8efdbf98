"""How good an index and its vectors are, in numbers that can be worked out by hand.

Law: neighbours are by cosine and never the row itself; samples are seeded, so that the same
vectors give the same figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit.index.nearest import exact_top_k, graph_top_k
from toolkit.index.vector_index import VectorIndex
from toolkit.index.version import IndexVersion


def recall_at_k(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """Share of the true nearest neighbours that the index returned.

    Compares keys, so order inside a row does not count. Where several images tie for
    place k, the index may return another of them and score a miss.

    Args:
        found: Keys the index returned, shape ``(n_queries, k)``.
        exact: Keys of a brute-force search, shape ``(n_queries, k)``.

    Returns:
        Mean over the queries, in ``[0, 1]``.

    Raises:
        ValueError: If the shapes differ, or there is nothing to compare.

    References:
        Aumüller, Bernhardsson, Faithfull: ANN-Benchmarks, arXiv:1807.05614. There a hit
        is judged by distance, so ties count as hits.
    """
    if found.shape != exact.shape or not exact.size:
        raise ValueError(
            f"recall compares two tables of one shape with rows: found {found.shape}, "
            f"exact {exact.shape}"
        )
    hits = [np.isin(truth, row).mean() for row, truth in zip(found, exact, strict=True)]
    return float(np.mean(hits))


def measure_recall(version: IndexVersion, k: int = 10, sample: int = 200, seed: int = 0) -> float:
    """Recall of the graph and the re-ranking after it, on rows of the index itself.

    Never takes the exact shortcut of a search, so it says how good the graph is even where
    searches do not need it.

    Args:
        version: The index.
        k: Neighbours of each row; all others, where there are fewer.
        sample: Rows to query with, at most.
        seed: Of the sample.

    Returns:
        In ``[0, 1]``; 1.0 when no row has a neighbour.
    """
    return graph_recall(version.graph, version.vectors, k, sample, seed)


def graph_recall(
    graph: VectorIndex, vectors: NDArray[np.float32], k: int = 10, sample: int = 200, seed: int = 0
) -> float:
    """As :func:`measure_recall`, of a graph over ``vectors``, float32 ``(n, dim)``."""
    k = min(k, len(vectors) - 1)
    if k < 1:
        return 1.0
    rows = sample_rows(len(vectors), sample, seed)
    queries, own = vectors[rows], rows[:, None]
    found = graph_top_k(graph, vectors, queries, k, exclude=own)
    if found is None:  # so many neighbours that a search, too, compares with every row
        return 1.0
    return recall_at_k(found[0], exact_top_k(vectors, queries, k, exclude=own)[0])


def label_precision(
    vectors: NDArray[np.float32],
    labels: Sequence[str | None],
    k: int = 1,
    sample: int = 2000,
    seed: int = 0,
) -> float:
    """Leave-one-out precision at ``k``: the share of near rows that have the row's own label.

    Rows without a label are neither asked for nor counted as neighbours.

    Args:
        vectors: Unit vectors, float32, shape ``(n, dim)``.
        labels: Of each row; ``None`` or empty where there is none.
        k: Neighbours of each row; all others, where there are fewer.
        sample: Rows to query with, at most.
        seed: Of the sample.

    Raises:
        ValueError: If fewer than two rows have a label.
    """
    names = np.array([label or "" for label in labels])
    labelled = np.flatnonzero(names != "")
    if len(labelled) < 2:
        raise ValueError(f"{len(labelled)} of {len(names)} rows have a label; it takes 2 or more")
    rows = labelled[sample_rows(len(labelled), sample, seed)]
    k = min(k, len(labelled) - 1)
    near, _ = exact_top_k(vectors, vectors[rows], k, rows=labelled, exclude=rows[:, None])
    return float((names[near] == names[rows][:, None]).mean())


def neighbour_overlap(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    k: int = 10,
    sample: int = 1000,
    seed: int = 0,
) -> float:
    """Share of the ``k`` nearest that two encoders agree on, row by row.

    Args:
        a: Unit vectors of one encoder, float32, shape ``(n, dim_a)``.
        b: Unit vectors of the other for the same images, shape ``(n, dim_b)``.
        k: Neighbours of each row; all others, where there are fewer.
        sample: Rows to query with, at most.
        seed: Of the sample.

    Returns:
        In ``[0, 1]``: 1.0 when every row has the same neighbours under both.

    Raises:
        ValueError: If the numbers of rows differ, or are below 2.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} rows against {len(b)}: both need the same images, 2 or more")
    rows = sample_rows(len(a), sample, seed)
    k = min(k, len(a) - 1)
    near_a, near_b = (exact_top_k(v, v[rows], k, exclude=rows[:, None])[0] for v in (a, b))
    return recall_at_k(near_a, near_b)


def sample_rows(n: int, size: int, seed: int) -> NDArray[np.int64]:
    """Row numbers drawn without repeats, ascending; all of them where ``size`` allows."""
    if n <= size:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, size, replace=False))
