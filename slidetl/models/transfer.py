"""Transfer strategies: initial weights, trained layers, learning rates and penalties."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from slidetl.errors import UsageError
from slidetl.models.backbones import Backbone
from slidetl.models.blocks import (
    batch_norms,
    blocks_of,
    copy_normalisation,
    copy_up_to,
    keep_statistics_up_to,
    narrow_above,
    pretrained_backbone,
)
from slidetl.models.gabor import gabor_filters
from slidetl.models.lora import add_low_rank, merge_low_rank, without_low_rank
from slidetl.models.network import GradingNetwork
from slidetl.models.penalties import (
    Batch,
    Reference,
    Seen,
    Shape,
    activation_distance,
    channel_attention,
    find_module,
    pull,
    ramp,
    squared_distance,
)

Groups = list[dict[str, Any]]  # an optimiser's parameter groups
Terms = dict[str, Tensor]  # scalars by name


class TransferStrategy(Protocol):
    """One use of a pretrained backbone; by default random weights, all layers trained, no penalty.

    A training calls, in this order: ``adapt`` when the network is built; ``start`` if the training is new;
    ``reference``; ``parameter_groups``; ``prepare`` if the training is new. Then ``set_training_mode`` and
    ``frozen`` in each epoch, ``watched`` and ``penalties`` in each forward pass, ``after_step`` after each
    step of the optimiser. ``prepare``, ``watched``, ``penalties`` and ``after_step`` need a reference.

    Several processes (DDP) compute the same as one with the same global batch, with two exceptions: dropout
    draws separately in each; and batch statistics are those of each process's share, and the running ones
    those of the first process. By default pretrained layers keep their stored statistics instead.

    Attributes:
        from_pretrained: True if it uses the pretrained weights in any way.
    """

    # A method with only a docstring would count as abstract: hence each `return`.
    from_pretrained: ClassVar[bool] = True

    def adapt(self, backbone: Backbone) -> None:
        """Changes the architecture, if at all; also before a checkpoint is loaded.

        Raises:
            UsageError: this backbone does not allow it.
        """
        return

    def merge(self, backbone: Backbone) -> None:
        """Takes additions to the architecture back into the weights, for an exported file."""
        return

    def start(self, backbone: Backbone) -> None:
        """Sets the initial weights of the backbone, once before training.

        Raises:
            WeightsError: pretrained weights are needed and cannot be found or read.
        """
        return

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Puts some modules back into evaluation mode, each time after ``train()``."""
        return

    def frozen(self, backbone: Backbone, epoch: int) -> list[nn.Parameter]:
        """Returns the trained parameters to freeze in an epoch, counted from 0."""
        return []

    def parameter_groups(self, network: GradingNetwork, lr: float, weight_decay: float) -> Groups:
        """Returns the optimiser's parameter groups.

        Args:
            network: each of its trained parameters is in exactly one group.
            lr: peak learning rate of the new layers (aggregator and head).
            weight_decay: of kernels; norms, biases and pulled parameters have none.
        """
        return _groups(network.parameters(), lr, weight_decay)

    def reference(self, backbone: Backbone) -> Reference | None:
        """Builds the pretrained reference of the penalties, or None without penalties.

        Raises:
            WeightsError: pretrained weights are needed and cannot be found or read.
        """
        return None

    def prepare(self, network: GradingNetwork, reference: Reference, batches: Iterable[Batch]) -> None:
        """Prepares the reference from training data, once before the first step."""
        return

    def watched(self, backbone: Backbone) -> tuple[str, ...]:
        """Names the modules of ``backbone.net`` with activations for :meth:`penalties`."""
        return ()

    def penalties(self, network: GradingNetwork, reference: Reference, seen: Seen, progress: float) -> Terms:
        """Computes the penalties to add to the loss of a batch, scalars by name.

        Args:
            network: after its forward pass.
            reference: from :meth:`reference`.
            seen: the batch, with the activations of the modules named by :meth:`watched`.
            progress: share of the training steps done, 0..1.
        """
        return {}

    def after_step(
        self, network: GradingNetwork, reference: Reference, groups: Groups, progress: float
    ) -> Terms:
        """Applies the penalties decoupled from the optimiser's moments.

        Args:
            network: after the optimiser's step.
            reference: from :meth:`reference`.
            groups: the optimiser's groups, with the rates of this step.
            progress: share of the training steps done before this one, 0..1.

        Returns:
            The value of each applied penalty, for the log.
        """
        return {}


