from __future__ import annotations

import torch

from slidetl.models.aggregators import MeanPooling
from slidetl.models.backbones import Backbone, BackboneSpec
from slidetl.models.heads import CumulativeLink
from slidetl.models.network import GradingNetwork


def test_bags_equal_their_embeddings_graded() -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec())
    network = GradingNetwork(
        backbone, MeanPooling(backbone.num_features), CumulativeLink(backbone.num_features, 5)
    )
    network.eval()
    tiles = torch.randint(0, 256, (2, 3, 3, 48, 48), dtype=torch.uint8)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    with torch.inference_mode():
        logits, attention = network(tiles, mask)
        second = network.grade(backbone(tiles[1, :1])[None], mask[1:, :1])
    assert logits.shape == (2, 4) and attention.shape == (2, 1, 3)
    torch.testing.assert_close(logits[1:], second[0], atol=1e-5, rtol=1e-4)
