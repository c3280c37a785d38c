"""The record of a study in a checkpoint: its slides, patients and parts."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from slidetl.data.manifest import SPLITS
from slidetl.data.study import CachedSlide, Study, check_duplicates
from slidetl.errors import CacheCorruptError, CacheMissingError, CheckpointError, UsageError
from slidetl.files import write_whole
from slidetl.text import listed, spelling
from slidetl.tiles.features import FeatureSource, record_path

SplitFrom = Literal["checkpoint", "manifest", "external"]

# Options for the place and the reading of data; they change no result.
_PLACES = ("manifest", "cache", "num_workers", "decode_threads", "prefetch", "fold", "split_from")
_NO_RESULT = ("data.chunk_size",)  # likewise, but 0.1.0 has it in the hash of the configuration
_OTHER_WAYS = (
    "--data.split_from manifest (by the manifest's 'split', or without one the recorded test part and every "
    "patient that the checkpoint has not seen) or --data.split_from external (everyone, as strangers)"
)

NO_RECORD = (
    "the checkpoint is of an older version, without a record of its slides; train again, or say who is "
    f"tested: {_OTHER_WAYS}"
)


@dataclass(frozen=True)
class RecordedSlide:
    """A slide in the study of a checkpoint.

    Attributes:
        slide_id, patient_id: from the manifest of the training.
        fingerprint: SHA-256 of the slide's content.
        part: ``train``, ``val`` (an epoch was chosen on it) or ``test``; empty without a grade.
    """

    slide_id: str
    patient_id: str
    fingerprint: str
    part: str


@dataclass(frozen=True)
class StudyRecord:
    """All slides of a study, with their parts.

    Attributes:
        slides: in the order of the manifest.
        config_sha256: hash of the configuration, :func:`config_sha256`; empty for a training from Python.
        before: slides of earlier studies, ``train`` or ``val`` of the trainings that the initial weights or
            features come from; without a patient if only their content counts.
    """

    slides: tuple[RecordedSlide, ...]
    config_sha256: str = ""
    before: tuple[RecordedSlide, ...] = ()

    @classmethod
    def of(
        cls,
        parts: Mapping[str, Sequence[CachedSlide]],
        config_sha256: str = "",
        before: Iterable[RecordedSlide] = (),
    ) -> Self:
        """Records the parts of a data module; ``predict`` has all slides."""
        part_of = {slide.row.slide_id: part for part in SPLITS for slide in parts[part]}
        slides = (
            RecordedSlide(
                row.slide_id, row.patient_id, slide.cache.fingerprint, part_of.get(row.slide_id, "")
            )
            for slide in parts["predict"]
            for row in (slide.row,)
        )
        return cls(tuple(slides), config_sha256, tuple(before))

    def to_dict(self) -> dict[str, Any]:
        """Converts the record to plain values."""
        return {
            "slides": [list(asdict(slide).values()) for slide in self.slides],
            "config": self.config_sha256,
            "before": [list(asdict(slide).values()) for slide in self.before],
        }

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Inverts :meth:`to_dict`; raises a CheckpointError for other values."""
        try:
            slides = tuple(RecordedSlide(*row) for row in values["slides"])
            before = tuple(RecordedSlide(*row) for row in values.get("before", ()))
            every = (*slides, *before)
            is_text = all(isinstance(text, str) for slide in every for text in asdict(slide).values())
            if not is_text or not isinstance(values["config"], str):
                raise TypeError("expected text")
            if not {slide.part for slide in every} <= {*SPLITS, ""}:
                raise ValueError(f"expected the parts {', '.join(SPLITS)}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"its record of the study cannot be understood: {error}") from error
        return cls(slides, values["config"], before)

    def differences(self, study: Study) -> list[str]:
        """Lists the differences of a study to the recorded one, with the names of slides."""
        then = {slide.slide_id: slide for slide in self.slides}
        contents = {slide.fingerprint: slide.slide_id for slide in self.slides}
        found: dict[str, list[str]] = defaultdict(list)
        for slide in study.slides:
            row, was = slide.row, then.get(slide.row.slide_id)
            if was is None or was.fingerprint != slide.cache.fingerprint:
                other = contents.get(slide.cache.fingerprint)
                kind = "renamed" if other else "added" if was is None else "of other content"
                found[kind].append(f"{row.slide_id} (was {other})" if other else row.slide_id)
            elif was.patient_id != row.patient_id:
                name = f"{row.slide_id} ({row.patient_id}, was {was.patient_id})"
                found["of another patient"].append(name)
            elif row.grade is not None and (not was.part or row.split not in ("", was.part)):
                moved = f"{row.split}, was {was.part}" if was.part else "had no grade"
                found["in another part"].append(f"{row.slide_id} ({moved})")
        now = {slide.row.slide_id for slide in study.slides}
        still = {slide.cache.fingerprint for slide in study.slides}
        gone = [
            was.slide_id for was in self.slides if was.slide_id not in now and was.fingerprint not in still
        ]
        found |= {"gone": gone} if gone else {}
        return [f"{len(names)} {kind}: {listed(names)}" for kind, names in found.items()]

    def in_order(self, study: Study) -> Study:
        """Puts the slides of a study in the recorded order, by which a training draws slides and tiles."""
        places = {slide.slide_id: place for place, slide in enumerate(self.slides)}
        slides = sorted(study.slides, key=lambda slide: places.get(slide.row.slide_id, len(places)))
        return replace(study, slides=tuple(slides))

    def part_of(self, slide_id: str, patient_id: str, fingerprint: str) -> str:
        """Returns the part of a slide or its patient, the first of train, val and test; empty if unknown.

        Slides of earlier trainings count as those of the study.

        Args:
            slide_id: from a manifest or a table.
            patient_id: likewise.
            fingerprint: SHA-256 of the slide's content; if empty, the identifier counts instead.
        """
        content = self._contents.get(fingerprint, "") if fingerprint else self._names.get(slide_id, "")
        parts = {content, self._patients.get(spelling(patient_id), "")}
        return next((part for part in SPLITS if part in parts), "")

    def parts_today(self, slides: Iterable[CachedSlide]) -> dict[str, str]:
        """Returns the part of each slide's patient of today, by ``slide_id``.

        It is the first part of any slide that the patient has now: by the names of then alone, a patient who
        was given a slide of the training since would be a stranger.
        """
        found: dict[str, set[str]] = defaultdict(set)
        patients: dict[str, str] = {}
        for row, cache in ((slide.row, slide.cache) for slide in slides):
            patients[row.slide_id] = patient = spelling(row.patient_id)
            found[patient].add(self.part_of(row.slide_id, row.patient_id, cache.fingerprint))
        return {
            slide_id: next((part for part in SPLITS if part in found[patient]), "")
            for slide_id, patient in patients.items()
        }

    @cached_property
    def _contents(self) -> dict[str, str]:
        return self._first_part(lambda slide: slide.fingerprint)

    @cached_property
    def _patients(self) -> dict[str, str]:
        return self._first_part(lambda slide: spelling(slide.patient_id))

    @cached_property
    def _names(self) -> dict[str, str]:
        return self._first_part(lambda slide: slide.slide_id)

    def _first_part(self, name_of: Callable[[RecordedSlide], str]) -> dict[str, str]:
        order = ("", *reversed(SPLITS))
        slides = sorted((*self.slides, *self.before), key=lambda slide: order.index(slide.part))
        return {name: slide.part for slide in slides if (name := name_of(slide))}

    def knows(self, slide_id: str, patient_id: str) -> bool:
        """Checks if the record has a slide of a table."""
        return (slide_id, patient_id) in self._pairs

    @cached_property
    def _pairs(self) -> frozenset[tuple[str, str]]:
        return frozenset((slide.slide_id, slide.patient_id) for slide in self.slides)

    def knows_nobody(self, study: Study) -> bool:
        """Checks if a study shares neither a slide's content nor a patient with the record."""
        return not any(
            slide.cache.fingerprint in self._contents or spelling(slide.row.patient_id) in self._patients
            for slide in study.slides
        )

    def find(self, study: Study, part: str) -> tuple[CachedSlide, ...]:
        """Finds the slides of a recorded part.

        Raises:
            CheckpointError: a slide is gone, or has other content; the message names it.
        """
        now = {slide.row.slide_id: slide for slide in study.slides}
        then = [was for was in self.slides if was.part == part]
        changed = [
            was.slide_id
            for was in then
            if was.slide_id not in now or now[was.slide_id].cache.fingerprint != was.fingerprint
        ]
        if changed:
            raise CheckpointError(
                f"{len(changed)} slides of the {part} part are gone or of other content: {listed(changed)}"
            )
        return tuple(now[was.slide_id] for was in then)

    def seen(self, study: Study) -> int:
        """Counts the slides used to train or choose the checkpoint, their patients' other slides included."""
        return sum(part in ("train", "val") for part in self.parts_today(study.slides).values())

    @property
    def used(self) -> tuple[RecordedSlide, ...]:
        """The slides that the weights were trained or chosen on, earlier trainings included."""
        return tuple(slide for slide in (*self.slides, *self.before) if slide.part in ("train", "val"))

    @property
    def by_content(self) -> Self:
        """The record without patients, for a study that may give others the same names."""
        slides, before = (
            tuple(replace(slide, patient_id="") for slide in of) for of in (self.slides, self.before)
        )
        return replace(self, slides=slides, before=before)

    def refuse_seen(
        self,
        parts: Mapping[str, Sequence[CachedSlide]],
        seer: str = "the checkpoint was",
        remedy: str = "leave them out, or train again without them",
    ) -> None:
        """Refuses to test on slides of the training or its choice, or to choose on training slides.

        Args:
            parts: slides to check, of the parts ``val`` and ``test``; others count only for what they tell
                of the patients.
            seer: beginning of the message.
            remedy: end of the message.

        Raises:
            UsageError: some slides, or their patients, were seen; the message names them.
        """
        part_of = self.parts_today(slide for slides in parts.values() for slide in slides)
        for part, recorded in (("test", ("train", "val")), ("val", ("train",))):
            names = (slide.row.slide_id for slide in parts.get(part, ()))
            seen = [name for name in names if part_of[name] in recorded]
            if seen:
                raise UsageError(
                    f"{seer} trained or chosen on {len(seen)} of the slides of the {part} part, or on their "
                    f"patients: {listed(seen)}; {remedy}"
                )

    def keep_parts(self, parts: Mapping[str, Sequence[CachedSlide]]) -> dict[str, tuple[CachedSlide, ...]]:
        """Moves known patients to their recorded parts, unless the manifest has a ``split``; warns of it."""
        everyone = [slide for part in SPLITS for slide in parts[part]]
        if any(slide.row.split for slide in everyone):
            return {part: tuple(parts[part]) for part in SPLITS}
        recorded = self.parts_today(everyone)
        kept: dict[str, list[CachedSlide]] = {part: [] for part in SPLITS}
        moved = 0
        for part in SPLITS:
            for slide in parts[part]:
                target = recorded[slide.row.slide_id] or part
                kept[target].append(slide)
                moved += target != part
        if moved:
            warnings.warn(
                f"{moved} of {len(everyone)} slides take the part that their patient had in the training of "
                "the initial weights",
                stacklevel=3,
            )
        return {part: tuple(slides) for part, slides in kept.items()}


def ancestors(
    folder: Path,
    origins: Iterable[StudyRecord | None],
    sources: Iterable[FeatureSource],
    *,
    by_content: bool = False,
) -> StudyRecord:
    """Joins the records of the trainings that initial weights and stored features come from.

    Args:
        folder: the cache of the features.
        origins: of the checkpoints with the initial weights; None for other weights.
        sources: the networks of the features.
        by_content: leave out the patients, where others may have the same names.

    Raises:
        CacheError: as :func:`stored_record`.
    """
    records = [*origins, *(stored_record(folder, source) for source in sources)]
    slides = (slide for record in records if record is not None for slide in (*record.slides, *record.before))
    joined = StudyRecord(tuple(dict.fromkeys(slides)))
    return joined.by_content if by_content else joined


def recorded_parts(
    study: Study, record: StudyRecord | None, split_from: SplitFrom = "checkpoint", *, resumes: bool = False
) -> tuple[dict[str, tuple[CachedSlide, ...]], str]:
    """Divides a study by the record of a checkpoint, to test on no slide or patient of its training.

    Args:
        study: the current study.
        record: None for a checkpoint of an older version.
        split_from: ``checkpoint`` takes the recorded parts and refuses another study, but tests a study of
            strangers whole; ``manifest`` takes the manifest's ``split``, or without it the recorded part of
            each patient, and ``test`` for strangers; ``external`` tests all, and compares only content.
        resumes: True for resuming a training; it accepts only the recorded study.

    Returns:
        ``train``, ``val`` and ``test``, and a note for the user, maybe empty.

    Raises:
        CheckpointError: the study differs from the record, or there is no record.
        UsageError: a test slide was used to train or choose the checkpoint, or no split is known.
    """
    check_duplicates(study.graded)
    graded, note = study.graded, ""
    has_split = any(slide.row.split for slide in graded)
    if record is None:
        if split_from == "checkpoint":
            raise CheckpointError(NO_RECORD)
        if split_from == "manifest" and not has_split:
            raise UsageError("the manifest has no 'split', and the checkpoint no record; give it that column")
        warnings.warn(
            "the checkpoint has no record of its slides: nothing shows that these were kept from it",
            stacklevel=3,
        )
        record = StudyRecord(())
    elif split_from == "checkpoint" and not resumes and record.knows_nobody(study):
        split_from = "manifest" if has_split else "external"
        how = "tested by the manifest's 'split'" if has_split else "tested whole"
        note = f"none of these {len(graded)} slides is in the checkpoint's record: an external cohort, {how}"
    if split_from == "checkpoint":
        if differences := record.differences(study):
            raise CheckpointError(
                f"the study is not the one that the checkpoint was trained with: {'; '.join(differences)}. "
                "Use the manifest of then, or "
                + ("start a new training" if resumes else f"say who is tested: {_OTHER_WAYS}")
            )
        part_of = {was.slide_id: was.part for was in record.slides}
    elif split_from == "external":
        part_of = {slide.row.slide_id: "test" for slide in graded}
    elif has_split:
        part_of = {slide.row.slide_id: slide.row.split for slide in graded}
    else:
        part_of = {name: part or "test" for name, part in record.parts_today(study.slides).items()}
    parts = study.divided(part_of)
    seen = record.by_content if split_from == "external" else record
    seen.refuse_seen({**parts, "predict": study.slides})
    return parts, note


def read_record(checkpoint: Mapping[str, Any]) -> StudyRecord | None:
    """Reads the record of a checkpoint, None for older versions; raises a CheckpointError if invalid."""
    return StudyRecord.from_dict(checkpoint["record"]) if checkpoint.get("record") else None


def store_record(cache: Path, record: StudyRecord) -> str:
    """Stores the record of a checkpoint in the cache of features made by it; returns its SHA-256.

    Raises:
        OutputError: the file cannot be written.
    """
    content = json.dumps(record.to_dict())
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    path = record_path(cache, sha256)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, content)
    return sha256