@dataclass(frozen=True)
class Scratch(TransferStrategy):
    """Random weights; everything trains at the same rate. The baseline of transfer."""

    from_pretrained: ClassVar[bool] = False


@dataclass(frozen=True)
class FrozenFeatures(TransferStrategy):
    """The pretrained backbone in evaluation mode, without a graph; only aggregator and head train."""

    def adapt(self, backbone: Backbone) -> None:
        """Freezes the backbone, before DDP counts the trained parameters."""
        backbone.requires_grad_(False)

    def start(self, backbone: Backbone) -> None:
        """Loads the pretrained weights."""
        backbone.load_pretrained()

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Keeps stored batch-norm statistics, and turns off dropout."""
        backbone.eval()


@dataclass(frozen=True)
class LoRA(TransferStrategy):
    """The pretrained backbone, frozen, with trained low-rank updates of its attention layers.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv:2106.09685). Only the
    factors have gradients and moments: 0.3 % of the parameters of UNI2-h at rank 8. Departures:
    queries, keys and values share a first factor, since timm has one layer for the three, and the output
    layer of the attention has an update too. An exported file has the updates added to the weights.

    Attributes:
        rank: of each update.
        alpha: updates are scaled by ``alpha / rank``.
        backbone_lr_scale: rate of the factors relative to the new layers.
    """

    rank: int = 8
    alpha: float = 16.0
    backbone_lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}")
        _check_positive("alpha", self.alpha)
        _check_positive("backbone_lr_scale", self.backbone_lr_scale)

    def adapt(self, backbone: Backbone) -> None:
        """Freezes the backbone and adds the factors."""
        add_low_rank(backbone, self.rank, self.alpha)

    def merge(self, backbone: Backbone) -> None:
        """Adds the updates to the weights."""
        merge_low_rank(backbone)

    def start(self, backbone: Backbone) -> None:
        """Loads the pretrained weights; the updates are 0."""
        with without_low_rank(backbone):
            backbone.load_pretrained()

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Keeps stored batch-norm statistics, and turns off dropout."""
        backbone.eval()

    def parameter_groups(self, network: GradingNetwork, lr: float, weight_decay: float) -> Groups:
        """Groups the factors at their rate, then the new layers."""
        return [
            *_groups(network.backbone.parameters(), lr * self.backbone_lr_scale, weight_decay),
            *_groups(_new_parameters(network), lr, weight_decay),
        ]


