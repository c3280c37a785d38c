"""Whole commands on a card, beside each other; ``scripts/check-gpu`` runs these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from slidetl.cli import main
from slidetl.tiles.features import read_features
from slidetl.tiles.store import SlideCache
from slidetl.training.predictions import read_predictions
from tests.conftest import Study
from tests.small import small_embed

pytestmark = pytest.mark.gpu


def on_gpu(study: Study, root: Path) -> list[str]:
    return [word for word in study.options(root) if "accelerator" not in word]


@pytest.fixture(scope="module")
def fitted(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training on the card, and its model file."""
    root = tmp_path_factory.mktemp("fitted")
    assert main(["fit", *on_gpu(study, root), "--trainer.max_epochs=2", "--data.num_workers=auto"]) == 0
    best = root / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    assert main(["export", str(best), "--output", str(root / "model.pt")]) == 0
    return root


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_grade_equals_test(
    study: Study, fitted: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", *on_gpu(study, fitted), "--precision", precision]) == 0
    rows = read_predictions(fitted / "test" / "predictions.csv")
    slides = [str(study.manifest.parent / "slides" / f"{row.slide_id}.tiff") for row in rows]
    capsys.readouterr()
    words = ["grade", str(fitted / "model.pt"), *slides, "--precision", precision, "--force"]
    assert main(words) == 0
    graded = {
        Path(line["slide"]).stem: line for line in map(json.loads, capsys.readouterr().out.splitlines())
    }
    apart = max(
        np.abs(np.subtract(graded[row.slide_id]["probabilities"], row.probabilities)).max() for row in rows
    )
    print(f"grade and test differ by {apart:.2e} in {precision}")
    assert apart < 1e-4


def test_features_in_bfloat16_are_those_in_float32(study: Study, tmp_path: Path) -> None:
    for path in sorted(study.cache.glob("*.zarr"))[:3]:
        shutil.copytree(path, tmp_path / path.name)
    for precision in ("float32", "bfloat16"):
        words = ["embed", str(tmp_path), *small_embed(), "--name", precision]
        assert main([*words, "--precision", precision]) == 0
    caches = [SlideCache.open(path) for path in sorted(tmp_path.glob("*.zarr"))]
    whole, half = (
        np.concatenate([read_features(cache, name) for cache in caches]).astype(np.float64)
        for name in ("float32", "bfloat16")
    )
    relative = np.abs(half - whole).mean() / np.abs(whole).mean()
    correlation = np.corrcoef(whole.ravel(), half.ravel())[0, 1]
    print(f"mean relative difference {relative:.2%}, correlation {correlation:.4f}")
    assert relative < 0.06 and correlation > 0.998


def test_a_card_without_room_says_the_batch_that_fits(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + 600 * 2**20) / total)
    try:
        words = ["--data.bag_size=32", "--data.batch_size=10", "--model.backbone.name=resnet18"]
        words += ["--model.transfer=slidetl.models.transfer.Scratch"]
        words += ["--trainer.precision=32-true"]
        assert main(["fit", *on_gpu(study, tmp_path), *words]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err
    assert "has no room for --data.batch_size 10" in said and "this fits: --data.batch_size" in said
