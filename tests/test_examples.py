"""Runs the examples of the pages on own networks and on Python."""

from __future__ import annotations

import atexit
import importlib
import re
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import slidetl
from slidetl.cli import main
from slidetl.errors import UsageError
from slidetl.training.predictions import read_predictions
from tests.conftest import Study
from tests.contracts.aggregator import AggregatorContract

DOCS = Path(__file__).parents[1] / "docs"


def block(page: str, kind: str) -> str:
    """Returns the only block of a kind on a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(found)


@cache
def own_module() -> Any:
    """Imports the aggregator of the page from a file, which TorchScript reads."""
    folder = Path(tempfile.mkdtemp(prefix="slidetl-mylab-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "mylab").mkdir()
    (folder / "mylab" / "__init__.py").touch()
    (folder / "mylab" / "pool.py").write_text(block("howto/own-network.md", "python"))
    sys.path.append(str(folder))
    return importlib.import_module("mylab.pool")


class TestOwnAggregator(AggregatorContract):
    make = staticmethod(lambda features: own_module().SharpAttention(features))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_an_own_aggregator_is_trained_tested_and_exported(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_module()
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(block("howto/own-network.md", "yaml"))
    options = ["--config", "own.yaml", *study.options(tmp_path / "run"), "--allow", "mylab"]
    assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    assert main(["test", *options]) == 0
    export = ["export", "run", "--output", "model.pt", "--allow", "mylab", "--no-training-data"]
    assert main(export) == 0
    assert slidetl.load_model("model.pt").card.grades == ("0", "1", "2", "3", "4")

    grader = slidetl.load_grader("run", allow=["mylab"])
    assert grader.network.aggregator.sharpness == 4.0
    predicted = read_predictions(Path("run/test/predictions.csv"))
    cache = slidetl.open_cache(study.cache / f"{predicted[0].slide_id}.zarr")
    tiles = torch.from_numpy(cache.read(range(len(cache)))).permute(0, 3, 1, 2)
    mask = torch.ones(1, len(tiles), dtype=torch.bool)
    with torch.inference_mode():
        probabilities = grader(tiles[None], mask)
        with pytest.raises(UsageError, match=r"expected tiles of uint8.*not torch\.float32"):
            grader(tiles[None] / 255, mask)
    torch.testing.assert_close(probabilities[0].tolist(), list(predicted[0].probabilities), atol=1e-4, rtol=0)


def test_the_dataset_of_the_page_has_every_tile_of_a_part(study: Study) -> None:
    names: dict[str, Any] = {}
    exec(compile(block("reference/python.md", "python"), "python.md", "exec"), names)
    seen = 0
    for part in ("train", "val", "test"):
        dataset = names["GradedTiles"](study.manifest, study.cache, part)
        last = dataset.slides[-1]
        tile, grade = dataset[len(dataset) - 1]
        assert (tile.transpose(1, 2, 0) == last.cache.read([len(last.cache) - 1])[0]).all()
        assert grade == last.row.grade
        with pytest.raises(IndexError):
            dataset[len(dataset)]
        tiles, grades = next(iter(DataLoader(dataset, batch_size=3)))
        assert tiles.shape == (3, 3, 64, 64) and grades.tolist() == [dataset.slides[0].row.grade] * 3
        seen += len(dataset)
    assert seen == sum(len(cache) for cache in slidetl.read_study(study.manifest, study.cache).caches)