@dataclass(frozen=True)
class WarmRestart(TransferStrategy):
    """Starts from the pretrained weights, and trains everything.

    Discriminative rates and gradual unfreezing follow Howard and Ruder, "Universal language model
    fine-tuning", ACL 2018 (rates fall by 2.6 per layer there); head first is LP-FT of Kumar et al.,
    "Fine-tuning can distort pretrained features", ICLR 2022. Blocks are the declared entries of the
    network's stages, each with its norms. All share one schedule of the rate; a block unfrozen late joins
    at its current point.

    Attributes:
        backbone_lr_scale: rate of the backbone's topmost block relative to the new layers.
        layer_lr_decay: rate of each block relative to the block above it; 1 for one rate.
        head_first_epochs: first epochs, with only the new layers in training.
        gradual_unfreezing_epochs: epochs, after those, to unfreeze the blocks from the top down.
        batch_statistics: use and update batch statistics in batch norm. By default the stored ones stay: a
            hundred slides in batches of four estimate them badly. They hold nothing, though, if a high rate
            moves the weights away from them: then features die (``docs/howto/strategy.md``).
    """

    backbone_lr_scale: float = 0.1
    layer_lr_decay: float = 1.0
    head_first_epochs: int = 0
    gradual_unfreezing_epochs: int = 0
    batch_statistics: bool = False

    def __post_init__(self) -> None:
        _check_positive("backbone_lr_scale", self.backbone_lr_scale)
        if not 0 < self.layer_lr_decay <= 1:
            raise UsageError(f"layer_lr_decay must be above 0 and up to 1, not {self.layer_lr_decay}")
        if self.head_first_epochs < 0 or self.gradual_unfreezing_epochs < 0:
            raise UsageError(
                f"head_first_epochs and gradual_unfreezing_epochs must be at least 0, not "
                f"{self.head_first_epochs}, {self.gradual_unfreezing_epochs}"
            )

    def start(self, backbone: Backbone) -> None:
        """Loads the pretrained weights."""
        backbone.load_pretrained()

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Keeps the stored batch-norm statistics, of frozen blocks alone with ``batch_statistics``."""
        frozen = set(self.frozen(backbone, epoch))
        for module in batch_norms(backbone):
            if not self.batch_statistics or module.weight in frozen:
                module.eval()

    def frozen(self, backbone: Backbone, epoch: int) -> list[nn.Parameter]:
        """Returns the parameters of the blocks not yet unfrozen."""
        blocks = blocks_of(backbone)
        awake = epoch - self.head_first_epochs + 1
        share = min(1.0, max(0, awake) / (self.gradual_unfreezing_epochs + 1))
        resting = len(blocks) - math.ceil(share * len(blocks))
        return [parameter for block in blocks[:resting] for parameter in block]

    def parameter_groups(self, network: GradingNetwork, lr: float, weight_decay: float) -> Groups:
        """Groups the backbone's blocks at their rates, then the new layers."""
        blocks = blocks_of(network.backbone)
        if self.layer_lr_decay == 1:
            blocks = [[parameter for block in blocks for parameter in block]]
        groups = []
        for height, block in enumerate(reversed(blocks)):
            rate = lr * self.backbone_lr_scale * self.layer_lr_decay**height
            groups += _groups(block, rate, weight_decay)
        return [*groups, *_groups(_new_parameters(network), lr, weight_decay)]


