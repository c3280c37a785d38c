from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from slidetl.errors import OutputError
from slidetl.files import partial_path
from slidetl.grading.grade import SlideGrade
from slidetl.grading.report.slide import has_foreign_page, has_slide_report, remove_page, write_slide_report
from slidetl.library.model_card import ModelCard
from slidetl.page import script_json
from tests.conftest import PyramidTiff
from tests.grading.report.conftest import Graded, explanation_of, grade_of

HOSTILE = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The elements of a page, each with its attributes, and what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.scripts: list[str] = []
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""
        self.words += " "

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts[-1] += data
        elif self._within != "style":
            self.words += data

    @property
    def text(self) -> str:
        return " ".join(self.words.split())


def test_says_what_the_model_said_and_what_it_is(graded: Graded, card: ModelCard, tmp_path: Path) -> None:
    path = write_slide_report(graded(), card, tmp_path / "out", "s1")
    assert path == tmp_path / "out" / "s1.html"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "s1.geojson",
        "s1.html",
        "s1.thumbnail.jpg",
    ]
    text = Page(path.read_text()).text
    for said in (
        "For research; not a medical device.",
        "Grade moderate",
        "Not ruled out: mild to moderate",
        "mild to moderate (such a set is made to hold the true grade of 90 % of patients like those of the "
        "evidence)",
        "60.0 %",
        "Continuous score 1.75 of 0 to 3, where 0 is grade none and 3 grade severe: the mean of the grades",
        "0.8 mm²",
        "0.70 (above 1",
        "60 slides of 50 patients; sites: north, south; scanners: GT450; stains: trichrome",
        "QWK 0.71 [0.60, 0.80]",
        "CC BY 4.0",
        "ab" * 32,
        "23" * 32,
        "Tiles that raise the score most",
        "Contribution to the latent score (log-odds), times the number of tiles, and attention",
        "Finest detail on this page: 0.5 µm per pixel; the slide has 0.5.",
    ):
        assert said in text
    assert "too little" not in text and "unlike the slides that" not in text
    assert not card.doubts_about(1.0, 0.5) and not card.doubts_about(None)
    assert card.evidence is not None
    figures = {"QWK": (1.0, 1.0, 1.0)}  # of an older file
    point = dataclasses.replace(card, evidence=dataclasses.replace(card.evidence, figures=figures))
    path = write_slide_report(graded(), point, tmp_path / "older", "s1")
    text = Page(path.read_text()).text
    assert "QWK 1.00 (no interval)" in text and "[1.00" not in text
    assert "50 patients kept from the training" in text
    arm = dataclasses.replace(card, evidence=dataclasses.replace(card.evidence, arm="warm"))
    text = Page(write_slide_report(graded(), arm, tmp_path / "arm", "s1").read_text()).text
    assert "graded by networks trained alike on other patients (arm warm of a comparison), not by" in text
    assert "kept from the training" not in text
    assert "like those of the evidence, but not tried with this file)" in text


def test_says_what_speaks_against_the_grade(graded: Graded, card: ModelCard, tmp_path: Path) -> None:
    doubts = card.doubts_about(2.5, 0.3)
    result = dataclasses.replace(graded(), tissue_mm2=0.3, novelty=2.5, grade_set=None, doubts=doubts)
    bare = dataclasses.replace(card, evidence=None, licence="")
    text = Page(write_slide_report(result, bare, tmp_path, "s1").read_text()).text
    assert "too little tissue: 0.3 mm2, where every slide that the model was trained on has 0.5 mm2" in text
    assert "unlike the slides that the model was trained on (stains: trichrome): its novelty is 2.5" in text
    assert "no evidence" in text and "Not ruled out" not in text and "Licence not stated" in text
    training = dataclasses.replace(card.training, least_tissue_mm2=0.5004) if card.training else None
    bare = dataclasses.replace(bare, training=training)
    doubts = bare.doubts_about(1.00004, 0.4996)
    near = dataclasses.replace(result, tissue_mm2=0.4996, novelty=1.00004, doubts=doubts)
    text = Page(write_slide_report(near, bare, tmp_path, "s1").read_text()).text
    assert "tissue: 0.4996 mm2, where every slide that the model was trained on has 0.5004 mm2" in text
    assert "its novelty is 1.00004, where none of theirs is above 1" in text
    assert "Novelty 1.00004 (above 1" in text and near.to_dict()["novelty"] == 1.00004
    near = dataclasses.replace(near, grade_set=(1, 2))
    text = Page(write_slide_report(near, card, tmp_path, "s1").read_text()).text
    assert "Not ruled out: mild to moderate" in text and "90 %" not in text


def test_counts_what_was_left_out(graded: Graded, card: ModelCard, tmp_path: Path) -> None:
    result = graded()
    left_out = {"pen": result.origins_level0[:4], "fold": result.origins_level0[:0]}
    plan = dataclasses.replace(result.plan, left_out_level0=left_out)
    result = dataclasses.replace(
        result,
        plan=plan,
        origins_level0=result.origins_level0[3:],
        attention=result.attention[3:],
        explanation=explanation_of(result.explanation.contributions[3:].astype(np.float64)),
    )
    text = Page(write_slide_report(result, card, tmp_path, "s1").read_text()).text
    assert "Pen measured only 4" in text
    assert "Unreadable damaged in the file 3" in text
    assert f"{len(plan) - 3} of {len(plan)} tiles graded" in text


