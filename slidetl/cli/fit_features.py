"""``slidetl fit-features``: stored features to grades."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def fit_features(
    manifest: Path,
    *,
    cache: Path,
    features: tuple[str, ...],
    output: Path,
    model: Literal["ridge", "ordinal", "logistic", "trees"] = "ridge",
    pool: Literal["mean", "max", "both", "top-k"] = "mean",
    top_k: int = 10,
    tile_labels: Path | None = None,
    grades: tuple[str, ...] = ("0", "1", "2", "3", "4"),
    val_fraction: float = 0.15,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> int:
    """Fits a classical model on stored features, and grades the test part as 'slidetl test' does.

    Args:
        manifest: the manifest (CSV) of the study.
        cache: the folder that 'slidetl tile' and 'slidetl embed' wrote.
        features: names of stored features, e.g. resnet18 resnet18.layer3; several are joined.
        output: folder for predictions.csv, metrics.json, confusion.png, and model.npz of a linear model.
        model: ridge on the grades; cumulative link (ordinal); multinomial (logistic); boosted trees.
        pool: how the tiles of a slide become one vector.
        top_k: number of highest values for ``pool`` top-k.
        tile_labels: labels of points (CSV: slide_id, x_level0, y_level0, label: a number, or 'ignore');
            grades by a tile classifier instead, whose classes are averaged over the slide.
        grades: names of the grades, lowest first.
        val_fraction: share of the slides for validation, as data.val_fraction of 'slidetl fit', to have its
            test part; these slides are trained on here.
        test_fraction: share of the slides for the test, as data.test_fraction.
        seed: seed of the split, as data.seed; of inner folds and trees too.
    """
    from slidetl.training.classical import FeatureStudy, describe, fit_labelled_tiles, fit_pooled

    study = FeatureStudy(manifest, cache, features, grades, val_fraction, test_fraction, seed)
    if tile_labels is not None:
        metrics = fit_labelled_tiles(study, output, tile_labels)
    else:
        metrics = fit_pooled(study, output, model, pool, top_k)
    print(f"{describe(metrics, study.grades)}\nwritten to {output}")
    return 0
