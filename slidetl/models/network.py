"""The network that grades a slide; what is trained is what is exported."""

import torch
from torch import Tensor, nn

from slidetl.models.aggregators import Aggregated, Pooling
from slidetl.models.backbones import Backbone
from slidetl.models.heads import Head


class GradingNetwork(nn.Module):
    """Normalisation and backbone per tile, then aggregator and head per slide.

    Args:
        backbone: tile -> embedding.
        aggregator: pools; an :class:`~slidetl.models.aggregators.Aggregator`.
        head: from :mod:`slidetl.models.heads`.
    """

    def __init__(self, backbone: Backbone, aggregator: Pooling, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.aggregator = aggregator
        self.head = head

    def forward(self, tiles: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Grades bags of tiles.

        Args:
            tiles: ``[B, N, 3, H, W] uint8`` RGB.
            mask: ``[B, N]`` bool, False for padding.

        Returns:
            The head's logits ``[B, L]``, and the attention ``[B, H, N]``.
        """
        return self.grade(self.embed(tiles), mask)

    def embed(self, tiles: Tensor) -> Tensor:
        """Embeds bags ``[B, N, 3, H, W] uint8`` as ``[B, N, D]``."""
        embeddings: Tensor = self.backbone(tiles.flatten(0, 1))
        return embeddings.view(tiles.shape[0], tiles.shape[1], -1)

    def grade(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the rest of :meth:`forward` from embeddings ``[B, N, D]``; not for lower precisions."""
        pooled: Aggregated = self.aggregator(embeddings, mask)
        logits: Tensor = self.head(pooled.embedding)
        return logits, pooled.attention

    def contributions(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Computes what each tile adds to the logits, for an aggregator that adds tiles up.

        A head is affine, so the share of a tile in the embedding is carried on by its linear part; its
        constant is shared out by the attention.

        Args:
            embeddings: ``[B, N, D]``.
            mask: ``[B, N]`` bool, False for padding.

        Returns:
            ``[B, N, L]``: over the tiles they sum to the logits of :meth:`grade`; 0 for padding.

        Raises:
            ValueError: the aggregator does not add tiles up.
        """
        pooled: Aggregated = self.aggregator(embeddings, mask)
        parts = pooled.contributions  # [B, N, D']
        if parts is None:
            raise ValueError("this aggregator has no contributions of tiles; AdditiveAttention has")
        constant: Tensor = self.head(torch.zeros_like(parts[0, :1]))  # [1, L]
        # Parts of many tiles are small beside the constant, and would lose digits under it.
        scale = float(parts.shape[1])
        logits: Tensor = self.head(parts.flatten(0, 1) * scale)
        linear = ((logits - constant) / scale).view(parts.shape[0], parts.shape[1], -1)
        return linear + pooled.attention.mean(1).unsqueeze(2) * constant