@dataclass(frozen=True)
class _SharedRepresentation(TransferStrategy):
    start_from: Literal["pretrained", "random"] = "pretrained"
    backbone_lr_scale: float | None = None
    batch_statistics: bool | None = None

    def __post_init__(self) -> None:
        if self.backbone_lr_scale is not None:
            _check_positive("backbone_lr_scale", self.backbone_lr_scale)

    def start(self, backbone: Backbone) -> None:
        """Loads the pretrained weights, or leaves the random ones, with the normalisation of the others."""
        if self.start_from == "pretrained":
            backbone.load_pretrained()
        else:
            copy_normalisation(pretrained_backbone(backbone), backbone)

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Keeps the stored batch-norm statistics of a pretrained start."""
        for module in () if self._batch_statistics else batch_norms(backbone):
            module.eval()

    @property
    def _batch_statistics(self) -> bool:
        return self.start_from == "random" if self.batch_statistics is None else self.batch_statistics

    def parameter_groups(self, network: GradingNetwork, lr: float, weight_decay: float) -> Groups:
        """Groups the backbone at its rate, then the new layers."""
        scale = self.backbone_lr_scale or (0.1 if self.start_from == "pretrained" else 1.0)
        return [
            *_groups(network.backbone.parameters(), lr * scale, weight_decay),
            *_groups(_new_parameters(network), lr, weight_decay),
        ]

    def reference(self, backbone: Backbone) -> Reference | None:
        """Freezes the pretrained weights."""
        return Reference(pretrained_backbone(backbone))


@dataclass(frozen=True)
class SharedWeights(_SharedRepresentation):
    """Trains everything, with a pull of ``alpha/2 ||w - w0||^2`` towards the pretrained weights.

    L2-SP: Li, Grandvalet and Davoine, "Explicit inductive bias for transfer learning with convolutional
    networks", ICML 2018. Departures: the start may be random, and is then pulled towards the pretrained
    network. And by default the pull is decoupled, like the weight decay of AdamW: after each step
    ``w -= lr alpha (w - w0)`` at its rate, so Adam does not divide it by the size of the gradients. The
    paper has it in the loss, with plain SGD: ``decoupled: false``. Pulled parameters have no weight decay;
    batch-norm statistics are never pulled.

    Attributes:
        alpha: weight of the pull on the backbone. The paper's 0.1 is for SGD at a rate of 0.01. Adam moves a
            weight by about ``lr`` per step even for a small gradient, and the decoupled pull balances a
            steady gradient at a distance of ``1 / alpha``: hence the larger value. Alone it halves the
            distance in ``0.7 / (lr alpha)`` steps at the backbone's rate ``lr``: below the length of a
            training it matters, far below it the backbone is nearly frozen. Choose among 1, 10 and 100 on
            the validation part, with the drift report.
        alpha_end: alpha at the end of the training; None: constant.
        beta: weight of ``beta/2 ||w||^2`` on the kernels of the new layers (aggregator and head); decoupled,
            it is their weight decay.
        schedule: course of alpha, ``linear`` or ``cosine``.
        parameters: ``kernels`` as in the authors' code, or ``all``: biases and norms too.
        decoupled: keep the pull outside the loss.
        start_from: ``pretrained`` or ``random``.
        backbone_lr_scale: rate of the backbone relative to the new layers; None: 0.1 from pretrained
            weights, 1 from random ones.
        batch_statistics: use and update batch statistics in batch norm; None: from a random start only.
    """

    alpha: float = 10.0
    alpha_end: float | None = None
    beta: float = 0.01
    schedule: Shape = "linear"
    parameters: Literal["kernels", "all"] = "kernels"
    decoupled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(alpha=self.alpha, alpha_end=self.alpha_end, beta=self.beta)

    def parameter_groups(self, network: GradingNetwork, lr: float, weight_decay: float) -> Groups:
        """Sets weight decay to 0, or to beta for the new kernels if decoupled."""
        new = {id(parameter) for parameter in _new_parameters(network)}
        groups = super().parameter_groups(network, lr, weight_decay)
        for group in groups:
            is_new = id(group["params"][0]) in new
            are_kernels = group["params"][0].ndim > 1  # as `_groups` divides them
            group["weight_decay"] = self.beta if is_new and self.decoupled and are_kernels else 0.0
        return groups

    def penalties(self, network: GradingNetwork, reference: Reference, seen: Seen, progress: float) -> Terms:
        """Computes ``weights`` and ``new_layers``, unless decoupled."""
        found = super().penalties(network, reference, seen, progress)
        if self.decoupled:
            return found
        anchors = reference.weights
        leashed = self._leashed(network.backbone)
        distance = squared_distance(list(leashed.values()), [anchors[name] for name in leashed])
        kernels = [parameter for parameter in _new_parameters(network) if parameter.ndim > 1]
        size = squared_distance(kernels, [torch.zeros_like(kernel) for kernel in kernels])
        alpha = ramp(self.alpha, self.alpha_end, self.schedule, progress)
        return {**found, "weights": alpha / 2 * distance, "new_layers": self.beta / 2 * size}

    def after_step(
        self, network: GradingNetwork, reference: Reference, groups: Groups, progress: float
    ) -> Terms:
        """Applies ``weights``, if decoupled."""
        if not self.decoupled:
            return {}
        alpha = ramp(self.alpha, self.alpha_end, self.schedule, progress)
        anchors = reference.weights
        anchor_of = {parameter: anchors[name] for name, parameter in self._leashed(network.backbone).items()}
        total = torch.zeros((), device=network.backbone.mean.device)
        for group in groups:
            if pulled := [parameter for parameter in group["params"] if parameter in anchor_of]:
                total += pull(pulled, [anchor_of[p] for p in pulled], group["lr"] * alpha)
        return {"weights": alpha / 2 * total}

    def _leashed(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        named = backbone.net.named_parameters()
        return {name: p for name, p in named if self.parameters == "all" or p.ndim > 1}


@dataclass(frozen=True)
class SharedActivations(_SharedRepresentation):
    """Trains everything, and keeps activations of chosen layers close to those of the pretrained network.

    DELTA: Li et al., "DEep Learning Transfer using feature map with Attention", ICLR 2019: the squared
    difference of feature maps, each channel weighed by its importance in the pretrained network for this
    task. Departures: the distance is a mean over positions, tiles and slides instead of a sum, so its
    weight depends neither on the layer's size nor on the batch; and the backbone trains without dropout, so
    equal weights have distance 0. If the backbone uses batch statistics, so does the reference, in the same
    step and on its own activations; under DDP in each process.

    Attributes:
        layers: names of modules of the backbone; none: the last four stages.
        weight: of the penalty, in units of the layers' squared activations, so no value fits every network.
            Choose among 0.1, 1 and 10 on the validation part: the logged ``penalty/activations`` should
            neither vanish beside the loss of the grades nor dominate it.
        weight_end: weight at the end of the training; None: constant.
        schedule: course of the weight, ``linear`` or ``cosine``.
        attention: ``plain`` weighs the channels of a layer alike; ``delta`` as in the paper, by a
            classifier fitted at the start, at the cost of one forward pass per channel of the layers.
        attention_batches: batches of training data for ``delta``.
        start_from, backbone_lr_scale, batch_statistics: as in :class:`SharedWeights`.
    """

    layers: tuple[str, ...] = ()
    weight: float = 1.0
    weight_end: float | None = None
    schedule: Shape = "linear"
    attention: Literal["plain", "delta"] = "plain"
    attention_batches: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(weight=self.weight, weight_end=self.weight_end)
        if self.attention_batches < 1:
            raise UsageError(f"attention_batches must be at least 1, not {self.attention_batches}")

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Turns off training mode, and so dropout, except in batch norm with batch statistics."""
        backbone.eval()
        for module in batch_norms(backbone):
            module.train(self._batch_statistics)

    def reference(self, backbone: Backbone) -> Reference | None:
        """Freezes the pretrained weights, and checks the names of the layers before training."""
        for layer in self.watched(backbone):
            find_module(backbone, layer)
        return super().reference(backbone)

    def prepare(self, network: GradingNetwork, reference: Reference, batches: Iterable[Batch]) -> None:
        """Weighs the channels for ``delta``."""
        if self.attention == "delta":
            some = [batch for _, batch in zip(range(self.attention_batches), batches, strict=False)]
            reference.attention = channel_attention(reference, network, self.watched(network.backbone), some)

    def watched(self, backbone: Backbone) -> tuple[str, ...]:
        """Names the chosen layers, or the last four stages."""
        return tuple(self.layers) or tuple(backbone.blocks())[-4:]

    def penalties(self, network: GradingNetwork, reference: Reference, seen: Seen, progress: float) -> Terms:
        """Computes ``activations``."""
        found = super().penalties(network, reference, seen, progress)
        expected = reference.activations(seen.tiles.flatten(0, 1), tuple(seen.activations), network.backbone)
        distance = activation_distance(
            seen.activations, expected, seen.mask, reference.attention, network.backbone
        )
        weight = ramp(self.weight, self.weight_end, self.schedule, progress)
        return {**found, "activations": weight * distance}


