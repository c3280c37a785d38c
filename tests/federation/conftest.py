"""Three sites on parts of the small study, and trainers of almost no work for tests of the rounds."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slidetl.federation.config import Federation, Site
from slidetl.federation.coordinator import SitesHere
from slidetl.federation.participant import Participant
from slidetl.federation.records import write_arrays
from slidetl.federation.site import Parts, site_slides
from slidetl.federation.weights import SiteUpdate, Weights
from slidetl.tiles.grid import TileSpec
from tests.conftest import Study
from tests.small import SMALL, small_weights

NAMES = ("north", "south", "west")


@pytest.fixture(scope="session")
def three_sites(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    """Seven, seven and six slides, divided into train, val and test."""
    folder = tmp_path_factory.mktemp("sites")
    with study.manifest.open() as file:
        rows = list(csv.DictReader(file))
    sites = {}
    for place, name in enumerate(NAMES):
        path = folder / f"{name}.csv"
        mine = rows[place::3]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]] + ["split"] * ("split" not in rows[0]))
            writer.writeheader()
            for number, row in enumerate(mine):
                image = study.manifest.parent / row["path"]
                split = ("train", "train", "train", "train", "val", "test", "val")[number]
                writer.writerow({**row, "path": image, "split": split})
        sites[name] = Site(4, str(path), str(study.cache))
    return sites


@pytest.fixture(scope="session")
def three(three_sites: dict[str, Site]) -> Federation:
    return Federation(
        three_sites,
        model={
            "backbone": {"name": SMALL, "pretrained": str(small_weights())},
            "transfer": {
                "class_path": "slidetl.models.transfer.WarmRestart",
                "init_args": {"batch_statistics": True},
            },
        },
        data={"bag_size": 2, "num_workers": 0},
        trainer={"accelerator": "cpu"},
        rounds=2,
    )


@pytest.fixture(scope="session")
def parts_of(three: Federation) -> dict[str, Parts]:
    return {name: site_slides(three, site) for name, site in three.sites.items()}


@pytest.fixture
def sites_here(parts_of: dict[str, Parts], tmp_path: Path) -> Callable[[Federation], SitesHere]:
    def make(federation: Federation) -> SitesHere:
        return SitesHere(
            {
                name: Participant(federation, name, parts_of[name], tmp_path / "sites" / name)
                for name in federation.sites
            }
        )

    return make


@dataclass
class Adder:
    """A trainer whose round adds a number to each weight, and whose score is their distance from 5."""

    name: str
    folder: Path
    adds: float
    examples: int = 4
    frozen_sha256: str = ""
    mpp: float = 4.0

    def __post_init__(self) -> None:
        self.data = SimpleNamespace(tile_spec=TileSpec(tile_size_px=64, stride_px=64, mpp=self.mpp))
        self.asked: list[tuple[str, int]] = []  # messages about networks of rounds

    def train(self, weights: Weights, number: int) -> SiteUpdate:
        moved = {
            name: np.array(value + np.asarray(self.adds * number, value.dtype))
            for name, value in weights.items()
        }
        return SiteUpdate(self.name, moved, self.examples, {"train_loss": self.adds})

    def resume(self, number: int, last: int) -> None:
        self.asked.append(("resume", number))

    def validate(self, weights: Weights, number: int) -> dict[str, float]:
        self.asked.append(("validate", number))
        away = float(np.mean([np.abs(value - 5.0).mean() for value in weights.values()]))
        return {"slides": 2.0, "rps": min(away / 10, 1.0), "accuracy": 0.5, "mae": 1.0, "loss": away}

    def write_checkpoint(self, weights: Weights, number: int, lineage: Sequence[str]) -> None:
        self.asked.append(("keep", number))
        write_arrays(self.folder / "best.safetensors", weights)
        (self.folder / "lineage.txt").write_text("\n".join(lineage))


START: dict[str, Any] = {
    "head.weight": np.zeros((2, 3), np.float32),
    "norm.running_mean": np.ones(3, np.float32),
    "norm.num_batches_tracked": np.array(0, np.int64),
}


@pytest.fixture
def adders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Federation], SitesHere]:
    monkeypatch.setattr("slidetl.federation.coordinator.initial_weights", lambda federation: dict(START))
    monkeypatch.setattr("slidetl.federation.coordinator.write_shared_checkpoint", lambda *args: None)

    def make(federation: Federation) -> SitesHere:
        participants = {}
        for place, name in enumerate(federation.sites, 1):
            folder = tmp_path / "sites" / name
            participants[name] = Participant(federation, name, {}, folder)
            participants[name]._trainer = Adder(name, folder, float(place))  # type: ignore[assignment]
        return SitesHere(participants)

    return make
