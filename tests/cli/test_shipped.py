from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from slidetl.cli import main
from slidetl.cli.shipped import find_config, with_shipped_configs

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_every_configuration(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("slidetl", "configs"):
        shutil.copytree(ROOT / name, source / name, True, shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.endswith(".yaml")}
    shipped = {
        f"slidetl/{path.relative_to(ROOT)}": path.read_bytes() for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert packed == shipped and "slidetl/configs/fibrosis.yaml" in packed


def test_a_shipped_configuration_is_found_by_the_name_that_the_readme_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "configs/fibrosis.yaml"]
    assert main(["fit", *words, "--data.manifest=none.csv", "--data.cache=none"]) == 2
    said = capsys.readouterr().err
    assert "no configs/fibrosis.yaml here; using the one shipped with slidetl: /" in said
    assert "none.csv: expected a CSV manifest" in said
    output = ["--output", "out", "--manifest", "none.csv"]
    assert main(["compare", "--config", "configs/compare/fibrosis_quick.yaml", *output]) == 2
    assert "none.csv: expected a CSV manifest" in capsys.readouterr().err


def test_a_file_that_is_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_config("configs/demo.yaml")
    assert shipped.is_absolute() and shipped.is_file()
    assert with_shipped_configs(["-c", "configs/demo.yaml"]) == ["-c", str(shipped)]
    assert with_shipped_configs(["--config=configs/demo.yaml", "x"]) == [f"--config={shipped}", "x"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").touch()
    assert find_config("configs/demo.yaml") == Path("configs/demo.yaml")
    for name in ("configs/none.yaml", "demo.yaml", "configs/../__init__.py"):
        assert find_config(name) == Path(name)
