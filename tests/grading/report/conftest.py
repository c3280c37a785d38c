"""A graded slide and a model's card, without a model: what the pages are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.grading.explain import Explanation
from slidetl.grading.grade import SlideGrade
from slidetl.library.model_card import Evidence, ModelCard, TrainingData
from slidetl.slides import open_slide
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.plan import plan_tiles
from tests.conftest import Picture, PyramidTiff

SPEC = TileSpec(1.0, 64, min_tissue=0.5)
GRADES = ("none", "mild", "moderate", "severe")

Graded = Callable[..., SlideGrade]


def explanation_of(contributions: NDArray[np.float64]) -> Explanation:
    """An exact explanation; the score is 1.2 if all tiles count alike."""
    return Explanation(contributions.astype(np.float32), "log-odds", 1.2 + contributions.sum(), 1.2)


def grade_of(path: Path, spec: TileSpec = SPEC, seed: int = 0) -> SlideGrade:
    """What some model might say of a slide."""
    with open_slide(path) as slide:
        plan = plan_tiles(slide, spec)
    rng = np.random.default_rng(seed)
    attention = rng.dirichlet(np.ones(len(plan))).astype(np.float32)
    return SlideGrade(
        slide=path,
        fingerprint=plan.info.fingerprint,
        grade=2,
        grade_name=GRADES[2],
        probabilities=(0.05, 0.25, 0.6, 0.1),
        expected_grade=1.75,
        grade_set=(1, 2),
        tissue_mm2=0.8,
        novelty=0.7,
        model_sha256="ab" * 32,
        precision="float32",
        plan=plan,
        origins_level0=plan.origins_level0,
        attention=attention,
        explanation=explanation_of(rng.normal(0, 0.02, len(plan))),
    )


@pytest.fixture
def slide_picture(tissue_picture: Callable[[int, int], Picture]) -> Picture:
    """Tissue that is darker towards the lower right, ``[1100, 1400, 3]``; neither side is a round number."""
    picture = tissue_picture(1400, 5)[:1100].astype(np.float64)
    shade = np.linspace(1, 0.6, 1100)[:, None] * np.linspace(1, 0.7, 1400)[None]
    tissue = picture.min(2) < 255
    picture[tissue] *= shade[tissue][:, None]
    return picture.astype(np.uint8)


@pytest.fixture
def graded(pyramid_tiff: PyramidTiff, slide_picture: Picture) -> Graded:
    """``graded(name="slide", spec=SPEC)``: a slide at 0.5 um/px, written and graded."""

    def make(name: str = "slide", spec: TileSpec = SPEC) -> SlideGrade:
        return grade_of(pyramid_tiff(slide_picture, mpp=0.5, factors=(4,), name=name), spec)

    return make


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(
        grades=GRADES,
        tile_spec=SPEC,
        backbone="mobilenetv3_small_050",
        architecture={"name": "mobilenetv3_small_050"},
        normalisation={"mean": [0.5] * 3, "std": [0.5] * 3},
        versions={"slidetl": "0.1.0", "torch": "2.6"},
        weights_sha256="cd" * 32,
        licence="CC BY 4.0",
        training=TrainingData(60, 50, ("north", "south"), ("GT450",), ("trichrome",), 0.5, "ef" * 32),
        evidence=Evidence(60, 50, {"QWK": (0.71, 0.6, 0.8)}, 1.2, 0.9, 0.8, "01" * 32),
        novelty_limit=3.0,
        lineage=("23" * 32,),
    )
