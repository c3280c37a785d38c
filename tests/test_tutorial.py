"""Runs the tutorial: its commands and its Python, in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from slidetl.cli import main

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.mark.slow
def test_every_block_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "home"))
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(console|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"console", "python"}
    names: dict[str, object] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(TUTORIAL), "exec"), names)
            continue
        for line in block.splitlines():
            program, *words = shlex.split(line.removeprefix("$ "))
            assert program == "slidetl"
            assert main(words) == 0, line
    assert sum(getattr(names["result"], "probabilities")) == pytest.approx(1)  # noqa: B009
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(getattr(names["result"], "grade_name"))  # noqa: B009
    for name in ("study/cache/previews/slide-00.png", "study/run/test/predictions.csv", "maps/index.html"):
        assert (tmp_path / name).is_file(), name
