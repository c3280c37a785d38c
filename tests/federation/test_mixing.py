from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidetl.errors import UsageError
from slidetl.federation.mixing import check_matrix, full_graph, metropolis_weights, mix, ring, without

DIRECTED = np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]])


def networks(n: int) -> list[dict[str, NDArray[Any]]]:
    rng = np.random.default_rng(n)
    return [{"w": rng.normal(size=(4, 2)), "steps": np.array(number, np.int64)} for number in range(n)]


@given(n=st.integers(1, 9), kind=st.sampled_from([ring, full_graph]), data=st.data())
def test_a_doubly_stochastic_mix_keeps_the_mean_also_without_some_sites(
    n: int, kind: type, data: st.DataObject
) -> None:
    absent = data.draw(st.sets(st.integers(0, n - 1)))
    before = networks(n)
    matrix = without(kind(n), sorted(absent))
    np.testing.assert_allclose(matrix.sum(axis=0), 1)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    after = mix(before, matrix)
    mean = np.mean([network["w"] for network in before], axis=0)
    np.testing.assert_allclose(np.mean([network["w"] for network in after], axis=0), mean, atol=1e-12)
    for site in absent:
        np.testing.assert_array_equal(after[site]["w"], before[site]["w"])


@pytest.mark.parametrize(
    "matrix", [ring(6), full_graph(6), metropolis_weights(np.eye(6, k=1) + np.eye(6, k=-1))]
)
def test_repeated_mixing_goes_to_the_mean(matrix: NDArray[np.float64]) -> None:
    state = networks(6)
    mean = np.mean([network["w"] for network in state], axis=0)
    for _ in range(400):
        state = list(mix(state, matrix))
    for network in state:
        np.testing.assert_allclose(network["w"], mean, atol=1e-9)


def test_a_ring_gives_a_third_to_each_neighbour() -> None:
    expected = [[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]
    np.testing.assert_allclose(ring(4), np.array(expected) / 3)
    np.testing.assert_allclose(ring(2), [[0.5, 0.5], [0.5, 0.5]])


def test_metropolis_weights_are_those_of_xiao_and_boyd() -> None:
    star = metropolis_weights([[0, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(star[0], [0.25] * 4)
    np.testing.assert_allclose(star[1], [0.25, 0.75, 0, 0])


def test_a_directed_ring_without_a_site_is_still_doubly_stochastic() -> None:
    matrix = without(check_matrix(DIRECTED, 3), [1])
    np.testing.assert_allclose(matrix, np.array([[0.75, 0, 0.25], [0, 1, 0], [0.25, 0, 0.75]]))


def test_integers_take_the_middle_value_of_a_site_and_its_neighbours() -> None:
    mixed = mix(networks(5), ring(5))
    assert [int(network["steps"]) for network in mixed] == [1, 1, 2, 3, 3]
    assert mixed[0]["steps"].dtype == np.int64


def test_typed_shares_are_made_exact() -> None:
    found = check_matrix([[0.3333, 0.3333, 0.3333]] * 3, 3)
    np.testing.assert_allclose(found, np.full((3, 3), 1 / 3))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0]], r"must be \[3, 3\], not \[1, 1\]"),
        ([[1.5, -0.5, 0], [-0.5, 1.5, 0], [0, 0, 1]], "finite and at least 0"),
        ([[float("nan")] * 3] * 3, "finite and at least 0"),
        ([[0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]], "columns of a mixing matrix must sum to 1"),
        ([[0.5, 0.2, 0], [0.5, 0.3, 0.5], [0, 0.5, 0.5]], "rows of a mixing matrix must sum to 1"),
        (np.eye(3), "bring all sites together"),
        ([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], "bring all sites together"),
        ([[0, 1, 0], [0, 0, 1], [1, 0, 0]], "bring all sites together"),
    ],
)
def test_a_matrix_that_does_not_mix_is_refused(matrix: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_matrix(matrix, 3)  # type: ignore[arg-type]  # lists of the cases


def test_a_graph_must_be_symmetric_and_connected() -> None:
    with pytest.raises(UsageError, match="square and symmetric"):
        metropolis_weights([[0, 1], [0, 0]])
    with pytest.raises(UsageError, match="bring all sites together"):
        metropolis_weights(np.zeros((3, 3)))
