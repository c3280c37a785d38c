"""Classical graders: pooled features of a slide -> probabilities of the grades. NumPy in, NumPy out.

Max-pooling with boosted trees is the recipe of the talk that this project began with (Owkin, 2017);
mean-pooling with :func:`fit_ridge` is the baseline that anything trained end to end must beat.
Every ``fit_*`` chooses its own strength of regularisation by cross-validation over the patients that it is
given, so that a test part has no say in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import ModelFileError, UsageError
from slidetl.evaluation.metrics import probability_metrics

Pool = Literal["mean", "max", "both", "top-k"]
POOLS: tuple[Pool, ...] = ("mean", "max", "both", "top-k")

# Strengths of regularisation that are tried: an L2 penalty on coefficients of standardised features.
PENALTIES = tuple(float(value) for value in 10.0 ** np.arange(-2, 6))

_FOLDS = 5


def pool_tiles(features: ArrayLike, pool: Pool = "mean", k: int = 10) -> NDArray[np.float64]:
    """One vector for a slide.

    Args:
        features: ``[N, D]``, a row for each tile.
        pool: ``mean``, ``max``, ``both`` (mean, then max), or ``top-k``: of each feature by itself, the mean
            of its k highest values.
        k: of ``top-k``; a slide with fewer tiles gives the mean of them all.

    Returns:
        ``[D]``, or ``[2 D]`` for ``both``.

    Raises:
        UsageError: no tiles, an unknown pool, or ``k`` below 1.
    """
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or not len(values):
        raise UsageError(f"expected features [N, D] of at least one tile, not {values.shape}")
    if pool not in POOLS or k < 1:
        raise UsageError(f"pool must be one of {', '.join(POOLS)}, and k at least 1, not {pool!r} and {k}")
    if pool == "mean":
        return np.asarray(values.mean(axis=0))
    if pool == "max":
        return np.asarray(values.max(axis=0))
    if pool == "both":
        return np.concatenate([values.mean(axis=0), values.max(axis=0)])
    k = min(k, len(values))
    return np.asarray(np.partition(values, len(values) - k, axis=0)[-k:].mean(axis=0))


class Grader(Protocol):
    """A fitted model."""

    def probabilities(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Features ``[n, D]`` of slides -> ``[n, K]``; rows sum to one."""
        ...


