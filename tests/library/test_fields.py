from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from slidetl.errors import ModelFileError, UsageError
from slidetl.library.fields import check_fields, from_json, to_json

SHA = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Leaf:
    number: float

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Tree:
    text: str
    count: int
    pair: tuple[float, float]
    leaves: Mapping[str, Leaf]
    lists: dict[str, list[float]]
    words: tuple[str, ...] = ()
    leaf: Leaf | None = None
    choice: str | int | bool = 0
    codec: Literal["jpeg", "zstd"] = "jpeg"

    def __post_init__(self) -> None:
        check_fields(self)


TREE = Tree("ä", 2, (1, 2.5), {"a": Leaf(3)}, {"m": [0.5, 1]}, ("x", "y"), Leaf(4), True)


def changed(content: str | bytes, **values: Any) -> bytes:
    """JSON with other values; a key may be a path, `model__grades`."""
    document = json.loads(content)
    for path, value in values.items():
        *folders, key = path.split("__")
        place = document
        for folder in folders:
            place = place[folder]
        place[key] = value
    return json.dumps(document).encode()


def test_round_trip() -> None:
    assert from_json(Tree, to_json(TREE)) == TREE
    assert to_json(from_json(Tree, to_json(TREE))) == to_json(TREE)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"text": 1}, "card.text: expected one line of text, found 1"),
        ({"text": "a\nb"}, r"card.text: expected one line of text, found 'a\\nb'"),
        ({"text": "a\u202eb"}, "card.text"),
        ({"text": "a" * 2001}, "card.text"),
        ({"count": True}, "card.count: expected a whole number, found True"),
        ({"count": 2.5}, "card.count: expected a whole number, found 2.5"),
        ({"pair": [1]}, "card.pair"),
        ({"pair": [1, float("nan")]}, "card.pair: expected a finite number, found nan"),
        ({"pair": [1, 10**400]}, "card.pair: expected a finite number"),
        ({"leaves": []}, "card.leaves"),
        ({"leaves__a": {"number": "1"}}, "card.leaves.a.number"),
        ({"leaves__a": {}}, "card.leaves.a: .*missing"),
        ({"lists__m": 1}, "card.lists.m"),
        ({"words": ["x", None]}, "card.words"),
        ({"leaf": {"other": 1}}, r"card.leaf: unknown fields \['other'\]"),
        ({"choice": 1.5}, "card.choice"),
        ({"codec": "png"}, "card.codec: expected one of jpeg, zstd, found 'png'"),
        ({"format_version": 99}, "expected a model of format 3, found 99"),
    ],
)
def test_what_does_not_fit_its_field_is_named_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFileError, match=said) as caught:
        from_json(Tree, changed(to_json(TREE), **values))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_value_is_checked_however_the_object_is_made() -> None:
    with pytest.raises(UsageError, match="number: expected a finite number, found inf"):
        Leaf(float("inf"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"format_version": 3}', "\x00", "[" * 30_000, b"\xff"]
)
def test_what_is_no_card_is_refused(text: str | bytes) -> None:
    with pytest.raises(ModelFileError, match="not the card of a slidetl model") as caught:
        from_json(Tree, text)
    assert str(caught.value).isprintable()
