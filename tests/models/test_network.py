from __future__ import annotations

import pytest
import torch

from slidetl.models.aggregators import (
    AdditiveAttention,
    Attention,
    GatedAttention,
    MaxPooling,
    MeanPooling,
    MultiHopAttention,
    Pooling,
)
from slidetl.models.backbones import Backbone
from slidetl.models.heads import Coral, Corn, CrossEntropy, CumulativeLink, Head, RegressionWithThresholds
from slidetl.models.network import GradingNetwork
from slidetl.models.spec import BackboneSpec
from tests.small import small_spec


def test_bags_equal_their_embeddings_graded() -> None:
    torch.manual_seed(0)
    backbone = Backbone(small_spec())
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
    network = GradingNetwork(
        Backbone(BackboneSpec("cbr_small")), pooling, head(pooling.out_features, 5)
    ).eval()
    return network, torch.randn(2, n_tiles, 512)


@pytest.mark.parametrize("head", [CumulativeLink, Coral, RegressionWithThresholds])
@pytest.mark.parametrize(
    "aggregator", [MeanPooling, Attention, GatedAttention, MultiHopAttention, AdditiveAttention]
)
@pytest.mark.parametrize("n_tiles", [1, 7, 3000])
def test_contributions_sum_to_the_score_less_its_baseline(
    aggregator: type[Pooling], head: type[Head], n_tiles: int
) -> None:
    network, embeddings = graded(aggregator, head, n_tiles)
    mask = torch.ones(2, n_tiles, dtype=torch.bool)
    mask[1, 1 + n_tiles // 2 :] = False
    embeddings[~mask] = float("nan")
    with torch.inference_mode():
        logits, _, explained = network.explain(embeddings, mask)
        assert explained is not None
        score, contributions = explained
        # The score is the one that the logits are cut from: they differ from it by constants.
        other, _, there = network.explain(embeddings[:, :1], mask[:, :1])
        assert there is not None
        if head is RegressionWithThresholds:
            torch.testing.assert_close(logits[:, 0], score)
        else:
            gaps = score.unsqueeze(1) - logits
            torch.testing.assert_close(gaps, there[0].unsqueeze(1) - other, atol=1e-5, rtol=0)
        for row, is_tile in enumerate(mask):
            tiles = embeddings[row, is_tile].unsqueeze(1)  # slides of one tile, whose scores are its values
            alone = network.explain(tiles, torch.ones(len(tiles), 1, dtype=torch.bool))[2]
            assert alone is not None
            baseline = alone[0].mean()
            torch.testing.assert_close(contributions[row].sum(), score[row] - baseline, atol=1e-5, rtol=0)
    assert contributions.shape == (2, n_tiles)
    assert not contributions[~mask].any()


@pytest.mark.parametrize(
    ("aggregator", "head"),
    [(MeanPooling, Corn), (GatedAttention, CrossEntropy), (MaxPooling, CumulativeLink)],
)
def test_where_there_is_no_sum_nothing_is_claimed(aggregator: type[Pooling], head: type[Head]) -> None:
    network, embeddings = graded(aggregator, head, 3)
    with torch.inference_mode():
        assert network.explain(embeddings, torch.ones(2, 3, dtype=torch.bool))[2] is None


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "aggregator", [MeanPooling, Attention, GatedAttention, MultiHopAttention, AdditiveAttention, MaxPooling]
)
def test_an_exported_file_takes_tiles_in_parts_and_finds_the_same(aggregator: type[Pooling]) -> None:
    network, embeddings = graded(aggregator, CumulativeLink, 9000)
    scripted = torch.jit.script(network)
    mask = torch.ones(2, 9000, dtype=torch.bool)
    with torch.inference_mode():
        here, there = network.explain(embeddings, mask)[2], scripted.explain(embeddings, mask)[2]
    if here is None:
        assert there is None and aggregator is MaxPooling
    else:
        torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-5)
