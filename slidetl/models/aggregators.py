"""Aggregators: the embeddings of a slide's tiles -> one embedding of the slide."""

from typing import NamedTuple, Optional, Protocol

import torch
from torch import Tensor, nn


class Aggregated(NamedTuple):
    """What an aggregator makes of a bag.

    Attributes:
        embedding: ``[B, D']``, one vector per slide.
        attention: ``[B, H, N]``, weight of each tile per head or hop; sums to one over the tiles of a
            slide, zero where padded.
        contributions: ``[B, N, K]``, share of each tile in each logit, for aggregators that have one.
    """

    embedding: Tensor
    attention: Tensor
    contributions: Optional[Tensor]  # noqa: UP045 (TorchScript reads the annotation)


class Aggregator(Protocol):
    """Pools the embeddings of a slide's tiles, whatever their order and number.

    Attributes:
        out_features: length D' of the slide's embedding.
    """

    out_features: int

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools.

        Args:
            embeddings: ``[B, N, D]`` float.
            mask: ``[B, N]`` bool, False for padding; at least one True in each row.
        """
        ...


class Pooling(nn.Module):
    """Base of the aggregators that a configuration can name: an attention, and what it pools.

    A configuration finds classes by their base, which a protocol is not.
    """

    out_features: int

    def pool(self, attention: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Weighted sum ``[B, H, D]`` in float32; what padding holds, even NaN, does not count."""
        return attention @ embeddings.to(torch.float32).masked_fill(~mask.unsqueeze(-1), 0.0)


class MeanPooling(Pooling):
    """Every tile counts alike.

    Args:
        in_features: length D of a tile's embedding.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.out_features = in_features

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """See :class:`Aggregator`; H is 1."""
        weights = mask.to(torch.float32)  # [B, N]
        attention = (weights / weights.sum(1, keepdim=True)).unsqueeze(1)  # [B, 1, N]
        return Aggregated(self.pool(attention, embeddings, mask).squeeze(1), attention, None)


class GatedAttention(Pooling):
    """Attention with a gate: a learned score per tile decides how much it counts.

    Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", ICML 2018,
    equation 9. The softmax is taken in float32.

    Args:
        in_features: length D of a tile's embedding.
        hidden_features: length of the hidden layer (L in the paper, 128 there).
    """

    def __init__(self, in_features: int, hidden_features: int = 128) -> None:
        super().__init__()
        self.out_features = in_features
        self.value = nn.Linear(in_features, hidden_features)
        self.gate = nn.Linear(in_features, hidden_features)
        self.score = nn.Linear(hidden_features, 1)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """See :class:`Aggregator`; H is 1."""
        hidden = torch.tanh(self.value(embeddings)) * torch.sigmoid(self.gate(embeddings))  # [B, N, L]
        scores = self.score(hidden).squeeze(-1).to(torch.float32)  # [B, N]
        attention = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=1).unsqueeze(1)  # [B, 1, N]
        return Aggregated(self.pool(attention, embeddings, mask).squeeze(1), attention, None)
