"""Finds models pulled to this machine; each file is checked against its card before use."""

from __future__ import annotations

from pathlib import Path

from slidetl.errors import ModelFileError
from slidetl.files import file_sha256
from slidetl.library.card import CARD, LibraryCard, check_name
from slidetl.library.fields import MAX_CARD_BYTES
from slidetl.library.trust import record_path

SCHEME = "zoo://"


def pulled_folder() -> Path:
    """Returns the folder of pulled models, each in a folder of its name: ``$SLIDETL_HOME/zoo``."""
    return record_path().parent / "zoo"


def pulled_card(name: str) -> LibraryCard:
    """Reads the card of a pulled model.

    Raises:
        UsageError: not a valid name.
        ModelFileError: no such model was pulled, or its card is damaged.
    """
    folder = pulled_folder() / check_name(name)
    try:
        with (folder / CARD).open("rb") as file:
            content = file.read(MAX_CARD_BYTES + 1)
    except FileNotFoundError as error:
        first = f"remove {folder}, which has no {CARD}; then " if folder.exists() else ""
        raise ModelFileError(
            f"no model {name!r} was pulled to this machine; {first}'slidetl zoo pull {name} --from LIBRARY' "
            "gets it"
        ) from error
    return LibraryCard.from_bytes(content, name, str(folder))


def pulled_file(name: str, file: str) -> Path:
    """Returns the path of a pulled model's file, once its hash agrees with the card.

    Args:
        name: the model's name.
        file: ``model.pt`` or ``weights.safetensors``.

    Raises:
        UsageError: not a valid name.
        ModelFileError: no such model was pulled, or the file was changed since.
    """
    record = pulled_card(name).files[file]
    path = pulled_folder() / name / file
    if not path.is_file() or file_sha256(path) != record.sha256:
        raise ModelFileError(
            f"{path}: missing, or not what was pulled; remove the folder {path.parent} and pull {name} again"
        )
    return path
