"""Confounding by site: its association with grades, and its presence in embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.comparison import chance_p
from slidetl.evaluation.metrics import check_grades
from slidetl.evaluation.shapes import check_lengths, value_of_patient

_FOLDS = 5  # of patients, to tell their sites


@dataclass(frozen=True)
class SiteByGrade:
    """The table of sites and grades, and the strength of their association.

    Attributes:
        sites: names, in order.
        slides: ``[S][K]`` counts of slides.
        cramers_v: 0..1, corrected for bias; of patients, not slides. None for one site or one grade.
        p: of a permutation test of no association; None as above.
        n_units: patients counted in the last two; a patient at two sites counts at each.
    """

    sites: tuple[str, ...]
    slides: tuple[tuple[int, ...], ...]
    cramers_v: float | None
    p: float | None
    n_units: int


def site_by_grade(
    sites: ArrayLike,
    grades: ArrayLike,
    patients: ArrayLike,
    n_grades: int,
    *,
    n_permutations: int = 5000,
) -> SiteByGrade:
    """Counts slides by site and grade, and tests whether patients' grades depend on the site.

    Slides of a patient share both, so a chi-square of slides would find associations in any cohort. Each
    patient counts once at a site, with the worst grade there. Cramér's V is corrected for bias (Bergsma,
    Journal of the Korean Statistical Society 2013); the p-value is the share of permutations of the sites
    over patients with a chi-square at least as large, ``(1 + hits) / (1 + n)``, since expected counts of a
    few are common here. ``sites [N]`` are names of sites (or scanners, or stains).
    """
    names, site = np.unique(np.asarray(sites).astype(str), return_inverse=True)
    grade = np.asarray(grades)
    who = np.unique(np.asarray(patients), return_inverse=True)[1]
    check_lengths(sites=site, grades=grade, patients=who)
    check_grades(grade, n_grades)
    grade = grade.astype(np.int64)
    slides = np.bincount(site * n_grades + grade, minlength=len(names) * n_grades).reshape(-1, n_grades)
    units, unit = np.unique(who * len(names) + site, return_inverse=True)
    unit_site, unit_grade = units % len(names), np.zeros(len(units), np.int64)
    np.maximum.at(unit_grade, unit, grade)
    table = tuple(tuple(int(count) for count in row) for row in slides)
    if len(names) < 2 or len(np.unique(unit_grade)) < 2:
        return SiteByGrade(tuple(names.tolist()), table, None, None, len(units))
    observed = _chi_square(unit_site, unit_grade, len(names), n_grades)
    rng = np.random.default_rng(0)
    null = [
        _chi_square(rng.permutation(unit_site), unit_grade, len(names), n_grades)
        for _ in range(n_permutations)
    ]
    v = _cramers_v(observed, len(units), len(names), len(np.unique(unit_grade)))
    return SiteByGrade(tuple(names.tolist()), table, v, chance_p(observed, null, 1e-9), len(units))


@dataclass(frozen=True)
class SiteDecodability:
    """Accuracy of a classifier at telling the site of unseen patients.

    Attributes:
        balanced_accuracy: mean share right over the sites with tested slides, 0..1.
        null_mean, null_high: mean and 95 % quantile of the same accuracy with sites permuted over patients.
        p: of the permutation test.
        n_patients: tested.
    """

    balanced_accuracy: float
    null_mean: float
    null_high: float
    p: float
    n_patients: int


@dataclass(frozen=True, eq=False)
class EmbeddedFold:
    """Embeddings of slides by one network.

    Attributes:
        train, test: numbers ``[n]`` and ``[m]`` of the slides.
        train_embeddings, test_embeddings: ``[n, D]`` and ``[m, D]``.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    train_embeddings: NDArray[Any]
    test_embeddings: NDArray[Any]


def site_decodability(
    embeddings: ArrayLike,
    sites: ArrayLike,
    patients: ArrayLike,
    *,
    n_permutations: int = 1000,
) -> SiteDecodability:
    """Tells ``sites [N]`` from embeddings ``[N, D]`` by linear discriminants, cross-validated over patients.

    The discriminant is the nearest site mean after whitening by the training part's covariance with its mean
    non-zero eigenvalue added to the diagonal (Friedman, JASA 1989); sites count alike, however many slides
    they have. Neither folds nor whitening depend on the sites, so permuting them over patients is an exact
    test. Embeddings that tell the site are a fault only if sites and grades are associated.

    Raises:
        UsageError: a single site, a patient at two sites, or a site with fewer than two patients.
    """
    values = np.asarray(embeddings, np.float64)
    who = np.unique(np.asarray(patients), return_inverse=True)[1]
    if values.ndim != 2 or who.shape != (len(values),):
        raise UsageError(f"expected embeddings [N, D] and patients [N], not {values.shape} and {who.shape}")
    n_patients = len(set(who.tolist()))
    fold = np.random.default_rng(0).permutation(n_patients) % max(1, min(_FOLDS, n_patients))
    parts = []
    for number in range(fold.max(initial=-1) + 1):
        train, test = np.flatnonzero(fold[who] != number), np.flatnonzero(fold[who] == number)
        parts.append(EmbeddedFold(train, test, values[train], values[test]))
    return site_decodability_by_fold(parts, sites, patients, n_permutations=n_permutations)


