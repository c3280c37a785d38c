"""The page of one graded CT series: the patches that counted, in three planes, its grade, and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slidetl.files import write_csv, write_whole
from slidetl.grading.explain import relative_attention
from slidetl.grading.report.planes import Plane, planes_at
from slidetl.grading.report.slide import grade_bars, result_sha256, warnings_of
from slidetl.grading.series import SeriesGrade, shown_patches
from slidetl.library.model_card import ModelCard
from slidetl.page import data_uri, write_page
from slidetl.tiles.pyramid import encode_view

_LONGEST_PX, _FACE_PX = 384, 192
_THUMBNAIL_PX = 240


def write_series_report(
    result: SeriesGrade, card: ModelCard, folder: Path, name: str, title: str = ""
) -> Path:
    """Writes ``name.html``, ``name.patches.csv`` and ``name.thumbnail.jpg`` for a graded series.

    The page is self-contained. Its pictures are planes through the place of each patch
    (:func:`slidetl.grading.report.planes.planes_at`).

    Args:
        result: the graded series.
        card: the model's card.
        folder: folder of the page.
        name: safe as the name of a file.
        title: name of the series; by default that of its file or folder.

    Returns:
        The path of the page.

    Raises:
        OSError: a file cannot be written.
    """
    plan = result.plan
    relative = relative_attention(result.attention)
    kinds = shown_patches(result.explanation.contributions, result.attention)
    galleries = [
        {"title": f"Patches{kind}", "patches": [_patch(result, patch, relative) for patch in patches]}
        for kind, patches in kinds.items()
    ]
    rows = result.patch_rows()
    write_csv(folder / f"{name}.patches.csv", list(rows[0]), rows)
    shown = _planes(result, next(iter(kinds.values()))[0])[1]
    page = folder / f"{name}.html"
    part = {"lung": "Lungs", "body": "Body", "none": "Series"}[plan.spec.mask]
    write_page(
        page,
        __package__,
        "series.html",
        "style.css",
        (),
        title=title or result.slide.name,
        name=name,
        result=result,
        result_sha256=result_sha256(result.to_dict()),
        card=card,
        noun="series",
        measured=[(part, f"{result.mask_ml:.0f} ml in {len(plan)} patches")],
        warnings=warnings_of(result.notes, card, "series"),
        bars=grade_bars(result.grade, result.grade_set, result.probabilities, card),
        galleries=galleries,
        has_attention=relative is not None,
        n_patches=len(plan),
        side_mm=plan.spec.tile_size_px * plan.spec.spacing_mm,
        stride_mm=plan.spec.stride_px * plan.spec.spacing_mm,
        table=f"{name}.patches.csv",
    )
    write_whole(folder / f"{name}.thumbnail.jpg", encode_view(shown.marked(_THUMBNAIL_PX), 85))
    return page


def _planes(result: SeriesGrade, patch: int) -> tuple[Plane, Plane, Plane]:
    plan, spec = result.plan, result.plan.spec
    origin = plan.origins_voxel[patch]
    return planes_at(plan.volume, _place(result, patch), origin, spec.tile_size_px, spec.window_hu)


def _place(result: SeriesGrade, patch: int) -> NDArray[np.float64]:
    """Returns the place ``(x, y, z)`` in a patch to show, voxels: the centre, if none was sought."""
    point = result.points_voxel[patch]
    return np.asarray(point if np.isfinite(point).all() else result.centres_voxel[patch])


def _patch(result: SeriesGrade, patch: int, relative: NDArray[np.float32] | None) -> dict[str, Any]:
    return {
        "contribution": float(result.explanation.contributions[patch]),
        "attention": None if relative is None else float(relative[patch]),
        "at_mm": result.plan.volume.frame.to_patient_mm(_place(result, patch)).tolist(),
        "planes": [
            {
                "name": plane.name,
                "sides": plane.sides,
                "picture": data_uri("jpeg", encode_view(plane.marked(_LONGEST_PX), 85)),
                "width": plane.pixels.shape[1],
                "height": plane.pixels.shape[0],
                "face": data_uri("jpeg", _enlarged(plane.within_box())),
            }
            for plane in _planes(result, patch)
        ],
    }


def _enlarged(face: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(face).convert("RGB").resize((_FACE_PX, _FACE_PX), Image.Resampling.BICUBIC)
    return encode_view(np.asarray(picture), 85)
