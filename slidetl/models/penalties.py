"""Distances of a backbone from a pretrained one: of weights, and of activations on the same tiles."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from slidetl.errors import CheckpointError, UsageError
from slidetl.models.backbones import Backbone, weights_sha256
from slidetl.models.blocks import batch_norms, channel_axis
from slidetl.models.network import GradingNetwork
from slidetl.text import listed

Shape = Literal["linear", "cosine"]
Batch = tuple[Tensor, Tensor, Tensor]  # tiles [B, N, 3, H, W] uint8, mask [B, N] bool, grades [B] int64


class Seen(NamedTuple):
    """The tiles and activations of one forward pass of a training.

    Attributes:
        tiles: ``[B, N, 3, H, W] uint8``.
        mask: ``[B, N]`` bool, False for padding.
        activations: outputs of modules of ``backbone.net``, by their names.
    """

    tiles: Tensor
    mask: Tensor
    activations: dict[str, Tensor]


class Reference(nn.Module):
    """A frozen pretrained backbone, to measure distances from; takes over the given one.

    Its parameters become non-persistent buffers: they move with ``.to()``, but stay out of optimisers,
    checkpoints, exported files and the gradients of DDP.

    Attributes:
        sha256: of the weights (:func:`~slidetl.models.backbones.weights_sha256`).
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.sha256 = weights_sha256(backbone)
        self.backbone = backbone
        self._attention: dict[str, str] = {}  # layer -> name of its buffer
        for module in backbone.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, value in own:
                delattr(module, name)
                module.register_buffer(name, value.detach(), persistent=False)
        for norm in batch_norms(backbone):
            # With this off, `training` chooses between batch and stored statistics, and updates none.
            norm.track_running_stats = False

    @property
    def weights(self) -> dict[str, Tensor]:
        """The pretrained parameters and statistics by their name in ``backbone.net``."""
        return dict(self.backbone.net.named_buffers())

    @property
    def attention(self) -> dict[str, Tensor]:
        """Weights ``[C]`` by layer, with a sum of one; other layers weigh their channels alike."""
        return {layer: self.get_buffer(name) for layer, name in self._attention.items()}

    @attention.setter
    def attention(self, weights: Mapping[str, Tensor]) -> None:
        for index, (layer, value) in enumerate(weights.items()):
            self._attention[layer] = f"attention{index}"
            self.register_buffer(f"attention{index}", value.detach(), persistent=False)

    def to_checkpoint(self) -> dict[str, Any]:
        """Returns the state to resume from, with the hash of the weights instead of the weights."""
        return {"sha256": self.sha256, "attention": self.attention}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Restores the state of :meth:`to_checkpoint`.

        Raises:
            CheckpointError: the pretrained weights have changed since.
        """
        if kept.get("sha256") != self.sha256:
            raise CheckpointError(
                f"the training leaned on pretrained weights with sha256 {str(kept.get('sha256'))[:12]}, "
                f"those of {self.backbone.spec.pretrained!r} now have {self.sha256[:12]}; "
                "go on with the weights of then"
            )
        self.attention = kept["attention"]

    def activations(self, tiles: Tensor, layers: Sequence[str], like: Backbone) -> dict[str, Tensor]:
        """Computes the outputs of layers of ``backbone.net``, by name, for tiles ``[N, 3, H, W] uint8``.

        Batch norms with batch statistics in the backbone ``like`` use them here too in this call.
        """
        self.eval()
        for mine, other in zip(batch_norms(self.backbone), batch_norms(like), strict=True):
            mine.training = other.training
        with torch.no_grad(), recorded(self.backbone, layers) as found:
            self.backbone(tiles)
        return found


def ramp(start: float, end: float | None, shape: Shape, progress: float) -> float:
    """Moves a weight from ``start`` to ``end`` (None: it stays) as training progresses 0..1."""
    if end is None:
        return start
    done = min(max(progress, 0.0), 1.0)
    return start + (end - start) * (done if shape == "linear" else (1 - math.cos(math.pi * done)) / 2)


def squared_distance(parameters: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Sums ``||p - p0||^2`` over pairs of tensors: a scalar with a gradient, in float32 at least."""
    # One kernel forward and one backward; a difference and its square need three and more.
    distances = [
        mse_loss(_wide(p), _wide(p0), reduction="sum") for p, p0 in zip(parameters, anchors, strict=True)
    ]
    return torch.stack(distances).sum()


@torch.no_grad()
def pull(parameters: Sequence[Tensor], anchors: Sequence[Tensor], factor: float) -> Tensor:
    """Moves parameters towards their anchors in place: ``p -= factor (p - p0)``.

    Args:
        parameters: tensors to move.
        anchors: a tensor of equal shape for each.
        factor: 0 leaves them, 1 puts them onto the anchors; more would overshoot and counts as 1.

    Returns:
        ``sum ||p - p0||^2`` before the move.
    """
    differences = torch._foreach_sub(list(parameters), list(anchors))
    torch._foreach_add_(list(parameters), differences, alpha=-min(factor, 1.0))
    return torch.stack(torch._foreach_norm(differences)).square().sum()


