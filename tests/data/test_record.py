from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slidetl.data.datamodule import SlideDataModule
from slidetl.data.manifest import ManifestRow
from slidetl.data.record import (
    NO_RECORD,
    RecordedSlide,
    StudyRecord,
    config_sha256,
    read_record,
    recorded_parts,
    store_record,
    stored_record,
)
from slidetl.data.study import CachedSlide, Study
from slidetl.errors import CacheCorruptError, CacheMissingError, CheckpointError, UsageError
from slidetl.tiles.codec import tile_codec
from slidetl.tiles.features import FeatureSource
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import CacheHeader, SlideCache

SPEC = TileSpec(1.0, 32)


def slide(
    name: str, patient: str = "", content: str = "", grade: int | None = 0, split: str = ""
) -> CachedSlide:
    """A slide without tiles: name, patient and content are equal unless they are given."""
    header = CacheHeader(name, content or name, "", (1, 1), (1, 1), (1, 1), (1, 1), SPEC)
    cache = SlideCache(
        Path(f"{name}.zarr"), header, np.zeros((0, 2), np.int32), np.zeros(0, np.float32), tile_codec(SPEC)
    )
    return CachedSlide(ManifestRow(2, name, Path(name), patient or name, grade, split=split), cache)


def study(slides: Sequence[CachedSlide]) -> Study:
    return Study(tuple(one.row for one in slides), tuple(slides), Path())


THEN = [slide(name, patient=f"P{name}") for name in "abcdefgh"]
PARTS = dict(zip("abcdefgh", ["train"] * 4 + ["val"] * 2 + ["test"] * 2, strict=True))
RECORD = StudyRecord.of({**study(THEN).divided(PARTS), "predict": THEN})


def who_is_tested(slides: Sequence[CachedSlide], record: StudyRecord | None = RECORD, **how: str) -> str:
    parts, _ = recorded_parts(study(slides), record, **how)  # type: ignore[arg-type] # words are literals
    return "".join(one.row.slide_id for one in parts["test"])


def test_the_recorded_parts_are_kept_whatever_the_grades_are_now() -> None:
    corrected = [replace(one, row=replace(one.row, grade=4 - number % 5)) for number, one in enumerate(THEN)]
    parts, note = recorded_parts(study(corrected[::-1]), RECORD)
    assert {part: {one.row.slide_id for one in slides} for part, slides in parts.items()} == {
        "train": set("abcd"),
        "val": set("ef"),
        "test": set("gh"),
    }
    assert not note
    assert [one.row.grade for one in parts["test"]] == [2, 3]  # by the grades of today


@pytest.mark.parametrize(
    ("now", "difference", "by_manifest"),
    [
        ([*THEN, slide("x")], "1 added: x", "ghx"),
        ([*THEN, slide("x", patient="Pa")], "1 added: x", "gh"),  # of a patient that was trained on
        (THEN[1:], "1 gone: a", "gh"),
        ([*THEN[1:], slide("new", "Pa", "a")], r"1 renamed: new \(was a\)", "gh"),
        ([slide("a", "Pa", "rescanned"), *THEN[1:]], "1 of other content: a", "gh"),
        ([slide("a", "Pb"), *THEN[1:]], r"1 of another patient: a \(Pb, was Pa\)", "gh"),
        ([slide("a", "Pg"), *THEN[1:]], r"1 of another patient: a \(Pg, was Pa\)", "h"),
        ([slide("a", "Pg", grade=None), *THEN[1:]], r"1 of another patient: a \(Pg, was Pa\)", "h"),
        (
            [slide("a", "Q"), *THEN[1:-1], slide("h", "q"), slide("x", "Q")],
            r"2 of another patient: a \(Q, was Pa\), h \(q, was Ph\); 1 added: x",
            "g",
        ),
        (
            [slide("a", "Pa", "h"), *THEN[1:-1], slide("h", "Ph", "a")],
            r"2 renamed: a \(was h\), h \(was a\)",
            "g",  # the content of a patient that was trained on, under the name of one that was not
        ),
    ],
)
def test_another_study_is_refused_by_the_names_of_its_slides(
    now: list[CachedSlide], difference: str, by_manifest: str | None
) -> None:
    with pytest.raises(CheckpointError, match=f"{difference}.*split_from manifest"):
        who_is_tested(now)
    if by_manifest is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "1 of 8 slides have no grade")
            assert who_is_tested(now, split_from="manifest") == by_manifest


