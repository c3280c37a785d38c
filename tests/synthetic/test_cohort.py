from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetl.errors import UsageError
from slidetl.synthetic.cohort import SyntheticCohort, write_cohort
from slidetl.synthetic.section import GRADES, LungSection, grade_of_share

SMALL = SyntheticCohort(slides=4, patients=3, sites=2, size_px=520, mpp=6.0, seed=1000)


@settings(max_examples=60, deadline=None)
@given(
    patients=st.integers(5, 60),
    more=st.integers(0, 60),
    sites=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_patients_stay_at_one_site_and_near_one_grade(
    patients: int, more: int, sites: int, seed: int
) -> None:
    plan = SyntheticCohort(patients + more, patients, sites, seed=seed).plan()
    assert len(plan) == len({entry.slide_id for entry in plan}) == patients + more
    by_patient: dict[str, list[int]] = {}
    for entry in plan:
        by_patient.setdefault(entry.patient_id, []).append(entry.drawn_grade)
    assert len(by_patient) == patients
    assert all(max(grades) - min(grades) <= 1 for grades in by_patient.values())
    sites_of = {(entry.patient_id, entry.site) for entry in plan}
    assert len(sites_of) == patients
    assert len({site for _, site in sites_of}) == sites
    if patients >= 5 * np.lcm(5, sites):
        assert len({(entry.site, entry.drawn_grade) for entry in plan}) == GRADES * sites


@pytest.mark.parametrize(("slides", "patients"), [(60, 48), (72, 58), (100, 80), (33, 33)])
@pytest.mark.parametrize("seed", [1000, 1001, 1002])
def test_grades_are_balanced(slides: int, patients: int, seed: int) -> None:
    plan = SyntheticCohort(slides, patients, 3, seed=seed).plan()
    counts = Counter(entry.drawn_grade for entry in plan)
    assert max(counts.values()) - min(counts[grade] for grade in range(GRADES)) <= 1


def test_readers_scatter_around_the_truth() -> None:
    plan = SyntheticCohort(400, 400, 3, seed=1000).plan()
    truth = np.array([entry.drawn_grade for entry in plan])
    readers = np.array([entry.readers for entry in plan])
    assert 0.65 < (readers == truth[:, None]).mean() < 0.9
    assert 0.5 < (readers[:, 0] == readers[:, 1]).mean() < 0.85
    assert np.abs(readers - truth[:, None]).max() <= 2
    exact = SyntheticCohort(50, 50, 3, seed=1000, reader_sd=0).plan()
    assert all(entry.readers == (entry.drawn_grade, entry.drawn_grade) for entry in exact)


def test_readers_who_look_together_err_less_than_either_alone() -> None:
    plan = SyntheticCohort(400, 400, 3, seed=1000, label="consensus").plan()
    truth = np.array([entry.drawn_grade for entry in plan])
    consensus = np.array([entry.consensus for entry in plan])
    readers = np.array([entry.readers for entry in plan])
    # Of two errors, normal with sd 0.4 each, the mean has sd 0.28; with the slide's own place within
    # its grade, uniform sums of sd 0.14, P(|error| < 0.5) = 0.886, and half as many errors at either end.
    assert 0.86 < (consensus == truth).mean() < 0.95
    assert ((readers.min(axis=1) <= consensus) & (consensus <= readers.max(axis=1))).all()
    assert [entry.grade for entry in plan] == consensus.tolist()
    drawn = SyntheticCohort(400, 400, 3, seed=1000).plan()
    assert [entry.grade for entry in drawn] == truth.tolist()
    assert [entry.slide for entry in drawn] == [entry.slide for entry in plan]


def test_a_smaller_share_per_grade_draws_less_fibrosis_for_the_same_grades_and_readers() -> None:
    usual = SyntheticCohort(60, 48, 3, seed=1000).plan()
    harder = SyntheticCohort(60, 48, 3, seed=1000, share_per_grade=0.06).plan()
    for a, b in zip(usual, harder, strict=True):
        assert b.slide.fibrotic_share == pytest.approx(a.slide.fibrotic_share / 2)
        assert grade_of_share(b.slide.fibrotic_share, 0.06) == b.drawn_grade == a.drawn_grade
        assert (b.readers, b.consensus, b.slide.seed) == (a.readers, a.consensus, a.slide.seed)


def test_neither_names_nor_order_tell_the_grade() -> None:
    grades = [entry.drawn_grade for entry in SyntheticCohort(300, 300, 3, seed=1000).plan()]
    assert abs(np.corrcoef(grades, np.arange(300))[0, 1]) < 0.15
    assert abs(np.corrcoef(grades[1:], grades[:-1])[0, 1]) < 0.15


@pytest.mark.slow
def test_written_cohort(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summaries = write_cohort(SMALL, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 4) for k in (1, 2, 3, 4)]
    with (tmp_path / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == (
        [
            "slide_id",
            "path",
            "patient_id",
            "grade",
            "site",
            "scanner",
            "stain",
            "grade_reader1",
            "grade_reader2",
        ]
    )
    for row, entry, summary in zip(rows, SMALL.plan(), summaries, strict=True):
        assert (row["slide_id"], row["patient_id"], row["site"]) == (
            entry.slide_id,
            entry.patient_id,
            entry.site,
        )
        assert (int(row["grade_reader1"]), int(row["grade_reader2"])) == entry.readers
        drawn = LungSection(entry.slide).draw((0, 0), entry.slide.size_px)
        with openslide.OpenSlide(tmp_path / row["path"]) as slide:
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(6.0)
            read = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(float)
        assert np.abs(read - drawn).mean() < 6  # chroma is stored at half the resolution
        assert read.mean(axis=(0, 1)) == pytest.approx(drawn.mean(axis=(0, 1)), abs=1)
        darker = (drawn < np.array(entry.slide.appearance.white_rgb) - 24).any(axis=2)
        assert summary.stained_share == pytest.approx(darker.mean(), abs=0.01)
        assert summary.mean_rgb == pytest.approx(drawn[darker].mean(axis=0), abs=1)
        with np.load(tmp_path / "truth" / f"{row['slide_id']}.npz", allow_pickle=False) as truth:
            assert float(truth["cell_um"]) == 64
            assert truth["collagen_fraction"].dtype == np.float16
            share = truth["collagen_fraction"].sum(dtype=float) / truth["tissue_fraction"].sum(dtype=float)
            assert truth["lesion_fraction"].shape == (49, 49)  # 3120 micrometres in cells of 64
        assert grade_of_share(share) == entry.drawn_grade == int(row["grade"])


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    write_cohort(SMALL, tmp_path / "a")
    write_cohort(SMALL, tmp_path / "b", workers=2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 4 + 4 + 1
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_folder_in_use_is_left_alone_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("mine")
    stale = tmp_path / "slides" / "slide-9.tiff"
    stale.parent.mkdir()
    stale.write_text("old")
    with pytest.raises(UsageError, match="is not empty"):
        write_cohort(SMALL, tmp_path)
    assert stale.exists()
    write_cohort(SMALL, tmp_path, overwrite=True)
    assert note.read_text() == "mine"
    assert not stale.exists()
    with pytest.raises(UsageError, match="is a file"):
        write_cohort(SMALL, note, overwrite=True)
    with pytest.raises(UsageError, match="workers must be at least 1"):
        write_cohort(SMALL, tmp_path / "new", workers=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slides": 0}, "at least 1 slide"),
        ({"slides": 5, "patients": 6}, "6 patients need at least as many slides"),
        ({"patients": -1}, "at least 1 patient"),
        ({"slides": 2, "patients": 2, "sites": 3}, "3 sites need at least as many patients"),
        ({"size_px": 500}, "at least 512"),
        ({"mpp": -1.0}, "0.1 to 8"),
        ({"stain": "pas"}, "not 'pas'"),
        ({"seed": -1}, "seed"),
        ({"reader_sd": float("nan")}, "reader sd"),
        ({"share_per_grade": float("nan")}, "share per grade must be from 0.01 to 0.12"),
        ({"share_per_grade": 0.13}, "share per grade must be from 0.01 to 0.12"),
        ({"label": "reader1"}, "label must be one of truth, consensus, not 'reader1'"),
    ],
)
def test_values_that_cannot_be_meant(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SyntheticCohort(**values)  # type: ignore[arg-type]
