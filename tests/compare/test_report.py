"""The page of a comparison, made from invented predictions by the real statistics."""

from __future__ import annotations

import base64
import csv
import struct
from collections import Counter
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from slidetl.compare import aggregate
from slidetl.compare.aggregate import ArmResult, ComparisonResult, combine
from slidetl.compare.config import (
    Arm,
    Classical,
    Comparison,
    Groups,
    MetricName,
    Permutations,
    Primary,
    Sizes,
)
from slidetl.compare.external import External
from slidetl.compare.plan import Job, cases_of, plan_jobs
from slidetl.compare.records import CurvePoint, JobResult
from slidetl.compare.report import plots
from slidetl.compare.report.checklists import checklists_of
from slidetl.compare.report.document import write_html
from slidetl.compare.report.page import document_of, renderer, write_report
from slidetl.compare.report.tables import by_layer, tables_of
from slidetl.compare.report.view import View
from slidetl.compare.table import Table, format_interval
from slidetl.compare.tables import write_tables
from slidetl.data.manifest import ManifestRow
from slidetl.data.study import CachedSlide, Study
from slidetl.errors import UsageError
from slidetl.evaluation.agreement import reader_ceiling
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.comparison import corrected_t, metric_per_fold
from slidetl.evaluation.metrics import qwk
from slidetl.evaluation.protocol import Fold, Protocol, plan_folds, subsample
from slidetl.tiles.codec import tile_codec
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import CacheHeader, SlideCache
from slidetl.training.predictions import SlidePrediction

TRANSFER = "slidetl.models.transfer"
SECTIONS = (
    *("arms", "protocol", "others", "confusion", "learning", "sizes", "calibration", "referral", "readers"),
    *("sites", "external", "score", "power", "layers", "limits", "provenance"),
)
DRAWN = {"forest", "confusion", "learning", "sizes", "reliability", "referral", "drift", "similarity"}
READERS = (2, 5)  # numbers in the manifest
HOSTILE = '<img src=x onerror="alert(1)">'
PNG = b"\x89PNG\r\n\x1a\n"


def fit(name: str, **model: Any) -> dict[str, Any]:
    return {"model": {"transfer": {"class_path": f"{TRANSFER}.{name}"}, **model}}


def invented_study(n_patients: int, *, sites: tuple[str, ...], readers: int, seed: int = 0) -> Study:
    """Slides, five to three patients, all of a patient of one grade; no tiles."""
    rng = np.random.default_rng(seed)
    rows: list[ManifestRow] = []
    for patient in range(n_patients):
        grade, site = patient % 5, sites[patient % 7 % len(sites)]
        for slide in range(1 + (patient % 3 != 0)):
            readings = np.clip(np.round(grade + 0.4 * rng.standard_normal(readers)), 0, 4).astype(int)
            rows.append(
                ManifestRow(
                    line=len(rows) + 2,
                    slide_id=f"p{patient:03d}-{slide}",
                    path=Path("none.tiff"),
                    patient_id=f"p{patient:03d}",
                    grade=grade,
                    site=site,
                    scanner=site and f"scanner of {site}",
                    reader_grades=tuple(readings.tolist()),
                    readers=READERS[:readers],
                    split="test" if patient // 5 % 3 == 0 else "train",
                )
            )
    return Study(tuple(rows), tuple(CachedSlide(row, _no_tiles(row)) for row in rows), Path("cache"))


def _no_tiles(row: ManifestRow) -> SlideCache:
    spec = TileSpec(mpp=4, tile_size_px=64)
    header = CacheHeader(
        row.slide_id, row.slide_id, "", (1, 1), (4, 4), (4, 4), (64, 64), spec, software="slidetl 0.0.1"
    )
    return SlideCache(
        Path(f"{row.slide_id}.zarr"),
        header,
        np.empty((0, 2), np.int32),
        np.empty(0, np.float32),
        tile_codec(spec),
    )


def invented_result(
    study: Study,
    fold: Fold,
    noise: float,
    *,
    epochs: int,
    speed: float,
    drift: float,
    nested: bool,
    seed: int,
    temperature: float,
) -> JobResult:
    """Predictions that err by ``noise`` grades; a curve that rises at a speed where there are epochs."""
    rng = np.random.default_rng([seed, fold.seed % 2**31])
    grades = np.arange(5)
    rows = [row for row in study.rows if row.slide_id in fold.test]
    predictions, draws = [], {}
    for row in rows:
        assert row.grade is not None
        score = row.grade + noise * rng.standard_normal()
        probabilities = np.exp(-((grades - score) ** 2) / (1.4 * noise**2))
        probabilities /= probabilities.sum()
        predictions.append(
            SlidePrediction(
                row.slide_id, row.patient_id, row.grade, tuple(probabilities.tolist()), 50, row.site
            )
        )
        draws[row.slide_id] = (score + 0.05 * rng.standard_normal(8)).tolist()
    curve = []
    for part in (*(f"inner-{number}" for number in range(2 * nested)), "test") if epochs else ():
        best = 1 - noise / 2
        held = fold.inner[int(part[-1])].validation if part != "test" and fold.inner else fold.test
        n = len({row.patient_id for row in study.rows if row.slide_id in held})
        for epoch in range(5, epochs + 1, 5):
            qwk = best * (1 - np.exp(-speed * epoch)) + 0.03 * rng.standard_normal()
            curve.append(
                CurvePoint(
                    part, 0, epoch, n, epoch * 1.5, 2 - qwk, 0.8 * qwk, qwk, 0.25 - 0.2 * qwk, 1.6 - qwk
                )
            )
    layers = [f"blocks.{block}.{part}" for block in range(5) for part in ("conv_pw", "conv_dw", "conv_pwl")]
    # The network tells the site: of patients that it was trained on, and of the others.
    sites = sorted({row.site for row in study.rows})
    at = {row.slide_id: sites.index(row.site) for row in study.rows}
    embeddings = np.array([3 * np.eye(4)[at[slide]] for slide in (*fold.train, *fold.test)])
    embeddings += rng.standard_normal(embeddings.shape)
    return JobResult(
        tuple(predictions),
        tuple(curve),
        draws if epochs else {},
        {layer: drift * (1 + depth / 8) + 0.02 * rng.random() for depth, layer in enumerate(layers)}
        if drift
        else {},
        {layer: float(np.exp(-0.1 * depth)) for depth, layer in enumerate(layers)} if epochs else {},
        {"epochs": epochs} if epochs else None,
        temperature if nested and epochs else 1.0,
        bool(nested and epochs),
        12.0 if epochs else 0.1,
        embeddings.astype(np.float32) if epochs and len(sites) > 1 else np.empty((0, 0), np.float32),
    )


def invented(
    n_patients: int = 60,
    *,
    arms: dict[str, Arm] | None = None,
    sites: tuple[str, ...] = ("north", "south", "west"),
    readers: int = 2,
    missing: tuple[str, ...] = (),
    nested: bool = True,
    given_split: bool = False,
    by_site: bool = False,
    repeats: int = 2,
    grades: list[str] | None = None,
    sizes: tuple[int, ...] = (20, 40),
    draws: int = 100,
    noise: float = 0.55,
    groups: Groups | None = None,
    temperature: float = 1.1,
    reads: tuple[int, ...] | None = None,
    subsets: int = 1,
    test_grade: int | None = None,
    test_site: str = "",
    metric: MetricName = "qwk",
    refits: int = 0,
) -> ComparisonResult:
    """A comparison whose first two arms are the primary ones; units of ``missing`` arms are not done."""
    arms = arms or {"warm": Arm(fit=fit("WarmRestart")), "scratch": Arm(fit=fit("Scratch")),
                    "prior": Arm(baseline="prior")}  # fmt: skip
    first, second, *_ = arms
    comparison = Comparison(
        manifest="manifest.csv",
        cache="cache",
        arms=arms,
        primary=Primary(first, second, metric),
        protocol=Protocol(
            repeats=repeats,
            outer_folds=5,
            inner_folds=2 if nested else 0,
            given_split=given_split,
            leave_one_site_out=by_site,
        ),
        base={"model": {"backbone": {"name": "mobilenetv3_small_050"}}, "trainer": {"max_epochs": 30}},
        grades=grades or ["0", "1", "2", "3", "4"],
        bootstrap_draws=draws,
        sizes=Sizes(list(sizes), [first, second] if sizes else [], subsets),
        permutations=Permutations(3, [first]),
        groups=groups,
    )
    study = invented_study(n_patients, sites=sites, readers=readers)
    if reads is not None:  # slide n is read by this one alone
        slides = [
            replace(slide, row=replace(slide.row, reader_grades=tuple(
                grade if reader == reads[n % len(reads)] else None
                for reader, grade in enumerate(slide.row.reader_grades)
            )))
            for n, slide in enumerate(study.slides)
        ]  # fmt: skip
        study = replace(study, slides=tuple(slides))
    if test_grade is not None:
        of_test = [slide.row.split == "test" for slide in study.slides]
        slides = [
            replace(slide, row=replace(slide.row, grade=test_grade)) if held else slide
            for slide, held in zip(study.slides, of_test, strict=True)
        ]
        study = replace(study, slides=tuple(slides))
    if test_site:
        slides = [
            replace(slide, row=replace(slide.row, site=test_site)) if slide.row.split == "test" else slide
            for slide in study.slides
        ]
        study = replace(study, slides=tuple(slides))
    folds = plan_folds(cases_of(study), comparison.protocol, 5)
    done: list[tuple[Job, JobResult | None]] = []
    for number, (name, arm) in enumerate(arms.items()):
        trained = arm.fit is not None
        options = {
            "epochs": 30 if trained else 0,
            "speed": 0.3 if number != 1 else 0.08,
            "drift": 0.0 if number == 1 or not trained else 0.1 * number + 0.1,
            "nested": nested,
            "seed": number,
            "temperature": temperature,
        }
        own_noise = 1.6 if arm.baseline else noise + 0.12 * number
        for fold in folds:
            found = invented_result(study, fold, own_noise, **options)  # type: ignore[arg-type]
            done.append((Job(name, fold, None, None, {}, f"key-{name}"), None if name in missing else found))
            for size, subset in product(sizes if number < 2 else (), range(subsets)):
                part = subsample(fold, cases_of(study), size, 5, subset, subsets)
                found = invented_result(study, part, own_noise + 12 / size, **options)  # type: ignore[arg-type]
                done.append((Job(name, part, size, None, {}, f"key-{name}-{size}"), found))
    for number in range(refits):
        refitted = [(replace(job, permutation=number), found) for job, found in done
                    if (job.arm, job.n_slides, job.permutation) == (first, None, None)]  # fmt: skip
        done += refitted
    return combine(comparison, study, folds, done)


