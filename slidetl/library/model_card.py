"""What a model says of itself: what it was trained on, how well it does, and what it has to be given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from slidetl.errors import ModelFileError, UsageError
from slidetl.tiles.grid import TileSpec

FORMAT_VERSION = 3


@dataclass(frozen=True)
class TrainingData:
    """The slides that a model has seen, without their names.

    Attributes:
        slides, patients: how many.
        sites, scanners, stains: those that the manifest names, sorted.
        least_tissue_mm2: tissue of the training slide with the least of it.
        fingerprint: SHA-256 over the slides' fingerprints and grades; equal for equal data.
    """

    slides: int
    patients: int
    sites: tuple[str, ...]
    scanners: tuple[str, ...]
    stains: tuple[str, ...]
    least_tissue_mm2: float
    fingerprint: str


@dataclass(frozen=True)
class Evidence:
    """How well the model, or those of the same training on other folds, graded slides kept from it.

    Attributes:
        slides, patients: how many were graded.
        figures: name -> (estimate, low, high), the 95 % interval over patients.
        temperature: probabilities are raised to its inverse and rescaled to sum to one.
        coverage: share of patients whose grade lies in the set, for which ``quantile`` was chosen.
        quantile: a grade is in the set while the score of the set up to it is at most this; see
            :mod:`slidetl.evaluation.conformal`.
        predictions_sha256: of the predictions from which all this was computed.
    """

    slides: int
    patients: int
    figures: Mapping[str, tuple[float, float, float]]
    temperature: float
    coverage: float
    quantile: float
    predictions_sha256: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0 and 0 < self.coverage < 1):
            raise UsageError(
                f"expected a temperature above 0 and a coverage between 0 and 1, "
                f"not {self.temperature}, {self.coverage}"
            )


@dataclass(frozen=True)
class ModelCard:
    """What the file says of itself.

    Attributes:
        grades: names, lowest first.
        tile_spec: the tiles that the network was trained on and has to be given.
        backbone: timm's name for it, and what was changed; for people.
        architecture: the fields of a :class:`~slidetl.models.backbones.BackboneSpec` that builds it (of an
            ensemble, the first): ``name``, and of ``in_channels``, ``gated_mlp`` and ``layer_scale`` those
            that are not the default.
        normalisation: ``mean`` and ``std`` of pixel values in 0..1 that the network applies itself.
        versions: of the software that made the file.
        weights_sha256: hash of the network's state, checked when the file is loaded.
        members: how many networks vote.
        licence: of the weights, in the words of whoever exported them; empty where nothing was said.
        training: the slides it has seen, or None where the exporter had none at hand.
        evidence: how well it does, or None where nobody has shown it.
        novelty_limit: above this a slide is unlike those of the training, or None where unknown.
        lineage: hashes of the weights it began from, nearest first.
    """

    grades: tuple[str, ...]
    tile_spec: TileSpec
    backbone: str
    architecture: dict[str, str | int | bool]
    normalisation: dict[str, list[float]]
    versions: dict[str, str]
    weights_sha256: str
    members: int = 1
    licence: str = ""
    training: TrainingData | None = None
    evidence: Evidence | None = None
    novelty_limit: float | None = None
    lineage: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values, format version included."""
        values = {**asdict(self), "tile_spec": self.tile_spec.to_dict(), "format_version": FORMAT_VERSION}
        plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples to lists, once and for all
        return plain

    def to_json(self) -> str:
        """The card as it stands in the file."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ModelFileError: it says something else.
        """
        try:
            rest = dict(values)
            version = rest.pop("format_version")
            if version != FORMAT_VERSION:
                raise ModelFileError(
                    f"expected a model file of format {FORMAT_VERSION}, found {version}; "
                    "export the checkpoint again with this version of slidetl"
                )
            rest["tile_spec"] = TileSpec.from_dict(rest["tile_spec"])
            if rest["training"] is not None:
                rest["training"] = TrainingData(**_tuples(rest["training"]))
            if rest["evidence"] is not None:
                figures = {name: tuple(figure) for name, figure in rest["evidence"]["figures"].items()}
                rest["evidence"] = Evidence(**{**rest["evidence"], "figures": figures})
            missing = {entry.name for entry in fields(cls)} - rest.keys()
            if missing:
                raise KeyError(*missing)
            return cls(**_tuples(rest))
        except (AttributeError, KeyError, TypeError, UsageError) as error:
            raise ModelFileError(f"not the metadata of a slidetl model: {error!r}") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`.

        Raises:
            ModelFileError: it says something else.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ModelFileError(f"not the metadata of a slidetl model: {error!r}") from error
        if not isinstance(values, dict):
            raise ModelFileError(f"not the metadata of a slidetl model: {type(values).__name__}")
        return cls.from_dict(values)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
