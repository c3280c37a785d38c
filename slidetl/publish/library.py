"""Publishing models to a library, and pulling them from it: a folder, or anything that fsspec reaches."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slidetl.errors import ModelFileError, UsageError
from slidetl.library.card import (
    CARD,
    MAX_CARD_BYTES,
    MODEL,
    README,
    SUMS,
    WEIGHTS,
    FileRecord,
    ZooCard,
    check_name,
    read_sums,
    write_sums,
)
from slidetl.library.local import checked_card, file_sha256, pulled_file, pulled_folder
from slidetl.library.model_card import ModelCard
from slidetl.library.trust import trust

_BLOCK = 2**20


@dataclass(frozen=True)
class Entry:
    """A model in a library.

    Attributes:
        card: what it says of itself.
        card_sha256: of the file ``card.yaml``. The card names the hashes of all else: who has this one from
            the publisher can check the whole entry.
    """

    card: ZooCard
    card_sha256: str


class Library:
    """Models in folders of their names.

    An entry is ``card.yaml``, ``model.pt``, ``weights.safetensors``, ``README.md`` and ``SHA256SUMS``, which
    is written last: without it an entry is not there.

    Args:
        url: a folder, or what fsspec takes: ``file:///shared/zoo``, ``s3://bucket/zoo``, ``memory://zoo``.

    Raises:
        UsageError: nothing here can reach such a place.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        try:
            self._files, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: expected a folder or a URL that fsspec reaches: {error}") from error

    def names(self) -> list[str]:
        """The models in it, sorted.

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
        return sorted(name for name in names if self._files.exists(self._path(name, SUMS)))

    def read(self, name: str) -> Entry:
        """Reads a card.

        Raises:
            UsageError: that cannot be a name.
            ModelFileError: there is no such model, or its card is damaged.
        """
        check_name(name)
        try:
            sums = read_sums(self._read(name, SUMS).decode(errors="replace"))
            content = self._read(name, CARD)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ModelFileError(
                f"{self.url}: no model {name!r} here; there are: {', '.join(self.names()) or 'none'}"
            ) from error
        card = checked_card(content, sums, name, f"{self.url}/{name}")
        return Entry(card, hashlib.sha256(content).hexdigest())

    def publish(
        self,
        model_file: Path,
        name: str,
        description: str = "",
        intended_use: str = "",
        contact: str = "",
        trusted: bool = False,
    ) -> Entry:
        """Adds a model. Nothing that is there is ever replaced: others may have built on it.

        Args:
            model_file: that 'slidetl export' wrote; it is loaded, that is, run.
            name: of the new entry.
            description: for the card, one line: what the model does.
            intended_use: what for, and what not.
            contact: whom to ask.
            trusted: vouch for the file, if it was not exported here.

        Raises:
            UsageError: the name is taken or cannot be one, or the library cannot be written to.
            ModelFileError: not an exported model, or not trusted.
        """
        from slidetl.publish.model_file import load_model  # torch: only those who publish wait for it

        check_name(name)
        if self._files.exists(self._path(name)):
            raise UsageError(self._taken(name))
        model = load_model(model_file, trusted=trusted)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / WEIGHTS
            _save_weights(weights, model.network, model.card)
            parts = {MODEL: model_file, WEIGHTS: weights}
            card = ZooCard(
                name=name,
                model=model.card,
                files={
                    file: FileRecord(path.stat().st_size, file_sha256(path)) for file, path in parts.items()
                },
                description=description,
                intended_use=intended_use,
                contact=contact,
            )
            if card.files[MODEL].sha256 != model.sha256:
                raise ModelFileError(f"{model_file}: it was changed while it was read; publish it again")
            texts = {CARD: card.to_yaml().encode(), README: card.to_markdown().encode()}
            sums = {file: record.sha256 for file, record in card.files.items()}
            sums |= {file: hashlib.sha256(text).hexdigest() for file, text in texts.items()}
            with self._new_entry(name, texts[CARD]):
                for file, path in parts.items():
                    self._files.put_file(str(path), self._path(name, file))
                self._files.pipe_file(self._path(name, README), texts[README])
                self._files.pipe_file(self._path(name, SUMS), write_sums(sums).encode())
        return Entry(card, sums[CARD])

    def pull(self, name: str, card_sha256: str | None = None) -> Path:
        """Copies a model to this machine, checks every byte, and records its model file as trusted.

        Args:
            name: of the model.
            card_sha256: of its card, as its publisher told it by another way; None takes what is there.

        Returns:
            The folder, ``$SLIDETL_HOME/zoo/NAME``, with the same files as the entry. It appears whole or not
            at all. A model that is there already is checked, and not copied again.

        Raises:
            UsageError: that cannot be a name.
            ModelFileError: there is no such model, it is not what its card or ``card_sha256`` says, or
                another model of that name was pulled before.
        """
        entry = self.read(name)
        if card_sha256 is not None and entry.card_sha256 != card_sha256.lower():
            raise ModelFileError(
                f"{self.url}/{name}: expected a card with SHA-256 {card_sha256}, found {entry.card_sha256}; "
                "it is not the model that you were told of"
            )
        target = pulled_folder() / name
        if target.exists():
            if Library(str(pulled_folder())).read(name).card_sha256 != entry.card_sha256:
                raise ModelFileError(
                    f"{target}: another model was pulled under this name; remove or rename that folder first"
                )
            for file in entry.card.files:
                pulled_file(name, file)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{name}.{os.getpid()}.partial")
            try:
                partial.mkdir()
                self._copy(entry, partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        trust(entry.card.files[MODEL].sha256, f"zoo://{name}")
        return target

    def _copy(self, entry: Entry, folder: Path) -> None:
        card = entry.card
        for file, record in card.files.items():
            try:
                matches = self._copy_file(card.name, file, record, folder / file)
            except FileNotFoundError:
                matches = False
            if not matches:
                raise ModelFileError(
                    f"{self.url}/{card.name}/{file}: it does not match the hash on its card; nothing was "
                    "pulled. Ask whoever keeps the library"
                )
        if _card_inside(folder / MODEL).to_dict() != card.model.to_dict():
            raise ModelFileError(
                f"{self.url}/{card.name}: the card says other things than the model file; nothing was pulled"
            )
        content = self._read(card.name, CARD)
        if hashlib.sha256(content).hexdigest() != entry.card_sha256:
            raise ModelFileError(f"{self.url}/{card.name}: the card was changed meanwhile; pull it again")
        (folder / CARD).write_bytes(content)
        # Rendered here: then what people read is what was checked.
        readme = card.to_markdown().encode()
        (folder / README).write_bytes(readme)
        sums = {file: record.sha256 for file, record in card.files.items()}
        sums |= {CARD: entry.card_sha256, README: hashlib.sha256(readme).hexdigest()}
        (folder / SUMS).write_text(write_sums(sums), encoding="utf-8")

    def _copy_file(self, name: str, file: str, record: FileRecord, to: Path) -> bool:
        """Copies a file; returns whether it is what its record says. One without an end is not read to it."""
        digest, left = hashlib.sha256(), record.bytes
        with self._open(name, file) as source, to.open("wb") as copy:
            while left >= 0 and (block := source.read(min(_BLOCK, left + 1))):
                left -= len(block)
                digest.update(block)
                copy.write(block)
        return left == 0 and digest.hexdigest() == record.sha256

    @contextlib.contextmanager
    def _new_entry(self, name: str, card: bytes) -> Iterator[None]:
        """Takes a name by creating its card, and gives it back if the rest cannot be written."""
        try:
            self._files.makedirs(self._path(name), exist_ok=True)
            with self._files.open(self._path(name, CARD), "xb") as file:  # of two publishers one fails here
                file.write(card)
        except FileExistsError as error:
            raise UsageError(self._taken(name)) from error
        except (OSError, NotImplementedError, ValueError) as error:
            raise UsageError(f"{self.url}: the library cannot be written to: {error}") from error
        try:
            yield
        except BaseException as error:  # an interrupt too must leave the name free
            with contextlib.suppress(OSError):
                self._files.rm(self._path(name), recursive=True)
            if isinstance(error, OSError):
                raise UsageError(f"{self.url}: the library cannot be written to: {error}") from error
            raise

    def _taken(self, name: str) -> str:
        if self._files.exists(self._path(name, SUMS)):
            return (
                f"{self.url}: {name} is there already, and others may have built on it; choose another --name"
            )
        return (
            f"{self.url}: {name} is being published, or was left unfinished; in that case remove its folder"
        )

    def _read(self, name: str, file: str) -> bytes:
        with self._open(name, file) as source:
            content: bytes = source.read(MAX_CARD_BYTES + 1)
        return content

    def _open(self, name: str, file: str) -> IO[bytes]:
        opened: IO[bytes] = self._files.open(self._path(name, file), "rb")
        return opened

    def _path(self, *parts: str) -> str:
        return "/".join((str(self._root).rstrip("/"), *parts))


def _save_weights(path: Path, network: Any, card: ModelCard) -> None:
    """The network's state under its own names, and the :attr:`ModelCard.lineage` of what is built on it."""
    from safetensors.torch import save_file

    # Copies: safetensors takes no two names of one tensor.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    save_file(state, path, {"lineage": json.dumps([card.weights_sha256, *card.lineage])})


def _card_inside(path: Path) -> ModelCard:
    """What a model file says of itself, without running it.

    Raises:
        ModelFileError: it is no model file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/extra/slidetl.json"))
            if archive.getinfo(name).file_size > MAX_CARD_BYTES:
                raise ModelFileError(f"{path.name}: its metadata have more than {MAX_CARD_BYTES} bytes")
            return ModelCard.from_json(archive.read(name).decode())
    except (zipfile.BadZipFile, StopIteration, UnicodeDecodeError, NotImplementedError) as error:
        raise ModelFileError(f"{path.name}: not a model file of slidetl, or damaged") from error
