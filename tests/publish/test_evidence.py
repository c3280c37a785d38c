from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slidetl.data.manifest import read_manifest
from slidetl.data.record import RecordedSlide, StudyRecord
from slidetl.data.study import CachedSlide, Study
from slidetl.errors import CheckpointError, UsageError
from slidetl.evaluation.calibration import with_temperature
from slidetl.files import csv_rows
from slidetl.publish.evidence import check_today, evidence_from
from slidetl.tiles.codec import tile_codec
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import CacheHeader, SlideCache

SHA = "a" * 64


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_evidence_of_a_comparison_is_of_the_uncalibrated_network(tmp_path: Path) -> None:
    """``slidetl compare`` writes calibrated probabilities beside those of the network, which is exported."""
    rng = np.random.default_rng(1)
    plain: list[dict[str, object]] = []
    compared: list[dict[str, object]] = []
    for number in range(60):
        sharp = with_temperature(rng.dirichlet(np.ones(3)), 0.4).tolist()  # too sure of itself
        temperature = (2.5, 1.6)[number % 2]  # of two folds
        calibrated = with_temperature(sharp, temperature)
        about = {"slide_id": f"s{number}", "patient_id": f"p{number}", "grade": number % 3}
        plain.append(
            about | {"checkpoint": SHA} | {f"probability_{grade}": p for grade, p in enumerate(sharp)}
        )
        compared.append(
            about
            | {"arm": "warm"}
            | {f"probability_{grade}": f"{p:.7f}" for grade, p in enumerate(calibrated)}
            | {"temperature": temperature}
            | {f"uncalibrated_{grade}": p for grade, p in enumerate(sharp)}
        )
    record = StudyRecord(tuple(RecordedSlide(f"s{n}", f"p{n}", f"f{n}", "test") for n in range(60)))
    with pytest.warns(
        UserWarning, match="temperature of 60 slides, 20, is at a bound: .* say nothing"
    ):  # they are noise
        expected = evidence_from(written(tmp_path / "plain.csv", plain), {SHA: record}, 3)
    with pytest.warns(UserWarning, match="temperature of 60 slides, 20, is at a bound: .* say nothing"):
        found = evidence_from(written(tmp_path / "compared.csv", compared), {SHA: record}, 3)
    assert (found.arm, expected.arm) == ("warm", "")  # whether or not it is named
    assert replace(found, predictions_sha256="", arm="") == replace(expected, predictions_sha256="")
    sizes = [row | {"train_slides": size} for row in compared for size in (8, 16)]
    with pytest.raises(UsageError, match="of smaller training parts"):
        evidence_from(written(tmp_path / "sizes.csv", sizes), {SHA: record}, 3)
    older = [{key: row[key] for key in row if not key.startswith("uncalibrated")} for row in compared]
    with pytest.raises(UsageError, match="expected columns uncalibrated_0"):
        evidence_from(written(tmp_path / "older.csv", older), {SHA: record}, 3)
    with pytest.raises(UsageError, match=r"compared on another study .*: s59$"):
        short = StudyRecord(record.slides[:59])
        evidence_from(tmp_path / "compared.csv", {SHA: short}, 3)


def table(path: Path, **columns: str) -> Path:
    """Predictions of twelve slides; ``{n}`` in a column is the number of the slide."""
    rows = [
        {
            "slide_id": f"s{n}",
            "patient_id": f"p{n}",
            "grade": n % 3,
            **{f"probability_{grade}": 0.8 if grade == n % 3 else 0.1 for grade in range(3)},
            "checkpoint": SHA,
            "fingerprint": f"f{n}",
            "reason": "",
        }
        | {name: value.format(n=n) for name, value in columns.items()}
        for n in range(12)
    ]
    return written(path, rows)


