from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

tool: Any = importlib.import_module("tools.bench_clusters")


@pytest.mark.slow
def test_every_side_gets_its_row_and_the_flat_kernel_the_clusters_of_sklearn(tmp_path: Path) -> None:
    words = ["--points", "200", "--columns", "4", "--clusters", "3", "--seeds", "20"]
    tool.main([*words, "--sides", "scikit-learn", "flat", "--output", str(tmp_path / "out.txt")])
    lines = (tmp_path / "out.txt").read_text().splitlines()[3:]
    assert [line.split()[0] for line in lines] == ["scikit-learn", "flat"]
    assert float(lines[1].split()[-1]) == 1  # agreement with the first
