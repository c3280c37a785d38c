"""Networks for volumes: a small one of 3-D convolutions, and 2-D networks of timm with a third axis."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from slidetl.errors import UsageError, WeightsError

_TRIAL_PX, _TRIAL_DEPTH = 32, 17


def unit_window(hu: Tensor, low: float, high: float) -> Tensor:
    """Maps Hounsfield units to 0..1: ``low`` and below to 0, ``high`` and above to 1."""
    return ((hu.to(torch.float32) - low) / (high - low)).clamp(0.0, 1.0)


class Conv3dNetwork(nn.Module):
    """Five 3-D convolutions, each with batch norm, ReLU and a max-pool; the last map is the embedding.

    The network of the talk that inspired this project (Owkin, 2017): a patch of 64 voxels ends as 2 x 2 x 2
    positions of 64 channels, 512 features. The talk does not give the other channels: here an
    eighth, a quarter and a half of the last ones, then all. Departure: patches of another size end as
    2 x 2 x 2 positions by an adaptive mean.

    Args:
        name: ``conv3d_W`` with W channels at the end, a multiple of 8, e.g. ``conv3d_64``.

    Attributes:
        in_channels: 1, since volumes are grey.
        head_hidden_size, pretrained_cfg, feature_info: as timm's networks give them.

    Raises:
        WeightsError: the name has no such width from 8 to 1,024.
    """

    in_channels = 1

    def __init__(self, name: str) -> None:
        super().__init__()
        found = re.fullmatch(r"conv3d_(\d{1,4})", name)
        width = int(found[1]) if found else 0
        if width % 8 or not 8 <= width <= 1024:
            raise WeightsError(
                f"backbone {name!r}: expected the channels at the end, a multiple of 8, e.g. conv3d_64"
            )
        channels = (1, width // 8, width // 4, width // 2, width, width)
        layers = []
        for fan_in, fan_out in itertools.pairwise(channels):
            convolution = nn.Conv3d(fan_in, fan_out, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers.append(
                nn.Sequential(
                    convolution,
                    nn.BatchNorm3d(fan_out),
                    nn.ReLU(inplace=True),
                    nn.MaxPool3d(2, ceil_mode=True),
                )
            )
        self.layers = nn.Sequential(*layers)
        self.last = nn.AdaptiveAvgPool3d(2)
        self.head_hidden_size = 8 * width
        self.feature_info = [{"module": f"layers.{n}", "num_chs": of} for n, of in enumerate(channels[1:])]
        self.pretrained_cfg = {
            "mean": (0.5,),
            "std": (0.5,),
            "input_size": (1, 64, 64, 64),
            "first_conv": "layers.0.0",
            "classifier": (),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Embeds normalised patches ``[N, 1, D, H, W]`` as ``[N, 8 W]``."""
        embeddings: Tensor = self.last(self.layers(x)).flatten(1)
        return embeddings


class InflatedConv(nn.Conv3d):
    """A 2-D convolution with a third axis; starts from the inflated kernel of the 2-D one.

    Depth has the kernel, stride and dilation of the rows. In the plane the border is padded as before; in
    depth the outermost slice is repeated, so a volume that is constant in depth stays so.
    """

    def __init__(self, plane: nn.Conv2d) -> None:
        kernel, stride, dilation = plane.kernel_size, plane.stride, plane.dilation
        super().__init__(
            plane.in_channels,
            plane.out_channels,
            (kernel[0], kernel[0], kernel[1]),
            (stride[0], stride[0], stride[1]),
            0,
            (dilation[0], dilation[0], dilation[1]),
            plane.groups,
            plane.bias is not None,
        )
        # As TensorFlow pads: by the size of the input (timm's Conv2dSame).
        self.pads_same = type(plane).__name__ == "Conv2dSame"
        padding = (0, 0) if isinstance(plane.padding, str) else plane.padding
        self.pads = (padding[0], padding[0], padding[1])
        self.to(plane.weight)
        with torch.no_grad():
            self.weight.copy_(inflate_kernel(plane.weight))
            if self.bias is not None and plane.bias is not None:
                self.bias.copy_(plane.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolves ``[N, C, D, H, W]``."""
        depth = self._pad(input.shape[2], 0)
        rows, columns = self._pad(input.shape[3], 1), self._pad(input.shape[4], 2)
        x = nn.functional.pad(input, [columns[0], columns[1], rows[0], rows[1], 0, 0])
        if depth[0] + depth[1] > 0:
            first, last = x[:, :, :1], x[:, :, -1:]
            parts = [first.expand(-1, -1, depth[0], -1, -1), x, last.expand(-1, -1, depth[1], -1, -1)]
            x = torch.cat(parts, 2)
        return nn.functional.conv3d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _pad(self, size: int, axis: int) -> tuple[int, int]:
        """Returns the padding before and after an axis."""
        if not self.pads_same:
            return self.pads[axis], self.pads[axis]
        stride = self.stride[axis]
        reach = (-(-size // stride) - 1) * stride + (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
        missing = max(reach - size, 0)
        return missing // 2, missing - missing // 2


class InflatedNormAct(nn.BatchNorm3d):
    """Batch norm, then an activation, under the names of timm's ``BatchNormAct2d``."""

    def __init__(self, plane: nn.BatchNorm2d) -> None:
        super().__init__(plane.num_features, plane.eps, plane.momentum)
        self.to(plane.weight)
        self.load_state_dict(plane.state_dict())
        self.drop, self.act = plane.get_submodule("drop"), plane.get_submodule("act")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``[N, C, D, H, W]`` as timm's does ``[N, C, H, W]``."""
        tracks = self.track_running_stats or not self.training
        x = nn.functional.batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.1,
            self.eps,
        )
        activated: Tensor = self.act(self.drop(x))
        return activated


