from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy
import pytest

from slidetl.cli import main
from slidetl.cli.shipped import find_config, with_shipped_configs
from slidetl.publish.export import build_network, export_model
from slidetl.tiles.store import SlideCache
from slidetl.training.checkpoint import load_grader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("slidetl", "configs"):
        shutil.copytree(ROOT / name, source / name, True, shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_has_every_configuration(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.endswith(".yaml")}
    shipped = {
        f"slidetl/{path.relative_to(ROOT)}": path.read_bytes() for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert packed == shipped and "slidetl/configs/fibrosis.yaml" in packed


@pytest.mark.slow
def test_an_installed_wheel_draws_tiles_and_grades(wheel: Path, trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    export_model(
        *build_network([load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")]), model
    )
    # An environment of its own that borrows the dependencies of this one, without its editable slidetl.
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "borrowed.pth").write_text(f"{Path(numpy.__file__).parents[1]}\n")
    environment = {"PATH": os.environ["PATH"], "SLIDETL_HOME": str(tmp_path / "home")}

    def run(*words: str) -> str:
        python = tmp_path / "env" / "bin" / "python"
        done = subprocess.run(
            [python, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run("inspect", "--details", "slidetl")
    run("slidetl", "synth", "study", "--slides", "1", "--patients", "1", "--size", "1024", "--mpp", "4")
    run("slidetl", "tile", "study/manifest.csv", "--cache", "cache", "--mpp", "4", "--tile-size", "64")
    graded = json.loads(run("slidetl", "grade", "model.pt", "study/slides", "--trust", "--force"))
    assert graded["tiles"] == len(SlideCache.open(tmp_path / "cache" / "slide-0.zarr")) > 0
    assert sum(graded["probabilities"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
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
