from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slidetl.errors import UsageError
from slidetl.federation.combine import Krum, WeightedMean
from slidetl.federation.config import Federation, Site, federation_from, read_federation

SITES = {name: {"examples": 10} for name in ("a", "b", "c")}


def test_values_survive_the_way_to_a_site() -> None:
    rule = {"class_path": "slidetl.federation.combine.Krum", "init_args": {"malicious": 1}}
    values = {
        "sites": {f"s{n}": {"examples": 10 + n} for n in range(5)},
        "averaged": {"rule": rule, "momentum": 0.5},
        "model": {"lr": 0.01, "transfer": {"class_path": "slidetl.models.transfer.Scratch"}},
        "data": {"bag_size": 4},
    }
    federation = federation_from(values)
    assert federation.averaged.rule == Krum(1)
    assert federation.model["transfer"] == {"class_path": "slidetl.models.transfer.Scratch"}
    assert federation_from(federation.to_dict()) == federation
    swarm = federation_from({"sites": SITES, "scheme": "peer_to_peer", "peer_to_peer": {"mixing": "swarm"}})
    assert swarm.peer_to_peer.mixing == "swarm" and federation_from(swarm.to_dict()) == swarm
    hidden = federation_from({"sites": SITES, "averaged": {"encrypted": True}})
    assert hidden.averaged.encrypted and federation_from(hidden.to_dict()) == hidden


def test_the_places_of_the_slides_stay_at_home() -> None:
    federation = Federation({"a": Site(3, "a/m.csv", "a/cache"), "b": Site(4, "b/m.csv", "b/cache")})
    assert "m.csv" not in yaml.safe_dump(federation.to_dict())
    moved = Federation({"a": Site(3, "x/m.csv", "x/cache"), "b": Site(4)}, answer_seconds=5)
    assert moved.sha256 == federation.sha256
    assert Federation({"a": Site(3), "b": Site(5)}).sha256 != federation.sha256


def test_a_journey_has_its_order() -> None:
    federation = federation_from({"sites": SITES, "scheme": "cyclic", "cyclic": {"order": ["c", "a", "b"]}})
    assert list(federation.declared) == ["c", "a", "b"]
    assert list(federation_from({"sites": SITES, "scheme": "cyclic"}).declared) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sites": {"a": {"examples": 1}}}, "at least two sites"),
        ({"sites": {**SITES, "server": {"examples": 1}}}, "not 'server'"),
        ({"sites": {**SITES, "d": {"examples": 0}}}, "at least 1"),
        ({"sites": {**SITES, "d": {"examples": 1, "manifest": "m.csv"}}}, "a manifest and a cache"),
        ({"sites": {"a": {}, "b": {"examples": 1}}}, "examples"),
        ({"sites": SITES, "scheme": "ring"}, "scheme"),
        ({"sites": SITES, "rounds": 0}, "rounds must be at least 1"),
        ({"sites": SITES, "proximal": -1.0}, "proximal"),
        ({"sites": SITES, "scheme": "cyclic", "cyclic": {"order": ["a", "b"]}}, "each of a, b, c once"),
        ({"sites": SITES, "averaged": {"momentum": 1.0}}, "momentum"),
        (
            {"sites": SITES, "scheme": "cyclic", "averaged": {"momentum": 0.5}},
            "averaged: scheme must be averaged, not cyclic",
        ),
        (
            {"sites": SITES, "scheme": "pooled", "averaged": {"fewest": 2}},
            "averaged: scheme must be averaged, not pooled",
        ),
        (
            {"sites": SITES, "cyclic": {"order": ["c", "b", "a"]}},
            "cyclic: scheme must be cyclic, not averaged",
        ),
        (
            {"sites": SITES, "scheme": "cyclic", "peer_to_peer": {"mixing": "swarm"}},
            "peer_to_peer: scheme must be peer_to_peer, not cyclic",
        ),
        ({"sites": SITES, "model": [1]}, "model: expected options"),
        (
            {
                "sites": SITES,
                "averaged": {
                    "rule": {
                        "class_path": "slidetl.federation.combine.Krum",
                        "init_args": {"malicious": 1},
                    }
                },
            },
            "needs at least 5 sites",
        ),
        ({"sites": SITES, "averaged": {"rule": {"class_path": "os.system"}}}, "os.system"),
        (
            {
                "sites": SITES,
                "scheme": "peer_to_peer",
                "peer_to_peer": {"mixing": [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]},
            },
            "bring all sites together",
        ),
    ],
)
def test_wrong_values_are_one_line(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError) as error:
        read_federation(path)
    assert str(error.value).startswith(f"{path}: ") and told in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "name",
    [
        *("data.manifest", "data.cache", "data.split_from", "data.seed"),
        *("data.grades", "data.tasks", "model.grades"),
        *("trainer.max_epochs", "trainer.max_steps", "trainer.default_root_dir"),
    ],
)
def test_what_the_federation_sets_is_refused(name: str) -> None:
    part, _, key = name.partition(".")
    with pytest.raises(UsageError, match=rf"^{name} is set by the federation"):
        federation_from({"sites": SITES, part: {key: ["none", "mild", "severe"]}})


def test_a_matrix_is_one_of_the_mixings() -> None:
    third = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]
    values = {"sites": SITES, "scheme": "peer_to_peer", "peer_to_peer": {"mixing": third}}
    matrix = federation_from(values).peer_to_peer.matrix(3)
    assert matrix is not None and matrix.tolist() == third
    assert federation_from({**values, "peer_to_peer": {"mixing": "swarm"}}).peer_to_peer.matrix(3) is None


def test_defaults() -> None:
    assert federation_from({"sites": SITES}).averaged.rule == WeightedMean()
