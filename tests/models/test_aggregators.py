from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from slidetl.errors import UsageError
from slidetl.models import aggregators
from slidetl.models.aggregators import (
    AdditiveAttention,
    Aggregator,
    Attention,
    Chowder,
    GatedAttention,
    LogSumExpPooling,
    MaxPooling,
    MeanPooling,
    MultiHopAttention,
    Pooling,
    TopKPooling,
)
from tests.contracts.aggregator import N_FEATURES, AggregatorContract

# The type checker holds every aggregator to the protocol.
AGGREGATORS: tuple[Aggregator, ...] = (
    MeanPooling(2),
    MaxPooling(2),
    TopKPooling(2),
    Chowder(2),
    LogSumExpPooling(2),
    Attention(2),
    GatedAttention(2),
    MultiHopAttention(2),
    AdditiveAttention(2),
)


class GradientShare(AggregatorContract):
    """Those that choose tiles: attention is the tiles' share of the gradient."""

    def test_attention_is_the_share_of_the_gradient(self) -> None:
        embeddings, mask = self.bag(9, batch=2)
        mask[1, 5:] = False
        embeddings.requires_grad_()
        out = self.aggregator()(embeddings, mask)
        out.embedding.sum().backward()
        assert embeddings.grad is not None
        share = embeddings.grad.sum(2)
        torch.testing.assert_close(out.attention[:, 0], share / share.sum(1, keepdim=True))


class TestMeanPooling(GradientShare):
    make = MeanPooling
    adds_tiles_up = True

    def test_is_the_mean(self) -> None:
        embeddings, mask = self.bag(6)
        mask[0, 4:] = False
        torch.testing.assert_close(self.aggregator()(embeddings, mask).embedding, embeddings[:, :4].mean(1))


class TestMaxPooling(GradientShare):
    make = MaxPooling

    def test_is_the_maximum_and_ties_are_shared(self) -> None:
        embeddings, mask = self.bag(6)
        out = self.aggregator()(embeddings, mask)
        torch.testing.assert_close(out.embedding, embeddings.max(1).values)
        out = self.aggregator()(torch.zeros(1, 4, N_FEATURES), mask[:, :4])
        torch.testing.assert_close(out.attention, torch.full((1, 1, 4), 0.25))


class TestTopKPooling(GradientShare):
    make = staticmethod(lambda n: TopKPooling(n, k=3))

    def test_is_the_mean_of_the_greatest(self) -> None:
        embeddings, mask = self.bag(6, batch=2)
        mask[1, 2:] = False
        out = self.aggregator()(embeddings, mask).embedding
        torch.testing.assert_close(out[0], embeddings[0].sort(0).values[3:].mean(0))
        torch.testing.assert_close(out[1], embeddings[1, :2].mean(0))


class TestChowder(AggregatorContract):
    make = staticmethod(lambda n: Chowder(n, k=3))

    def test_holds_the_highest_and_the_lowest_scores(self) -> None:
        embeddings, mask = self.bag(7, batch=2)
        mask[1, 2:] = False
        aggregator = self.aggregator()
        out = aggregator(embeddings, mask)
        assert isinstance(aggregator, Chowder)
        weight, bias = aggregator.score.weight[0], aggregator.score.bias
        scores = (embeddings @ weight + bias).sort(1, descending=True).values
        torch.testing.assert_close(out.embedding[0], torch.cat([scores[0, :3], scores[0, 4:].flip(0)]))
        high, low = (embeddings[1, :2] @ weight + bias).sort(descending=True).values
        torch.testing.assert_close(out.embedding[1], torch.stack([high, low, low, low, high, high]))
        torch.testing.assert_close(out.attention[1, 0, :2], torch.tensor([0.5, 0.5]))
        assert (out.attention[0, 0] > 0).sum() == 6


class TestLogSumExpPooling(GradientShare):
    make = LogSumExpPooling

    def test_lies_between_mean_and_maximum(self) -> None:
        embeddings, mask = self.bag(6)
        embedding = self.aggregator()(embeddings, mask).embedding
        torch.testing.assert_close(embedding, embeddings.exp().mean(1).log())
        nearly_mean = LogSumExpPooling(N_FEATURES, 1e-3)(embeddings, mask).embedding
        nearly_max = LogSumExpPooling(N_FEATURES, 1e5)(embeddings, mask).embedding
        torch.testing.assert_close(nearly_mean, embeddings.mean(1), atol=3e-3, rtol=0)
        torch.testing.assert_close(nearly_max, embeddings.amax(1), atol=1e-3, rtol=0)


def attended(scores: list[torch.Tensor]) -> torch.Tensor:
    exponentials = torch.stack(scores).exp()
    return exponentials / exponentials.sum()


