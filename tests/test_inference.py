from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slidetl.cli import main
from slidetl.errors import SpacingError
from slidetl.export import ModelFile, export_model, load_model
from slidetl.inference import draw_map, grade_slide
from slidetl.tasks.checkpoint import load_grader
from slidetl.tasks.predictions import read_predictions
from tests.conftest import PyramidTiff, Study


@pytest.fixture(scope="module")
def model_path(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    export_model(load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"), path)
    return path


@pytest.fixture(scope="module")
def model(model_path: Path) -> ModelFile:
    return load_model(model_path)


def test_agrees_with_slidetl_test_on_every_test_slide(
    study: Study, trained: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = read_predictions(trained / "test" / "predictions.csv")
    slides = [str(study.manifest.parent / "slides" / f"{row.slide_id}.tiff") for row in predictions]
    capsys.readouterr()
    assert main(["grade", str(model_path), *slides, "--output", str(tmp_path), "--batch-size", "7"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(predictions) >= 4
    for line, row in zip(lines, predictions, strict=True):
        assert line["grade"] == row.predicted_grade and line["tiles"] == row.tiles
        np.testing.assert_allclose(line["probabilities"], row.probabilities, atol=1e-4)
        assert line["expected_grade"] == pytest.approx(row.expected_grade, abs=1e-3)
        assert json.loads((tmp_path / f"{row.slide_id}.json").read_text()) == line
        with Image.open(tmp_path / f"{row.slide_id}.png") as picture:
            assert picture.width > 1000


def test_map_lies_where_the_tiles_are(study: Study, model: ModelFile, tmp_path: Path) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    result = grade_slide(model, slide)
    assert len(result.attention) == len(result.origins_level0) == len(result.tile_grades) == len(result.plan)
    assert result.attention.sum() == pytest.approx(1, abs=1e-4)
    assert (result.tile_grades >= 0).all() and (result.tile_grades <= 4).all()
    assert sum(result.probabilities) == pytest.approx(1, abs=1e-5)
    draw_map(result, tmp_path / "new" / "map.png")
    assert (tmp_path / "new" / "map.png").stat().st_size > 10_000


def test_a_bad_slide_costs_itself_alone(
    study: Study,
    model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pyramid_tiff: PyramidTiff,
) -> None:
    good = next((study.manifest.parent / "slides").glob("*.tiff"))
    (tmp_path / "broken.svs").write_bytes(b"II*\0nothing")
    blank = pyramid_tiff(np.full((512, 512, 3), 255, np.uint8), mpp=4)
    capsys.readouterr()
    code = main(["grade", str(model_path), str(tmp_path / "broken.svs"), str(blank), str(good)])
    out, err = capsys.readouterr()
    assert code == 1
    assert [json.loads(line)["slide"] for line in out.splitlines()] == [str(good)]
    assert "broken.svs" in err and "there is nothing to grade" in err and "2 of 3 slides failed" in err


def test_a_slide_coarser_than_the_model_is_refused(model: ModelFile, pyramid_tiff: PyramidTiff) -> None:
    coarse = pyramid_tiff(np.full((512, 512, 3), 128, np.uint8), mpp=16)
    with pytest.raises(SpacingError):
        grade_slide(model, coarse)
