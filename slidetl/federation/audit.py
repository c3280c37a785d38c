"""Audit of exchanged weights: who was in the training, and what does a site look like?

An attacker who sees a site's messages trains *shadow* networks on data of the same kind, with known members
and known properties, and compares. Both attacks run on the outputs of such shadows, whoever trained them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval, bca_interval, share_interval
from slidetl.evaluation.metrics import auroc_metric

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MembershipAudit:
    """Success of telling members of a training from others.

    Attributes:
        auroc: 0.5 is chance.
        balanced_accuracy: of the sign of the log likelihood ratio; 0.5 is chance. Its interval is made of the
            exact ones of the two shares right, at 97.5 % each, so that both hold together at 95 %.
        tpr: share of members found at the false-positive rate ``fpr``; ``fpr`` is chance. Its interval is
            exact, for the threshold that has this rate here.
        fpr: 0..1.
    """

    auroc: Interval
    balanced_accuracy: Interval
    tpr: Interval
    fpr: float


@dataclass(frozen=True)
class CountAudit:
    """Success of inferring a count of a site, such as its patients of a grade.

    Attributes:
        auroc: of telling sites above the median count from those below; 0.5 is chance.
        error: mean absolute error of the inferred count.
        error_of_mean: the same of guessing the mean, without any message.
    """

    auroc: Interval
    error: float
    error_of_mean: float


def logit_confidence(true: ArrayLike, probabilities: ArrayLike) -> Floats:
    """Computes ``log(p / (1 - p))`` of the true grade's probability, nearly normal over trainings.

    Args:
        true: grades ``[N]``.
        probabilities: ``[N, K]``.
    """
    rows = np.asarray(probabilities, np.float64)
    p = np.clip(rows[np.arange(len(rows)), np.asarray(true)], 1e-12, 1 - 1e-12)
    return np.asarray(np.log(p) - np.log1p(-p))


def likelihood_ratios(confidence: ArrayLike, member: ArrayLike) -> Floats:
    """Computes the log likelihood ratio of membership, each shadow being the target of all others.

    LiRA, online (Carlini et al., "Membership inference attacks from first principles", IEEE S&P 2022): a
    normal distribution of the confidence with the patient in the training, and one without. As they advise
    for few shadows, all patients share the two variances.

    Args:
        confidence: ``[S, N]`` of S shadow trainings for N patients, of :func:`logit_confidence`.
        member: ``[S, N]`` bool, whether the patient was in the training.

    Returns:
        ``[S, N]``; above 0 for a probable member.

    Raises:
        UsageError: a patient is in or out of fewer than three trainings, or the confidences are not finite.
    """
    values, inside = np.asarray(confidence, np.float64), np.asarray(member, bool)
    if values.shape != inside.shape or values.ndim != 2 or not np.isfinite(values).all():
        raise UsageError("expected finite confidences and memberships, both [shadows, patients]")
    density = []
    for chosen in (inside, ~inside):
        if chosen.sum(0).min() < 3:
            raise UsageError("each patient must be in at least three shadow trainings, and out of three")
        # The target itself is left out of the mean.
        count = chosen.sum(0) - chosen
        mean = ((values * chosen).sum(0) - values * chosen) / count
        spread = np.where(chosen, values - (values * chosen).sum(0) / chosen.sum(0), 0.0)
        variance = (spread**2).sum() / (chosen.sum() - values.shape[1])
        variance = max(variance, 1e-12)
        density.append(-((values - mean) ** 2) / (2 * variance) - 0.5 * np.log(variance))
    return np.asarray(density[0] - density[1])


def centre_by_grade(confidence: ArrayLike, grades: ArrayLike) -> Floats:
    """Subtracts each training's mean confidence in patients of a grade.

    That mean tells how many patients of the grade the site has, which is no membership of a patient.

    Args:
        confidence: ``[S, N]``.
        grades: ``[N]``.
    """
    values, of = np.array(confidence, np.float64), np.asarray(grades)
    for grade in np.unique(of):
        values[:, of == grade] -= values[:, of == grade].mean(1, keepdims=True)
    return values


def audit_membership(
    confidence: ArrayLike, member: ArrayLike, fpr: float = 0.05, *, n_draws: int = 1000, seed: int = 0
) -> MembershipAudit:
    """Attacks every shadow training with the others, and scores the guesses, with intervals over patients.

    Args:
        confidence: as for :func:`likelihood_ratios`, best of :func:`centre_by_grade`.
        member: likewise.
        fpr: false-positive rate of the reported share of members.
        n_draws: resamples of the patients.
        seed: of the resampling.
    """
    scores, positive = likelihood_ratios(confidence, member), np.asarray(member, bool)
    patients = np.tile(np.arange(scores.shape[1]), len(scores))
    flat, inside = scores.ravel(), positive.ravel()

    def share(right: NDArray[np.bool_], of: NDArray[np.bool_], level: float) -> Interval:
        return share_interval(right[of], patients[of], level=level, most=int(of.sum()))

    found, spared = share(flat > 0, inside, 0.975), share(flat <= 0, ~inside, 0.975)
    others = np.sort(flat[~inside])[::-1]
    threshold = np.append(others, -np.inf)[int(fpr * len(others))]
    return MembershipAudit(
        bca_interval(auroc_metric(inside, flat), patients, sides=inside, n_draws=n_draws, seed=seed),
        Interval(
            (found.estimate + spared.estimate) / 2,
            (found.low + spared.low) / 2,
            (found.high + spared.high) / 2,
            0.95,
        ),
        share(flat > threshold, inside, 0.95),
        fpr,
    )


def audit_count(
    messages: ArrayLike, counts: ArrayLike, population: ArrayLike, *, n_draws: int = 1000, seed: int = 0
) -> CountAudit:
    """Infers a count of each site from its message, with a regression fitted to sites of other populations.

    Property inference (Ateniese et al. 2015; Ganju et al., CCS 2018) by ridge regression.

    Args:
        messages: ``[S, P]``, numbers computed from the message of each of S shadow sites: the mean
            probability of each grade for patients of the attacker tells more than a thousand weights.
        counts: ``[S]``.
        population: ``[S]``, the attacker never learns from sites that share patients with the target's.
        n_draws: resamples of the sites.
        seed: of the resampling.

    Raises:
        UsageError: there is one population, or all counts are equal.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = np.asarray(messages, np.float64), np.asarray(counts, np.float64)
    groups = np.asarray(population)
    above = y > np.median(y)
    if len(np.unique(groups)) < 2 or not above.any():
        raise UsageError("expected sites of at least two populations, with different counts")
    # Generalised cross-validation, the default, overfits where there are as many sites as weights.
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 5, 15), cv=5))
    guessed = cross_val_predict(model, x, y, groups=groups, cv=LeaveOneGroupOut())
    means = np.array([y[groups != group].mean() for group in groups])
    sites, metric = np.arange(len(y)), auroc_metric(above, guessed)
    interval = bca_interval(metric, sites, sides=above, n_draws=n_draws, seed=seed)
    return CountAudit(interval, float(np.abs(guessed - y).mean()), float(np.abs(means - y).mean()))
