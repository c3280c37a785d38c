from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

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
from slidetl.models.backbones import without_downloads
from slidetl.models.heads import Coral, Corn, CrossEntropy, CumulativeLink, Head, RegressionWithThresholds
from slidetl.models.spec import BackboneSpec
from slidetl.publish.export import ExportedNetwork, build_network
from slidetl.publish.onnx import export_onnx
from slidetl.tiles.grid import TileSpec
from slidetl.training.grader import SlideGrader


def graded_by(*members: tuple[type[Pooling], type[Head]]) -> tuple[ExportedNetwork, ModelCard]:
    """An ensemble; several members have a backbone of one layer, since each layer takes long to trace."""
    graders = []
    for aggregator, head in members:
        grader = SlideGrader(BackboneSpec("cbr_small"), aggregator, head).eval()
        grader.tile_spec = TileSpec(mpp=1, tile_size_px=32)
        backbone = grader.network.backbone
        if len(members) > 1:
            backbone.net = nn.Sequential(nn.Conv2d(3, backbone.num_features, 32), nn.Tanh(), nn.Flatten())
        graders.append(grader)
    return build_network(graders)


ENSEMBLE = (  # one file of all, since each takes seconds
    (GatedAttention, CumulativeLink),
    (MeanPooling, Coral),
    (MaxPooling, Corn),
    (Chowder, RegressionWithThresholds),
    (LogSumExpPooling, CumulativeLink),
    (MultiHopAttention, CumulativeLink),
    (AdditiveAttention, CumulativeLink),
)
# Apart: which of several equal values it takes is open.
TOP_K = ((TopKPooling, CrossEntropy),)


@pytest.mark.slow
@pytest.mark.parametrize("members", [ENSEMBLE, TOP_K], ids=["ensemble", "top-k"])
def test_any_number_of_tiles_is_graded_alike(
    tmp_path: Path, members: tuple[tuple[type[Pooling], type[Head]], ...]
) -> None:
    network, card = graded_by(*members)
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
            if output == 2 and members == TOP_K:
                np.testing.assert_allclose((theirs.sum(), of_parts.sum()), 1, atol=1e-5)
                continue
            np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4 / len(members))
            np.testing.assert_allclose(of_parts, ours.numpy(), atol=1e-4 / len(members))
    assert json.loads(card.to_json())["tile_spec"]["mpp"] == 1


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"end in \.onnx"):
        export_onnx(*graded_by((MeanPooling, CumulativeLink)), tmp_path / "m.pt")


@pytest.mark.slow
def test_a_large_transformer_has_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"depth": 1, "img_size": 32, "reg_tokens": 4}
    about = {"mean": [0.5] * 3, "std": [0.5] * 3}
    architecture = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": about}
    with without_downloads({"architecture": architecture}):
        spec = BackboneSpec("hf-hub:lab/vit", pooling="token+mean")
        grader = SlideGrader(spec, MeanPooling, CumulativeLink).eval()
    grader.tile_spec = TileSpec(mpp=1, tile_size_px=32)
    network, card = build_network([grader])
    monkeypatch.setattr("slidetl.publish.onnx._MOST_INSIDE", 0)
    worst = export_onnx(network, card, tmp_path / "first" / "m.onnx")
    assert max(worst.values()) < 1e-5
    (tmp_path / "first").rename(tmp_path / "moved")
    names = {file.name: file.stat().st_size for file in (tmp_path / "moved").iterdir()}
    assert names.keys() == {"m.onnx", "m.onnx.data", "m.grade.onnx", "m.grade.onnx.data"}
    assert names["m.onnx"] < 10**6 < names["m.onnx.data"]
    session = onnxruntime.InferenceSession(
        str(tmp_path / "moved" / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = network.embed(tiles).numpy()
    found = session.run(["embeddings"], {"tiles": tiles.numpy()})[0]
    assert found.shape == (2, 2 * 192)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    monkeypatch.undo()
    export_onnx(network, card, tmp_path / "moved" / "m.onnx")
    assert {file.name for file in (tmp_path / "moved").iterdir()} == {"m.onnx", "m.grade.onnx"}
