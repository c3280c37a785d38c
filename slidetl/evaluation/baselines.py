"""Grades slides by a few numbers, as a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.classical import ClassicalModel, Grader, fit_grader
from slidetl.evaluation.metrics import probability_metrics

CANDIDATES: tuple[ClassicalModel, ...] = ("ridge", "logistic", "trees")

_FOLDS = 5


@dataclass(frozen=True, eq=False)
class BestGrader:
    """The best of three classical models on a few numbers a slide.

    Attributes:
        grader: fitted to all the slides; ``grader.model`` is its name.
        out_of_fold: ``[n, K]`` probabilities by models fitted without the patient.
    """

    grader: Grader
    out_of_fold: NDArray[np.float64]

    @property
    def predictions(self) -> NDArray[np.int64]:
        """The most probable grades out of fold, ``[n] int64``."""
        return np.asarray(self.out_of_fold.argmax(axis=1))


def fit_best(
    features: ArrayLike, grades: ArrayLike, patients: ArrayLike, n_grades: int, seed: int = 0
) -> BestGrader:
    """Fits ridge, logistic regression and boosted trees, and keeps the one of least log loss out of fold.

    Features ``[n, D]`` are such as mean red, green, blue and stained area; folds do not split patients.
    Choosing on the folds that judge it favours the baseline, on purpose.

    Raises:
        UsageError: fewer than three patients.
    """
    from sklearn.model_selection import GroupKFold

    x, truth, groups = np.asarray(features, np.float64), np.asarray(grades), np.asarray(patients)
    n_patients = len(np.unique(groups))
    if n_patients < 3:
        raise UsageError(f"a baseline needs slides of at least 3 patients, not {n_patients}; add some")
    rows = {model: np.zeros((len(truth), n_grades)) for model in CANDIDATES}
    for train, held_out in GroupKFold(min(_FOLDS, n_patients)).split(truth, truth, groups):
        for model in CANDIDATES:
            fitted = fit_grader(model, x[train], truth[train], groups[train], n_grades, seed)
            rows[model][held_out] = fitted.probabilities(x[held_out])
    best = min(CANDIDATES, key=lambda model: probability_metrics(truth, rows[model]).log_loss)
    return BestGrader(fit_grader(best, x, truth, groups, n_grades, seed), rows[best])
