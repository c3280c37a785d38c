from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_tool() -> ModuleType:
    # tools/ holds programs, not a package: it is loaded by path.
    spec = importlib.util.spec_from_file_location("kill_tiler", ROOT / "tools/kill_tiler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


tool = load_tool()


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
