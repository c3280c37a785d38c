"""Every configuration that ships goes through the real commands."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from slidetl.cli import main
from slidetl.models import transfer
from slidetl.tasks.predictions import read_predictions
from tests.conftest import Study

# Those of comparisons are for another command: tests/experiments/compare/.
CONFIGS = sorted(
    path for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml") if path.parent.name != "compare"
)


def test_there_are_some() -> None:
    assert {path.name for path in CONFIGS} >= {"fibrosis.yaml", "demo.yaml"}


def test_every_strategy_has_one() -> None:
    known = vars(transfer).values()
    classes = {item.__name__ for item in known if is_dataclass(item) and isinstance(item, type)}
    configs = [yaml.safe_load(path.read_text()) for path in CONFIGS if path.parent.name == "transfer"]
    named = {config["model"]["transfer"]["class_path"].rpartition(".")[2] for config in configs}
    assert named == {name for name in classes if not name.startswith("_")}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_fit_and_test(config: Path, study: Study, tmp_path: Path) -> None:
    options = ["--config", str(config), *study.options(tmp_path)]
    assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    assert main(["test", *options]) == 0
    assert len(read_predictions(tmp_path / "test" / "predictions.csv")) >= 4
