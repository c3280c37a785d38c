"""The training data of a model: told in numbers without names, so that strangers are known later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.progress import track

from slidetl.analysis.novelty import Familiar, fit_familiar
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import channels_first
from slidetl.data.study import CachedSlide
from slidetl.errors import UsageError
from slidetl.library.model_card import TrainingData
from slidetl.training.slots import parse

_BATCH = 64


def training_slides(configs: Sequence[Path], allow: Sequence[str] = ()) -> tuple[CachedSlide, ...]:
    """Lists the slides on which fits were trained, each once, in the order of their identifiers.

    Args:
        configs: ``config.yaml`` of each fit, as Lightning keeps it beside the logs.
        allow: names outside slidetl that they may import.

    Raises:
        UsageError: no such configuration, or it says something else.
        SlidetlError: its manifest or its cache is not there any more.
    """
    slides: dict[str, CachedSlide] = {}
    for config in configs:
        data = _data_module(config, allow)
        data.setup("fit")
        slides |= {slide.row.slide_id: slide for slide in data.slides["train"]}
    return tuple(slides[slide_id] for slide_id in sorted(slides))


def describe_training(slides: Sequence[CachedSlide]) -> TrainingData:
    """Counts the training slides, and takes the fingerprint of the whole."""
    digest = hashlib.sha256()
    for fingerprint, grade in sorted((slide.cache.fingerprint, slide.row.grade) for slide in slides):
        digest.update(f"{fingerprint} {grade}\n".encode())
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

    The means of whole slides, with which those are compared later, spread a little less: the limit is on
    the generous side.

    Args:
        network: with ``embed``, as :class:`slidetl.publish.export.ExportedNetwork`.
        slides: the training slides.
        tiles_per_slide: how many tiles of each.

    Raises:
        UsageError: slides of fewer than five patients.
    """
    means = []
    with torch.inference_mode():
        for slide in track(slides, description="training slides", transient=True):
            count = min(tiles_per_slide, len(slide.cache))
            tiles = np.linspace(0, len(slide.cache) - 1, count).round().astype(int)
            total = torch.zeros(())
            for start in range(0, count, _BATCH):
                pixels = channels_first(slide.cache.read(tiles[start : start + _BATCH]))
                total = total + network.embed(pixels).sum(0).double()
            means.append((total / count).numpy())
    return fit_familiar(np.stack(means), [slide.row.patient_id for slide in slides])


def _tissue_mm2(slide: CachedSlide) -> float:
    spec = slide.cache.spec
    return float(slide.cache.tissue_fraction.sum()) * (spec.stride_px * spec.mpp / 1000) ** 2


def _data_module(config: Path, allow: Sequence[str]) -> SlideDataModule:
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{config}: expected the config.yaml of a 'slidetl fit': {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise UsageError(f"{config}: expected the config.yaml of a 'slidetl fit', found no 'data' in it")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SlideDataModule, "data")
    try:
        parsed = parse(parser, {"data": values["data"]}, allow)
    except ArgumentError as error:
        raise UsageError(f"{config}: {' '.join(str(error).split())}") from error
    data: SlideDataModule = parser.instantiate_classes(parsed)["data"]
    return data
