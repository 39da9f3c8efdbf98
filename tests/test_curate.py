"""Pairs that look the same, and the map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.indexes import directions, named, published, random_units
from toolkit.errors import QueryError
from toolkit.index.curate import exact_pairs, graph_pairs, near_duplicates, project


def test_each_near_pair_stands_once_with_its_cosine(tmp_path: Path) -> None:
    index = published(tmp_path, named(directions(0, 90, 5, 91)))

    i, j, score = near_duplicates(index, np.cos(np.radians(6)))

    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 2), (1, 3)]
    np.testing.assert_allclose(score, np.cos(np.radians([5, 1])), atol=1e-6)


def test_a_pair_at_the_threshold_counts(tmp_path: Path) -> None:
    index = published(tmp_path, named(directions(0, 0, 90)))

    i, j, score = near_duplicates(index, 1.0)

    assert (i.tolist(), j.tolist(), score.tolist()) == ([0], [1], [1.0])


def test_pairs_across_blocks_are_found(tmp_path: Path) -> None:
    # 2048 rows are compared at once; the twins lie in different blocks, and in one.
    vectors = random_units(4200, 16)
    vectors[4100], vectors[4150] = vectors[3], vectors[2500]
    vectors[2501] = vectors[2500]
    index = published(tmp_path, named(vectors), dim=16)

    i, j, _ = near_duplicates(index, 0.9999)

    expected = [(3, 4100), (2500, 2501), (2500, 4150), (2501, 4150)]
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected


def test_pairs_between_two_indexes(tmp_path: Path) -> None:
    a = published(tmp_path / "a", named(directions(0, 45)))
    b = published(tmp_path / "b", named(directions(46, 90, 0)))

    i, j, _ = near_duplicates(a, 0.99, b)

    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 2), (1, 0)]


def test_no_pairs_are_three_empty_arrays(tmp_path: Path) -> None:
    index = published(tmp_path, named(directions(0, 90)))

    found = near_duplicates(index, 0.5)

    assert [len(column) for column in found] == [0, 0, 0]


def test_the_graph_finds_the_pairs_that_comparing_finds(tmp_path: Path) -> None:
    # 40 twins of one row are more than the graph is asked for at first.
    vectors = random_units(2000, 16)
    vectors[100:140] = vectors[7]
    vectors[1999] = vectors[0]
    index = published(tmp_path, named(vectors), dim=16)

    pairs = [
        {
            (i, j)
            for rows, others in found
            for i, j in zip(rows.tolist(), others.tolist(), strict=True)
        }
        for found in (
            exact_pairs(vectors, vectors, 0.9999, within=True),
            graph_pairs(vectors, index, 0.9999, within=True),
        )
    ]

    assert len(pairs[0]) == 41 * 40 // 2 + 1
    assert pairs[1] == pairs[0]


def test_the_graph_finds_pairs_between_indexes(tmp_path: Path) -> None:
    index = published(tmp_path, named(directions(90, 46, 0)))

    found = list(graph_pairs(directions(0, 45), index, 0.99, within=False))

    pairs = {(int(i), int(j)) for rows, others in found for i, j in zip(rows, others, strict=True)}
    assert pairs == {(0, 2), (1, 1)}


def test_a_threshold_that_nearly_all_pairs_pass_is_refused(tmp_path: Path) -> None:
    # 3,200 equal rows have 5,118,400 pairs.
    index = published(tmp_path, named(directions(*[0] * 3200)))

    with pytest.raises(QueryError, match="choose a higher threshold"):
        near_duplicates(index, 0.5)


def test_the_map_keeps_the_directions_that_differ_most() -> None:
    # Spread 4 along the third axis, 2 along the first, nothing along the second.
    vectors = np.array([[2, 0, 0], [-2, 0, 0], [0, 0, 4], [0, 0, -4]], np.float32)

    rows, xy = project(vectors)

    assert rows.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(xy, [[0, 2], [0, -2], [4, 0], [-4, 0]], atol=1e-6)


def test_the_map_of_a_sample_repeats() -> None:
    vectors = random_units(500, 8)

    (rows, xy), (again, _) = project(vectors, sample=50, seed=1), project(vectors, 50, 1)

    assert len(rows) == len(np.unique(rows)) == 50
    assert rows.tolist() == again.tolist()
    assert xy.shape == (50, 2)
    assert project(vectors[:0])[1].shape == (0, 2)
