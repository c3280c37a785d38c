"""The page of one graded slide: the slide itself with its maps, its grade, and the model's card."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slidetl.atlas.options import Selection
from slidetl.atlas.pictures import similar_command
from slidetl.errors import SlideReadError
from slidetl.files import write_whole
from slidetl.grading.explain import relative_attention, telling_tiles
from slidetl.grading.report.geojson import write_geojson
from slidetl.grading.report.maps import TileMap, left_out_level0, maps_of
from slidetl.library.model_card import ModelCard
from slidetl.page import data_uri, script_json, write_page
from slidetl.slides import Slide, open_slide
from slidetl.tiles.pyramid import Canvas, Pyramid, build_pyramid, encode_thumbnail

if TYPE_CHECKING:
    from slidetl.grading.grade import SlideGrade

BUDGET_BYTES = 16 * 2**20
"""Size of the slide's pyramid in a page. Base64 adds a third; a whole page stays below 25 MB."""

PAGE = (".thumbnail.jpg", ".geojson", ".html")
"""Endings of the files beside a page, and of the page: it is written first and removed last, to tell whose
they are."""

_TILES_SHOWN = 8
_TILE_SHOWN_PX = 512
_THUMBNAIL_PX = 240


def write_slide_report(
    result: SlideGrade,
    card: ModelCard,
    folder: Path,
    name: str,
    *,
    title: str = "",
    threads: int = 1,
    budget_bytes: int = BUDGET_BYTES,
) -> Path:
    """Writes ``name.html``, ``name.geojson`` and ``name.thumbnail.jpg`` for a graded slide.

    The page is self-contained: it works from ``file://``, without a network.

    Args:
        result: the graded slide; its file is read again.
        card: the model's card.
        folder: folder of the page.
        name: safe as the name of a file.
        title: name of the slide; by default that of its file.
        threads: number of threads to read and compress.
        budget_bytes: size of the slide's picture in the page; it sets the finest level.

    Returns:
        The path of the page.

    Raises:
        SlideError: the slide can no longer be opened.
        OSError: a file cannot be written.
    """
    plan = result.plan
    spec, mpp = plan.spec, plan.info.mpp_level0
    with open_slide(result.slide, icc=spec.icc, mpp_replace=mpp, channels=spec.channels) as slide:
        pyramid = build_pyramid(
            slide, Canvas.of_plan(plan), result.origins_level0, result.attention, budget_bytes, threads
        )
        galleries = _galleries(slide, result, pyramid, name)
    maps = maps_of(result)
    page = folder / f"{name}.html"
    write_page(
        page,
        __package__,
        "slide.html",
        "style.css",
        ("openseadragon/openseadragon.min.js", "viewer.js"),
        title=title or result.slide.name,
        name=name,
        result=result,
        result_sha256=result_sha256(result.to_dict()),
        card=card,
        n_wanted=len(plan),
        n_graded=len(result.attention),
        noun="slides",
        measured=[("Tissue", f"{result.tissue_mm2:.3g} mm² in {len(result.attention)} tiles")],
        warnings=warnings_of(result.notes, card, "slides"),
        bars=grade_bars(result.grade, result.grade_set, result.probabilities, card),
        galleries=galleries,
        maps=maps,
        pyramid=pyramid,
        quality=_quality(result),
        data=script_json(_data(result, pyramid, maps)),
    )
    write_whole(folder / f"{name}.thumbnail.jpg", encode_thumbnail(plan.thumbnail, _THUMBNAIL_PX, 80))
    write_geojson(result, folder / f"{name}.geojson")
    return page


def has_slide_report(folder: Path, name: str, result: Mapping[str, Any]) -> bool:
    """Tells if ``name.html`` in a folder shows a result, given as by :meth:`SlideGrade.to_dict`."""
    return _shown_sha256(folder, name) == result_sha256(result)


def has_foreign_page(folder: Path, name: str) -> bool:
    """Tells if ``name.html``, or a file beside it, is in a folder, and of another origin."""
    return any((folder / f"{name}{suffix}").exists() for suffix in PAGE) and not _shown_sha256(folder, name)


def remove_page(folder: Path, name: str) -> None:
    """Removes ``name.html`` from a folder, and the files beside it; a page of another origin stays."""
    if _shown_sha256(folder, name):
        for suffix in PAGE:
            (folder / f"{name}{suffix}").unlink(missing_ok=True)


def result_sha256(result: Mapping[str, Any]) -> str:
    """Computes the hash by which the page of a result is known, wherever its slide is now."""
    shown = {key: value for key, value in result.items() if key != "slide"}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _shown_sha256(folder: Path, name: str) -> str:
    """Reads the hash of the result that a page shows; empty if it is no page of a result.

    The index by 0.1.0 has no hash; its table stands for one.
    """
    try:
        with (folder / f"{name}.html").open(encoding="utf-8") as file:
            text = file.read(None if name == "index" else 1000)
    except (OSError, UnicodeDecodeError):
        return ""
    found = re.search(r'<meta name="slidetl-result" content="([^"]+)">', text)
    if found is None and name == "index":
        found = re.search(r'<table id="(slides)">.* Made by slidetl\.</p></footer>', text, re.DOTALL)
    return found[1] if found else ""