def site_decodability_by_fold(
    folds: Sequence[EmbeddedFold],
    sites: ArrayLike,
    patients: ArrayLike,
    *,
    n_permutations: int = 1000,
) -> SiteDecodability:
    """Tells sites from embeddings if each fold has its own network, and so its own embeddings.

    The discriminant of a fold is fitted on the network's training slides. Networks were trained without the
    sites, so the permutation test holds. No slide is in two test parts, and no patient on both sides of one.

    Raises:
        UsageError: as :func:`site_decodability`.
    """
    names, site = np.unique(np.asarray(sites), return_inverse=True)
    _, who, of_patient = value_of_patient(
        patients, site, "is at two sites; name the patient by site, or leave one out"
    )
    if len(names) < 2 or np.bincount(of_patient).min() < 2:
        raise UsageError("telling sites apart needs at least two of them, with two patients each")
    rng = np.random.default_rng(0)
    # The true sites first, then the permuted ones: [1 + n, P].
    labels = np.stack([of_patient, *(rng.permutation(of_patient) for _ in range(n_permutations))])
    slide_labels = labels[:, who]
    predicted = np.full((len(labels), len(site)), -1, np.int64)  # not tested
    for fold in folds:
        if not all(np.isfinite(part).all() for part in (fold.train_embeddings, fold.test_embeddings)):
            raise UsageError("embeddings must be finite numbers")
        train_rows, test_rows = _whitened(
            fold.train_embeddings.astype(np.float64), fold.test_embeddings.astype(np.float64)
        )
        for row, of_slides in enumerate(slide_labels):
            is_site = of_slides[fold.train, None] == np.arange(len(names))
            counts = is_site.sum(axis=0)
            centres = is_site.T @ train_rows / np.maximum(counts, 1)[:, None]
            scores = test_rows @ centres.T - (centres**2).sum(axis=1) / 2
            predicted[row, fold.test] = np.where(counts > 0, scores, -np.inf).argmax(axis=1)
    tested = predicted[0] >= 0
    if not tested.any():
        raise UsageError("expected folds with tested slides, found none")
    of_site = [(slide_labels == each) & tested for each in range(len(names))]
    n_of_site = np.array([mine.sum(axis=1) for mine in of_site])  # [sites, 1 + n]
    right = np.array([((predicted == slide_labels) & mine).sum(axis=1) for mine in of_site])
    balanced = (right / np.maximum(n_of_site, 1)).sum(axis=0) / (n_of_site > 0).sum(axis=0)
    null = balanced[1:]
    return SiteDecodability(
        balanced_accuracy=float(balanced[0]),
        null_mean=float(null.mean()),
        null_high=float(np.quantile(null, 0.95)),
        p=chance_p(float(balanced[0]), null),
        n_patients=len(set(who[tested].tolist())),
    )


@dataclass(frozen=True)
class GroupEstimate:
    """A metric of one site or scanner.

    Attributes:
        group: its name.
        n, n_patients: results and their patients.
        estimate: with its interval; None for a single patient, or if it is undefined on these or on most
            resamples of them.
    """

    group: str
    n: int
    n_patients: int
    estimate: Interval | None


def estimate_by_group(
    estimate: Callable[[NDArray[np.intp]], Interval | None], groups: ArrayLike, patients: ArrayLike
) -> tuple[GroupEstimate, ...]:
    """Computes a metric within each of ``groups [N]``, in the order of their names.

    With leave-one-site-out the groups are new to the model; otherwise they were seen in training. Kappa
    depends on the grades at a site: at a site of one grade it is 0, or undefined.

    Args:
        estimate: computes the metric of some results, by their numbers.
        groups: ``[N]``.
        patients: ``[N]``.
    """
    names, who = np.asarray(groups).astype(str), np.asarray(patients)
    check_lengths(groups=names, patients=who)
    rows = []
    for name in np.unique(names):
        members = np.flatnonzero(names == name)
        n_patients = len(np.unique(who[members]))
        interval = estimate(members) if n_patients > 1 else None
        rows.append(GroupEstimate(str(name), len(members), n_patients, interval))
    return tuple(rows)


def _chi_square(row: NDArray[np.int64], column: NDArray[np.int64], n_rows: int, n_columns: int) -> float:
    counts = np.bincount(row * n_columns + column, minlength=n_rows * n_columns).reshape(n_rows, n_columns)
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    return float(((counts - expected) ** 2 / np.where(expected > 0, expected, 1)).sum())


def _cramers_v(chi_square: float, n: int, n_rows: int, n_columns: int) -> float:
    """Computes V by Bergsma 2013, section 2; 0 for as many categories as units."""
    rows = n_rows - (n_rows - 1) ** 2 / (n - 1)
    columns = n_columns - (n_columns - 1) ** 2 / (n - 1)
    excess = max(0.0, chi_square / n - (n_rows - 1) * (n_columns - 1) / (n - 1))
    smaller = min(rows, columns) - 1
    return float(np.sqrt(excess / smaller)) if smaller > 0 else 0.0


def _whitened(
    train: NDArray[np.float64], test: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    centre = train.mean(axis=0)
    _, singular, axes = np.linalg.svd(train - centre, full_matrices=False)
    variances = singular**2 / len(train)
    kept = variances > 1e-12 * max(variances.max(), 1e-300)
    if not kept.any():
        return np.zeros((len(train), 1)), np.zeros((len(test), 1))
    scale = axes[kept].T / np.sqrt(variances[kept] + variances[kept].mean())
    return (train - centre) @ scale, (test - centre) @ scale
