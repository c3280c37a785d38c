"""The page of a folder of graded slides: a table to sort, with a link to each slide's own page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slidetl.grading.report.slide import has_slide_report, result_sha256
from slidetl.library.model_card import ModelCard
from slidetl.page import data_uri, write_page
from slidetl.text import short_names


@dataclass(frozen=True)
class IndexEntry:
    """A slide in the index.

    Attributes:
        slide: the file, as given.
        name: name of its page, without ``.html``.
        result: as :meth:`slidetl.grading.grade.SlideGrade.to_dict`; empty for a failed slide.
        reason: cause of the failure.
        notes: doubts about the slide.
    """

    slide: Path
    name: str
    result: Mapping[str, Any]
    reason: str = ""
    notes: tuple[str, ...] = ()


def write_index(folder: Path, entries: Sequence[IndexEntry], card: ModelCard) -> Path:
    """Writes ``index.html`` over the pages of :func:`slidetl.grading.report.slide.write_slide_report`.

    Returns:
        The path of the page.

    Raises:
        OSError: it cannot be written.
    """
    page = folder / "index.html"
    noun = "series" if card.tile_spec.is_volume else "slides"
    ordered = sorted(entries, key=lambda entry: (entry.slide.name.lower(), str(entry.slide)))
    titles = short_names(entry.slide for entry in entries)
    write_page(
        page,
        __package__,
        "index.html",
        "style.css",
        ("index.js",),
        title=f"{len(entries)} {'slide' if noun == 'slides' and len(entries) == 1 else noun}",
        noun=noun,
        result_sha256=result_sha256({str(entry.slide): dict(entry.result) for entry in ordered}),
        rows=[{"slide": titles[entry.slide], **_row(folder, entry, card)} for entry in ordered],
        n_failed=sum(not entry.result for entry in entries),
        card=card,
        has_sets=any(entry.result.get("grade_set") for entry in entries),
        has_novelty=any(entry.result.get("novelty") is not None for entry in entries),
    )
    return page


def _row(folder: Path, entry: IndexEntry, card: ModelCard) -> dict[str, Any]:
    result = entry.result
    thumbnail = folder / f"{entry.name}.thumbnail.jpg"
    has_page = bool(result) and has_slide_report(folder, entry.name, result)
    grade_set = result.get("grade_set")
    return {
        "folder": str(entry.slide.parent),
        # A page of an earlier run would contradict the row.
        "page": quote(f"{entry.name}.html") if has_page else "",
        "thumbnail": data_uri("jpeg", thumbnail.read_bytes()) if has_page and thumbnail.is_file() else "",
        "result": result,
        "set": [card.grades[grade] for grade in grade_set] if grade_set else [],
        "reason": entry.reason,
        "notes": entry.notes,
    }
