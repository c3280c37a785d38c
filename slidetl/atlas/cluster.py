"""Finds the recurring patterns of a collection, and how far they go with site and grade."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.analysis.clusters import (
    Clusters,
    bandwidth_of,
    hdbscan,
    k_means,
    mean_shift,
    principal_components,
)
from slidetl.atlas.collection import Collection
from slidetl.atlas.options import ClusterOptions
from slidetl.data.study import check_duplicates
from slidetl.errors import CacheMissingError, UsageError
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.composition import SiteShare, grade_correlation, site_share
from slidetl.evaluation.confounding import SiteByGrade, site_by_grade
from slidetl.models.precision import chosen_device
from slidetl.tiles.features import (
    FeatureSource,
    check_writable,
    feature_name,
    read_source,
    write_features,
)

_FITTED = 20_000  # tiles that fit the principal components
_CHECKED = 200  # seeds of the exact run beside the approximate one
_HDBSCAN_MOST = 50_000  # tiles; its time grows with their square
_BLOCK = "atlas"


@dataclass(frozen=True)
class Pattern:
    """A cluster and where it is found.

    Attributes:
        tiles: number of its tiles.
        share: of all tiles, 0..1.
        slides, patients: number of those that have it.
        site: the site with most of it; None for fewer than two sites.
        grade: correlation of its share in slides with their grade; without an interval for few patients; None
            if it cannot be told.
        by_site, by_grade: mean share in the slides of each, 0..1.
    """

    tiles: int
    share: float
    slides: int
    patients: int
    site: SiteShare | None
    grade: Interval | float | None
    by_site: dict[str, float]
    by_grade: dict[int, float]


@dataclass(frozen=True)
class Check:
    """The approximate clusters beside exact ones from some of the seeds.

    Attributes:
        neighbours: number of neighbours of the approximate variant.
        cut: share of its seeds that stopped with more points within the bandwidth.
        clusters, exact: number of clusters of each.
        rand: adjusted Rand index between them, 1 for the same.
        seeds: of the exact run.
    """

    neighbours: int
    cut: float
    clusters: int
    exact: int
    rand: float
    seeds: int


@dataclass(frozen=True, eq=False)
class Atlas:
    """The recurring patterns of a collection.

    Attributes:
        clusters: of its tiles.
        composition: ``[S, K]``, share of each slide's tiles in each cluster.
        patterns: one for each cluster, the largest first.
        kept: share of the variance in the principal components; None if all features counted.
        check: of the approximate variant.
        confounding: association of sites and grades; None if unknown.
    """

    clusters: Clusters
    composition: NDArray[np.float64]
    patterns: tuple[Pattern, ...]
    kept: float | None
    check: Check | None
    confounding: SiteByGrade | None

    @property
    def unclustered(self) -> int:
        """Number of tiles without a cluster."""
        return int((self.clusters.labels < 0).sum())


def find_patterns(
    collection: Collection,
    options: ClusterOptions = ClusterOptions(),  # noqa: B008  # frozen
    on_step: Callable[[str], None] = lambda message: None,
) -> Atlas:
    """Clusters all tiles of a collection, without labels.

    Features are scaled to length 1, so that clusters and the search for similar tiles agree on what is near.

    Raises:
        UsageError: too few tiles, or clusters that cannot be found with these options.
        SlidetlError: the features cannot be read.
    """
    if collection.has_manifest:
        check_duplicates(collection.slides)
    on_step(f"reading {len(collection)} tiles of {len(collection.slides)} slides")
    points, kept = _points(collection, options)
    on_step(f"clustering by {options.method}")
    clusters, check = cluster_points(points, options)
    composition = np.stack(
        [
            np.bincount(labels[labels >= 0], minlength=len(clusters.centres)) / len(labels)
            for labels in np.split(clusters.labels, collection.starts[1:-1])
        ]
    )
    on_step(f"comparing {len(clusters.centres)} clusters with sites and grades")
    patterns = _patterns(collection, clusters, composition)
    return Atlas(clusters, composition, patterns, kept, check, _confounding(collection))


def check_store(collection: Collection, name: str) -> None:
    """Checks before long work that clusters can be stored under a name.

    Raises:
        UsageError: the name holds other features.
        CacheError: a folder or file cannot be written.
    """
    feature_name(name)
    for slide in collection.slides:
        check_writable(slide.cache)
        try:
            stored = read_source(slide.cache, name)
        except CacheMissingError:
            continue
        if stored.block != _BLOCK:
            raise UsageError(
                f"--store {name}: slide {slide.row.slide_id!r} has features of this name, of "
                f"{stored.backbone}; choose another name"
            )


def store_clusters(collection: Collection, clusters: Clusters, name: str) -> None:
    """Stores the cluster of each tile as features: a column per cluster, 1 in the tile's own.

    Their mean over a slide is its composition. Their identity changes with the clusters.

    Raises:
        UsageError: the name holds other features.
        CacheError: they cannot be written.
    """
    check_store(collection, name)
    source = collection.source
    identity = hashlib.sha256(f"{source.identity} {source.block} {collection.features}".encode())
    identity.update(np.ascontiguousarray(clusters.centres).tobytes())
    identity.update(clusters.labels.tobytes())
    made = FeatureSource(
        source.backbone,
        _BLOCK,
        identity.hexdigest(),
        source.mean,
        source.std,
        source.precision,
        record=source.record,
    )
    for slide, labels in zip(
        collection.slides, np.split(clusters.labels, collection.starts[1:-1]), strict=True
    ):
        rows = np.zeros((len(labels), len(clusters.centres)), np.float16)
        has_cluster = np.flatnonzero(labels >= 0)
        rows[has_cluster, labels[has_cluster]] = 1
        write_features(slide.cache, {name: (made, rows)})


def _points(collection: Collection, options: ClusterOptions) -> tuple[NDArray[np.float32], float | None]:
    """Reads the features, scaled to length 1, and projects them slide by slide."""

    def unit(rows: NDArray[np.float16]) -> NDArray[np.float32]:
        values = rows.astype(np.float32)
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        return np.asarray(values / np.where(lengths > 0, lengths, 1))

    if len(collection) < 3:
        raise UsageError(f"expected at least 3 tiles to cluster, found {len(collection)}")
    if options.components == 0:
        return np.concatenate([unit(rows) for rows in collection]), None
    drawn = np.sort(np.random.default_rng(options.seed).permutation(len(collection))[:_FITTED])
    parts = np.split(drawn, np.searchsorted(drawn, collection.starts[1:-1]))
    fitted = [
        unit(rows[part - start])
        for rows, part, start in zip(collection, parts, collection.starts[:-1].tolist(), strict=True)
    ]
    projection = principal_components(np.concatenate(fitted), options.components, options.seed)
    points = [np.asarray(projection(unit(rows)), np.float32) for rows in collection]
    return np.concatenate(points), projection.kept


def cluster_points(points: NDArray[np.float32], options: ClusterOptions) -> tuple[Clusters, Check | None]:
    """Clusters points ``[N, D]``; approximate clusters come with a check against exact ones.

    Raises:
        UsageError: too few points, or clusters that cannot be found with these options.
    """
    if options.method == "k-means":
        return k_means(points, options.clusters, options.seed), None
    if options.method == "hdbscan":
        if len(points) > _HDBSCAN_MOST:
            raise UsageError(
                f"--method hdbscan takes at most {_HDBSCAN_MOST} tiles, not {len(points)}: its time grows "
                "with their square; take --method mean-shift, or fewer --slides"
            )
        return hdbscan(points, options.least), None
    device = chosen_device(options.device)
    bandwidth = options.bandwidth
    if bandwidth is None:
        k = min(len(points) - 1, max(options.least, round(options.neighbour_share * len(points))))
        bandwidth = bandwidth_of(points, k, options.quantile, seed=options.seed, device=device)
        if options.kernel == "gaussian":
            bandwidth /= 2  # at a third of it, seeds in 16 dimensions hardly move
    seeds: int | None = options.seeds or None
    how: Any = {"kernel": options.kernel, "seed": options.seed, "device": device}
    least = 1 if options.kernel == "gaussian" else min(options.least, len(points))
    found = mean_shift(
        points, bandwidth, seeds=seeds, neighbours=options.neighbours or None, min_points=least, **how
    )
    if not options.neighbours:
        return found, None
    n_seeds = min(_CHECKED, len(points))
    exact = mean_shift(points, bandwidth, seeds=n_seeds, min_points=least, **how)
    from sklearn.metrics import adjusted_rand_score

    rand = float(adjusted_rand_score(exact.labels, found.labels))
    counts = len(found.centres), len(exact.centres)
    return found, Check(options.neighbours, found.cut or 0.0, *counts, rand, n_seeds)


def _patterns(
    collection: Collection, clusters: Clusters, composition: NDArray[np.float64]
) -> tuple[Pattern, ...]:
    patients, sizes = collection.patients, clusters.sizes
    rows = [slide.row for slide in collection.slides]
    sited = np.array([bool(row.site) for row in rows])
    graded = np.array([row.grade is not None for row in rows])
    sites = np.array([row.site for row in rows])
    grades = np.array([-1 if row.grade is None else row.grade for row in rows])
    found = []
    for number, size in enumerate(sizes.tolist()):
        shares = composition[:, number]
        has_it = shares > 0
        found.append(
            Pattern(
                size,
                size / len(collection),
                int(has_it.sum()),
                len(np.unique(patients[has_it])),
                site_share(shares[sited], sites[sited], patients[sited], n_draws=2000)
                if sited.any()
                else None,
                grade_correlation(shares[graded], grades[graded], patients[graded], n_draws=2000)
                if graded.any()
                else None,
                {str(site): float(shares[sites == site].mean()) for site in np.unique(sites[sited])},
                {int(grade): float(shares[grades == grade].mean()) for grade in np.unique(grades[graded])},
            )
        )
    return tuple(found)


def _confounding(collection: Collection) -> SiteByGrade | None:
    rows = [slide.row for slide in collection.slides if slide.row.site and slide.row.grade is not None]
    if not rows:
        return None
    grades = [row.grade or 0 for row in rows]
    return site_by_grade(
        [row.site for row in rows],
        grades,
        [row.patient_id for row in rows],
        max(grades) + 1,
        n_permutations=1000,
    )
