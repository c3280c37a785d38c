from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image

from slidetl.errors import WeightsError
from slidetl.models.backbones import BUNDLED, Backbone, BackboneSpec, find_weights, weights_sha256


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18"])
def test_embeds_uint8_tiles_with_the_normalisation_inside(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(name)).eval()
    tiles = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        embeddings = backbone(tiles)
        mean, std = (
            torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN),
            torch.tensor(timm.data.IMAGENET_DEFAULT_STD),
        )
        by_hand = backbone.net((tiles / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert embeddings.shape == (3, backbone.num_features)
    torch.testing.assert_close(embeddings, by_hand, atol=1e-4, rtol=1e-4)


def test_channels_last_changes_the_speed_alone() -> None:
    tiles = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    results = []
    for channels_last in (True, False):
        torch.manual_seed(0)
        with torch.inference_mode():
            results.append(Backbone(BackboneSpec(channels_last=channels_last)).eval()(tiles))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_bundled_weights_are_small_carded_and_load() -> None:
    (path,) = BUNDLED.glob("*.safetensors")
    assert path.stat().st_size <= 4_000_000
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    backbone = Backbone(BackboneSpec())
    random = weights_sha256(backbone)
    backbone.load_pretrained()
    assert weights_sha256(backbone) != random
    for key, value in load_file(path).items():
        torch.testing.assert_close(backbone.net.state_dict()[key], value)


def test_imagenet_weights_load_with_strict_keys_and_know_a_palace(test_data: Path) -> None:
    path = test_data / "weights" / "mobilenetv2_100.imagenet.safetensors"
    spec = BackboneSpec("mobilenetv2_100", str(path))
    weights, _ = find_weights(spec)
    whole = timm.create_model("mobilenetv2_100").eval()
    whole.load_state_dict(weights, strict=True)
    picture = Image.fromarray(load_sample_image("china.jpg"))
    scale = 256 / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR
    )
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    tile = torch.from_numpy(np.array(picture.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1)[None]
    backbone = Backbone(spec).eval()
    backbone.load_pretrained()
    with torch.inference_mode():
        logits = whole.get_classifier()(backbone(tile))  # type: ignore[operator]
        probabilities = logits.softmax(1)[0]
    assert probabilities.argmax() == 698  # palace
    assert probabilities[698].item() == pytest.approx(0.81, abs=0.03)


def test_weights_files_of_both_kinds_and_the_normalisation_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = timm.create_model("resnet18", num_classes=3).state_dict()  # with a classifier of its own
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors", {"mean": "[0.5, 0.6, 0.7]", "std": "[0.1, 0.2, 0.3]"})
    for name in ("w.pth", "w.safetensors"):
        backbone = Backbone(BackboneSpec("resnet18", str(tmp_path / name)))
        backbone.load_pretrained()
        torch.testing.assert_close(backbone.net.state_dict()["conv1.weight"], state["conv1.weight"])
    torch.testing.assert_close(backbone.mean.flatten(), torch.tensor([0.5, 0.6, 0.7]))
    torch.testing.assert_close(backbone.std.flatten(), torch.tensor([0.1, 0.2, 0.3]))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_unfit_weights_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0")
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "weights.h5").touch()
    for pretrained, said in (
        ("nowhere.safetensors", "which is no file"),
        (str(tmp_path / "evil.pth"), "cannot be read as weights only"),
        (str(tmp_path / "torn.safetensors"), "not a readable safetensors file"),
        (str(tmp_path / "other.safetensors"), "not weights of mobilenetv3_small_050"),
        (str(tmp_path / "weights.h5"), "expected a .safetensors or .pth file"),
    ):
        with pytest.raises(WeightsError, match=said) as caught:
            Backbone(BackboneSpec(pretrained=pretrained)).load_pretrained()
        assert "\n" not in str(caught.value)
    assert "never run" not in capsys.readouterr().out
    with pytest.raises(WeightsError, match="they exist for: mobilenetv3_small_050"):
        Backbone(BackboneSpec("resnet18")).load_pretrained()
    with pytest.raises(WeightsError, match="timm knows no backbone 'resnet19'; names like it: "):
        Backbone(BackboneSpec("resnet19"))
