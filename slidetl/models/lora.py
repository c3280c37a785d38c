"""Low-rank updates of the attention layers of a transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from slidetl.errors import UsageError
from slidetl.models.backbones import Backbone

_LAYERS = ("qkv", "proj")


class LowRankLinear(nn.Linear):
    """A frozen linear layer plus a trained update of low rank, ``x W^T + b + scale x A^T B^T``.

    Args:
        linear: its weight and bias become this layer's own, frozen.
        rank: of the update.
        alpha: the update is scaled by ``alpha / rank``.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(
            self.lora_a, a=math.sqrt(5)
        )  # as nn.Linear; B of 0 leaves the function alone

    def forward(self, input: Tensor) -> Tensor:
        """Computes the layer of ``[..., in_features]``."""
        update = functional.linear(functional.linear(input, self.lora_a), self.lora_b)
        return functional.linear(input, self.weight, self.bias) + self.scale * update

    def merged_weight(self) -> Tensor:
        """Computes ``W + scale B A``."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a)

    def plain(self) -> nn.Linear:
        """Returns the layer without its update, with the same weight and bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


def add_low_rank(backbone: Backbone, rank: int, alpha: float) -> None:
    """Freezes a backbone, and gives its attention layers trained updates.

    Raises:
        UsageError: it has no attention layers of a known form.
    """
    # These call their layers as modules; others take the weights out of them, past the update.
    from timm.models.swin_transformer import WindowAttention
    from timm.models.vision_transformer import Attention  # type: ignore[attr-defined] # imported there

    backbone.requires_grad_(False)
    attention = [part for part in backbone.net.modules() if isinstance(part, (Attention, WindowAttention))]
    if not attention:
        raise UsageError(
            f"{backbone.spec.name} has no attention layers for LoRA, which is for vision transformers and "
            "Swin; choose another strategy"
        )
    for part in attention:
        for layer in _LAYERS:
            setattr(part, layer, LowRankLinear(getattr(part, layer), rank, alpha))


def merge_low_rank(backbone: Backbone) -> None:
    """Adds the updates to the weights, and leaves plain layers."""
    for name, layer in _low_rank(backbone.net).items():
        with torch.no_grad():
            layer.weight.copy_(layer.merged_weight())
        backbone.net.set_submodule(name, layer.plain())


@contextmanager
def without_low_rank(backbone: Backbone) -> Iterator[None]:
    """Takes the updates out of a backbone while the context is open."""
    layers = _low_rank(backbone.net)
    for name, layer in layers.items():
        backbone.net.set_submodule(name, layer.plain())
    try:
        yield
    finally:
        for name, layer in layers.items():
            backbone.net.set_submodule(name, layer)


def merged_parameters(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of a network by name, with the updates added to the weights."""
    layers = _low_rank(network)
    for name, parameter in network.named_parameters():
        layer, _, kind = name.rpartition(".")
        if layer not in layers:
            yield name, parameter
        elif not kind.startswith("lora_"):
            yield name, layers[layer].merged_weight() if kind == "weight" else parameter


def _low_rank(network: nn.Module) -> dict[str, LowRankLinear]:
    return {name: part for name, part in network.named_modules() if isinstance(part, LowRankLinear)}
