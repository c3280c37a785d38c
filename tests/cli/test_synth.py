from __future__ import annotations

import argparse
import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest

from slidetl.cli import synth
from slidetl.errors import UsageError
from slidetl.synthetic.cohort import SyntheticCohort
from slidetl.synthetic.section import SHARE_PER_GRADE


def parsed(out: Path, options: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    synth.add_arguments(parser)
    return parser.parse_args([str(out), *options.split()])


def test_writes_a_cohort_and_prints_the_colour_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parsed(tmp_path / "new", "--slides 40 --patients 36 --size 512 --mpp 8 --seed 1000 --workers 1")
    assert synth.run(options) == 0
    output, progress = capsys.readouterr()
    found = re.search(r"stained area alone: (\d+)% accuracy", output)
    assert found is not None
    assert int(found[1]) <= 40
    assert "[40/40] drawn" in progress
    assert len(list((tmp_path / "new" / "slides").glob("*.tiff"))) == 40
    with pytest.raises(UsageError, match="is not empty"):
        synth.run(options)


def test_few_slides_need_no_other_option_and_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synth.run(parsed(tmp_path, "--slides 2 --size 512 --mpp 8")) == 0
    out = capsys.readouterr().out
    assert "2 slides of 2 patients" in out and "alone" not in out


def test_patients_and_sites_that_are_given_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        synth.run(parsed(tmp_path, "--slides 3 --patients 2 --sites 1 --size 512 --mpp 8 --workers 1")) == 0
    )
    assert "3 slides of 2 patients" in capsys.readouterr().out
    with (tmp_path / "manifest.csv").open(newline="") as file:
        assert len({row["site"] for row in csv.DictReader(file)}) == 1
    with pytest.raises(UsageError, match="4 patients need at least as many slides"):
        synth.run(parsed(tmp_path, "--slides 3 --patients 4"))


def test_the_grade_may_be_what_the_readers_agree_on(tmp_path: Path) -> None:
    grades = {}
    for label in ("truth", "consensus"):
        options = "--slides 5 --size 512 --mpp 8 --reader-sd 3 --seed 1000 --workers 1 --label "
        assert synth.run(parsed(tmp_path / label, options + label)) == 0
        with (tmp_path / label / "manifest.csv").open(newline="") as file:
            grades[label] = [int(row["grade"]) for row in csv.DictReader(file)]
    assert sorted(grades["truth"]) == [0, 1, 2, 3, 4]
    cohort = SyntheticCohort(5, 5, 3, 512, 8.0, seed=1000, reader_sd=3.0)
    assert grades["consensus"] == [entry.consensus for entry in cohort.plan()] != grades["truth"]


def test_defaults_are_those_of_the_cohort() -> None:
    options = parsed(Path("somewhere"))
    assert options.slides == 60
    assert options.workers == len(os.sched_getaffinity(0))
    assert (options.size, options.mpp, options.stain, options.seed) == (4096, 0.5, "he", 0)
    assert (options.share_per_grade, options.label) == (SHARE_PER_GRADE, "truth")


def test_a_harder_cohort_has_less_fibrosis(tmp_path: Path) -> None:
    for share in ("0.12", "0.03"):
        options = "--slides 5 --size 512 --mpp 8 --seed 1000 --workers 1 --share-per-grade "
        assert synth.run(parsed(tmp_path / share, options + share)) == 0

    def fibrotic_cells(folder: Path) -> float:
        return sum(
            float(np.load(path)["collagen_fraction"].sum(dtype=float)) for path in folder.glob("truth/*.npz")
        )

    manifests = {(tmp_path / share / "manifest.csv").read_text() for share in ("0.12", "0.03")}
    assert len(manifests) == 1
    assert fibrotic_cells(tmp_path / "0.03") < 0.4 * fibrotic_cells(tmp_path / "0.12")
