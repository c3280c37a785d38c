from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slidetl.errors import ModelFileError, UsageError
from slidetl.library.card import FileRecord, ZooCard, check_name, read_sums, write_sums
from slidetl.library.model_card import Evidence, ModelCard, TrainingData
from slidetl.tiles.grid import TileSpec

MODEL = ModelCard(
    grades=("none", "mild", "severe"),
    tile_spec=TileSpec(mpp=0.5, tile_size_px=224),
    backbone="resnet18",
    architecture={"name": "resnet18"},
    normalisation={"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
    versions={"slidetl": "0.1.0", "torch": "2.6.0"},
    weights_sha256="1" * 64,
    licence="CC-BY-4.0",
    training=TrainingData(20, 18, ("A", "B"), ("GT450",), ("H&E",), 1.5, "2" * 64),
    evidence=Evidence(12, 10, {"QWK": (0.71, 0.5, 0.82)}, 1.3, 0.9, 0.7, "3" * 64),
    novelty_limit=2.5,
    lineage=("4" * 64, "5" * 64),
)
CARD = ZooCard(
    "lung-fibrosis-2",
    MODEL,
    {"model.pt": FileRecord(2_500_000, "6" * 64), "weights.safetensors": FileRecord(2_300_000, "7" * 64)},
    description="Grades fibrosis of the lung",
    intended_use="Research on rats",
)


def changed(**values: Any) -> str:
    """The card as YAML with other values; a key may be a path, `model__grades`."""
    document = yaml.safe_load(CARD.to_yaml())
    for path, value in values.items():
        *folders, key = path.split("__")
        place = document
        for folder in folders:
            place = place[folder]
        place[key] = value
    return yaml.safe_dump(document)


def test_round_trip() -> None:
    assert ZooCard.from_yaml(CARD.to_yaml()) == CARD
    bare = dataclasses.replace(CARD, model=dataclasses.replace(MODEL, training=None, evidence=None))
    assert ZooCard.from_yaml(bare.to_yaml()) == bare


def test_the_schema_knows_every_field() -> None:
    schema = json.loads(files("slidetl.library").joinpath("card.schema.json").read_text())
    model = schema["properties"]["model"]["properties"]

    def names(of: type[Any]) -> set[str]:
        return {field.name for field in dataclasses.fields(of)}

    assert names(ZooCard) | {"format_version"} == set(schema["properties"])
    assert names(ModelCard) | {"format_version"} == set(model)
    assert names(TrainingData) == set(model["training"]["properties"])
    assert names(Evidence) == set(model["evidence"]["properties"])
    assert names(FileRecord) == set(schema["$defs"]["file"]["properties"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format_version": 3}, "format_version"),
        ({"name": "../../x"}, "named by small letters"),
        ({"files__model.pt__sha256": "6" * 64 + "\n"}, r"files.model.pt.sha256"),
        ({"files__../evil": {"bytes": 1, "sha256": "6" * 64}}, "files"),
        ({"description": "a\x1b[2Jb"}, "description"),
        ({"description": "a\n"}, "description"),
        ({"model__licence": "\u009b2J"}, "model.licence"),
        ({"model__grades": ["only one"]}, "model.grades"),
        ({"model__weights_sha256": None}, "model.weights_sha256"),
        ({"model__evidence__figures": {"QWK": [1.0]}}, "figures.QWK"),
        ({"model__tile_spec__mpp": -1}, "mpp must be a positive number"),
        ({"model__architecture": {"name": "x", "class_path": "os.system"}}, "model.architecture"),
        ({"model__architecture": {"name": "x", "in_channels": "1"}}, "model.architecture.in_channels"),
        ({"model__format_version": 1}, "format 3"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_what_the_schema_forbids_is_named_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFileError, match=said) as caught:
        ZooCard.from_yaml(changed(**values))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text", ["", "[]", "a: [", "a: !!python/name:os.system", "\x00", "[" * 3000, "a: 2026-99-99"]
)
def test_what_is_no_card_is_refused(text: str) -> None:
    with pytest.raises(ModelFileError, match="not the card of a model") as caught:
        ZooCard.from_yaml(text)
    assert str(caught.value).isprintable()


def test_aliases_that_would_grow_are_refused_before_they_do() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ModelFileError, match="aliases"):
        ZooCard.from_yaml("\n".join(lines))


def test_a_text_of_two_lines_is_not_written() -> None:
    with pytest.raises(ModelFileError, match="contact"):
        dataclasses.replace(CARD, contact="a\nb").to_yaml()


@given(st.text(max_size=12))
def test_a_name_is_one_folder_below_the_library(name: str) -> None:
    try:
        assert check_name(name) == name
    except UsageError:
        return
    assert name.isascii() and not set(name) & set("/\\ \n") and name[0] not in ".-"


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "a\\b", "/etc", "A", ".hidden", "-flag", "a\n", "a" * 101]
)
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="named by small letters"):
        check_name(name)


def test_markdown_says_what_matters_and_lets_no_stranger_write_markup() -> None:
    evil = "<script>alert(1)</script> ![x](http://example.org/x.png) a | b"
    card = dataclasses.replace(CARD, description=evil, model=dataclasses.replace(MODEL, licence=evil))
    text = card.to_markdown()
    assert "<script" not in text and "![" not in text
    assert text.count("| Licence | ") == 1
    row = next(line for line in text.splitlines() if line.startswith("| Licence"))
    assert row.replace("\\|", "").count("|") == 3
    for part in (
        "# lung-fibrosis-2",
        "none, mild, severe",
        "0.710 | 0.500 to 0.820",
        "18 patients",
        "2. `555",
    ):
        assert part in text


def test_the_lines_for_a_training_are_yaml_whatever_the_backbone_is_called() -> None:
    for name in ("resnet18", "hf-hub:OWNER/MODEL", "a: b", "x # y", '"', "null", "yes"):
        card = dataclasses.replace(CARD, model=dataclasses.replace(MODEL, architecture={"name": name}))
        values = yaml.safe_load("\n".join(card.pretrained_lines()))
        assert values == {"model": {"backbone": {"name": name, "pretrained": "zoo://lung-fibrosis-2"}}}


def test_sums_are_those_of_sha256sum() -> None:
    sums = {"model.pt": "a" * 64, "card.yaml": "b" * 64}
    text = write_sums(sums)
    assert text == f"{'a' * 64}  model.pt\n{'b' * 64}  card.yaml\n"
    assert read_sums(text) == sums
    assert read_sums("nonsense\n" + "c" * 63 + "  x\n") == {}
