from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetl.errors import ModelFileError, UsageError
from slidetl.library.card import FileRecord, LibraryCard, check_name
from tests.library.test_fields import SHA, changed
from tests.library.test_model_card import FULL

CARD = LibraryCard(
    name="lung-fibrosis-2",
    description="Grades fibrosis of the lung: ±1 grade",
    intended_use="Research on rats",
    contact="",
    files={"model.pt": FileRecord(2_500_000, SHA), "weights.safetensors": FileRecord(2_300_000, SHA)},
    model=FULL,
)


def read(content: bytes) -> LibraryCard:
    return LibraryCard.from_bytes(content, "lung-fibrosis-2", "library/lung-fibrosis-2")


@pytest.mark.parametrize("model", [FULL, dataclasses.replace(FULL, training=None, evidence=None)])
def test_round_trip(model: Any) -> None:
    card = dataclasses.replace(CARD, model=model)
    found = read(card.to_bytes())
    assert found == card
    assert found.sha256 == hashlib.sha256(card.to_bytes()).hexdigest() != CARD.sha256 or model is FULL


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "../../x"}, "named by small letters"),
        ({"files": {"model.pt": {"bytes": 1, "sha256": SHA}}}, "expected model.pt and weights.safetensors"),
        ({"files__../evil": {"bytes": 1, "sha256": SHA}}, r"found \['../evil', 'model.pt'"),
        ({"files__\x1b[2J": {"bytes": 1, "sha256": SHA}}, r"expected one line of text, found '\\x1b"),
        ({"files__model.pt__sha256": SHA[:-1] + "G"}, "64 hexadecimal digits"),
        ({"files__model.pt__sha256": SHA + "\n"}, "files.model.pt.sha256"),
        ({"files__model.pt__bytes": -1}, "a size"),
        ({"contact": "a\x1b[2Jb"}, "card.contact"),
        ({"model__licence": "\u009b2J"}, "card.model.licence"),
        ({"model__evidence__figures__QWK": [1.0]}, "card.model.evidence.figures.QWK"),
        ({"surplus\x1b": 1}, "unknown fields"),
    ],
)
def test_what_no_card_may_say_is_named_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFileError, match=said) as caught:
        read(changed(CARD.to_bytes(), **values))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_the_card_of_another_entry_is_refused() -> None:
    with pytest.raises(ModelFileError, match="expected the card of lung-3, found that of lung-fibrosis-2"):
        LibraryCard.from_bytes(CARD.to_bytes(), "lung-3", "library/lung-3")


def test_a_text_of_two_lines_is_not_published() -> None:
    with pytest.raises(UsageError, match="contact: expected one line of text"):
        dataclasses.replace(CARD, contact="a\nb")


@pytest.mark.slow
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
