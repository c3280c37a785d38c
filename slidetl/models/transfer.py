"""Transfer strategies: what starts where, what trains, at what rate, and what is penalised."""

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
    """One way of leaning on a pretrained backbone; as it stands: random weights, all train, no penalty.

    A training calls, in this order: ``adapt`` when the network is built; ``start`` if the training is new;
    ``reference``; ``parameter_groups``; ``prepare`` if the training is new. Then ``set_training_mode`` and
    ``frozen`` in each epoch, ``watched`` and ``penalties`` in each forward pass, ``after_step`` after each
    step of the optimiser. The last four only where there is a reference.

    Several processes (DDP) compute what one does with the same global batch, but for two things: a batch norm
    that uses batch statistics normalises by those of its own process's share, and keeps those of the first
    process; and dropout draws apart in each. Where pretrained layers keep their stored statistics, as they do
    by default, the first does not arise.

    Attributes:
        from_pretrained: True if it makes any use of the pretrained weights.
    """

    # A method with nothing but a docstring would count as abstract: hence each `return`.
    from_pretrained: ClassVar[bool] = True

    def adapt(self, backbone: Backbone) -> None:
        """Changes the architecture, if at all; the same for a network that a checkpoint will fill.

        Raises:
            UsageError: this backbone cannot be changed so.
        """
        return

    def start(self, backbone: Backbone) -> None:
        """Gives the backbone the weights from which training starts. Called once, before it.

        Raises:
            WeightsError: pretrained weights are needed and cannot be had.
        """
        return

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Puts back into evaluation mode what must not follow ``train()``; called each time after it."""
        return

    def frozen(self, backbone: Backbone, epoch: int) -> list[nn.Parameter]:
        """Returns the trained parameters that rest in an epoch, counted from 0."""
        return []

    def parameter_groups(self, network: GradingNetwork, lr: float, weight_decay: float) -> Groups:
        """Returns the optimiser's parameter groups.

        Args:
            network: all of whose parameters that train are in exactly one group.
            lr: peak learning rate of the new layers (aggregator and head).
            weight_decay: of kernels; norms, biases, and what is pulled elsewhere have none.
        """
        return _groups(network.parameters(), lr, weight_decay)

    def reference(self, backbone: Backbone) -> Reference | None:
        """Builds the pretrained network that penalties are measured against, or None without penalties.

        Raises:
            WeightsError: pretrained weights are needed and cannot be had.
        """
        return None

    def prepare(self, network: GradingNetwork, reference: Reference, batches: Iterable[Batch]) -> None:
        """Learns about the reference from training data, once, before the first step."""
        return

    def watched(self, backbone: Backbone) -> tuple[str, ...]:
        """Names the modules of ``backbone.net`` whose activations :meth:`penalties` wants to see."""
        return ()

    def penalties(self, network: GradingNetwork, reference: Reference, seen: Seen, progress: float) -> Terms:
        """Computes what is added to the loss of a batch, each scalar under a name of its own.

        Args:
            network: after its forward pass.
            reference: what :meth:`reference` gave.
            seen: what went through it, with the activations of the modules that :meth:`watched` names.
            progress: share of all training steps that are done, 0..1.
        """
        return {}

    def after_step(
        self, network: GradingNetwork, reference: Reference, groups: Groups, progress: float
    ) -> Terms:
        """Applies what is decoupled from the optimiser's moments.

        Args:
            network: after the optimiser's step.
            reference: what :meth:`reference` gave.
            groups: the optimiser's groups, with the rates of this step.
            progress: share of all training steps that were done before this one, 0..1.

        Returns:
            The value of each penalty that was applied, for the log.
        """
        return {}


@dataclass(frozen=True)
class Scratch(TransferStrategy):
    """Random weights; everything trains at the same rate. What transfer must beat."""

    from_pretrained: ClassVar[bool] = False


@dataclass(frozen=True)
class FrozenFeatures(TransferStrategy):
    """The pretrained backbone as it is; only aggregator and head train.

    The backbone stays in evaluation mode, and no graph is kept for it.
    """

    def adapt(self, backbone: Backbone) -> None:
        """Takes the backbone out of training, before DDP counts what trains."""
        backbone.requires_grad_(False)

    def start(self, backbone: Backbone) -> None:
        """Loads the pretrained weights."""
        backbone.load_pretrained()

    def set_training_mode(self, backbone: Backbone, epoch: int = 0) -> None:
        """Keeps stored batch-norm statistics, and drops nothing out."""
        backbone.eval()


@dataclass(frozen=True)
class WarmRestart(TransferStrategy):
    """Starts from the pretrained weights, and trains everything.

    The options: discriminative rates and gradual unfreezing follow Howard and Ruder, "Universal language
    model fine-tuning", ACL 2018 (whose rates fall by 2.6 per layer); head first is LP-FT of Kumar et al.,
    "Fine-tuning can distort pretrained features", ICLR 2022. Blocks are those in which the network is
    declared: the entries of its stages, each with the norms that follow it. All share one schedule of the
    rate; a block that is unfrozen late joins in where the schedule is then.

    Attributes:
        backbone_lr_scale: rate of the backbone's topmost block relative to that of the new layers.
        layer_lr_decay: rate of each block relative to the block above it; 1 for one rate.
        head_first_epochs: epochs in which only the new layers train.
        gradual_unfreezing_epochs: epochs, after those, over which the blocks join in from the top down.
        batch_statistics: whether batch norm uses and updates batch statistics. By default the stored
            ones stay: a hundred slides, of which each batch sees four, estimate them badly.
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
        """Keeps the stored batch-norm statistics unless told otherwise, and those of frozen blocks."""
        frozen = set(self.frozen(backbone, epoch))
        for module in batch_norms(backbone):
            if not self.batch_statistics or module.weight in frozen:
                module.eval()

    def frozen(self, backbone: Backbone, epoch: int) -> list[nn.Parameter]:
        """Returns the blocks whose turn has not come."""
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
        """Loads the pretrained weights, or leaves the random ones."""
        if self.start_from == "pretrained":
            backbone.load_pretrained()

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
    """Everything trains, on a leash of ``alpha/2 ||w - w0||^2`` to the pretrained weights.

    L2-SP: Li, Grandvalet and Davoine, "Explicit inductive bias for transfer learning with convolutional
    networks", ICML 2018. It departs in two points. The start may be random: then the training is drawn
    towards the pretrained network without beginning there. And by default the pull is decoupled, as the
    weight decay of AdamW is: after each step ``w -= lr alpha (w - w0)``, at the rate of that step, so that
    Adam does not divide it by the size of the gradients. In the paper it is in the loss, with plain SGD:
    ``decoupled: false``. Weight decay of what is pulled is 0; statistics of batch norm are never pulled.

    Attributes:
        alpha: weight of the pull on the backbone. The paper's 0.1 is for SGD at a rate of 0.01. Decoupled
            from Adam, a step moves a weight by about ``lr`` however small its gradient, and the pull
            balances a steady gradient at a distance of ``1 / alpha``: hence the larger value. Left to
            itself it halves the distance in ``0.7 / (lr alpha)`` steps, ``lr`` being the backbone's rate:
            below the length of a training it matters, far below it the backbone is all but frozen. To be
            chosen among 1, 10 and 100 on the validation part, with the drift report beside it.
        alpha_end: where alpha goes over the training; None: it stays.
        beta: weight of ``beta/2 ||w||^2`` on the kernels of the new layers (aggregator and head); decoupled,
            it is their weight decay.
        schedule: how alpha goes there, ``linear`` or ``cosine``.
        parameters: ``kernels`` as in the authors' code, or ``all``: biases and norms too.
        decoupled: keep the pull outside the loss.
        start_from: ``pretrained`` or ``random``.
        backbone_lr_scale: rate of the backbone relative to that of the new layers; None: 0.1 from
            pretrained weights, 1 from random ones.
        batch_statistics: whether batch norm uses and updates batch statistics; None: from a random start.
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
        """Sets weight decay to 0, but for beta where it is decoupled."""
        new = {id(parameter) for parameter in _new_parameters(network)}
        groups = super().parameter_groups(network, lr, weight_decay)
        for group in groups:
            is_new = id(group["params"][0]) in new
            group["weight_decay"] = self.beta if is_new and self.decoupled and group["weight_decay"] else 0.0
        return groups

    def penalties(self, network: GradingNetwork, reference: Reference, seen: Seen, progress: float) -> Terms:
        """Computes ``weights`` and ``new_layers``, where they belong into the loss."""
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
        """Applies ``weights``, where it does not belong into the loss."""
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
    """Everything trains; what chosen layers see in a tile stays close to what the pretrained network sees.

    DELTA: Li et al., "DEep Learning Transfer using feature map with Attention", ICLR 2019: the squared
    difference of feature maps, each channel weighed by how much the pretrained network needs it for this
    task. It departs from it: the figure is a mean over positions, tiles and slides instead of a sum, so
    that its weight depends neither on the layer's size nor on the batch. The backbone has no dropout in
    training, so that equal weights cost nothing. With batch statistics in the target, the reference uses
    those of its own batch in that step. Under DDP batch statistics are those of each process.

    Attributes:
        layers: names of modules of the backbone; none: the last four stages.
        weight: of the penalty. It is in units of the layers' squared activations, so no value fits every
            network: to be chosen among 0.1, 1 and 10 on the validation part, such that the logged
            ``penalty/activations`` is neither lost beside the loss of the grades nor all of it.
        weight_end: where the weight goes over the training; None: it stays.
        schedule: how it goes there, ``linear`` or ``cosine``.
        attention: ``plain`` weighs the channels of a layer alike; ``delta`` as in the paper, from a
            classifier fitted at the start. That costs as many forward passes as the layers have channels.
        attention_batches: batches of training data for that.
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
        """Turns off training mode, and so dropout, but for batch norm where it uses batch statistics."""
        backbone.eval()
        for module in batch_norms(backbone):
            module.train(self._batch_statistics)

    def reference(self, backbone: Backbone) -> Reference | None:
        """Freezes the pretrained weights; the layers are looked up before anything trains."""
        for layer in self.watched(backbone):
            find_module(backbone, layer)
        return super().reference(backbone)

    def prepare(self, network: GradingNetwork, reference: Reference, batches: Iterable[Batch]) -> None:
        """Weighs the channels, if wanted."""
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
        distance = activation_distance(seen.activations, expected, seen.mask, reference.attention)
        weight = ramp(self.weight, self.weight_end, self.schedule, progress)
        return {**found, "activations": weight * distance}


@dataclass(frozen=True)
class SharedBoth(SharedActivations, SharedWeights):
    """The leash on the weights and that on the activations together.

    The attributes are those of :class:`SharedWeights` and :class:`SharedActivations`; ``schedule`` holds
    for both weights.
    """

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
    the features. Every parameter tensor counts as a layer; batch norm learns its statistics anew.
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
        up_to: name of the last pretrained block, which must end a stage, e.g. ``layer2`` of a ResNet.
        width: share of the channels that is kept above it, above 0 and up to 1.
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

    Raghu et al., "Transfusion", NeurIPS 2019, section 4.2: are the pretrained edges of the first layer all
    that helps? The paper gives no parameters; here the filters step through orientations, an even and an
    odd phase, and wavelengths from 2.5 px up to the kernel's size, with an envelope of half a wavelength.
    Each filter has mean 0, is the same in all colours, and has the scale of the random one it replaces.

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
    if not value > 0:
        raise UsageError(f"{name} must be above 0, not {value}")


def _check_weights(**weights: float | None) -> None:
    for name, value in weights.items():
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"{name} must be at least 0, not {value}")
