from __future__ import annotations

import pytest
import torch

from slidetl.models.aggregators import AdditiveAttention, MeanPooling, Pooling
from slidetl.models.backbones import Backbone
from slidetl.models.heads import Coral, Corn, CrossEntropy, CumulativeLink, Head, RegressionWithThresholds
from slidetl.models.network import GradingNetwork
from slidetl.models.spec import BackboneSpec


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


def graded(aggregator: type[Pooling], head: type[Head], n_tiles: int) -> tuple[GradingNetwork, torch.Tensor]:
    torch.manual_seed(0)
    pooling = aggregator(512)
    network = GradingNetwork(Backbone(BackboneSpec()), pooling, head(pooling.out_features, 5)).eval()
    return network, torch.randn(2, n_tiles, 512)


@pytest.mark.parametrize("head", [CumulativeLink, Coral, Corn, RegressionWithThresholds, CrossEntropy])
@pytest.mark.parametrize("n_tiles", [1, 7, 20_000])
def test_contributions_of_tiles_sum_to_the_logits(head: type[Head], n_tiles: int) -> None:
    network, embeddings = graded(AdditiveAttention, head, n_tiles)
    mask = torch.ones(2, n_tiles, dtype=torch.bool)
    mask[1, 1 + n_tiles // 2 :] = False
    embeddings[~mask] = float("nan")
    with torch.inference_mode():
        contributions = network.contributions(embeddings, mask)
        logits, _ = network.grade(embeddings, mask)
    assert contributions.shape == (2, n_tiles, logits.shape[1])
    assert not contributions[~mask].any()
    torch.testing.assert_close(contributions.sum(1), logits, atol=2e-5, rtol=1e-5)


def test_a_contribution_is_the_linear_part_and_a_share_of_the_constant() -> None:
    network, embeddings = graded(AdditiveAttention, CrossEntropy, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with torch.inference_mode():
        pooled = network.aggregator(embeddings, mask)
        assert isinstance(network.head, CrossEntropy)
        weight, bias = network.head.classes.weight, network.head.classes.bias
        expected = pooled.contributions @ weight.T + pooled.attention.transpose(1, 2) * bias
        torch.testing.assert_close(network.contributions(embeddings, mask), expected)


def test_an_aggregator_that_does_not_add_up_says_so() -> None:
    network, embeddings = graded(MeanPooling, CumulativeLink, 3)
    with pytest.raises(ValueError, match="AdditiveAttention has"):
        network.contributions(embeddings, torch.ones(2, 3, dtype=torch.bool))
