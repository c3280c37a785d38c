"""The models that were pulled to this machine: what is read here is what its card describes, or an error."""

from __future__ import annotations

import hashlib
from pathlib import Path

from slidetl.errors import ModelFileError
from slidetl.library.card import CARD, MAX_CARD_BYTES, SUMS, ZooCard, check_name, read_sums
from slidetl.library.trust import record_path

SCHEME = "zoo://"


def pulled_folder() -> Path:
    """Where pulled models lie, each in a folder of its name: ``$SLIDETL_HOME/zoo``, or ``~/.slidetl/zoo``."""
    return record_path().parent / "zoo"


def pulled_card(name: str) -> ZooCard:
    """The card of a pulled model.

    Raises:
        UsageError: that cannot be a name.
        ModelFileError: no such model was pulled, or its card is damaged.
    """
    folder = pulled_folder() / check_name(name)
    try:
        sums = read_sums((folder / SUMS).read_text(encoding="utf-8"))
        content = (folder / CARD).read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError(
            f"no model {name!r} was pulled to this machine; 'slidetl zoo pull {name} --from LIBRARY' gets it"
        ) from error
    return checked_card(content, sums, name, str(folder))


def checked_card(content: bytes, sums: dict[str, str], name: str, place: str) -> ZooCard:
    """Reads a card, once it agrees with the list of hashes beside it.

    Args:
        content: of the file.
        sums: of :func:`slidetl.library.card.read_sums`.
        name: that the entry goes by.
        place: for messages.

    Raises:
        ModelFileError: it does not agree, is no card, or is the card of another model.
    """
    if len(content) > MAX_CARD_BYTES:
        raise ModelFileError(f"{place}: {CARD} has more than {MAX_CARD_BYTES} bytes; it is no card")
    if sums.get(CARD) != hashlib.sha256(content).hexdigest():
        raise ModelFileError(
            f"{place}: {CARD} does not match its hash in {SUMS}; it was changed or is damaged"
        )
    try:
        card = ZooCard.from_yaml(content.decode())
    except (UnicodeDecodeError, ModelFileError) as error:
        raise ModelFileError(f"{place}: {error}") from error
    if card.name != name:
        raise ModelFileError(f"{place}: expected the card of {name}, found that of {card.name}")
    return card


def pulled_file(name: str, file: str) -> Path:
    """One file of a pulled model, once it agrees with its card.

    Args:
        name: of the model.
        file: ``model.pt`` or ``weights.safetensors``.

    Raises:
        UsageError: that cannot be a name.
        ModelFileError: no such model was pulled, or it is not what was pulled any more.
    """
    path = pulled_folder() / name / file
    record = pulled_card(name).files[file]
    if not path.is_file() or file_sha256(path) != record.sha256:
        raise ModelFileError(
            f"{path}: missing, or not what was pulled; remove the folder {path.parent} and pull {name} again"
        )
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
