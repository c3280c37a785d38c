"""``slidetl grade --report``, from the command line on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slidetl.cli import main
from slidetl.publish.export import build_network, export_model
from slidetl.training.checkpoint import load_grader
from tests.conftest import Study
from tests.grading.report.test_slide import HOSTILE, Page


@pytest.fixture(scope="module")
def model_path(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    grader = load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")
    export_model(*build_network([grader]), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_every_slide_gets_a_page_and_all_an_index(
    study: Study, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:2]
    for slide, name in zip(slides, ("index", HOSTILE), strict=True):
        shutil.copy(slide, tmp_path / f"{name}.tiff")
    (tmp_path / "broken.tiff").write_bytes(b"II*\0nothing")
    out = tmp_path / "out"
    command = ["grade", str(model_path), str(tmp_path / "*.tiff"), "--output", str(out), "--jobs", jobs]
    capsys.readouterr()
    assert main([*command, "--report"]) == 1
    assert "broken" in capsys.readouterr().err
    results = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    assert len(results) == 2
    for name, result in results.items():
        assert name != "index" and name.isascii() and "<" not in name
        page = Page((out / f"{name}.html").read_text())
        assert Path(result["slide"]).name in page.text and f"Grade {result['grade_name']}" in page.text
        features = json.loads((out / f"{name}.geojson").read_text())["features"]
        assert len(features) == result["tiles"]
    index = Page((out / "index.html").read_text())
    links = [attributes["href"] for tag, attributes in index.elements if tag == "a"]
    assert sorted(links, key=str) == sorted(f"{name}.html" for name in results)
    assert "3 slides 1 could not be graded" in index.text and f"{HOSTILE}.tiff" in index.text


@pytest.mark.slow
def test_a_run_that_goes_on_makes_the_pages_that_are_missing(
    study: Study, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:2]
    command = ["grade", str(model_path), *map(str, slides), "--output", str(tmp_path)]
    assert main(command) == 0
    assert not list(tmp_path.glob("*.html"))
    assert main([*command[:3], "--output", str(tmp_path), "--report"]) == 0
    assert len(list(tmp_path.glob("*.html"))) == 2
    capsys.readouterr()
    assert main([*command, "--report", "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 slides are graded already" in err and len(out.splitlines()) == 1
    index = Page((tmp_path / "index.html").read_text())
    links = [attributes["href"] for tag, attributes in index.elements if tag == "a"]
    assert links == [f"{slide.stem}.html" for slide in slides]


@pytest.mark.slow
def test_slides_of_one_name_are_told_apart(study: Study, model_path: Path, tmp_path: Path) -> None:
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:3]
    out, places = tmp_path / "out", [tmp_path / patient / "S1.tiff" for patient in "abc"]
    for slide, place in zip(slides, places, strict=True):
        place.parent.mkdir()
        shutil.copy(slide, place)
    command = ["grade", str(model_path), "--output", str(out), "--report"]
    assert main([*command, *map(str, places[:2])]) == 0
    with pytest.warns(UserWarning, match="named otherwise"):
        assert main([*command, str(places[2])]) == 0
    for name, patient in (("S1", "a"), ("b_S1.tiff", "b"), ("c_S1.tiff", "c")):
        text = (out / f"{name}.html").read_text()
        assert f"<h1>{patient}/S1.tiff</h1>" in text and f"<title>{patient}/S1.tiff: " in text
        assert f"{name}.html" in Page(text).text
    index = Page((out / "index.html").read_text()).text
    assert all(f"{patient}/S1.tiff" in index for patient in "abc")


def test_a_report_needs_a_folder(study: Study, model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide = str(next((study.manifest.parent / "slides").glob("*.tiff")))
    assert main(["grade", str(model_path), slide, "--report"]) == 2
    assert "--report needs --output" in capsys.readouterr().err
