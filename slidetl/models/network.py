"""The network that grades a slide; what is trained is what is exported."""

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
            The head's logits ``[B, K-1]``, and the attention ``[B, H, N]``.
        """
        return self.grade(self.embed(tiles), mask)

    def embed(self, tiles: Tensor) -> Tensor:
        """Bags ``[B, N, 3, H, W] uint8`` -> embeddings ``[B, N, D]``."""
        embeddings: Tensor = self.backbone(tiles.flatten(0, 1))
        return embeddings.view(tiles.shape[0], tiles.shape[1], -1)

    def grade(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The second half of :meth:`forward`, from embeddings ``[B, N, D]``; not for lower precisions."""
        pooled: Aggregated = self.aggregator(embeddings, mask)
        logits: Tensor = self.head(pooled.embedding)
        return logits, pooled.attention
