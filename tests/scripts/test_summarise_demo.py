"""The last step of the demo, on slides and predictions as its other steps write them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from slidetl.data.manifest import read_manifest
from slidetl.training.predictions import SlidePrediction, write_predictions
from tests.conftest import Study

SCRIPT = Path(__file__).parents[2] / "scripts" / "summarise_demo.py"


@pytest.mark.slow  # trees of the baseline
def test_accuracies_have_exact_intervals(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("summarise_demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, place in {"data": study.manifest.parent, "cache": study.cache}.items():
        (tmp_path / name).symlink_to(place)
    tested = read_manifest(study.manifest).rows[:10]

    def predict(path: Path, graded: int | None) -> None:
        """Writes the true grades, or one grade for all."""
        rows = [np.eye(5)[row.grade or 0 if graded is None else graded].tolist() for row in tested]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(
            path,
            [
                SlidePrediction(row.slide_id, row.patient_id, row.grade, tuple(found), 4)
                for row, found in zip(tested, rows, strict=True)
            ],
        )

    predict(tmp_path / "predictions.csv", None)
    predict(tmp_path / "scratch/test/predictions.csv", 2)
    lines = [
        {"slide": f"{row.slide_id}.tiff", "probabilities": np.eye(5)[row.grade or 0].tolist()}
        for row in tested
    ]
    (tmp_path / "grades.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "seconds.txt").write_text("synth 1\n")
    assert script.main(tmp_path) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["accuracy"] == 1
    low = binomtest(10, 10).proportion_ci(method="exact").low
    assert found["intervals"]["accuracy"] == {"low": pytest.approx(low, abs=1e-4), "high": 1, "level": 0.95}
    assert "1.00 [0.69, 1.00]" in capsys.readouterr().out
