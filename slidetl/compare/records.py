"""Records of a comparison: a job, what it found, and a point of its learning curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.plan import Unit
from slidetl.data.manifest import ManifestRow
from slidetl.data.study import CachedSlide, check_identity
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.training.predictions import SlidePrediction


@dataclass(frozen=True)
class Job:
    """A unit with all that a process needs to compute it, wherever it runs.

    Attributes:
        unit: what is computed.
        rows: of the manifest, of the slides in its fold.
        fingerprints: SHA-256 of the slides whose tiles these were when the study was read, by slide.
        cache: the folder of the tile caches.
        grades: names, lowest first.
        folder: where units lie.
        threads: to compute with.
        allow: names outside slidetl that its configuration may import.
    """

    unit: Unit
    rows: tuple[ManifestRow, ...]
    fingerprints: Mapping[str, str]
    cache: Path
    grades: tuple[str, ...]
    folder: Path
    threads: int = 1
    allow: tuple[str, ...] = ()

    def part(self, slides: Iterable[str]) -> list[ManifestRow]:
        """The rows of some slides, in their order."""
        wanted = set(slides)
        return [row for row in self.rows if row.slide_id in wanted]

    def slides(self, names: Iterable[str]) -> tuple[CachedSlide, ...]:
        """Opens some slides, in the order of the rows."""
        return tuple(
            CachedSlide(row, cache) for row, cache in zip(self.part(names), self.open(names), strict=True)
        )

    def open(self, slides: Iterable[str]) -> list[SlideCache]:
        """Opens the tiles of some slides, in the order of the rows.

        Raises:
            CacheMissingError: a cache is gone.
            CacheMismatchError: a cache was replaced since the study was read.
        """
        caches = [SlideCache.open(cache_path(self.cache, row.slide_id)) for row in self.part(slides)]
        for row, cache in zip(self.part(slides), caches, strict=True):
            check_identity(cache, row.slide_id, self.fingerprints[row.slide_id], "the study that was read")
        return caches


@dataclass(frozen=True)
class CurvePoint:
    """A point of a learning curve.

    Attributes:
        part: what was predicted: ``inner-0``, ... or ``test``. That of the test part is for looking at: it
            chooses nothing.
        trial: which combination of the arm's choices, from 0.
        epoch: epochs done.
        n: results of the part: its patients or slides, as the protocol's unit says.
        seconds: spent on training them, without the evaluations between.
        train_loss: of the last epoch, penalties included.
        accuracy, qwk, rps, log_loss: of these results, not calibrated.
    """

    part: str
    trial: int
    epoch: int
    n: int
    seconds: float
    train_loss: float
    accuracy: float
    qwk: float
    rps: float
    log_loss: float


@dataclass(frozen=True)
class UnitResult:
    """The result of a unit.

    Attributes:
        predictions: of the slides of its test part, not calibrated.
        curves: empty for arms without epochs.
        draws: expected grades of each test slide by tiles drawn from it anew, as many as it has, calibrated
            by ``temperature``; empty where there were none.
        drift: ``||w - w0|| / ||w0||`` of each layer, w0 being its pretrained weights; empty for arms without.
        similarity: linear CKA of what each block makes of test tiles before and after training; empty for
            arms without epochs.
        chosen: what the inner folds chose: dotted names, and ``epochs``; or the fixed number of epochs.
        temperature: by which the inner folds would calibrate the probabilities; 1 where there are none.
        nested: whether the inner folds chose.
        seconds: that it took.
        embeddings: ``[n, D]`` of the slides of the training part, then of the test part, as the trained
            network pools them; empty for arms without one, and where all slides are of one site.
    """

    predictions: tuple[SlidePrediction, ...]
    curves: tuple[CurvePoint, ...] = ()
    draws: Mapping[str, Sequence[float]] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    similarity: Mapping[str, float] = field(default_factory=dict)
    chosen: dict[str, Any] | None = None
    temperature: float = 1.0
    nested: bool = False
    seconds: float = 0.0
    embeddings: NDArray[np.float32] = field(
        default_factory=lambda: np.empty((0, 0), np.float32), compare=False
    )


def predictions_from(rows: Iterable[Mapping[str, Any]]) -> tuple[SlidePrediction, ...]:
    """Makes predictions of their fields, as JSON has them."""
    return tuple(SlidePrediction(**{**row, "probabilities": tuple(row["probabilities"])}) for row in rows)


def predictions_of(rows: Sequence[ManifestRow], tiles: Sequence[int], probabilities: Any) -> list[Any]:
    """Probabilities ``[n, K]`` of slides, with whose they are."""
    return [
        SlidePrediction(
            slide_id=row.slide_id,
            patient_id=row.patient_id,
            grade=row.grade,
            probabilities=tuple(np.asarray(values, np.float64).tolist()),
            tiles=n_tiles,
            site=row.site,
        )
        for row, n_tiles, values in zip(rows, tiles, probabilities, strict=True)
    ]