@dataclass(frozen=True)
class SharedBoth(SharedActivations, SharedWeights):
    """Both :class:`SharedWeights` and :class:`SharedActivations`, with one ``schedule`` for both weights."""

    def __post_init__(self) -> None:
        SharedWeights.__post_init__(self)
        SharedActivations.__post_init__(self)


@dataclass(frozen=True)
class WeightTransfusion(TransferStrategy):
    """Pretrained from the input up to a block, random above; everything trains at one rate.

    Raghu et al., "Transfusion", NeurIPS 2019, section 5. The pretrained part keeps its stored batch-norm
    statistics; the random part learns its own.

    Attributes:
        up_to: name of the last pretrained block in the backbone, e.g. ``layer2`` of a ResNet.
    """

    up_to: str

    def start(self, backbone: Backbone) -> None:
        """Copies the pretrained weights up to the block."""
        copy_up_to(backbone, self.up_to)

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Keeps the stored statistics of the pretrained part."""
        keep_statistics_up_to(backbone, self.up_to)


@dataclass(frozen=True)
class MeanVarInit(TransferStrategy):
    """Random weights, each layer normal with the mean and variance of the pretrained one.

    Raghu et al., "Transfusion", NeurIPS 2019, section 4: it keeps the scale of the weights, and nothing of
    the features. Every parameter tensor counts as a layer; batch norm learns new statistics.
    """

    def start(self, backbone: Backbone) -> None:
        """Draws the weights."""
        pretrained = pretrained_backbone(backbone)
        copy_normalisation(pretrained, backbone)
        with torch.no_grad():
            for name, parameter in pretrained.net.named_parameters():
                values = torch.randn_like(parameter) * parameter.std(correction=0) + parameter.mean()
                backbone.net.get_parameter(name).copy_(values)


@dataclass(frozen=True)
class SlimHybrid(WeightTransfusion):
    """Pretrained from the input up to a block, and above it a narrower random top; everything trains.

    Raghu et al., "Transfusion", NeurIPS 2019, section 5 (there ResNet-50 up to Block 2, the rest at half
    its width). The embedding gets narrower with the top.

    Attributes:
        up_to: name of the last pretrained block, the end of a stage, e.g. ``layer2`` of a ResNet.
        width: share of the channels kept above it, above 0 and up to 1.
    """

    width: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise UsageError(f"width must be above 0 and up to 1, not {self.width}")

    def adapt(self, backbone: Backbone) -> None:
        """Narrows the top."""
        narrow_above(backbone, self.up_to, self.width)


@dataclass(frozen=True)
class GaborInit(TransferStrategy):
    """Gabor filters in the first layer, random weights above; everything trains at one rate.

    Raghu et al., "Transfusion", NeurIPS 2019, section 4.2: do only the pretrained edges of the first layer
    help? The paper gives no parameters; here the filters step through orientations, an even and an odd
    phase, and wavelengths from 2.5 px up to the kernel's size, with an envelope of half a wavelength. Each
    filter has mean 0, is the same in all colours, and has the scale of the random one it replaces.

    Attributes:
        orientations: number of directions within half a turn.
    """

    orientations: int = 8
    from_pretrained: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.orientations < 1:
            raise UsageError(f"orientations must be at least 1, not {self.orientations}")

    def start(self, backbone: Backbone) -> None:
        """Fills the first convolution.

        Raises:
            UsageError: its kernels are too small for any wave.
        """
        first = next((module for module in backbone.net.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None or min(first.kernel_size) < 3:
            raise UsageError(
                f"{backbone.spec.name} has no first convolution of at least 3 px; choose another strategy"
            )
        with torch.no_grad():
            scale = first.weight.std(dim=(1, 2, 3), correction=0)[:, None, None, None]
            filters = gabor_filters(first.out_channels, min(first.kernel_size), self.orientations)
            filters = filters / filters.std(dim=(1, 2), correction=0, keepdim=True)
            first.weight.copy_(filters[:, None].expand_as(first.weight) * scale)


def _groups(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> Groups:
    """Groups kernels with weight decay, and vectors (biases, norms, thresholds) without."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    kernels = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = ((kernels, weight_decay), (vectors, 0.0))
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]


def _new_parameters(network: GradingNetwork) -> Sequence[nn.Parameter]:
    return [*network.aggregator.parameters(), *network.head.parameters()]


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{name} must be above 0 and finite, not {value}")


def _check_weights(**weights: float | None) -> None:
    for name, value in weights.items():
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"{name} must be at least 0, not {value}")
