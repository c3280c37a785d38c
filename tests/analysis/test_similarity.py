from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidetl.analysis import similarity
from slidetl.analysis.similarity import Similarity, linear_cka, merge_layers, pwcca, rbf_cka, svcca
from slidetl.errors import UsageError

Array = NDArray[np.float64]
Measure = Callable[..., Similarity]

MEASURES: dict[str, Measure] = {
    "svcca": lambda x, y: svcca(x, y, permutations=1),
    "svcca whole": lambda x, y: svcca(x, y, variance_kept=1, permutations=1),
    "pwcca": lambda x, y: pwcca(x, y, permutations=1),
    "linear cka": lambda x, y: linear_cka(x, y, permutations=1),
    "linear cka biased": lambda x, y: linear_cka(x, y, unbiased=False, permutations=1),
    "rbf cka": lambda x, y: rbf_cka(x, y, permutations=1),
    "rbf cka biased": lambda x, y: rbf_cka(x, y, unbiased=False, permutations=1),
}


def draw(seed: int, n: int = 60, columns: int = 5, shared: int = 2) -> tuple[Array, Array]:
    """Two representations that have some directions nearly in common, off the origin, of uneven scale."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, shared))
    noise = rng.normal(size=(2, n, columns))
    noise[:, :, :shared] = common + noise[:, :, :shared] * np.linspace(0.1, 0.4, shared)
    mixed = [part @ rng.normal(size=(columns, columns)) * rng.uniform(0.5, 2, columns) for part in noise]
    return mixed[0] + rng.normal(size=columns), mixed[1] + 3


def rotation(columns: int, seed: int) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(columns, columns)))[0]


@pytest.mark.parametrize("name", MEASURES)
def test_a_representation_is_like_itself_and_unlike_noise(name: str) -> None:
    x, y = draw(0, n=500)
    itself = MEASURES[name](x, x)
    assert itself.value == pytest.approx(1, abs=1e-9)
    assert itself.noise_floor < 0.5
    half = MEASURES[name](x, y)
    assert half.noise_floor_highest < half.value < 1


@pytest.mark.parametrize("name", MEASURES)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3))
def test_every_measure_ignores_rotation_scale_and_shift(name: str, seed: int, scale: float) -> None:
    x, y = draw(seed)
    turned = scale * y @ rotation(y.shape[1], seed) + 7
    before, after = MEASURES[name](x, y), MEASURES[name](x, turned)
    assert after.value == pytest.approx(before.value, abs=1e-6)
    assert after.noise_floor == pytest.approx(before.noise_floor, abs=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
@example(seed=4283)  # a condition number of 1e6, which covariances square
def test_cca_ignores_every_invertible_map_and_cka_does_not(seed: int) -> None:
    x, y = draw(seed)
    rng = np.random.default_rng(seed)
    stretch = np.diag([1, 3, 10, 30, 100.0]) @ rotation(5, seed)
    mapped = y @ stretch + rng.normal(size=5)
    for name in ("svcca whole", "pwcca"):
        assert MEASURES[name](x, mapped).value == pytest.approx(MEASURES[name](x, y).value, abs=1e-6)
    assert svcca(x @ stretch, y, 1.0).value == pytest.approx(svcca(x, y, 1.0).value, abs=1e-6)
    even = rng.normal(size=(60, 5))
    assert linear_cka(even, even @ stretch).value < 0.8
    assert rbf_cka(even, even @ stretch).value < 0.8


def test_pwcca_weighs_by_the_first_array_alone() -> None:
    x, y = draw(3)
    assert pwcca(5 * x[:, ::-1], y).value == pytest.approx(pwcca(x, y).value, abs=1e-9)
    assert abs(pwcca(x * [1, 1, 1, 1, 50], y).value - pwcca(x, y).value) > 1e-3
    assert abs(pwcca(y, x).value - pwcca(x, y).value) > 1e-4


def canonical_by_qr(x: Array, y: Array) -> tuple[Array, Array]:
    """Correlations and canonical variates of x by the method of Bjorck and Golub: no covariance is made."""
    q_x, q_y = (np.linalg.qr(part - part.mean(0))[0] for part in (x, y))
    left, correlations, _ = np.linalg.svd(q_x.T @ q_y)
    return correlations, q_x @ left


def test_cca_agrees_with_an_independent_method() -> None:
    x, y = draw(1)
    correlations, variates = canonical_by_qr(x, y)
    assert correlations[1] > 0.8 > correlations[2]  # two directions in common
    assert svcca(x, y, 1.0).value == pytest.approx(correlations.mean(), abs=1e-9)
    weights = np.abs(variates.T @ (x - x.mean(0))).sum(1)
    assert pwcca(x, y).value == pytest.approx(weights @ correlations / weights.sum(), abs=1e-9)
    # The angles between the two subspaces, as SciPy finds them.
    angles = scipy.linalg.subspace_angles(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(np.sort(np.cos(angles)), np.sort(correlations), atol=1e-9)


def test_pwcca_of_a_case_with_a_known_answer() -> None:
    # Orthonormal columns, of which y shares the first; the second is orthogonal to all of y.
    basis = scipy.linalg.hadamard(8)[:, 1:5].astype(float)  # centred, orthogonal
    x = basis[:, :2] * [3, 1]
    y = basis[:, [0, 2]]
    assert svcca(x, y, 1.0).value == pytest.approx(1 / 2)
    assert pwcca(x, y).value == pytest.approx(3 / 4)  # weights 3 and 1, correlations 1 and 0
    # ||X'Y||^2 = (3 * 8)^2; ||X'X|| = 8 sqrt(81 + 1); ||Y'Y|| = 8 sqrt(2).
    assert linear_cka(x, y, unbiased=False).value == pytest.approx(9 / np.sqrt(82 * 2))


def test_svcca_keeps_the_directions_that_hold_the_share() -> None:
    basis = scipy.linalg.hadamard(16)[:, 1:9].astype(float)
    x = basis[:, :3] * np.sqrt([90, 8, 2])  # shares of the variance in per cent
    y = basis[:, [0, 1, 5]] * np.sqrt([90, 8, 2])
    assert svcca(x, y, 0.9).value == pytest.approx(1)  # one direction each
    assert svcca(x, y, 0.98).value == pytest.approx(1)  # two
    assert svcca(x, y, 0.99).value == pytest.approx(2 / 3)  # three, of which two in common


def gram_cka(k: Array, m: Array, unbiased: bool) -> float:
    """The definitions as they stand in the papers, over whole kernel matrices."""
    n = len(k)
    centring = np.eye(n) - 1 / n

    def criterion(a: Array, b: Array) -> float:
        if not unbiased:
            return float(np.trace(a @ centring @ b @ centring))
        a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
        ones = np.ones(n)
        first = np.trace(a @ b) + (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
        return float(first - 2 / (n - 2) * (ones @ a @ b @ ones))

    return float(criterion(k, m) / np.sqrt(criterion(k, k) * criterion(m, m)))


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_agrees_with_the_definition_over_whole_matrices(unbiased: bool) -> None:
    x, y = draw(2, n=40)
    assert linear_cka(x, y, unbiased).value == pytest.approx(gram_cka(x @ x.T, y @ y.T, unbiased), abs=1e-9)
    kernels = []
    for part in (x, y):
        distances = np.linalg.norm(part[:, None] - part, axis=2)
        median = np.median([distances[i, j] for i, j in itertools.combinations(range(len(part)), 2)])
        kernels.append(np.exp(-(distances**2) / (2 * (0.5 * median) ** 2)))
    expected = gram_cka(kernels[0], kernels[1], unbiased)
    assert rbf_cka(x, y, 0.5, unbiased).value == pytest.approx(expected, abs=1e-9)


def test_the_unbiased_estimate_averages_over_subsets_to_itself() -> None:
    # A U-statistic over all tiles is the mean of those over every subset of four.
    x, y = draw(4, n=7, columns=2, shared=1)

    def numerator(rows: list[int]) -> float:
        k, m = x[rows] @ x[rows].T, y[rows] @ y[rows].T
        n = len(rows)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        total = float((k * m).sum()) + k.sum() * m.sum() / ((n - 1) * (n - 2))
        return float((total - 2 / (n - 2) * (k.sum(0) @ m.sum(0))) / (n * (n - 3)))

    subsets = [numerator(list(rows)) for rows in itertools.combinations(range(7), 4)]
    assert np.mean(subsets) == pytest.approx(numerator(list(range(7))))


@pytest.mark.parametrize("name", MEASURES)
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(5, n=50)
    whole = MEASURES[name](x, y)
    monkeypatch.setattr(similarity, "_blocks", lambda n, start=0: _slices(n, start, 16))
    monkeypatch.setattr(similarity, "_ROWS_KEPT", 10)  # no kernel matrix is kept
    blocked = MEASURES[name](x, y)
    assert blocked.value == pytest.approx(whole.value, abs=1e-9)
    assert blocked.noise_floor == pytest.approx(whole.noise_floor, abs=1e-9)


def _slices(n: int, start: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, n)) for first in range(start, n, size)]


def test_the_noise_floor_is_the_figure_of_shuffled_rows() -> None:
    x, y = draw(6)
    rng = np.random.default_rng(9)
    orders = [rng.permutation(len(x)) for _ in range(3)]
    measures: tuple[Measure, ...] = (svcca, pwcca, linear_cka, rbf_cka)
    for measure in measures:
        found = measure(x, y, permutations=3, seed=9)
        by_hand = [measure(x, y[order]).value for order in orders]
        assert found.noise_floor == pytest.approx(np.mean(by_hand), abs=1e-9)
        assert found.noise_floor_highest == pytest.approx(max(by_hand), abs=1e-9)
        assert found.permutations == 3


@pytest.mark.parametrize("n", [200, 500, 2000])
def test_the_floor_of_cca_is_high_where_rows_are_few_and_that_of_unbiased_cka_is_zero(n: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 64)), rng.normal(size=(n, 64))
    found = svcca(x, y, 1.0, permutations=3)
    # Of independent normal variables the squared correlations average D / (n - 1); hence.
    root_mean_square = np.sqrt(64 / (n - 1))
    assert 0.8 * root_mean_square < found.noise_floor < root_mean_square
    assert found.value == pytest.approx(found.noise_floor, abs=0.02)
    assert abs(linear_cka(x, y).noise_floor) < 0.01
    assert linear_cka(x, y, unbiased=False).noise_floor == pytest.approx(64 / (n + 64), rel=0.1)


def test_lower_precision_and_memory_maps_give_the_same(tmp_path: Path) -> None:
    x, y = draw(7)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for measure in MEASURES.values():
        single = measure(mapped, y.astype(np.float32)).value
        assert single == pytest.approx(measure(x, y).value, abs=1e-5)
        # The mean must go before anything is squared.
        assert measure(x + 1e6, y).value == pytest.approx(measure(x, y).value, abs=1e-6)


def test_a_constant_representation_is_like_nothing() -> None:
    x, _ = draw(8)
    constant = np.full((len(x), 3), 0.1, np.float32)
    for name, measure in MEASURES.items():
        assert np.isnan(measure(x, constant).value), name
        assert np.isnan(measure(constant, x).value), name


def test_dead_columns_and_more_columns_than_rows_do_no_harm() -> None:
    x, y = draw(9)
    dead = np.hstack([x, np.zeros((len(x), 3)), x[:, :1]])
    for measure in MEASURES.values():
        assert measure(dead, dead).value == pytest.approx(1, abs=1e-6)
    assert svcca(dead, y, 1.0).value == pytest.approx(svcca(x, y, 1.0).value, abs=1e-6)
    wide = np.random.default_rng(0).normal(size=(20, 64))
    found = svcca(wide, wide[::-1], 1.0)
    assert found.value == pytest.approx(1) and found.noise_floor == pytest.approx(1)  # and the floor says so


def test_what_cannot_be_meant_is_refused() -> None:
    x, y = draw(0)
    for call, said in (
        (
            lambda: svcca(x, y[:-1]),
            r"of the same tiles, at least 4, found the shapes \(60, 5\) and \(59, 5\)",
        ),
        (lambda: linear_cka(x[:3], y[:3]), "at least 4"),
        (lambda: pwcca(x[0], y[0]), r"expected two arrays \[n, D\]"),
        (
            lambda: rbf_cka(x, np.where(y > 4, np.nan, y)),
            "the second array holds numbers that are not finite",
        ),
        (lambda: svcca(x, y, 0), "variance_kept must be above 0"),
        (lambda: rbf_cka(x, y, 0), "bandwidth must be above 0"),
        (lambda: pwcca(x, y, permutations=0), "permutations must be at least 1"),
    ):
        with pytest.raises(UsageError, match=said):
            call()


@pytest.mark.parametrize(
    ("orders", "merged"),
    [
        (["abde", "abcde"], "abcde"),
        (["abde", "bxydz"], "abxydze"),
        (["cd", "abc"], "abcd"),  # without a predecessor: before the successor
        (["ae", "be", "ce"], "abce"),
        (["ab", "xy"], "abxy"),  # networks without a common layer
        (["ab", ""], "ab"),
    ],
)
def test_layers_of_several_networks_keep_the_order_of_each(orders: list[str], merged: str) -> None:
    assert "".join(merge_layers(orders)) == merged
    assert merge_layers([*orders, *orders]) == list(merged)