@dataclass(frozen=True, eq=False)
class RidgeGrader:
    """Ridge regression of the grade itself, read off a scale with thresholds half-way between grades.

    A slide's grade is taken to be normal about the regression, at whole numbers only: the probability of
    grade k is proportional to ``exp(-(k - y)^2 / (2 sigma^2))``. The nearest grade is so the most probable.

    Attributes:
        centre, scale: ``[D]``, of the training features.
        coefficients: ``[D]``, of standardised features.
        intercept: mean training grade.
        sigma: root mean square of the residuals out of fold, grades.
        n_grades: K.
        penalty: as chosen.
    """

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    intercept: float
    sigma: float
    n_grades: int
    penalty: float

    def regress(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[n, D]`` -> ``[n]``, in grades, not bounded by the scale."""
        return np.asarray((features - self.centre) / self.scale @ self.coefficients + self.intercept)

    def probabilities(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[n, D]`` -> ``[n, K]``."""
        distance = np.arange(self.n_grades) - self.regress(features)[:, None]
        return _softmax(-(distance**2) / (2 * self.sigma**2))


@dataclass(frozen=True, eq=False)
class CumulativeLinkGrader:
    """Proportional odds, ``P(grade <= k) = sigmoid(threshold_k - x . coefficients)``.

    Attributes:
        centre, scale: ``[D]``, of the training features.
        coefficients: ``[D]``, of standardised features.
        thresholds: ``[K - 1]``, rising.
        penalty: as chosen.
    """

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    penalty: float

    def probabilities(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[n, D]`` -> ``[n, K]``."""
        from scipy.special import expit

        score = (features - self.centre) / self.scale @ self.coefficients
        below = expit(self.thresholds - score[:, None])
        bounds = np.pad(below, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
        return np.diff(bounds, axis=1)


@dataclass(frozen=True, eq=False)
class LogisticGrader:
    """Multinomial logistic regression, which knows no order of the grades.

    Attributes:
        centre, scale: ``[D]``, of the training features.
        coefficients: ``[D, K]``, of standardised features.
        intercepts: ``[K]``.
        penalty: as chosen.
    """

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    intercepts: NDArray[np.float64]
    penalty: float

    def probabilities(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[n, D]`` -> ``[n, K]``."""
        return _softmax((features - self.centre) / self.scale @ self.coefficients + self.intercepts)


@dataclass(frozen=True, eq=False)
class TreesGrader:
    """Gradient-boosted trees, scikit-learn's by histograms. Not saved: that would take pickle."""

    model: Any

    def probabilities(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[n, D]`` -> ``[n, K]``."""
        return np.asarray(self.model.predict_proba(features), np.float64)


@dataclass(frozen=True, eq=False)
class TileGrader:
    """A classifier of tiles; slides by :func:`slide_score`; and what a score means on the scale of grades.

    Attributes:
        tiles: gives the probabilities of the C classes of a tile.
        classes: what each is worth, see :func:`slide_score`.
        ignore: which of them do not count.
        scale: from a slide's score ``[n, 1]`` to probabilities of its grade; it has seen only scores by
            classifiers that did not see the slide.
    """

    tiles: LogisticGrader
    classes: tuple[float, ...]
    ignore: tuple[bool, ...]
    scale: RidgeGrader

    def score(self, tile_features: NDArray[np.float64]) -> float:
        """Features ``[N, D]`` of a slide's tiles -> its score, in units of ``classes``."""
        return slide_score(self.tiles.probabilities(tile_features), self.classes, self.ignore)

    def probabilities(self, slides: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Features ``[N_i, D]`` of the tiles of n slides -> ``[n, K]``."""
        return self.scale.probabilities(np.array([[self.score(slide)] for slide in slides]))


LinearGrader = RidgeGrader | CumulativeLinkGrader | LogisticGrader


def fit_ridge(
    features: ArrayLike, grades: ArrayLike, patients: ArrayLike, n_grades: int, seed: int = 0
) -> RidgeGrader:
    """Fits :class:`RidgeGrader`; the penalty with the least squared error out of fold is taken.

    Args:
        features: ``[n, D]``, of slides.
        grades: ``[n]``, whole numbers 0..K-1.
        patients: ``[n]``, anything that identifies a patient; none is split over the inner folds.
        n_grades: K.
        seed: of the inner folds.

    Raises:
        UsageError: shapes differ, a value is not finite, a grade has no slide, or there is one patient.
    """
    x, y, groups = _checked(features, grades, patients, n_grades)
    predicted = np.empty((len(PENALTIES), len(y)))
    for train, test in _inner_folds(y, groups, seed):
        centre, scale = _standard(x[train])
        solve = _ridge_solver((x[train] - centre) / scale, y[train] - y[train].mean())
        for row, penalty in enumerate(PENALTIES):
            predicted[row, test] = (x[test] - centre) / scale @ solve(penalty) + y[train].mean()
    errors = np.mean((predicted - y) ** 2, axis=1)
    best = int(errors.argmin())
    centre, scale = _standard(x)
    return RidgeGrader(
        centre=centre,
        scale=scale,
        coefficients=_ridge_solver((x - centre) / scale, y - y.mean())(PENALTIES[best]),
        intercept=float(y.mean()),
        # Not less than a tenth of a grade: no hundred slides can tell more, and a likelihood stays finite.
        sigma=max(float(np.sqrt(errors[best])), 0.1),
        n_grades=n_grades,
        penalty=PENALTIES[best],
    )


def fit_cumulative_link(
    features: ArrayLike, grades: ArrayLike, patients: ArrayLike, n_grades: int, seed: int = 0
) -> CumulativeLinkGrader:
    """Fits :class:`CumulativeLinkGrader` by L-BFGS; arguments and errors as of :func:`fit_ridge`.

    The penalty is on the coefficients only, ``penalty / 2 * |w|^2`` beside the sum of the negative
    log-likelihood (McCullagh, JRSS B 1980); that with the least ranked probability score out of fold is
    taken.
    """
    x, y, groups = _checked(features, grades, patients, n_grades)

    def fit(rows: NDArray[np.intp], penalty: float) -> CumulativeLinkGrader:
        centre, scale = _standard(x[rows])
        z = (x[rows] - centre) / scale
        return CumulativeLinkGrader(
            centre, scale, *_fit_proportional_odds(z, y[rows], n_grades, penalty), penalty
        )

    return fit(np.arange(len(y)), _best_penalty(fit, x, y, groups, n_grades, seed))


def fit_logistic(
    features: ArrayLike,
    grades: ArrayLike,
    patients: ArrayLike,
    n_grades: int,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> LogisticGrader:
    """Fits :class:`LogisticGrader`; arguments and errors as of :func:`fit_cumulative_link`.

    Of ``penalties`` that with the least ranked probability score out of fold is taken.
    """
    x, y, groups = _checked(features, grades, patients, n_grades)

    def fit(rows: NDArray[np.intp], penalty: float) -> LogisticGrader:
        return _fit_logistic(x[rows], y[rows], n_grades, penalty)

    return fit(np.arange(len(y)), _best_penalty(fit, x, y, groups, n_grades, seed, penalties))


def fit_trees(
    features: ArrayLike, grades: ArrayLike, patients: ArrayLike, n_grades: int, seed: int = 0
) -> TreesGrader:
    """Fits :class:`TreesGrader`, at fixed settings; arguments and errors as of :func:`fit_ridge`."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # it ships none

    x, y, _ = _checked(features, grades, patients, n_grades)
    # scikit-learn's own least leaf of 20 slides leaves a tree on eighty of them nearly nothing to split.
    model = HistGradientBoostingClassifier(
        max_iter=100, min_samples_leaf=5, early_stopping=False, random_state=seed
    )
    with threadpool_limits(1):  # on so few rows threads wait for each other
        model.fit(x, y)
    return TreesGrader(model)


def slide_score(
    tile_probabilities: ArrayLike, classes: Sequence[float], ignore: Sequence[bool] | None = None
) -> float:
    """A slide's grade from its tiles': the probability-weighted mean class, over tissue that counts.

    After Heinemann et al., PLoS ONE 2018, e0202708: a tile that is most probably of a class to be ignored
    (bronchi, vessels, debris) is left out; of every other tile the classes that count are averaged by their
    probabilities, which are made to sum to one without the ignored ones; and tiles are averaged over the
    slide.

    Args:
        tile_probabilities: ``[N, C]``.
        classes: C values, what each class is worth; that of an ignored class is not used.
        ignore: C flags; None counts every class.

    Returns:
        The score, in units of ``classes``.

    Raises:
        UsageError: shapes differ, every class is ignored, or every tile is.
    """
    p, values = np.asarray(tile_probabilities, np.float64), np.asarray(classes, np.float64)
    counts = ~np.asarray(ignore, bool) if ignore is not None else np.ones(len(values), bool)
    if p.ndim != 2 or not len(p) or p.shape[1:] != values.shape or counts.shape != values.shape:
        raise UsageError(
            f"expected probabilities [N, C], C classes and C flags, "
            f"not {p.shape}, {values.shape}, {counts.shape}"
        )
    is_kept = counts[p.argmax(axis=1)]
    if not is_kept.any():
        raise UsageError(f"all {len(p)} tiles of the slide are of a class to be ignored; it has no score")
    kept = p[is_kept][:, counts]
    return float((kept @ values[counts] / kept.sum(axis=1)).mean())


def fit_tile_grader(
    slides: Sequence[NDArray[np.float64]],
    labels: Sequence[NDArray[np.int64]],
    classes: Sequence[float],
    ignore: Sequence[bool],
    grades: ArrayLike,
    patients: ArrayLike,
    n_grades: int,
    seed: int = 0,
) -> TileGrader:
    """Fits :class:`TileGrader` where the labels of some tiles are known.

    Args:
        slides: for each of n slides the features ``[N_i, D]`` of its tiles.
        labels: for each slide ``[N_i]``, the class of each tile, 0..C-1, or -1 where it is not known.
        classes: what each class is worth, C values.
        ignore: C flags, the classes that do not count.
        grades: ``[n]``, of the slides.
        patients: ``[n]``, whose they are; none is split over the inner folds.
        n_grades: K.
        seed: of the inner folds.

    Raises:
        UsageError: as :func:`fit_ridge` and :func:`slide_score`; or a class has no labelled tile.
    """
    y, groups = np.asarray(grades), np.asarray(patients)
    x = np.concatenate([slide[label >= 0] for slide, label in zip(slides, labels, strict=True)])
    classed = np.concatenate([label[label >= 0] for label in labels])
    owner = np.repeat(groups, [int((label >= 0).sum()) for label in labels])
    absent = sorted(set(range(len(classes))) - set(classed.tolist()))
    if absent:
        raise UsageError(
            f"no labelled tile of the training part is of class {absent[0]}; label some, or merge classes"
        )
    # Tiles are many, and a grid of fewer penalties costs minutes less.
    tiles = fit_logistic(x, classed, owner, len(classes), seed, penalties=(1.0, 100.0, 10_000.0))
    scores = np.empty((len(slides), 1))
    for train, test in _inner_folds(y.astype(np.int64), groups, seed):
        rows = np.isin(owner, groups[train])
        fitted = _fit_logistic(x[rows], classed[rows], len(classes), tiles.penalty)
        for slide in test:
            scores[slide] = slide_score(fitted.probabilities(slides[slide]), classes, ignore)
    scale = fit_ridge(scores, y, groups, n_grades, seed)
    return TileGrader(tiles, tuple(classes), tuple(ignore), scale)


def save_grader(path: Path, grader: LinearGrader) -> None:
    """Writes a linear model as ``.npz``: arrays and the name of its kind, nothing to unpickle."""
    values = {f.name: getattr(grader, f.name) for f in fields(grader)}
    np.savez(path, allow_pickle=False, kind=type(grader).__name__, **values)


def load_grader(path: Path) -> LinearGrader:
    """Reads what :func:`save_grader` wrote.

    Raises:
        ModelFileError: not such a file.
    """
    kinds: dict[str, type[LinearGrader]] = {
        kind.__name__: kind for kind in (RidgeGrader, CumulativeLinkGrader, LogisticGrader)
    }
    try:
        with np.load(path, allow_pickle=False) as file:
            kind = kinds[str(file["kind"])]
            arrays = {f.name: file[f.name] for f in fields(kind)}
            values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
    except (OSError, KeyError, ValueError) as error:
        raise ModelFileError(f"{path}: expected a model of 'slidetl fit-features': {error!r}") from error
    return kind(**values)


def _checked(
    features: ArrayLike, grades: ArrayLike, patients: ArrayLike, n_grades: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[Any]]:
    x, y, groups = np.asarray(features, np.float64), np.asarray(grades), np.asarray(patients)
    if x.ndim != 2 or y.shape != (len(x),) or groups.shape != (len(x),):
        raise UsageError(
            f"expected features [n, D], grades [n], patients [n], not {x.shape}, {y.shape}, {groups.shape}"
        )
    if not np.isfinite(x).all():
        raise UsageError("features must be finite numbers")
    if len(y) and (y.min() < 0 or y.max() >= n_grades or (y != y.astype(np.int64)).any()):
        raise UsageError(f"grades must be whole numbers from 0 to {n_grades - 1}")
    counts = np.bincount(y.astype(np.int64), minlength=n_grades)
    if not counts.all():
        absent = ", ".join(str(grade) for grade in np.flatnonzero(counts == 0))
        raise UsageError(
            f"no training slide has grade {absent}; add some, choose another --seed, or merge grades"
        )
    if len(np.unique(groups)) < 2:
        raise UsageError("training slides are all of one patient; at least two patients are needed")
    return x, y.astype(np.int64), groups


def _inner_folds(
    grades: NDArray[np.int64], patients: NDArray[Any], seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Train and test rows; no patient is on both sides, and every row is tested once."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    n_splits = min(_FOLDS, len(np.unique(patients)), int(np.bincount(grades).max()))
    folds: GroupKFold | StratifiedGroupKFold
    if n_splits < 2:  # one slide a grade: nothing to stratify by
        folds = GroupKFold(2, shuffle=True, random_state=seed)
    else:
        folds = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A grade with fewer slides than folds cannot be in each, which a choice of penalty can bear.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        parts = list(folds.split(np.zeros(len(grades)), grades, patients))
    # A fold may be empty; one that is everything leaves nothing to fit.
    yield from ((train, test) for train, test in parts if len(train) and len(test))


def _best_penalty(
    fit: Callable[[NDArray[np.intp], float], Grader],
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    groups: NDArray[Any],
    n_grades: int,
    seed: int,
    penalties: Sequence[float] = PENALTIES,
) -> float:
    """That of the least ranked probability score out of fold."""
    scores = np.zeros(len(penalties))
    for train, test in _inner_folds(y, groups, seed):
        for row, penalty in enumerate(penalties):
            rows = fit(train, penalty).probabilities(x[test])
            scores[row] += len(test) * probability_metrics(y[test], rows).rps
    return penalties[int(scores.argmin())]


def _standard(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each feature; 1 for one that never changes."""
    centre, scale = x.mean(axis=0), x.std(axis=0)
    return centre, np.where(scale > 1e-9 * np.maximum(abs(centre), 1e-9), scale, 1.0)


def _ridge_solver(x: NDArray[np.float64], y: NDArray[np.float64]) -> Callable[[float], NDArray[np.float64]]:
    """Penalty -> coefficients ``[D]`` that minimise ``|x w - y|^2 + penalty |w|^2``: one SVD for all."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    projected = u.T @ y
    return lambda penalty: np.asarray(vt.T @ (s / (s**2 + penalty) * projected))


def _fit_proportional_odds(
    x: NDArray[np.float64], y: NDArray[np.int64], n_grades: int, penalty: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients ``[D]`` and thresholds ``[K - 1]`` of the least penalised negative log-likelihood.

    Thresholds are a first one and the logarithms of the gaps, which keeps them in order.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, log_expit

    # With fewer slides than features the solution lies in the span of the slides: solve it there.
    basis = np.linalg.svd(x, full_matrices=False)[2] if len(x) < x.shape[1] else np.eye(x.shape[1])
    z = x @ basis.T
    n_features = z.shape[1]
    reached = np.cumsum(np.bincount(y, minlength=n_grades) + 0.5)[:-1] / (len(y) + 0.5 * n_grades)
    start = np.log(reached / (1 - reached))

    def thresholds_of(free: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([free[:1], free[0] + np.cumsum(np.exp(free[1:]))])

    def objective(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w, free = parameters[:n_features], parameters[n_features:]
        thresholds = thresholds_of(free)
        score = z @ w
        # Ends of the scale: so far off that the sigmoid is exactly 0 and 1 there.
        bounds = np.concatenate([[-1e4], thresholds, [1e4]])
        low, high = bounds[y] - score, bounds[y + 1] - score
        gap = np.maximum(high - low, 1e-12)
        # log(sigmoid(high) - sigmoid(low)), without cancellation however far off the score is.
        log_likelihood = log_expit(high) + log_expit(-low) + np.log(-np.expm1(-gap))
        slope = np.exp(-gap) / -np.expm1(-gap)
        to_high, to_low = expit(-high) + slope, -expit(low) - slope  # derivatives of the log-likelihood
        by_threshold = np.bincount(y + 1, to_high, n_grades + 1) + np.bincount(y, to_low, n_grades + 1)
        by_threshold = by_threshold[1:-1]
        above = np.cumsum(by_threshold[::-1])[::-1]  # a gap moves every threshold behind it
        by_free = np.concatenate([above[:1], above[1:] * np.exp(free[1:])])
        gradient = np.concatenate([z.T @ (to_high + to_low) + penalty * w, -by_free])
        return float(penalty / 2 * (w @ w) - log_likelihood.sum()), gradient

    free = np.concatenate([start[:1], np.log(np.diff(start))])
    found = minimize(
        objective,
        np.concatenate([np.zeros(n_features), free]),
        jac=True,
        method="L-BFGS-B",
        # A grade that an inner fold lacks would send its gap to nothing, or its threshold to infinity.
        bounds=[(None, None)] * n_features + [(-30, 30)] + [(-15, 5)] * (n_grades - 2),
        options={"maxiter": 2000, "gtol": 1e-6, "ftol": 1e-12},
    )
    return basis.T @ found.x[:n_features], thresholds_of(found.x[n_features:])


def _fit_logistic(
    x: NDArray[np.float64], y: NDArray[np.int64], n_grades: int, penalty: float
) -> LogisticGrader:
    """At one penalty, ``penalty / 2 * |w|^2`` beside the sum of the negative log-likelihood."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    centre, scale = _standard(x)
    z = (x - centre) / scale
    known = np.unique(y)
    basis = np.linalg.svd(z, full_matrices=False)[2] if len(z) < z.shape[1] else np.eye(z.shape[1])
    coefficients = np.zeros((x.shape[1], n_grades))
    intercepts = np.full(n_grades, -50.0)  # a grade that an inner fold lacks is as good as impossible
    if len(known) == 1:
        intercepts[known] = 0.0
        return LogisticGrader(centre, scale, coefficients, intercepts, penalty)
    with threadpool_limits(1):
        model = LogisticRegression(C=1 / penalty, tol=1e-6, max_iter=5000).fit(z @ basis.T, y)
    if len(known) == 2:  # one score there; the other is its negative, at half the strength each
        coefficients[:, known] = basis.T @ (model.coef_.T * [[-0.5, 0.5]])
        intercepts[known] = model.intercept_ * np.array([-0.5, 0.5])
    else:
        coefficients[:, known] = basis.T @ model.coef_.T
        intercepts[known] = model.intercept_
    return LogisticGrader(centre, scale, coefficients, intercepts, penalty)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))
