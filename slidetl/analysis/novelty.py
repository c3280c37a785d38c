"""Measures the distance of a slide from the training slides of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import UsageError

_FOLDS = 10
_MARGIN = 2.0  # squared distance: slides may lie 1.4 times as far out as the farthest training slide


@dataclass(frozen=True, eq=False)
class Familiar:
    """A Gaussian around the mean embeddings of the training slides, a few directions wide.

    Probabilistic principal components (Tipping and Bishop, J. R. Statist. Soc. B 61, 1999): the leading
    directions have their own variances, all others share one.

    Attributes:
        mean: ``[D] float32``.
        directions: ``[R, D] float32``, orthonormal.
        variances: ``[R] float32`` along them.
        residual_variance: along every other direction.
        limit: greatest novelty of a familiar slide: twice the highest of any training slide when the Gaussian
            was fitted without its patient. One more slide of the same kind would pass the highest itself
            about once in ``patients + 1`` times; twice that, much more seldom. Another stain lies far beyond.
    """

    mean: NDArray[np.float32]
    directions: NDArray[np.float32]
    variances: NDArray[np.float32]
    residual_variance: float
    limit: float

    def novelty(self, embeddings: ArrayLike) -> NDArray[np.float64]:
        """Computes squared Mahalanobis distances ``[N]`` of mean embeddings ``[N, D]``, divided by D."""
        centred = np.asarray(embeddings, np.float64) - self.mean
        along = centred @ self.directions.T.astype(np.float64)
        rest = np.maximum((centred**2).sum(1) - (along**2).sum(1), 0)
        squared = (along**2 / self.variances).sum(1) + rest / self.residual_variance
        return np.asarray(squared / centred.shape[1], np.float64)


def fit_familiar(embeddings: ArrayLike, patients: Sequence[str]) -> Familiar:
    """Fits a Gaussian to the training slides.

    Args:
        embeddings: ``[N, D]``, the mean over the tiles of each slide.
        patients: ``[N]``.

    Raises:
        UsageError: fewer than five patients.
    """
    slides = np.asarray(embeddings, np.float64)
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 5:
        raise UsageError(
            f"expected slides of at least 5 patients to tell what is familiar, found {len(names)}"
        )
    folds, limit = min(_FOLDS, len(names)), 0.0
    for fold in range(folds):
        out = patient % folds == fold
        limit = max(limit, float(_fit(slides[~out]).novelty(slides[out]).max()))
    return replace(_fit(slides), limit=_MARGIN * limit)


def _fit(slides: NDArray[np.float64]) -> Familiar:
    n, dimensions = slides.shape
    rank = max(1, min(16, n // 5, dimensions - 1))
    mean = slides.mean(0)
    _, singular, directions = np.linalg.svd(slides - mean, full_matrices=False)
    variances = singular**2 / (n - 1)
    # Equation 9 of the paper; the floor keeps a direction without any spread from deciding alone.
    residual = float(variances[rank:].sum() / (dimensions - rank))
    residual = max(residual, 1e-6 * float(variances.mean()), 1e-12)
    return Familiar(
        mean=mean.astype(np.float32),
        directions=directions[:rank].astype(np.float32),
        variances=np.maximum(variances[:rank], residual).astype(np.float32),
        residual_variance=residual,
        limit=float("inf"),
    )
