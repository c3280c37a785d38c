"""What a grading model must beat: the same slides graded on next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError


@dataclass(frozen=True)
class ColourBaseline:
    """The best of several classifiers on a few numbers a slide, judged on patients it did not see.

    Attributes:
        accuracy: share of slides graded right out of fold, 0..1.
        predictions: the out-of-fold grades, ``[n] int64``.
        name: of the classifier that did best.
    """

    accuracy: float
    predictions: NDArray[np.int64]
    name: str


def colour_baseline(
    features: ArrayLike, grades: ArrayLike, patients: ArrayLike, *, seed: int = 0, n_splits: int = 5
) -> ColourBaseline:
    """Grades slides by mean colour and tissue area alone, cross-validated over patients.

    Ridge regression (rounded to a grade), multinomial logistic regression and histogram boosting are
    each judged out of fold, and the best of them is reported. Choosing it on the folds that judge it
    favours the baseline, on purpose: it is there to be beaten.

    Args:
        features: ``[n, d]``, such as mean red, green, blue and stained area.
        grades: ``[n]`` integers from 0.
        patients: ``[n]``, anything that identifies a patient; no patient is split over folds.
        seed: of the folds and the boosting.
        n_splits: number of folds.

    Raises:
        UsageError: lengths differ, a value is not finite, there are fewer than two grades, a grade has
            fewer slides than there are folds, or there are fewer patients than folds.
    """
    values, truth, groups = np.asarray(features, np.float64), np.asarray(grades), np.asarray(patients)
    if values.ndim != 2 or truth.shape != (len(values),) or groups.shape != (len(values),):
        raise UsageError(
            f"a baseline needs features [n, d], grades [n] and patients [n], not {values.shape}, "
            f"{truth.shape} and {groups.shape}"
        )
    if not np.isfinite(values).all():
        raise UsageError("features of a baseline must be finite numbers; leave out slides without tissue")
    known, counts = np.unique(truth, return_counts=True)
    if len(known) < 2 or counts.min() < n_splits or len(np.unique(groups)) < n_splits:
        by_grade = dict(zip(known.tolist(), counts.tolist(), strict=True))
        raise UsageError(
            f"a baseline over {n_splits} folds needs at least two grades with {n_splits} slides each, and "
            f"{n_splits} patients; there are {len(np.unique(groups))} patients, and by grade {by_grade}"
        )

    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # it ships none

    candidates: dict[str, Callable[[], Any]] = {
        "ridge": lambda: make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 2, 9))),
        "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "boosting": lambda: HistGradientBoostingClassifier(
            max_iter=50, min_samples_leaf=5, early_stopping=False, random_state=seed
        ),
    }
    folds = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed)
    predictions = {name: np.empty(len(truth), np.int64) for name in candidates}
    # One thread: on so few rows threads wait for each other, on a busy machine for minutes.
    with threadpool_limits(1):
        for train, test in folds.split(values, truth, groups):
            for name, make in candidates.items():
                fitted = make().fit(values[train], truth[train])
                predicted = np.rint(fitted.predict(values[test])) if len(test) else np.empty(0)
                predictions[name][test] = np.clip(predicted, known[0], known[-1])
    best = max(candidates, key=lambda name: float(np.mean(predictions[name] == truth)))
    return ColourBaseline(float(np.mean(predictions[best] == truth)), predictions[best], best)