def weighted(n_grades: int, true: Any, predicted: Any, weights: Any) -> NDArray[np.float64]:
    return qwk(true, predicted, n_grades, weights)


class Page(HTMLParser):
    """What a browser would find: sections with their text, tables, images, and elements by name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self.images: list[dict[str, str]] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._section, self._cell = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {name: value or "" for name, value in attrs}
        self.tags.append((tag, about))
        if tag == "section":
            self._section = about["id"]
        elif tag == "img":
            self.images.append(about)
        elif tag == "tr":
            self.rows.append((self._section, []))
        elif tag in ("td", "th"):
            self._cell = True
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data
        if self._cell:
            self.rows[-1][1][-1] += data

    def row(self, section: str, first: str) -> list[str]:
        return next(row for where, row in self.rows if (where, row[:1]) == (section, [first]))


def written(result: ComparisonResult, folder: Path, **options: Any) -> Page:
    write_tables(result, folder)
    write_report(result, folder, **options)
    return Page(folder / "report.html")


def worded(result: ComparisonResult, folder: Path) -> Page:
    """The page without its plots, which take most of the time."""
    write_tables(result, folder)
    view = View(result, {})
    write_html(folder / "report.html", document_of(view, tables_of(view), {}))
    return Page(folder / "report.html")


def by_patient(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Predictions of slides -> one of each patient: by its worst grade, and its worst predicted slide."""
    worst: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: (int(row["predicted_grade"]), float(row["expected_grade"]))):
        columns = ["grade", *(name for name in row if name.startswith("grade_reader"))]
        before = worst.get(row["patient_id"], row)
        worst[row["patient_id"]] = row | {name: max(row[name], before[name]) for name in columns}
    return list(worst.values())


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ComparisonResult, Path]:
    """A finished comparison with everything that a report may have."""
    folder = tmp_path_factory.mktemp("report")
    result = invented()
    written(result, folder)
    return result, folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[ComparisonResult, Path]:
    """Twenty patients, one repeat, with inner folds."""
    folder = tmp_path_factory.mktemp("small")
    result = invented(20, repeats=1, sizes=())
    written(result, folder)
    return result, folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_shown(row: dict[str, str], form: str = "{:.2f}") -> str:
    """An interval of results.csv as the page shows it."""
    form = "{:.3f}" if row["metric"] in ("rps", "log_loss") else form
    values = [
        form.format(round(float(row[name]), 3 if "3" in form else 2) + 0.0)
        for name in ("estimate", "low", "high")
    ]
    return "{} [{}, {}]".format(*values).replace("-", "\N{MINUS SIGN}")


def test_every_section_is_there_and_in_the_contents(whole: tuple[ComparisonResult, Path]) -> None:
    page = Page(whole[1] / "report.html")
    sections = [about["id"] for tag, about in page.tags if tag == "section"]
    linked = [about["href"].removeprefix("#") for tag, about in page.tags if tag == "a"]
    assert tuple(sections) == SECTIONS == tuple(linked)
    assert all(len(page.text[name]) > 100 for name in SECTIONS)


@pytest.mark.slow
def test_the_checklists_have_every_item_and_what_the_comparison_knows(
    whole: tuple[ComparisonResult, Path], tmp_path: Path
) -> None:
    result, folder = whole
    page = Page(folder / "checklists.html")
    for name, count, parts in (("tripod", 27, 52), ("claim", 44, 44)):
        rows = [row for where, row in page.rows if where == name][1:]
        assert len(rows) == parts
        numbers = list(dict.fromkeys(int(row[0].rstrip("abcdefg")) for row in rows))
        assert numbers == list(range(1, count + 1))
        assert all(len(row) == 4 and row[1] and (row[2], row[3]) != ("–", "–") for row in rows)
        assert not any(mark in cell for row in rows for cell in row for mark in "{}|")
        text = page.text[name]
        assert f"{len(result.rows)} slides of 60 patients at 3 sites" in text
        assert "5 folds, disjoint in patients and stratified by grade, 2 times" in text
        assert f"warm QWK {format_interval(result.arms[0].metrics['qwk'])}" in text
        assert "For you to answer" in text and "all of it" in text
    assert "| 27c |" in (folder / "checklists.md").read_text()
    other = invented(30, given_split=True, repeats=1, sizes=(), sites=("",), readers=0, nested=False)
    view = View(other, {})
    document = checklists_of(view, renderer(view, tables_of(view)))
    write_html(tmp_path / "checklists.html", document)
    text = Page(tmp_path / "checklists.html").text["claim"]
    assert "the split of the manifest" in text and "at 3 sites" not in text


def cells_of(view: View) -> dict[str, str]:
    """What the checklists know, by checklist and item."""
    document = checklists_of(view, renderer(view, tables_of(view)))
    return {
        f"{section.anchor} {row[0]}": row[2]
        for section in document.sections
        for part in section.parts
        if isinstance(part, Table)
        for row in part.rows
    }


def test_the_checklists_claim_what_was_done(small: tuple[ComparisonResult, Path]) -> None:
    result = small[0]
    known = cells_of(View(result, {}))
    assert "one source for both" in known["tripod 5a"] and "corrected t" in known["claim 29"]
    assert known["tripod 12f"] == "one temperature from the inner folds"
    assert known["tripod 12d"] == "metrics by site and scanner"
    assert known["tripod 23b"] == "metrics by site and scanner: the section on sites"
    assert "and the ceiling that their noise sets: the section" in known["claim 18"]
    assert known["claim 36"].startswith("tested slides by grade")

    protocol = replace(result.comparison.protocol, external_site="east", inner_folds=0)
    comparison = replace(result.comparison, protocol=protocol, permutations=Permutations())
    assert result.primary is not None
    arms = tuple(replace(arm, untempered=None, repeatability=None) for arm in result.arms)
    without = replace(
        result, comparison=comparison, arms=arms, ceiling=None,
        primary=replace(result.primary, corrected_t=None), differences=(),
    )  # fmt: skip
    view = View(without, {})
    few = External("warm", None, arms[0].results, None, arms[0].metrics, {})  # too few to recalibrate on
    view.__dict__["external"] = (few,)
    known = cells_of(view)
    assert "one source for both" not in known["tripod 5a"]
    assert known["tripod 5a"].endswith("site east for evaluation alone")
    assert known["tripod 12f"] == known["tripod 24"] == "none"
    assert "ceiling" not in known["claim 18"]
    assert "corrected t" not in known["claim 29"] and "Holm" not in known["claim 29"]
    assert known["claim 30"] == "metrics by site; metrics by scanner"
    view.__dict__["external"] = (replace(few, recalibrated=arms[0].metrics),)
    assert cells_of(view)["tripod 12f"] == "recalibrated on east"
    assert cells_of(view)["tripod 24"] == "that of the external site"


def test_the_checklists_and_limits_know_where_a_given_split_was_trained(tmp_path: Path) -> None:
    given: dict[str, Any] = {"given_split": True, "repeats": 1, "sizes": (), "nested": False, "readers": 0}
    apart = invented(30, test_site="east", **given)
    known, text = cells_of(View(apart, {})), worded(apart, tmp_path).text["limits"]
    slides = apart.parts["all"].slides
    assert slides > apart.parts["test"].slides == len(apart.rows)
    whole, tested = f"{slides} slides of 30 patients at 4 sites", f"{len(apart.rows)} slides of 10 patients"
    for item in ("tripod 5a", "tripod 10", "claim 7", "claim 21"):
        assert whole in known[item] and f"{tested} at 1 site to test" in known[item]
    assert "one source" not in known["tripod 5a"] and known["tripod 27c"] == "–"
    assert known["tripod 6a"] == "named in the manifest: east, north, south, west"
    assert known["tripod 16"] == "tested at sites without training slides: east"
    assert known["claim 33"].startswith("sites without training slides: east")
    assert "on both sides" not in text and "10 tested patients" in text
    assert known["tripod 7"].startswith("tiles cut by slidetl 0.0.1; the ledger")
    assert known["claim 9"].startswith("tiles cut by slidetl 0.0.1; spacing")

    same = invented(30, **given)
    known, text = cells_of(View(same, {})), worded(same, tmp_path).text["limits"]
    assert "one source for both" in known["tripod 5a"] and "Sites are on both sides" in text
    assert known["tripod 16"].startswith("none by design") and known["claim 33"] == "none"

    unnamed = cells_of(View(invented(30, sites=("",), **given), {}))
    assert "one source" not in unnamed["tripod 5a"] and unnamed["tripod 16"] == unnamed["claim 33"] == "–"