def activation_distance(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    mask: Tensor,
    attention: Mapping[str, Tensor],
    backbone: Backbone,
) -> Tensor:
    """Sums the squared differences of activations over layers, a mean over the slides of a batch.

    Per tile and layer it is ``sum_c W_c mean_xy (a_cxy - a0_cxy)^2``, W of sum one. The mean over a slide's
    tiles counts, so neither padding nor the split of slides over processes changes the result.

    Args:
        found: activations by layer, maps ``[B*N, C, ...]`` or ``[B*N, ..., C]``, tokens ``[B*N, T, C]`` or
            vectors; they get the gradient.
        expected: activations of the reference.
        mask: ``[B, N]`` bool, False for padding.
        attention: ``[C]`` by layer; missing layers weigh their channels alike.
        backbone: the network of the layers.
    """
    share = (mask / (mask.sum(1, keepdim=True) * len(mask))).flatten()  # [B*N], sums to one
    total = share.new_zeros(())
    for layer, activation in found.items():
        squares = mse_loss(_wide(activation), _wide(expected[layer]), reduction="none")
        if squares.ndim > 2:
            squares = squares.movedim(_axis_of_channels(squares, backbone), 1).flatten(2)
        by_channel = squares.mean(2) if squares.ndim == 3 else squares  # [B*N, C]
        by_tile = by_channel @ attention[layer] if layer in attention else by_channel.mean(1)
        total = total + by_tile.masked_fill(share == 0, 0.0) @ share.to(by_tile.dtype)
    return total


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _axis_of_channels(activation: Tensor, backbone: Backbone) -> int:
    """Returns the axis of the channels; of maps with equal sides as timm tells it of the network."""
    if activation.ndim <= 3:
        return activation.ndim - 1  # tokens [N, T, C], vectors [N, C]
    is_last = getattr(backbone.net, "output_fmt", "NCHW") == "NHWC"
    return channel_axis(activation.shape) or (activation.ndim - 1 if is_last else 1)


def channel_attention(
    reference: Reference,
    network: GradingNetwork,
    layers: Sequence[str],
    batches: Sequence[Batch],
    steps: int = 100,
) -> dict[str, Tensor]:
    """Measures the importance of each channel of the pretrained network for the task.

    DELTA (Li et al., ICLR 2019), section 3.3: a classifier is fitted on the pretrained network's frozen
    features; a channel's weight is the softmax, over the channels of its layer, of the rise of the loss
    with the channel set to zero. The classifier here is a copy of the network's aggregator and head.

    Args:
        reference: the pretrained network.
        network: its aggregator and head are copied.
        layers: names of modules of ``backbone.net``.
        batches: training data; each channel costs one forward pass over them.
        steps: of Adam for the classifier.

    Returns:
        Weights ``[C]`` by layer, each with a sum of one.
    """
    reference.eval()
    aggregator, head = copy.deepcopy(network.aggregator).eval(), copy.deepcopy(network.head).eval()
    classifier = GradingNetwork(reference.backbone, aggregator, head)

    def loss(embedded: Sequence[Tensor]) -> Tensor:
        losses = [
            head.loss(classifier.grade(embeddings, mask)[0], grades)
            for embeddings, (_, mask, grades) in zip(embedded, batches, strict=True)
        ]
        return torch.stack(losses).mean()

    def embed() -> list[Tensor]:
        with torch.no_grad():
            return [classifier.embed(tiles).float() for tiles, _, _ in batches]

    whole = embed()
    with torch.enable_grad():
        optimizer = torch.optim.Adam([*aggregator.parameters(), *head.parameters()], lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(whole).backward()  # type: ignore[no-untyped-call] # torch's
            optimizer.step()

    weights = {}
    for layer in layers:
        with recorded(reference.backbone, [layer]) as found, torch.no_grad():
            classifier.embed(batches[0][0])
        axis = _axis_of_channels(found[layer], reference.backbone)
        rises = []
        for channel in range(found[layer].shape[axis]):
            with _silenced(reference.backbone, layer, axis, channel), torch.no_grad():
                rises.append(loss(embed()) - loss(whole))
        weights[layer] = torch.softmax(torch.stack(rises), 0)
    return weights


@contextmanager
def recorded(backbone: Backbone, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of modules of ``backbone.net`` while the context is open."""
    found: dict[str, Tensor] = {}
    hooks = []
    for layer in layers:

        def keep(module: nn.Module, inputs: object, output: Tensor, layer: str = layer) -> None:
            found[layer] = output

        hooks.append(find_module(backbone, layer).register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise UsageError(
            f"layer {missing[0]!r} of {backbone.spec.name} is never called as a whole; "
            "name one inside it, such as its last entry"
        )


@contextmanager
def _silenced(backbone: Backbone, layer: str, axis: int, channel: int) -> Iterator[None]:
    def silence(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.index_fill(axis, torch.tensor([channel], device=output.device), 0.0)

    hook = find_module(backbone, layer).register_forward_hook(silence)
    try:
        yield
    finally:
        hook.remove()


def find_module(backbone: Backbone, name: str) -> nn.Module:
    """Returns a module of ``backbone.net`` by name.

    Raises:
        UsageError: no such module; the message names some.
    """
    modules: dict[str, nn.Module] = dict(backbone.net.named_modules())
    if not name or name not in modules:
        some = [key for key in modules if key and key.count(".") <= 1]
        raise UsageError(f"{backbone.spec.name} has no layer {name!r}; it has {listed(some, 30)}")
    return modules[name]
