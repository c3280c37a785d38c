"""The page of a graded CT series: its grade, the places that counted, and pictures that show them."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slidetl.grading.explain import Explanation
from slidetl.grading.report.series import write_series_report
from slidetl.grading.report.slide import has_slide_report
from slidetl.grading.series import SeriesGrade
from slidetl.library.model_card import ModelCard
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.patches import plan_patches
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.series import Series
from tests.grading.report.test_slide import Page

SPEC = TileSpec(spacing_mm=2.0, tile_size_px=16, stride_px=8, mask="none", min_tissue=0.0)
BALL_MM = np.array([10.0, -22.0, 14.0])


@pytest.fixture
def graded() -> SeriesGrade:
    """A series of air with a ball, whose patches count by how near they are to the ball."""
    frame = VolumeFrame((48, 40, 32), (2.0, 2.0, 2.0), (-40.0, -40.0, -20.0), tuple(np.eye(3).ravel()))
    z, y, x = np.indices((32, 40, 48))
    near = np.linalg.norm(frame.to_patient_mm(np.stack([x, y, z], axis=-1)) - BALL_MM, axis=-1)
    hu = np.where(near < 7, 60, -900).astype(np.int16)
    notes = ("slices 3 and 4 are doubled",)
    plan = plan_patches(Series(Path("scans/p1"), frame, "aa" * 32, notes, lambda: iter(hu)), SPEC)
    centres = np.asarray(plan.origins_voxel + (SPEC.tile_size_px - 1) / 2, np.float64)
    away = np.linalg.norm(frame.to_patient_mm(centres) - BALL_MM, axis=1)
    points = np.full(centres.shape, np.nan)
    points[np.argsort(away)[:5]] = frame.to_voxel(BALL_MM)
    contributions = (np.exp(-away / 10) - 0.1).astype(np.float32)
    attention = np.exp(-away / 10)
    return SeriesGrade(
        slide=Path("scans/p1"),
        fingerprint="aa" * 32,
        grade=1,
        grade_name="mild",
        probabilities=(0.2, 0.7, 0.06, 0.04),
        expected_grade=0.94,
        grade_set=(0, 1),
        novelty=1.4,
        model_sha256="bb" * 32,
        precision="float32",
        plan=plan,
        attention=(attention / attention.sum()).astype(np.float32),
        explanation=Explanation(contributions, "log-odds", 1.0, 1.0 - float(contributions.sum())),
        points_voxel=points,
    )


def card_of_series(card: ModelCard) -> ModelCard:
    return dataclasses.replace(card, tile_spec=SPEC, backbone="conv3d_64")


def test_the_page_says_what_the_model_said(graded: SeriesGrade, card: ModelCard, tmp_path: Path) -> None:
    graded = dataclasses.replace(graded, doubts=card_of_series(card).doubts_about(graded.novelty))
    path = write_series_report(graded, card_of_series(card), tmp_path, "p1")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "p1.html",
        "p1.patches.csv",
        "p1.thumbnail.jpg",
    ]
    text = Page(path.read_text()).text
    for said in (
        "For research; not a medical device.",
        "Grade mild",
        "Not ruled out: none to mild",
        "slices 3 and 4 are doubled",
        "unlike the series that the model was trained on (stains: trichrome): its novelty is 1.4, where none "
        "of theirs is above 1; check scanner, contrast, organ and spacing",
        "Series 492 ml in 60 patches",
        "16 voxels along each axis at 2 mm, -1000 to 400 HU",
        "Patches that raise the score most",
        "60 patches of 32 mm were graded, every 16 mm; all are in p1.patches.csv.",
        "60 series of 50 patients",
        "lowers (−) the latent score (log-odds). The sum over all patches is the latent score, 1.00, less",
    ):
        assert said in text
    assert "tissue" not in text and "stains" in text
    assert has_slide_report(tmp_path, "p1", graded.to_dict())


def test_the_patch_that_counts_most_is_shown_at_its_place(
    graded: SeriesGrade, card: ModelCard, tmp_path: Path
) -> None:
    page = Page(write_series_report(graded, card_of_series(card), tmp_path, "p1").read_text())
    with (tmp_path / "p1.patches.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and [row["rank"] for row in rows[:2]] == ["1", "2"]
    centre, place = (np.array([float(rows[0][f"{of}{axis}_mm"]) for axis in "xyz"]) for of in ("", "place_"))
    assert np.abs(centre - BALL_MM).max() <= 8  # half a stride
    assert place.tolist() == BALL_MM.tolist() and rows[-1]["place_x_mm"] == ""
    assert "at x 10.0, y -22.0, z 14.0 mm" in page.text
    first = [about["src"] or "" for tag, about in page.elements if tag == "img"][:6]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(src.split(",")[1])))) for src in first]
    for whole, face in zip(pictures[::2], pictures[1::2], strict=True):
        orange = whole[..., 0].astype(int) - whole[..., 2] > 60
        assert orange.any(axis=0).all() and orange.any(axis=1).all()  # lines from edge to edge
        assert face.shape[0] == face.shape[1] == 192 and face.max() > 150  # the ball is in the patch
    axial = pictures[0].astype(float)
    scale = axial.shape[1] / 48
    row, column = (BALL_MM[[1, 0]] + 40) / 2 * scale
    assert axial[round(row), round(column)].min() > 150


def test_the_result_lists_the_patches_that_counted(graded: SeriesGrade) -> None:
    result = json.loads(json.dumps(graded.to_dict(), allow_nan=False))
    assert len(result["patches"]) == 5 and result["tiles"] == 60 and result["spacing_mm"] == 2.0
    contributions = [row["contribution"] for row in result["patches"]]
    assert contributions == sorted(contributions, reverse=True)
    first = result["patches"][0]
    assert [first[f"place_{axis}_mm"] for axis in "xyz"] == BALL_MM.tolist()
    nearest = np.argmax(graded.explanation.contributions)
    expected = graded.plan.volume.frame.to_patient_mm(graded.centres_voxel[nearest])
    assert [first[f"{axis}_mm"] for axis in "xyz"] == pytest.approx(expected.tolist())


def test_patches_that_do_not_raise_the_score_are_not_shown_as_such(
    graded: SeriesGrade, card: ModelCard, tmp_path: Path
) -> None:
    lowered = dataclasses.replace(graded.explanation, contributions=-np.ones(60, np.float32))
    even = np.full(60, 1 / 60, np.float32)
    result = dataclasses.replace(graded, explanation=lowered, attention=even)
    text = Page(write_series_report(result, card_of_series(card), tmp_path, "p1").read_text()).text
    assert "Patches that lower the score most" in text and "raise the score most" not in text
    assert "weighs all patches alike" in text and "-1 log-odds at" in text
