"""The card of a model: its training, its evidence, and the input it takes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from slidetl.errors import ModelFileError, UsageError
from slidetl.evaluation.bootstrap import Interval
from slidetl.files import check_stored
from slidetl.library.fields import MAX_CARD_BYTES, check_fields, from_json, to_json
from slidetl.text import with_digits
from slidetl.tiles.grid import TileSpec

METADATA = "slidetl.json"
"""The file name of the card inside a model file, under ``_extra_files``."""

_ARCHITECTURE = {"name", "in_channels", "gated_mlp", "layer_scale", "pooling"}


@dataclass(frozen=True)
class TrainingData:
    """The training slides of a model, without their names.

    Attributes:
        slides, patients: their numbers.
        sites, scanners, stains: from the manifest, sorted.
        least_tissue_mm2: tissue of the training slide with the least of it; of volumes 0.
        fingerprint: SHA-256 over the slides' fingerprints and grades; equal for equal data.
    """

    slides: int
    patients: int
    sites: tuple[str, ...]
    scanners: tuple[str, ...]
    stains: tuple[str, ...]
    least_tissue_mm2: float
    fingerprint: str

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Evidence:
    """The grading of held-out slides, by the model or by networks of the same configuration.

    Attributes:
        slides, patients: numbers of graded ones.
        figures: name -> (estimate, low, high), the 95 % interval over patients. A metric that is the same in
            all resamples has none and is left out; files of earlier versions have it as a point.
        temperature: probabilities are raised to its inverse and rescaled to sum to one.
        coverage: share of patients with their grade in the set; it determines ``quantile``.
        quantile: a grade is in the set while the score of the set up to it is at most this; see
            :mod:`slidetl.evaluation.conformal`.
        predictions_sha256: of the predictions behind these numbers.
        arm: of the comparison whose networks graded the slides, trained with the options of the model on
            other patients; empty if the model did.
        is_alike: the networks of the arm were trained on the same tiles and scans, too; False if the
            comparison does not tell its own.
    """

    slides: int
    patients: int
    figures: Mapping[str, tuple[float, float, float]]
    temperature: float
    coverage: float
    quantile: float
    predictions_sha256: str
    arm: str = ""
    is_alike: bool = True

    @property
    def intervals(self) -> dict[str, Interval]:
        """The metrics with their intervals."""
        return {name: Interval(*figure, level=0.95) for name, figure in self.figures.items()}

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.temperature > 0 and 0 < self.coverage < 1):
            raise UsageError(
                f"expected a temperature above 0 and a coverage between 0 and 1, "
                f"not {self.temperature}, {self.coverage}"
            )


@dataclass(frozen=True)
class ModelCard:
    """The card inside a model file.

    Attributes:
        grades: names, lowest first.
        tile_spec: the tiles of the training, and of grading; of volumes their spacing and window too.
        backbone: timm's name for it, and the changes; for display.
        architecture: fields of its :class:`~slidetl.models.spec.BackboneSpec` (of an ensemble, the first):
            ``name``, and of ``in_channels``, ``gated_mlp``, ``layer_scale`` and ``pooling`` the ones without
            the default.
        normalisation: ``mean`` and ``std`` of pixel values in 0..1, of volumes of the window in 0..1; the
            network itself applies them, and the window.
        versions: of the software behind the file.
        weights_sha256: hash of the network's state, checked when the file is loaded.
        members: number of networks, which vote.
        licence: of the weights, as given at export; may be empty.
        training: the training slides, or None if exported without them.
        evidence: metrics on held-out slides, or None without any.
        novelty_limit: above this a slide is unlike the training slides; None if unknown.
        lineage: hashes of the weights it started from, nearest first; of a federation, first the files of its
            rounds, from the best back to the first.
        precisions: devices and number formats in which the export compared the file with its networks, as
            ``cuda bfloat16``; files of earlier versions have the number format alone.
        score_unit: unit of the slide's score and of the tiles' contributions to it; empty without such a sum.
    """

    grades: tuple[str, ...]
    tile_spec: TileSpec
    backbone: str
    architecture: dict[str, str | int | bool]
    normalisation: dict[str, list[float]]
    versions: dict[str, str]
    weights_sha256: str
    members: int = 1
    licence: str = ""
    training: TrainingData | None = None
    evidence: Evidence | None = None
    novelty_limit: float | None = None
    lineage: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("cpu float32",)
    score_unit: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.grades) < 2:
            raise UsageError(f"grades: expected at least two, found {self.grades!r:.100}")
        if not {"name"} <= self.architecture.keys() <= _ARCHITECTURE:
            raise UsageError(
                f"architecture: expected {sorted(_ARCHITECTURE)}, found {self.architecture!r:.200}"
            )

    def describe_test(self) -> str:
        """Describes the networks that graded the slides of the evidence, in a participle clause."""
        if self.evidence is not None and self.evidence.arm:
            arm = f"arm {self.evidence.arm} of a comparison"
            alike = "alike " if self.evidence.is_alike else ""
            return f"graded by networks trained {alike}on other patients ({arm}), not by this file"
        if self.members > 1:
            return (
                "graded by the single networks, each kept from the training of those that graded it, and not "
                "by their vote"
            )
        return "kept from the training"

    def describe_coverage(self, novelty: float | None = None) -> str:
        """Describes the wanted coverage of sets of grades; empty if unknown, as above a novelty of 1."""
        if self.evidence is None or (novelty is not None and novelty > 1):
            return ""
        share = f"{100 * self.evidence.coverage:.10g} %"
        by_others = self.evidence.arm or self.members > 1
        return (
            f"made to hold the true grade of {share} of patients like those of the evidence"
            f"{', but not tried with this file' if by_others else ''}"
        )

    @property
    def score_scale(self) -> str:
        """The range of the continuous score, with the grades at its ends if their names are other numbers."""
        last = len(self.grades) - 1
        if self.grades == tuple(map(str, range(last + 1))):
            return f"0 to {last}"
        return f"0 to {last}, where 0 is grade {self.grades[0]} and {last} grade {self.grades[-1]}"

    def describe_score(self, expected_grade: float) -> str:
        """Describes the continuous score of a slide or series, the mean of the grades by probability."""
        return f"continuous score {expected_grade:.2f} of {self.score_scale}"

    @staticmethod
    def format_novelty(novelty: float, form: str = ".2f") -> str:
        """Formats a novelty, with more digits if it would look like the limit of 1."""
        return format(novelty, with_digits(form, 1, novelty))

    def describe_novelty(self, novelty: float) -> str:
        """Describes a novelty above 1 of a slide or series, and what to check."""
        is_volume, training = self.tile_spec.is_volume, self.training
        noun, check = ("series", "scanner, contrast, organ") if is_volume else ("slides", "stain, organ")
        stains = f" (stains: {', '.join(training.stains)})" if training and training.stains else ""
        value = self.format_novelty(novelty, ".3g")
        return (
            f"unlike the {noun} that the model was trained on{stains}: its novelty is {value}, where none of "
            f"theirs is above 1; check {check} and spacing"
        )

    def doubts_about(self, novelty: float | None, tissue_mm2: float | None = None) -> tuple[str, ...]:
        """Lists the doubts about a slide or series that is unlike those of the training."""
        found = [self.describe_novelty(novelty)] if novelty is not None and novelty > 1 else []
        least = self.training.least_tissue_mm2 if self.training else 0.0
        # Equal tissue differs by the order of a float32 sum, and by the four decimals of a stored result.
        if tissue_mm2 is not None and tissue_mm2 < least * (1 - 1e-5) - 5e-5:
            form = with_digits(".3g", least, tissue_mm2)
            found.append(
                f"too little tissue: {tissue_mm2:{form}} mm2, where every slide that the model was trained "
                f"on has {least:{form}} mm2 or more"
            )
        return tuple(found)

    def to_json(self) -> str:
        """Returns the card as JSON."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverts :meth:`to_json`.

        Raises:
            ModelFileError: the text is no card of this format.
        """
        return from_json(cls, text)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Reads the card inside a model file, without running the file.

        Raises:
            ModelFileError: not a model file of slidetl, or damaged, or it would grow when it is unpacked
                (TorchScript stores everything as it is).
        """
        try:
            check_stored(path)
            with zipfile.ZipFile(path) as archive:
                card = [part for part in archive.infolist() if part.filename.endswith(f"/extra/{METADATA}")]
                if len(card) != 1 or card[0].file_size > MAX_CARD_BYTES:
                    raise ModelFileError(
                        f"{path}: not a model file of slidetl: expected one {METADATA} of at most "
                        f"{MAX_CARD_BYTES} bytes inside, found {len(card)}"
                    )
                text = archive.read(card[0]).decode()
        except ModelFileError:
            raise
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
            raise ModelFileError(f"{path}: not a model file of slidetl, or damaged: {error}") from error
        return cls.from_json(text)
