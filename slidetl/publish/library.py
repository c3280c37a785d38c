"""Publishes models to a library, and pulls them from it: a folder, or anything in reach of fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from slidetl.errors import ModelFileError, UsageError, WeightsError
from slidetl.files import file_sha256
from slidetl.library.card import CARD, MODEL, WEIGHTS, FileRecord, LibraryCard, check_name, is_name
from slidetl.library.fields import MAX_CARD_BYTES
from slidetl.library.local import pulled_card, pulled_file, pulled_folder
from slidetl.library.model_card import ModelCard
from slidetl.library.trust import trust

_BLOCK = 2**20


class Library:
    """Models in folders of their names.

    An entry is ``model.pt``, ``weights.safetensors`` and ``card.json``, written last: without it there is no
    entry.

    Args:
        url: a folder, or a URL for fsspec: ``file:///shared/zoo``, ``s3://bucket/zoo``, ``memory://zoo``.

    Raises:
        UsageError: no installed package reaches such a place.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        try:
            self._files, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: expected a folder or a URL that fsspec reaches: {error}") from error

    def names(self) -> list[str]:
        """Lists the models, sorted by name.

        Raises:
            UsageError: there is no such library.
        """
        try:
            found = self._files.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(
                f"{self.url}: no such library; 'slidetl zoo publish MODEL.pt --to {self.url}' begins one"
            ) from error
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if is_name(name) and self._files.exists(self._path(name, CARD)))

    def read(self, name: str) -> LibraryCard:
        """Reads the card of a model.

        Raises:
            UsageError: not a valid name.
            ModelFileError: there is no such model, or its card is damaged.
        """
        check_name(name)
        try:
            with self._files.open(self._path(name, CARD), "rb") as file:
                content = file.read(MAX_CARD_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ModelFileError(
                f"{self.url}: no model {name!r} here; there are: {', '.join(self.names()) or 'none'}"
            ) from error
        return LibraryCard.from_bytes(content, name, f"{self.url}/{name}")

    def publish(
        self,
        model_file: Path,
        name: str,
        description: str = "",
        intended_use: str = "",
        contact: str = "",
        trusted: bool = False,
    ) -> LibraryCard:
        """Adds a model. An entry is never replaced, since others may have built on it.

        Args:
            model_file: a file of 'slidetl export'; loading it runs it.
            name: the name of the new entry.
            description: the purpose of the model, one line; for the card, as the next two.
            intended_use: intended uses, and uses to avoid.
            contact: a person to ask.
            trusted: vouch for the file, if it was not exported here.

        Raises:
            UsageError: the name is taken or cannot be one, or the library cannot be written to.
            ModelFileError: not an exported model, or not trusted.
        """
        from slidetl.publish.model_file import load_model  # imports torch, for publishing only

        check_name(name)
        if self._files.exists(self._path(name)):
            raise UsageError(self._taken(name))
        model = load_model(model_file, trusted=trusted)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / WEIGHTS
            _save_weights(weights, model.network, model.card)
            parts = {MODEL: model_file, WEIGHTS: weights}
            files = {part: FileRecord(path.stat().st_size, file_sha256(path)) for part, path in parts.items()}
            if files[MODEL].sha256 != model.sha256:
                raise ModelFileError(f"{model_file}: it was changed while it was read; publish it again")
            card = LibraryCard(name, description, intended_use, contact, files, model.card)
            self._claim(name)
            try:
                for part, path in parts.items():
                    self._files.put_file(str(path), self._path(name, part))
                self._files.pipe_file(self._path(name, CARD), card.to_bytes())
            except BaseException as error:  # an interrupt too must leave the name free
                with contextlib.suppress(OSError):
                    self._files.rm(self._path(name), recursive=True)
                if isinstance(error, OSError):
                    raise UsageError(f"{self.url}: the library cannot be written to: {error}") from error
                raise
        return card

    def pull(self, name: str, card_sha256: str | None = None) -> Path:
        """Copies a model to this machine, checks every byte, and records its model file as trusted.

        Args:
            name: the name of the model.
            card_sha256: the SHA-256 of its card, given by its publisher; None takes any card.

        Returns:
            The folder, ``$SLIDETL_HOME/zoo/NAME``, with the same files as the entry. It appears as a whole. A
            model pulled before is checked, and not copied again.

        Raises:
            UsageError: not a valid name.
            ModelFileError: there is no such model, it does not agree with its card or ``card_sha256``, or
                another model of that name was pulled before.
        """
        card = self.read(name)
        if card_sha256 is not None and card.sha256 != card_sha256.lower():
            raise ModelFileError(
                f"{self.url}/{name}: expected a card with SHA-256 {card_sha256}, found {card.sha256}; "
                "it is not the model that you were told of"
            )
        target = pulled_folder() / name
        if target.exists():
            if pulled_card(name) != card:
                raise ModelFileError(
                    f"{target}: another model was pulled under this name; remove or rename that folder first"
                )
            for file in card.files:
                pulled_file(name, file)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as partial:
                self._copy(card, Path(partial) / name).rename(target)
        trust(card.files[MODEL].sha256, f"zoo://{name}")
        return target

    def _copy(self, card: LibraryCard, folder: Path) -> Path:
        """Copies an entry into a new folder, and returns it."""
        place = f"{self.url}/{card.name}"
        folder.mkdir()
        for file, record in card.files.items():
            try:
                matches = self._copy_file(self._path(card.name, file), record, folder / file)
            except FileNotFoundError:
                matches = False
            if not matches:
                raise ModelFileError(
                    f"{place}/{file}: it does not match the hash on its card; nothing was pulled. "
                    "Ask whoever keeps the library"
                )
        if ModelCard.of_file(folder / MODEL) != card.model:
            raise ModelFileError(f"{place}: the card differs from the one inside {MODEL}; nothing was pulled")
        _check_weights(folder / WEIGHTS, card.model, place)
        (folder / CARD).write_bytes(card.to_bytes())
        return folder

    def _copy_file(self, path: str, record: FileRecord, to: Path) -> bool:
        """Copies a file, not beyond its recorded size, and returns whether it matches its record."""
        digest, left = hashlib.sha256(), record.bytes
        with self._files.open(path, "rb") as source, to.open("wb") as copy:
            while left >= 0 and (block := source.read(min(_BLOCK, left + 1))):
                left -= len(block)
                digest.update(block)
                copy.write(block)
        return left == 0 and digest.hexdigest() == record.sha256

    def _claim(self, name: str) -> None:
        """Takes a name by creating its model file exclusively; of two publishers one fails here."""
        try:
            self._files.makedirs(self._path(name), exist_ok=True)
            with self._files.open(self._path(name, MODEL), "xb") as file:
                file.write(b"being published")  # an object store creates no empty object exclusively
        except FileExistsError as error:
            raise UsageError(self._taken(name)) from error
        except (OSError, NotImplementedError, ValueError) as error:
            raise UsageError(f"{self.url}: the library cannot be written to: {error}") from error

    def _taken(self, name: str) -> str:
        if self._files.exists(self._path(name, CARD)):
            return (
                f"{self.url}: {name} is there already, and others may have built on it; choose another --name"
            )
        return (
            f"{self.url}: {name} is being published, or was left unfinished; in that case remove its folder"
        )

    def _path(self, *parts: str) -> str:
        return "/".join((str(self._root).rstrip("/"), *parts))


def _check_weights(path: Path, card: ModelCard, place: str) -> None:
    """Refuses weights of another network than the card's; a hash in the same card would vouch for them."""
    from slidetl.models.backbones import read_pretrained  # imports torch
    from slidetl.models.spec import BackboneSpec

    try:
        found = read_pretrained(BackboneSpec(pretrained=str(path))).lineage[0]
    except WeightsError as error:
        raise ModelFileError(f"{place}/{WEIGHTS}: {error}; nothing was pulled") from error
    if found != card.weights_sha256:
        raise ModelFileError(
            f"{place}/{WEIGHTS}: weights with SHA-256 {found}, the card says {card.weights_sha256}; "
            "nothing was pulled. Ask whoever keeps the library"
        )


def _save_weights(path: Path, network: Any, card: ModelCard) -> None:
    """Saves the network's state under its own names, and the lineage of models built on it."""
    from safetensors.torch import save_file

    # Copies: safetensors takes no two names of one tensor.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    save_file(state, path, {"lineage": json.dumps([card.weights_sha256, *card.lineage])})
