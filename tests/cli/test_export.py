from __future__ import annotations

from pathlib import Path

import pytest

from slidetl.cli import main


@pytest.mark.parametrize(("name", "home"), [("model.pt", "file"), ("file/model.pt", "home"), (".", "home")])
def test_what_could_not_be_written_at_the_end_is_refused_before_the_work(
    name: str, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / home))
    # Nothing is looked for before: there is no checkpoint.
    assert main(["export", str(tmp_path / "no.ckpt"), "--output", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert ("set SLIDETL_HOME" in said) == (home == "file") and "no.ckpt" not in said


def test_onnx_needs_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "file"))
    words = ["export", str(tmp_path / "no.ckpt"), "--output", str(tmp_path / "m"), "--format", "onnx"]
    assert main(words) == 2
    assert "no.ckpt" in capsys.readouterr().err
