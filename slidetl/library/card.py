"""Reads and writes the card of a library's entry, ``card.json``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from slidetl.errors import ModelFileError, UsageError
from slidetl.files import is_sha256
from slidetl.library.fields import MAX_CARD_BYTES, check_fields, from_json, to_json
from slidetl.library.model_card import ModelCard

CARD, MODEL, WEIGHTS = "card.json", "model.pt", "weights.safetensors"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


@dataclass(frozen=True)
class FileRecord:
    """One file of an entry.

    Attributes:
        bytes: the size.
        sha256: SHA-256 of the whole file, hexadecimal.
    """

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bytes < 0 or not is_sha256(self.sha256):
            raise UsageError(f"expected a size and a SHA-256 of 64 hexadecimal digits, found {self}")


@dataclass(frozen=True)
class LibraryCard:
    """The card of an entry. Every text is one line.

    Attributes:
        name: the entry's name, e.g. ``lung-fibrosis-2``.
        description: the purpose of the model; this and the next two may be empty.
        intended_use: intended uses of the model, and uses to avoid.
        contact: a person to ask.
        files: ``model.pt`` and ``weights.safetensors``.
        model: the card inside ``model.pt``.
    """

    name: str
    description: str
    intended_use: str
    contact: str
    files: Mapping[str, FileRecord]
    model: ModelCard

    def __post_init__(self) -> None:
        check_fields(self)
        check_name(self.name)
        if self.files.keys() != {MODEL, WEIGHTS}:
            raise UsageError(f"files: expected {MODEL} and {WEIGHTS}, found {sorted(self.files)!r:.100}")

    @property
    def sha256(self) -> str:
        """The SHA-256 of ``card.json``, hexadecimal; it covers the whole entry."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Returns the content of ``card.json``."""
        return to_json(self).encode()

    @classmethod
    def from_bytes(cls, content: bytes, name: str, place: str) -> Self:
        """Reads the card of one entry.

        Args:
            content: the first ``MAX_CARD_BYTES + 1`` bytes of ``card.json``.
            name: the name of the entry.
            place: the folder or URL of the entry, for messages.

        Raises:
            ModelFileError: no card, or the card of another entry.
        """
        if len(content) > MAX_CARD_BYTES:
            raise ModelFileError(f"{place}: {CARD} has more than {MAX_CARD_BYTES} bytes; it is no card")
        try:
            card = from_json(cls, content)
        except ModelFileError as error:
            raise ModelFileError(f"{place}: {CARD}: {error}") from error
        if card.name != name:
            raise ModelFileError(f"{place}: expected the card of {name}, found that of {card.name}")
        return card

    def backbone(self) -> dict[str, str | int | bool]:
        """Returns the fields of a BackboneSpec with these weights."""
        return {**self.model.architecture, "pretrained": f"zoo://{self.name}"}


def is_name(text: str) -> bool:
    """Checks that a text can name an entry, and so a folder."""
    return bool(_NAME.fullmatch(text))


def check_name(name: str) -> str:
    """Returns the name of an entry unchanged.

    Raises:
        UsageError: it cannot be a name.
    """
    if not is_name(name):
        raise UsageError(
            "a model is named by small letters, digits, '.', '_' and '-', the first a letter or digit, "
            f"e.g. lung-fibrosis-2, not {name!r:.200}"
        )
    return name
