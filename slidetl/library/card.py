"""What an entry of a library says of itself: ``card.yaml``, checked by a schema, and rendered for people."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Self

from slidetl.errors import ModelFileError, UsageError
from slidetl.library.model_card import Evidence, ModelCard, TrainingData

FORMAT_VERSION = 2
MODEL, WEIGHTS = "model.pt", "weights.safetensors"
CARD, README, SUMS = "card.yaml", "README.md", "SHA256SUMS"
MAX_CARD_BYTES = 2**18  # a card has 2 kB

_MAX_DEPTH = 10  # a card has five levels
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


@dataclass(frozen=True)
class FileRecord:
    """One file of an entry.

    Attributes:
        bytes: its size.
        sha256: of the whole file, hexadecimal.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ZooCard:
    """What an entry says of itself. Every text is one line.

    Attributes:
        name: of the entry, e.g. ``lung-fibrosis-2``.
        model: what the exported file says of itself.
        files: ``model.pt`` and ``weights.safetensors``.
        description, intended_use, contact: in the publisher's words; empty where nothing was said.
    """

    name: str
    model: ModelCard
    files: Mapping[str, FileRecord]
    description: str = ""
    intended_use: str = ""
    contact: str = ""

    def to_yaml(self) -> str:
        """The card as it stands in the library.

        Raises:
            ModelFileError: a value is not what the schema asks for, e.g. a text of several lines.
        """
        import yaml

        values = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "description": self.description,
            "intended_use": self.intended_use,
            "contact": self.contact,
            "files": {name: asdict(record) for name, record in self.files.items()},
            "model": self.model.to_dict(),
        }
        _check_schema(values)
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Inverse of :meth:`to_yaml`; of a stranger's text.

        Raises:
            ModelFileError: it says something else.
        """
        import yaml

        try:
            grows = _grows(text)
            values: Any = None if grows else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelFileError(f"not the card of a model: not YAML that can be read: {reason}") from error
        if grows:
            raise ModelFileError("not the card of a model: it has YAML aliases, or is deeply nested")
        _check_schema(values)
        try:
            name = check_name(values["name"])
        except UsageError as error:
            raise ModelFileError(f"not the card of a model: {error}") from error
        return cls(
            name=name,
            model=ModelCard.from_dict(values["model"]),
            files={file: FileRecord(**record) for file, record in values["files"].items()},
            description=values["description"],
            intended_use=values["intended_use"],
            contact=values["contact"],
        )

    def to_markdown(self) -> str:
        """The card for people."""
        model, spec = self.model, self.model.tile_spec
        networks = f"{model.members} networks that vote" if model.members > 1 else "1 network"
        lines = [
            f"# {self.name}",
            "",
            _said(self.description, "Nobody has described this model."),
            "",
            f"**Intended use.** {_said(self.intended_use, 'Nothing was said.')} "
            "For research; not a medical device.",
            "",
            *_table(
                ("Grades", _list(model.grades)),
                ("Backbone", f"`{_said(model.backbone)}`, {networks}"),
                ("Tiles", f"{spec.tile_size_px} x {spec.tile_size_px} px at {spec.mpp:g} µm per pixel"),
                ("Licence", _said(model.licence, "nothing was said; ask before you use it")),
                ("Contact", _said(self.contact, "none given")),
            ),
            "",
            "## How well it does",
            "",
            *_describe_evidence(model.evidence),
            "",
            "## What it was trained on",
            "",
            *_describe_training(model.training),
            "",
            "## Where its weights come from",
            "",
            *_describe_lineage(model),
            "",
            "## Use",
            "",
            "```",
            f"slidetl zoo pull {self.name} --from LIBRARY",
            f"slidetl zoo use {self.name}",
            "```",
            "",
            "As the start of the next training, in the configuration of `slidetl fit`"
            + (", the first of the networks:" if model.members > 1 else ":"),
            "",
            "```yaml",
            *self.pretrained_lines(),
            "```",
            "",
            "## Files",
            "",
            "| file | MB | SHA-256 |",
            "|---|---:|---|",
            *(f"| {name} | {file.bytes / 1e6:.1f} | `{file.sha256}` |" for name, file in self.files.items()),
            "",
            f"`sha256sum -c {SUMS}` checks them without slidetl. `{MODEL}` is TorchScript, a program; "
            f"`{WEIGHTS}` holds the same weights, and nothing that runs. Made with "
            f"{_list(f'{name} {version}' for name, version in sorted(model.versions.items()))}.",
            "",
        ]
        return "\n".join(lines)

    def pretrained_lines(self) -> list[str]:
        """The lines of a fit's YAML that begin from these weights."""
        import yaml

        source = {**self.model.architecture, "pretrained": f"zoo://{self.name}"}
        text: str = yaml.safe_dump({"model": {"backbone": source}}, sort_keys=False, width=math.inf)
        return text.splitlines()