def test_evidence_is_of_this_checkpoint_and_of_slides_that_it_has_not_seen(tmp_path: Path) -> None:
    def record(part: str) -> StudyRecord:
        kept = (RecordedSlide(f"s{n}", f"p{n}", f"f{n}", "test") for n in range(11))
        return StudyRecord((*kept, RecordedSlide("s11", "p11", "f11", part)))

    path = table(tmp_path / "t.csv")
    assert evidence_from(path, {SHA: record("test")}, 3).slides == 12
    for part in ("train", "val"):
        with pytest.raises(
            UsageError, match=r"trained or chosen on 1 of these slides or their patients: s11;"
        ):
            evidence_from(path, {SHA: record(part)}, 3)
    for column, value in (
        ("slide_id", "x{n}"),
        ("patient_id", "y{n}"),
        ("fingerprint", "z{n}"),
    ):  # one is enough
        with pytest.raises(UsageError, match="trained or chosen on 1"):
            evidence_from(table(tmp_path / f"{column}.csv", **{column: value}), {SHA: record("train")}, 3)
    strangers = table(tmp_path / "external.csv", patient_id="ext{n}", fingerprint="z{n}")  # our slides' names
    assert evidence_from(strangers, {SHA: record("train")}, 3).slides == 12
    with pytest.raises(UsageError, match=r"predictions of checkpoint ffff.*is aaaa"):
        evidence_from(table(tmp_path / "o.csv", checkpoint="f" * 64), {SHA: record("test")}, 3)
    with pytest.raises(UsageError, match="predictions of no checkpoint"):
        evidence_from(table(tmp_path / "n.csv", checkpoint=""), {SHA: record("test")}, 3)
    with pytest.raises(CheckpointError, match="older version"):
        evidence_from(path, {SHA: None}, 3)
    other = "b" * 64  # of an ensemble each row counts for its own checkpoint
    ensemble = {other: record("train"), SHA: record("test")}
    with pytest.raises(UsageError, match=r"no predictions of 1 of the 2 checkpoints to be exported \(bbb"):
        evidence_from(path, ensemble, 3)
    lines = csv_rows(path.read_text().splitlines())
    joined: list[dict[str, object]] = [
        {**row, "checkpoint": other if row["slide_id"] < "s11" else SHA} for row in lines
    ]
    assert evidence_from(written(tmp_path / "e.csv", joined), ensemble, 3).slides == 12
    formula = table(tmp_path / "f.csv", slide_id="x{n}", fingerprint="", patient_id="'=p{n}")
    with pytest.raises(UsageError, match="trained or chosen on 1"):
        evidence_from(formula, {SHA: StudyRecord((RecordedSlide("a", "=p3", "g", "train"),))}, 3)
    odd = table(tmp_path / "odd.csv", slide_id="x{n}", fingerprint="", patient_id="p {n}")
    with pytest.raises(UsageError, match="trained or chosen on 1"):
        evidence_from(odd, {SHA: StudyRecord((RecordedSlide("a", "p\u00a03", "g", "train"),))}, 3)
    for more, said in (
        ({}, "another scale, with probability_0, probability_1, probability_2 and .* has 5 grades"),
        (
            {"probability_3": "0", "probability_4": "0", "grade": "{n}"},
            "another scale, .* grades 0 to 11;",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            evidence_from(table(tmp_path / "scale.csv", **more), {SHA: record("test")}, 5)


def test_evidence_is_of_one_arm_and_of_the_first_repeat(tmp_path: Path) -> None:
    record = {SHA: StudyRecord(tuple(RecordedSlide(f"s{n}", f"p{n}", f"f{n}", "test") for n in range(12)))}
    with table(tmp_path / "warm.csv", arm="warm", repeat="2").open(newline="") as file:
        warm: list[dict[str, object]] = list(csv.DictReader(file))
    one, other = "probability_0", "probability_1"
    wrong = [row | {one: row[other], other: row[one]} for row in warm]
    expected = evidence_from(tmp_path / "warm.csv", record, 3)
    arms = written(tmp_path / "arms.csv", [*(row | {"arm": "shared"} for row in wrong), *warm])
    with pytest.raises(UsageError, match=r"has several arms, name one with --arm: shared, warm$"):
        evidence_from(arms, record, 3)
    with pytest.raises(UsageError, match=r"has no arm 'x', only shared, warm$"):
        evidence_from(arms, record, 3, arm="x")
    with pytest.raises(UsageError, match=r"has no arm 'warm', only a single table$"):
        evidence_from(table(tmp_path / "single.csv"), record, 3, arm="warm")
    repeats = written(tmp_path / "repeats.csv", [*(row | {"repeat": "10"} for row in wrong), *warm])
    for found in (evidence_from(arms, record, 3, arm="warm"), evidence_from(repeats, record, 3)):
        assert replace(found, predictions_sha256="") == replace(expected, predictions_sha256="")
    assert evidence_from(arms, record, 3, arm="shared").figures != expected.figures


def test_a_flawless_small_set_certifies_no_certainty(tmp_path: Path) -> None:
    """All of twelve slides are graded right, with .8: not every new slide with 1, nor a QWK of 1 [1, 1]."""
    record = {SHA: StudyRecord(tuple(RecordedSlide(f"s{n}", f"p{n}", f"f{n}", "test") for n in range(12)))}
    found = evidence_from(table(tmp_path / "t.csv"), record, 3)
    assert list(found.figures) == ["accuracy"]
    assert found.figures["accuracy"] == pytest.approx((1.0, 0.735, 1.0), abs=1e-3)
    calibrated = with_temperature([0.1, 0.8, 0.1], found.temperature)
    assert calibrated[1] == pytest.approx((12 + 2 * 0.8) / 14)
    header, *lines = (tmp_path / "t.csv").read_text().splitlines()
    many = [line.replace(",", f"-{n},", 1) for line in lines for n in range(5)]  # slides of each patient
    (tmp_path / "many.csv").write_text("\n".join([header, *many]) + "\n")
    repeated = evidence_from(tmp_path / "many.csv", record, 3)
    assert (repeated.slides, repeated.patients) == (60, 12)
    assert repeated.temperature == pytest.approx(found.temperature)
    rows = table(tmp_path / "one.csv").read_text().splitlines()
    rows[1] = rows[1].replace(",0,0.8,", ",1,0.8,")
    (tmp_path / "one.csv").write_text("\n".join(rows) + "\n")
    assert list(evidence_from(tmp_path / "one.csv", record, 3).figures) == ["QWK", "accuracy", "MAE"]


def test_evidence_is_of_finite_numbers(tmp_path: Path) -> None:
    record = {SHA: StudyRecord((RecordedSlide("a", "b", "c", "train"),))}
    with pytest.raises(UsageError, match="expected finite numbers"):
        evidence_from(table(tmp_path / "n.csv", probability_0="nan"), record, 3)
    rows = table(tmp_path / "r.csv").read_text().splitlines()
    cells = rows[1].split(",")
    rows[1] = ",".join([*cells[:3], "", "", "", *cells[6:8], "not finite"])
    (tmp_path / "r.csv").write_text("\n".join(rows) + "\n")
    with pytest.warns(UserWarning, match="1 slides are not graded, left out: s0"):
        assert evidence_from(tmp_path / "r.csv", record, 3).slides == 11


GRADES = ("0", "1", "2")
THEN = StudyRecord(
    (
        *(RecordedSlide(f"s{n}", f"p{n}", f"f{n}", "test") for n in range(12)),
        *(RecordedSlide(f"s{n}", f"p{n}", f"f{n}", "train") for n in range(12, 16)),
    )
)


def manifest_of(path: Path, change: Callable[[dict[str, str]], object] = lambda row: None) -> Path:
    """A manifest of the recorded slides, with something changed; a line without slide_id is left out."""
    rows = [
        {"slide_id": f"s{n}", "path": f"s{n}.svs", "patient_id": f"p{n}", "grade": f"{n % 3}"}
        for n in range(16)
    ]
    for row in rows:
        change(row)
    return written(path, [{**row} for row in rows if row["slide_id"]])


def study_of(manifest: Path) -> Study:
    """The study of a manifest, without tiles."""
    spec = TileSpec(1.0, 32)
    rows = read_manifest(manifest, GRADES).rows
    slides = []
    for row in rows:
        header = CacheHeader(row.slide_id, f"f{row.slide_id[1:]}", "", (1, 1), (1, 1), (1, 1), (1, 1), spec)
        nowhere = np.zeros((0, 2), np.int32), np.zeros(0, np.float32)
        slides.append(CachedSlide(row, SlideCache(Path(), header, *nowhere, tile_codec(spec))))
    return Study(rows, tuple(slides), Path())


CHANGES = [
    (
        {"s1": {"grade": "2"}, "s2": {"grade": ""}},
        r"2 of another grade: s1 \(2, was 1\), s2 \(none, was 2\);",
    ),
    ({"s1": {"patient_id": "p2"}}, r"1 of another patient: s1 \(p2, was p1\); run 'slidetl test'"),
    ({"s1": {"slide_id": ""}}, "has changed since .*, 1 gone: s1;"),
    ({"s12": {"patient_id": "p3"}}, "now has of the patients of 1 of these: s3; .*split_from manifest"),
    ({"s12": {"patient_id": "new", "grade": ""}, "s13": {"slide_id": ""}}, ""),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES)
@pytest.mark.parametrize("is_named", [True, False])
def test_evidence_is_of_grades_and_patients_of_today(
    changes: dict[str, dict[str, str]], said: str, is_named: bool, tmp_path: Path
) -> None:
    """By the manifest that the file beside the table names, or by that of the training."""
    path = table(tmp_path / "predictions.csv")
    now = manifest_of(tmp_path / "m.csv", lambda row: row.update(changes.get(row["slide_id"], {})))
    if is_named:
        (tmp_path / "metrics.json").write_text(json.dumps({"manifest": str(now)}))
    if not said:
        check_today(path, GRADES, {SHA: study_of(now)}, {SHA: THEN})
        return
    with pytest.raises(UsageError, match=said):
        check_today(path, GRADES, {SHA: study_of(now)}, {SHA: THEN})
    if is_named and "s12" not in changes:  # whose content only its tiles tell
        with pytest.raises(UsageError, match=said):
            check_today(path, GRADES, {}, {SHA: THEN})


def test_evidence_by_the_grades_of_a_panel_is_compared_with_them(tmp_path: Path) -> None:
    """The consensus of a panel stands in a manifest of its own, and that of the training stays."""
    ours = study_of(manifest_of(tmp_path / "ours.csv", lambda row: row.update(grade="0")))
    panel = manifest_of(tmp_path / "panel.csv")
    path = table(tmp_path / "predictions.csv")
    with pytest.raises(
        UsageError, match=r"the manifest of the training has changed .* of another grade: s1 "
    ):
        check_today(path, GRADES, {SHA: ours}, {SHA: THEN})
    for name in ("metrics.json", "splits.json"):
        (tmp_path / name).write_text(json.dumps({"manifest": str(panel)}))
        check_today(path, GRADES, {SHA: ours}, {SHA: THEN})
        whole = panel.read_text()
        panel.write_text("slide_id\n")
        check_today(path, GRADES, {}, {SHA: THEN})
        with pytest.raises(UsageError, match=r"cannot be read, .*panel\.csv, line 1: .*--no-training-data"):
            check_today(path, GRADES, {SHA: ours}, {SHA: THEN})
        panel.write_text(whole)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("away", ["gone/manifest.csv", "file/manifest.csv", f"{'x' * 300}/m.csv"])
def test_evidence_of_another_hospital_needs_no_manifest_of_its_patients(away: str, tmp_path: Path) -> None:
    """Slides of the training are compared with its manifest all the same."""
    (tmp_path / "file").touch()
    (tmp_path / "metrics.json").write_text(json.dumps({"manifest": str(tmp_path / away)}))
    ours = {SHA: study_of(manifest_of(tmp_path / "ours.csv", lambda row: row.update(grade="0")))}
    said = (
        f"predictions.csv was tested with is not here .{tmp_path / away}.: grades and patients are compared"
    )
    theirs = table(tmp_path / "predictions.csv", patient_id="ext{n}", fingerprint="z{n}")
    for studies in (ours, {}):
        with pytest.warns(UserWarning, match=said):
            check_today(theirs, GRADES, studies, {SHA: THEN})
    with (
        pytest.warns(UserWarning, match=said),
        pytest.raises(UsageError, match="of another grade: s1 "),
    ):
        check_today(table(tmp_path / "predictions.csv"), GRADES, ours, {SHA: THEN})


def test_evidence_of_another_cohort_is_not_compared_with_the_training(tmp_path: Path) -> None:
    """Its slides may have the names of ours; so may those of another member of an ensemble."""
    ours = study_of(manifest_of(tmp_path / "m.csv", lambda row: row.update(grade="0")))
    cohort = table(tmp_path / "cohort.csv", patient_id="ext{n}", fingerprint="z{n}")
    check_today(cohort, GRADES, {SHA: ours}, {SHA: THEN})
    check_today(table(tmp_path / "other.csv", checkpoint="b" * 64), GRADES, {SHA: ours}, {SHA: THEN})


def test_each_network_of_a_joined_table_counts(tmp_path: Path) -> None:
    """Both graded the slides; the patient of one has a slide now that the first was trained on."""
    other = "b" * 64
    rows = [
        row
        for sha256 in (SHA, other)
        for row in csv.DictReader(table(tmp_path / "t.csv", checkpoint=sha256).read_text().splitlines())
    ]
    path = written(tmp_path / "joined.csv", [{**row} for row in rows])
    now = study_of(
        manifest_of(tmp_path / "m.csv", lambda row: row.update(CHANGES[3][0].get(row["slide_id"], {})))
    )
    kept = StudyRecord(THEN.slides[:12])
    evidence = evidence_from(path, {SHA: kept, other: kept}, 3)
    assert (evidence.slides, evidence.patients) == (12, 12)  # not the rows
    check_today(path, GRADES, {SHA: now, other: now}, {SHA: kept, other: kept})
    for records in ({SHA: THEN, other: kept}, {SHA: kept, other: THEN}):
        with pytest.raises(UsageError, match=r"of the patients of 1 of these: s3;"):
            check_today(path, GRADES, {SHA: now, other: now}, records)
