from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from slidetl.analysis.neighbours import best_of, concept, cosines
from slidetl.errors import UsageError


def test_cosines_of_mapped_blocks_rank_as_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidetl.analysis.neighbours._ROWS", 64)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 12)).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    queries = rng.normal(size=(4, 12)).astype(np.float32)
    found = cosines(queries, [mapped[:200], mapped[200:]])
    exact = NearestNeighbors(metric="cosine", algorithm="brute").fit(rows.astype(np.float64))
    distances, order = exact.kneighbors(queries, 20)
    np.testing.assert_array_equal(np.argsort(-found, axis=1)[:, :20], order)
    np.testing.assert_allclose(1 - np.sort(found)[:, ::-1][:, :20], distances, atol=1e-6)


def test_limits_by_slide_and_patient_hold() -> None:
    similarity = np.array([0.9, 0.8, 0.95, 0.7, 0.99, 0.6, 0.8], np.float32)
    slide = np.array([0, 0, 0, 1, 2, 1, 1])
    is_allowed = slide != 2
    np.testing.assert_array_equal(best_of(similarity, slide, is_allowed, 9), [2, 0, 1, 6, 3, 5])
    np.testing.assert_array_equal(best_of(similarity, slide, is_allowed, 9, 2), [2, 0, 6, 3])
    np.testing.assert_array_equal(best_of(similarity, slide, is_allowed, 3, 1), [2, 6])
    assert not len(best_of(similarity, slide, slide > 5, 3))


def test_concepts_are_sums_of_directions_and_lengths_do_not_count() -> None:
    x, y = np.eye(4)[:2]
    np.testing.assert_allclose(concept(np.stack([5 * x, y])), [2**-0.5, 2**-0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        concept(np.stack([x + y]), np.stack([y])), [0.92388, -0.38268, 0, 0], atol=1e-5
    )
    with pytest.raises(UsageError, match="cancel"):
        concept(np.stack([x]), np.stack([3 * x]))
    with pytest.raises(UsageError, match="at least one"):
        concept(np.zeros((0, 4)))


def test_what_is_not_finite_is_refused_and_a_row_of_zeros_is_like_nothing() -> None:
    rows = np.ones((3, 2), np.float16)
    rows[1] = 0
    np.testing.assert_allclose(cosines(rows[:1], [rows]), [[1, 0, 1]], atol=1e-6)
    rows[2, 0] = np.nan
    with pytest.raises(UsageError, match="row 2 is not finite"):
        cosines(rows[:1], [rows])
    with pytest.raises(UsageError, match="2 columns"):
        cosines(rows[:1], [np.ones((3, 4))])
