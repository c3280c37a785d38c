from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slidetl.errors import UsageError
from slidetl.evaluation.calibration import with_temperature
from slidetl.publish.evidence import evidence_from


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_evidence_of_a_comparison_is_of_the_uncalibrated_network(tmp_path: Path) -> None:
    """``slidetl compare`` writes calibrated probabilities beside those of the network, which is exported."""
    rng = np.random.default_rng(1)
    plain: list[dict[str, object]] = []
    compared: list[dict[str, object]] = []
    for number in range(60):
        sharp = with_temperature(rng.dirichlet(np.ones(3)), 0.4).tolist()  # too sure of itself
        temperature = (2.5, 1.6)[number % 2]  # of two folds
        calibrated = with_temperature(sharp, temperature)
        about = {"slide_id": f"s{number}", "patient_id": f"p{number}", "grade": number % 3}
        plain.append(about | {f"probability_{grade}": p for grade, p in enumerate(sharp)})
        compared.append(
            about
            | {f"probability_{grade}": f"{p:.7f}" for grade, p in enumerate(calibrated)}
            | {"temperature": temperature}
            | {f"uncalibrated_{grade}": p for grade, p in enumerate(sharp)}
        )
    expected = evidence_from(written(tmp_path / "plain.csv", plain))
    found = evidence_from(written(tmp_path / "compared.csv", compared))
    assert replace(found, predictions_sha256="") == replace(expected, predictions_sha256="")
    older = [{key: row[key] for key in row if not key.startswith("uncalibrated")} for row in compared]
    with pytest.raises(UsageError, match="expected columns uncalibrated_0"):
        evidence_from(written(tmp_path / "older.csv", older))
