from __future__ import annotations

from collections.abc import Sequence
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
)
from slidetl.data.study import CachedSlide, Study
from slidetl.errors import CheckpointError, UsageError
from slidetl.tiles.codec import tile_codec
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
        assert who_is_tested(now, split_from="manifest") == by_manifest


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
    with pytest.raises(UsageError, match=r"trained or chosen on 2 of the slides to be tested.*: a, e;"):
        who_is_tested(split("xtttxvxx"), split_from="manifest")
    with pytest.raises(UsageError, match=r"to be tested.*: a;"):
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


def test_a_data_module_of_given_slides_records_them() -> None:
    data = SlideDataModule.from_slides(THEN[:4], THEN[4:6], THEN[6:], num_workers=0)
    assert data.record.slides == RECORD.slides