def test_a_corrected_patient_has_been_seen_by_any_of_its_slides() -> None:
    """Slide ``a`` of the training turns out to be of a patient of the test part."""
    now = [slide("a", "Pg"), *THEN[1:]]
    assert RECORD.seen(study(now)) == 7 and RECORD.seen(study(THEN)) == 6
    for record in (RECORD, RECORD.by_content):
        for parts in ({"test": [now[0], now[6]]}, {"test": [now[6]], "predict": now}):
            with pytest.raises(UsageError, match=r"of the slides of the test part.* g;"):
                record.refuse_seen(parts)
    marked = [replace(one, row=replace(one.row, split="test")) for one in (now[0], *now[6:])]
    marked[0] = replace(marked[0], row=replace(marked[0].row, grade=None))
    with (
        pytest.warns(UserWarning, match="1 of 3 slides have no grade"),
        pytest.raises(UsageError, match=r"on 1 of the slides of the test part.*: g;"),
    ):
        who_is_tested(marked, split_from="manifest")


def test_a_slide_that_was_graded_since_is_a_difference() -> None:
    record = replace(RECORD, slides=(*RECORD.slides, RecordedSlide("u", "Pu", "u", "")))
    with pytest.warns(UserWarning, match="1 of 9 slides have no grade"):
        assert who_is_tested([*THEN, slide("u", "Pu", grade=None)], record) == "gh"
    with pytest.raises(CheckpointError, match=r"1 in another part: u \(had no grade\)"):
        who_is_tested([*THEN, slide("u", "Pu", grade=1)], record)
    assert who_is_tested([*THEN, slide("u", "Pu", grade=1)], record, split_from="manifest") == "ghu"


def test_a_split_column_decides_only_where_it_is_asked_to_and_tests_nobody_seen() -> None:
    def split(parts: str) -> list[CachedSlide]:
        named = {"t": "train", "v": "val", "x": "test"}
        return [
            replace(one, row=replace(one.row, split=named[p])) for one, p in zip(THEN, parts, strict=True)
        ]

    assert who_is_tested(split("ttttvvxx")) == "gh"
    with pytest.raises(CheckpointError, match=r"1 in another part: g \(train, was test\)"):
        who_is_tested(split("ttttvvtx"))
    assert who_is_tested(split("ttttvvtx"), split_from="manifest") == "h"
    with pytest.raises(UsageError, match=r"trained or chosen on 2 of the slides of the test part.*: a, e;"):
        who_is_tested(split("xtttxvxx"), split_from="manifest")
    with pytest.raises(UsageError, match=r"of the val part.*: a;"):
        recorded_parts(study(split("vtttvvxx")), RECORD, "manifest")


def test_an_external_cohort_is_tested_whole() -> None:
    strangers = [slide(name, f"ext-{name}", f"ext-{name}") for name in "abc"]  # our names, other slides
    parts, note = recorded_parts(study(strangers), RECORD)
    with pytest.raises(CheckpointError, match=r"3 of other content.*start a new training"):
        recorded_parts(study(strangers), RECORD, resumes=True)
    assert len(parts["test"]) == 3 and "none of these 3 slides" in note and "external" in note
    numbered = [slide(name, f"P{name}", f"ext-{name}") for name in "abc"]  # our patients' names, too
    with pytest.raises(CheckpointError, match="3 of other content: a, b, c"):
        who_is_tested(numbered)
    assert who_is_tested(numbered, split_from="external") == "abc"
    with pytest.raises(UsageError, match=r"trained or chosen on 1 .*: copy;"):
        who_is_tested([*numbered, slide("copy", "someone", "e")], split_from="external")
    with pytest.raises(CheckpointError, match="1 added: new"):  # a trained patient, spelled otherwise
        who_is_tested([*strangers, slide("new", "pA", "new")])
    assert who_is_tested([*THEN, slide("new", "pA", "new")], split_from="manifest") == "gh"
    marked = [
        replace(one, row=replace(one.row, split="test" if n else "train")) for n, one in enumerate(strangers)
    ]
    assert who_is_tested(marked) == "bc"


def test_an_older_checkpoint_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="older version"):
        who_is_tested(THEN, None)
    assert "--data.split_from manifest" in NO_RECORD
    with pytest.raises(UsageError, match="no 'split'"):
        who_is_tested(THEN, None, split_from="manifest")
    with pytest.warns(UserWarning, match="no record"):
        assert who_is_tested(THEN, None, split_from="external") == "abcdefgh"


def test_a_content_of_two_patients_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"1 pair of slides with the same content.*: a \(Pa\) and copy \(P9\)"
    ):
        who_is_tested([*THEN, slide("copy", "P9", "a")])
    again = [*THEN, slide("copy", "Pa", "a")]
    assert who_is_tested(
        again, StudyRecord.of({**study(again).divided(PARTS | {"copy": "train"}), "predict": again})
    )


def test_a_record_is_plain_values() -> None:
    assert read_record({"record": RECORD.to_dict()}) == RECORD
    assert read_record({}) is None
    for broken in (["a"], {"slides": [["a", "b"]], "config": ""}, {"slides": [list("abcd")], "config": ""}):
        with pytest.raises(CheckpointError, match="record of the study cannot be understood"):
            read_record({"record": broken})
    for before in (1, [["a", "b"]], [list("abcd")], [["a", 1, "c", "train"]]):
        with pytest.raises(CheckpointError, match="record of the study cannot be understood"):
            read_record({"record": {**RECORD.to_dict(), "before": before}})
    older = {name: value for name, value in RECORD.to_dict().items() if name != "before"}
    assert read_record({"record": older}) == RECORD


