from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from slidetl.cli import main
from slidetl.cli.progress import Progress
from slidetl.status import show_end, show_metrics, show_stage, status_file


def read(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_bar_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with status_file(path, "tile"):
        assert read(path)["state"] == "running" and read(path)["exit_code"] is None
        with Progress("slides", 3, stage="tiling") as progress:
            found = read(path)
            assert (found["stage"], found["done"], found["total"], found["unit"]) == (
                "tiling",
                0,
                3,
                "slides",
            )
            progress.advance()
            progress.advance()
            assert read(path)["done"] == 0, "written seldom"
        show_metrics({"val/qwk": 0.5, "val/loss": math.nan})
        show_end(0)
    found = read(path)
    assert (found["done"], found["state"], found["exit_code"]) == (2, "done", 0)
    assert found["metrics"] == {"val/qwk": 0.5}
    assert found["updated"] >= found["started"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "done"), (1, "failed"), (2, "failed"), (130, "interrupted"), (143, "interrupted")],
)
def test_the_end_has_its_exit_code(code: int, state: str, tmp_path: Path) -> None:
    with status_file(tmp_path / "s", "fit"):
        show_end(code)
    assert (read(tmp_path / "s")["state"], read(tmp_path / "s")["exit_code"]) == (state, code)


def test_a_bug_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), status_file(tmp_path / "s", "fit"):
        raise ZeroDivisionError
    assert read(tmp_path / "s")["state"] == "failed"


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with status_file(None, "fit"):
        show_stage("training", 1, 2, "epochs")
        show_end(0)
    assert not list(tmp_path.iterdir())


def test_a_file_that_gets_lost_does_not_end_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    with warnings.catch_warnings(record=True) as said, status_file(folder / "s", "fit"):
        warnings.simplefilter("always")
        (folder / "s").unlink()
        folder.rmdir()
        folder.touch()  # no folder any more
        show_stage("training", 1, 2, "epochs")
        show_stage("testing", 1, 2, "epochs")
    assert len(said) == 1 and "no longer written" in str(said[0].message)


@pytest.mark.parametrize("place", ["before", "after"])
def test_every_command_takes_it(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, option = ["cache", "info", str(tmp_path / "none")], ["--status", str(tmp_path / "s")]
    assert main([words[0], *option, *words[1:]] if place == "before" else [*words, *option]) == 2
    assert (read(tmp_path / "s")["state"], read(tmp_path / "s")["command"]) == ("failed", "cache")
    capsys.readouterr()


def test_a_place_that_cannot_be_written_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["cache", "info", str(tmp_path), "--status", str(tmp_path / "file" / "s")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("slidetl: error:") and "cannot be written" in said and said.count("\n") == 1
