"""Converts JSON cards to frozen dataclasses and back; every value must fit the annotation of its field."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from slidetl.errors import ModelFileError, UsageError

FORMAT_VERSION = 3
MAX_CARD_BYTES = 2**18  # a card has 2 kB

_Card = TypeVar("_Card")

_MAX_TEXT = 2000
# A terminal obeys control characters; the last ones reverse the order of the letters.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def to_json(card: Any) -> str:
    """Returns a dataclass as JSON, with the version of the format; equal cards give equal text."""
    return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(card)}, indent=2)


def from_json(kind: type[_Card], text: str | bytes) -> _Card:
    """Inverts :func:`to_json`.

    Raises:
        ModelFileError: the text is of another format, or a value does not fit its field.
    """
    try:
        values = json.loads(text)
        version = values.pop("format_version")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"not the card of a slidetl model: {error!r:.200}") from error
    if version != FORMAT_VERSION:
        raise ModelFileError(
            f"expected a model of format {FORMAT_VERSION}, found {version!r:.20}; "
            "export the checkpoint again with this version of slidetl"
        )
    try:
        card: _Card = _convert(kind, values, "card")
    except UsageError as error:
        raise ModelFileError(f"not the card of a slidetl model: {error}") from error
    return card


def check_fields(card: Any) -> None:
    """Converts each field of a frozen dataclass to the type of its annotation, in place.

    Raises:
        UsageError: a value has another type, a number is not finite, or a text is not one line of at most
            2,000 characters.
    """
    for name, kind in get_type_hints(type(card)).items():
        object.__setattr__(card, name, _convert(kind, getattr(card, name), name))


def _convert(kind: Any, value: Any, place: str) -> Any:
    of, kinds = get_origin(kind), get_args(kind)
    if of is UnionType:
        return _convert(type(value) if type(value) in kinds else kinds[0], value, place)
    if of in (list, tuple) and isinstance(value, list | tuple):
        kinds = kinds if of is tuple and ... not in kinds else kinds[:1] * len(value)
        if len(kinds) == len(value):
            return of(_convert(kind, entry, place) for kind, entry in zip(kinds, value, strict=True))
    if of in (dict, Mapping) and isinstance(value, Mapping):
        names = [_convert(str, name, f"a name in {place}") for name in value]
        return {name: _convert(kinds[1], value[name], f"{place}.{name}") for name in names}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if not value.keys() <= hints.keys():
            raise UsageError(f"{place}: unknown fields {sorted(value.keys() - hints.keys())!r:.100}")
        values = {name: _convert(hints[name], entry, f"{place}.{name}") for name, entry in value.items()}
        try:
            return kind(**values)  # type: ignore[operator] # mypy narrows to an instance
        except TypeError as error:  # one is missing
            raise UsageError(f"{place}: {error}") from error
    if of is Literal:
        fits = isinstance(value, str) and value in kinds
    elif kind is str:
        fits = isinstance(value, str) and len(value) <= _MAX_TEXT and not _CONTROL.search(value)
    elif kind in (int, float):
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        fits = is_number and abs(value) <= sys.float_info.max
    else:
        fits = of is None and isinstance(value, kind)
    if fits:
        return value
    expected = {str: "one line of text", float: "a finite number", int: "a whole number"}.get(kind, kind)
    if of is Literal:
        expected = f"one of {', '.join(kinds)}"
    raise UsageError(f"{place}: expected {expected}, found {value!r:.100}")