def stored_record(cache: Path, source: FeatureSource) -> StudyRecord | None:
    """Reads the record of the checkpoint behind stored features; None if none is known.

    Raises:
        CacheMissingError: the cache lacks its file.
        CacheCorruptError: the file is damaged.
    """
    if not source.record:
        return None
    path = record_path(cache, source.record)
    again = "copy it from the cache of the features, or run 'slidetl embed' again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheMissingError(
            f"{path}: no record of the slides that the network of these features was trained on; {again}"
        ) from error
    if hashlib.sha256(content).hexdigest() != source.record:
        raise CacheCorruptError(f"{path}: damaged, {again}")
    return StudyRecord.from_dict(json.loads(content))


def config_sha256(values: Mapping[str, Any]) -> str:
    """Hashes model, data options and seed of a ``config.yaml`` by SHA-256.

    Paths are left out, and epochs too: a resumed training may have more, and keeps earlier checkpoints.
    """
    options = data_options(values)
    kept = {"model": values.get("model"), "data": options["data"], "seed": options["seed_everything"]}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def data_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns data options and seed of a ``config.yaml``, for a resumed training to keep."""
    data = {key: value for key, value in (values.get("data") or {}).items() if key not in _PLACES}
    return {"data": data, "seed_everything": values.get("seed_everything")}


def changed_options(then: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> list[str]:
    """Lists the options of :func:`data_options` that differ, by dotted name; one added since does not."""
    found = []
    for key, value in then.items():
        other = now.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if value.get("class_path") != other.get("class_path"):  # which has other arguments
                value, other = ({"class_path": one.get("class_path")} for one in (value, other))
            found += changed_options(value, other, f"{of}{key}.")
        elif value != other and f"{of}{key}" not in _NO_RESULT:
            found.append(f"{of}{key} {value!s:.60}, the configuration says {other!s:.60}")
    return found
