from __future__ import annotations

import json
from dataclasses import replace

import pytest

from slidetl.errors import ModelFileError, UsageError
from slidetl.library.model_card import Evidence, ModelCard, TrainingData
from slidetl.tiles.grid import TileSpec

CARD = ModelCard(
    grades=("none", "mild", "severe"),
    tile_spec=TileSpec(mpp=2, tile_size_px=96),
    backbone="resnet18",
    architecture={"name": "resnet18"},
    normalisation={"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    versions={"slidetl": "0"},
    weights_sha256="ab",
)


FULL = replace(
    CARD,
    members=5,
    licence="CC-BY-4.0",
    training=TrainingData(40, 30, ("a", "b"), (), ("trichrome",), 3.5, "cd"),
    evidence=Evidence(12, 10, {"QWK": (0.8, 0.7, 0.9)}, 1.5, 0.9, 0.4, "ef"),
    novelty_limit=2.5,
    lineage=("12", "34"),
)


@pytest.mark.parametrize("card", [CARD, FULL])
def test_round_trip(card: ModelCard) -> None:
    assert ModelCard.from_json(card.to_json()) == card


@pytest.mark.parametrize(("temperature", "coverage"), [(0, 0.9), (float("nan"), 0.9), (1, 1), (1, 0)])
def test_impossible_evidence_is_refused(temperature: float, coverage: float) -> None:
    with pytest.raises(UsageError):
        Evidence(12, 10, {}, temperature, coverage, 0.4, "ef")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 3}', "{"])
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(ModelFileError, match="not the metadata of a slidetl model"):
        ModelCard.from_json(text)


def test_another_format_is_named() -> None:
    values = json.loads(CARD.to_json()) | {"format_version": 99}
    with pytest.raises(ModelFileError, match="expected a model file of format 3, found 99"):
        ModelCard.from_json(json.dumps(values))


def test_an_impossible_tile_is_refused() -> None:
    values = json.loads(CARD.to_json())
    values["tile_spec"]["mpp"] = -1
    with pytest.raises(ModelFileError):
        ModelCard.from_json(json.dumps(values))