class TestAttention(AggregatorContract):
    make = Attention
    adds_tiles_up = True

    def test_follows_equation_eight(self) -> None:
        aggregator = self.aggregator()
        embeddings, mask = self.bag(4)
        weights = {name: value.double() for name, value in aggregator.state_dict().items()}
        tiles, scores = embeddings[0].double(), []
        for tile in tiles:
            hidden = torch.tanh(weights["value.weight"] @ tile + weights["value.bias"])
            scores.append((weights["score.weight"] @ hidden + weights["score.bias"]).squeeze())
        out = aggregator(embeddings, mask)
        torch.testing.assert_close(out.attention[0, 0].double(), attended(scores), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.embedding[0].double(), attended(scores) @ tiles, atol=1e-6, rtol=1e-5)


class TestGatedAttention(AggregatorContract):
    make = GatedAttention
    adds_tiles_up = True

    def test_follows_equation_nine(self) -> None:
        aggregator = self.aggregator()
        embeddings, mask = self.bag(4)
        weights = {name: value.double() for name, value in aggregator.state_dict().items()}
        tiles, scores = embeddings[0].double(), []
        for tile in tiles:
            value = torch.tanh(weights["value.weight"] @ tile + weights["value.bias"])
            gate = 1 / (1 + torch.exp(-(weights["gate.weight"] @ tile + weights["gate.bias"])))
            scores.append((weights["score.weight"] @ (value * gate) + weights["score.bias"]).squeeze())
        out = aggregator(embeddings, mask)
        torch.testing.assert_close(out.attention[0, 0].double(), attended(scores), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.embedding[0].double(), attended(scores) @ tiles, atol=1e-6, rtol=1e-5)


class TestMultiHopAttention(AggregatorContract):
    make = staticmethod(lambda n: MultiHopAttention(n, hidden_features=8, hops=3))
    adds_tiles_up = True

    def test_what_was_read_asks_the_next_question(self) -> None:
        aggregator = self.aggregator()
        embeddings, mask = self.bag(5)
        weights = {name: value.double() for name, value in aggregator.state_dict().items()}
        tiles, query = embeddings[0].double(), weights["query"][0]
        values = tiles @ weights["value.weight"].T + weights["value.bias"]
        out = aggregator(embeddings, mask)
        assert out.attention.shape == (1, 3, 5)
        for hop in range(3):
            scores = [weights["key.weight"] @ tile @ query / 8**0.5 for tile in tiles]
            expected = attended(scores)
            torch.testing.assert_close(out.attention[0, hop].double(), expected, atol=1e-6, rtol=1e-5)
            query = query + weights["update.weight"] @ (expected @ values)
        torch.testing.assert_close(out.embedding[0].double(), query, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(out.attention[0, 0], out.attention[0, 2])


class TestAdditiveAttention(AggregatorContract):
    make = AdditiveAttention
    adds_tiles_up = True

    def test_weighting_before_the_network_is_the_same(self) -> None:
        aggregator = self.aggregator()
        embeddings, mask = self.bag(5)
        out = aggregator(embeddings, mask)
        assert isinstance(aggregator, AdditiveAttention)
        weighted = out.attention.transpose(1, 2) * embeddings  # as in the paper
        parts = aggregator.second(torch.relu(aggregator.first(weighted)))
        torch.testing.assert_close(out.embedding, parts.sum(1))
        torch.testing.assert_close(out.attention, aggregator.attend(embeddings, mask).attention)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopKPooling(3, k=0),
        lambda: Chowder(3, k=0),
        lambda: LogSumExpPooling(3, sharpness=0.0),
        lambda: MultiHopAttention(3, hops=0),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], Pooling]) -> None:
    with pytest.raises(UsageError, match=r"not 0"):
        make()


def test_every_aggregator_is_held_to_the_contract() -> None:
    defined = {item for item in vars(aggregators).values() if isinstance(item, type)}
    poolings = {item for item in defined if issubclass(item, Pooling)} - {Pooling}
    assert {type(aggregator) for aggregator in AGGREGATORS} == poolings
    contracts = [item for item in globals().values() if isinstance(item, type) and hasattr(item, "make")]
    assert {type(contract().aggregator()) for contract in contracts} == poolings


@pytest.mark.slow
def test_a_hundred_thousand_tiles_need_little_more_than_their_features() -> None:
    # In a process of its own: the peak of this one is that of all tests before. Trained on stored features.
    # 600 MB beside the 51 of the features: with features of 512 numbers it all stays below 2.5 GB.
    names = [type(aggregator).__name__ for aggregator in AGGREGATORS]
    program = f"""
import resource
import torch
from slidetl.models import aggregators
def peak():  # KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before = peak()
embeddings, mask = torch.rand(1, 100_000, 128), torch.ones(1, 100_000, dtype=torch.bool)
for name in {names}:
    aggregator = getattr(aggregators, name)(128)
    out = aggregator(embeddings, mask)
    assert out.embedding.isfinite().all(), name
    if out.embedding.requires_grad:
        out.embedding.square().sum().backward()
        assert all(value.grad.isfinite().all() for value in aggregator.parameters()), name
    del aggregator, out
    assert peak() - before < 650, f"{{name}}: {{peak() - before:.0f}} MB"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