def test_imported_features_are_not_said_to_be_tiles_of_slidetl() -> None:
    study = invented_study(4, sites=("",), readers=0)
    slides = [
        replace(slide, cache=replace(slide.cache, header=replace(slide.cache.header, imported="TRIDENT")))
        for slide in study.slides[:2]
    ]
    names = [row.slide_id for row in study.rows]
    fold = Fold(0, "0", 0, tuple(names[2:4]), tuple(names[:2]))
    mixed = replace(study, slides=(*slides, *study.slides[2:]))
    assert aggregate._prepared(mixed, [fold]) == (
        "features imported from TRIDENT",
        "tiles cut by slidetl 0.0.1",
    )


@pytest.mark.parametrize("nested", [True, False])
def test_choices_of_classical_arms_are_named(nested: bool, tmp_path: Path) -> None:
    arms = {
        "frozen": Arm(classical=Classical(["lite0"])),
        "area": Arm(baseline="colour_area"),
        "prior": Arm(baseline="prior"),
    }
    options: dict[str, Any] = {"readers": 0, "sites": ("north",), "repeats": 1, "sizes": ()}
    result = invented(20, arms=arms, nested=nested, **options)
    text = worded(result, tmp_path).text["protocol"]
    own = "the penalty of ridge by the squared error, the classifier on colour by the log loss"
    assert f"Chosen in folds of the training part's patients: {own}. Test slides chose nothing." in text
    assert ("by the ranked probability score" in text) == nested
    known = cells_of(View(result, {}))
    assert all(own in known[item] for item in ("tripod 12c", "claim 26"))


def test_the_declared_comparison_comes_first(whole: tuple[ComparisonResult, Path]) -> None:
    result, folder = whole
    head = Page(folder / "report.html").text[""]
    (interval, *_) = [row for row in table(folder / "results.csv") if row["section"] == "primary"]
    assert f"warm minus scratch: {as_shown(interval, '{:+.2f}')}" in head
    assert result.primary is not None and result.primary.corrected_t is not None
    assert ("It finds warm better" in head) == (result.primary.sign_flip.p <= 0.05)
    over_folds = result.primary.corrected_t.interval
    assert f"over folds {format_interval(over_folds, '+.2f')}" in head


def spoken(
    result: ComparisonResult,
    p: float,
    interval: tuple[float, float],
    t: float | None = None,
    margin: float | None = None,
    t_interval: tuple[float, float] | None = None,
    flipped: float | None = None,
) -> str:
    """The first paragraph of the report of another outcome of the declared comparison."""
    assert result.primary is not None and result.primary.corrected_t is not None
    middle = sum(interval) / 2
    primary = replace(
        result.primary,
        interval=replace(result.primary.interval, estimate=middle, low=interval[0], high=interval[1]),
        sign_flip=replace(result.primary.sign_flip, difference=middle if flipped is None else flipped, p=p),
        corrected_t=None if t is None else replace(result.primary.corrected_t, p=t),
    )
    if primary.corrected_t is not None:
        low, high = t_interval or interval
        bounds = replace(primary.corrected_t.interval, estimate=(low + high) / 2, low=low, high=high)
        primary = replace(primary, corrected_t=replace(primary.corrected_t, interval=bounds))
    comparison = replace(result.comparison, primary=replace(result.comparison.primary, margin=margin))
    view = View(replace(result, primary=primary, comparison=comparison), {})
    return document_of(view, tables_of(view), {}).summary[0]


def test_the_verdict_follows_the_sign_flips_and_says_where_others_disagree(
    small: tuple[ComparisonResult, Path],
) -> None:
    agreed = spoken(small[0], 0.01, (0.02, 0.1), 0.03)
    assert "p = 0.010. It finds warm better." in agreed and "disagree" not in agreed
    assert "It finds scratch better" in spoken(small[0], 0.05, (-0.1, -0.02), 0.03)
    narrow = spoken(small[0], 0.07, (0.001, 0.1), 0.2)  # by the interval alone warm would be better
    assert "finds no difference" in narrow and "better." in narrow and "warm better" not in narrow
    assert "The tests disagree: the interval over patients excludes zero." in narrow
    both = spoken(small[0], 0.04, (-0.001, 0.1), 0.2)
    assert "contains zero, and the corrected t over folds finds no difference." in both
    assert "finds a difference" in spoken(small[0], 0.3, (-0.1, 0.1), 0.01)
    assert "there is no corrected t" in spoken(small[0], 0.3, (-0.1, 0.1))
    rounded = spoken(small[0], 0.3, (1e-17, 0.1))  # a sum of zero
    assert "disagree" not in rounded


def test_a_result_in_the_other_direction_is_a_disagreement(small: tuple[ComparisonResult, Path]) -> None:
    text = spoken(small[0], 0.001, (0.1, 0.3), 0.0002, t_interval=(-0.12, -0.09))
    assert (
        "It finds warm better. The tests disagree: the corrected t over folds finds scratch better." in text
    )
    assert "the interval over patients favours warm" in spoken(small[0], 0.001, (0.1, 0.3), flipped=-0.2)
    lower = replace(small[0].comparison, primary=replace(small[0].comparison.primary, metric="rps"))
    assert small[0].primary is not None
    errors = replace(small[0], comparison=lower, primary=replace(small[0].primary, metric="rps"))
    text = spoken(errors, 0.001, (0.1, 0.3), 0.001)
    assert "It finds scratch better" in text  # a lower RPS is better
    assert "swaps the arms' probabilities of whole patients" in text


def test_a_test_that_cannot_be_computed_is_no_finding(small: tuple[ComparisonResult, Path]) -> None:
    nan = float("nan")
    text = spoken(small[0], nan, (nan, nan))
    assert "p undefined. It could not be computed" in text
    assert "finds" not in text and "Nor are" not in text


def test_equivalence_is_judged_by_the_corrected_t_too(
    small: tuple[ComparisonResult, Path], tmp_path: Path
) -> None:
    text = spoken(small[0], 0.6, (-0.03, 0.04), 0.9, margin=0.05, t_interval=(-0.45, 0.47))
    assert "the arms are equivalent in that sense" in text
    assert "The tests disagree: the interval of the corrected t does not lie within the margin." in text
    assert "disagree" not in spoken(small[0], 0.6, (-0.03, 0.04), 0.9, margin=0.05)
    assert small[0].primary is not None
    for high, expected in ((0.04, "1"), (0.06, "0")):
        interval = replace(small[0].primary.interval, low=-0.03, high=high)
        comparison = replace(small[0].comparison, primary=replace(small[0].comparison.primary, margin=0.05))
        result = replace(
            small[0], comparison=comparison, primary=replace(small[0].primary, interval=interval)
        )
        write_tables(result, tmp_path)
        (row,) = [row for row in table(tmp_path / "results.csv") if row["metric"] == "equivalent"]
        assert (row["section"], row["arm"], row["estimate"]) == ("primary", "warm", expected)
        assert "margin of 0.05" in row["note"]


@pytest.mark.parametrize("metric", ["accuracy", "qwk"])
def test_arms_that_agree_everywhere_are_not_shown_to_be_equivalent(
    metric: MetricName, tmp_path: Path
) -> None:
    """All resamples agree, and bound nothing: of six patients one in two may differ."""
    result = invented(
        30, repeats=1, sizes=(), noise=0.02, given_split=True, readers=0, sites=("north",), metric=metric
    )
    n, primary = len(result.arms[0].results.true), result.primary
    assert primary is not None and primary.sign_flip.n_discordant == 0 and primary.interval.estimate == 0
    assert [row.accuracy_second for row in result.power] == [0.98, 0.94, 0.9, 0.86, 0.82, 0.74]  # all right
    bound = binomtest(0, n).proportion_ci(0.95, "exact").high
    assert primary.is_within(0.9) == (metric == "accuracy")
    if metric == "accuracy":
        assert (primary.interval.low, primary.interval.high) == pytest.approx((-bound, bound))
        assert not primary.is_within(bound - 0.01)
    comparison = replace(result.comparison, primary=replace(result.comparison.primary, margin=0.05))
    text = worded(replace(result, comparison=comparison), tmp_path).text[""]
    assert f"which differ in 0 of {n}" in text and "equivalence is not shown" in text
    assert ("there is no interval: all resamples of the patients agree" in text) == (metric == "qwk")
    assert ("there is no interval, so equivalence" in text) == (metric == "qwk")
    arms = Page(tmp_path / "report.html").text["arms"]
    assert "Without an interval (here of warm, scratch" in arms


def test_an_arm_that_told_no_slides_apart_is_named_at_the_head(tmp_path: Path) -> None:
    result = invented(30, repeats=1, sizes=(), given_split=True, readers=0, sites=("north",))
    said = "Learned nothing in at least one training, all slides having got the same probabilities: warm."
    assert said not in worded(result, tmp_path).text[""]

    def same(found: JobResult) -> JobResult:
        rows = (replace(row, probabilities=(0.2,) * 5) for row in found.predictions)
        return replace(found, predictions=tuple(rows))

    arms = tuple(
        replace(arm, jobs=tuple((job, same(found)) for job, found in arm.jobs)) if arm.arm == "warm" else arm
        for arm in result.arms
    )
    died = replace(result, arms=arms)
    assert said in worded(died, tmp_path).text[""]
    for found, arms_untold in ((result, []), (died, [("warm", "1")])):
        write_tables(found, tmp_path)
        rows = [row for row in table(tmp_path / "results.csv") if row["section"] == "training"]
        assert [(row["arm"], row["estimate"]) for row in rows] == arms_untold


