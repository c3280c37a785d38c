from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Study

tool: Any = importlib.import_module("tools.bench_loader")
FEW = ["--epoch", "6", "--bag-size", "2", "--repeats", "1", "--workers", "0"]


@pytest.mark.slow
def test_the_loader_alone_and_a_training_beside_it(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FEW, "--threads", "1", "2", "--backbone", "mobilenetv3_small_050", "--device", "cpu"]
    assert tool.main([str(study.cache), *words]) == 0
    head, loader, training = capsys.readouterr().out.split("\n\n")
    assert "6 bags of 2 tiles of 64 px (jpeg) from 20 slides" in head
    rows = [line.rsplit(maxsplit=4) for line in loader.splitlines()[1:]]
    assert [row[:3] for row in rows] == [
        [name, "0", threads]
        for name in ("read", "read, default", "read, albumentations")
        for threads in ("1", "2")
    ]
    assert all(float(rate) > 0 and float(per_core) > 0 for *_, rate, per_core in rows)
    assert training.startswith("training mobilenetv3_small_050 on the CPU")
    rows = [line.split() for line in training.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["0", "1"], ["0", "2"]]
    for _, _, rate, alone, waiting, *_ in rows:
        share = float(waiting.removesuffix("%")) / 100
        assert 0 < share < 1 and float(rate) == pytest.approx((1 - share) * float(alone), rel=0.05, abs=2)


def test_the_newest_training_of_a_folder_is_read(tmp_path: Path) -> None:
    for version in (0, 2, 9, 10):
        folder = tmp_path / f"logs/version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").touch()
        assert tool.newest_table(tmp_path).parent == folder


def test_a_training_validates_on_different_slides(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main([str(study.cache), "--backbone", "resnet18", "--epoch", "1"])
    assert ended.value.code == 2
    assert "two different slides to validate on; there are 20" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cache_that_is_not_there_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["--slides", "2", "--slide-px", "512", "--tile-px", "128", "--threads", "1"]
    assert tool.main([str(tmp_path / "cache"), *FEW, *drawn]) == 0
    assert "6 bags of 2 tiles of 128 px (jpeg) from 2 slides" in capsys.readouterr().out