def inflate_kernel(kernel: Tensor) -> Tensor:
    """Repeats a kernel ``[O, I, h, w]`` along depth and divides by it: ``[O, I, h, h, w]``."""
    depth = kernel.shape[2]
    return kernel.unsqueeze(2).repeat(1, 1, depth, 1, 1) / depth


def inflate(network: nn.Module, in_channels: int, name: str) -> nn.Module:
    """Gives a 2-D network of timm a third axis.

    Carreira and Zisserman, "Quo vadis, action recognition?", CVPR 2017, section 2.3.2: each kernel is
    repeated along depth and divided by it. A volume that is constant in depth then has, at every depth, the
    activations that its slice has in the 2-D network, up to rounding; the departure is the padding in depth
    (:class:`InflatedConv`), which zeros would break at the first and last slices. Convolutions, their
    batch norms, and max, mean and global pools change; other layers are kept, and a trial on such a volume
    refuses a network with any that mixes positions by itself, such as attention or squeeze-and-excitation.

    Args:
        network: in any mode; changed in place, and returned with fresh random kernels of three dimensions.
        in_channels: of its input.
        name: for messages.

    Raises:
        UsageError: the network cannot be inflated.
    """
    has_values = not next(network.parameters()).is_meta
    training = network.training
    shape = (1, in_channels, _TRIAL_PX, _TRIAL_PX)
    plane = torch.linspace(-9, 9, math.prod(shape), dtype=torch.float64).square().sin().view(shape)
    with torch.no_grad():
        # In double precision: a gate of a fresh network differs in the fourth digit alone.
        expected = network.double().eval()(plane) if has_values else None
        _replace_layers(network)
        network.eval()
        try:
            found = network(plane.unsqueeze(2).repeat(1, 1, _TRIAL_DEPTH, 1, 1)) if has_values else None
        except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise _refused(name) from error
    if expected is not None and found is not None:
        near = 1e-9 * float(expected.abs().max())
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=near):
            raise _refused(name)
    for module in network.modules():
        if isinstance(module, InflatedConv) and has_values:
            fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))  # as of the 2-D one, He et al. 2015
    return network.float().train(training)


def _refused(name: str) -> UsageError:
    return UsageError(
        f"{name} cannot be inflated: not only convolutions, batch norms and pools mix its positions; take "
        "another, such as inflated_resnet18 or inflated_tf_efficientnet_lite0"
    )


def _replace_layers(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            made: nn.Module | None = None
            if isinstance(layer, nn.Conv2d):
                made = InflatedConv(layer)
            elif type(layer) is nn.BatchNorm2d:
                # The same, but for a check of the number of axes.
                layer.__class__ = nn.BatchNorm3d  # type: ignore[assignment] # on purpose
            elif isinstance(layer, nn.BatchNorm2d) and type(layer).__name__ == "BatchNormAct2d":
                made = InflatedNormAct(layer)
            elif isinstance(layer, nn.MaxPool2d):
                size, stride, padding = map(_with_depth, (layer.kernel_size, layer.stride, layer.padding))
                dilation = _with_depth(layer.dilation)
                made = nn.MaxPool3d(size, stride, padding, dilation, ceil_mode=layer.ceil_mode)
            elif isinstance(layer, nn.AvgPool2d):
                size, stride, padding = map(_with_depth, (layer.kernel_size, layer.stride, layer.padding))
                made = nn.AvgPool3d(size, stride, padding, layer.ceil_mode, layer.count_include_pad)
            elif isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)):
                made = nn.AdaptiveAvgPool3d(1)
            if made is not None:
                setattr(parent, name, made)


def _with_depth(size: Any) -> tuple[int, int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, rows, columns
