"""Fits classical graders: pooled features of a slide -> probabilities of the grades.

Max-pooling with boosted trees is the recipe of the talk that inspired this project (Owkin, 2017);
mean-pooling with ridge regression is the baseline for anything trained end to end. Models are pipelines of
scikit-learn. Each chooses its strength of regularisation by cross-validation over the training patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.folds import stratified_folds
from slidetl.evaluation.metrics import check_grades, probability_metrics
from slidetl.files import replaced

Pool = Literal["mean", "max", "both", "top-k"]
POOLS: tuple[Pool, ...] = get_args(Pool)
ClassicalModel = Literal["ridge", "ordinal", "logistic", "trees"]
MODELS: tuple[ClassicalModel, ...] = get_args(ClassicalModel)

# Strengths of regularisation to choose from: an L2 penalty on coefficients of standardised features.
PENALTIES = tuple(float(value) for value in 10.0 ** np.arange(-2, 6))

_FOLDS = 5


def pool_tiles(features: ArrayLike, pool: Pool = "mean", k: int = 10) -> NDArray[np.float64]:
    """Pools the features of a slide's tiles into one vector.

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


@dataclass(frozen=True, eq=False)
class Grader:
    """A fitted model.

    Ridge regression predicts the grade itself. A slide's grade is taken to be normal about the regression, at
    whole numbers only: the probability of grade k is proportional to ``exp(-(k - y)^2 / (2 sigma^2))``. The
    nearest grade is the most probable.

    Attributes:
        model: the kind.
        estimator: a classifier of ranks 0..len(grades)-1, or a regressor of them for ``ridge``.
        grades: grades of the training part, lowest first; all others have a probability of zero.
        n_grades: K.
        penalty: chosen strength of regularisation; None without a choice.
        sigma: of ``ridge``, the root mean square of the residuals out of fold, in ranks; else None.
    """

    model: ClassicalModel
    estimator: Any
    grades: NDArray[np.int64]
    n_grades: int
    penalty: float | None = None
    sigma: float | None = None

    def probabilities(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns ``[n, K]``, rows summing to one, from features ``[n, D]`` of slides."""
        from scipy.special import softmax
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # it ships none

        rows = np.zeros((len(features), self.n_grades))
        if self.sigma is None:
            with threadpool_limits(1):  # each of 500 trees waits for all threads: seconds on a busy machine
                rows[:, self.grades] = self.estimator.predict_proba(features)
        else:
            distance = np.arange(len(self.grades)) - self.estimator.predict(features)[:, None]
            rows[:, self.grades] = softmax(-(distance**2) / (2 * self.sigma**2), axis=1)
        return rows


@dataclass(frozen=True, eq=False)
class TileGrader:
    """Grades slides by a classifier of their tiles, see :func:`slide_score`.

    Attributes:
        tiles: gives the probabilities of the C classes of a tile.
        classes: value of each class.
        ignore: True for classes to leave out.
        scale: from a slide's score ``[n, 1]`` to probabilities of its grade; fitted to scores of classifiers
            trained without the slide.
    """

    tiles: Grader
    classes: tuple[float, ...]
    ignore: tuple[bool, ...]
    scale: Grader

    def score(self, tile_features: NDArray[np.float64]) -> float:
        """Returns the score of a slide, in units of ``classes``, from features ``[N, D]`` of its tiles."""
        return slide_score(self.tiles.probabilities(tile_features), self.classes, self.ignore)

    def probabilities(self, slides: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Returns ``[n, K]`` from features ``[N_i, D]`` of the tiles of n slides."""
        return self.scale.probabilities(np.array([[self.score(slide)] for slide in slides]))


def fit_grader(
    model: ClassicalModel,
    features: ArrayLike,
    grades: ArrayLike,
    patients: ArrayLike,
    n_grades: int,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> Grader:
    """Fits a model at the penalty that does best out of fold.

    Args:
        model: ``ridge`` on the grades, least squared error out of fold; ``ordinal``,
            :class:`~slidetl.evaluation.ordinal.ProportionalOdds`, or ``logistic``, multinomial regression
            without an order of the grades, both with the least ranked probability score out of fold;
            ``trees``, boosted by histograms, at fixed settings.
        features: ``[n, D]``, of slides.
        grades: ``[n]``, whole numbers 0..K-1; some may be absent.
        patients: ``[n]``; none is split over the inner folds.
        n_grades: K.
        seed: of the inner folds and the trees.
        penalties: to choose from, not used by trees.

    Raises:
        UsageError: patients are too few.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import GridSearchCV
    from threadpoolctl import threadpool_limits

    x, y, groups = _checked(features, grades, patients, n_grades)
    known, ranks = np.unique(y, return_inverse=True)
    if model == "trees" or len(known) == 1:
        # scikit-learn's own least leaf of 20 slides leaves a tree on eighty of them nearly nothing to split.
        trees = HistGradientBoostingClassifier(
            max_iter=100, min_samples_leaf=5, early_stopping=False, random_state=seed
        )
        return _fit(model, trees, x, y, n_grades)

    # Sums over a fold, not means: each slide then counts the same in a fold of any size.
    def squared_error(estimator: Any, x: NDArray[np.float64], ranks: NDArray[np.int64]) -> float:
        return -float(((estimator.predict(x) - ranks) ** 2).sum())

    def ranked_probability_score(estimator: Any, x: NDArray[np.float64], ranks: NDArray[np.int64]) -> float:
        rows = np.zeros((len(x), len(known)))
        rows[:, estimator.classes_] = estimator.predict_proba(x)
        return -len(x) * probability_metrics(ranks, rows).rps

    folds = inner_folds(ranks, groups, seed)
    if model != "ridge":  # a classifier of one grade says the same at every penalty
        folds = [(train, test) for train, test in folds if len(np.unique(ranks[train])) > 1]
    if not folds:
        raise UsageError("no inner fold has two grades to train on; add patients, or merge grades")
    grid = {
        "ridge": {"model__alpha": penalties},
        "ordinal": {"model__penalty": penalties},
        "logistic": {"model__C": [1 / penalty for penalty in penalties]},
    }
    scoring = squared_error if model == "ridge" else ranked_probability_score
    search = GridSearchCV(_linear(model), grid[model], scoring=scoring, cv=folds, error_score="raise")
    with threadpool_limits(1):  # on so few rows threads wait for each other
        search.fit(x, ranks)
    # At least a tenth of a grade: no hundred slides can tell more, and a likelihood stays finite.
    sigma = max(float(np.sqrt(-search.best_score_ * len(folds) / len(y))), 0.1) if model == "ridge" else None
    return Grader(model, search.best_estimator_, known, n_grades, penalties[search.best_index_], sigma)


def slide_score(
    tile_probabilities: ArrayLike, classes: Sequence[float], ignore: Sequence[bool] | None = None
) -> float:
    """Computes a slide's grade from its tiles': the probability-weighted mean class, over tissue that counts.

    After Heinemann et al., PLoS ONE 2018, e0202708: a tile is left out if its most probable class is ignored
    (bronchi, vessels, debris); in every other tile the remaining classes are averaged by their probabilities,
    rescaled to sum to one; and tiles are averaged over the slide.

    Args:
        tile_probabilities: ``[N, C]``.
        classes: value of each of the C classes.
        ignore: C flags, True for a class to ignore; None counts every class.

    Returns:
        The score, in units of ``classes``.

    Raises:
        UsageError: every class is ignored, or every tile is; or a row is not of probabilities.
    """
    p, values = np.asarray(tile_probabilities, np.float64), np.asarray(classes, np.float64)
    counts = ~np.asarray(ignore, bool) if ignore is not None else np.ones(len(values), bool)
    if p.ndim != 2 or not len(p) or p.shape[1:] != values.shape or counts.shape != values.shape:
        raise UsageError(
            f"expected probabilities [N, C], C classes and C flags, "
            f"not {p.shape}, {values.shape}, {counts.shape}"
        )
    if not (np.isfinite(p) & (p >= 0)).all() or not (p.sum(axis=1) > 0).all():
        raise UsageError("expected probabilities of at least 0 in each row, not all of them 0")
    is_kept = counts[p.argmax(axis=1)]
    if not is_kept.any():
        raise UsageError(f"all {len(p)} tiles of the slide are of a class to be ignored; it has no score")
    kept = p[is_kept][:, counts]
    return float((kept @ values[counts] / kept.sum(axis=1)).mean())


def fit_tile_grader(
    features_of: Callable[[int], NDArray[np.float64]],
    labels: Sequence[NDArray[np.int64]],
    classes: Sequence[float],
    ignore: Sequence[bool],
    grades: ArrayLike,
    patients: ArrayLike,
    n_grades: int,
    seed: int = 0,
) -> TileGrader:
    """Fits :class:`TileGrader` to slides with labels of some tiles.

    Args:
        features_of: returns the features ``[N_i, D]`` of the tiles of slide i, of n. It is asked twice, since
            those of all slides together can be larger than the memory.
        labels: for each slide ``[N_i]``, the class of each tile, 0..C-1, or -1 if unknown.
        classes: value of each of the C classes.
        ignore: C flags, True for classes to ignore.
        grades: ``[n]``, of the slides.
        patients: ``[n]``, of the slides; none is split over the inner folds.
        n_grades: K.
        seed: of the inner folds.

    Raises:
        UsageError: as :func:`fit_grader` and :func:`slide_score`; or a class has no labelled tile.
    """
    from sklearn.base import clone

    y, groups = np.asarray(grades), np.asarray(patients)
    classed = np.concatenate([label[label >= 0] for label in labels])
    owner = np.repeat(groups, [int((label >= 0).sum()) for label in labels])
    absent = sorted(set(range(len(classes))) - set(classed.tolist()))
    if absent:
        raise UsageError(
            f"no labelled tile of the training part is of class {absent[0]}; label some, or merge classes"
        )
    x = np.concatenate([features_of(slide)[label >= 0] for slide, label in enumerate(labels)])
    # With many tiles, a grid of fewer penalties saves minutes.
    tiles = fit_grader("logistic", x, classed, owner, len(classes), seed, penalties=(1.0, 100.0, 10_000.0))
    scores = np.empty((len(labels), 1))
    for train, test in inner_folds(y, groups, seed):
        rows = np.isin(owner, groups[train])
        fitted = _fit("logistic", clone(tiles.estimator), x[rows], classed[rows], len(classes))
        for slide in test:
            scores[slide] = slide_score(fitted.probabilities(features_of(slide)), classes, ignore)
    scale = fit_grader("ridge", scores, y, groups, n_grades, seed)
    return TileGrader(tiles, tuple(classes), tuple(ignore), scale)


def save_grader(path: Path, grader: Grader) -> None:
    """Writes a linear model as ``.npz``: arrays and the name of its kind, without pickle."""
    scaler, model = grader.estimator["scale"], grader.estimator["model"]
    with replaced(path) as file:
        np.savez(
            file,
            allow_pickle=False,
            model=grader.model,
            grades=grader.grades,
            n_grades=grader.n_grades,
            penalty=np.float64(grader.penalty or 0),
            sigma=np.nan if grader.sigma is None else grader.sigma,
            centre=scaler.mean_,
            scale=scaler.scale_,
            coefficients=model.coef_,
            intercepts=model.intercept_,
        )


def inner_folds(
    grades: ArrayLike, patients: ArrayLike, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Splits slides into up to five folds, with similar shares of the grades if possible.

    Takes grades ``[n]`` and at least two patients ``[n]``; ``seed`` shuffles. Returns rows to train on and to
    test: no patient is on both sides, every row is tested once, no part is empty.
    """
    from sklearn.model_selection import GroupKFold

    classes, groups = np.asarray(grades), np.asarray(patients)
    most = int(np.unique(classes, return_counts=True)[1].max())
    n_splits = max(2, min(_FOLDS, len(np.unique(groups)), most))
    if most > 1:  # else there is nothing to stratify by
        tests = stratified_folds(classes, groups, n_splits, seed)
        if all(len(test) for test in tests):  # with few patients a fold may be left empty
            return [(np.setdiff1d(np.arange(len(classes)), test), test) for test in tests]
    return list(GroupKFold(n_splits, shuffle=True, random_state=seed).split(classes, classes, groups))


def _linear(model: str) -> Any:
    """Returns an unfitted pipeline; KeyError for an unknown name."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    from slidetl.evaluation.ordinal import ProportionalOdds

    models = {
        "ridge": Ridge(),
        "ordinal": ProportionalOdds(),
        "logistic": LogisticRegression(tol=1e-6, max_iter=5000),
    }
    return Pipeline([("scale", StandardScaler()), ("model", models[model])])


def _fit(model: ClassicalModel, estimator: Any, x: Any, y: Any, n_grades: int) -> Grader:
    """Fits a classifier at fixed settings."""
    from sklearn.dummy import DummyClassifier
    from threadpoolctl import threadpool_limits

    known, ranks = np.unique(y, return_inverse=True)
    with threadpool_limits(1):
        fitted = (estimator if len(known) > 1 else DummyClassifier()).fit(x, ranks)
    return Grader(model, fitted, known, n_grades)


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
    check_grades(y, n_grades)
    if len(np.unique(groups)) < 2:
        raise UsageError("training slides are all of one patient; at least two patients are needed")
    return x, y.astype(np.int64), groups
