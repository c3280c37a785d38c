"""The page, tables and QuPath maps of the patterns of a collection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.atlas.cluster import Atlas, Pattern
from slidetl.atlas.collection import Collection
from slidetl.atlas.options import ClusterOptions, Selection
from slidetl.atlas.pictures import describe_tile, draw_tile, similar_command
from slidetl.data.study import CachedSlide
from slidetl.errors import CacheMismatchError, OutputError, SlideError
from slidetl.evaluation.bootstrap import Interval
from slidetl.files import write_csv
from slidetl.page import script_json, write_page
from slidetl.slides import open_slide
from slidetl.slides.turn import ViewerFrame
from slidetl.text import listed
from slidetl.tiles.geojson import write_tile_objects
from slidetl.tiles.mosaic import Mosaic
from slidetl.tiles.pyramid import Canvas, build_pyramid

# Okabe and Ito's colours, told apart by colour-blind readers; in the order of size.
_COLOURS = (
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)),
    *((86, 180, 233), (213, 94, 0), (240, 228, 66), (20, 20, 20)),
)
_REST = (150, 150, 150)
_NONE = (255, 255, 255)
_CLUSTER, _NO_CLUSTER = "Cluster ", "No cluster"  # classes in QuPath
_SHEET = 12  # tiles of a contact sheet
_SHEET_PX = 160
_SECTIONS = 40  # clusters with a section of their own
_COLUMNS = 12  # clusters in the table of slides
_PICTURES_BYTES = 10 * 2**20  # of all slides together; the page stays below 25 MB
_MOST_SLIDES, _MOST_TILES = 150, 300_000  # on the page's map


def write_atlas(
    atlas: Atlas, collection: Collection, selection: Selection, options: ClusterOptions, folder: Path
) -> tuple[Path, list[str]]:
    """Writes ``atlas.html``, which needs no other file, two tables, and ``geojson/``.

    The tables are ``clusters.csv`` and ``composition.csv``.

    Returns:
        The path of the page, and the slides without a GeoJSON: their files are not at hand.

    Raises:
        OutputError: a file cannot be written.
        CacheError: a tile to show is damaged.
    """
    missing = _write_geojson(atlas, collection, folder / "geojson")
    write_csv(folder / "clusters.csv", *_cluster_rows(atlas))
    write_csv(folder / "composition.csv", *_slide_rows(atlas, collection))
    colours = _colours(len(atlas.patterns))
    shown = _on_map(collection)
    slides = [_slide_data(atlas, collection, number, len(shown), colours) for number in shown]
    rng = np.random.default_rng(options.seed)
    sections = [
        {
            "number": number + 1,
            "pattern": pattern,
            "colour": ",".join(map(str, colours[number])),
            "site": _say_site(pattern),
            "grade": _say_grade(pattern),
            "bars": _bars(pattern),
            "tiles": [
                _button(collection, selection, tile, slides, shown)
                for tile in _sheet(collection, atlas.clusters.labels, number, rng)
            ],
        }
        for number, pattern in enumerate(atlas.patterns[:_SECTIONS])
    ]
    page = folder / "atlas.html"
    write_page(
        page,
        __package__,
        "cluster.html",
        "style.css",
        ("openseadragon/openseadragon.min.js", "viewer.js"),
        title=f"{len(atlas.patterns)} patterns in {len(collection.slides)} slides",
        about=_about(atlas, collection, options),
        doubts=_doubts(atlas, collection, missing),
        sections=sections,
        n_hidden=len(atlas.patterns) - len(sections),
        names=[collection.slides[number].row.slide_id for number in shown],
        n_slides=len(collection.slides),
        legend=[
            (f"rgb({','.join(map(str, colour))})", f"{n + 1}")
            for n, colour in enumerate(colours[: len(_COLOURS)])
        ],
        n_grey=max(0, len(atlas.patterns) - len(_COLOURS)),
        unclustered=atlas.unclustered,
        columns=range(1, 1 + min(_COLUMNS, len(atlas.patterns))),
        rows=_table(atlas, collection),
        has_manifest=collection.has_manifest,
        store=options.store,
        data=script_json({"slides": [slide for slide, _ in slides]}),
    )
    return page, missing


def _colours(n: int) -> list[tuple[int, int, int]]:
    return [*_COLOURS[:n], *[_REST] * max(0, n - len(_COLOURS))]


def _on_map(collection: Collection) -> list[int]:
    """Lists the slides on the page's map: as many as fit."""
    fits = collection.starts[1:] <= max(_MOST_TILES, int(collection.starts[1]))
    return [int(number) for number in np.flatnonzero(fits)[:_MOST_SLIDES]]


