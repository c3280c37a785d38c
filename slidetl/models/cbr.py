"""The CBR family: small plain convolutional networks, as a baseline for large ones.

Raghu et al., "Transfusion: Understanding Transfer Learning for Medical Imaging", NeurIPS 2019, appendix.
"""

import re

from torch import Tensor, nn

from slidetl.errors import WeightsError

# Side of the kernels, channels of the layers, and True if a pool follows the last layer too; by the authors'
# text only the tallest has none. Their text and their parameter count give the tiny network different
# channels: `cbr_tiny` follows the text, `cbr_tiny_published` the count, with the channels of the small one.
_LAYOUTS: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "cbr_larget": (7, (32, 64, 128, 256, 512), False),
    "cbr_largew": (7, (64, 128, 256, 512), True),
    "cbr_small": (7, (32, 64, 128, 256), True),
    "cbr_tiny": (5, (64, 128, 256, 512), True),
    "cbr_tiny_published": (5, (32, 64, 128, 256), True),
}
CBR_NAMES = tuple(_LAYOUTS)
_VARIANT = re.compile(rf"({'|'.join(sorted(_LAYOUTS, key=len, reverse=True))})(_elu)?(_nobn)?")


class CBR(nn.Module):
    """Convolution, batch norm and ReLU, several times, with max-pools between; then the mean over the tile.

    Convolutions have stride 1, pools a window of 3 and stride 2. The authors do not say how the border is
    padded; here it keeps the size (convolutions) or half of it, rounded up (pools). Kernels start as He et
    al. (2015) propose, so that the variants without batch norm train too.

    Args:
        name: one of :data:`CBR_NAMES`, then ``_elu`` for ELU instead of ReLU, then ``_nobn`` for no batch
            norm (the convolutions then have biases), e.g. ``cbr_tiny_elu_nobn``.
        in_channels: channels of the input.

    Attributes:
        num_features: length D of an embedding; ``head_hidden_size`` is timm's name for it.
        pretrained_cfg: mean, std and the first layer's name, as timm's networks give them.
        feature_info: the layers' names and numbers of channels, likewise.

    Raises:
        WeightsError: no such variant.
    """

    def __init__(self, name: str, in_channels: int = 3) -> None:
        super().__init__()
        parts = _VARIANT.fullmatch(name)
        if parts is None:
            raise WeightsError(
                f"no CBR network is called {name!r}; expected one of {', '.join(CBR_NAMES)}, "
                "then _elu, _nobn, _elu_nobn or nothing"
            )
        kernel_size, channels, pool_last = _LAYOUTS[parts[1]]
        has_elu, has_norm = parts[2] is not None, parts[3] is None
        layers = []
        for number, (fan_in, fan_out) in enumerate(zip((in_channels, *channels), channels, strict=False)):
            convolution = nn.Conv2d(fan_in, fan_out, kernel_size, padding=kernel_size // 2, bias=not has_norm)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
            layer: list[nn.Module] = [convolution]
            if has_norm:
                layer.append(nn.BatchNorm2d(fan_out))
            layer.append(nn.ELU(inplace=True) if has_elu else nn.ReLU(inplace=True))
            if pool_last or number < len(channels) - 1:
                layer.append(nn.MaxPool2d(3, stride=2, padding=1))
            layers.append(nn.Sequential(*layer))
        self.layers = nn.Sequential(*layers)
        self.num_features = self.head_hidden_size = channels[-1]
        self.feature_info = [
            {"module": f"layers.{number}", "num_chs": width} for number, width in enumerate(channels)
        ]
        self.pretrained_cfg = {
            "mean": (0.485, 0.456, 0.406),  # of ImageNet, as a start; weights of a file may bring others
            "std": (0.229, 0.224, 0.225),
            "input_size": (3, 224, 224),
            "first_conv": "layers.0.0",
            "classifier": (),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Embeds normalised tiles ``[N, C, H, W]`` as ``[N, D]``."""
        features: Tensor = self.layers(x)
        return features.mean((2, 3))