def test_the_configurations_hash_is_of_what_shapes_the_result() -> None:
    values = {"model": {"lr": 1}, "data": {"bag_size": 8, "manifest": "a"}, "trainer": {"max_epochs": 2}}
    moved = {
        **values,
        "data": {"bag_size": 8, "manifest": "b", "num_workers": 3},
        "trainer": {"max_epochs": 9},
    }
    assert config_sha256(values) == config_sha256(moved)
    for other in ({"model": {"lr": 2}}, {"data": {"bag_size": 9}}, {"seed_everything": 1}):
        assert config_sha256(values) != config_sha256({**values, **other})


SECOND = replace(StudyRecord(()), before=RECORD.used)  # trained on another study, from the weights of this


@pytest.mark.parametrize(("part", "refused"), [("test", "abcdef"), ("val", "abcd"), ("train", "")])
def test_earlier_trainings_are_seen_as_the_last_one(part: str, refused: str) -> None:
    assert StudyRecord.from_dict(SECOND.to_dict()) == SECOND
    for one in THEN:
        name, patient = one.row.slide_id, one.row.patient_id
        renamed, rescanned = slide("new", "someone", name), slide("new", patient.lower(), "new")
        for record, now in ((SECOND, one), (SECOND, renamed), (SECOND, rescanned), (RECORD, rescanned)):
            if name in refused:
                with pytest.raises(UsageError, match=f"trained or chosen on 1 of the slides of the {part}"):
                    record.refuse_seen({part: [now]})
            else:
                record.refuse_seen({part: [now]})
        SECOND.by_content.refuse_seen({part: [rescanned]})
        with pytest.raises(UsageError) if name in refused else nullcontext():
            SECOND.by_content.refuse_seen({part: [renamed]})
    assert SECOND.by_content.part_of("", "", "another") == ""  # a name left out is no patient


@pytest.mark.parametrize("rest", ["val", "test"])
def test_a_patient_spelled_in_two_ways_counts_once(rest: str) -> None:
    parts = ("", "train", rest)
    slides = [
        RecordedSlide(f"s{part}", name, f"f{part}", part)
        for name, part in zip(("P7", "P7", "p7"), parts, strict=True)
    ]
    for order in (slides, slides[::-1]):
        assert StudyRecord(tuple(order)).part_of("new", "P7", "another") == "train"
        assert (
            StudyRecord(tuple(order[:1]), before=tuple(order[1:])).part_of("new", "p7", "another") == "train"
        )


def test_patients_keep_the_parts_of_the_training_that_weights_come_from() -> None:
    now = [*THEN, slide("a2", "Pa"), slide("x"), slide("copy", "Pcopy", "b"), slide("copy2", "Pcopy")]
    parts = study(now).divided(
        dict(zip((one.row.slide_id for one in now), ["test", "train"] * 6, strict=True))
    )
    with pytest.warns(UserWarning, match="^7 of 12 slides take the part that their patient had"):
        kept = RECORD.keep_parts(parts)
    names = {part: {one.row.slide_id for one in slides} for part, slides in kept.items()}
    assert names == {
        "train": {*"abcd", "a2", "copy", "copy2", "x"},
        "val": set("ef"),
        "test": set("gh"),
    }
    RECORD.refuse_seen(kept)
    assert RECORD.keep_parts(kept) == kept
    strangers = {"train": (slide("x"),), "val": (slide("y"),), "test": (slide("z"),)}
    assert RECORD.keep_parts(strangers) == strangers
    given = {"train": (), "val": (), "test": tuple(slide(name, split="test") for name in "ab")}
    assert RECORD.keep_parts(given) == given  # by the manifest


def test_the_record_behind_features_lies_in_their_cache_or_is_missed(tmp_path: Path) -> None:
    source = FeatureSource("net", "", "a" * 64, (), (), record=store_record(tmp_path, RECORD))
    assert stored_record(tmp_path, source) == RECORD
    assert stored_record(tmp_path, replace(source, record="")) is None
    with pytest.raises(CacheCorruptError, match=r"expected the SHA-256 of a record, found '\.\./a'"):
        stored_record(tmp_path, replace(source, record="../a"))
    path = tmp_path / "records" / f"{source.record}.json"
    path.write_text(path.read_text().replace("train", "test"))
    with pytest.raises(CacheCorruptError, match="damaged"):
        stored_record(tmp_path, source)
    path.unlink()
    with pytest.raises(CacheMissingError, match="run 'slidetl embed' again"):
        stored_record(tmp_path, source)


def test_a_data_module_of_given_slides_records_them() -> None:
    data = SlideDataModule.from_slides(THEN[:4], THEN[4:6], THEN[6:], num_workers=0)
    assert data.record.slides == RECORD.slides
