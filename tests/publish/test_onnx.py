from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from slidetl.errors import UsageError
from slidetl.library.model_card import ModelCard
from slidetl.models.aggregators import (
    AdditiveAttention,
    Chowder,
    GatedAttention,
    LogSumExpPooling,
    MaxPooling,
    MeanPooling,
    MultiHopAttention,
    Pooling,
    TopKPooling,
)
from slidetl.models.heads import Coral, Corn, CrossEntropy, CumulativeLink, Head, RegressionWithThresholds
from slidetl.models.spec import BackboneSpec
from slidetl.publish.export import ExportedNetwork, build_network
from slidetl.publish.onnx import export_onnx
from slidetl.tiles.grid import TileSpec
from slidetl.training.grader import SlideGrader


def graded_by(aggregator: type[Pooling], head: type[Head]) -> tuple[ExportedNetwork, ModelCard]:
    grader = SlideGrader(BackboneSpec("cbr_small"), aggregator, head).eval()
    grader.tile_spec = TileSpec(mpp=1, tile_size_px=32)
    return build_network([grader])


@pytest.mark.parametrize(
    ("aggregator", "head"),
    [
        (GatedAttention, CumulativeLink),
        (MeanPooling, Coral),
        (MaxPooling, Corn),
        (TopKPooling, CrossEntropy),
        (Chowder, RegressionWithThresholds),
        (LogSumExpPooling, CumulativeLink),
        (MultiHopAttention, CumulativeLink),
        (AdditiveAttention, CumulativeLink),
    ],
)
def test_any_number_of_tiles_is_graded_alike(
    tmp_path: Path, aggregator: type[Pooling], head: type[Head]
) -> None:
    network, card = graded_by(aggregator, head)
    worst = export_onnx(network, card, tmp_path / "m.onnx")
    assert set(worst) == {"m.onnx", "m.grade.onnx"} == {file.name for file in tmp_path.iterdir()}
    whole, second = (
        onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        for name in worst
    )
    is_explained = card.score_unit != ""
    assert ("contributions" in {output.name for output in second.get_outputs()}) is is_explained
    assert ModelCard.from_json(whole.get_modelmeta().custom_metadata_map["slidetl.json"]) == card
    for n_tiles in (1, 2, 19):
        tiles = torch.randint(0, 256, (n_tiles, 3, 32, 32), dtype=torch.uint8)
        with torch.inference_mode():
            *expected, explained = network.grade(network.embed(tiles))
            expected += explained or ()
        found = whole.run(None, {"tiles": tiles.numpy()})[1:]
        parts = [whole.run(["embeddings"], {"tiles": part.numpy()})[0] for part in tiles.split(7)]
        again = second.run(None, {"embeddings": np.concatenate(parts)})
        for output, (ours, theirs, of_parts) in enumerate(zip(expected, found, again, strict=True)):
            if output == 2 and aggregator is TopKPooling:  # which of several equal values is taken is open
                np.testing.assert_allclose((theirs.sum(), of_parts.sum()), 1, atol=1e-5)
                continue
            np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4)
            np.testing.assert_allclose(of_parts, ours.numpy(), atol=1e-4)
    assert json.loads(card.to_json())["tile_spec"]["mpp"] == 1


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"end in \.onnx"):
        export_onnx(*graded_by(MeanPooling, CumulativeLink), tmp_path / "m.pt")
