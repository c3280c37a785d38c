"""Classical graders on stored features, scored on the test part as by ``slidetl test``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.data.manifest import ManifestRow, check_scale
from slidetl.data.record import StudyRecord, ancestors
from slidetl.data.study import CachedSlide, read_study, warn_of_unused
from slidetl.data.tasks import LabelledPoints, read_points
from slidetl.errors import UsageError
from slidetl.evaluation.calibration import judged_probabilities
from slidetl.evaluation.classical import (
    MODELS,
    ClassicalModel,
    Pool,
    fit_grader,
    fit_tile_grader,
    pool_tiles,
    save_grader,
)
from slidetl.evaluation.metrics import GradeMetrics, grade_metrics
from slidetl.files import check_writable
from slidetl.models.spec import BackboneSpec
from slidetl.status import show_metrics, show_stage
from slidetl.tiles.features import FeatureSource, common_source, read_features
from slidetl.tiles.store import SlideCache
from slidetl.training.options import FeatureStudy
from slidetl.training.predictions import (
    SlidePrediction,
    describe_metrics,
    write_metrics,
    write_predictions,
)

_KEEP_APART = (
    "put them into the training part by the manifest's column 'split', or take features of other weights"
)


@dataclass(frozen=True)
class Scored:
    """The scores of the test part.

    Attributes:
        metrics: of its grades.
        intervals: accuracy, log loss and AUROCs over patients,
            :func:`~slidetl.evaluation.metrics.patient_intervals`.
    """

    metrics: GradeMetrics
    intervals: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class _Parts:
    train: tuple[CachedSlide, ...]
    test: tuple[CachedSlide, ...]
    record: StudyRecord
    manifest: tuple[ManifestRow, ...]
    sources: tuple[FeatureSource, ...]


def _parts(study: FeatureStudy, pretrained: str = "") -> _Parts:
    """Returns the training slides (train and val), the test slides, and the networks of their features.

    Patients that the network of the features was trained on keep their parts.

    Args:
        study: slides and features.
        pretrained: weights of the features' network, for their record where the features have none.

    Raises:
        CacheMismatchError: the features come from different networks.
        UsageError: the test part is empty, the network was trained on it, or the training part lacks a grade.
        SlidetlError: as :func:`~slidetl.data.study.read_study` and its ``parts``.
    """
    check_scale(study.grades)
    whole = read_study(study.manifest, study.cache, study.grades)
    parts = whole.parts(val_fraction=study.val_fraction, test_fraction=study.test_fraction, seed=study.seed)
    sources = tuple(common_source(name, [slide.cache for slide in whole.graded]) for name in study.names)
    origins = []
    if pretrained:
        from slidetl.training.grader import record_behind  # imported here: torch takes seconds

        origins = [record_behind(BackboneSpec(name=sources[0].backbone, pretrained=pretrained))]
    past = ancestors(whole.folder, origins, sources)
    parts = past.keep_parts(parts)
    train, test = (*parts["train"], *parts["val"]), parts["test"]
    past.refuse_seen({"test": test, "predict": whole.slides}, "the network of the features was", _KEEP_APART)
    if not test:
        raise UsageError("the test part has no slide; set --test-fraction or the manifest's 'split'")
    absent = [name for grade, name in enumerate(study.grades) if grade not in _grades(train)]
    if absent:
        raise UsageError(
            f"no training slide has grade {', '.join(absent)}; add some, choose another --seed, or merge "
            "grades"
        )
    by_part = {"train": train, "val": (), "test": test, "predict": whole.slides}
    record = StudyRecord.of(by_part, before=past.used)
    return _Parts(train, test, record, whole.manifest, sources)


def _features(
    study: FeatureStudy, sources: Sequence[FeatureSource], cache: SlideCache
) -> NDArray[np.float64]:
    """Reads the named features of a slide's tiles, joined: ``[N, D]``.

    Raises:
        CacheMismatchError: they are of another network than the source; they were replaced.
    """
    named = zip(study.names, sources, strict=True)
    arrays = [read_features(cache, name, identity=source.identity) for name, source in named]
    return np.concatenate(arrays, axis=1).astype(np.float64)


def fit_pooled(
    study: FeatureStudy,
    output: Path,
    model: ClassicalModel = "ridge",
    pool: Pool = "mean",
    k: int = 10,
    pretrained: str = "",
) -> Scored:
    """Fits a classical model on pooled features, and grades the test part.

    Args:
        study: slides and features.
        output: the folder for ``predictions.csv``, ``metrics.json``, ``confusion.png``, and ``model.npz``
            if the model is linear.
        model: one of :data:`~slidetl.evaluation.classical.MODELS`.
        pool: pooling of a slide's tiles to one vector, :func:`~slidetl.evaluation.classical.pool_tiles`.
        k: number of tiles of ``top-k``.
        pretrained: weights of the features' network, as for ``slidetl embed``; a ridge on the mean of all
            tiles is then written as a checkpoint too, ``checkpoints/ridge.ckpt``, for ``slidetl export``.

    Returns:
        The metrics of the test part, and their intervals.

    Raises:
        UsageError: the model is unknown, the training part cannot be fitted, or the model is no network.
        SlidetlError: the study cannot be read, or its parts cannot be fitted.
    """
    if model not in MODELS:
        raise UsageError(f"--model must be one of {', '.join(MODELS)}, not {model!r}")
    if pretrained and (model != "ridge" or pool != "mean" or len(study.names) != 1):
        raise UsageError("--pretrained takes --model ridge, --pool mean and one name of --features")
    parts = _parts(study, pretrained)
    train, test = parts.train, parts.test
    check_writable(output / "predictions.csv")
    pooled = []
    for number, slide in enumerate((*train, *test)):
        show_stage("reading features", number, len(train) + len(test), "slides")
        pooled.append(pool_tiles(_features(study, parts.sources, slide.cache), pool, k))
    x, x_test = np.stack(pooled[: len(train)]), np.stack(pooled[len(train) :])
    show_stage("fitting", 0, None, "")
    grader = fit_grader(model, x, _grades(train), _patients(train), len(study.grades), seed=study.seed)
    probabilities = grader.probabilities(x_test)
    network = None
    if pretrained:
        from slidetl.training.ridge import build_ridge, write_ridge  # imported here: it builds networks

        source, spec = parts.sources[0], train[0].cache.spec
        network = build_ridge(study, grader, source, pretrained, spec, parts.record, x_test)
    _remove_results(output)
    checkpoint = write_ridge(output, *network) if network else ""
    if model != "trees":  # saving them needs pickle
        save_grader(output / "model.npz", grader)
    return _write(study, test, probabilities, output, checkpoint)


def fit_labelled_tiles(study: FeatureStudy, output: Path, labels: Path) -> Scored:
    """Fits a tile classifier on the labelled tiles of the training part, and grades the test part by it.

    Args:
        study: slides and features.
        output: the folder for ``predictions.csv``, ``metrics.json`` and ``confusion.png``.
        labels: a table of :func:`~slidetl.data.tasks.read_points` with a column ``slide_id``; a label is a
            number, or ``ignore`` for irrelevant tissue. Only labels of training slides are used.

    Raises:
        ManifestError: the labels cannot be read.
        UsageError: the points of a slide lie outside its tiles, or all labels are equal.
        SlidetlError: as :func:`fit_pooled`.
    """
    parts = _parts(study)
    train, test = parts.train, parts.test
    check_writable(output / "predictions.csv")
    tables = read_points(labels)
    if "" in tables:
        raise UsageError(f"{labels}: expected a column slide_id with a slide in each line")
    warn_of_unused(labels, tables, (row.slide_id for row in parts.manifest))
    of_tiles = [_tile_labels(slide, tables) for slide in train]
    known = np.unique(np.concatenate(of_tiles))
    known = known[~np.isnan(known)]
    if len(known) < 2:
        raise UsageError(
            f"{labels}: the training part's tiles need at least two different labels, not {known.tolist()}"
        )
    grader = fit_tile_grader(
        lambda number: _features(study, parts.sources, train[number].cache),
        [np.where(np.isnan(found), -1, np.searchsorted(known, found)) for found in of_tiles],
        np.where(np.isinf(known), 0.0, known).tolist(),
        np.isinf(known).tolist(),
        _grades(train),
        _patients(train),
        len(study.grades),
        seed=study.seed,
    )
    probabilities = grader.probabilities(_features(study, parts.sources, slide.cache) for slide in test)
    _remove_results(output)
    return _write(study, test, probabilities, output)


def _tile_labels(slide: CachedSlide, tables: Mapping[str, LabelledPoints]) -> NDArray[np.float64]:
    """Returns the label of each tile, ``[N]``, NaN if unlabelled."""
    points = tables.get(slide.row.slide_id)
    if points is None:
        return np.full(len(slide.cache), np.nan)
    found = points.of_tiles(slide.cache.origins_level0, slide.cache.extent_level0)
    if np.isnan(found).all():
        raise UsageError(
            f"tile labels: none of the {len(points.labels)} points of {slide.row.slide_id} lies in a tile of "
            f"the cache, first {tuple(points.xy_level0[0].tolist())}; expected level-0 pixels, such as "
            f"{tuple(slide.cache.origins_level0[0].tolist())}"
        )
    return found


def _grades(slides: Sequence[CachedSlide]) -> list[int]:
    return [slide.row.grade for slide in slides if slide.row.grade is not None]


def _patients(slides: Sequence[CachedSlide]) -> list[str]:
    return [slide.row.patient_id for slide in slides]


def _remove_results(output: Path) -> None:
    """Removes the files of an earlier run, so that none lies beside those of another model."""
    names = ["metrics.json", "predictions.csv", "confusion.png", "model.npz", "checkpoints/ridge.ckpt"]
    if (output / names[-1]).is_file():  # else the configuration is not ours
        names.insert(1, "config.yaml")
    for name in names:
        (output / name).unlink(missing_ok=True)


def _write(
    study: FeatureStudy,
    test: Sequence[CachedSlide],
    probabilities: NDArray[np.float64],
    output: Path,
    checkpoint: str = "",
) -> Scored:
    predictions = [
        SlidePrediction(
            slide_id=slide.row.slide_id,
            patient_id=slide.row.patient_id,
            grade=slide.row.grade,
            probabilities=tuple(row.tolist()),
            tiles=len(slide.cache),
            site=slide.row.site,
            checkpoint=checkpoint,
            fingerprint=slide.cache.fingerprint,
        )
        for slide, row in zip(test, probabilities, strict=True)
    ]
    true = _grades(test)
    metrics = grade_metrics(true, [row.predicted_grade for row in predictions], len(study.grades))
    write_predictions(output / "predictions.csv", predictions)
    quality = judged_probabilities(true, probabilities)
    figures = write_metrics(
        output, predictions, metrics, quality, study.grades, manifest=Path(study.manifest)
    )
    show_metrics({"test/accuracy": metrics.accuracy, "test/qwk": metrics.qwk, "test/mae": metrics.mae})
    return Scored(metrics, figures["intervals"])


def describe(scored: Scored, grades: tuple[str, ...]) -> str:
    """Formats the metrics, the confusion matrix and the intervals as text."""
    return describe_metrics(scored.metrics, grades, intervals=scored.intervals)
