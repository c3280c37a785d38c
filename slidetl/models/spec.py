"""Specification of a backbone; imports no torch, to keep the help of commands fast."""

from dataclasses import dataclass, field
from typing import Literal

from slidetl.errors import UsageError, WeightsError

Pooling = Literal["default", "token", "mean", "token+mean"]


@dataclass(frozen=True)
class BackboneSpec:
    """The network to embed a tile, and its pretrained weights.

    Attributes:
        name: a model of timm, e.g. ``resnet18``; one in timm's form on the Hugging Face hub,
            ``hf-hub:OWNER/MODEL``, or in a folder, ``local-dir:FOLDER`` (``config.json`` and weights); or one
            of the CBR family, e.g. ``cbr_tiny`` (:class:`~slidetl.models.cbr.CBR`); or ``stored_D``, which
            stands for stored features of length D whose network is not here, as imported ones.
        pretrained: ``procedural`` (bundled, no network needed); ``imagenet`` or ``hub``, both for the weights
            published under the name, downloaded unless they are on this machine; ``zoo://NAME``, a model
            from ``slidetl zoo pull``; or the path of a ``.safetensors`` or ``.pth`` file. The transfer
            strategy decides if a training starts from them.
        channels_last: use channels-last memory layout for tiles and kernels; faster for most convolutional
            networks, on a CPU too.
        in_channels: channels of the network's input, 1 to 4. Weights made for three are adapted: their sum
            over the channels for one, else repeated in order and scaled by ``3 / in_channels``. A network of
            one channel sees the luma of RGB tiles; two and four need tiles of as many, not from a cache.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: less
            memory, about a third more time. Batch norm in training mode then counts a batch twice in its
            running statistics.
        gated_mlp: the transformer has gated feed-forward layers (SwiGLU, packed), as in UNI2-h, Virchow and
            Virchow2. A configuration on the hub cannot state it.
        layer_scale: the transformer's blocks scale their outputs by learned factors, as in UNI and H-optimus.
            Set it if weights are refused for their ``ls1.gamma``: a configuration on the hub may omit it.
        pooling: embedding of a transformer: its class token, the mean of its patch tokens, or both in this
            order, of twice the length, as for Virchow and H0-mini; register tokens do not count. ``default``
            leaves it to the network.
    """

    name: str = field(default="mobilenetv3_small_050", metadata={"option": "backbone"})
    pretrained: str = "procedural"
    channels_last: bool = True
    in_channels: int = 3
    gradient_checkpointing: bool = field(default=False, metadata={"option": ""})  # of trainings alone
    gated_mlp: bool = False
    layer_scale: bool = False
    pooling: Pooling = "default"

    def __post_init__(self) -> None:
        if not self.name or not self.pretrained:
            raise WeightsError(
                f"backbone needs a name and pretrained weights, not {self.name!r}, {self.pretrained!r}"
            )
        if not 1 <= self.in_channels <= 4:
            raise UsageError(f"backbone.in_channels must be 1 to 4, not {self.in_channels}")
