"""Specification of a backbone; imports no torch, to keep the help of commands fast."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from slidetl.errors import UsageError, WeightsError
from slidetl.models.presets import Pooling, find_preset

__all__ = ["BackboneSpec", "Pooling", "with_preset"]

# Names of the weights published for a network by timm or on the Hugging Face hub.
PUBLISHED = ("imagenet", "hub")

# Prefixes of networks for volumes.
CONV3D, INFLATED = "conv3d_", "inflated_"


@dataclass(frozen=True)
class BackboneSpec:
    """The network to embed a tile, and its pretrained weights.

    Attributes:
        name: a model of timm, e.g. ``resnet18``; one in timm's form on the Hugging Face hub,
            ``hf-hub:OWNER/MODEL``, or in a folder, ``local-dir:FOLDER`` (``config.json`` and weights); or one
            of the CBR family, e.g. ``cbr_tiny`` (:class:`~slidetl.models.cbr.CBR`); or ``stored_D``, which
            stands for stored features of length D whose network is not here, as imported ones. For volumes
            ``conv3d_64`` (:class:`~slidetl.models.volumes.Conv3dNetwork`), or a convolutional network of timm
            with a third axis, e.g. ``inflated_resnet18`` (:func:`~slidetl.models.volumes.inflate`).
        pretrained: ``imagenet`` or ``hub``, both for the weights published under the name, downloaded unless
            they are on this machine, as those of ``tf_efficientnet_lite0`` are, which install with slidetl;
            ``zoo://NAME``, a model from ``slidetl zoo pull``; or the path of a ``.safetensors`` or ``.pth``
            file, or of a checkpoint of ``slidetl fit``, for the backbone in it, whose patients are then kept
            out of the test. An inflated network takes weights of its 2-D network, or its own. The transfer
            strategy decides if a training starts from them.
        channels_last: use channels-last memory layout for tiles and kernels; faster for most convolutional
            networks, on a CPU too.
        in_channels: channels of the network's input, 1 to 4. Weights made for three are adapted: their sum
            over the channels for one, else repeated in order and scaled by ``3 / in_channels``. A network of
            one channel sees the luma of RGB tiles; two and four need tiles of as many, not from a cache. In
            each channel an inflated network sees the grey value of the volume, with the channel's own mean
            and standard deviation; ``conv3d_W`` always has one.
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
        preset: a published pathology backbone, e.g. ``uni2-h``; ``slidetl backbones --pathology`` lists them.
            It stands for ``name``, ``pretrained``, ``gated_mlp``, ``layer_scale`` and ``pooling``; of these,
            ``pretrained`` (a file, without a connection) and ``pooling`` may be given beside it. Empty once
            these fields are set.
    """

    name: str = field(default="tf_efficientnet_lite0", metadata={"option": "backbone"})
    pretrained: str = "imagenet"
    channels_last: bool = True
    in_channels: int = 3
    gradient_checkpointing: bool = field(default=False, metadata={"option": ""})  # of trainings alone
    gated_mlp: bool = False
    layer_scale: bool = False
    pooling: Pooling = "default"
    preset: str = ""

    def __post_init__(self) -> None:
        if self.preset:
            self._expand()
        if not self.name or not self.pretrained:
            raise WeightsError(
                f"backbone needs a name and pretrained weights, not {self.name!r}, {self.pretrained!r}"
            )
        if not 1 <= self.in_channels <= 4:
            raise UsageError(f"backbone.in_channels must be 1 to 4, not {self.in_channels}")

    @property
    def takes_volumes(self) -> bool:
        """True for a network of volumes, False for one of tiles."""
        return self.name.startswith((CONV3D, INFLATED))

    @property
    def in_plane(self) -> Self:
        """The specification of the 2-D network behind an inflated one, else this one."""
        return replace(self, name=self.name.removeprefix(INFLATED))

    def _expand(self) -> None:
        """Replaces the preset by the fields that it stands for."""
        usual = {entry.name: entry.default for entry in fields(self)}
        for key, value in find_preset(self.preset).fields.items():
            given = getattr(self, key)
            if given == usual[key]:
                object.__setattr__(self, key, value)
            elif given != value and key not in ("pretrained", "pooling"):
                raise UsageError(
                    f"backbone.preset {self.preset} has {key} {value}, not {given}; give one of them"
                )
        object.__setattr__(self, "preset", "")


def with_preset(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the preset in the fields of a :class:`BackboneSpec` by what it stands for, for the record.

    Raises:
        UsageError: there is no such preset, or another field contradicts it.
    """
    if not backbone.get("preset"):
        return dict(backbone)
    known = {entry.name for entry in fields(BackboneSpec)}
    expanded = BackboneSpec(**{key: value for key, value in backbone.items() if key in known})
    return {**backbone, **asdict(expanded)}
