from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from slidetl.evaluation.calibration import with_temperature
from slidetl.publish.evidence import evidence_from


def test_evidence_of_a_comparison_is_of_the_untempered_network(tmp_path: Path) -> None:
    """``slidetl compare`` writes calibrated probabilities; what is exported gives them as they were."""
    rng = np.random.default_rng(1)
    tables: dict[str, list[dict[str, object]]] = {"plain": [], "tempered": []}
    for number in range(60):
        probabilities = rng.dirichlet(np.ones(3))
        sharp = with_temperature(probabilities, 0.4)  # too sure of itself
        temperature = (2.5, 1.6)[number % 2]  # of two folds
        for name, rows in (("plain", sharp), ("tempered", with_temperature(sharp, temperature))):
            row: dict[str, object] = {
                "slide_id": f"s{number}", "patient_id": f"p{number}", "grade": number % 3,
                **{f"probability_{grade}": f"{p:.9f}" for grade, p in enumerate(rows)},
            }  # fmt: skip
            tables[name].append(row | ({"temperature": temperature} if name == "tempered" else {}))
    found = {}
    for name, written in tables.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(written[0]))
            writer.writeheader()
            writer.writerows(written)
        found[name] = evidence_from(tmp_path / f"{name}.csv")
    assert found["tempered"].temperature == pytest.approx(found["plain"].temperature, rel=1e-3)
    assert found["tempered"].quantile == pytest.approx(found["plain"].quantile, abs=1e-3)
    assert found["tempered"].figures == found["plain"].figures
