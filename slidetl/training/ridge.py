"""Writes a ridge regression on stored features as the checkpoint of a network that grades slides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from slidetl.data.record import StudyRecord, config_sha256
from slidetl.errors import CacheMismatchError, UsageError
from slidetl.evaluation.classical import Grader
from slidetl.files import write_whole
from slidetl.models.aggregators import MeanPooling
from slidetl.models.backbones import weights_sha256
from slidetl.models.heads import NormalGrade
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import FrozenFeatures
from slidetl.tiles.features import FeatureSource
from slidetl.tiles.grid import TileSpec
from slidetl.training.checkpoint import write_grader
from slidetl.training.grader import SlideGrader
from slidetl.training.options import FeatureStudy

_PARITY = 1e-3  # of a probability; the features have float16, the network float32


def build_ridge(
    study: FeatureStudy,
    ridge: Grader,
    source: FeatureSource,
    pretrained: str,
    tile_spec: TileSpec,
    record: StudyRecord,
    pooled: NDArray[np.float64],
) -> tuple[SlideGrader, dict[str, Any]]:
    """Builds the network of a ridge on mean features: frozen backbone, mean over all tiles, linear head.

    Args:
        study: slides, features and split; its paths become absolute.
        ridge: fitted to every grade of the study.
        source: the network of the features.
        pretrained: its weights, as in :class:`~slidetl.models.spec.BackboneSpec`.
        tile_spec: of the slides.
        record: of the study.
        pooled: ``[n, D]``, mean features of some slides, to compare network and ridge on.

    Returns:
        The network with its record, and its configuration.

    Raises:
        UsageError: the features are of an inner block.
        CacheMismatchError: the features are of other weights.
        WeightsError: the weights cannot be found.
    """
    if source.block:
        raise UsageError(
            f"features of the inner block {source.block!r} are no network; leave out --pretrained"
        )
    if not source.weights_sha256:
        raise UsageError(
            f"the features were imported ({source.identity}), their network is not here; leave out "
            "--pretrained"
        )
    spec = BackboneSpec(name=source.backbone, pretrained=pretrained)
    grader = SlideGrader(spec, MeanPooling, NormalGrade, FrozenFeatures(), list(study.grades)).eval()
    backbone = grader.network.backbone
    backbone.load_pretrained()
    if weights_sha256(backbone) != source.weights_sha256:
        raise CacheMismatchError(
            f"features {study.names[0]!r} are of other weights than --pretrained {pretrained}; give the "
            "weights of 'slidetl embed'"
        )
    _set_head(grader.network.head, ridge)
    with torch.inference_mode():
        logits = grader.network.head(torch.from_numpy(pooled).float())
        same = grader.network.head.probabilities(logits).double().numpy()
    worst = float(np.abs(same - ridge.probabilities(pooled)).max())
    if not worst <= _PARITY:
        raise UsageError(f"the network differs from the ridge by {worst:.1e} in a probability; not written")
    model: dict[str, Any] = {
        "backbone": {"name": spec.name, "pretrained": pretrained},
        "aggregator": {"class_path": f"{MeanPooling.__module__}.MeanPooling"},
        "head": {"class_path": f"{NormalGrade.__module__}.NormalGrade"},
        "transfer": {"class_path": f"{FrozenFeatures.__module__}.FrozenFeatures"},
        "grades": list(study.grades),
    }
    data = {
        "manifest": str(study.manifest.absolute()),
        "cache": str(study.cache.absolute()),
        "grades": list(study.grades),
        "val_fraction": study.val_fraction,
        "test_fraction": study.test_fraction,
        "seed": study.seed,
    }
    config = {"seed_everything": study.seed, "model": model, "data": data}
    grader.tile_spec = tile_spec
    grader.record = replace(record, config_sha256=config_sha256(config))
    return grader, config


def write_ridge(output: Path, grader: SlideGrader, config: dict[str, Any]) -> str:
    """Writes ``checkpoints/ridge.ckpt`` and ``config.yaml`` of :func:`build_ridge` into a folder.

    Returns:
        The SHA-256 of the network's weights.

    Raises:
        OutputError: a file cannot be written.
    """
    write_grader(output / "checkpoints" / "ridge.ckpt", grader, config["model"])
    write_whole(output.joinpath("config.yaml"), yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return weights_sha256(grader.network)


def _set_head(head: Any, ridge: Grader) -> None:
    """Puts the ridge of standardised features into the head, for features as they are."""
    scaler, model = ridge.estimator["scale"], ridge.estimator["model"]
    weights = model.coef_ / scaler.scale_
    assert ridge.sigma is not None  # of a ridge
    with torch.no_grad():
        head.score.weight.copy_(torch.from_numpy(weights)[None])
        head.score.bias.fill_(float(model.intercept_ - weights @ scaler.mean_))
        head.log_sigma.fill_(float(np.log(ridge.sigma)))
