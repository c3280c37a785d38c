"""Cohorts of synthetic slides: patients, sites, grades and readers, and their files on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError
from slidetl.files import write_csv
from slidetl.synthetic.pyramid import BAND_PX, write_pyramid
from slidetl.synthetic.section import (
    GRADES,
    SHARE_PER_GRADE,
    TRUTH_CELL_UM,
    LungSection,
    SiteAppearance,
    SyntheticSlide,
    grade_of_share,
)

LABELS = ("truth", "consensus")
"""Choices of the grade in a manifest: the drawn one, or the consensus of its two readers."""


@dataclass(frozen=True)
class ColourSummary:
    """Colour and area of a slide: a baseline that must not solve the grading.

    Attributes:
        mean_rgb: mean colour of the parts visibly darker than glass, 0..255.
        stained_share: their share of the slide, 0..1.
    """

    mean_rgb: tuple[float, float, float]
    stained_share: float


def write_slide(slide: SyntheticSlide, slide_path: Path, truth_path: Path) -> ColourSummary:
    """Draws a slide band by band into a tiled JPEG pyramid, and its truth beside it.

    Args:
        slide: to be drawn; equal slides give equal bytes.
        slide_path: the TIFF to write.
        truth_path: the ``.npz`` to write: the arrays of :class:`TissueTruth` and ``cell_um``, the side
            of their cells in micrometres.
    """
    section = LungSection(slide)
    width, height = slide.size_px
    darker_than = np.floor(np.array(slide.appearance.white_rgb) - 24).astype(np.uint8)
    count, rgb = 0, np.zeros(3)  # of the stained pixels

    def bands() -> Iterator[NDArray[np.uint8]]:
        nonlocal count, rgb
        for top in range(0, height, BAND_PX):
            band = section.draw((0, top), (width, min(BAND_PX, height - top)))
            stained = (band < darker_than).any(axis=2)
            count += int(stained.sum())
            rgb += [float(band[..., channel][stained].sum(dtype=np.float64)) for channel in range(3)]
            yield band

    write_pyramid(slide_path, slide.size_px, slide.mpp, bands(), slide.appearance.jpeg_quality)
    np.savez_compressed(truth_path, **section.truth()._asdict(), cell_um=np.float64(TRUTH_CELL_UM))
    red, green, blue = (rgb / max(1, count)).tolist()
    return ColourSummary((red, green, blue), count / (width * height))


@dataclass(frozen=True)
class CohortSlide:
    """A slide with its row of the manifest.

    Attributes:
        slide_id: names its files.
        patient_id: all slides of a patient come from one site and differ by at most one grade.
        site: of staining and scanning.
        readers: grades 0 to 4 by two noisy readers.
        consensus: the readers' grade when they look together: the mean of their scores, rounded.
        drawn_grade: grade of the fibrotic share of the slide: the truth.
        grade: in the manifest: ``drawn_grade`` or ``consensus``.
        slide: to be drawn.
    """

    slide_id: str
    patient_id: str
    site: str
    readers: tuple[int, int]
    consensus: int
    drawn_grade: int
    grade: int
    slide: SyntheticSlide


@dataclass(frozen=True)
class SyntheticCohort:
    """Slides of known grade from several patients and sites.

    Attributes:
        slides: number of slides.
        patients: number of patients, at most ``slides``; 0 is 48, or as many as slides.
        sites: number of sites, each with its stain and scanner, at most ``patients``; 0 is 3, or as many as
            patients.
        size_px: width and height of each slide, pixels of level 0; at least 512.
        mpp: spacing of level 0, micrometres per pixel, 0.1..8.
        stain: haematoxylin and eosin, Masson's trichrome, or Sirius red.
        seed: seed of everything; the same seed gives the same bytes.
        share_per_grade: fibrotic share of the section for each grade, 0.01..0.12; less is harder.
        reader_sd: standard deviation of each reader's error, grades.
        label: grade in the manifest: as drawn, or the consensus of the two noisy readers.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    slides: int = 60
    patients: int = 0
    sites: int = 0
    size_px: int = 4096
    mpp: float = 0.5
    stain: Literal["he", "trichrome", "sirius"] = "he"
    seed: int = 0
    share_per_grade: float = SHARE_PER_GRADE
    reader_sd: float = 0.4
    label: Literal["truth", "consensus"] = "truth"

    def __post_init__(self) -> None:
        if self.slides < 1:
            raise UsageError(f"a cohort needs at least 1 slide, not {self.slides}")
        if self.patients == 0:
            object.__setattr__(self, "patients", min(48, self.slides))
        if self.sites == 0:
            object.__setattr__(self, "sites", min(3, self.patients))
        if not 1 <= self.patients <= self.slides:
            raise UsageError(
                f"{self.patients} patients need at least as many slides, and there must be at least 1 "
                f"patient; there are {self.slides} slides"
            )
        if not 1 <= self.sites <= self.patients:
            raise UsageError(
                f"{self.sites} sites need at least as many patients, and there must be at least 1 site; "
                f"there are {self.patients} patients"
            )
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, and is {self.seed}")
        if not 0.01 <= self.share_per_grade <= SHARE_PER_GRADE:
            raise UsageError(
                f"the share per grade must be from 0.01 to {SHARE_PER_GRADE} of the section, not "
                f"{self.share_per_grade}"
            )
        if not (math.isfinite(self.reader_sd) and self.reader_sd >= 0):
            raise UsageError(f"reader sd must be a number of grades from 0, not {self.reader_sd}")
        if self.label not in LABELS:
            raise UsageError(f"label must be one of {', '.join(LABELS)}, not {self.label!r}")
        # A slide checks the rest: better now than in the middle of the work.
        SyntheticSlide(0.0, 0, SiteAppearance.of(0, 0), self.stain, (self.size_px, self.size_px), self.mpp)

    def plan(self) -> list[CohortSlide]:
        """Plans the slides, in the order of the manifest; a pure function of the cohort's values.

        Grades are as balanced as the patients allow, overall and at each site.
        """
        rng = np.random.default_rng([self.seed, 0xC0407])
        appearances = [SiteAppearance.of(site, self.seed) for site in range(self.sites)]
        # Walking grades and sites in step visits every pair, once the shift has undone common factors.
        cycle = math.lcm(GRADES, self.sites)
        pairs = [(k % GRADES, (k + k // cycle) % self.sites) for k in range(self.patients)]
        patients = [pairs[k] for k in rng.permutation(self.patients)]
        leaning = rng.uniform(-1, 1, self.patients)  # a patient's place within the grade
        grades = [{grade} for grade, _ in patients]
        counts = np.bincount([grade for grade, _ in patients], minlength=GRADES)
        drawn = [(k, grade) for k, (grade, _) in enumerate(patients)]
        for extra in range(self.slides - self.patients):
            k = extra % self.patients
            # The rarest grade so far, as long as the patient's grades lie at most 1 apart.
            allowed = [g for g in range(GRADES) if max(grades[k] | {g}) - min(grades[k] | {g}) <= 1]
            grade = min(allowed, key=lambda g: (counts[g], g not in grades[k]))
            grades[k].add(grade)
            counts[grade] += 1
            drawn.append((k, grade))
        digits = len(str(self.slides - 1))
        planned = []
        for number, (k, grade) in enumerate(sorted(drawn, key=lambda pair: pair[0])):
            within = 0.2 * leaning[k] + rng.uniform(-0.15, 0.15)  # stays clear of the borders between grades
            severity = max(0.0, grade + within)
            seen = severity + rng.normal(0, self.reader_sd, 2)
            *read, consensus = np.clip(np.rint([*seen, seen.mean()]), 0, GRADES - 1).astype(int).tolist()
            site = patients[k][1]
            share, seed = float(severity * self.share_per_grade), int(rng.integers(1 << 32))
            size_px = (self.size_px, self.size_px)
            slide = SyntheticSlide(share, seed, appearances[site], self.stain, size_px, self.mpp)
            truth = grade_of_share(slide.fibrotic_share, self.share_per_grade)
            grade = truth if self.label == "truth" else consensus
            names = (f"slide-{number:0{digits}d}", f"patient-{k:0{digits}d}", f"site-{site}")
            planned.append(CohortSlide(*names, (read[0], read[1]), consensus, truth, grade, slide))
        return planned


def write_cohort(
    cohort: SyntheticCohort,
    out: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ColourSummary]:
    """Writes ``slides/*.tiff``, ``truth/*.npz`` and, last, ``manifest.csv`` into a folder.

    Args:
        cohort: to be written.
        out: the folder; created if needed.
        workers: processes; the bytes do not depend on them.
        overwrite: replace an earlier cohort in ``out``.
        progress: called with the number of slides done and of all slides.

    Returns:
        Colour and stained area of each slide, in the order of the manifest and of
        :meth:`SyntheticCohort.plan`.

    Raises:
        UsageError: ``out`` is not empty and ``overwrite`` is off, or ``workers`` is less than 1.
    """
    if workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; a folder is needed for the slides")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"{out} is not empty; name another folder, or allow overwriting")
        for stale in [out / "manifest.csv", *out.glob("slides/slide-*.tiff"), *out.glob("truth/slide-*.npz")]:
            stale.unlink(missing_ok=True)
    (out / "slides").mkdir(parents=True, exist_ok=True)
    (out / "truth").mkdir(exist_ok=True)
    planned = cohort.plan()
    jobs = [
        (entry.slide, out / "slides" / f"{entry.slide_id}.tiff", out / "truth" / f"{entry.slide_id}.npz")
        for entry in planned
    ]
    summaries: list[ColourSummary] = []
    with ExitStack() as stack:
        run: Callable[..., Iterator[ColourSummary]] = map
        if workers > 1:  # fresh processes: forking one with threads (of OpenMP or a progress bar) may hang
            run = stack.enter_context(ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"))).map
        for summary in run(write_slide, *zip(*jobs, strict=True)):
            summaries.append(summary)
            progress(len(summaries), len(jobs))
    _write_manifest(planned, out / "manifest.csv")
    return summaries


def _write_manifest(planned: list[CohortSlide], path: Path) -> None:
    columns = ["slide_id", "path", "patient_id", "grade", "site", "scanner", "stain"]
    columns += ["grade_reader1", "grade_reader2"]
    rows = []
    for entry in planned:
        about = (entry.slide_id, f"slides/{entry.slide_id}.tiff", entry.patient_id, entry.grade)
        scanner = entry.site.replace("site", "scanner")
        cells = (*about, entry.site, scanner, entry.slide.stain, *entry.readers)
        rows.append(dict(zip(columns, cells, strict=True)))
    write_csv(path, columns, rows)
