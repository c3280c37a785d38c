from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.analysis.novelty import fit_familiar
from slidetl.errors import UsageError


def slides_like(rng: np.random.Generator, n: int, dimensions: int = 60) -> NDArray[np.float64]:
    """Embeddings with three wide directions and little beside, as those of a network are."""
    basis = np.random.default_rng(1).normal(size=(3, dimensions))
    return rng.normal(size=(n, 3)) @ basis + 0.1 * rng.normal(size=(n, dimensions)) + 5


def test_distance_is_mahalanobis_where_all_directions_are_kept() -> None:
    rng = np.random.default_rng(0)
    slides = rng.normal(size=(400, 3)) * [3, 1, 0.5] + [1, 2, 3]
    fitted = fit_familiar(slides, [str(i) for i in range(400)])
    covariance = np.cov(slides.T)
    centred = slides[:7] - slides.mean(0)
    expected = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred) / 3
    # Two directions and the rest, which here is a single one: nothing is approximated.
    np.testing.assert_allclose(fitted.novelty(slides[:7]), expected, rtol=1e-3)


def test_new_slides_of_the_kind_seldom_pass_the_limit_and_others_do() -> None:
    passed = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        fitted = fit_familiar(slides_like(rng, 40), [str(i) for i in range(40)])
        passed.append((fitted.novelty(slides_like(rng, 200)) > fitted.limit).mean())
        elsewhere = slides_like(rng, 50) + np.random.default_rng(9).normal(size=60)
        assert (fitted.novelty(elsewhere) > fitted.limit).all()
    assert np.mean(passed) < 1 / 41  # what it would be without the margin


def test_slides_of_a_patient_are_left_out_together() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(12), 4)
    slides = rng.normal(size=(12, 30))[patients] + 0.01 * rng.normal(size=(48, 30))
    together = fit_familiar(slides, [str(patient) for patient in patients]).limit
    apart = fit_familiar(slides, [str(i) for i in range(48)]).limit
    assert together > 5 * apart


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 5 patients"):
        fit_familiar(np.zeros((8, 3)), ["a", "b"] * 4)


def test_constant_embeddings_do_not_divide_by_zero() -> None:
    fitted = fit_familiar(np.ones((6, 4)), [str(i) for i in range(6)])
    assert fitted.novelty(np.ones((1, 4))).item() == 0
    assert fitted.novelty(np.zeros((1, 4))).item() > fitted.limit
