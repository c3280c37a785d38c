from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from slidetl.cli import main
from tests.conftest import Study


def test_a_sheet_is_a_png_written_whole(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(next(study.cache.glob("*.zarr")))
    config, sheet, other = tmp_path / "fit.yaml", tmp_path / "new" / "sheet.png", tmp_path / "other"
    config.write_text("data: {augmentation: {flips: false}}\n")
    words = ["augment", cache, "--output", str(sheet), "--config", str(config), "--rows", "2"]
    assert main(words) == 0
    with Image.open(sheet) as picture:
        assert (picture.format, picture.height) == ("PNG", 2 * 68 + 4)
    other.write_text("another's")
    sheet.unlink()
    sheet.symlink_to(other)
    assert main(words) == 0
    assert other.read_text() == "another's" and not sheet.is_symlink()
    capsys.readouterr()
    for content in ("data: {note: M\u00fcller}".encode("cp1252"), b"data: [", b"- a"):
        config.write_bytes(content)
        assert main(words) == 2
        assert capsys.readouterr().err.startswith(f"slidetl: error: {config}: expected ")
    assert main(["augment", cache, "--output", str(sheet), "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: expected the YAML of a training" in capsys.readouterr().err
