from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from slidetl.models.catalogue import RECOMMENDED, list_backbones
from slidetl.models.cbr import CBR_NAMES
from slidetl.models.packaged import PACKAGED


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.slow
def test_the_short_list_is_what_is_installed_small_or_recommended() -> None:
    entries = {entry.name: entry for entry in list_backbones()}
    assert set(entries) == {PACKAGED, *CBR_NAMES, *RECOMMENDED}
    assert (entries[PACKAGED].weights, entries[PACKAGED].input_size_px) == ("installed", 224)
    assert entries["cbr_tiny"].weights == "none"
    resnet = entries["resnet18"]
    # torchvision's figure without the classifier of 1,000 classes
    assert (resnet.parameters, resnet.features) == (11_689_512 - 513 * 1000, 512)
    assert (resnet.input_size_px, resnet.weights) == (224, "download")
    known = entries["hf-hub:MahmoodLab/UNI"]
    assert (known.features, known.weights) == (1024, "download")


@pytest.mark.slow
def test_weights_on_this_machine_are_found_and_named(tmp_path: Path) -> None:
    tagged, default = "resnet34.tv_in1k", "resnet26"
    for name in (tagged, default):
        repository = str(timm.get_pretrained_cfg_value(name, "hf_hub_id"))
        cache(tmp_path / "hf", repository, "model.safetensors").write_bytes(b"")
    url = str(timm.get_pretrained_cfg_value("inception_v3", "url"))
    downloaded = tmp_path / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    has_url = url.endswith(".pth")
    if has_url:
        downloaded.parent.mkdir(parents=True)
        downloaded.write_bytes(b"")
    lab = cache(tmp_path / "hf", "lab/pathology", "config.json")
    lab.write_text('{"architecture": "resnet10t", "pretrained_cfg": {"mean": [0.5], "std": [0.5]}}')
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t").state_dict(), lab.with_name("model.safetensors"))
    entries = {entry.name: entry for entry in list_backbones()}
    assert entries["resnet26"].weights.endswith("model.safetensors")
    assert entries[tagged].weights.endswith("model.safetensors") and "resnet34" not in entries
    assert entries["hf-hub:lab/pathology"].weights == str(lab.with_name("model.safetensors"))
    if has_url:
        assert entries["inception_v3"].weights == str(downloaded)


def cache(folder: Path, repository: str, file: str) -> Path:
    """A file's place in the cache of the Hugging Face hub."""
    place = folder / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc").mkdir(parents=True)
    return place / "snapshots" / "abc" / file


def test_a_pattern_searches_all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"resnet18", "resnet18d"} <= {entry.name for entry in list_backbones("resnet18")}
    assert [entry.name for entry in list_backbones("cbr_tiny*")] == ["cbr_tiny", "cbr_tiny_published"]
    assert list_backbones("no such network") == []
    monkeypatch.setattr("slidetl.models.catalogue.MOST_COUNTED", 2)
    many = list_backbones("test_vit*")
    assert len(many) > 2
    assert [entry.parameters is None for entry in many] == [i >= 2 for i in range(len(many))]
