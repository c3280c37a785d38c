"""Weights of DINOv2 in the form of Hugging Face's transformers, under the names of timm."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from slidetl.errors import WeightsError

# Names in published files; the class of a task puts a prefix before them.
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_INSIDE = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",  # SwiGLU: gates, then values, as in timm's packed form
    "mlp.weights_out": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias|lambda1)")
_QKV = re.compile(r"attention\.attention\.(query|key|value)")
_UNUSED = "embeddings.mask_token"  # of the pre-training alone


def is_dinov2(state: Mapping[str, Tensor]) -> bool:
    """Tells if names are those of a DINOv2 of transformers, with or without register tokens."""
    return "embeddings.patch_embeddings.projection.weight" in _without_prefix(state) and any(
        _LAYER.fullmatch(key) and ".layer_scale1." in key for key in _without_prefix(state)
    )


def convert_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the weights of a DINOv2 of transformers to timm's ``VisionTransformer``.

    Queries, keys and values become one layer. With register tokens, timm has no position for the class
    token: it is added to the token, which every image shares.

    Raises:
        WeightsError: a name is not of DINOv2, or a layer lacks a part.
    """
    found: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in _without_prefix(state).items():
        layer = _LAYER.fullmatch(key)
        if key in _OUTSIDE:
            found[_OUTSIDE[key]] = value
        elif layer and (part := _QKV.fullmatch(layer[2])):
            attention.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[part[1]] = value
        elif layer and layer[2] in _INSIDE:
            found[f"blocks.{layer[1]}.{_INSIDE[layer[2]]}.{layer[3].replace('lambda1', 'gamma')}"] = value
        elif key != _UNUSED:
            raise WeightsError(f"{key!r} is no weight of a DINOv2 of transformers; convert the file to timm")
    for key, three in attention.items():
        if three.keys() != {"query", "key", "value"}:
            raise WeightsError(f"{key}: expected query, key and value, found {', '.join(sorted(three))}")
        found[key] = torch.cat([three["query"], three["key"], three["value"]])
    if "reg_token" in found:
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:].contiguous()
    return found


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops the prefix of the class of a task, and its classifier."""
    prefixes = {
        key.removesuffix("embeddings.cls_token") for key in state if key.endswith("embeddings.cls_token")
    }
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
