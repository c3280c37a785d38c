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
