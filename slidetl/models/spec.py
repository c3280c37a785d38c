"""Specification of a backbone; loads no torch, so that the help of commands answers at once."""

from dataclasses import dataclass, field

from slidetl.errors import UsageError, WeightsError


@dataclass(frozen=True)
class BackboneSpec:
    """The network that embeds a tile, and the weights that count as its pretrained ones.

    Attributes:
        name: a model that timm knows, e.g. ``resnet18``; one of timm's form on the Hugging Face hub,
            ``hf-hub:OWNER/MODEL``, or in a folder, ``local-dir:FOLDER`` (``config.json`` and weights); or one
            of the CBR family, e.g. ``cbr_tiny`` (:class:`~slidetl.models.cbr.CBR`).
        pretrained: ``procedural`` (bundled, no network needed); ``imagenet`` or ``hub``, both for the weights
            published under the name, downloaded where they are not on this machine; ``zoo://NAME``, a model
            that ``slidetl zoo pull`` brought here; or the path of a ``.safetensors`` or ``.pth`` file.
            Whether a training starts from them is the transfer strategy's choice.
        channels_last: keep tiles and kernels in that memory layout; faster for most convolutional
            networks, on a CPU too.
        in_channels: channels that the network takes, 1 to 4. Weights made for three are adapted: their sum
            over the channels for one, else repeated in order and scaled by ``3 / in_channels``. A network of
            one channel sees the luma of RGB tiles; two and four are for tiles that have as many, which
            those of a cache have not.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: less
            memory, about a third more time. Batch norm in training mode then counts a batch twice in its
            running statistics.
        gated_mlp: the transformer's feed-forward layers are gated (SwiGLU, packed), as those of UNI2-h,
            Virchow and Virchow2 are. A configuration on the hub cannot say so.
        layer_scale: the transformer's blocks scale their outputs by learned factors, as those of UNI and
            H-optimus are. To be set where weights are refused for their ``ls1.gamma``: the configuration on
            the hub may leave it out.
    """

    name: str = field(default="mobilenetv3_small_050", metadata={"option": "backbone"})
    pretrained: str = "procedural"
    channels_last: bool = True
    in_channels: int = 3
    gradient_checkpointing: bool = field(default=False, metadata={"option": ""})  # of trainings alone
    gated_mlp: bool = False
    layer_scale: bool = False

    def __post_init__(self) -> None:
        if not self.name or not self.pretrained:
            raise WeightsError(
                f"backbone needs a name and pretrained weights, not {self.name!r}, {self.pretrained!r}"
            )
        if not 1 <= self.in_channels <= 4:
            raise UsageError(f"backbone.in_channels must be 1 to 4, not {self.in_channels}")
