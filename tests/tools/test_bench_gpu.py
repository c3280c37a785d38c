from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tifffile

from tools.bench_gpu import Row, exit_code
from tools.bench_tiling import tissue_colour

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("row", "missed"),
    [
        (Row("rate", 85, 100, least=0.85), ""),
        (Row("rate", 84.9, 100, least=0.85), "MISSES at least 85%"),
        (Row("rate that reading limits", 43, 100, least=0.85, reading=50), ""),
        (Row("rate below reading", 42, 100, least=0.85, reading=50), "MISSES at least 85%"),
        (Row("reading faster than the network", 84, 100, least=0.85, reading=500), "MISSES at least 85%"),
        (Row("seconds", 3.0, 3.0, most=1.0), ""),
        (Row("seconds", 3.1, 3.0, most=1.0), "MISSES at most 100%"),
        (Row("a step with a penalty", 106, 100, most=1.05), "MISSES at most 105%"),
        (Row("not a number", math.nan, 100, least=0.85), "MISSES at least 85%"),
        (Row("without a bound", 1, 100), ""),
    ],
)
def test_a_row_that_misses_its_bound_is_marked_and_ends_with_1(row: Row, missed: str) -> None:
    assert row.missed == missed
    assert ("MISSES" in row.text(True)) == bool(missed) and "MISSES" not in row.text(False)
    good = Row("good", 1.0, 1.0, least=1.0, most=1.0)
    assert exit_code([good, row], True) == bool(missed)
    assert exit_code([good, row], False) == exit_code([good], True) == exit_code([], True) == 0


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.bench_gpu", "--device", "cpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_test_needs_a_fit() -> None:
    done = bench("--parts", "test")
    assert done.returncode == 2 and "the parts test and export need fit" in done.stderr


def test_a_fit_needs_two_slides() -> None:
    done = bench("--parts", "fit", "--slides", "1")
    assert done.returncode == 2 and "the part fit needs at least 2 --slides" in done.stderr


def test_slides_are_of_different_colours() -> None:
    assert tissue_colour(0) == (215, 150, 190)  # of the recorded measurements
    assert len({tissue_colour(seed) for seed in range(28)}) == 28


@pytest.mark.slow
def test_the_rows_run_on_a_processor_where_no_bound_is_held(tmp_path: Path) -> None:
    table, kept = tmp_path / "table.txt", tmp_path / "kept"
    few = ["--side", "5120", "--slides", "2", "--backbone", "mobilenetv3_small_050"]
    parts = ["--parts", "fit", "test", "export", "grade", "embed"]
    done = bench(*few, *parts, "--keep", str(kept), "--output", str(table))
    assert done.returncode == 0, done.stderr
    assert len({path.stat().st_size for path in (kept / "slides").iterdir()}) == 2  # no two are of one size
    lines = table.read_text().splitlines()
    assert re.search(r", no GPU, .*; in \d+ s\.$", lines[2]) and "MISSES" not in table.read_text()
    works = [line.split("|")[1].split(",")[0].strip() for line in lines[6:]]
    fit = ["`fit`", "first step of it"]
    assert works == [*fit, "`test`", "`export`", *["`grade`"] * 3, *["`embed`"] * 2]
    assert all(float(line.split("|")[2].replace(",", "")) >= 0 for line in lines[6:])
    first, second = (
        tifffile.imread(path, level=1)[512:768, 512:768].mean((0, 1)) for path in (kept / "slides").iterdir()
    )
    assert abs(first - second).max() > 2  # of the tissue
