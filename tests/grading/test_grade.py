from __future__ import annotations

import csv
import errno
import html
import json
import mmap
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from slidetl.cli import main
from slidetl.cli.progress import Progress
from slidetl.errors import ModelFileError, ProcessEnded, SpacingError, UnfitSlideError, UsageError
from slidetl.grading import batch, grade
from slidetl.grading.grade import (
    _ahead,
    _Embeddings,
    _expected_grades,
    _thumbnail_px,
    chosen_precision,
    draw_map,
    grade_slide,
)
from slidetl.grading.options import GradeOptions
from slidetl.grading.report.slide import warnings_of
from slidetl.library.model_card import TrainingData
from slidetl.models.runner import Runner
from slidetl.processes import Child, start_child
from slidetl.publish.export import build_network, export_model
from slidetl.publish.model_file import ModelFile, load_model
from slidetl.slides import open_slide
from slidetl.tiles.cut import slide_parts
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.lock import kernel_lock
from slidetl.tiles.plan import plan_tiles
from slidetl.tiles.readers import Readers
from slidetl.training.checkpoint import load_grader
from slidetl.training.predictions import SlidePrediction, read_predictions, write_predictions
from tests.conftest import Picture, PyramidTiff, Study
from tests.grading.report.conftest import explanation_of, grade_of
from tests.tiles.conftest import damaged


