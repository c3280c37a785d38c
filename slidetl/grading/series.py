"""The grade of a CT series, and the patches that counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.grading.explain import Explanation, ranked_tiles, telling_tiles
from slidetl.library.model_card import ModelCard
from slidetl.tiles.patches import PatchPlan

_SHOWN = 5  # patches of either sign; all are in the table


def shown_patches(contributions: NDArray[np.float32], attention: NDArray[np.float32]) -> dict[str, list[int]]:
    """Finds the patches to show, as :func:`slidetl.grading.explain.telling_tiles`."""
    return telling_tiles(contributions, attention, _SHOWN)


@dataclass(frozen=True, eq=False)
class SeriesGrade:
    """The grade of a series, and each patch's part in it.

    Attributes:
        slide: the series, as given.
        fingerprint: of its content.
        grade: the most probable grade, 0..K-1.
        grade_name: its name.
        probabilities: of the grades 0..K-1; they sum to one.
        expected_grade: their mean, 0..K-1: the continuous score.
        grade_set: lowest and highest grade not ruled out; None if the model has no evidence for such a set.
        novelty: distance from the training series, with 1 as the limit; None if the model has no limit.
        model_sha256: hash of the model file.
        precision: number format of the backbone's forward pass, ``float32`` or ``bfloat16``.
        plan: the patches, with the series at their spacing.
        attention: ``[N] float32``, weight of each patch; they sum to one.
        explanation: each patch's contribution to the score.
        points_voxel: ``[N, 3]`` the place ``(x, y, z)`` in each of :func:`shown_patches` to which the grade
            reacts most, voxels of ``plan.volume``; NaN for other patches.
        doubts: from :meth:`slidetl.library.model_card.ModelCard.doubts_about`.
    """

    slide: Path
    fingerprint: str
    grade: int
    grade_name: str
    probabilities: tuple[float, ...]
    expected_grade: float
    grade_set: tuple[int, int] | None
    novelty: float | None
    model_sha256: str
    precision: str
    plan: PatchPlan
    attention: NDArray[np.float32]
    explanation: Explanation
    points_voxel: NDArray[np.float64]
    doubts: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Doubts about the series."""
        return (*self.plan.notes, *self.doubts)

    @property
    def centres_voxel(self) -> NDArray[np.float64]:
        """Centres of the patches ``[N, 3]``, voxels of ``plan.volume``."""
        return np.asarray(self.plan.origins_voxel + (self.plan.spec.tile_size_px - 1) / 2, np.float64)

    @property
    def mask_ml(self) -> float:
        """Volume of the lungs, or of the part of the body that patches lie in, millilitres."""
        return float(self.plan.mask.sum()) * float(np.prod(self.plan.overview.spacing_mm)) / 1000

    def patch_rows(self) -> list[dict[str, Any]]:
        """Lists the patches, the greatest contribution first, as rows of a table.

        Of equal contributions the greatest attention is first. Centres, and places that were sought, are in
        patient coordinates (LPS), millimetres.
        """
        contributions = self.explanation.contributions.astype(np.float64)
        relative = self.attention.astype(np.float64) * len(self.attention)
        frame = self.plan.volume.frame
        centres, places = frame.to_patient_mm(self.centres_voxel), frame.to_patient_mm(self.points_voxel)
        return [
            {
                "rank": rank,
                "contribution": float(f"{contributions[patch]:.6g}"),
                "attention": round(float(relative[patch]), 6),
                **{
                    f"{axis}_mm": round(mm, 2)
                    for axis, mm in zip("xyz", centres[patch].tolist(), strict=True)
                },
                **{
                    f"place_{axis}_mm": round(mm, 2) if np.isfinite(mm) else None
                    for axis, mm in zip("xyz", places[patch].tolist(), strict=True)
                },
            }
            for rank, patch in enumerate(ranked_tiles(self.explanation.contributions, self.attention), 1)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain JSON values, with the shown patches that do not lower the score."""
        contributions = self.explanation.contributions
        shown = [n for kind in shown_patches(contributions, self.attention).values() for n in kind]
        return {
            "slide": str(self.slide),
            "fingerprint": self.fingerprint,
            "grade": self.grade,
            "grade_name": self.grade_name,
            "grade_set": list(self.grade_set) if self.grade_set else None,
            "probabilities": [round(probability, 7) for probability in self.probabilities],
            "expected_grade": round(self.expected_grade, 5),
            "tiles": len(self.attention),
            "mask_ml": round(self.mask_ml, 2),
            "novelty": None if self.novelty is None else float(ModelCard.format_novelty(self.novelty, ".4f")),
            "explanation": self.explanation.to_dict(),
            "patches": self.patch_rows()[: int((contributions[shown] >= 0).sum())],
            "model_sha256": self.model_sha256,
            "precision": self.precision,
            "spacing_mm": self.plan.spec.spacing_mm,
            "notes": list(self.notes),
        }
