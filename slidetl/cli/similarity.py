"""``slidetl similarity``."""

from __future__ import annotations

import sys
from pathlib import Path

from slidetl.training.options import SimilarityOptions


def similarity(
    *,
    before: tuple[str, ...],
    after: tuple[str, ...],
    data: Path,
    output: Path,
    backbone: str | None = None,
    pretrained: str = "imagenet",
    options: SimilarityOptions,
) -> int:
    """Compares the layers of networks before and after training on the same tiles.

    The measures are SVCCA, PWCCA and CKA, each beside its noise floor.

    Args:
        before: a checkpoint of 'slidetl fit', a file of weights, 'pretrained' or 'random'; may be repeated,
            once for each ``after``.
        after: likewise, after training; compared with its ``before``, with each other ``after``, and with a
            random network.
        data: folder of 'slidetl tile'; tile images and slides first.
        output: folder for similarity.png and similarity.csv.
        backbone: name of the network, instead of the checkpoints'.
        pretrained: with ``backbone``, the meaning of 'pretrained': imagenet, hub, zoo://NAME or a file.
        options: tiles and noise floor.
    """
    from slidetl.errors import refuse_unused
    from slidetl.files import check_writable
    from slidetl.models.spec import BackboneSpec
    from slidetl.training.similarity import compare_networks, draw_curves, write_curves

    if backbone is None:
        refuse_unused(similarity, {"pretrained": pretrained}, "without --backbone")

    def begin(message: str) -> None:
        check_writable(output / "similarity.csv")  # once slides and options are known to be right
        print(f"slidetl: {message}", file=sys.stderr)

    points = compare_networks(
        before,
        after,
        data,
        options,
        spec=BackboneSpec(backbone, pretrained) if backbone else None,
        on_step=begin,
    )
    write_curves(points, output / "similarity.csv")
    draw_curves(points, output / "similarity.png")
    curve = None
    for point in points:
        if point.measure != "linear_cka":
            continue
        if curve != (point.first, point.second):
            curve = (point.first, point.second)
            print(f"{point.first} and {point.second}: linear CKA (noise floor)")
        found = point.similarity
        print(f"  {point.layer:<24}{found.value:6.3f} ({found.noise_floor:.3f})")
    print(f"written to {output / 'similarity.csv'} and similarity.png")
    return 0
