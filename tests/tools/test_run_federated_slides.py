from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slidetl.evaluation.comparison import PatientResults, patient_results
from tests.small import SMALL, small_weights

tool: Any = importlib.import_module("tools.run_federated_slides")


def results(seed: int, noise: float) -> PatientResults:
    rng = np.random.default_rng(seed)
    true = np.tile(np.arange(5), 12)
    scores = -np.abs(true[:, None] + rng.normal(0, noise, (60, 1)) - np.arange(5))
    rows = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return patient_results(true, rows, [f"{seed}/site/{n:02d}" for n in range(60)], "worst")


def test_the_page_names_the_primary_comparison_and_each_secondary_once() -> None:
    found = {
        scheme: [results(seed, {"local": 2.0, "cyclic": 0.0}.get(scheme, 0.3)) for seed in (1, 2)]
        for scheme in tool.FROZEN["schemes"]
    }
    text = tool.page(tool.EXPERIMENTS["frozen"], found)
    assert "2 of " in text and "120 test patients" in text
    # All right: a bootstrap has nothing to resample, the exact interval of 120 of 120 begins at .97.
    always = "1.00 (no interval)"
    assert f"| cyclic | {always} | 1.00 [0.97, 1.00] | {always.replace('1', '0')} |" in text
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


def test_only_all_registered_redraws_decide() -> None:
    experiment = tool.EXPERIMENTS["frozen"]
    for seeds, is_decided in (((1, 2), False), ((1, 2, 3), True)):
        found = {scheme: [results(seed, 0.5) for seed in seeds] for scheme in tool.FROZEN["schemes"]}
        text = " ".join(tool.page(experiment, found).split())
        assert ("so a difference is" in text) == is_decided
        assert ("is not decided before all registered redraws are done." in text) != is_decided


def test_a_primary_comparison_that_is_not_with_a_baseline_comes_first() -> None:
    found = {scheme: [results(seed, 0.5) for seed in (1, 2)] for scheme in tool.FINE_TUNED["schemes"]}
    lines = tool.page(tool.EXPERIMENTS["fine-tuned"], found).splitlines()
    rows = [line.split(" | ")[0] for line in lines if " minus " in line and line.startswith("| ")]
    assert rows == [
        "| **FedBN minus averaged**",
        "| pooled minus local",
        "| averaged minus local",
        "| FedBN minus local",
        "| averaged minus pooled",
        "| FedBN minus pooled",
    ]


@pytest.mark.slow
def test_fedbn_grades_each_site_with_its_own_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(tool.FINE_TUNED)
    config["cohort"] |= {"slides": 45, "patients": 45}
    config["split"] = ["train", "test", "val"]
    config["schemes"] = ["averaged", "FedBN"]
    config["federation"]["rounds"] = 2
    config["federation"]["model"]["backbone"] = {"name": SMALL, "pretrained": str(small_weights())}
    monkeypatch.setitem(
        tool.EXPERIMENTS, "fine-tuned", replace(tool.EXPERIMENTS["fine-tuned"], config=config)
    )
    assert tool.main(["--fine-tuned", "--tune", "5", "--output", str(tmp_path)]) == 0
    averaged, fedbn = (np.load(tmp_path / "5" / f"{scheme}.npz") for scheme in config["schemes"])
    assert averaged["patients"].tolist() == fedbn["patients"].tolist() and len(averaged["true"]) == 15
    assert np.abs(averaged["probabilities"] - fedbn["probabilities"]).max() > 1e-3
    with pytest.raises(SystemExit, match="register it before the run"):
        tool.main(["--fine-tuned", "--output", str(tmp_path)])


def test_a_configuration_that_is_not_registered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tool.FROZEN, "seeds", [1])
    with pytest.raises(SystemExit, match="register it before the run"):
        tool.main(["--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_neighbours_are_not_the_full_graph() -> None:
    """On three sites a ring mixes as averaging does."""
    matrix = tool.metropolis_weights(tool.FROZEN["neighbours"])
    assert (matrix == 0).sum() == 2
