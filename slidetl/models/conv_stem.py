"""The convolutional stem of CTransPath, in the place of a Swin transformer's patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NAME = "conv_stem"  # in the arguments of a network, which are plain values


class ConvStem(nn.Module):
    """Two strided 3 x 3 convolutions and a pointwise one, for patches of 4 px.

    Wang et al., "Transformer-based unsupervised contrastive learning for histopathological image
    classification", Medical Image Analysis 2022. The parameters are those that timm gives an ``embed_layer``.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        norm_layer: Callable[[int], nn.Module],
        **_: Any,
    ) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        channels = [in_chans, embed_dim // 8, embed_dim // 4]
        layers: list[nn.Module] = []
        for number in (0, 1):
            layers += [
                nn.Conv2d(channels[number], channels[number + 1], 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels[number + 1]),
                nn.ReLU(inplace=True),
            ]
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images ``[N, C, H, W]`` as patches ``[N, H / 4, W / 4, D]``."""
        patches: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return patches
