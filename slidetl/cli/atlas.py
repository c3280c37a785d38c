"""Finds recurring patterns and similar tiles in stored features, without labels."""

from __future__ import annotations

import sys
from pathlib import Path

from slidetl.atlas.options import ClusterOptions, Selection, SimilarOptions
from slidetl.text import listed

_MANY = 1_000_000  # tiles: an exact search takes ten seconds of processor time (docs/evidence/atlas.md)


def cluster(selection: Selection, *, output: Path, options: ClusterOptions) -> int:
    """Finds the recurring patterns of slides, and how far they go with sites and grades.

    Args:
        selection: the tiles to cluster.
        output: folder for atlas.html (one self-contained page), clusters.csv, composition.csv (the share of
            each slide's tiles) and geojson/ (maps for QuPath).
        options: of clustering.
    """
    from slidetl.atlas.cluster import check_store, find_patterns, store_clusters
    from slidetl.atlas.cluster_page import write_atlas
    from slidetl.atlas.collection import open_collection
    from slidetl.files import check_writable

    collection = open_collection(selection)
    check_writable(output / "atlas.html")
    if options.store:
        check_store(collection, options.store)
    if not collection.has_manifest:
        _say("warning: without --manifest each slide counts as a patient of its own")
    atlas = find_patterns(collection, options, _say)
    page, missing = write_atlas(atlas, collection, selection, options, output)
    if options.store:
        store_clusters(collection, atlas.clusters, options.store)
    if missing:
        _say(f"warning: no GeoJSON for {len(missing)} slides, whose files are not at hand: {listed(missing)}")
    if (check := atlas.check) is not None:
        _say(
            f"over {check.neighbours} neighbours {check.clusters} clusters, exactly {check.exact}; adjusted "
            f"Rand index {check.rand:.2f}"
        )
    sizes = ", ".join(str(pattern.tiles) for pattern in atlas.patterns[:10])
    more = ", ..." if len(atlas.patterns) > 10 else ""
    print(
        f"{len(collection)} tiles of {len(collection.slides)} slides: {len(atlas.patterns)} clusters of "
        f"{sizes}{more} tiles\nwritten to {page}"
    )
    return 0


def similar(selection: Selection, *, output: Path, options: SimilarOptions) -> int:
    """Finds the tiles of other patients most similar to some tiles or to a picture.

    Args:
        selection: the tiles to search.
        output: folder for similar.html (one self-contained page) and similar.csv.
        options: of the search.
    """
    from slidetl.atlas.collection import open_collection
    from slidetl.atlas.similar import find_similar
    from slidetl.atlas.similar_page import write_similar
    from slidetl.files import check_writable

    collection = open_collection(selection)
    check_writable(output / "similar.html")
    if not collection.has_manifest:
        _say("warning: without --manifest each slide counts as a patient of its own")
    if options.index is None and len(collection) > _MANY:
        _say(
            f"comparing {len(collection)} tiles one by one; --index FILE keeps an index for the next "
            "questions, approximate, with its recall measured"
        )
    found = find_similar(collection, options, _say)
    page = write_similar(found, collection, selection, options, output)
    about = "about " if found.recall else ""
    print(
        f"{len(found.hits)} of {found.searched} tiles, distance {found.distances[0]:.3f} to "
        f"{found.distances[-1]:.3f}; a random tile ranks {about}{found.random_rank} at "
        f"{found.random_distance:.3f}\n"
        + (f"{found.recall}\n" if found.recall else "")
        + f"written to {page}"
    )
    return 0


def _say(message: str) -> None:
    print(f"slidetl: {message}", file=sys.stderr)


COMMANDS = {"cluster": cluster, "similar": similar}
