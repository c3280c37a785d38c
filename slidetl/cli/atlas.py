"""Finds recurring patterns and similar tiles in stored features, without labels."""

from __future__ import annotations

import sys
from pathlib import Path

from slidetl.atlas.options import Selection, SimilarOptions


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

    collection = open_collection(selection)
    if not collection.has_manifest:
        print(
            "slidetl: warning: without --manifest each slide counts as a patient of its own", file=sys.stderr
        )
    found = find_similar(collection, options)
    page = write_similar(found, collection, selection, options, output)
    print(
        f"{len(found.hits)} of {found.searched} tiles, distance {found.distances[0]:.3f} to "
        f"{found.distances[-1]:.3f}; a random tile ranks {found.random_rank} at {found.random_distance:.3f}\n"
        f"written to {page}"
    )
    return 0


COMMANDS = {"similar": similar}
