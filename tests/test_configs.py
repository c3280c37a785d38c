"""Every configuration that ships goes through the real commands."""

from __future__ import annotations

import re
import shutil
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
import yaml

from slidetl.cli import main
from slidetl.models import transfer
from slidetl.models.backbones import Backbone
from slidetl.models.spec import BackboneSpec
from slidetl.training.predictions import read_predictions
from tests.conftest import Study
from tests.small import SMALL, small_embed

# Those of comparisons and federations are for other commands (tests/compare/, tests/federation/), those of
# volumes go together (tests/training/test_volumes.py).
ELSEWHERE = ("compare", "federated", "volumes")
CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml")
    if path.parent.name not in ELSEWHERE
)


def test_there_are_some() -> None:
    assert {path.name for path in CONFIGS} >= {"fibrosis.yaml", "demo.yaml"}


def test_every_strategy_has_one() -> None:
    known = vars(transfer).values()
    classes = {item.__name__ for item in known if is_dataclass(item) and isinstance(item, type)}
    configs = [yaml.safe_load(path.read_text()) for path in CONFIGS if path.parent.name == "transfer"]
    named = {config["model"]["transfer"]["class_path"].rpartition(".")[2] for config in configs}
    assert named == {name for name in classes if not name.startswith("_")}


@pytest.fixture(scope="module")
def embedded(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study with stored features, named as 'slidetl embed' names them, in a cache of its own."""
    cache = tmp_path_factory.mktemp("embedded") / "cache"
    shutil.copytree(study.cache, cache)
    assert main(["embed", str(cache), *small_embed(), "--device", "cpu"]) == 0
    return Study(study.manifest, cache)


def test_one_trains_on_features_alone_and_one_beside_them() -> None:
    data = [yaml.safe_load(path.read_text())["data"] for path in CONFIGS]
    sizes = sorted(part["bag_size"] for part in data if "features" in part)
    assert sizes[0] == 0 and sizes[-1] > 0


def test_they_name_layers_of_their_network() -> None:
    with torch.device("meta"):
        network = Backbone(BackboneSpec()).net
    named = re.compile(r"blocks\.\d")
    for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml"):
        text = path.read_text()
        if f"name: {BackboneSpec().name}" in text:
            for layer in named.findall(text):
                network.get_submodule(layer)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:kaiko-s16 was trained on tiles of 224 px")
def test_fit_and_test(config: Path, embedded: Study, tmp_path: Path) -> None:
    options = ["--config", str(config), *embedded.options(tmp_path)]
    # Some as they ship; the others with a smaller network, for the time.
    if config.stem in ("fibrosis", "lora"):
        options = [word for word in options if not word.startswith("--model.backbone")]
    data = yaml.safe_load(config.read_text())["data"]
    if "features" in data:
        options.append(f"--data.features={SMALL}")
    if data.get("bag_size") == 0:
        options.append("--data.bag_size=0")  # what the options above make small is none here
    if config.stem == "lora":  # a preset of weights that are not on this machine
        torch.save(Backbone(BackboneSpec(preset="kaiko-s16")).net.state_dict(), tmp_path / "w.pth")
        options.append(f"--model.backbone.pretrained={tmp_path / 'w.pth'}")
    options.append("--trainer.check_val_every_n_epoch=1")  # the demo's is the number of its epochs
    assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    assert main(["test", *options]) == 0
    assert len(read_predictions(tmp_path / "test" / "predictions.csv")) >= 4
