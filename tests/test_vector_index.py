"""The graph and the searches over it: right rows, right order, and the truth about both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.indexes import Vectors, directions, named, published, random_units
from toolkit.errors import DamagedIndexError, EncoderMismatchError, QueryError
from toolkit.index.nearest import exact_top_k, graph_top_k
from toolkit.index.vector_index import EXPANSION, VectorIndex
from toolkit.index.version import EXACT_ROWS, IndexVersion


def graph_of(vectors: Vectors, dtype: str = "f32") -> VectorIndex:
    graph = VectorIndex.create(vectors.shape[1], dtype)
    graph.add(np.arange(len(vectors)), vectors, threads=1)
    return graph


@pytest.fixture
def compass(tmp_path: Path) -> IndexVersion:
    """Rows at 0, 90, 180 and 270 degrees."""
    return published(tmp_path, named(directions(0, 90, 180, 270)))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> IndexVersion:
    """More rows than are compared exactly; 3-d, so that the graph is made in seconds."""
    vectors = random_units(EXACT_ROWS + 5000, 3)
    return published(tmp_path_factory.mktemp("large"), named(vectors), dim=3, threads=2)


def test_nearest_rows_come_first_with_their_cosines(compass: IndexVersion) -> None:
    queries = directions(60) * 5  # the length of a query does not matter

    found = compass.search(queries, k=4)

    assert found.keys.tolist() == [[1, 0, 2, 3]]
    cosines = np.cos(np.radians([30, 60, 120, 150]))
    np.testing.assert_allclose(found.scores[0], cosines, atol=1e-6)
    assert found.exact


def test_equal_rows_come_in_the_order_of_their_keys(tmp_path: Path) -> None:
    # 100 equal rows around one that is nearer; more ties than any slack would hold.
    angles = [30.0] * 50 + [10.0] + [30.0] * 50
    index = published(tmp_path, named(directions(*angles)))

    found = index.search(directions(0), k=5)

    assert found.keys.tolist() == [[50, 0, 1, 2, 3]]


def test_more_rows_wanted_than_there_are(compass: IndexVersion) -> None:
    found = compass.search(directions(0, 90), k=6)

    assert found.keys[:, 4:].tolist() == [[-1, -1], [-1, -1]]
    assert np.isnan(found.scores[:, 4:]).all()
    assert sorted(found.keys[1, :4].tolist()) == [0, 1, 2, 3]


def test_no_queries_give_no_answers(compass: IndexVersion) -> None:
    found = compass.search(np.empty((0, 2), np.float32), k=3)

    assert found.keys.shape == found.scores.shape == (0, 3)


def test_masked_rows_never_come(compass: IndexVersion) -> None:
    mask = np.array([False, True, True, False])

    found = compass.search(directions(10), k=3, mask=mask)

    assert found.keys.tolist() == [[1, 2, -1]]


def test_each_query_leaves_out_its_own_rows(compass: IndexVersion) -> None:
    found = compass.search(directions(1, 91), k=1, exclude=[[0], [1, 2]])

    assert found.keys.tolist() == [[1], [0]]


@pytest.mark.parametrize("bad", [[[0.0, 0.0]], [[np.nan, 1.0]], [[np.inf, 1.0]]])
def test_a_query_without_direction_is_refused(
    compass: IndexVersion, bad: list[list[float]]
) -> None:
    queries = np.array([[1.0, 0.0], *bad], np.float32)

    with pytest.raises(QueryError, match="query 1 is zero or not finite"):
        compass.search(queries, k=1)


def test_a_query_of_another_length_is_another_encoders(compass: IndexVersion) -> None:
    with pytest.raises(EncoderMismatchError, match="2-d"):
        compass.search(np.ones((1, 3), np.float32), k=1)


def test_wrong_k_and_wrong_masks_are_refused(compass: IndexVersion) -> None:
    with pytest.raises(QueryError, match="k=0"):
        compass.search(directions(0), k=0)
    with pytest.raises(QueryError, match="4 rows"):
        compass.search(directions(0), k=1, mask=np.ones(3, np.bool_))
    with pytest.raises(QueryError, match="int64"):
        compass.search(directions(0), k=1, mask=np.ones(4, np.int64))


def test_exact_answers_do_not_depend_on_blocks() -> None:
    # Two blocks of rows, and two of queries.
    vectors = random_units(9000, 8)
    queries = random_units(300, 8, seed=1)

    keys, scores = exact_top_k(vectors, queries, 3)

    wide = queries.astype(np.float64) @ vectors.astype(np.float64).T
    np.testing.assert_array_equal(keys, np.argsort(-wide, axis=1)[:, :3])
    np.testing.assert_allclose(scores, -np.sort(-wide, axis=1)[:, :3], atol=1e-6)


def test_exact_search_within_some_rows_only() -> None:
    vectors = directions(0, 10, 20, 30)

    keys, _ = exact_top_k(vectors, directions(0), 2, rows=np.array([1, 3]), exclude=[[1, 2]])

    assert keys.tolist() == [[3, -1]]


@pytest.mark.slow
def test_large_indexes_are_searched_by_the_graph(large: IndexVersion) -> None:
    queries = np.asarray(large.vectors[[5, 7000]])

    found = large.search(queries, k=10)

    exact, _ = exact_top_k(large.vectors, queries, 10)
    assert not found.exact
    assert found.keys[:, 0].tolist() == [5, 7000]
    assert np.isin(found.keys, exact).mean() >= 0.9


@pytest.mark.slow
def test_narrow_masks_on_large_indexes_are_exact(large: IndexVersion) -> None:
    mask = np.zeros(large.n, np.bool_)
    mask[40_000:40_500] = True

    found = large.search(large.vectors[:2], k=5, mask=mask)

    exact, _ = exact_top_k(large.vectors[mask], large.vectors[:2], 5)
    assert found.exact
    assert (found.keys - 40_000).tolist() == exact.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("n_hidden", "exact"), [(2, False), (600, False), (4900, True)])
def test_masks_that_hide_the_nearest(large: IndexVersion, n_hidden: int, exact: bool) -> None:
    # The graph proposes the hidden rows first: it has to be asked for more, or given up.
    query = np.asarray(large.vectors[[9]])
    nearest, _ = exact_top_k(large.vectors, query, n_hidden + 2)
    mask = np.ones(large.n, np.bool_)
    mask[nearest[0, :n_hidden]] = False

    found = large.search(query, k=2, mask=mask)

    assert found.keys.tolist() == [nearest[0, n_hidden:].tolist()]
    assert found.exact is exact


def test_a_single_row_can_be_found(tmp_path: Path) -> None:
    index = published(tmp_path, named(directions(45)))

    q, rows = index.graph.candidates(directions(0), 10)
    found = index.search(directions(0), k=1)

    assert (q.tolist(), rows.tolist()) == ([0], [0])
    assert found.keys.tolist() == [[0]]


def test_the_graph_never_pads_with_row_0() -> None:
    graph = graph_of(directions(0, 90, 180))
    graph.remove(np.array([0]))

    q, rows = graph.candidates(directions(0, 0), 10)

    assert sorted(zip(q.tolist(), rows.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_re_ranking_mends_a_coarse_graph() -> None:
    vectors = random_units(3000, 16)
    coarse = graph_of(vectors, "i8")
    queries = random_units(50, 16, seed=1)

    found = graph_top_k(coarse, vectors, queries, 10)

    exact, _ = exact_top_k(vectors, queries, 10)
    q, proposed = coarse.candidates(queries, 10)
    alone = np.mean([np.isin(exact[i], proposed[q == i]).mean() for i in range(50)])
    assert found is not None
    re_ranked = np.mean([np.isin(e, f).mean() for e, f in zip(exact, found[0], strict=True)])
    assert alone < re_ranked
    assert re_ranked > 0.99


def test_rows_can_swap_their_numbers() -> None:
    graph = graph_of(directions(0, 90, 180))

    graph.renumber(np.array([0, 1, 2]), np.array([1, 0, 2]))

    _, rows = graph.candidates(directions(0, 90, 180), 1)
    assert rows.tolist() == [1, 0, 2]


@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_graph_is_named(tmp_path: Path, view: bool, damage: str) -> None:
    file = tmp_path / "graph.usearch"
    graph_of(random_units(100, 8)).save(file)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else 2000])

    with pytest.raises(DamagedIndexError, match=r"graph\.usearch"):
        VectorIndex.open(file, view=view)


def test_a_graph_that_is_opened_looks_around_widely(tmp_path: Path) -> None:
    VectorIndex.create(4, "f32").save(tmp_path / "graph")
    for view in (True, False):
        assert VectorIndex.open(tmp_path / "graph", view=view).raw.expansion_search == EXPANSION
