from __future__ import annotations

import pytest

from slidetl.cli import main


def test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "cbr_*"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "parameters", "embedding", "tile", "weights"]
    assert rows[0].split() == ["cbr_larget", "8.54", "M", "512", "224", "px", "none"]
    assert len(rows) == 5


def test_a_name_that_fits_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "resnet19"]) == 2
    assert capsys.readouterr().err == (
        "slidetl: error: no backbone is called anything like 'resnet19'; try a shorter part of the name\n"
    )


def test_pathology_backbones_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "--pathology", "*mini"]) == 0
    out = capsys.readouterr().out
    assert "pooling        token+mean" in out and "embedding      1536" in out and "85.7 M" in out
    assert "network        vit_base_patch14_reg4_dinov2 img_size=224 mlp_ratio=5.33334" in out
    assert main(["backbones", "--pathology", "uni3"]) == 2
    assert "no preset is called anything like 'uni3'" in capsys.readouterr().err