def check_name(name: str) -> str:
    """Returns the name of an entry as it is, if it is one; it becomes the name of a folder.

    Raises:
        UsageError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "a model is named by small letters, digits, '.', '_' and '-', the first a letter or digit, "
            f"e.g. lung-fibrosis-2, not {name!r}"
        )
    return name


def write_sums(digests: Mapping[str, str]) -> str:
    """The text of ``SHA256SUMS``, as ``sha256sum -c`` reads it, from hashes by file."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def read_sums(text: str) -> dict[str, str]:
    """Inverse of :func:`write_sums`; lines of another form are left out."""
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, re.MULTILINE)}


def _grows(text: str) -> bool:
    """Whether a YAML text, read, is much more than it is: by aliases of aliases, or by its depth."""
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            return True
    return False


@functools.cache
def _schema() -> Any:
    import jsonschema

    text = files("slidetl.library").joinpath("card.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _check_schema(values: Any) -> None:
    from jsonschema.exceptions import best_match

    error = best_match(_schema().iter_errors(values))
    if error is not None:
        place = ".".join(str(part) for part in error.absolute_path) or "the whole"
        raise ModelFileError(f"not the card of a model: {place}: {_short(error.message)}")


def _short(message: str) -> str:
    """The message of the validator shows the value, which may be long or hold control characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in message)
    return line if len(line) <= 200 else f"{line[:120]} ... {line[-60:]}"


def _describe_evidence(evidence: Evidence | None) -> list[str]:
    if evidence is None:
        return [
            "Nobody has shown it: the file was exported without predictions of slides kept from the training."
        ]
    return [
        f"On {evidence.slides} slides of {evidence.patients} patients that were kept from the training; "
        "intervals of 95 % over patients.",
        "",
        "| figure | estimate | interval |",
        "|---|---:|---|",
        *(
            f"| {_said(name)} | {estimate:.3f} | {low:.3f} to {high:.3f} |"
            for name, (estimate, low, high) in evidence.figures.items()
        ),
        "",
        f"Probabilities are calibrated with temperature {evidence.temperature:.3g}. Sets of grades are made "
        f"to hold the true grade of {evidence.coverage:.0%} of patients.",
    ]


def _describe_training(training: TrainingData | None) -> list[str]:
    if training is None:
        return [
            "Not known: the file was exported without its training slides, and cannot tell others from them."
        ]
    return [
        f"{training.slides} slides of {training.patients} patients, each with at least "
        f"{training.least_tissue_mm2:.2g} mm² of tissue.",
        "",
        *_table(
            ("Sites", _list(training.sites) or "not named"),
            ("Scanners", _list(training.scanners) or "not named"),
            ("Stains", _list(training.stains) or "not named"),
            ("Fingerprint of the data", f"`{_said(training.fingerprint)}`"),
        ),
    ]


def _describe_lineage(model: ModelCard) -> list[str]:
    known = [f"{number}. `{sha256}`" for number, sha256 in enumerate(model.lineage, start=1)]
    return [
        f"The weights have SHA-256 `{model.weights_sha256}`. "
        + (
            "The training began from these, nearest first:" if known else "What they began from is not known."
        ),
        *(["", *known] if known else []),
    ]


def _table(*rows: tuple[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]


def _list(texts: Iterable[str]) -> str:
    return ", ".join(_said(text) for text in texts)


def _said(text: str, otherwise: str = "") -> str:
    """A stranger's text in Markdown: no HTML, no link, no picture, no end of the table's cell."""
    return re.sub(r"([\\`|\[\]!])", r"\\\1", text.replace("<", "&lt;")) or otherwise
