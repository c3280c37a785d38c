from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from slidetl.errors import WeightsError
from slidetl.models.backbones import Backbone, local_weights, read_pretrained
from slidetl.models.packaged import PACKAGED, packaged_weights
from slidetl.models.spec import BackboneSpec

SPEC = BackboneSpec(PACKAGED, "imagenet")


def centre_224(name: str) -> torch.Tensor:
    """The middle of a photograph of scikit-learn, ``[1, 3, 224, 224]``."""
    picture = Image.fromarray(load_sample_image(name))
    scale = 256 / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    pixels = np.array(picture.crop((left, top, left + 224, top + 224)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def test_the_installed_imagenet_weights_fit_strictly_and_know_a_palace_and_a_daisy() -> None:
    weights = read_pretrained(SPEC).weights
    assert sum(not key.endswith("num_batches_tracked") for key in weights) == 247
    whole = timm.create_model(PACKAGED).eval()
    whole.load_state_dict(weights, strict=True)
    backbone = Backbone(SPEC).eval()
    backbone.load_pretrained()
    assert {*backbone.mean.flatten().tolist(), *backbone.std.flatten().tolist()} == {0.5}
    tiles = torch.cat([centre_224("china.jpg"), centre_224("flower.jpg")])
    with torch.inference_mode():
        logits = whole.get_classifier()(backbone(tiles))  # type: ignore[operator]
    assert logits.argmax(1).tolist() == [698, 985]  # palace, daisy
    assert logits.softmax(1).max(1).values.min() > 0.3


@pytest.mark.parametrize("name", [PACKAGED, f"{PACKAGED}.in1k"])
def test_they_come_before_the_caches_and_under_both_of_timms_names(name: str) -> None:
    path = packaged_weights(name)
    assert path is not None and local_weights(name) == path
    assert packaged_weights("tf_efficientnet_lite1") is None
    lineage = read_pretrained(BackboneSpec(name, "hub", in_channels=1)).lineage
    assert lineage == read_pretrained(SPEC).lineage


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packaged_weights(PACKAGED)
    assert path is not None
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    changed = tmp_path / path.name
    changed.write_bytes(content)
    monkeypatch.setattr("slidetl.models.backbones.packaged_weights", lambda name: changed)
    with pytest.raises(WeightsError, match=r"expected SHA-256 579344248a93.*found .*; install the package"):
        Backbone(SPEC).load_pretrained()


def test_a_timm_of_another_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, **_: create("tf_efficientnet_lite1"))
    with pytest.raises(WeightsError, match="its tensors are not in the order of tf_efficientnet_lite0"):
        read_pretrained(SPEC)


def test_without_the_package_they_are_looked_for_as_those_of_any_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("slidetl.models.packaged.distribution", missing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert packaged_weights(PACKAGED) is None and local_weights(PACKAGED) is None
    with pytest.raises(WeightsError, match="the published weights of 'tf_efficientnet_lite0' could not be"):
        read_pretrained(SPEC)
