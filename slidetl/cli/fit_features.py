"""``slidetl fit-features``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from slidetl.training.options import FeatureStudy


def fit_features(
    study: FeatureStudy,
    *,
    output: Path,
    model: Literal["ridge", "ordinal", "logistic", "trees"] = "ridge",
    pool: Literal["mean", "max", "both", "top-k"] = "mean",
    top_k: int = 10,
    tile_labels: Path | None = None,
    pretrained: str = "",
) -> int:
    """Fits a classical model on stored features, and grades the test part as 'slidetl test' does.

    Args:
        study: the slides, their features and their split.
        output: folder for predictions.csv, metrics.json, confusion.png, and model.npz of a linear model.
        model: ridge on the grades; cumulative link (ordinal); multinomial (logistic); boosted trees.
        pool: of the tiles of a slide into one vector.
        top_k: number of highest values for ``pool`` top-k.
        tile_labels: labels of points (CSV: slide_id, x_level0, y_level0, label: a number, or 'ignore');
            grades by a tile classifier instead, with its classes averaged over the slide.
        pretrained: weights of the features' network, as for 'slidetl embed'; writes a ridge on the mean of
            all tiles as a checkpoint too, OUTPUT/checkpoints/ridge.ckpt, for 'slidetl export'.
    """
    from slidetl.errors import refuse_unused
    from slidetl.training.classical import describe, fit_labelled_tiles, fit_pooled

    if tile_labels is not None:
        of_slides = {"model": model, "pool": pool, "top_k": top_k, "pretrained": pretrained}
        refuse_unused(fit_features, of_slides, "with --tile-labels, a classifier of tiles")
        scored = fit_labelled_tiles(study, output, tile_labels)
    else:
        if pool != "top-k":
            refuse_unused(fit_features, {"top_k": top_k}, f"with --pool {pool}")
        scored = fit_pooled(study, output, model, pool, top_k, pretrained)
    print(f"{describe(scored, study.grades)}\nwritten to {output}")
    return 0
