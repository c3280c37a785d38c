from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from slidetl.cli import main
from tests.conftest import Study


@pytest.mark.slow
def test_before_and_after_a_training(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = trained.glob("logs/*/checkpoints/best*.ckpt")
    words = ["--before", "pretrained", "--after", str(checkpoint), "--data", str(study.cache)]
    words += ["--output", str(tmp_path / "out"), "--tiles", "200", "--permutations", "2"]
    assert main(["similarity", *words]) == 0
    with (tmp_path / "out" / "similarity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["first"], row["second"]) for row in rows} == {
        ("pretrained", str(checkpoint)),
        (str(checkpoint), "random"),
    }
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    assert layers == ["bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5", "embedding"]
    assert len(rows) == 2 * 4 * len(layers)
    values = {(row["second"], row["layer"], row["measure"]): float(row["value"]) for row in rows}
    # A short training leaves the pretrained layers nearly as they were; a random network has others.
    for layer in layers:
        kept = values[str(checkpoint), layer, "linear_cka"]
        assert kept > 0.9 and kept > values["random", layer, "linear_cka"]
    with Image.open(tmp_path / "out" / "similarity.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(10**6) or ()) > 20
    assert "linear CKA (noise floor)" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main(["similarity", *words[:-6], "--output", str(again), *words[-4:]]) == 0
    assert (again / "similarity.csv").read_bytes() == (tmp_path / "out" / "similarity.csv").read_bytes()