def test_power_counts_results_from_the_observed_accuracy(
    whole: tuple[ComparisonResult, Path],
) -> None:
    result, folder = whole
    warm, scratch = (next(arm for arm in result.arms if arm.arm == name) for name in ("warm", "scratch"))
    n = len(scratch.results.true)
    assert (result.design.n_patients, result.design.n_slides) == (n, n) and n < len(result.rows)
    observed = (scratch.results.predicted == scratch.results.true).mean()
    assert [row.accuracy_first for row in result.power] == [round(float(observed), 2)] * len(result.power)
    assert result.power[0].accuracy_second == result.power[0].accuracy_first
    one, other = ((arm.results.predicted - arm.results.true).mean(axis=0) for arm in (warm, scratch))
    correlation = np.corrcoef(one, other)[0, 1]
    assert result.design.arm_correlation == pytest.approx(np.clip(correlation, 0, 0.95), abs=0.006)
    page = Page(folder / "report.html").text["power"]
    assert f"how often a study of {n} patients finds" in page
    assert f"correlated by {result.design.arm_correlation:.2f} before rounding." in page


def test_power_names_the_arm_whose_accuracy_it_begins_at(tmp_path: Path) -> None:
    result = invented(20, repeats=1, sizes=(), missing=("scratch",))
    warm = result.arms[0].results
    assert result.power[0].accuracy_first == round(float((warm.predicted == warm.true).mean()), 2)
    assert "begin at the one observed of warm," in worded(result, tmp_path).text["power"]


@pytest.mark.parametrize("n_grades", range(2, 13))
@pytest.mark.parametrize("right", [0, 2, 5, 10])
def test_power_begins_with_no_difference(n_grades: int, right: int) -> None:
    """Also of a reference no better than chance, on a scale with a chance of many digits."""
    grades = np.arange(10) % n_grades
    predicted = np.where(np.arange(10) < right, grades, (grades + 1) % n_grades)
    results = SimpleNamespace(patients=np.arange(10), true=grades, predicted=predicted[None])
    pooling: Any = SimpleNamespace(_primary=Primary("warm", "scratch"), _n_grades=n_grades)
    arms: Any = [SimpleNamespace(arm="scratch", results=results)]
    *_, accuracies = aggregate._Pooling.observed_design(pooling, arms)
    start, other = accuracies[0]
    assert start == other and 1 / n_grades + 0.02 <= start + 1e-9 and len(accuracies) > 1


def test_the_corrected_t_goes_by_the_slides_trained_on(whole: tuple[ComparisonResult, Path]) -> None:
    arms = {(arm.arm, arm.n_slides): arm for arm in (*whole[0].arms, *whole[0].smaller)}
    assert whole[0].primary is not None
    for pair in (whole[0].primary, *whole[0].smaller_differences):
        one, other = (arms[name, pair.n_slides] for name in (pair.arm, pair.against))
        kappas = [
            metric_per_fold(partial(weighted, 5), arm.results.true, arm.results.predicted, arm.folds)
            for arm in (one, other)
        ]
        ratio = np.mean([len(job.fold.test) / len(job.fold.train) for job, _ in one.jobs])
        variance = (1 / 10 + ratio) * (kappas[0] - kappas[1]).var(ddof=1)
        assert pair.corrected_t is not None and pair.corrected_t.standard_error == pytest.approx(
            variance**0.5
        )
    assert {pair.n_slides for pair in whole[0].smaller_differences} == {20, 40}


@pytest.mark.parametrize("subsets", [1, 3])
def test_trainings_with_one_test_part_are_one_fold_of_the_corrected_t(subsets: int, tmp_path: Path) -> None:
    """Repeats of the same sites, and subsets of a training part: other trainings, no other patients."""
    sizes = (20,) if subsets > 1 else ()
    result = invented(
        40, repeats=4, by_site=subsets == 1, nested=False, sizes=sizes, subsets=subsets, readers=0
    )
    arms = {arm.arm: arm for arm in (result.smaller if subsets > 1 else result.arms)}
    pair = result.smaller_differences[0] if subsets > 1 else result.primary
    assert pair is not None and pair.corrected_t is not None
    one, other = (
        metric_per_fold(partial(weighted, 5), arm.results.true, arm.results.predicted, arm.folds)
        for arm in (arms[pair.arm], arms[pair.against])
    )
    gaps, n_parts = one - other, 3 if subsets == 1 else 4 * 5
    assert gaps.size == n_parts * (4 if subsets == 1 else 3)
    of_part = gaps.mean(axis=0) if subsets == 1 else gaps.reshape(4, 3, 5).mean(axis=1).ravel()
    ratio = np.mean([len(job.fold.test) / len(job.fold.train) for job, _ in arms[pair.arm].jobs])
    expected = corrected_t(of_part, float(ratio / (1 + ratio)))
    assert pair.corrected_t.degrees == n_parts - 1
    assert pair.corrected_t.interval.estimate == pytest.approx(gaps.mean())
    assert (pair.corrected_t.standard_error, pair.corrected_t.p) == pytest.approx(
        (expected.standard_error, expected.p)
    )
    page = worded(result, tmp_path).text
    fixed = subsets == 1
    assert ("4 times over with other seeds:" in page["protocol"]) == fixed
    assert ("4 times over with other folds and seeds:" in page["protocol"]) != fixed
    assert ("and other seeds as far as 4 repeats" in page["arms"]) == fixed
    assert ("another split and initialisation (seed)" in page["power"]) != fixed


def test_a_temperature_at_a_bound_is_told_in_the_report(tmp_path: Path) -> None:
    for temperature, said in ((1.1, "1.10 to 1.10"), (20.0, "20.00 to 20.00, at a bound")):
        result = invented(20, repeats=1, readers=0, sites=("north",), sizes=(), temperature=temperature)
        rows = tables_of(View(result, {}))["temperatures"].rows
        assert [row[:2] for row in rows] == [("warm", said), ("scratch", said)]


def test_labels_permuted_for_a_given_split_stay_in_their_part() -> None:
    """In the jobs that are planned, and in the null distribution made of them: of a constant arm a point."""
    study = invented_study(60, sites=("north",), readers=0)
    slides = [
        replace(slide, row=replace(slide.row, grade=2)) if slide.row.split == "test" and n % 3 else slide
        for n, slide in enumerate(study.slides)
    ]
    study = replace(study, slides=tuple(slides))
    arms = {"prior": Arm(baseline="prior"), "site": Arm(baseline="site")}
    comparison = Comparison(
        manifest="manifest.csv",
        cache="cache",
        arms=arms,
        primary=Primary("prior", "site", "accuracy"),
        protocol=Protocol(given_split=True, inner_folds=0, unit="slide"),
        bootstrap_draws=100,
        permutations=Permutations(19, ["prior"]),
    )
    folds = plan_folds(cases_of(study), comparison.protocol, 5)
    jobs = plan_jobs(comparison, study, folds)
    held = [
        {
            slide: Counter(row.grade for row in job.part(getattr(job.fold, slide)))
            for slide in ("train", "test")
        }
        for job in jobs
    ]
    assert len(jobs) == 21 and all(parts == held[0] for parts in held)
    constant = JobResult(
        tuple(
            SlidePrediction(row.slide_id, row.patient_id, row.grade, (0.1, 0.1, 0.6, 0.1, 0.1), 50, row.site)
            for row in study.rows
            if row.split == "test"
        )
    )
    result = combine(comparison, study, folds, [(job, constant) for job in jobs])
    (prior,) = [arm for arm in result.arms if arm.arm == "prior"]
    assert (prior.chance_p, prior.n_permuted) == (1.0, 19)


def test_permutations_of_too_few_labels_are_refused_before_any_job() -> None:
    """Of one patient at each site."""
    study = invented_study(12, sites=("north",), readers=0)
    alone = [replace(slide, row=replace(slide.row, site=slide.row.patient_id)) for slide in study.slides]
    arms = {"prior": Arm(baseline="prior"), "site": Arm(baseline="site")}
    comparison = Comparison(
        manifest="manifest.csv",
        cache="cache",
        arms=arms,
        primary=Primary("prior", "site"),
        protocol=Protocol(leave_one_site_out=True, inner_folds=0),
        permutations=Permutations(19, ["prior"]),
    )
    with pytest.raises(UsageError, match=r"permutations: .* at the same site, so 0 of 12 patients"):
        plan_jobs(comparison, replace(study, slides=tuple(alone)), ())
    assert plan_jobs(comparison, replace(study, slides=tuple(alone)), (), only=["site"]) == ()


@pytest.mark.parametrize("fixed", ["", "given_split", "by_site"])
def test_the_report_says_within_which_parts_labels_are_permuted(fixed: str, tmp_path: Path) -> None:
    sites = ("north", "south") if fixed == "by_site" else ("north",)
    options: dict[str, Any] = {fixed: True} if fixed else {}
    result = invented(20, repeats=1, sizes=(), nested=False, readers=0, sites=sites, refits=3, **options)
    said = " ".join(worded(result, tmp_path).text["others"].split())
    within = {"given_split": " within their part of the given split", "by_site": " within their site"}
    assert f"labels permuted over patients{within.get(fixed, '')}." in said
    assert "The least p of n refits is at best 1 / (n + 1)" in said


def test_an_undefined_refit_counts_against_the_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = iter([float("nan"), -1.0, -1.0])
    monkeypatch.setattr(aggregate._Pooling, "permuted_metric", lambda *given: next(values))
    result = invented(20, repeats=1, sizes=(), nested=False, readers=0, sites=("north",), refits=3)
    assert result.arms[0].chance_p == (1 + 1) / (1 + 3)
    page = worded(result, tmp_path)
    assert "Against chance" in page.text["others"]
    undefined = replace(result, arms=(replace(result.arms[0], chance_p=None), *result.arms[1:]))
    assert "Against chance" in worded(undefined, tmp_path).text["others"]
    (row,) = [row for row in table(tmp_path / "results.csv") if row["section"] == "chance"]
    assert (row["p"], row["n"]) == ("", "3")