def _slide_data(
    atlas: Atlas, collection: Collection, number: int, n_slides: int, colours: list[tuple[int, int, int]]
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Returns the data of a slide for the page's script, and pixels of its picture per level-0 pixel."""
    cache = collection.slides[number].cache
    canvas = Canvas.of_cache(cache)
    even = np.ones(len(cache), np.float32)
    budget = _PICTURES_BYTES // n_slides
    pyramid = build_pyramid(Mosaic(cache), canvas, cache.origins_level0, even, budget)
    stride = np.asarray(cache.extent_level0) * cache.spec.stride_px / cache.spec.tile_size_px
    labels = _labels(atlas, collection, number)
    names = [f"Cluster {n + 1}" for n in range(len(colours))]
    data = {
        **pyramid.to_viewer(canvas, stride),
        "mppShown": cache.spec.mpp * max(1.0, cache.spec.tile_size_px / _SHEET_PX),
        "maps": [
            {
                "name": "Clusters",
                "unit": "",
                "colours": [*colours, _NONE],
                "categories": [*names, "No cluster"],
                "cells": np.round(cache.origins_level0 / stride).astype(int).tolist(),
                "shades": np.where(labels < 0, len(colours), labels).tolist(),
            }
        ],
    }
    return data, np.asarray(cache.mpp_level0) / pyramid.mpp


def _labels(atlas: Atlas, collection: Collection, number: int) -> NDArray[np.int64]:
    return atlas.clusters.labels[collection.starts[number] : collection.starts[number + 1]]


def _sheet(
    collection: Collection, labels: NDArray[np.int64], number: int, rng: np.random.Generator
) -> list[int]:
    """Draws tiles of a cluster: patients have about their share of it."""
    tiles = rng.permutation(np.flatnonzero(labels == number))
    patients = collection.patients[collection.slide_of[tiles]]
    tiles = tiles[np.argsort(patients, kind="stable")]
    count = min(_SHEET, len(tiles))
    places = ((np.arange(count) + 0.5) * len(tiles) / count).astype(int)
    return [int(tile) for tile in tiles[places]]


def _button(
    collection: Collection,
    selection: Selection,
    tile: int,
    slides: list[tuple[dict[str, Any], NDArray[np.float64]]],
    shown: list[int],
) -> dict[str, Any]:
    about = describe_tile(collection, tile)
    slide = int(collection.slide_of[tile])
    place = ""
    if slide in shown:
        x, y = np.array([about["x_level0"], about["y_level0"]]) * slides[shown.index(slide)][1]
        place = f"{x:.2f},{y:.2f}"
    return {
        **about,
        "picture": draw_tile(collection, tile, _SHEET_PX),
        "place": place,
        "number": shown.index(slide) if place else 0,
        "command": similar_command(selection, about["tile"]),
    }


def _say_site(pattern: Pattern) -> dict[str, Any] | None:
    found = pattern.site
    if found is None:
        return None
    if not isinstance(found.share, Interval):
        return {
            "stands_out": False,
            "text": f"Most at {found.site}: {found.share:.0%} of it if all sites had as much tissue "
            f"({found.chance:.0%} if they are alike); too few patients at a site for an interval.",
        }
    assert found.p is not None  # it comes with the interval
    differs = found.p < 0.05
    return {
        "stands_out": differs,
        "text": f"Most at {found.site}: {found.share:.0%} of it if all sites had as much tissue; "
        f"{found.chance:.0%} if sites are alike (p {found.p:.3f})."
        + (" It differs between sites: stain, scanner or preparation may make it." if differs else ""),
    }


def _say_grade(pattern: Pattern) -> dict[str, Any] | None:
    found = pattern.grade
    if found is None:
        return None
    if not isinstance(found, Interval):
        return {
            "stands_out": False,
            "text": f"Rank correlation with the grade {found:+.2f}; too few patients of other grades than "
            "the commonest for an interval.",
        }
    goes = not found.is_point and (found.low > 0 or found.high < 0)
    word = "" if not goes else " It grows with the grade." if found.low > 0 else " It shrinks with the grade."
    return {
        "stands_out": goes,
        "text": f"Rank correlation with the grade {found:+.2f}.{word}",
    }


def _bars(pattern: Pattern) -> list[dict[str, Any]]:
    """Lists the mean shares of slides, by site and by grade, as widths of bars."""
    groups: list[tuple[str, dict[Any, float]]] = [
        ("Share in slides by site", pattern.by_site),
        ("Share in slides by grade", pattern.by_grade),
    ]
    return [
        {
            "title": title,
            "rows": [
                {"name": str(name), "share": share, "width": 100 * share / (max(shares.values()) or 1)}
                for name, share in shares.items()
            ],
        }
        for title, shares in groups
        if len(shares) > 1
    ]


def _about(atlas: Atlas, collection: Collection, options: ClusterOptions) -> str:
    source = collection.source
    parts = [
        f"{len(collection)} tiles of {len(collection.slides)} slides"
        + (f" of {len(set(collection.patients.tolist()))} patients" if collection.has_manifest else "")
        + f". Features {collection.features} ({source.backbone}, {source.short_identity}), scaled to length 1"
        + (
            f", {atlas.clusters.centres.shape[1]} principal components with "
            f"{100 * atlas.kept:.0f} % of the variance"
            if atlas.kept is not None
            else ""
        )
        + "."
    ]
    if atlas.clusters.bandwidth is not None:
        seeds = f"from {min(options.seeds, len(collection))} tiles" if options.seeds else "from every tile"
        parts.append(
            f"Mean shift with a {options.kernel} kernel of bandwidth {atlas.clusters.bandwidth:.3g}, "
            f"{seeds}; the bandwidth decides how fine the patterns are."
        )
    else:
        parts.append(f"Clustered by {options.method}.")
    parts.append(
        "No label was used. Numbers in brackets are 95 % intervals over patients; about one in twenty misses "
        "(more of a site's, as it is chosen by its share). Whether sites differ is told by p, from "
        "permutations of the sites over patients."
    )
    return " ".join(parts)


def _doubts(atlas: Atlas, collection: Collection, missing: list[str]) -> list[str]:
    doubts = []
    if not collection.has_manifest:
        doubts.append(
            "No manifest was given: each slide counts as a patient of its own; sites and grades are unknown."
        )
    elif len(set(collection.patients.tolist())) == 1:
        doubts.append("All slides are of one patient: what recurs here may not recur in others.")
    if collection.has_manifest and len({slide.row.site for slide in collection.slides if slide.row.site}) < 2:
        doubts.append("The manifest has no two sites: whether a pattern is a site's own cannot be told.")
    if (check := atlas.check) is not None:
        text = (
            f"Approximate over {check.neighbours} neighbours: {check.clusters} clusters; exactly, from "
            f"{check.seeds} of the tiles, {check.exact}. Adjusted Rand index {check.rand:.2f} (1: the same); "
            f"{100 * check.cut:.0f} % of the tiles that climbed stopped among more neighbours than that."
        )
        if check.rand < 0.9 and check.cut > 0.5:
            text += (
                " The number is below the size of the clusters and splits them: raise --neighbours, or leave "
                "it out."
            )
        doubts.append(text)
    table = atlas.confounding
    if table is not None and table.p is not None and table.p < 0.05:
        doubts.append(
            f"Sites and grades go together here (Cramér's V {table.cramers_v:.2f}, p {table.p:.3f}): "
            "a pattern of a site may seem to go with the grade."
        )
    if atlas.unclustered:
        doubts.append(f"{atlas.unclustered} tiles have no cluster.")
    if missing:
        doubts.append(
            f"No GeoJSON for {len(missing)} slides: their files are not at hand, and QuPath's frame is "
            "written there: " + listed(missing)
        )
    return doubts


def _table(atlas: Atlas, collection: Collection) -> list[dict[str, Any]]:
    """Lists the slides by patient, with their shares."""
    rows = [
        {
            "slide": slide.row.slide_id,
            "patient": slide.row.patient_id if collection.has_manifest else "",
            "site": slide.row.site,
            "grade": "" if slide.row.grade is None else str(slide.row.grade),
            "tiles": len(slide.cache),
            "shares": shares[:_COLUMNS].tolist(),
        }
        for slide, shares in zip(collection.slides, atlas.composition, strict=True)
    ]
    return sorted(rows, key=lambda row: (str(row["patient"]), str(row["slide"])))


def _cluster_rows(atlas: Atlas) -> tuple[list[str], list[dict[str, Any]]]:
    rows = []
    for number, pattern in enumerate(atlas.patterns, start=1):
        row: dict[str, Any] = {
            "cluster": number,
            "tiles": pattern.tiles,
            "share": pattern.share,
            "slides": pattern.slides,
            "patients": pattern.patients,
        }
        if pattern.site is not None:
            share = pattern.site.share
            row |= {"site": pattern.site.site, "site_chance": pattern.site.chance, "site_p": pattern.site.p}
            row |= _bounds("site_share", share)
        if pattern.grade is not None:
            row |= _bounds("grade_correlation", pattern.grade)
        row |= {f"share_site_{site}": share for site, share in pattern.by_site.items()}
        row |= {f"share_grade_{grade}": share for grade, share in pattern.by_grade.items()}
        rows.append(row)
    first = ["cluster", "tiles", "share", "slides", "patients", "site", "site_share", "site_share_low"]
    first += ["site_share_high", "site_chance", "site_p", "grade_correlation", "grade_correlation_low"]
    first += ["grade_correlation_high"]
    return list(dict.fromkeys([*first, *(name for row in rows for name in row)])), rows


def _bounds(name: str, interval: Interval | float) -> dict[str, float]:
    if not isinstance(interval, Interval):
        return {name: interval}
    if interval.is_point:
        return {name: interval.estimate}
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _slide_rows(atlas: Atlas, collection: Collection) -> tuple[list[str], list[dict[str, Any]]]:
    names = [f"cluster_{number + 1}" for number in range(len(atlas.patterns))]
    rows = [
        {
            "slide_id": slide.row.slide_id,
            "patient_id": slide.row.patient_id,
            "site": slide.row.site,
            "grade": slide.row.grade,
            "tiles": len(slide.cache),
            **dict(zip(names, shares.tolist(), strict=True)),
        }
        for slide, shares in zip(collection.slides, atlas.composition, strict=True)
    ]
    return ["slide_id", "patient_id", "site", "grade", "tiles", *names], rows


def _write_geojson(atlas: Atlas, collection: Collection, folder: Path) -> list[str]:
    """Writes a map for each slide with its file at hand, in place of all earlier maps; returns the others."""
    _remove_maps(folder)
    colours = [*_colours(len(atlas.patterns)), _NONE]
    names = [*(f"{_CLUSTER}{number + 1}" for number in range(len(atlas.patterns))), _NO_CLUSTER]

    def properties(labels: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        for label in labels.tolist():
            yield {"classification": {"name": names[label], "color": list(colours[label])}}

    missing = []
    for number, slide in enumerate(collection.slides):
        viewer = _viewer(slide)
        if viewer is None:
            missing.append(slide.row.slide_id)
            continue
        write_tile_objects(
            folder / f"{slide.row.slide_id}.geojson",
            slide.cache.origins_level0,
            slide.cache.extent_level0,
            viewer,
            f"atlas {slide.cache.fingerprint} {collection.source.identity}",
            properties(_labels(atlas, collection, number)),
        )
    return missing


def _remove_maps(folder: Path) -> None:
    """Removes the maps of an earlier clustering, whose numbers mean other patterns; spares foreign files."""
    marks = [
        f'"isLocked": true, "classification": {{"name": "{name}'.encode() for name in (_CLUSTER, _NO_CLUSTER)
    ]
    for path in folder.glob("*.geojson"):
        try:
            with path.open("rb") as file:
                file.readline()
                first_tile = file.readline(10_000)
            if any(mark in first_tile for mark in marks):
                path.unlink()
        except OSError as error:
            raise OutputError(f"{path}: cannot be replaced: {error.strerror}") from error


def _viewer(slide: CachedSlide) -> ViewerFrame | None:
    """Returns the frame of a slide in QuPath; None if neither its cache nor its file at hand tells it."""
    cache = slide.cache
    with contextlib.suppress(CacheMismatchError):
        return cache.header.viewer
    try:
        with open_slide(slide.row.path, mpp_replace=cache.mpp_level0, channels=cache.spec.channels) as opened:
            return opened.info.viewer if opened.info.fingerprint == cache.fingerprint else None
    except SlideError:
        return None
