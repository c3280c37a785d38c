from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from slidetl.cli import main
from slidetl.synthetic.cohort import SyntheticCohort


def draw(out: Path, options: str = "") -> int:
    return main(["synth", str(out), *options.split()])


@pytest.mark.slow
def test_writes_a_cohort_and_prints_the_colour_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--slides 40 --patients 36 --size 512 --mpp 8 --seed 1000 --workers 1"
    assert draw(tmp_path / "new", options) == 0
    output, progress = capsys.readouterr()
    found = re.search(r"stained area alone: (\d+)% accuracy", output)
    assert found is not None
    assert int(found[1]) <= 40
    assert "[40/40] drawn" in progress
    assert len(list((tmp_path / "new" / "slides").glob("*.tiff"))) == 40
    assert draw(tmp_path / "new", options) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_few_slides_need_no_other_option_and_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(tmp_path, "--slides 2 --size 512 --mpp 8") == 0
    out = capsys.readouterr().out
    assert "2 slides of 2 patients" in out and "alone" not in out


def test_patients_and_sites_that_are_given_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(tmp_path, "--slides 3 --patients 2 --sites 1 --size 512 --mpp 8 --workers 1") == 0
    assert "3 slides of 2 patients" in capsys.readouterr().out
    with (tmp_path / "manifest.csv").open(newline="") as file:
        assert len({row["site"] for row in csv.DictReader(file)}) == 1
    assert draw(tmp_path, "--slides 3 --patients 4") == 2
    assert "4 patients need at least as many slides" in capsys.readouterr().err


@pytest.mark.slow
def test_the_grade_may_be_what_the_readers_agree_on(tmp_path: Path) -> None:
    grades = {}
    for label in ("truth", "consensus"):
        options = "--slides 5 --size 512 --mpp 8 --reader-sd 3 --seed 1000 --workers 1 --label "
        assert draw(tmp_path / label, options + label) == 0
        with (tmp_path / label / "manifest.csv").open(newline="") as file:
            grades[label] = [int(row["grade"]) for row in csv.DictReader(file)]
    assert sorted(grades["truth"]) == [0, 1, 2, 3, 4]
    cohort = SyntheticCohort(5, 5, 3, 512, 8.0, seed=1000, reader_sd=3.0)
    assert grades["consensus"] == [entry.consensus for entry in cohort.plan()] != grades["truth"]


@pytest.mark.slow
def test_a_harder_cohort_has_less_fibrosis(tmp_path: Path) -> None:
    for share in ("0.12", "0.03"):
        options = "--slides 5 --size 512 --mpp 8 --seed 1000 --workers 1 --share-per-grade "
        assert draw(tmp_path / share, options + share) == 0

    def fibrotic_cells(folder: Path) -> float:
        return sum(
            float(np.load(path)["collagen_fraction"].sum(dtype=float)) for path in folder.glob("truth/*.npz")
        )

    manifests = {(tmp_path / share / "manifest.csv").read_text() for share in ("0.12", "0.03")}
    assert len(manifests) == 1
    assert fibrotic_cells(tmp_path / "0.03") < 0.4 * fibrotic_cells(tmp_path / "0.12")
