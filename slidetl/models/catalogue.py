"""Lists backbones with their size and the place of their weights."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from slidetl.errors import SlidetlError
from slidetl.models.backbones import Backbone, local_weights
from slidetl.models.cbr import CBR_NAMES
from slidetl.models.packaged import PACKAGED, packaged_weights
from slidetl.models.presets import PRESETS, Preset, preset_of
from slidetl.models.spec import INFLATED, BackboneSpec

# A choice from small to large, pathology models published in timm's form, and networks for volumes.
RECOMMENDED = (
    "mobilenetv2_100",
    "resnet18",
    "resnet50",
    "inception_v3",
    "convnext_tiny",
    "vit_small_patch16_224",
    "hf-hub:MahmoodLab/UNI",
    "hf-hub:prov-gigapath/prov-gigapath",
    "hf-hub:bioptimus/H-optimus-0",
    "conv3d_64",
    "inflated_tf_efficientnet_lite0",
    "inflated_resnet18",
)
# Counting parameters builds the network on the meta device: about 50 ms each.
MOST_COUNTED = 40


@dataclass(frozen=True)
class BackboneEntry:
    """An entry of the list.

    Attributes:
        name: for :class:`~slidetl.models.spec.BackboneSpec`.
        parameters: number without a classifier; None if not counted.
        features: length D of an embedding, likewise.
        input_size_px: side of the tiles in its pretraining, likewise.
        weights: ``installed`` with slidetl, the path of a file on this machine, ``download`` or ``none``.
    """

    name: str
    parameters: int | None
    features: int | None
    input_size_px: int | None
    weights: str


def list_backbones(pattern: str | None = None) -> list[BackboneEntry]:
    """Lists backbones; opens no connection.

    Args:
        pattern: part of a name, or a name with ``*`` and ``?``, of models of timm and the CBR family. None
            lists the CBR family, models with weights on this machine, and recommended ones.

    Returns:
        Entries, counted up to :data:`MOST_COUNTED`.
    """
    import timm

    if pattern is None:
        names = [PACKAGED, *CBR_NAMES, *RECOMMENDED, *with_local_weights()]
    else:
        glob = pattern if set("*?[") & set(pattern) else f"*{pattern}*"
        names = [*fnmatch.filter([*CBR_NAMES, *RECOMMENDED], glob), *timm.list_models(glob)]
    names = list(dict.fromkeys(names))
    return [_entry(name, number < MOST_COUNTED) for number, name in enumerate(names)]


def list_presets(pattern: str | None = None) -> list[tuple[Preset, BackboneEntry]]:
    """Lists published pathology backbones with the place of their weights; opens no connection.

    Args:
        pattern: part of a preset's key, or a key with ``*`` and ``?``; None for all.
    """
    glob = pattern or "*"
    glob = glob if set("*?[") & set(glob) else f"*{glob}*"
    chosen = [preset for preset in PRESETS if fnmatch.fnmatch(preset.key, glob.lower())]
    return [(preset, _entry(preset.name, True)) for preset in chosen]


def with_local_weights() -> list[str]:
    """Lists the models with published weights on this machine; opens no connection."""
    import timm
    from huggingface_hub import constants

    published = [name for name in timm.list_models(pretrained=True) if local_weights(name)]
    default = {name: name.partition(".")[0] for name in published}
    # Without its tag if it is the default: shorter, and the same weights.
    names = [
        short if local_weights(short) == local_weights(name) else name for name, short in default.items()
    ]
    # Models in timm's form in the Hugging Face cache, published by others.
    for config in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")):
        owner, _, model = config.parents[2].name.removeprefix("models--").partition("--")
        name = f"hf-hub:{owner}/{model}"
        is_timm = "architecture" in json.loads(config.read_text(encoding="utf-8"))
        if owner != "timm" and is_timm and local_weights(name):
            names.append(name)
    return names


def _entry(name: str, is_counted: bool) -> BackboneEntry:
    import timm

    plane = name.removeprefix(INFLATED)  # its weights are those of the 2-D network
    path = None if name in CBR_NAMES else local_weights(plane)
    if path is not None and path == packaged_weights(plane):
        weights = "installed"
    elif path is not None:
        weights = str(path)
    elif name in CBR_NAMES or (":" not in name and not timm.is_model_pretrained(plane)):
        weights = "none"
    else:
        weights = "download"
    preset = preset_of(name)
    needs_a_connection = name.startswith("hf-hub:") and path is None and not (preset and preset.configuration)
    if not is_counted or needs_a_connection:
        return BackboneEntry(name, None, None, None, weights)
    try:
        with torch.device("meta"):
            backbone = Backbone(BackboneSpec(preset=preset.key) if preset else BackboneSpec(name))
    except SlidetlError:  # a cached configuration is damaged, or needs gated_mlp
        return BackboneEntry(name, None, None, None, weights)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    config = backbone.net.pretrained_cfg
    side: int = config["input_size"][-1]  # type: ignore[index, assignment] # timm is untyped
    return BackboneEntry(name, parameters, backbone.num_features, side, weights)
