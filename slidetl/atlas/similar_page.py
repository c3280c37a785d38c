"""The page and the table of a search for similar tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slidetl.atlas.collection import Collection
from slidetl.atlas.options import Selection, SimilarOptions
from slidetl.atlas.pictures import describe_tile, draw_surroundings, draw_tile, picture_of, similar_command
from slidetl.atlas.similar import Similar
from slidetl.files import write_csv
from slidetl.page import write_page

_COLUMNS = ("rank", "distance", "slide", "patient", "site", "grade", "x_level0", "y_level0")


def write_similar(
    found: Similar, collection: Collection, selection: Selection, options: SimilarOptions, folder: Path
) -> Path:
    """Writes ``similar.html``, which needs no other file, and ``similar.csv``.

    Returns:
        The path of the page.

    Raises:
        OutputError: a file cannot be written.
        CacheError: a tile to show is damaged.
    """

    def card(tile: int) -> dict[str, Any]:
        about = describe_tile(collection, tile)
        return {
            **about,
            "picture": draw_tile(collection, tile),
            "around": draw_surroundings(collection, tile),
            "command": similar_command(selection, about["tile"]),
        }

    hits = [
        {"rank": rank, "distance": distance, **card(tile)}
        for rank, (tile, distance) in enumerate(
            zip(found.hits.tolist(), found.distances.tolist(), strict=True), start=1
        )
    ]
    examples = [card(tile) for tile in found.examples]
    if found.picture is not None and options.image is not None:
        examples.append({"picture": picture_of(found.picture), "tile": "", "around": "", "command": ""})
    nearest, near, middle, far = (f"{value:.3f}" for value in found.quantiles)
    drawn, of_rank = "searched", ""
    if found.recall:
        drawn, of_rank = "drawn at random", "The rank is an estimate. "
    page = folder / "similar.html"
    write_page(
        page,
        __package__,
        "similar.html",
        "style.css",
        (),
        title="Similar tiles",
        examples=examples,
        minus=[card(tile) for tile in found.minus],
        hits=hits,
        random={
            "rank": f"about {found.random_rank}" if found.recall else found.random_rank,
            "distance": found.random_distance,
            **card(found.random),
        },
        searched=found.searched,
        about=_about(found, collection, options),
        doubts=_doubts(found, collection, options),
        floor=f"{of_rank}Of the {found.sampled} tiles {drawn}, the nearest 1 % lie within a distance of "
        f"{nearest}, 5 % within {near}, half within {middle}, 95 % within {far}. Some tile is always "
        "the nearest: a hit says little if its distance is not far below these.",
    )
    write_csv(folder / "similar.csv", _COLUMNS, [{name: hit[name] for name in _COLUMNS} for hit in hits])
    return page


def _about(found: Similar, collection: Collection, options: SimilarOptions) -> str:
    n = len(found.examples) + (found.picture is not None)
    parts = [
        f"Features {collection.features} ({collection.source.backbone}, {collection.source.short_identity}); "
        "the distance is 1 less the cosine: 0 for the same direction, 1 for unrelated ones."
    ]
    if n > 1:
        parts.append(f"The directions of {n} examples are averaged.")
    if found.minus:
        parts.append("The average direction of the subtracted tiles is taken away.")
    if found.picture is not None and options.image is not None:
        spec = collection.slides[0].cache.spec
        parts.append(
            f"The picture {options.image.name} is taken for one tile of {spec.tile_size_px * spec.mpp:g} µm; "
            "its true scale is not known."
        )
    others = ""
    if found.left_out and collection.has_manifest:
        others = f"of other patients than {', '.join(found.left_out)} "
    if found.recall:
        parts.append(
            f"{found.recall}. The distances shown are exact. It holds {found.searched} tiles {others}to find"
        )
    else:
        parts.append(f"All {found.searched} tiles {others}were compared, exactly")
    return f"{' '.join(parts)}; at most {options.most_each} of a slide are shown."


def _doubts(found: Similar, collection: Collection, options: SimilarOptions) -> list[str]:
    doubts = []
    if not collection.has_manifest:
        doubts.append(
            "No manifest was given: patients are not known, and only the slides searched by were left out. "
            "Other slides of the same patient may be among the hits; give --manifest."
            if not options.same_patient
            else "No manifest was given: patients, sites and grades are not known."
        )
    elif options.same_patient:
        doubts.append("Tiles of the same patient are included: hits of one slide prove no pattern.")
    if options.index is not None and not found.recall:
        doubts.append("The index did not fill the answer, so all tiles were compared instead.")
    if len(found.hits) < options.count:
        doubts.append(
            f"{options.count} tiles were asked for, {len(found.hits)} found: there are no more to show."
        )
    return doubts
