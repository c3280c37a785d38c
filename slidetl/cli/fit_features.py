"""``slidetl fit-features``: stored features to grades."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "fit a classical model on stored features, and grade the test part as 'slidetl test' does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    # SUPPRESS: else the help of an option without a default says "(default: None)".
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="the manifest (CSV) of the study")
    parser.add_argument(
        "--cache",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="the folder that 'slidetl tile' and 'slidetl embed' wrote",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        required=True,
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="stored features, e.g. resnet18 resnet18.layer3; several are joined",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="for predictions.csv, metrics.json, confusion.png, and model.npz of a linear model",
    )
    parser.add_argument(
        "--model",
        choices=["ridge", "ordinal", "logistic", "trees"],
        default="ridge",
        help="ridge on the grades; cumulative link; multinomial; boosted trees",
    )
    parser.add_argument(
        "--pool",
        choices=["mean", "max", "both", "top-k"],
        default="mean",
        help="how the tiles of a slide become one vector",
    )
    parser.add_argument("--top-k", type=int, default=10, metavar="N", help="highest values for --pool top-k")
    parser.add_argument(
        "--tile-labels",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="CSV",
        help="slide_id, x_level0, y_level0, label (a number, or 'ignore') of points: grade by a tile "
        "classifier instead, whose classes are averaged over the slide",
    )
    parser.add_argument(
        "--grades",
        nargs="+",
        default=["0", "1", "2", "3", "4"],
        metavar="NAME",
        help="names of the grades, lowest first",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="as data.val_fraction of 'slidetl fit', to have its test part; trained on here",
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.25, metavar="SHARE", help="as data.test_fraction"
    )
    parser.add_argument("--seed", type=int, default=0, help="as data.seed; of inner folds and trees too")


def run(options: argparse.Namespace) -> int:
    """Fits and judges one model."""
    from slidetl.training.classical import FeatureStudy, describe, fit_labelled_tiles, fit_pooled

    study = FeatureStudy(
        manifest=options.manifest,
        cache=options.cache,
        names=tuple(options.features),
        grades=tuple(options.grades),
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
    )
    if "tile_labels" in options:
        metrics = fit_labelled_tiles(study, options.output, options.tile_labels)
    else:
        metrics = fit_pooled(study, options.output, options.model, options.pool, options.top_k)
    print(f"{describe(metrics, study.grades)}\nwritten to {options.output}")
    return 0