@pytest.mark.parametrize("draws", [2.0 + 4.4e-16 * np.arange(8) % 2, np.array([2.0])])
def test_a_network_with_one_score_for_all_slides_ends_no_report(
    draws: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scores that differ by their rounding alone; and a single draw."""
    original = invented_result

    def collapsed(*given: Any, **options: Any) -> JobResult:
        found = original(*given, **options)
        return replace(
            found, draws={slide: np.roll(draws, n).tolist() for n, slide in enumerate(found.draws)}
        )

    monkeypatch.setitem(globals(), "invented_result", collapsed)
    result = invented(20, repeats=1, sizes=(), nested=False, readers=0, sites=("north",))
    assert result.arms[0].repeatability is None
    assert "not all the same" in worded(result, tmp_path).text["score"]


@pytest.mark.slow
def test_subsets_of_slides_are_repeats(tmp_path: Path) -> None:
    result = invented(30, repeats=2, sizes=(20,), subsets=3)
    assert {arm.results.predicted.shape[0] for arm in result.arms} == {2}
    assert {arm.results.predicted.shape[0] for arm in result.smaller} == {6}
    parts = {
        (job.fold.repeat, job.fold.name): job.fold.train
        for job, _ in result.smaller[0].jobs
        if job.arm == "warm"
    }
    assert len(parts) == 2 * 3 * 5 and len(set(parts.values())) == len(parts)
    assert "and over 3 subsets of each training part" in written(result, tmp_path).text["sizes"]
    repeats = {row["repeat"] for row in table(tmp_path / "predictions_smaller.csv")}
    assert repeats == set("012345")


@pytest.mark.parametrize("grade", [0, 2])
def test_an_undefined_qwk_ends_no_comparison(grade: int, tmp_path: Path) -> None:
    """All test patients of one grade, and graded so: kappa is undefined, and so is every test of it."""
    options = {"readers": 0, "sites": ("north",), "noise": 0.02, "given_split": True}
    result = invented(30, repeats=1, sizes=(), test_grade=grade, **options)  # type: ignore[arg-type]
    assert all(np.isnan(arm.metrics["qwk"].estimate) for arm in result.arms[:2])
    assert all(arm.metrics["accuracy"].estimate == 1 for arm in result.arms[:2])
    page = worded(result, tmp_path)
    assert "undefined [undefined, undefined]" in page.text[""] and "p undefined" in page.text[""]
    (primary, *_) = table(tmp_path / "results.csv")
    assert (primary["section"], primary["estimate"], primary["p"]) == ("primary", "", "")


def test_no_difference_is_not_equivalence(small: tuple[ComparisonResult, Path]) -> None:
    assert "Nor are the arms shown to be equal" in spoken(small[0], 0.3, (-0.02, 0.03))
    near = spoken(small[0], 0.3, (-0.02, 0.03), margin=0.05)
    assert "margin is 0.05: the interval lies within it" in near and "Nor are" not in near
    wide = spoken(small[0], 0.3, (-0.02, 0.06), margin=0.05)
    assert "the interval does not lie within it, so equivalence is not shown" in wide
    assert "equivalence is not shown" in spoken(small[0], 0.3, (-0.05, 0.03), margin=0.05)
    nan = float("nan")
    undefined = spoken(small[0], nan, (nan, nan), margin=0.05)
    assert "undefined [undefined, undefined]" in undefined and "p undefined" in undefined
    assert "0.05: there is no interval, so equivalence is not shown." in undefined
    assert "warm better" not in undefined


def test_only_a_registered_comparison_is_called_declared(
    small: tuple[ComparisonResult, Path], tmp_path: Path
) -> None:
    """The word is nowhere else: neither in the text, nor in a table."""
    result, file = small[0], tmp_path / "registered.md"
    assert "declared" not in worded(result, tmp_path).text[""] + worded(result, tmp_path).text["others"]
    named = replace(result, comparison=replace(result.comparison, registered=str(file)))
    for content in (None, "another one"):
        if content is not None:
            file.write_text(content)
        assert "It was not declared: the SHA-256" in worded(named, tmp_path).text[""]
    file.write_text(f"2026-11-27, collage: {result.comparison.sha256}\n")
    assert "Whether it was declared before the run is not known" in worded(named, tmp_path).text[""]
    late = replace(named, was_registered=False)
    text = worded(late, tmp_path).text[""]
    assert "It was not declared" in text and "was not, before the first result, in" in text
    early = replace(named, was_registered=True)
    assert "It was declared before the run" in worded(early, tmp_path).text[""]
    for given, words in ((early, True), (late, False), (named, False)):
        document = checklists_of(View(given, {}), renderer(View(given, {}), tables_of(View(given, {}))))
        cells = str([row for section in document.sections for row in section.parts[0].rows])  # type: ignore[union-attr]
        assert ("registered before the run" in cells) == words


def test_figures_on_the_page_are_those_of_the_tables(whole: tuple[ComparisonResult, Path]) -> None:
    page, rows = Page(whole[1] / "report.html"), table(whole[1] / "results.csv")
    for arm in ("warm", "scratch", "prior"):
        figures = {
            row["metric"]: row
            for row in rows
            if (row["section"], row["arm"], row["train_slides"]) == ("metric", arm, "")
        }
        names = ("qwk", "accuracy", "mae", "rps", "log_loss")
        assert page.row("arms", arm)[1:] == [as_shown(figures[name]) for name in names]
        slope, intercept = (
            next(
                row
                for row in rows
                if (row["arm"], row["train_slides"], row["section"], row["metric"])
                == (arm, "", "calibration", name)
            )
            for name in ("slope", "intercept")
        )
        calibration = page.row("calibration", arm)
        assert calibration[1:3] == [as_shown(slope), as_shown(intercept, "{:+.2f}")]
    (prior,) = [
        row for row in rows if (row["section"], row["arm"]) == ("difference", "prior") and row["p_holm"]
    ]
    shown = page.row("others", "prior")
    assert shown[1] == as_shown(prior, "{:+.2f}")
    assert float(shown[3].removeprefix("< ")) == pytest.approx(float(prior["p_holm"]), abs=0.001)


def test_smaller_training_parts_are_shown_with_the_whole_one(whole: tuple[ComparisonResult, Path]) -> None:
    page, rows = Page(whole[1] / "report.html"), table(whole[1] / "results.csv")
    shown = [row for where, row in page.rows if where == "sizes" and row[0] == "scratch"]
    assert [row[1] for row in shown] == ["20", "40", "80"]
    for row, size in zip(shown, ("20", "40", ""), strict=True):
        (found,) = [
            found
            for found in rows
            if (found["section"], found["arm"], found["train_slides"], found["metric"])
            == ("metric", "scratch", size, "qwk")
        ]
        assert row[2] == as_shown(found)


def test_figures_lie_beside_the_page_as_svg_and_png(whole: tuple[ComparisonResult, Path]) -> None:
    folder = whole[1] / "figures"
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{kind}" for name in DRAWN for kind in ("svg", "png")
    }
    for name in DRAWN:
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        assert not [element for element in root.iter() if element.tag.endswith("}text")]  # glyphs as paths
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(PNG)
        width, height = struct.unpack(">II", content[16:24])
        assert width > 700
        assert height > 300


def test_images_lie_in_the_page_and_their_texts_say_the_numbers(whole: tuple[ComparisonResult, Path]) -> None:
    result, folder = whole
    page = Page(folder / "report.html")
    assert len(page.images) == len(DRAWN)
    forest = (folder / "figures" / "forest.svg").read_bytes()
    assert page.images[0]["src"] == "data:image/svg+xml;base64," + base64.b64encode(forest).decode()
    qwk = result.arms[0].metrics["qwk"].estimate
    assert f"{result.arms[0].arm}: {qwk:.2f} [" in page.images[0]["alt"]
    counts = " | ".join(
        ", ".join(map(str, (grade, *row))) for grade, row in enumerate(result.arms[0].confusion)
    )
    assert f"warm: {counts}; " in page.images[1]["alt"]
    assert all(len(image["alt"]) > 60 for image in page.images)


def test_the_page_reaches_for_nothing_outside(whole: tuple[ComparisonResult, Path]) -> None:
    page = Page(whole[1] / "report.html")
    (policy,) = [
        about["content"]
        for tag, about in page.tags
        if tag == "meta" and about.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    addresses = [about[name] for _, about in page.tags for name in ("src", "href") if name in about]
    assert all(address.startswith(("data:image/", "#")) for address in addresses)


@pytest.mark.slow
def test_equal_results_give_an_equal_page(whole: tuple[ComparisonResult, Path], tmp_path: Path) -> None:
    result, folder = whole
    write_report(result, tmp_path)
    for path in (folder / "report.html", folder / "report.md", *(folder / "figures").iterdir()):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    result = invented(
        20,
        sites=(HOSTILE, "$x_1$</table>"),
        grades=["none", HOSTILE, "$\\frac", "一", "all"],  # no formula; a letter that the font lacks
        repeats=1,
        sizes=(),
        nested=False,
    )
    page = written(result, tmp_path, failed={HOSTILE: HOSTILE})
    assert all("onerror" not in about for _, about in page.tags)
    assert {about["src"][:10] for about in page.images} == {"data:image"}
    assert page.row("sites", HOSTILE)[1:]
    assert page.row("sites", "$x_1$</table>")[1:]
    assert HOSTILE in page.text["protocol"]
    assert HOSTILE in page.text[""]  # why a job failed


@pytest.mark.slow
def test_an_unfinished_comparison_says_so(tmp_path: Path) -> None:
    page = written(invented(20, missing=("warm",), repeats=1, sizes=()), tmp_path)
    assert "This comparison is not finished" in page.text[""]
    assert "warm (0 of 5 jobs)" in page.text[""]
    assert "warm against scratch by QWK, is not complete yet" in page.text[""]
    assert [row[0] for where, row in page.rows if where == "arms"] == ["Arm", "scratch", "prior"]
    assert "The shaded row" not in page.text["arms"]


@pytest.mark.slow
def test_arms_without_epochs_readers_or_sites_leave_no_gap(tmp_path: Path) -> None:
    arms = {"area": Arm(baseline="colour_area"), "prior": Arm(baseline="prior")}
    (tmp_path / "figures").mkdir()
    for kind in ("svg", "png"):  # of an earlier report
        (tmp_path / "figures" / f"learning.{kind}").write_text("old")
    page = written(
        invented(20, arms=arms, sites=("",), readers=0, repeats=1, nested=False, sizes=()), tmp_path
    )
    sections = [about["id"] for tag, about in page.tags if tag == "section"]
    assert tuple(sections) == SECTIONS
    assert "no readers' grades" in page.text["readers"]
    assert "one site and one scanner" in page.text["sites"]
    assert "No arm has epochs" in page.text["learning"]
    assert "nothing to drift away from" in page.text["layers"]
    assert "Not nested" in page.text[""]
    left = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert left == {"forest", "confusion", "reliability", "referral"}


def test_an_undefined_ceiling_is_no_limit(whole: tuple[ComparisonResult, Path], tmp_path: Path) -> None:
    """Both readers gave one grade to all slides."""
    assert whole[0].ceiling is not None and View(whole[0], {}).limit is not None
    nan = float("nan")
    ceiling = replace(whole[0].ceiling, qwk=nan, consensus_qwk=nan, together_qwk=nan)
    result = replace(whole[0], ceiling=ceiling)
    assert View(result, {}).limit is None
    assert "and an undefined QWK" in worded(result, tmp_path).text["readers"]


def test_layers_that_one_arm_lacks_are_drawn_at_their_depth(tmp_path: Path, drawn: list[Figure]) -> None:
    names = ["stem", "layer1.0", "layer1.1", "layer2.0", "fc"]
    deeper = [*names[:3], "layer1.2", *names[3:]]
    result = invented(20, repeats=1, sizes=())
    warm, scratch, *others = result.arms

    def with_layers(arm: ArmResult, *layers: list[str]) -> ArmResult:
        """Gives these to its jobs in turn, as where the backbone is a choice."""
        jobs = [
            (job, replace(found, similarity=dict.fromkeys(layers[n % len(layers)], 0.5)))
            for n, (job, found) in enumerate(arm.jobs)
        ]
        return replace(arm, jobs=tuple(jobs))

    arms = with_layers(warm, names), with_layers(scratch, names[1:], deeper)
    view = View(replace(result, arms=(*arms, *others)), {})
    plots._layers(view, "similarity", "linear CKA", tables_of(view)["similarity"], tmp_path)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == deeper
    places = [np.asarray(line.get_xdata()).tolist() for line in axes.get_lines()]
    assert places == [[0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert list(by_layer(view, "similarity")["scratch"]) == deeper  # the thirds of the table


def test_long_names_stay_different_and_whole_in_figures(tmp_path: Path, drawn: list[Figure]) -> None:
    arms = {
        f"efficientnet-warm-shared-{end}": Arm(fit=fit("WarmRestart")) for end in ("weights", "both", "a")
    }
    grades = [f"ISUP group {number}" for number in range(1, 6)]
    view = View(invented(20, repeats=1, sizes=(), arms=arms, grades=grades), {})
    tables = tables_of(view)
    plots._confusion(view, tmp_path)
    for axes in drawn[0].axes:
        labels = {label.get_text() for label in axes.get_xticklabels()}
        assert len(labels) == len(grades) and max(map(len, labels)) == 8
        assert axes.title.get_window_extent().y1 <= drawn[0].bbox.y1
    assert len({axes.get_title(loc="left") for axes in drawn[0].axes}) == len(arms)
    drawn.clear()
    plots._referral(view, tables["wrong_grades"], tmp_path)
    plots._layers(view, "similarity", "linear CKA", tables["similarity"], tmp_path)
    assert len(drawn) == 4  # each as SVG and PNG
    for figure in drawn:
        (legend,) = figure.legends
        texts = [text.get_text() for text in legend.get_texts()]
        assert len(set(texts)) == len(texts) >= len(arms)
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


def test_panels_keep_their_height_above_a_legend_of_many_rows(tmp_path: Path, drawn: list[Figure]) -> None:
    base = invented(20, repeats=1, sizes=())

    def heights(prefix: str, n_arms: int) -> list[float]:
        """Returns those of the panels of each figure, in inches."""
        drawn.clear()
        names = [f"{prefix}{number}" for number in range(n_arms)]
        arms = base.comparison.arms | dict.fromkeys(names, base.comparison.arms[base.arms[0].arm])
        results = tuple(replace(base.arms[0], arm=name) for name in names)
        view = View(replace(base, comparison=replace(base.comparison, arms=arms), arms=results), {})
        sizes = Table(("Arm", "slides", "QWK"), [(name, 8, Interval(0.5, 0.4, 0.6, 0.95)) for name in names])
        plots._learning(view, sizes, tmp_path)
        plots._sizes(view, sizes, tmp_path)
        plots._layers(view, "similarity", "linear CKA", sizes, tmp_path)
        assert len(drawn) == 6  # each as SVG and PNG
        return [figure.axes[0].get_window_extent().height / figure.dpi for figure in drawn]

    np.testing.assert_allclose(heights("efficientnet-warm-shared-", 7), heights("a", 4), atol=0.15)


def test_the_remarks_on_a_ceiling_say_why_it_has_no_interval_and_what_may_be_wrong(tmp_path: Path) -> None:
    whole = invented(20, repeats=1, sizes=())
    second, patients = whole.readings[:, 1], [row.patient_id for row in whole.rows]
    never, few, other_way = "never disagreed", "There is no interval: all", "coded the other way round"
    of_four = np.where(np.isin(patients, sorted(set(patients))[:4]), second, -1)
    one_off = np.where(np.arange(len(second)) == 1, (second + 1) % 5, second)

    def remarks(first: NDArray[np.int64], second: NDArray[np.int64]) -> set[str]:
        ceiling = reader_ceiling(first, second, patients, 5, n_draws=20)
        result = replace(whole, readings=np.stack([first, second], 1), ceiling=ceiling)
        text = worded(result, tmp_path).text["readers"]
        return {remark for remark in (never, few, other_way) if remark in text}

    assert remarks(second, second) == remarks(second, of_four) == {never}
    assert remarks(one_off, second) == set()
    assert remarks(one_off, of_four) == {few}
    assert remarks(4 - second, second) == {other_way}  # equal where both say 2
    high = 4 * (second > 2).astype(np.int64)
    assert remarks(4 - high, high) == {few, other_way}  # of two grades: none is equal
    rare = np.eye(2, len(second), dtype=np.int64)  # each calls one other slide positive: a QWK below zero
    assert other_way not in remarks(rare[0], rare[1])
    assert other_way in remarks(rare[0], 4 - rare[1])


def test_one_reader_sets_no_ceiling(tmp_path: Path) -> None:
    page = worded(invented(20, readers=1, repeats=1, sizes=()), tmp_path)
    assert "One reader alone" in page.text["readers"]
    assert "ceiling" not in page.text["arms"]


def test_curves_of_a_nested_comparison_are_those_of_the_inner_folds(
    small: tuple[ComparisonResult, Path],
) -> None:
    result, page = small[0], Page(small[1] / "report.html")
    arm = next(arm for arm in result.arms if arm.arm == "warm")
    last = [
        point.qwk
        for _, found in arm.jobs
        for point in found.curves
        if point.part != "test" and point.epoch == 30
    ]
    assert len(last) == 10
    shown = page.row("learning", "warm")
    heading = next(row for where, row in page.rows if where == "learning")
    assert shown[heading.index("QWK after\N{NO-BREAK SPACE}30")] == f"{np.mean(last):.2f}"
    assert "held-out parts of the inner folds" in page.text["learning"]


@pytest.mark.slow
def test_a_reader_has_the_number_of_the_manifest_everywhere(whole: tuple[ComparisonResult, Path]) -> None:
    folder = whole[1]
    rows = table(folder / "results.csv")
    of_readers = {row["note"] for row in rows if row["section"] == "reader"}
    assert of_readers == {"reader 2", "reader 5", "consensus"}
    assert {row["note"] for row in rows if row["section"] == "agreement"} == {"reader 2 and reader 5"}
    columns = [name for name in table(folder / "predictions.csv")[0] if name.startswith("grade_reader")]
    assert columns == ["grade_reader2", "grade_reader5"]
    shown = {
        cell for where, row in Page(folder / "report.html").rows if where == "readers" for cell in row[:2]
    }
    assert {"reader 2 and reader 5", "reader 2", "reader 5"} <= shown


@pytest.mark.parametrize("metric", ["rps", "log_loss"])
def test_small_metrics_have_a_digit_more_wherever_they_are(metric: MetricName, tmp_path: Path) -> None:
    result = invented(20, repeats=1, sizes=(), metric=metric)
    page = worded(result, tmp_path)
    assert result.primary is not None
    interval = result.primary.interval
    shown = f"warm minus scratch: {format_interval(interval, '+.3f')}, paired"
    assert shown in page.text[""]
    of_warm = format_interval(result.arms[0].metrics[metric], ".3f")
    assert f"warm reaches {of_warm}" in page.text[""] and of_warm in page.row("arms", "warm")
    assert format_interval(interval, "+.3f") in page.row("others", "warm")
    assert of_warm in cells_of(View(result, {}))["claim 37"]


def test_what_is_the_same_in_all_resamples_has_no_interval_in_any_table(tmp_path: Path) -> None:
    """A network that gives each slide its grade, also on fewer slides."""
    result = invented(30, repeats=1, noise=0.02, sizes=(20,), readers=2)
    assert result.arms[0].metrics["qwk"].is_point
    page = worded(result, tmp_path)
    text = " ".join(page.text.values())
    assert "[1.00, 1.00]" not in text
    assert ("sites", ["warm", *["1.00 (no interval)"] * 3]) in page.rows
    assert "of warm, scratch" in page.text["arms"]
    points = [
        row
        for row in table(tmp_path / "results.csv")
        if (row["arm"], row["train_slides"], row["metric"]) == ("warm", "", "qwk")
        and row["section"] in ("metric", "site")
    ]
    assert points and all((row["estimate"], row["low"], row["high"]) == ("1", "", "") for row in points)
    one = result.smaller[0]
    fewer = replace(one, metrics={**one.metrics, "qwk": Interval(1.0, 1.0, 1.0, 0.95)})
    assert one.label in View(replace(result, smaller=(fewer,)), {}).pointlike


def test_slides_are_left_to_a_human_at_a_chosen_risk(tmp_path: Path) -> None:
    """What the table says is judged on the predictions, by SciPy's exact interval of a share."""
    result, risks = invented(repeats=1, sizes=(), noise=0.3), [0.1, 0.125, 0.4]
    page = worded(replace(result, comparison=replace(result.comparison, referral_risks=risks)), tmp_path)
    rules = [row for row in table(tmp_path / "results.csv") if row["metric"] == "coverage_at_risk"]
    graded = table(tmp_path / "predictions.csv")
    found = 0
    for arm in ("warm", "scratch"):
        own = by_patient([row for row in graded if row["arm"] == arm])
        sure = [max(float(row[f"probability_{grade}"]) for grade in range(5)) for row in own]
        shown = [row for where, row in page.rows if where == "referral" and row[0] == arm][-1]
        of_arm = [rule for rule in rules if rule["arm"] == arm and not rule["train_slides"]]
        for risk, rule, cell in zip(risks, of_arm, shown[1:], strict=True):
            assert f"at most {100 * risk}% of patients".replace(".0%", "%") in rule["note"]
            if rule["note"].endswith("all to a human"):
                assert cell == "none"
                continue
            least = float(rule["note"].rsplit(" ", 1)[1]) - 1e-6
            kept = [row for row, value in zip(own, sure, strict=True) if value >= least]
            assert float(rule["estimate"]) == pytest.approx(len(kept) / len(own), abs=1e-5)
            assert cell.startswith(f"{100 * len(kept) / len(own):.0f}\N{NO-BREAK SPACE}%, from ")
            assert f"from {least + 1e-6:.6g} up" in cell  # not rounded: a lower one has more risk
            wrong = {row["patient_id"] for row in kept if row["grade"] != row["predicted_grade"]}
            share = binomtest(len(wrong), len({row["patient_id"] for row in kept}), alternative="less")
            assert share.proportion_ci(1 - 0.05 / 10, "exact").high <= risk + 1e-9
            found += 1
    assert found  # else this tests nothing
    (heading,) = [row for where, row in page.rows if where == "referral" and "at most" in row[1]]
    assert [cell.split("\N{NO-BREAK SPACE}")[0] for cell in heading[1:]] == [
        f"at most {risk}" for risk in ("10", "12.5", "40")
    ]
    least_risk = binomtest(0, 60, alternative="less").proportion_ci(1 - 0.05 / 10, "exact").high
    assert least_risk == pytest.approx(0.08451, abs=1e-5)
    assert "60 patients cannot show a risk below 8.5\N{NO-BREAK SPACE}%" in page.text["referral"]


def test_every_figure_counts_patients(whole: tuple[ComparisonResult, Path]) -> None:
    """From the predictions as they are written, by other means: calibration, sets, readers, sites."""
    result, folder = whole
    rows = table(folder / "results.csv")
    predictions = [
        row for row in table(folder / "predictions.csv") if row["arm"] == "warm" and row["repeat"] == "0"
    ]
    patients = by_patient(predictions)
    assert len(patients) == 60 < len(predictions)
    warm = result.arms[0]
    own = [row for row in rows if row["arm"] == "warm" and not row["train_slides"]]
    true = np.array([int(row["grade"]) for row in patients])
    graded = np.array([int(row["predicted_grade"]) for row in patients])
    sure = np.array([max(float(row[f"probability_{grade}"]) for grade in range(5)) for row in patients])
    (ece,) = [float(row["estimate"]) for row in own if row["metric"] == "ece"]
    in_bin = np.digitize(sure, np.linspace(0, 1, 11)[1:-1], right=True)
    gaps = [abs((true == graded)[in_bin == each].sum() - sure[in_bin == each].sum()) for each in range(10)]
    assert ece == pytest.approx(sum(gaps) / 60, abs=1e-3)
    assert sum(point.n for point in warm.bins) == 60
    assert warm.sets is not None and sum(warm.sets.sizes) == 60
    assert warm.repeatability is not None and warm.repeatability.n == 60
    assert warm.referral.points[-1].risk == pytest.approx(np.mean(true != graded))
    for reader in (0, 1):
        of_reader = np.array([int(row[f"grade_reader{READERS[reader]}"]) for row in patients])
        (found,) = [one.model for one in warm.readers if one.reader == reader]
        assert found.n == 60
        kappas = []
        for repeat in "01":
            again = by_patient(
                [
                    row
                    for row in table(folder / "predictions.csv")
                    if (row["arm"], row["repeat"]) == ("warm", repeat)
                ]
            )
            assert {row["patient_id"]: row[f"grade_reader{READERS[reader]}"] for row in again} == {
                row["patient_id"]: str(grade) for row, grade in zip(patients, of_reader, strict=True)
            }
            pairs = [
                (int(row[f"grade_reader{READERS[reader]}"]), int(row["predicted_grade"])) for row in again
            ]
            kappas.append(cohen_kappa_score(*zip(*pairs, strict=True), weights="quadratic"))
        assert found.qwk.estimate == pytest.approx(np.mean(kappas))
    at = [int(row["n"]) for row in own if (row["section"], row["metric"]) == ("site", "qwk")]
    assert sorted(at) == sorted(Counter(row["site"] for row in patients).values())


def test_sites_are_told_from_the_networks_of_each_arm(
    whole: tuple[ComparisonResult, Path], tmp_path: Path
) -> None:
    _, folder = whole
    rows = [row for row in table(folder / "results.csv") if row["metric"] == "site_from_embeddings"]
    assert [row["note"].partition(";")[0] for row in rows] == ["warm", "scratch"]  # a prior has no network
    assert all(float(row["estimate"]) > 0.8 and float(row["p"]) < 0.01 and row["n"] == "60" for row in rows)
    shown = Page(folder / "report.html").row("sites", "warm")
    assert shown[1] == f"{float(rows[0]['estimate']):.2f}"
    alone = worded(invented(20, repeats=1, sizes=(), sites=("north",)), tmp_path)
    assert "Embeddings" not in alone.text["sites"]


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_arms_are_shown_at_equal_epochs_and_at_their_plateaus(
    small: tuple[ComparisonResult, Path], tmp_path: Path, nested: bool
) -> None:
    """From the curves as they are written, by other means."""
    folder = small[1] if nested else tmp_path
    if not nested:
        worded(invented(20, repeats=1, sizes=(), nested=False), folder)
    page = Page(folder / "report.html")
    rows = [row for row in table(folder / "results.csv") if row["section"] == "learning"]
    points = table(folder / "curves.csv")
    assert {row["arm"] for row in rows} == {"warm", "scratch"}  # a prior has no epochs
    gaps = {}
    for arm in ("warm", "scratch"):
        own = [point for point in points if point["arm"] == arm and (point["part"] != "test") == nested]
        mean = {
            (metric, epoch): np.mean([float(p[metric]) for p in own if int(p["epoch"]) == epoch])
            for metric in ("qwk", "accuracy", "rps")
            for epoch in range(5, 31, 5)
        }
        best = max(mean["qwk", epoch] for epoch in range(5, 31, 5))
        plateau = next(epoch for epoch in range(5, 31, 5) if mean["qwk", epoch] >= best - 0.02)
        least = min(mean["rps", epoch] for epoch in range(5, 31, 5))
        settled = next(epoch for epoch in range(5, 31, 5) if mean["rps", epoch] <= 1.02 * least)
        expected: list[tuple[str, Any]] = [
            (metric, mean[metric, epoch]) for metric, epoch in mean if epoch in (5, 15, 20, 30)
        ]
        expected += [("plateau_qwk", mean["qwk", plateau]), ("plateau_rps", mean["rps", settled])]
        expected += [("epochs_to_plateau", plateau), ("epochs_to_plateau", settled)]
        found = {(row["metric"], row["estimate"]) for row in rows if row["arm"] == arm}
        assert {(metric, f"{value:.6g}") for metric, value in expected} <= found
        trainings = len({(point["fold"], point["part"]) for point in own})
        assert trainings == (10 if nested else 5)
        shown = [row for where, row in page.rows if where == "learning" and row[0] == arm]
        assert [len(row) for row in shown] == [7, 7, 7]
        assert shown[0] == [arm, *(f"{mean['qwk', n]:.2f}" for n in (5, 15, 20, 30)), str(plateau),
                            f"{mean['qwk', plateau]:.2f}"]  # fmt: skip
        assert shown[1][1] == f"{mean['accuracy', 5]:.2f}"
        assert shown[2][1] == str(plateau)
        # Each patient lies in one held-out part of the inner folds of the four folds that it is trained on.
        assert shown[2][-2:] == [str(trainings), "80" if nested else "20"]
        gaps[arm] = mean["qwk", 5], mean["qwk", plateau]
    early, late = (one - other for one, other in zip(gaps["warm"], gaps["scratch"], strict=True))
    assert f"{early:+.2f} after 5, ".replace("-", "\N{MINUS SIGN}") in page.text["learning"]
    assert f"epochs, {late:+.2f}. Means".replace("-", "\N{MINUS SIGN}") in page.text["learning"]


@pytest.mark.slow
def test_temperatures_are_judged_against_none(small: tuple[ComparisonResult, Path]) -> None:
    result, folder = small
    plain = invented(20, repeats=1, sizes=(), temperature=1.0)
    page = Page(folder / "report.html")
    shown = [row for where, row in page.rows if where == "calibration" and len(row) == 8][1:]
    assert [row[0] for row in shown] == ["warm", "scratch"]  # a prior has no temperature
    for row, arm, without in zip(shown, result.arms, plain.arms, strict=False):
        assert row[1] == "1.10 to 1.10"
        for place, name in ((2, "log_loss"), (4, "rps")):
            before, after = (found.metrics[name].estimate for found in (without, arm))  # type: ignore[index]
            assert row[place : place + 2] == [f"{before:.3f}", f"{after:.3f}"]
            assert before != after
        assert without.slope.slope is not None and arm.slope.slope is not None
        assert row[6:] == [
            f"{found.slope.slope.estimate:.2f}" for found in (without, arm) if found.slope.slope
        ]
    rows = {row["metric"]: row for row in table(folder / "results.csv") if row["arm"] == "warm"}
    assert float(rows["untempered_rps"]["estimate"]) == pytest.approx(
        plain.arms[0].metrics["rps"].estimate, 1e-4
    )


def test_the_ceiling_is_that_of_the_labels(whole: tuple[ComparisonResult, Path]) -> None:
    """Labels that are the readers' consensus are judged by another ceiling than those of one reader."""
    result, folder = whole
    assert result.ceiling is not None
    shown = Page(folder / "report.html").images[0]["alt"]
    assert f"limits it to about {View(result, {}).limit:.2f}." in shown
    consensus = (result.readings.sum(axis=1) + 1) // 2
    lower = result.readings.min(axis=1)  # between both readers' grades, and not always their rounded mean
    assert (lower != consensus).any() and (lower != result.readings[:, 0]).any()
    ceiling = result.ceiling
    expected = (consensus, ceiling.consensus_qwk), (4 - consensus, ceiling.qwk), (lower, ceiling.together_qwk)
    for true, limit in expected:
        assert View(replace(result, true=true), {}).limit == limit
    assert len({limit for _, limit in expected}) == 3


def test_arms_on_fewer_slides_are_compared_too(whole: tuple[ComparisonResult, Path], tmp_path: Path) -> None:
    """The figure by hand; and the family of its own that Holm corrects."""
    result, folder = whole
    pairs = result.smaller_differences
    assert {pair.n_slides for pair in pairs} == {arm.n_slides for arm in result.smaller}
    arms = {(arm.arm, arm.n_slides): arm for arm in result.smaller}
    rows = [row for row in table(folder / "results.csv") if row["section"] == "difference"]
    for pair in pairs:
        one, other = arms[pair.arm, pair.n_slides], arms["scratch", pair.n_slides]
        gain = one.metrics["qwk"].estimate - other.metrics["qwk"].estimate
        assert pair.interval.estimate == pytest.approx(gain)
        assert pair.p_holm is not None and pair.p_holm >= pair.sign_flip.p
        shown = [row for row in rows if (row["arm"], row["train_slides"]) == (pair.arm, str(pair.n_slides))]
        assert float(shown[0]["estimate"]) == pytest.approx(gain, 1e-4)
    assert "trained on fewer slides" in worded(result, tmp_path).text["others"]


@pytest.mark.slow
def test_readers_without_a_slide_in_common_end_no_report(tmp_path: Path) -> None:
    for reads in ((0, 1), (2,)):  # half of the slides each; none at all
        result = invented(20, repeats=1, sizes=(), reads=reads, draws=100)
        assert result.ceiling is None and bool(result.arms[0].readers) == (reads == (0, 1))
        assert "noise of the labels is unknown" in worded(result, tmp_path).text["limits"]


@pytest.mark.slow
def test_two_groups_are_compared_by_every_arm_and_by_the_labels(tmp_path: Path) -> None:
    groups = Groups("site", "north", "south")
    page = worded(invented(20, repeats=1, sizes=(), groups=groups), tmp_path)
    rows = [row for row in table(tmp_path / "results.csv") if row["section"] == "groups"]
    predictions = table(tmp_path / "predictions.csv")
    for arm in ("", "warm", "scratch", "prior"):
        of_patient: dict[str, list[float]] = {}
        site = {row["patient_id"]: row["site"] for row in predictions}
        for row in predictions:
            if row["arm"] == (arm or "warm"):
                value = row["expected_grade" if arm else "grade"]
                of_patient.setdefault(row["patient_id"], []).append(float(value))
        south, north = (
            [np.max(values) for patient, values in of_patient.items() if site[patient] == name]
            for name in ("south", "north")
        )
        (shift,) = [row for row in rows if (row["arm"], row["metric"]) == (arm, "shift")]
        median = np.median(np.subtract.outer(south, north))
        assert float(shift["estimate"]) == pytest.approx(median, abs=1e-4)  # five digits are written
        assert int(shift["n"]) == len(south) + len(north)
        shown = page.row("score", arm or "grades in the manifest")
        if arm != "warm" and arm != "scratch":  # whose first table is that of the draws
            assert shown[1:3] == [f"{len(north)} and {len(south)}", as_shown(shift, "{:+.2f}")]
    assert "south minus north (by site)" in page.text["score"]


@pytest.mark.slow
def test_an_undefined_metric_is_said_to_be(small: tuple[ComparisonResult, Path], tmp_path: Path) -> None:
    """Learning curves whose QWK is undefined early, and a threshold without two sides."""
    warm, *others = small[0].arms
    jobs = [
        (job, replace(found, curves=tuple(
            replace(point, qwk=float("nan")) if point.epoch == 5 else point for point in found.curves
        )))
        for job, found in warm.jobs
    ]  # fmt: skip
    quality = replace(warm.quality, auroc=(float("nan"), *warm.quality.auroc[1:]))
    arms = (replace(warm, jobs=tuple(jobs), quality=quality), *others)
    page = written(replace(small[0], arms=arms), tmp_path)
    shown = [row for where, row in page.rows if where == "learning" and row[0] == "warm"]
    assert shown[0][1] == "undefined" and "undefined after 5, " in page.text["learning"]
    assert page.row("calibration", "warm") and any("undefined" in row[1:2] for _, row in page.rows)
    for name in ("results.csv", "curves.csv"):
        rows = [row for row in table(tmp_path / name) if row["arm"] == "warm"]
        assert "nan" not in {cell for row in rows for cell in row.values()}
    (area,) = [row for row in table(tmp_path / "results.csv") if row["arm"] == "warm"
               and row["metric"] == "auroc_above_0"]  # fmt: skip
    assert area["estimate"] == ""
    assert " nan" not in (tmp_path / "report.md").read_text()


def test_every_protocol_has_its_words(whole: tuple[ComparisonResult, Path]) -> None:
    result = whole[0]
    protocol = replace(result.comparison.protocol, leave_one_site_out=True, repeats=1, unit="slide")
    comparison = replace(result.comparison, protocol=protocol, duplicates="join")
    lacking = replace(
        result, comparison=comparison, primary=None, differences=(), site_in_embeddings={}, shared_sites=()
    )
    view = View(lacking, {})
    document = document_of(view, tables_of(view), {})
    text = " ".join(part for section in document.sections for part in section.parts if isinstance(part, str))
    for words in (
        "Each site in turn was the test part",
        "Metrics are of 60 slides. Each",
        "Slides that are the same, or slides that look alike counted as one patient's.",
        "scratch is not complete, or there is no other arm",
        "with one repeat, nor is the seed's share known",
        "How well embeddings tell the site is not known",
    ):
        assert words in text
    assert "only leave_one_site_out tells" not in text


def test_a_given_split_has_a_single_fold(tmp_path: Path) -> None:
    page = worded(invented(30, given_split=True, repeats=1, sizes=()), tmp_path)
    assert "The split given in the manifest was used" in page.text["protocol"]
    assert "were chosen in 2 inner folds" in page.text["protocol"]  # it has no validation part
    assert "With a single fold" in page.text["referral"]
    assert page.row("others", "warm")[-1] == "–"  # of a t over folds
    assert page.row("power", "warm")[1:3] == ["–", "–"]  # neither seed nor fold


def test_stains_unknown_to_the_baseline_of_collagen_are_warned_of() -> None:
    study = invented_study(12, sites=("north",), readers=0)
    stained = [
        replace(slide, row=replace(slide.row, stain=("Sirius red", "Giemsa")[number % 2]))
        for number, slide in enumerate(study.slides)
    ]
    arms = {"prior": Arm(baseline="prior"), "colour": Arm(baseline="collagen")}
    comparison = Comparison(
        manifest="manifest.csv", cache="cache", arms=arms, primary=Primary("colour", "prior")
    )
    with pytest.warns(UserWarning, match=r"arm 'colour': the stain Giemsa is none of H&E"):
        plan_jobs(comparison, replace(study, slides=tuple(stained)), ())
