"""Conversion of DINOv2 weights, compared with transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from slidetl.errors import WeightsError
from slidetl.models.backbones import Backbone, without_downloads
from slidetl.models.spec import BackboneSpec

SIDE = 56


def config(of: type[Any], **more: Any) -> Any:
    return of(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        layerscale_value=0.7,
        initializer_range=0.3,
        **more,
    )


def ours(weights: Path, registers: int, mlp_ratio: float, gated: bool) -> Backbone:
    arguments = {
        "img_size": SIDE,
        "patch_size": 14,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": mlp_ratio,
        "reg_tokens": registers,
        "no_embed_class": registers > 0,
    }
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "head", "first_conv": "patch_embed.proj"}
    architecture = {"architecture": "vit_small_patch16_224", "model_args": arguments, "pretrained_cfg": about}
    spec = BackboneSpec(
        "hf-hub:lab/dinov2", str(weights), layer_scale=True, gated_mlp=gated, pooling="token+mean"
    )
    with without_downloads({"architecture": architecture}):
        backbone = Backbone(spec).eval()
        backbone.load_pretrained()
    return backbone


@pytest.mark.parametrize(("registers", "gated"), [(0, False), (0, True), (4, True)])
def test_it_embeds_as_transformers_does(registers: int, gated: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = (
        Dinov2WithRegistersModel(
            config(Dinov2WithRegistersConfig, num_register_tokens=registers, use_swiglu_ffn=gated)
        )
        if registers
        else Dinov2Model(config(Dinov2Config, use_swiglu_ffn=gated))
    ).eval()
    model.save_pretrained(tmp_path)
    # Two thirds of 4 x 64, to a multiple of 8: 176 gates and as many values.
    backbone = ours(tmp_path / "model.safetensors", registers, 2 * 176 / 64 if gated else 4.0, gated)
    tiles = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.inference_mode():
        tokens = model((tiles / 255 - 0.5) / 0.5).last_hidden_state
        expected = torch.cat([tokens[:, 0], tokens[:, 1 + registers :].mean(1)], 1)
        assert expected.std() > 0.1
        torch.testing.assert_close(backbone(tiles), expected, atol=1e-5, rtol=0)


def test_a_prefix_is_dropped_and_what_is_no_dinov2_is_one_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = Dinov2ForImageClassification(config(Dinov2Config, num_labels=3))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert ours(path, 0, 4.0, False).lineage
    state = load_file(path)
    save_file({**state, "dinov2.encoder.layer.0.adapter.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"'encoder.layer.0.adapter.weight' is no weight of a DINOv2"):
        ours(path, 0, 4.0, False)
    del state["dinov2.encoder.layer.1.attention.attention.key.bias"]
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"blocks.1.attn.qkv.bias: expected query, key and value, found"):
        ours(path, 0, 4.0, False)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        WeightsError, match=r"expected the model.safetensors of these weights of transformers"
    ):
        ours(tmp_path / "pytorch_model.bin", 0, 4.0, False)
