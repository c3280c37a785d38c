"""``slidetl similarity``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = (
    "compare what the layers of networks make of the same tiles, before and after training, by SVCCA, PWCCA "
    "and CKA, each beside its noise floor"
)
_NETWORK = "a checkpoint of 'slidetl fit', a file of weights, 'pretrained' or 'random'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    # SUPPRESS, here and below: else the help of an option without a default says "(default: None)".
    parser.add_argument(
        "--before",
        action="append",
        required=True,
        default=argparse.SUPPRESS,
        metavar="A",
        help=f"{_NETWORK}; may be repeated, once for each --after",
    )
    parser.add_argument(
        "--after",
        action="append",
        required=True,
        default=argparse.SUPPRESS,
        metavar="B",
        help="likewise, after training; compared with its A, with every other B, and with a random network",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        metavar="CACHE",
        help="the folder that 'slidetl tile' wrote; images and slides are to be tiled first",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="folder for similarity.png and similarity.csv",
    )
    parser.add_argument(
        "--slides",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="ID",
        help="draw tiles from these slides alone, instead of all in the cache",
    )
    parser.add_argument("--tiles", type=int, default=2000, metavar="N", help="tiles to compare")
    parser.add_argument("--permutations", type=int, default=10, metavar="N", help="for the noise floor")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of tiles, permutations and the random network; the seed_everything of a training from scratch "
        "makes 'random' the weights that it started from",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="TILES", help="tiles in one pass")
    parser.add_argument(
        "--backbone",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="which network, instead of the first checkpoint's",
    )
    parser.add_argument(
        "--pretrained",
        default="procedural",
        metavar="WEIGHTS",
        help="with --backbone, what 'pretrained' means: procedural, imagenet, hub, zoo://NAME or a file",
    )
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="package or class outside slidetl that a checkpoint may import; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Compares, writes both files, and prints the curves of linear CKA."""
    import sys

    from slidetl.models.backbones import BackboneSpec
    from slidetl.training.similarity import compare_networks, draw_curves, write_curves

    backbone = getattr(options, "backbone", None)
    points = compare_networks(
        options.before,
        options.after,
        options.data,
        spec=BackboneSpec(backbone, options.pretrained) if backbone else None,
        slide_ids=getattr(options, "slides", ()),
        n_tiles=options.tiles,
        permutations=options.permutations,
        seed=options.seed,
        batch_size=options.batch_size,
        allow=options.allow,
        on_step=lambda message: print(f"slidetl: {message}", file=sys.stderr),
    )
    write_curves(points, options.output / "similarity.csv")
    draw_curves(points, options.output / "similarity.png")
    curve = None
    for point in points:
        if point.measure != "linear_cka":
            continue
        if curve != (point.first, point.second):
            curve = (point.first, point.second)
            print(f"{point.first} and {point.second}: linear CKA (noise floor)")
        found = point.similarity
        print(f"  {point.layer:<24}{found.value:6.3f} ({found.noise_floor:.3f})")
    print(f"written to {options.output / 'similarity.csv'} and similarity.png")
    return 0
