from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import MeanShift
from sklearn.metrics import adjusted_rand_score

from slidetl.analysis.clusters import (
    Kernel,
    _Field,
    _ShellField,
    bandwidth_of,
    hdbscan,
    k_means,
    mean_shift,
    principal_components,
)
from slidetl.errors import UsageError


def drawn(
    sizes: tuple[int, ...] = (400, 200, 60, 20), dimensions: int = 6, seed: int = 0, spread: float = 4.0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Clusters of unequal size and density, far from the origin."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    centres = spread * rng.normal(size=(len(sizes), dimensions)) + 30
    width = np.linspace(0.6, 1.2, len(sizes))
    return centres[truth] + width[truth, None] * rng.normal(size=(len(truth), dimensions)), truth


@pytest.mark.parametrize("bandwidth", [1.2, 2.5, 6.0])
@pytest.mark.parametrize("cluster_all", [True, False])
@pytest.mark.parametrize("spread", [100, 10**9])  # points above which they are sorted into shells
def test_flat_kernel_equals_scikit_learn_from_the_same_seeds(
    bandwidth: float, cluster_all: bool, spread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidetl.analysis.clusters._SPREAD", spread)
    points, _ = drawn()
    seeds = points[::7]
    ours = mean_shift(points, bandwidth, seeds=seeds, cluster_all=cluster_all)
    theirs = MeanShift(bandwidth=bandwidth, seeds=seeds, cluster_all=cluster_all).fit(points)
    assert len(ours.centres) == len(np.unique(theirs.labels_[theirs.labels_ >= 0]))
    assert adjusted_rand_score(ours.labels, theirs.labels_) == 1
    np.testing.assert_array_equal(ours.labels < 0, theirs.labels_ < 0)
    mine = ours.centres[np.lexsort(ours.centres.T)]
    used = theirs.cluster_centers_[np.unique(theirs.labels_[theirs.labels_ >= 0])]
    np.testing.assert_allclose(mine, used[np.lexsort(used.T)], rtol=1e-9)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.floats(0.3, 30), st.floats(0, 50))
def test_shells_leave_no_point_out(seed: int, bandwidth: float, away: float) -> None:
    rng = np.random.default_rng(seed)
    points = drawn((300, 90, 30))[0] + away * rng.normal(size=6)
    places = torch.from_numpy(rng.permutation(points)[:150] + rng.normal(size=(150, 6)))
    every = _Field.of(points, bandwidth, "flat", torch.device("cpu"))
    shells = _ShellField.of(points, bandwidth, "flat", torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slidetl.analysis.clusters._SPREAD", 200)
        patch.setattr("slidetl.analysis.clusters._FEW", 0)  # never all points
        shells.build(0)
        for one, other in zip(
            every.means(places - every.mean), shells.means(places - every.mean), strict=True
        ):
            np.testing.assert_allclose(other, one, atol=1e-9)
    for one, other in zip(every.assign(places[:7]), shells.assign(places[:7]), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-9)


def test_all_points_as_seeds_equal_scikit_learn() -> None:
    points, _ = drawn((150, 60, 20))
    ours, theirs = mean_shift(points, 2.5), MeanShift(bandwidth=2.5).fit(points)
    assert adjusted_rand_score(ours.labels, theirs.labels_) == 1


def test_float32_finds_the_same_groups_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = drawn()
    exact = mean_shift(points, 2.5, seeds=points[::7])
    single = mean_shift(points.astype(np.float32), 2.5, seeds=points[::7].astype(np.float32))
    assert adjusted_rand_score(exact.labels, single.labels) == 1
    np.testing.assert_allclose(single.centres, exact.centres, atol=1e-3)
    monkeypatch.setattr("slidetl.analysis.clusters._DISTANCES", 37 * 11)
    monkeypatch.setattr("slidetl.analysis.clusters._SEEDS", 11)
    blocks = mean_shift(points, 2.5, seeds=points[::7])
    np.testing.assert_array_equal(blocks.labels, exact.labels)
    np.testing.assert_allclose(blocks.centres, exact.centres)


def test_gaussian_kernel_climbs_to_the_modes_of_its_density() -> None:
    points, truth = drawn()
    found = mean_shift(points, 1.5, kernel="gaussian", seeds=100)
    assert adjusted_rand_score(found.labels, truth) > 0.99
    for centre in found.centres:  # at a mode the weighted mean is the mode: the step is zero
        weights = np.exp(-np.square(points - centre).sum(1) / (2 * 1.5**2))
        step = (weights[:, None] * points).sum(0) / weights.sum() - centre
        assert np.linalg.norm(step) < 2e-3 * 1.5


def test_a_k_below_the_size_of_clusters_splits_them_and_says_so() -> None:
    points, truth = drawn((900, 400, 150), dimensions=2, spread=8)
    enough = mean_shift(points, 0.8, neighbours=900, seeds=200)
    assert adjusted_rand_score(enough.labels, truth) > 0.95
    few = mean_shift(points, 0.8, neighbours=10, seeds=200)
    assert len(few.centres) > 3 * len(enough.centres)
    assert adjusted_rand_score(few.labels, truth) < 0.3
    assert few.cut is not None
    assert enough.cut == 0
    assert few.cut > 0.9


def test_neighbours_of_all_points_are_the_exact_variant() -> None:
    points, _ = drawn((80, 40))
    exact, near = mean_shift(points, 2.0), mean_shift(points, 2.0, neighbours=119)
    assert adjusted_rand_score(exact.labels, near.labels) == 1
    np.testing.assert_allclose(np.sort(exact.centres, 0), np.sort(near.centres, 0), atol=0.02)


def test_groups_are_numbered_by_size_and_small_modes_dropped() -> None:
    points, truth = drawn((30, 200, 100))
    found = mean_shift(points, 2.5)
    assert (np.diff(found.sizes) <= 0).all()
    assert found.sizes.sum() == len(points)
    assert (found.labels[truth == 1] == 0).mean() > 0.95
    assert len(mean_shift(points, 2.5, min_points=60).centres) < len(found.centres)


def test_bandwidth_is_the_quantile_of_distances_to_the_kth_neighbour() -> None:
    points, _ = drawn((120, 60))
    distances = np.sort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)[:, 5]
    assert bandwidth_of(points, 5, 0.3) == pytest.approx(np.quantile(distances, 0.3), rel=1e-6)


def test_principal_components_keep_distances_within_their_plane() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(300, 2)) @ rng.normal(size=(2, 12)) + 5
    projection = principal_components(plane, 2)
    assert projection.kept == pytest.approx(1)
    flat = projection(plane)
    np.testing.assert_allclose(
        np.linalg.norm(flat - flat[0], axis=1), np.linalg.norm(plane - plane[0], axis=1), rtol=1e-9
    )
    assert principal_components(plane, 1).kept < 1


