"""The whole path on real slides. The grades are made up: only that the job runs is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slidetl.cli import main
from slidetl.training.predictions import read_predictions


@pytest.mark.slow
def test_real_slides_become_a_model_that_grades_them(
    test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aperio = test_data / "slides" / "CMU-1-Small-Region.svs"
    tcga = test_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"  # JPEG 2000, without a spacing
    rows = ["slide_id,path,patient_id,grade,mpp,split"]
    for number, (slide, split) in enumerate(
        [(aperio, "train"), (tcga, "train"), (aperio, "val"), (tcga, "val"), (aperio, "test"), (tcga, "test")]
    ):
        copy = tmp_path / f"{number}{slide.suffix}"
        copy.write_bytes(slide.read_bytes() + bytes([number]))  # each patient has a file of its own
        mpp = "0.25" if slide is tcga else ""
        rows.append(f"S{number},{copy.name},P{number},{number % 2},{mpp},{split}")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    cache, root, model = tmp_path / "cache", tmp_path / "run", tmp_path / "model.pt"
    options = [
        f"--data.manifest={manifest}",
        f"--data.cache={cache}",
        "--data.bag_size=6",
        "--data.num_workers=0",
        '--data.grades=["0","1"]',
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    assert main(["tile", str(manifest), "--cache", str(cache), "--mpp", "4", "--tile-size", "64"]) == 0
    assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    assert main(["test", *options]) == 0
    (predictions,) = root.glob("test/predictions.csv")
    tested = {row.slide_id: row for row in read_predictions(predictions)}
    assert tested.keys() == {"S4", "S5"}
    checkpoint = root / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    assert main(["export", str(checkpoint), "--output", str(model)]) == 0
    capsys.readouterr()
    assert main(["grade", str(model), str(aperio), "--output", str(tmp_path / "maps")]) == 0
    assert main(["grade", str(model), str(tcga), "--mpp-override", "0.25"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, row in zip(lines, (tested["S4"], tested["S5"]), strict=True):
        assert line.keys() >= {"slide", "grade", "probabilities", "expected_grade", "tiles", "model_sha256"}
        assert line["grade"] == row.predicted_grade and line["tiles"] == row.tiles
        assert line["probabilities"] == pytest.approx(row.probabilities, abs=1e-4)
    assert (tmp_path / "maps" / "CMU-1-Small-Region.png").stat().st_size > 10_000
    # The spacing is never guessed.
    assert main(["grade", str(model), str(tcga)]) == 1
    assert "--mpp-override" in capsys.readouterr().err
