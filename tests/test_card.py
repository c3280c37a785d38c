from __future__ import annotations

import json

import pytest

from slidetl.card import ModelCard
from slidetl.errors import ModelFileError
from slidetl.grid import TileSpec

CARD = ModelCard(
    grades=("none", "mild", "severe"),
    tile_spec=TileSpec(mpp=2, tile_size_px=96),
    backbone="resnet18",
    normalisation={"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    versions={"slidetl": "0"},
    weights_sha256="ab",
)


def test_round_trip() -> None:
    assert ModelCard.from_json(CARD.to_json()) == CARD


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "{"])
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(ModelFileError, match="not the metadata of a slidetl model"):
        ModelCard.from_json(text)


def test_another_format_is_named() -> None:
    values = json.loads(CARD.to_json()) | {"format_version": 99}
    with pytest.raises(ModelFileError, match="expected a model file of format 1, found 99"):
        ModelCard.from_json(json.dumps(values))


def test_an_impossible_tile_is_refused() -> None:
    values = json.loads(CARD.to_json())
    values["tile_spec"]["mpp"] = -1
    with pytest.raises(ModelFileError):
        ModelCard.from_json(json.dumps(values))
