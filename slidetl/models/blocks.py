"""Blocks of a backbone from its input upwards: listed, copied or narrowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slidetl.errors import UsageError
from slidetl.models.backbones import Backbone

_TRIAL_SIZE_PX = 128  # side of the tile sent through to see the channels of each layer; Inception needs 75


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Lists the batch norms in a module."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def channel_axis(shape: Sequence[int]) -> int | None:
    """Finds the axis of the channels of maps ``[N, C, H, W]`` or ``[N, H, W, C]``.

    The maps are of square tiles, or of cubes, so the other sides are equal. timm tells the layout of a whole
    network, which its modules do not keep. None if all sides are equal, or no others.
    """
    is_first, is_last = len(set(shape[2:])) == 1, len(set(shape[1:-1])) == 1
    return None if is_first == is_last else 1 if is_first else len(shape) - 1


def leading_tokens(tokens: int, prefix: int) -> int | None:
    """Counts the class and register tokens at the beginning of ``tokens``: ``prefix``, or 0 without them.

    The others are a square grid. None if both or neither would be.
    """
    with_them, without = (n > 0 and math.isqrt(n) ** 2 == n for n in (tokens - prefix, tokens))
    if not prefix:
        return 0
    return None if with_them == without else prefix if with_them else 0


def pretrained_backbone(backbone: Backbone) -> Backbone:
    """Builds another backbone of the same specification, with the pretrained weights.

    Raises:
        WeightsError: they cannot be found or read.
    """
    with torch.random.fork_rng(devices=[]):  # its random start is discarded and must not change later draws
        other = Backbone(backbone.spec)
    other.load_pretrained()
    return other


def blocks_of(backbone: Backbone) -> list[list[nn.Parameter]]:
    """Returns the backbone's parameters, block by block from the input to the embedding.

    A block is a child of the network, or an entry of a sequential child; layers without a kernel, such as
    norms, belong to the block before them.
    """
    sequences = tuple(
        f"{name}."
        for name, child in backbone.net.named_children()
        if isinstance(child, (nn.Sequential, nn.ModuleList))
    )
    by_name: dict[str, list[nn.Parameter]] = {}
    for name, parameter in backbone.net.named_parameters():
        depth = 2 if name.startswith(sequences) else min(1, name.count("."))
        by_name.setdefault(".".join(name.split(".")[:depth]), []).append(parameter)
    loose = by_name.pop("", [])  # the network's own, such as a transformer's positions: they go in first
    blocks: list[list[nn.Parameter]] = []
    for parameters in by_name.values():
        if blocks and not any(parameter.ndim > 1 for parameter in parameters):
            blocks[-1] += parameters
        else:
            blocks.append(list(parameters))
    blocks[0] += loose
    return blocks


def copy_up_to(backbone: Backbone, block: str) -> None:
    """Copies the pretrained weights and statistics up to and including a block.

    Raises:
        UsageError: no such block.
        WeightsError: the pretrained weights cannot be found or read.
    """
    keys = keys_up_to(backbone, block)
    pretrained = pretrained_backbone(backbone)
    copy_normalisation(pretrained, backbone)
    weights, state = pretrained.net.state_dict(), backbone.net.state_dict()
    for key in keys:
        state[key].copy_(weights[key])


def copy_normalisation(source: Backbone, target: Backbone) -> None:
    """Copies normalisation, lineage and record to a backbone with weights from another."""
    target.lineage, target.record = source.lineage, source.record
    target.mean.copy_(source.mean)
    target.std.copy_(source.std)


def keep_statistics_up_to(backbone: Backbone, block: str) -> None:
    """Puts the batch norms up to and including a block into evaluation mode."""
    keys = set(keys_up_to(backbone, block))
    for name, module in backbone.net.named_modules():
        if f"{name}.running_mean" in keys:
            module.eval()


def keys_up_to(backbone: Backbone, block: str) -> tuple[str, ...]:
    """Names the state of ``backbone.net`` from the input up to and including a block.

    The order is the network's order of declaration, in timm also of execution.

    Raises:
        UsageError: no such block with weights.
    """
    keys = list(backbone.net.state_dict())
    inside = [index for index, key in enumerate(keys) if key.startswith(f"{block}.")]
    if not inside:
        blocks = dict.fromkeys(".".join(key.split(".")[:2][: key.count(".")]) for key in keys if "." in key)
        raise UsageError(
            f"{backbone.spec.name} has no block {block!r} with weights; it has {', '.join(blocks)}"
        )
    return tuple(keys[: inside[-1] + 1])


def narrow_above(backbone: Backbone, block: str, width: float) -> None:
    """Gives everything above a block fewer channels and fresh random weights, in place.

    A tile passes through and each layer above the block is rebuilt in turn: it takes the arriving channels
    and gives ``width`` times as many as before. Kernels are drawn as by He et al. 2015 (normal, by fan-out).

    Args:
        backbone: made of convolutions, batch or layer norms and linear layers above the block.
        block: name of a module of ``backbone.net``.
        width: share of the channels to keep, above 0 and up to 1.

    Raises:
        UsageError: no such block, or the network cannot be narrowed above it.
    """
    below = set(keys_up_to(backbone, block))
    hooks = []
    for name, module in backbone.net.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if not own or f"{name}.{own[0]}" in below:
            continue
        if not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Linear)):
            raise UsageError(
                f"{backbone.spec.name} cannot be narrowed above {block!r}: {name} is a "
                f"{type(module).__name__}; choose a network of convolutions"
            )

        def rebuild(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _rebuild(module, inputs[0], width)

        hooks.append(module.register_forward_pre_hook(rebuild))
    training = [module for module in backbone.modules() if module.training]
    tile = torch.zeros(1, backbone.mean.shape[1], _TRIAL_SIZE_PX, _TRIAL_SIZE_PX, dtype=torch.uint8)
    try:
        with torch.no_grad():
            embedding = backbone.eval()(tile)
    except RuntimeError as error:
        raise UsageError(
            f"{backbone.spec.name} cannot be narrowed above {block!r}: what follows adds to its output "
            "or keeps its channels; choose a block after which their number changes"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    backbone.num_features = embedding.shape[1]
    backbone.description += f", above {block} {width:g} times as wide"
    if backbone.channels_last:
        backbone.net.to(memory_format=torch.channels_last)


def _rebuild(module: nn.Module, arriving: Tensor, width: float) -> None:
    if isinstance(module, nn.Conv2d):
        channels, depthwise = arriving.shape[1], module.groups == module.in_channels > 1
        if not depthwise and module.groups > 1:
            raise UsageError("grouped convolutions cannot be narrowed; choose another network")
        kept = channels if depthwise else _narrowed(module.out_channels, width)
        module.groups = channels if depthwise else 1
        module.in_channels, module.out_channels = channels, kept
        _fill(module, (kept, channels // module.groups, *module.kernel_size))
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = arriving.shape[-1], _narrowed(module.out_features, width)
        _fill(module, (module.out_features, module.in_features))
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = channels = arriving.shape[1]
        module.running_mean, module.running_var = torch.zeros(channels), torch.ones(channels)
        _reset_scale(module, channels)
    elif isinstance(module, nn.LayerNorm):
        # timm's norm of images has channels on axis 1, the plain one on the last
        channels = arriving.shape[1 if type(module) is not nn.LayerNorm and arriving.ndim == 4 else -1]
        module.normalized_shape = (channels,)
        _reset_scale(module, channels)


def _narrowed(channels: int, width: float) -> int:
    return max(1, round(width * channels))


def _fill(module: nn.Conv2d | nn.Linear, shape: Sequence[int]) -> None:
    fan_out = math.prod(shape[2:]) * shape[0] / (module.groups if isinstance(module, nn.Conv2d) else 1)
    module.weight = nn.Parameter(torch.randn(*shape) * math.sqrt(2 / fan_out))
    if module.bias is not None:
        module.bias = nn.Parameter(torch.zeros(shape[0]))


def _reset_scale(module: nn.Module, channels: int) -> None:
    for name, value in (("weight", torch.ones(channels)), ("bias", torch.zeros(channels))):
        if getattr(module, name) is not None:
            setattr(module, name, nn.Parameter(value))
