"""Transfer strategies: what starts where, what trains, and at what rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from slidetl.errors import UsageError
from slidetl.models.backbones import Backbone
from slidetl.models.network import GradingNetwork


class TransferStrategy(Protocol):
    """One way of leaning on a pretrained backbone."""

    def start(self, backbone: Backbone) -> None:
        """Gives the backbone the weights from which training starts. Called once, before it.

        Raises:
            WeightsError: pretrained weights are needed and cannot be had.
        """
        ...

    def set_training_mode(self, backbone: Backbone) -> None:
        """Puts back into evaluation mode what must not follow ``train()``; called each time after it."""
        ...

    def parameter_groups(
        self, network: GradingNetwork, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """The optimiser's parameter groups.

        Args:
            network: all of whose parameters that train are in exactly one group.
            lr: peak learning rate of the new layers (aggregator and head).
            weight_decay: of kernels; norms and biases have none.
        """
        ...


@dataclass(frozen=True)
class Scratch:
    """Random weights; everything trains at the same rate. What transfer must beat."""

    def start(self, backbone: Backbone) -> None:
        """Leaves the random weights as they are."""

    def set_training_mode(self, backbone: Backbone) -> None:
        """Batch norm learns its statistics from the batches."""

    def parameter_groups(
        self, network: GradingNetwork, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """See :class:`TransferStrategy`."""
        return _groups(network, lr, weight_decay)


@dataclass(frozen=True)
class WarmRestart:
    """Starts from the pretrained weights, and trains everything.

    Attributes:
        backbone_lr_scale: rate of the backbone relative to that of the new layers.
        batch_statistics: whether batch norm uses and updates batch statistics. By default the stored
            ones stay: a hundred slides, of which each batch sees four, estimate them badly.
    """

    backbone_lr_scale: float = 0.1
    batch_statistics: bool = False

    def __post_init__(self) -> None:
        if not self.backbone_lr_scale > 0:
            raise UsageError(f"backbone_lr_scale must be above 0, not {self.backbone_lr_scale}")

    def start(self, backbone: Backbone) -> None:
        """Loads the pretrained weights."""
        backbone.load_pretrained()

    def set_training_mode(self, backbone: Backbone) -> None:
        """Keeps the stored batch-norm statistics unless told otherwise."""
        if not self.batch_statistics:
            for module in backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def parameter_groups(
        self, network: GradingNetwork, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """See :class:`TransferStrategy`."""
        new_layers = nn.ModuleList([network.aggregator, network.head])
        return [
            *_groups(network.backbone, lr * self.backbone_lr_scale, weight_decay),
            *_groups(new_layers, lr, weight_decay),
        ]


def _groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Kernels with weight decay, and vectors (biases, norms, thresholds) without."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kernels = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": kernels, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
