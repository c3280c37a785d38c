"""The grading network, the same in training and in exported files."""

from typing import Optional

import torch
from torch import Tensor, nn

from slidetl.models.aggregators import Aggregated, Pooling, is_scripting
from slidetl.models.backbones import Backbone
from slidetl.models.heads import Head


class GradingNetwork(nn.Module):
    """Normalisation and backbone per tile, then aggregator and head per slide."""

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
        """Grades bags of embeddings ``[B, N, D]``; not for lower precisions."""
        logits, attention, _ = self.explain(embeddings, mask)
        return logits, attention

    def explain(
        self, embeddings: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Optional[tuple[Tensor, Tensor]]]:  # noqa: UP045 (TorchScript reads it)
        """Grades as :meth:`grade`, and computes each tile's contribution to the slide's score.

        Contributions sum to the score less its baseline, the score if all tiles of the slide counted alike.

        Args:
            embeddings: ``[B, N, D]``.
            mask: ``[B, N]`` bool, False for padding.

        Returns:
            Logits ``[B, L]``, attention ``[B, H, N]``, and the score ``[B]`` with the contributions
            ``[B, N]``, in the head's ``score_unit``, 0 for padding; None instead if the aggregator does not
            sum over tiles or the head has no score.
        """
        pooled: Aggregated = self.aggregator(embeddings, mask)
        explained: Optional[tuple[Tensor, Tensor]] = None  # noqa: UP045
        if is_scripting():
            explained = self._explain_in_parts(embeddings, pooled)
        else:
            if pooled.contributions is not None:
                explained = self.head.explain(pooled.embedding, pooled.contributions)
        return self.head(pooled.embedding), pooled.attention, explained

    def _explain_in_parts(self, embeddings: Tensor, pooled: Aggregated) -> Optional[tuple[Tensor, Tensor]]:  # noqa: UP045
        """Explains one slide without padding in an exported file, some tiles at a time to save memory."""
        score: Optional[Tensor] = None  # noqa: UP045
        projected: list[Tensor] = []
        for part in torch.split(embeddings, 8192, 1):
            values = self.aggregator.values(part)
            if values is not None:
                explained = self.head.explain(pooled.embedding, values.to(torch.float32))
                if explained is not None:
                    score = explained[0]
                    projected.append(explained[1])
        if score is None:
            return None
        tiles = torch.cat(projected, 1)  # [B, N]
        return score, pooled.attention.mean(1) * (tiles - tiles.mean(1, keepdim=True))
