"""Measures with values that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.indexes import directions, named, published, random_units
from toolkit.index.nearest import exact_top_k
from toolkit.index.quality import (
    graph_recall,
    label_precision,
    measure_recall,
    neighbour_overlap,
    recall_at_k,
    sample_rows,
)
from toolkit.index.vector_index import VectorIndex


def test_recall_is_the_share_of_true_neighbours() -> None:
    found = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    exact = np.array([[4, 3, 2, 9], [1, 2, 3, 5]])

    # 3 of 4, whatever their order, and 1 of 4.
    assert recall_at_k(found, exact) == 0.5


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (0, 2)])
def test_recall_of_nothing_or_of_other_shapes_is_refused(shape: tuple[int, int]) -> None:
    exact = np.zeros((0, 2) if 0 in shape else (1, 2), np.int64)

    with pytest.raises(ValueError, match="one shape"):
        recall_at_k(np.zeros(shape, np.int64), exact)


def test_recall_measures_the_graph_not_the_exact_shortcut() -> None:
    # The graph is over other vectors: what it proposes has nothing to do with the truth.
    vectors, others = random_units(1000, 8), random_units(1000, 8, seed=1)
    graph = VectorIndex.create(8, "f32")
    graph.add(np.arange(1000), others, threads=1)

    assert graph_recall(graph, vectors) < 0.5


def test_recall_of_a_sound_index_is_high_and_repeatable(tmp_path: Path) -> None:
    index = published(tmp_path, named(random_units(1000, 8)), dim=8)

    first, second = measure_recall(index, sample=50), measure_recall(index, sample=50)

    assert first == second
    assert first > 0.99


def test_recall_of_few_rows(tmp_path: Path) -> None:
    one = published(tmp_path / "one", named(directions(0)))
    three = published(tmp_path / "three", named(directions(0, 10, 20)))

    assert measure_recall(one) == 1.0
    assert measure_recall(three) == 1.0


def test_exact_neighbours_leave_the_row_itself_out() -> None:
    vectors = directions(0, 1, 3, 90)

    keys, _ = exact_top_k(vectors, vectors, 1, exclude=np.arange(4)[:, None])

    assert keys.ravel().tolist() == [1, 0, 1, 2]


def test_label_precision_by_hand() -> None:
    # Nearest others: 0→1, 1→0, 3→1, 90→3; only the first two share their label.
    vectors, labels = directions(0, 1, 3, 90), ["a", "a", "b", "a"]

    assert label_precision(vectors, labels) == 0.5
    # With every other row as neighbour: a 2 of 3, a 2 of 3, b none, a 2 of 3.
    assert label_precision(vectors, labels, k=99) == pytest.approx(0.5)


def test_rows_without_a_label_are_left_out() -> None:
    # The unlabelled row at 1 degree would be everybody's nearest.
    vectors, labels = directions(0, 1, 2, 5), ["a", None, "a", ""]

    assert label_precision(vectors, labels) == 1.0
    with pytest.raises(ValueError, match="1 of 2 rows"):
        label_precision(vectors[:2], labels[:2])


def test_overlap_of_two_encoders_by_hand() -> None:
    # Nearest others: 0→1, 1→0, 3→1 against 0→1, 1→2, 2→1 (rows 0, 20, 21 degrees).
    a, b = directions(0, 1, 3), directions(0, 20, 21)

    assert neighbour_overlap(a, a, k=1) == 1.0
    assert neighbour_overlap(a, b, k=1) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="3 rows against 2"):
        neighbour_overlap(a, b[:2])


def test_samples_repeat_and_have_no_twins() -> None:
    rows = sample_rows(1000, 50, seed=3)

    assert len(np.unique(rows)) == 50
    assert rows.tolist() == sorted(rows.tolist()) == sample_rows(1000, 50, seed=3).tolist()
    assert sample_rows(4, 50, seed=3).tolist() == [0, 1, 2, 3]
