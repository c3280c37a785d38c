from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from slidetl.errors import UsageError, WeightsError
from slidetl.models.backbones import Backbone, read_pretrained, without_downloads
from slidetl.models.presets import HALVES, PRESETS, Preset, find_preset, preset_of, tile_warnings
from slidetl.models.spec import BackboneSpec, with_preset

# Their embeddings, as their authors or other toolkits state them.
FEATURES = {
    "uni": 1024,
    "uni2-h": 1536,
    "virchow": 2560,
    "virchow2": 2560,
    "h-optimus-0": 1536,
    "h-optimus-1": 1536,
    "h0-mini": 1536,
    "prov-gigapath": 1536,
    "kaiko-s16": 384,
    "kaiko-s8": 384,
    "kaiko-b16": 768,
    "kaiko-b8": 768,
    "kaiko-l14": 1024,
    "lunit-s8": 384,
    "phikon": 768,
    "ctranspath": 768,
    "gpfm": 1024,
    "prost40m": 384,
    "phikon-v2": 1024,
    "midnight": 3072,
    "hibou-b": 768,
    "hibou-l": 1024,
}


def shallow(preset: Preset) -> Backbone:
    """The network of a preset with two of its layers, built as a checkpoint's is."""
    configuration = replace(preset, normalisation=preset.normalisation or HALVES).configuration
    assert configuration is not None
    # timm's initialisation takes most of the time.
    small: dict[str, Any] = {"depth": 2, "weight_init": "skip"}
    if preset.architecture.startswith("swin"):
        small = {"depths": (1, 1, 1, 1)}
    configuration["model_args"].update(small)
    with without_downloads({"architecture": configuration}):
        return Backbone(BackboneSpec(preset=preset.key))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_every_preset_is_built_at_its_width_and_scripts_without_a_difference(preset: Preset) -> None:
    torch.manual_seed(0)
    backbone = shallow(preset).eval()
    with torch.no_grad():
        for name, parameter in backbone.net.named_parameters():
            if name.endswith((".gamma", "_token", "pos_embed")):  # too small to be seen
                parameter.fill_(0.5)
    mean, std = preset.normalisation or HALVES
    torch.testing.assert_close(backbone.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(backbone.std.flatten(), torch.tensor(std))
    tiles = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8)  # every patch divides it
    with torch.inference_mode():
        embedded = backbone(tiles)
        assert embedded.shape == (1, FEATURES[preset.key]) and embedded.isfinite().all()
        assert torch.equal(torch.jit.script(backbone)(tiles), embedded)


def test_presets_differ_in_key_and_place_and_have_sources() -> None:
    assert {preset.key for preset in PRESETS} == set(FEATURES)
    assert len({preset.name.lower() for preset in PRESETS}) == len(PRESETS)
    for preset in PRESETS:
        assert preset.sources and preset.name.startswith("hf-hub:")
        assert timm.is_model(preset.architecture)
        assert preset_of(preset.name.lower()) == preset == find_preset(preset.key.upper())
    with pytest.raises(UsageError, match=r"expected one of uni, uni2-h, .*, found 'uni3'"):
        find_preset("uni3")


def test_a_preset_stands_for_fields_that_are_recorded() -> None:
    spec = BackboneSpec(preset="virchow2", pretrained="virchow2.safetensors", channels_last=False)
    assert spec == BackboneSpec(
        "hf-hub:paige-ai/Virchow2",
        "virchow2.safetensors",
        channels_last=False,
        gated_mlp=True,
        layer_scale=True,
        pooling="token+mean",
    )
    assert BackboneSpec(preset="virchow2").pretrained == "hub"
    assert BackboneSpec(preset="virchow2", pooling="token").pooling == "token"
    assert with_preset({"preset": "uni2-h", "in_channels": 1}) == asdict(
        BackboneSpec(preset="uni2-h", in_channels=1)
    )
    assert with_preset({"name": "resnet18"}) == {"name": "resnet18"}
    with pytest.raises(UsageError, match="preset uni has name hf-hub:MahmoodLab/UNI, not resnet18"):
        BackboneSpec("resnet18", preset="uni")
    with pytest.raises(UsageError, match="preset uni has gated_mlp False, not True"):
        BackboneSpec(gated_mlp=True, preset="uni")


def test_weights_of_a_preset_come_from_the_cache_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = find_preset("gpfm")  # its file has a name of its own
    snapshot = tmp_path / "hf" / "models--majiabo--GPFM" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    state = {"cls_token": torch.ones(1, 1, 4), "head.weight": torch.ones(2)}
    torch.save(state, snapshot / preset.file)
    assert read_pretrained(BackboneSpec(preset="gpfm")).weights.keys() == state.keys()
    torch.save(state, tmp_path / "pytorch_model.bin")
    given = BackboneSpec(preset="gpfm", pretrained=str(tmp_path / "pytorch_model.bin"))
    assert read_pretrained(given).weights.keys() == state.keys()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="the published weights of 'hf-hub:MahmoodLab/UNI' could not be"):
        read_pretrained(BackboneSpec(preset="uni"))
    # Its normalisation is stated at the hub alone, and is not guessed.
    with pytest.raises(WeightsError, match="the configuration of 'hf-hub:waticlems/Prost40M' could not be"):
        Backbone(BackboneSpec(preset="prost40m"))


def test_tiles_unlike_those_of_the_training_are_named() -> None:
    name = find_preset("virchow2").name
    assert tile_warnings(name, 224, 0.52) == tile_warnings("resnet18", 96, 4.0) == []
    assert tile_warnings(name, 224, 4.0) == [
        "virchow2 was trained at 0.25 or 0.5 or 1 or 2 micrometres per pixel, these tiles have 4"
    ]
    assert tile_warnings(find_preset("kaiko-s8").name, 256, 4.0) == [
        "kaiko-s8 was trained on tiles of 224 px, these have 256"
    ]
