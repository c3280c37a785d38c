from __future__ import annotations

from pathlib import Path

from slidetl.grading.batch import GRADED, GradeRow, describe
from slidetl.grading.report.index import IndexEntry, write_index
from slidetl.grading.report.slide import write_slide_report
from slidetl.library.model_card import ModelCard
from tests.grading.report.conftest import Graded
from tests.grading.report.test_slide import HOSTILE, Page


def test_lists_every_slide_and_links_its_page(graded: Graded, card: ModelCard, tmp_path: Path) -> None:
    result = graded("a slide")
    write_slide_report(result, card, tmp_path, "a_slide")
    hostile = IndexEntry(Path("study") / f"{HOSTILE}.svs", "img", {}, f"{HOSTILE}.svs: not a slide")
    other = IndexEntry(
        Path("b.svs"), "a_slide", {**result.to_dict(), "model_sha256": "00" * 32, "novelty": 1.004}
    )
    doubtful = IndexEntry(
        result.slide, "a_slide", result.to_dict(), notes=("3 tiles cannot be read", HOSTILE)
    )
    entries = [hostile, doubtful, other]
    page = Page(write_index(tmp_path, entries, card).read_text())
    assert [attributes["href"] for tag, attributes in page.elements if tag == "a"] == ["a_slide.html"]
    images = [attributes["src"] or "" for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/jpeg;base64,")
    assert "3 slides 1 could not be graded" in page.text
    assert f"{HOSTILE}.svs: not a slide" in page.text
    assert f"a slide.tiff 3 tiles cannot be read {HOSTILE} moderate" in page.text
    assert "Score, 0 to 3 Tissue" in page.text
    assert "Score, 0 to 3, where 0 is grade none and 3 grade severe: the continuous score" in page.text
    assert "moderate 60 % mild to moderate 1.75 0.8 0.70" in page.text
    assert "moderate 60 % mild to moderate 1.75 0.8 1.004" in page.text
    assert describe(GradeRow(other.slide, GRADED, dict(other.result)), card).endswith("; novelty 1.004")
    promise = "made to hold the true grade of 90 % of patients like those of the evidence"
    assert f"Not ruled out: a set of grades {promise}." in page.text
    assert f"; set of grades, {promise}: mild to moderate; " in describe(
        GradeRow(result.slide, GRADED, result.to_dict()), card
    )
    assert "; set of grades: mild to moderate; " in describe(
        GradeRow(other.slide, GRADED, dict(other.result)), card
    )
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_a_folder_without_a_graded_slide(card: ModelCard, tmp_path: Path) -> None:
    entries = [IndexEntry(Path("a.svs"), "a", {}, "a.svs: not a slide")]
    text = Page(write_index(tmp_path / "new", entries, card).read_text()).text
    assert "1 slides" not in text and "a.svs: not a slide" in text


def test_a_slide_whose_thumbnail_was_removed_has_no_picture(
    graded: Graded, card: ModelCard, tmp_path: Path
) -> None:
    result = graded("a")
    write_slide_report(result, card, tmp_path, "a")
    (tmp_path / "a.thumbnail.jpg").unlink()
    page = Page(write_index(tmp_path, [IndexEntry(result.slide, "a", result.to_dict())], card).read_text())
    assert [attributes["href"] for tag, attributes in page.elements if tag == "a"] == ["a.html"]
    assert not [tag for tag, _ in page.elements if tag == "img"]