def test_k_means_and_hdbscan_find_the_drawn_groups() -> None:
    points, truth = drawn((300, 200, 60), spread=8)
    assert adjusted_rand_score(k_means(points, 3).labels, truth) > 0.99
    dense = hdbscan(points, 20)
    assert adjusted_rand_score(dense.labels[dense.labels >= 0], truth[dense.labels >= 0]) > 0.99
    assert (np.diff(dense.sizes) <= 0).all()


@pytest.mark.parametrize("kernel", ["flat", "gaussian"])
def test_equal_points_are_one_group(kernel: Kernel) -> None:
    found = mean_shift(np.ones((40, 3)), 0.5, kernel=kernel)
    np.testing.assert_array_equal(found.labels, 0)
    np.testing.assert_allclose(found.centres, [[1, 1, 1]])


def test_bad_input_is_refused() -> None:
    points, _ = drawn((30, 20))
    broken = points.copy()
    broken[3, 1] = np.nan
    with pytest.raises(UsageError, match="finite"):
        mean_shift(broken, 1.0)
    for bandwidth in (0.0, -1.0, np.nan):
        with pytest.raises(UsageError, match="positive"):
            mean_shift(points, bandwidth)
    with pytest.raises(UsageError, match="widen it"):
        mean_shift(points, 1.0, seeds=points[:3] + 900)
    with pytest.raises(UsageError, match="1 to 50 clusters"):
        k_means(points, 51)
    with pytest.raises(UsageError, match="between 1 and 49"):
        bandwidth_of(points, 50)
    with pytest.raises(UsageError, match="give the bandwidth"):
        bandwidth_of(np.ones((30, 2)), 5)
