"""Describes the training data of a model in numbers, to detect unfamiliar slides later."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from slidetl.analysis.novelty import Familiar, fit_familiar
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.record import StudyRecord, config_sha256
from slidetl.data.study import CachedSlide, Study, common_spec, read_study
from slidetl.errors import CacheMismatchError, CheckpointError, UsageError
from slidetl.evaluation.metrics import told_apart
from slidetl.files import read_yaml
from slidetl.library.model_card import TrainingData
from slidetl.models.precision import chosen_device, exact_float32
from slidetl.models.runner import Runner
from slidetl.status import show_stage
from slidetl.tiles.store import describe_difference
from slidetl.training.evaluation import SAME_FOR_ALL
from slidetl.training.grader import SlideGrader
from slidetl.training.slots import parse


def training_studies(
    configs: Sequence[Path], graders: Sequence[SlideGrader], allow: Sequence[str] = ()
) -> tuple[Study, ...]:
    """Reads the study of each checkpoint, as it is today.

    Args:
        configs: ``config.yaml`` of each fit, as Lightning keeps it beside the logs, or one for all; they say
            where the slides are.
        graders: of the checkpoints.
        allow: names outside slidetl that the configurations may import.

    Raises:
        UsageError: no such configuration, or it is that of another training.
        CheckpointError: a checkpoint has no record of its slides.
        CacheMismatchError: the slides are tiled otherwise than for a checkpoint.
        SlidetlError: the manifest or the cache is not there any more.
    """
    if len(configs) not in (1, len(graders)):
        raise UsageError(f"expected one configuration, or one for each of {len(graders)} checkpoints")
    studies = []
    for number, grader in enumerate(graders):
        if grader.record is None:
            raise CheckpointError("a checkpoint of an older version does not say which")
        data = _data_module(configs[number % len(configs)], grader.record, allow)
        study = read_study(data.manifest, data.cache, data.grades, data.tasks)
        tiled = common_spec(study.caches)
        if grader.tile_spec is not None and grader.tile_spec != tiled:
            difference = describe_difference(tiled, grader.tile_spec)
            raise CacheMismatchError(
                f"{data.cache}: {difference} by the checkpoint; use its cache, or tile them again as then"
            )
        studies.append(study)
    return tuple(studies)


def training_slides(studies: Sequence[Study], graders: Sequence[SlideGrader]) -> tuple[CachedSlide, ...]:
    """Lists the training slides of checkpoints, each once, in the order of their identifiers.

    Raises:
        CheckpointError: a slide that a checkpoint was trained on is not as it was.
    """
    slides: dict[str, CachedSlide] = {}
    for study, grader in zip(studies, graders, strict=True):
        assert grader.record is not None  # from training_studies
        slides |= {slide.row.slide_id: slide for slide in grader.record.find(study, "train")}
    return tuple(slides[slide_id] for slide_id in sorted(slides))


def describe_training(slides: Sequence[CachedSlide]) -> TrainingData:
    """Counts the training slides, and computes their common fingerprint; warns of parts of slides."""
    digest = hashlib.sha256()
    for fingerprint, grade in sorted((slide.cache.fingerprint, slide.row.grade) for slide in slides):
        digest.update(f"{fingerprint} {grade}\n".encode())
    if confined := sum(bool(slide.cache.header.regions) for slide in slides):
        warnings.warn(
            f"{confined} of {len(slides)} training slides have tiles of --regions only, and 'slidetl grade' "
            "takes all tissue of a slide: compare grades of whole slides before you rely on them",
            stacklevel=2,
        )
    if placed := sum(slide.cache.header.location_mm is not None for slide in slides):
        warnings.warn(
            f"{placed} of {len(slides)} training slides are patches around places in a series, and 'slidetl "
            "grade' takes whole series: compare grades of whole series before you rely on them",
            stacklevel=2,
        )
    rows = [slide.row for slide in slides]
    return TrainingData(
        slides=len(slides),
        patients=len({row.patient_id for row in rows}),
        sites=tuple(sorted({row.site for row in rows} - {""})),
        scanners=tuple(sorted({row.scanner for row in rows} - {""})),
        stains=tuple(sorted({row.stain for row in rows} - {""})),
        least_tissue_mm2=min(_tissue_mm2(slide) for slide in slides),
        fingerprint=digest.hexdigest(),
    )


def learn_familiar(network: Any, slides: Sequence[CachedSlide], tiles_per_slide: int = 64) -> Familiar:
    """Embeds some tiles of each training slide, evenly spread over it, and describes their means.

    Later they are compared with means of whole slides, which spread a little less: the limit is generous.
    They are embedded in float32 on a GPU where there is one.

    Args:
        network: with ``embed``, as :class:`slidetl.publish.export.ExportedNetwork`; it ends on the CPU.
        slides: the training slides.
        tiles_per_slide: tiles of each.

    Raises:
        UsageError: slides of fewer than five patients, or a network that does not tell slides apart.
    """
    place = chosen_device()

    def embed(tiles: Tensor) -> Tensor:
        with exact_float32(place):
            rows: Tensor = network.embed(tiles)
        return rows

    def read() -> Iterator[tuple[int, NDArray[Any]]]:
        for number, slide in enumerate(track(slides, description="training slides", transient=True)):
            show_stage("describing the training", number, len(slides), "slides")
            count = min(tiles_per_slide, len(slide.cache))
            tiles = np.linspace(0, len(slide.cache) - 1, count).round().astype(int)
            yield count, slide.cache.read(tiles)

    network.to(place)
    try:
        with Runner(embed, place, tiles_per_slide, slides[0].cache.spec) as runner:
            means = [(rows.sum(0).double() / count).cpu().numpy() for count, rows in runner.stream(read())]
    finally:
        network.to("cpu")
    with torch.inference_mode():
        grades = [network.grade(torch.from_numpy(mean)[None].float())[0].tolist() for mean in means]
    if not told_apart(grades):
        raise UsageError(f"all {len(slides)} training slides {SAME_FOR_ALL}, and train again")
    return fit_familiar(np.stack(means), [slide.row.patient_id for slide in slides])


def _tissue_mm2(slide: CachedSlide) -> float:
    cache = slide.cache
    if cache.spec.is_volume:
        return 0.0
    return float(cache.tissue_fraction.sum()) * cache.spec.tile_mm2(cache.mpp_read)


def _data_module(config: Path, record: StudyRecord, allow: Sequence[str]) -> SlideDataModule:
    values = read_yaml(config, "a training", "the config.yaml of a 'slidetl fit'")
    if not isinstance(values.get("data"), dict):
        raise UsageError(f"{config}: expected the config.yaml of a 'slidetl fit', found no 'data' in it")
    if record.config_sha256 not in ("", config_sha256(values)):
        raise UsageError(f"{config}: not the configuration that the checkpoint was trained with")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SlideDataModule, "data")
    try:
        parsed = parse(parser, {"data": values["data"]}, allow)
    except ArgumentError as error:
        raise UsageError(f"{config}: {' '.join(str(error).split())}") from error
    data: SlideDataModule = parser.instantiate_classes(parsed)["data"]
    return data