def test_nothing_from_outside_becomes_markup(
    pyramid_tiff: PyramidTiff, graded: Graded, card: ModelCard, tmp_path: Path
) -> None:
    result = graded(HOSTILE)
    bad = "</script><script>alert(2)</script>"
    card = dataclasses.replace(
        card,
        grades=(bad, *card.grades[1:]),
        licence=bad,
        backbone=bad,
        versions={bad: bad},
        training=dataclasses.replace(card.training, sites=(bad,)) if card.training else None,
    )
    page = Page(write_slide_report(result, card, tmp_path / "out", "s1").read_text())
    assert f"{HOSTILE}.tiff" in page.text and page.text.count(bad) >= 5
    assert len(page.scripts) == 3  # the data, the viewer, and ours
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert all(
        attributes["src"] and attributes["src"].startswith("data:image/jpeg;base64,")
        for tag, attributes in page.elements
        if tag == "img"
    )
    assert not [tag for tag, attributes in page.elements if attributes.get("style")]
    (policy,) = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy and policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


def test_json_in_a_script_cannot_end_it() -> None:
    values = {"<!--": "</script>", "a": [1.5, None]}
    text = str(script_json(values))
    assert "<" not in text and json.loads(text) == values


def test_the_page_stays_within_its_budget(graded: Graded, card: ModelCard, tmp_path: Path) -> None:
    result = graded()
    whole = write_slide_report(result, card, tmp_path, "whole").stat().st_size
    small = write_slide_report(result, card, tmp_path, "small", budget_bytes=50_000)
    assert small.stat().st_size < whole - 100_000
    text = Page(small.read_text()).text
    assert "Finest detail on this page: 2 µm per pixel; the slide has 0.5." in text


def test_a_page_is_known_by_the_result_it_shows(graded: Graded, card: ModelCard, tmp_path: Path) -> None:
    result = graded()
    assert not has_slide_report(tmp_path, "s1", result.to_dict())
    write_slide_report(result, card, tmp_path, "s1")
    assert has_slide_report(tmp_path, "s1", result.to_dict())
    for other in ({"model_sha256": "00" * 32}, {"tissue_mm2": 0.9}, {"precision": "bfloat16"}):
        assert not has_slide_report(tmp_path, "s1", dataclasses.replace(result, **other).to_dict())
    read = {**json.loads(json.dumps(result.to_dict())), "slide": "/where/it/is/now.tiff"}
    assert has_slide_report(tmp_path, "s1", read)
    assert not has_foreign_page(tmp_path, "s1") and not has_foreign_page(tmp_path, "s2")
    blocked = partial_path(tmp_path / "s2.geojson")
    blocked.mkdir()  # it ends before all is written
    with pytest.raises(OutputError):
        write_slide_report(result, card, tmp_path, "s2")
    assert (tmp_path / "s2.html").exists() and not has_foreign_page(tmp_path, "s2")
    blocked.rmdir()
    remove_page(tmp_path, "s2")
    (tmp_path / "own.html").write_text("<title>of somebody else</title>")
    assert has_foreign_page(tmp_path, "own")
    (tmp_path / "own.geojson").write_text("{}")
    for name in ("own", "s1"):
        remove_page(tmp_path, name)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["own.geojson", "own.html", "slide.tiff"]


def test_the_index_of_the_first_release_is_known(tmp_path: Path) -> None:
    ours = '<table id="slides">\n</table>\n<footer><p>For research. Made by slidetl.</p></footer>'
    for name, content in (("slide", ours), ("index", ours[:20]), ("index", ours)):
        page = tmp_path / f"{name}.html"
        page.write_text(content)
        is_foreign = (name, content) != ("index", ours)
        assert has_foreign_page(tmp_path, name) == is_foreign
        remove_page(tmp_path, name)
        assert page.exists() == is_foreign


def test_a_slide_of_a_single_tile(pyramid_tiff: PyramidTiff, card: ModelCard, tmp_path: Path) -> None:
    picture = np.full((128, 128, 3), (200, 120, 170), np.uint8)
    result = grade_of(pyramid_tiff(picture, mpp=0.5))
    assert len(result.attention) == 1
    text = Page(write_slide_report(result, card, tmp_path, "s1").read_text()).text
    assert "The model weighs all tiles alike." in text and "1 of 1 tiles graded" in text


def test_tiles_that_do_not_raise_the_score_are_not_shown_as_such(
    graded: Graded, card: ModelCard, tmp_path: Path
) -> None:
    def page_of(result: SlideGrade, contributions: list[float]) -> Page:
        values = np.array([*contributions, *[0.0] * (len(result.attention) - len(contributions))])
        result = dataclasses.replace(result, explanation=explanation_of(values))
        return Page(write_slide_report(result, card, tmp_path, "s1").read_text())

    result = graded()
    n = len(result.attention)
    text = page_of(result, [-0.02] * (n - 1) + [1.0]).text
    raising, lowering = text.split("Tiles that raise the score most")[1].split(
        "Tiles that lower the score most"
    )
    assert raising.count("×") == 1 and f"+{n:.2f}" in raising and lowering.count(f"-{n / 50:.2f}") == 8
    page = page_of(result, [])  # as by occlusion, if no group of tiles is missed
    assert "raise the score" not in page.text and "lower the score" not in page.text
    most = np.argsort(-result.attention)[:8]
    places = [about["aria-label"] for _, about in page.elements if about.get("class") == "tile"]
    assert places == [
        f"Show the tile at {x}, {y} in the slide" for x, y in result.origins_level0[most].tolist()
    ]
