from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from slidetl.evaluation.comparison import PatientResults, patient_results

ROOT = Path(__file__).parents[2]


def load_tool() -> ModuleType:
    # tools/ holds programs, not a package: it is loaded by path.
    spec = importlib.util.spec_from_file_location(
        "run_federated_slides", ROOT / "tools/run_federated_slides.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def results(seed: int, noise: float) -> PatientResults:
    rng = np.random.default_rng(seed)
    true = np.tile(np.arange(5), 12)
    scores = -np.abs(true[:, None] + rng.normal(0, noise, (60, 1)) - np.arange(5))
    rows = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return patient_results(true, rows, [f"{seed}/site/{n:02d}" for n in range(60)], "worst")


def test_the_page_names_the_primary_comparison_and_each_secondary_once() -> None:
    found = {
        scheme: [results(seed, 2.0 if scheme == "local" else 0.3) for seed in (1, 2)]
        for scheme in tool.CONFIG["schemes"]
    }
    text = tool.page(found, "0" * 64)
    assert "2 of " in text and "120 test patients" in text
    (primary,) = [line for line in text.splitlines() if line.startswith("| **averaged minus local**")]
    cells = [cell.strip() for cell in primary.split("|")]
    assert float(cells[3]) < 0.001  # sign flips
    assert cells[4] == ""  # no correction
    assert cells[5].startswith("+0.")
    for line in ("| pooled minus local |", "| peer to peer minus pooled |", "| cyclic minus pooled |"):
        assert text.count(line) == 1
    assert "local minus" not in text
    (same,) = [line for line in text.splitlines() if line.startswith("| averaged minus pooled")]
    assert "+0.00" in same and "1.0000" in same


def test_a_configuration_that_is_not_registered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tool.CONFIG, "seeds", [1])
    with pytest.raises(SystemExit, match="register it before the run"):
        tool.main(["--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_neighbours_are_not_the_full_graph() -> None:
    """On three sites a ring mixes as averaging does."""
    matrix = tool.metropolis_weights(tool.CONFIG["neighbours"])
    assert (matrix == 0).sum() == 2
