from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

tool: Any = importlib.import_module("tools.kill_tiler")


@pytest.mark.slow
def test_a_tiler_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    report = tool.kill_tiler(tmp_path, kills=4, seconds=120, slides=1, size_px=1536, workers=1, seed=1)
    assert report.kills == 4 and report.rounds >= 1
    assert report.different == ()


def test_it_finds_differences(tmp_path: Path) -> None:
    group = tmp_path / "S.zarr"
    group.mkdir()
    (group / "a").write_bytes(b"1")
    (group / "b").write_bytes(b"2")
    assert tool._contents(tmp_path) == {"S.zarr/a": b"1", "S.zarr/b": b"2"}
    assert tool._differences({"a": b"1", "b": b"2", "c": b""}, {"a": b"1", "b": b"x", "d": b""}) == [
        "missing: c",
        "too many: d",
        "other bytes: b",
    ]
