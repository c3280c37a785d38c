from __future__ import annotations

import torch

from slidetl.models.aggregators import Aggregator, GatedAttention, MeanPooling
from tests.contracts.aggregator import AggregatorContract

# The type checker holds every aggregator to the protocol.
AGGREGATORS: tuple[Aggregator, ...] = (MeanPooling(2), GatedAttention(2))


class TestMeanPooling(AggregatorContract):
    make = MeanPooling

    def test_is_the_mean(self) -> None:
        embeddings, mask = self.bag(6)
        mask[0, 4:] = False
        torch.testing.assert_close(self.aggregator()(embeddings, mask).embedding, embeddings[:, :4].mean(1))


class TestGatedAttention(AggregatorContract):
    make = GatedAttention

    def test_follows_equation_nine(self) -> None:
        aggregator = self.aggregator()
        embeddings, mask = self.bag(4)
        weights = {name: value.double() for name, value in aggregator.state_dict().items()}
        tiles = embeddings[0].double()
        scores = []
        for tile in tiles:
            value = torch.tanh(weights["value.weight"] @ tile + weights["value.bias"])
            gate = 1 / (1 + torch.exp(-(weights["gate.weight"] @ tile + weights["gate.bias"])))
            scores.append((weights["score.weight"] @ (value * gate) + weights["score.bias"]).squeeze())
        exponentials = torch.stack(scores).exp()
        attention = exponentials / exponentials.sum()
        out = aggregator(embeddings, mask)
        torch.testing.assert_close(out.attention[0, 0].double(), attention, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.embedding[0].double(), attention @ tiles, atol=1e-6, rtol=1e-5)