def _data(result: SlideGrade, pyramid: Pyramid, maps: list[TileMap]) -> dict[str, Any]:
    """Collects the data of the page's script; lengths in pixels of the pyramid's finest level."""
    plan = result.plan
    stride = np.asarray(plan.extent_level0) * plan.spec.stride_px / plan.spec.tile_size_px
    return {
        **pyramid.to_viewer(Canvas.of_plan(plan), stride),
        # Spacing of the separately shown tiles; if it is finer than the rest, they are laid into the slide.
        "mppShown": plan.spec.mpp * max(1.0, plan.spec.tile_size_px / _TILE_SHOWN_PX),
        "maps": [
            {
                "name": tile_map.name,
                "unit": tile_map.unit,
                "colours": tile_map.colours.tolist(),
                "categories": tile_map.categories,
                "cells": np.round(tile_map.origins_level0 / stride).astype(int).tolist(),
                "shades": tile_map.shades.tolist(),
                "values": [round(value, 4) for value in tile_map.values.tolist()],
            }
            for tile_map in maps
        ],
    }


def _galleries(slide: Slide, result: SlideGrade, pyramid: Pyramid, name: str) -> list[dict[str, Any]]:
    """Collects the tiles to show."""
    relative = relative_attention(result.attention)
    kinds = telling_tiles(result.explanation.contributions, result.attention, _TILES_SHOWN)
    return [
        {"title": f"Tiles{kind}", "tiles": [_tile(slide, result, pyramid, n, relative, name) for n in tiles]}
        for kind, tiles in kinds.items()
    ]


def _tile(
    slide: Slide,
    result: SlideGrade,
    pyramid: Pyramid,
    tile: int,
    relative: NDArray[np.float32] | None,
    name: str,
) -> dict[str, Any]:
    spec = result.plan.spec
    x, y = result.origins_level0[tile].tolist()
    scale_x, scale_y = (mpp / pyramid.mpp for mpp in result.plan.info.mpp_level0)
    side = (spec.tile_size_px, spec.tile_size_px)
    try:
        pixels = slide.read((x, y), side, spec.mpp, spec.mpp_tolerance)
        picture = data_uri("jpeg", encode_thumbnail(pixels, _TILE_SHOWN_PX, 85))
    except SlideReadError:  # it was readable before; the page is useful without it
        picture = ""
    return {
        "picture": picture,
        "place": f"{x * scale_x:.2f},{y * scale_y:.2f}",
        "attention": None if relative is None else float(relative[tile]),
        "contribution": float(result.explanation.relative[tile]),
        "command": similar_command(Selection(Path("CACHE"), "FEATURES", Path("MANIFEST")), f"{name}@{x},{y}"),
        "x_level0": x,
        "y_level0": y,
    }


def grade_bars(
    grade: int, grade_set: tuple[int, int] | None, probabilities: Sequence[float], card: ModelCard
) -> list[dict[str, Any]]:
    """Lists the grades with their probabilities, for a page."""
    lowest, highest = grade_set or (len(card.grades), -1)
    named = enumerate(zip(card.grades, probabilities, strict=True))
    return [
        {"grade": name, "probability": p, "is_best": k == grade, "in_set": lowest <= k <= highest}
        for k, (name, p) in named
    ]


def warnings_of(notes: Sequence[str], card: ModelCard, noun: str) -> list[str]:
    """Lists the warnings of a page; ``noun`` is what the model grades."""
    if card.evidence is not None:
        return list(notes)
    return [*notes, f"The model carries no evidence of how well it grades {noun} that were kept from it."]


def _quality(result: SlideGrade) -> list[dict[str, str]]:
    """Lists the rules for leaving out tiles, their numbers, and the measured quality of the rest."""
    spec = result.plan.spec
    left_out = left_out_level0(result)

    def row(reason: str, rule: str, rest: str = "") -> dict[str, str]:
        count = str(len(left_out.get(reason, ())))
        return {"name": reason.capitalize(), "rule": rule, "left_out": count, "rest": rest}

    rows = []
    for name, most in (("pen", spec.max_pen), ("fold", spec.max_fold), ("air", spec.max_air)):
        share = result.plan.quality[name]
        rule = "measured only" if most >= 1 else f"at most {100 * most:.10g} % of a tile"
        rows.append(row(name, rule, f"{100 * float(share.mean()):.1f} %" if len(share) else ""))
    if spec.min_focus > 0:
        rows.append(row("out of focus", f"sharpness of at least {spec.min_focus:g}"))
    else:
        rows.append({**row("out of focus", "not measured"), "left_out": "–"})
    return [*rows, row("unreadable", "damaged in the file")]