@pytest.fixture(scope="module")
def model_path(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    grader = load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")
    export_model(*build_network([grader]), path)
    return path


@pytest.fixture(scope="module")
def model(model_path: Path) -> ModelFile:
    return load_model(model_path)


@pytest.mark.slow
def test_agrees_with_slidetl_test_on_every_test_slide(
    study: Study, trained: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = read_predictions(trained / "test" / "predictions.csv")
    slides = [str(study.manifest.parent / "slides" / f"{row.slide_id}.tiff") for row in predictions]
    capsys.readouterr()
    assert main(["grade", str(model_path), *slides, "--output", str(tmp_path), "--batch-size", "7"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(predictions) >= 4
    for line, row in zip(lines, predictions, strict=True):
        assert line["grade"] == row.predicted_grade and line["tiles"] == row.tiles
        assert line["precision"] == "float32"
        np.testing.assert_allclose(line["probabilities"], row.probabilities, atol=1e-4)
        assert line["expected_grade"] == pytest.approx(row.expected_grade, abs=1e-3)
        assert json.loads((tmp_path / f"{row.slide_id}.json").read_text()) == line
        with Image.open(tmp_path / f"{row.slide_id}.png") as picture:
            assert picture.width > 1000


@pytest.mark.slow
def test_agrees_with_slidetl_test_in_bfloat16(
    study: Study, trained: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    words = ["test", *study.options(tmp_path), f"--ckpt_path={best}", "--precision", "bfloat16"]
    assert main(words) == 0
    rows = read_predictions(tmp_path / "test" / "predictions.csv")
    whole = read_predictions(trained / "test" / "predictions.csv")
    assert any(row.probabilities != other.probabilities for row, other in zip(rows, whole, strict=True))
    slides = [str(study.manifest.parent / "slides" / f"{row.slide_id}.tiff") for row in rows[:3]]
    capsys.readouterr()
    assert main(["grade", str(model_path), *slides, "--precision", "bfloat16"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, row in zip(lines, rows[:3], strict=True):
        assert line["precision"] == "bfloat16"
        np.testing.assert_allclose(line["probabilities"], row.probabilities, atol=1e-4)


def test_map_lies_where_the_tiles_are(study: Study, model: ModelFile, tmp_path: Path) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    result = grade_slide(model, slide)
    explanation = result.explanation
    assert len(result.attention) == len(result.origins_level0) == len(explanation.contributions)
    assert len(result.attention) == len(result.plan)
    assert result.attention.sum() == pytest.approx(1, abs=1e-4)
    said = result.to_dict()["explanation"]
    assert (said["method"], said["unit"]) == ("additive", "log-odds")
    assert said["baseline"] + said["raised"] + said["lowered"] == pytest.approx(said["score"], abs=2e-5)
    assert sum(result.probabilities) == pytest.approx(1, abs=1e-5)
    draw_map(result, model.card, tmp_path / "new" / "map.png")
    assert (tmp_path / "new" / "map.png").stat().st_size > 10_000


def test_a_cell_of_the_map_lies_about_the_centre_of_its_tile(
    pyramid_tiff: PyramidTiff, tissue_picture: Callable[..., Picture]
) -> None:
    path = pyramid_tiff(tissue_picture(1024), mpp=0.5)
    for stride, first in ((64, 0), (16, 48), (96, -32)):  # level-0 pixels; a tile has 128
        result = grade_of(path, TileSpec(1.0, 64, stride_px=stride))
        per_px = 1024 / result.plan.thumbnail.shape[0]
        corners = np.array([_thumbnail_px(result, *cell) for cell in ((0, 0), (3, 2))])
        expected = [(first, first), (first + 3 * 2 * stride, first + 2 * 2 * stride)]
        np.testing.assert_allclose((corners + 0.5) * per_px, expected)


def test_tiles_that_are_not_graded_are_told(
    study: Study, model: ModelFile, pyramid_tiff: PyramidTiff, tissue_picture: Callable[..., Picture]
) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))

    def filtered(min_focus: float) -> ModelFile:
        spec = replace(model.card.tile_spec, min_focus=min_focus)
        return replace(model, card=replace(model.card, tile_spec=spec))

    with open_slide(slide) as opened:
        wanted = plan_tiles(opened, filtered(1e-9).card.tile_spec)
        focus = wanted.quality["focus"]
    with pytest.raises(
        UnfitSlideError, match=rf"no tile with tissue is good enough \(out of focus {len(focus)}\)"
    ):
        grade_slide(filtered(2 * float(focus.max())), slide)
    half = float(np.median(focus))
    lost = int((focus < half).sum())
    result = grade_slide(filtered(half), slide, force=True)
    assert result.to_dict()["tiles_out_of_focus"] == lost > len(focus) / 4
    (note,) = [note for note in result.to_dict()["notes"] if "left out" in note]
    assert note == (
        f"{lost} of {len(focus)} tiles with tissue are left out for their quality (out of focus {lost})"
    )
    assert not any("left out" in note for note in grade_slide(model, slide).notes)

    whole = grade_of(pyramid_tiff(tissue_picture(1024), mpp=0.5))
    assert not any("cannot be read" in note for note in whole.notes)
    part = replace(whole, attention=whole.attention[3:])
    assert f"3 of {len(whole.plan)} tiles cannot be read, and are not part of the grade" in part.notes
    assert part.to_dict()["notes"] == list(part.notes)
    assert warnings_of(part.notes, model.card, "slides")[: len(part.notes)] == list(part.notes)


def test_the_map_has_the_title_of_the_slide_and_refers_to_the_notes(
    model: ModelFile, pyramid_tiff: PyramidTiff, tissue_picture: Callable[..., Picture], tmp_path: Path
) -> None:
    clean = grade_of(pyramid_tiff(tissue_picture(1024), mpp=0.5))
    for result in (clean, replace(clean, doubts=("too little tissue",))):
        draw_map(result, model.card, tmp_path / "map.png")
        red, _, blue = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))[-20:].T.astype(int)
        assert ((red - blue) > 90).any() == bool(result.notes)
    pictures = []
    for title in ("", "b/S1.png", "north/" + "W" * 100 + "/S1.tiff"):
        draw_map(clean, model.card, tmp_path / "titled.png", title)
        pictures.append(np.asarray(Image.open(tmp_path / "titled.png").convert("L")))
    assert (pictures[0] != pictures[1]).any()
    assert pictures[2][:100, :4].min() == pictures[2][:100, -4:].min() == 255  # not cut off, above the panels


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [((0, 0), (5, 7)), ((5, 0), (0, 7))])
def test_the_map_is_bright_where_the_network_looked(
    model: ModelFile,
    pyramid_tiff: PyramidTiff,
    tissue_picture: Callable[..., Picture],
    tmp_path: Path,
    first: tuple[int, int],
    second: tuple[int, int],
) -> None:
    result = grade_of(pyramid_tiff(tissue_picture(1024), mpp=0.5))  # 6 columns and 8 rows of tiles
    columns, rows = (result.origins_level0 / 128).astype(int).T

    def drawn(column: int, row: int) -> NDArray[np.float64]:
        is_there = (columns == column) & (rows == row)
        assert is_there.sum() == 1
        attention = np.where(is_there, 0.9, 0.1 / (len(is_there) - 1)).astype(np.float32)
        even = explanation_of(np.zeros(len(is_there)))
        draw_map(replace(result, attention=attention, explanation=even), model.card, tmp_path / "map.png")
        with Image.open(tmp_path / "map.png") as picture:
            return np.asarray(picture.convert("L"), np.float64)

    brighter = drawn(*first) - drawn(*second)
    centres, sizes = [], []
    for sign in (1, -1):
        y, x = np.nonzero(sign * brighter > 60)
        centres.append(np.array([np.median(x), np.median(y)]))
        sizes.append(np.array([np.ptp(x) + 1, np.ptp(y) + 1]))
    np.testing.assert_allclose(sizes[0], sizes[1], atol=2)
    apart = (centres[1] - centres[0]) / sizes[0]
    np.testing.assert_allclose(apart, np.subtract(second, first), rtol=0.1)


def test_embeddings_in_a_file_give_the_same_grade(
    study: Study, model: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    in_memory = grade_slide(model, slide, batch_size=7)
    monkeypatch.setattr("slidetl.grading.grade._IN_MEMORY", 20_000)  # 17 of its rows
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mapped: list[int] = []
    real = mmap.mmap

    def counted(file: int, size: int) -> mmap.mmap:
        mapped.append(size)
        return real(file, size)

    monkeypatch.setattr("mmap.mmap", counted)
    in_file = grade_slide(model, slide, batch_size=7)
    assert mapped == [len(in_memory.plan) * model.network.embed(torch.zeros(1, 3, 8, 8).byte()).nbytes]
    assert not list(tmp_path.iterdir())  # it has no name

    monkeypatch.setattr("tempfile.tempdir", "/dev/full/nowhere")
    no_room = grade_slide(model, slide, batch_size=7)
    assert len(mapped) == 1
    for other in (in_file, no_room):
        assert other.probabilities == in_memory.probabilities
        np.testing.assert_array_equal(other.attention, in_memory.attention)
        np.testing.assert_array_equal(other.explanation.contributions, in_memory.explanation.contributions)


def test_embeddings_of_a_large_slide_or_without_room_are_not_kept_on_a_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = torch.empty(2, 1024, device="meta")  # a card, for a processor
    assert _Embeddings(20)._room(rows).device.type == "meta"
    assert _Embeddings(20_000)._room(rows).device.type == "cpu"

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    kept = _Embeddings(20)._room(rows)
    assert kept.device.type == "cpu" and kept.shape == (20, 1024)


@pytest.mark.slow
def test_a_bad_slide_costs_itself_alone(
    study: Study,
    model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pyramid_tiff: PyramidTiff,
) -> None:
    good = next((study.manifest.parent / "slides").glob("*.tiff"))
    (tmp_path / "broken.svs").write_bytes(b"II*\0nothing")
    blank = pyramid_tiff(np.full((512, 512, 3), 255, np.uint8), mpp=4)
    capsys.readouterr()
    code = main(["grade", str(model_path), str(tmp_path / "broken.svs"), str(blank), str(good)])
    out, err = capsys.readouterr()
    assert code == 1
    assert [json.loads(line)["slide"] for line in out.splitlines()] == [str(good)]
    assert "broken.svs" in err and "there is nothing to grade" in err and "2 of 3 slides failed" in err


def exported(trained: Path, folder: Path, *options: str) -> Path:
    """A file as ``slidetl export`` writes it, which knows its training slides."""
    checkpoint = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    assert main(["export", str(checkpoint), "--output", str(folder / "m.pt"), *options]) == 0
    return folder / "m.pt"


@pytest.mark.slow
def test_slides_unlike_the_training_are_refused_unless_forced(
    study: Study,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pyramid_tiff: PyramidTiff,
) -> None:
    path = exported(trained, tmp_path)
    card = load_model(path).card
    assert card.training is not None and card.novelty_limit is not None
    assert card.training.slides == card.training.patients == 10
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    noise[:, :, 1] //= 4  # a purple that counts as tissue
    strange = pyramid_tiff(noise, mpp=4, name="strange")
    white = np.full((512, 512, 3), 245, np.uint8)
    white[200:264, 200:264] = noise[:64, :64]
    little = pyramid_tiff(white, mpp=4, name="little")
    capsys.readouterr()
    assert main(["grade", str(path), str(strange), str(little)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "strange.tiff: unlike the slides that the model was trained on" in err
    assert "little.tiff" in err and "of tissue is too little to grade" in err
    forced = ["--force", "--output", str(tmp_path / "out"), "--report"]
    assert main(["grade", str(path), str(strange), str(little), *forced]) == 0
    strange_result, little_result = map(json.loads, capsys.readouterr().out.splitlines())
    assert strange_result["novelty"] > 1
    assert little_result["tissue_mm2"] < card.training.least_tissue_mm2 / 2
    for result, doubt in (
        (strange_result, "unlike the slides that the model was trained on"),
        (little_result, "too little tissue: "),
    ):
        (note,) = [note for note in result["notes"] if note.startswith(doubt)]
        assert note in html.unescape((tmp_path / "out" / "index.html").read_text())
        assert note in html.unescape((tmp_path / "out" / f"{Path(result['slide']).stem}.html").read_text())
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["notes"] for row in table] == [
        "; ".join(result["notes"]) for result in (strange_result, little_result)
    ]


def test_rows_of_a_folder_note_which_spacing_is_far_from_the_others(model: ModelFile, tmp_path: Path) -> None:
    def row(name: str, mpp: float, *notes: str) -> batch.GradeRow:
        return batch.GradeRow(Path(name), batch.GRADED, {"mpp_level0": mpp, "notes": list(notes)})

    earlier = {"a": row("a.svs", 0.25), "b": row("b.svs", 0.25, "gaps")}
    late, failed = row("c.svs", 4.0, "thick"), batch.GradeRow(Path("d.svs"), batch.FAILED, {}, "damaged")
    rows = batch.join_rows(earlier, [late, failed], {late.slide: "c", failed.slide: "d"}, model)
    batch.write_results(tmp_path / "results.csv", list(rows.values()), 2)
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[-1] == "notes"
    assert [row["notes"] for row in table[:2] + table[3:]] == ["", "gaps", ""]
    assert table[2]["notes"].startswith("thick; 4 um per pixel is far from the median of 0.25, ")


def test_results_of_an_earlier_version_are_doubted_in_the_table_and_the_index(
    model: ModelFile, pyramid_tiff: PyramidTiff, tissue_picture: Callable[..., Picture], tmp_path: Path
) -> None:
    """Their JSON has no note of a slide unlike the training, or with little tissue; it stays as it is."""
    training = TrainingData(12, 10, (), (), (), 0.9, "ab")
    model = replace(model, card=replace(model.card, training=training))
    slide = grade_of(pyramid_tiff(tissue_picture(512), mpp=0.5))
    strange = replace(slide, novelty=2.3, model_sha256=model.sha256)
    doubts = model.card.doubts_about(2.3, slide.tissue_mm2)
    noted = replace(strange, doubts=("too little tissue: next to none",))
    results = {"old": strange, "noted": noted, "foreign": replace(strange, model_sha256="0" * 64)}
    earlier = {
        name: batch.GradeRow(tmp_path / f"{name}.tiff", batch.GRADED, result.to_dict())
        for name, result in results.items()
    }
    rows = batch.join_rows(earlier, [], {}, model)
    assert len(doubts) == 2 and rows["old"].later_notes == doubts
    assert rows["noted"].notes == (*noted.notes, doubts[0]) and rows["foreign"].later_notes == ()
    assert all(rows[name].result == earlier[name].result for name in rows)
    batch.write_results(tmp_path / "results.csv", list(rows.values()), 4)
    batch.write_index_page(tmp_path, rows, model)
    page = html.unescape((tmp_path / "index.html").read_text())
    assert all(doubt in page and doubt in (tmp_path / "results.csv").read_text() for doubt in doubts)


@pytest.mark.slow
def test_evidence_gives_a_set_of_grades(
    trained: Path, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    predictions = []
    sha256 = read_predictions(trained / "test" / "predictions.csv")[0].checkpoint
    for number in range(40):
        probabilities = rng.dirichlet(np.ones(5))
        grade = int(rng.choice(5, p=probabilities))
        name = f"s{number}"
        row = SlidePrediction(name, name, grade, tuple(probabilities.tolist()), 9, checkpoint=sha256)
        predictions.append(row)
    write_predictions(tmp_path / "kept.csv", predictions)
    path = exported(trained, tmp_path, "--evidence", str(tmp_path / "kept.csv"), "--coverage", "0.8")
    evidence = load_model(path).card.evidence
    assert evidence is not None and (evidence.slides, evidence.patients) == (40, 40)
    estimate, low, high = evidence.figures["accuracy"]
    assert low < estimate < high
    capsys.readouterr()
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    assert main(["grade", str(path), str(slide), "--force"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    lowest, highest = result["grade_set"]
    assert 0 <= lowest <= result["grade"] <= highest <= 4
    names = f"{lowest} to {highest}" if lowest < highest else f"{lowest}"
    assert f"{slide.name}: grade {result['grade']}, probability " in err
    promise = "made to hold the true grade of 80 % of patients like those of the evidence"
    score = f"continuous score {result['expected_grade']:.2f} of 0 to 4"
    assert f"; set of grades, {promise}: {names}; {score}; " in err


@pytest.mark.slow
def test_a_person_at_a_terminal_reads_one_line_a_slide(study: Study, model_path: Path) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "slidetl", "grade", str(model_path), str(slide)]
    done = subprocess.run(command, stdout=end, stderr=subprocess.PIPE, text=True, check=True)
    written = select.select([terminal], [], [], 0)[0]
    os.close(end)
    os.close(terminal)
    assert not written
    assert f"{slide.name}: grade " in done.stderr and "set of grades" not in done.stderr


@pytest.mark.slow
def test_grading_loads_nothing_that_trains_or_draws(study: Study, model_path: Path) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    program = f"""
import sys
from slidetl.cli import main
assert main(["grade", {str(model_path)!r}, {str(slide)!r}]) == 0
trains = {{"timm", "torchvision", "pytorch_lightning", "torchmetrics", "sklearn", "tensorboard", "onnx"}}
draws = {{"matplotlib", "pandas", "scipy.stats", "scipy.signal", "sympy", "torch._dynamo"}}
print(sorted((trains | draws) & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_table_that_is_open_in_a_spreadsheet_ends_no_run(
    study: Study,
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace = Path.replace
    refused: list[Path] = []

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == "results.csv" and Path(target).exists() and not refused:
            refused.append(target)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr("slidetl.files._LEAST_SECONDS", 0)
    monkeypatch.setattr("slidetl.files._LEAST_DURATIONS", 0)
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:2]
    with pytest.warns(UserWarning, match=r"results\.csv: .* open in another program\? .*tries again"):
        assert main(["grade", str(model_path), *map(str, slides), "--output", str(tmp_path)]) == 0
    assert refused and len(capsys.readouterr().out.splitlines()) == 2
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


def test_a_run_that_is_ended_leaves_a_whole_table(
    study: Study, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graded = 0

    def interrupt(progress: Progress, items: int = 1) -> None:
        nonlocal graded
        graded += 1
        if graded == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", interrupt)
    monkeypatch.setattr("slidetl.files._LEAST_SECONDS", 1000)
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:3]
    assert main(["grade", str(model_path), *map(str, slides), "--output", str(tmp_path)]) == 130
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_an_unknown_file_needs_trust_once(
    study: Study,
    model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "home"))
    slide = str(next((study.manifest.parent / "slides").glob("*.tiff")))
    assert main(["grade", str(model_path), slide]) == 2
    assert "--trust" in capsys.readouterr().err
    assert main(["grade", str(model_path), slide, "--trust"]) == 0
    assert main(["grade", str(model_path), slide]) == 0


@pytest.mark.parametrize(
    ("wanted", "device", "covered", "has_it", "chosen"),
    [
        ("auto", "cpu", ("cpu bfloat16", "cuda bfloat16"), True, "float32"),
        ("auto", "cuda", ("cpu bfloat16", "cuda float32", "cuda bfloat16"), True, "bfloat16"),
        ("auto", "cuda:1", ("cuda bfloat16",), False, "float32"),
        ("auto", "cuda", ("cpu float32", "cpu bfloat16"), True, "float32"),
        ("auto", "cuda", ("float32", "bfloat16"), True, "float32"),  # of an earlier version
        ("float32", "cuda", ("cuda float32", "cuda bfloat16"), True, "float32"),
        ("bfloat16", "cpu", ("cpu float32",), False, "bfloat16"),
    ],
)
def test_auto_takes_the_precision_that_the_export_compared(
    wanted: Any,
    device: str,
    covered: tuple[str, ...],
    has_it: bool,
    chosen: str,
    model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(model_path)
    there = replace(model, device=torch.device(device), card=replace(model.card, precisions=covered))
    asked = []

    def has_bfloat16(place: torch.device) -> bool:
        asked.append(str(place))
        return has_it

    monkeypatch.setattr("slidetl.grading.grade.has_bfloat16", has_bfloat16)
    assert chosen_precision(there, wanted) == chosen
    assert chosen_precision(replace(there, device=torch.device("cpu")), wanted, device) == chosen
    assert set(asked) <= {device}  # the card that is named


def test_an_explanation_by_occlusion_reads_no_scalar_from_its_device() -> None:
    """The thread that owns a GPU would wait for each; a meta tensor has none to read."""
    network = SimpleNamespace(grade=lambda rows: (None, rows.mean()))
    rows = torch.empty(6, 3, device="meta")
    selections = [torch.empty(n, dtype=torch.long, device="meta") for n in (5, 4)]
    assert _expected_grades(network, rows, selections).shape == (3,)


@pytest.mark.slow
def test_several_processes_grade_as_one_does_and_a_run_goes_on(
    study: Study,
    model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number, slide in enumerate(sorted((study.manifest.parent / "slides").glob("*.tiff"))[:3]):
        shutil.copy(slide, tmp_path / f"s{number}.tiff")
    (tmp_path / "s3.svs").write_bytes(b"II*\0nothing")
    pattern, output = str(tmp_path / "*.*"), tmp_path / "out"
    one = tmp_path / "one"
    assert main(["grade", str(model_path), pattern, "--output", str(one)]) == 1
    capsys.readouterr()
    started: list[Child] = []

    def noted(*arguments: Any, **options: Any) -> Child:
        started.append(start_child(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(batch, "start_child", noted)
    assert main(["grade", str(model_path), pattern, "--output", str(output), "--devices", "2"]) == 1
    assert [child.process.exitcode for child in started] == [0, 0]
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "s3.svs" in err

    def table(folder: Path) -> list[dict[str, str]]:
        with (folder / "results.csv").open(newline="") as file:
            return sorted(csv.DictReader(file), key=lambda row: row["slide"])

    assert [row["status"] for row in table(output)] == ["graded"] * 3 + ["failed"]
    for ours, theirs in zip(table(one)[:3], table(output)[:3], strict=True):
        assert (ours["grade"], ours["fingerprint"]) == (theirs["grade"], theirs["fingerprint"])
        assert float(ours["probability_0"]) == pytest.approx(float(theirs["probability_0"]), abs=1e-5)

    (output / "s1.json").unlink()
    shutil.copy(tmp_path / "s1.tiff", tmp_path / "s2.tiff")  # another slide under a name that is done
    assert main(["grade", str(model_path), pattern, "--output", str(output), "--resume"]) == 1
    out, err = capsys.readouterr()
    assert "1 of 4 slides are graded already" in err
    assert [Path(json.loads(line)["slide"]).name for line in out.splitlines()] == ["s1.tiff", "s2.tiff"]
    assert len(table(output)) == 4


def _die_with(parent: Connection, fatal: str) -> None:
    """Takes two slides at a time, and dies once it has the fatal one, or in the end."""
    while True:
        begun = []
        for _ in range(2):
            parent.send(None)
            if (task := parent.recv()) is not None:
                begun.append(task[0])
        if not begun:
            os._exit(139)
        if any(path.name == fatal for path in begun):
            os.kill(os.getpid(), signal.SIGKILL)
        for path in begun:
            parent.send(batch.GradeRow(path, batch.GRADED, {}))


@pytest.mark.slow
def test_a_slide_that_kills_its_process_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    slides = [Path(f"s{number}.tiff") for number in range(7)]
    started: list[str] = []

    def start(work: Any, model: Path, sha256: str, place: str, *_: Any, has_children: bool) -> Child:
        started.append(place)
        return start_child(_die_with, "s3.tiff")

    monkeypatch.setattr(batch, "start_child", start)
    tasks = [batch.Task(path, path.stem, path.name, None) for path in slides]
    graded = list(batch._grade_apart(Path("m"), "", ["cuda:0", "cuda:1"], tasks, GradeOptions()))
    rows = {row.slide: row for row in graded}
    assert sorted(rows) == slides and len(graded) == len(slides)
    assert [path.name for path, row in rows.items() if row.status != batch.GRADED] == ["s3.tiff"]
    assert "SIGKILL" in rows[slides[3]].reason and rows[slides[3]].reason.startswith("s3.tiff: ")
    assert set(started) == {"cuda:0", "cuda:1"}


@pytest.mark.slow
def test_a_model_file_replaced_during_the_run_ends_it(
    study: Study, trained: Path, model_path: Path, tmp_path: Path
) -> None:
    """Each process reads the file again, also one that tries a slide alone at the end."""
    path = tmp_path / "m.pt"
    shutil.copy(model_path, path)
    loaded = load_model(path)
    grader = load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")
    export_model(*build_network([grader], licence="CC-BY-4.0"), path)
    assert load_model(path).sha256 != loaded.sha256  # trusted here too
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:2]
    names = {slide: slide.stem for slide in slides}
    with pytest.raises(ModelFileError, match=r"m\.pt: replaced during the run, which began with SHA-256 "):
        list(batch.grade_slides(loaded, names, GradeOptions(), ["cpu", "cpu"]))


def _die_at_once(_: Connection) -> None:
    os._exit(3)


@pytest.mark.slow
def test_a_process_that_dies_before_it_asks_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "start_child", lambda *_, has_children: start_child(_die_at_once))
    with pytest.raises(ProcessEnded, match="use fewer --jobs or --devices"):
        tasks = [batch.Task(Path("a"), "a", "a", None)] * 2
        list(batch._grade_apart(Path("m"), "", ["cuda:1"], tasks, GradeOptions()))


def test_processes_take_gpus_from_the_first_on_and_no_more_than_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert batch.places_of("cuda", 2, 1) == ["cuda:0", "cuda:1"]
    assert batch.places_of("cuda", 2, 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert batch.places_of("cuda:1", 1, 2) == ["cuda:1", "cuda:1"]
    assert batch.places_of("cpu", 3, 1) == ["cpu"] * 3
    with pytest.raises(UsageError, match="--devices 3: there are 2 GPUs here"):
        batch.places_of("cuda", 3, 1)
    with pytest.raises(UsageError, match="use --device cuda, not cuda:1"):
        batch.places_of("cuda:1", 2, 1)
    with pytest.raises(UsageError, match="must be auto or cpu or cuda or cuda:0 or cuda:1 on this"):
        batch.places_of("cuda:2", 1, 2)


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("device", ["cuda:9", "cuda:x", "gpu"])
def test_a_device_that_is_not_there_is_refused_in_one_line(
    device: str, jobs: str, tmp_path: Path, model_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slides = [str(tmp_path / name) for name in ("a.svs", "b.svs")]
    assert main(["grade", str(model_path), *slides, "--device", device, "--jobs", jobs]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "--device must be auto or cpu" in said and f"not '{device}'" in said


@pytest.mark.slow
def test_rates_are_measured_when_asked_for(
    study: Study, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = str(next((study.manifest.parent / "slides").glob("*.tiff")))
    assert main(["grade", str(model_path), slide, "--profile"]) == 0
    said = capsys.readouterr().err
    found = re.search(r"([\d.]+) tiles/s with everything on, ([\d.]+) by the network alone: (\d+)%", said)
    assert found is not None
    everything, alone, percent = map(float, found.groups())
    assert percent == pytest.approx(100 * everything / alone, abs=1.5)
    share = re.search(r"; (\d+)% of the processor time went to the network", said)
    assert share is not None and 0 < int(share[1]) < 150  # measured on a busy machine


class Noted:
    """A network that notes the threads that run it, and the shapes that reach it."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.threads: set[int] = set()
        self.shapes: dict[str, list[tuple[int, ...]]] = {"embed": [], "grade": [], "novelty": []}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.network, name)
        if name not in self.shapes:
            return found

        def noted(values: torch.Tensor) -> Any:
            self.threads.add(threading.get_ident())
            self.shapes[name].append(tuple(values.shape))
            return found(values)

        return noted


@pytest.mark.slow
def test_a_card_is_run_by_one_thread_in_one_shape_and_grades_alike(
    study: Study, model: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a processor in the place of the card: slides are read in processes, and share batches."""
    monkeypatch.setattr(grade, "Runner", partial(Runner, packs=True))
    monkeypatch.setattr(batch, "_PIECE", 7)
    monkeypatch.setattr(batch, "_ready", lambda model, options: model)
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"II*\0nothing")
    slides = [*sorted((study.manifest.parent / "slides").glob("*.tiff"))[:3], bad]
    noted = Noted(model.network)
    options, names = GradeOptions(profile=True), batch.output_names(slides)
    rows = {row.slide: row for row in batch.grade_slides(replace(model, network=noted), names, options)}
    assert "not a slide" in rows.pop(bad).reason
    assert len(noted.threads) == 1 and threading.get_ident() not in noted.threads
    side = model.card.tile_spec.tile_size_px
    assert set(noted.shapes["embed"]) == {(16, 3, side, side)}
    assert noted.shapes["grade"][0][0] == 16  # warmed up, before the first slide
    assert len(noted.shapes["grade"]) == 4
    assert noted.shapes["novelty"] == (noted.shapes["grade"] if model.card.novelty_limit else [])
    monkeypatch.undo()
    for slide in slides[:3]:
        alone = grade_slide(model, slide)
        assert rows[slide].result["tiles"] == len(alone.attention)
        np.testing.assert_allclose(rows[slide].result["probabilities"], alone.probabilities, atol=1e-5)
        rates = rows[slide].rates
        assert rates is not None and rates.everything > 0 and rates.first_pass_s > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pooling_on_a_card_is_not_compiled(device: str) -> None:
    optimised: list[bool] = []

    class Network:
        def grade(self, rows: Any) -> tuple[str]:
            optimised.append(torch._C._get_graph_executor_optimize())
            return ("graded",)

        novelty = grade

    rows = torch.zeros(2, 3) if device == "cpu" else Mock(device=torch.device("cuda"))
    assert grade._pool(Network(), rows, True) == (("graded",), "graded")
    assert optimised == [device == "cpu"] * 2
    assert torch._C._get_graph_executor_optimize()


def test_the_grade_does_not_depend_on_the_number_of_threads(study: Study, model: ModelFile) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    before = torch.get_num_threads()
    one, *others = (grade_slide(model, slide, batch_size=7, threads=threads) for threads in (1, 2, 3))
    for other in others:
        assert other.probabilities == one.probabilities
        np.testing.assert_array_equal(other.origins_level0, one.origins_level0)
        np.testing.assert_array_equal(other.explanation.contributions, one.explanation.contributions)
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 2])
def test_a_frozen_model_grades_alike(study: Study, trained: Path, tmp_path: Path, members: int) -> None:
    best = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    export_model(*build_network([load_grader(best)] * members), tmp_path / "model.pt")
    model = load_model(tmp_path / "model.pt")
    frozen = model.frozen()
    assert (frozen.card, frozen.sha256, frozen.device) == (model.card, model.sha256, torch.device("cpu"))
    assert not list(frozen.network.parameters())
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    one, other = grade_slide(model, slide), grade_slide(frozen, slide)
    np.testing.assert_allclose(other.probabilities, one.probabilities, atol=1e-5)
    np.testing.assert_allclose(other.attention, one.attention, atol=1e-5)
    np.testing.assert_allclose(other.explanation.contributions, one.explanation.contributions, atol=1e-4)


def test_a_network_that_gives_nan_grades_no_slide(study: Study, model: ModelFile) -> None:
    class Undefined:
        def __getattr__(self, name: str) -> Any:
            return getattr(model.network, name)

        def embed(self, tiles: torch.Tensor) -> Any:
            return model.network.embed(tiles) * torch.nan

    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    with pytest.raises(UnfitSlideError, match="not graded: expected finite probabilities"):
        grade_slide(replace(model, network=Undefined()), slide, force=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_novelty_that_is_no_number_grades_no_slide(study: Study, model: ModelFile, value: float) -> None:
    class Undefined:
        def __getattr__(self, name: str) -> Any:
            return getattr(model.network, name)

        def novelty(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.tensor(value)

    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    limited = replace(model, network=Undefined(), card=replace(model.card, novelty_limit=2.0))
    for force in (False, True):
        with pytest.raises(UnfitSlideError, match=f"not graded: its novelty is {value};"):
            grade_slide(limited, slide, force=force)


@pytest.mark.parametrize("by_process", [False, True])
def test_tiles_that_cannot_be_read_are_no_part_of_the_grade(
    by_process: bool, model: ModelFile, pyramid_tiff: PyramidTiff, tissue_picture: Callable[..., Picture]
) -> None:
    sound = pyramid_tiff(tissue_picture(512), mpp=4, factors=(4,), jpeg=True, tile_px=64)
    lost = [9, 20, 37]  # of eight in a row
    whole = grade_slide(model, sound, batch_size=5)
    with Readers(slide_parts, 1, 5, 64, 8) if by_process else nullcontext() as readers:
        result = grade_slide(model, damaged(sound, lost), batch_size=5, readers=readers)
    columns, rows = whole.origins_level0.T // 64
    is_kept = ~np.isin(columns + 8 * rows, lost)
    assert result.to_dict()["tiles_unreadable"] == (~is_kept).sum() == 3
    np.testing.assert_array_equal(result.origins_level0, whole.origins_level0[is_kept])
    attention = whole.attention[is_kept] / whole.attention[is_kept].sum()
    np.testing.assert_allclose(result.attention, attention, rtol=1e-3)
    tissue = whole.plan.tissue_fraction[is_kept].sum() * whole.plan.spec.tile_mm2(whole.plan.mpp_read)
    assert result.tissue_mm2 == pytest.approx(tissue)


def test_a_file_of_before_contributions_is_explained_by_occlusion(study: Study, model: ModelFile) -> None:
    class Older:
        def __getattr__(self, name: str) -> Any:
            return getattr(model.network, name)

        def grade(self, embeddings: torch.Tensor) -> Any:
            return model.network.grade(embeddings)[:3]

    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    older = grade_slide(replace(model, network=Older()), slide)
    assert older.probabilities == grade_slide(model, slide).probabilities
    said = older.to_dict()["explanation"]
    assert (said["method"], said["unit"], said["baseline"]) == ("occlusion", "grades", None)
    assert said["score"] == pytest.approx(older.expected_grade, abs=1e-5)
    assert np.isfinite(older.explanation.contributions).all() and older.explanation.contributions.any()


def test_an_error_of_the_network_is_not_lost(study: Study, model: ModelFile) -> None:
    class Broken(torch.nn.Linear):
        def embed(self, tiles: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no memory")

    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    with pytest.raises(RuntimeError, match="no memory"):
        grade_slide(replace(model, network=Broken(1, 1)), slide, threads=2)


def test_reading_ahead_hands_on_errors_and_stops_with_its_reader() -> None:
    made = []

    def items() -> Generator[int, None, None]:
        for number in range(1000):
            made.append(number)
            yield number
        raise ValueError("at the end")

    ahead = _ahead(items(), depth=2)
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert len(made) <= 6
    with pytest.raises(ValueError, match="at the end"):
        list(_ahead(items()))


def test_a_slide_coarser_than_the_model_is_refused(model: ModelFile, pyramid_tiff: PyramidTiff) -> None:
    coarse = pyramid_tiff(np.full((512, 512, 3), 128, np.uint8), mpp=16)
    with pytest.raises(SpacingError):
        grade_slide(model, coarse)


@pytest.mark.slow
def test_a_manifest_gives_slides_their_spacing(
    study: Study,
    model_path: Path,
    pyramid_tiff: PyramidTiff,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with study.manifest.open() as file:
        own = study.manifest.parent / next(csv.DictReader(file))["path"]
    with open_slide(own) as slide:
        mpp = slide.info.mpp_level0[0]
        picture = slide.read((0, 0), slide.info.size_level0, mpp)
    rows: list[tuple[str, Path, object]] = [("none", pyramid_tiff(picture, mpp=None, name="none"), mpp)]
    rows += [("tenfold", pyramid_tiff(picture, mpp=mpp / 10, name="tenfold"), mpp)]
    rows += [("right", pyramid_tiff(picture, mpp=mpp, name="right"), "")]
    with (tmp_path / "manifest.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerows([("slide_id", "path", "patient_id", "grade", "mpp")])
        writer.writerows((name, path, name, "", given) for name, path, given in rows)
    words = ["grade", str(model_path), str(tmp_path / "manifest.csv"), "--force"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["mpp_level0"] for result in results] == [pytest.approx(mpp)] * 3
    assert len({tuple(result["probabilities"]) for result in results}) == 1
    assert f"warning: {rows[1][1]}: the spacing given, {mpp:g} um per pixel, replaces the file's own" in err
    # Results at another spacing are none to resume from.
    output = ["--output", str(tmp_path / "out"), "--resume"]
    assert main(["grade", str(model_path), str(rows[2][1]), "--force", *output]) == 0
    for more, says in (([], "1 of 1"), ([f"--mpp-replace={mpp * 0.9}"], "0 of 1")):
        assert main(["grade", str(model_path), str(rows[2][1]), "--force", *output, *more]) == 0
        assert f"{says} slides are graded already" in capsys.readouterr().err
    # Nor are those of another precision.
    words = ["grade", str(model_path), str(rows[2][1]), *output, f"--mpp-replace={mpp * 0.9}", "--force"]
    with pytest.warns(UserWarning, match="1 of 1 slides were not graded in bfloat16, or by an earlier"):
        assert main([*words, "--precision=bfloat16"]) == 0
    assert main([*words, "--precision=bfloat16"]) == 0
    counted = re.findall(r"(\d) of 1 slides are graded already", capsys.readouterr().err)
    assert counted == ["0", "1"]
    capsys.readouterr()
    assert main(["grade", str(model_path), str(rows[0][1]), f"--mpp-override={mpp}", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["probabilities"] == results[0]["probabilities"]
    # A slide 5 % coarser than the model's tiles is refused, or taken with a tolerance.
    coarse = str(pyramid_tiff(picture, mpp=load_model(model_path).card.tile_spec.mpp * 1.05, name="coarse"))
    assert main(["grade", str(model_path), coarse, "--force"]) == 1
    assert "accept 5.0% with --mpp-tolerance 0.05" in capsys.readouterr().err
    assert main(["grade", str(model_path), coarse, "--force", "--mpp-tolerance=0.06"]) == 0
    found = json.loads(capsys.readouterr().out)
    with open_slide(coarse) as slide:
        plan = plan_tiles(slide, replace(load_model(model_path).card.tile_spec, mpp_tolerance=0.06))
    side_mm = plan.spec.stride_px * plan.spec.mpp * 1.05 / 1000
    assert found["tissue_mm2"] == pytest.approx(float(plan.tissue_fraction.sum()) * side_mm**2, rel=1e-3)


def test_a_folder_has_no_result_of_another_run_or_slide_under_a_name(
    study: Study, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y, other = (tmp_path / name for name in ("a/x.tiff", "a/y.tiff", "b/x.tiff"))
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:3]
    for path, slide in zip((x, y, other), slides, strict=True):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(slide, path)
    out = tmp_path / "out"

    def run(*words: object) -> tuple[int, list[str]]:
        code = main(["grade", str(model_path), *map(str, words), "--output", str(out)])
        with (out / "results.csv").open(newline="") as file:
            graded = [row["slide"] for row in csv.DictReader(file) if row["status"] == "graded"]
        return code, [Path(slide).name for slide in graded]

    def files(of: str) -> list[str]:
        return sorted(path.name.removeprefix(of) for path in out.glob(f"{of}.*"))

    page = [".geojson", ".html", ".json", ".png", ".thumbnail.jpg"]
    assert run(x, "--report") == (0, ["x.tiff"]) and files("x") == page and files("index")
    assert run(y) == (0, ["x.tiff", "y.tiff"]) and files("x") == page and not files("index")
    capsys.readouterr()
    assert run(x, y, "--resume") == (0, ["x.tiff", "y.tiff"])  # though nothing is left to grade
    assert "2 of 2 slides are graded already" in capsys.readouterr().err

    assert run(x, "--mpp-replace", "3.6") == (0, ["y.tiff", "x.tiff"]) and files("x") == [".json", ".png"]
    before = (out / "x.json").read_bytes()
    with pytest.warns(UserWarning, match=r"files of 1 slides are named otherwise.*b/x.tiff is b_x.tiff.json"):
        assert run(other) == (0, ["x.tiff", "y.tiff", "x.tiff"])
    assert json.loads((out / "b_x.tiff.json").read_text())["slide"] == str(other)
    assert (out / "x.json").read_bytes() == before

    (out / "y.json").unlink()
    y_map = (out / "y.png").read_bytes()
    y.write_bytes(b"II*\0nothing")
    assert run(y) == (1, ["x.tiff", "x.tiff"]) and not files("y")  # nor a map of a run that was killed
    (out / "y.png").write_bytes(y_map.replace(b"slidetl-model", b"somebody-else"))
    with pytest.warns(UserWarning, match="named otherwise"):
        assert run(y)[0] == 1 and files("y") == [".png"]

    x.write_bytes(b"II*\0nothing")
    assert run(x) == (1, ["x.tiff"]) and not files("x") and files("b_x.tiff") == [".json", ".png"]


def test_a_folder_keeps_the_rows_of_earlier_runs_and_the_files_of_others(
    study: Study, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:2]
    out, table, index = tmp_path / "out", tmp_path / "out/results.csv", tmp_path / "out/index.html"
    out.mkdir()

    def run(slide: Path, *more: str) -> int:
        return main(["grade", str(model_path), str(slide), "--output", str(out), *more])

    for path, content in ((table, "patient,mine\n"), (index, "<title>mine</title>")):
        path.write_text(content)
        assert run(slides[0], "--report") == 2 and path.read_text() == content
        assert f"{path}: not written by 'slidetl grade'" in capsys.readouterr().err
        path.unlink()
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert [run(slide, "--report") for slide in slides] == [0, 0]
    page = index.read_text()
    assert all(f'href="{slide.stem}.html"' in page for slide in slides) and "2 slides" in page
    # A result by another model, with more grades, stays in the table alone.
    result = json.loads((out / f"{slides[0].stem}.json").read_text())
    other = {"slide": "/x/other.svs", "model_sha256": "0" * 64, "probabilities": [0.1] * 10}
    (out / "other.json").write_text(json.dumps({**result, **other}))
    (out / "not_ours.json").write_text('{"slide": "/x/z.svs"}')
    assert run(slides[1], "--report") == 0
    with table.open(newline="") as file:
        rows = {Path(row["slide"]).name: row for row in csv.DictReader(file)}
    assert sorted(rows) == ["other.svs", *(slide.name for slide in slides)]
    assert rows["other.svs"]["probability_9"] == "0.1"
    assert "2 slides" in index.read_text() and "other.svs" not in index.read_text()
    capsys.readouterr()
    with kernel_lock(out / ".lock"):
        before = table.read_bytes()
        assert run(slides[0]) == 2 and table.read_bytes() == before
    assert "another 'slidetl grade' is writing there" in capsys.readouterr().err


def test_a_slide_that_is_away_keeps_its_result(
    study: Study, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share, away, out = tmp_path / "share", tmp_path / "away", tmp_path / "out"
    share.mkdir()
    slide = shutil.copy(next((study.manifest.parent / "slides").glob("*.tiff")), share / "x.tiff")
    words = ["grade", str(model_path), str(slide), "--output", str(out)]

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.glob("x.*")}

    assert main([*words, "--report"]) == 0
    kept = files()
    assert len(kept) == 5
    share.rename(away)
    for more in (["--resume"], [], ["--resume", "--report"]):
        assert main([*words, *more]) == 1 and files() == kept
        with (out / "results.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert row["status"] == "failed" and row["reason"].endswith(
            "; its results of an earlier run are kept"
        )
    away.rename(share)
    capsys.readouterr()
    assert main([*words, "--resume", "--report"]) == 0 and files() == kept
    assert "1 of 1 slides are graded already" in capsys.readouterr().err
    share.rename(away)
    assert main([*words, "--mpp-tolerance", "0.3"]) == 1 and not files()  # of other options


def test_slides_of_one_relative_path_are_two(
    study: Study, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:2]
    for site, slide in zip("ab", slides, strict=True):
        (tmp_path / site).mkdir()
        shutil.copy(slide, tmp_path / site / "x.tiff")
    monkeypatch.chdir(tmp_path / "a")
    assert main(["grade", str(model_path), "x.tiff", "--output", str(out)]) == 0
    monkeypatch.chdir(tmp_path / "b")
    with pytest.warns(UserWarning, match="named otherwise"):
        assert main(["grade", str(model_path), "*.tiff", "--output", str(out)]) == 0
    found = {path.name: json.loads(path.read_text())["slide"] for path in out.glob("*.json")}
    assert found == {"x.json": str(tmp_path / "a/x.tiff"), "b_x.tiff.json": str(tmp_path / "b/x.tiff")}
    assert main(["grade", str(model_path), str(tmp_path / "a/x.tiff"), "--output", str(out)]) == 0
    assert len(list(out.glob("*.json"))) == 2


def test_slides_that_moved_keep_their_names_and_their_results(
    study: Study, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before, after = tmp_path / "out", tmp_path / "before", tmp_path / "after"
    slides = sorted((study.manifest.parent / "slides").glob("*.tiff"))[:2]
    before.mkdir()
    for name, slide in zip("ab", slides, strict=True):
        shutil.copy(slide, before / f"{name}.tiff")
    words = ["grade", str(model_path), "--output", str(out), "--resume"]
    assert main([*words, str(before)]) == 0
    before.rename(after)
    shutil.copy(after / "a.tiff", after / "b.tiff")  # no longer the slide that b was
    result = json.loads((out / "a.json").read_text())
    capsys.readouterr()
    for recorded in (result["slide"], "slides/a.tiff"):  # as of an earlier version
        (out / "a.json").write_text(json.dumps({**result, "slide": recorded}))
        assert main([*words, str(after / "a.tiff")]) == 0
        assert "1 of 1 slides are graded already" in capsys.readouterr().err
        assert str(after / "a.tiff") in (out / "results.csv").read_text()
    with pytest.warns(UserWarning, match=r"after/b.tiff is after_b.tiff.json"):
        assert main([*words, str(after / "b.tiff")]) == 0
    assert {path.name for path in out.glob("*.json")} == {"a.json", "b.json", "after_b.tiff.json"}


def test_slides_that_moved_keep_their_pages(
    study: Study, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before, after = tmp_path / "out", tmp_path / "before", tmp_path / "after"
    before.mkdir()
    shutil.copy(next((study.manifest.parent / "slides").glob("*.tiff")), before / "a.tiff")
    words = ["grade", str(model_path), "--output", str(out), "--report", "--resume"]
    assert main([*words, str(before)]) == 0
    page, result = (out / "a.html").read_bytes(), json.loads((out / "a.json").read_text())
    before.rename(after)
    capsys.readouterr()
    assert main([*words, str(after)]) == 0
    assert "1 of 1 slides are graded already" in capsys.readouterr().err
    assert (out / "a.html").read_bytes() == page and 'href="a.html"' in (out / "index.html").read_text()
    moved = {**result, "slide": str(after / "a.tiff")}  # so the next run need not compare content
    assert json.loads((out / "a.json").read_text()) == moved


def test_an_earlier_place_that_cannot_be_looked_at_and_a_loop_of_links_end_no_run(
    study: Study, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, out, slides = tmp_path / "slides/a.tiff", tmp_path / "out", tmp_path / "slides"
    slides.mkdir()
    shutil.copy(next((study.manifest.parent / "slides").glob("*.tiff")), slide)
    words = ["grade", str(model_path), str(slides), "--output", str(out), "--resume"]
    assert main(words) == 0
    gone = tmp_path / ("x" * 300) / "a.tiff"  # as of a share that fails: no plain "not found"
    with pytest.raises(OSError):
        gone.exists()
    path = out / "a.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "slide": str(gone)}))
    (slides / "loop.tiff").symlink_to("loop.tiff")
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "1 of 2 slides are graded already" in said and f"failed: {slides}/loop.tiff" in said
    assert json.loads(path.read_text())["slide"] == str(slide)


def test_a_resumed_run_takes_no_result_of_other_options(
    study: Study, model_path: Path, model: ModelFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    words = ["grade", str(model_path), str(slide), "--output", str(tmp_path), "--resume"]
    for more in ([], ["--mpp-tolerance", "0.4"], ["--mpp-tolerance", "0.4"], [], ["--mpp-tolerance", "0.01"]):
        assert main([*words, *more]) == 0
    counted = re.findall(r"(\d) of 1 slides are graded already", capsys.readouterr().err)
    assert counted == ["0", "0", "1", "0", "1"]  # 0.01 is the model's

    def finished(model: ModelFile, force: bool) -> bool:
        options = GradeOptions(output=tmp_path, force=force)
        return slide in batch.read_finished(tmp_path, {slide: slide.stem}, model, options, {})

    path = tmp_path / f"{slide.stem}.json"
    result = json.loads(path.read_text())
    needed = TrainingData(9, 9, (), (), (), 2 * result["tissue_mm2"] + 0.01, "")
    strict = replace(model, card=replace(model.card, training=needed))
    assert finished(model, False) and finished(strict, True) and not finished(strict, False)
    for name in ("tiles_unreadable", "areas_unreadable"):  # the slide may be whole by now
        path.write_text(json.dumps(result | {name: 1}))
        assert not finished(model, True)
    for novelty, is_familiar in ((0.9999, True), (1.0, False), (2.5, False)):
        path.write_text(json.dumps(result | {"novelty": novelty}))
        assert (finished(model, False), finished(model, True)) == (is_familiar, True)
