"""Grades many slides, several at a time, and writes a table of their results."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import re
import threading
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slidetl.data.manifest import read_manifest
from slidetl.errors import (
    ModelFileError,
    ProcessEnded,
    SlideError,
    SlidetlError,
    UsageError,
    describe_failure,
)
from slidetl.files import write_csv, write_whole
from slidetl.grading.grade import (
    SlideGrade,
    chosen_precision,
    draw_map,
    grade_series,
    grade_slide,
    is_map,
    start_runner,
)
from slidetl.grading.options import GradeOptions
from slidetl.grading.report.index import IndexEntry, write_index
from slidetl.grading.report.series import write_series_report
from slidetl.grading.report.slide import (
    PAGE,
    has_foreign_page,
    has_slide_report,
    remove_page,
    write_slide_report,
)
from slidetl.grading.series import SeriesGrade
from slidetl.library.model_card import ModelCard
from slidetl.models.precision import chosen_device
from slidetl.models.runner import Rates, Runner
from slidetl.processes import Child, see_one_card, start_child
from slidetl.processor import hand_back_memory, usable_cores
from slidetl.publish.model_file import ModelFile, load_model
from slidetl.slides import open_slide
from slidetl.slides.spacing import cohort_notes
from slidetl.text import listed, one_line, short_names
from slidetl.tiles.cut import slide_parts
from slidetl.tiles.identifier import clash_key, safe_slide_id
from slidetl.tiles.ledger import file_state
from slidetl.tiles.lock import only_process
from slidetl.tiles.readers import Readers
from slidetl.volumes import is_series, is_volume_file, open_series

GRADED, FAILED = "graded", "failed"
_THREADS_OF_A_GPU = 2  # to feed it and gather results; each other core reads a slide
_PIECE = 32  # tiles handed over by a reader at once
_LEFT_OUT = (
    *("tiles_without_tissue", "tiles_without_data", "tiles_pen", "tiles_fold", "tiles_air"),
    "tiles_out_of_focus",
)
_COLUMNS = ("slide", "status", "grade", "grade_name", "set_lowest", "set_highest", "expected_grade")
_MORE = (
    "tiles",
    "tiles_unreadable",
    "areas_unreadable",
    *_LEFT_OUT,
    "tissue_mm2",
    "mask_ml",
    "novelty",
    "fingerprint",
    "model_sha256",
    "precision",
    "reason",
    "notes",
)


@dataclass(frozen=True)
class GradeRow:
    """The outcome of one slide.

    Attributes:
        slide: the file.
        status: ``graded`` or ``failed``.
        result: as :meth:`slidetl.grading.grade.SlideGrade.to_dict`; empty for a failed slide.
        reason: cause of the failure, in one line.
        rates: throughput, if measured.
        later_notes: notes that the result does not have, from :func:`join_rows`.
    """

    slide: Path
    status: str
    result: dict[str, Any]
    reason: str = ""
    rates: Rates | None = None
    later_notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Doubts about the slide."""
        return (*self.result.get("notes", ()), *self.later_notes)


def find_slides(named: Sequence[Path]) -> tuple[list[Path], dict[Path, float]]:
    """Lists slides or CT series, also of manifests and folders, and the matches of ``study/*.svs``.

    Returns:
        The absolute path of each slide, once; and the spacings of level 0, micrometres per pixel, given in
        manifests.

    Raises:
        UsageError: a pattern matches nothing, or a manifest names places in series.
        ManifestError: a folder has no slides, or a manifest has faults.
    """
    found: list[Path] = []
    spacings: dict[Path, float] = {}
    for path in named:
        if path.suffix.lower() in _TABLES and path.is_file():
            rows = read_manifest(path).rows
            if placed := [row.slide_id for row in rows if row.location_mm]:
                raise UsageError(
                    f"{path}: x_mm, y_mm and z_mm name a place in a series ({listed(placed, 3)}), and whole "
                    "series are graded; leave out these columns, with a line for each series"
                )
            found += [row.path for row in rows]
            spacings |= {row.path: row.mpp for row in rows if row.mpp is not None}
        elif path.is_dir() and path.suffix.lower() != ".mrxs":
            found += _with_series(row.path for row in read_manifest(path).rows)
        elif not path.exists() and any(letter in str(path) for letter in "*?["):
            matches = sorted(_matches(path))
            if not matches:
                raise UsageError(f"{path}: no file matches this pattern")
            found += matches
        else:
            found.append(path)
    return list(dict.fromkeys(path.absolute() for path in found)), spacings


def _matches(pattern: Path) -> Iterator[Path]:
    """Lists the matches of a pattern; ``**`` enters each folder once, and linked ones too, but no parent."""
    root, parts = Path(pattern.anchor), pattern.parts[bool(pattern.anchor) :]
    if "**" not in parts:
        yield from root.glob(str(Path(*parts)))
        return
    before, after = parts[: parts.index("**")], parts[parts.index("**") + 1 :]
    if not after or "**" in after:
        raise UsageError(f"{pattern}: expected one **, and a name after it; or name the folder without it")
    entered = set[Path]()
    for top in root.glob(str(Path(*before))) if before else [root]:
        start = Path(os.path.realpath(top))
        for folder, below, _ in os.walk(top, followlinks=True):
            place = Path(os.path.realpath(folder))
            if place in entered or place in start.parents:
                below.clear()
                continue
            entered.add(place)
            yield from Path(folder).glob(str(Path(*after)))


def _with_series(paths: Iterable[Path]) -> list[Path]:
    """Puts the folder of a DICOM series in the place of its first file, if it is alone there."""
    found = list(paths)
    counts = Counter(path.parent for path in found)
    return [
        path.parent if counts[path.parent] == 1 and not is_volume_file(path) and is_series(path) else path
        for path in found
    ]


def places_of(device: str, devices: int, jobs: int) -> list[str]:
    """Lists the device of each process of a run: GPUs from the first on, or the one device again and again.

    Raises:
        UsageError: there is no such device, there are not so many GPUs, or one of them was named.
    """
    if devices > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise UsageError(
                f"--devices {devices} takes GPUs from the first on: use --device cuda, not {device}"
            )
        chosen_device(device, devices)
        return [f"cuda:{number % devices}" for number in range(max(jobs, devices))]
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    there = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if device not in there:
        raise UsageError(f"--device must be {' or '.join(['auto', *there])} on this machine, not {device!r}")
    return [device] * max(jobs, devices)


def grade_slides(
    model: ModelFile,
    names: Mapping[Path, str],
    options: GradeOptions,
    places: Sequence[str] = (),
    finished: Container[Path] = (),
    spacings: Mapping[Path, float] | None = None,
    others: Iterable[Path] = (),
) -> Iterator[GradeRow]:
    """Grades slides, or CT series, and yields them in order of completion; a bad one does not affect others.

    Args:
        model: recorded as trusted; with several places each process loads it again.
        names: slides, with the names of their output files, from :func:`output_names`.
        options: of the computation.
        places: devices of processes, from :func:`places_of`; none, or one, for this process.
        finished: slides to skip.
        spacings: spacing of level 0, micrometres per pixel, instead of the slides' own.
        others: slides with results of earlier runs in the folder, to tell apart from these.
    """
    spacings = spacings or {}
    given = [options.mpp_override, options.mpp_replace, options.mpp_tolerance, options.channels or None]
    if model.card.tile_spec.is_volume and (any(one is not None for one in given) or options.profile):
        raise UsageError(
            f"{model.path} grades CT series, which have a spacing of their own; leave out --mpp-override, "
            "--mpp-replace, --mpp-tolerance, --channels and --profile"
        )
    titles = short_names([*names, *others])
    tasks = [
        Task(path, name, titles[path], spacings.get(path, options.mpp_replace))
        for path, name in names.items()
        if path not in finished
    ]
    if not tasks:
        return
    if len(places) < 2:
        yield from _grade_here(_ready(model, options), tasks, options, len(tasks), usable_cores())
        return
    yield from _grade_apart(model.path, model.sha256, places[: len(tasks)], tasks, options)


class Task(NamedTuple):
    """A slide to grade.

    Attributes:
        slide: the file.
        name: of its output files.
        title: name that tells it from the other slides in the folder, for people.
        mpp: spacing of level 0 from a manifest or the options, micrometres per pixel; None for its own.
    """

    slide: Path
    name: str
    title: str
    mpp: float | None


def _grade_here(
    model: ModelFile, tasks: Iterable[Task], options: GradeOptions, most: int, threads: int
) -> Iterator[GradeRow]:
    """Grades slides in this process: one at a time on a CPU, up to ``most`` on a GPU, in that many threads.

    The next slide is taken when there is room for it. For a GPU each is read in a process, since threads
    wait for the interpreter lock; the last tiles of one slide share a batch with the first of the next.
    Series are read one at a time: each is 100 MB.
    """
    with start_runner(model, options.batch_size, threads, options.precision, options.profile) as runner:
        if not runner.packs or model.card.tile_spec.is_volume:
            for task in tasks:
                yield _grade(model, task, options, runner, threads)
            return
        free = max(1, threads - _THREADS_OF_A_GPU)
        count = min(most, free)
        side_px, depth = model.card.tile_spec.tile_size_px, runner.depth_of(_PIECE, count)
        with (
            ThreadPoolExecutor(count, "slide") as pool,  # ends last: a slide ends with its reader
            Readers(slide_parts, count, _PIECE, side_px, depth) as readers,
        ):
            waiting, running = iter(tasks), set[Future[GradeRow]]()

            def fill() -> None:
                for task in itertools.islice(waiting, count - len(running)):
                    running.add(pool.submit(_grade, model, task, options, runner, free // count, readers))

            fill()
            while running:
                done = wait(running, return_when=FIRST_COMPLETED).done
                running -= done
                fill()
                yield from sorted((future.result() for future in done), key=lambda row: str(row.slide))


def _ready(model: ModelFile, options: GradeOptions) -> ModelFile:
    """Freezes the network for speed, if grades then agree to the seventh decimal.

    In bfloat16 a folded batch norm rounds otherwise than in ``slidetl test``.
    """
    return model if chosen_precision(model, options.precision) == "bfloat16" else model.frozen()


def describe(row: GradeRow, card: ModelCard) -> str:
    """Describes a graded slide in one line: its grade, and the certainty of the grade."""
    result = row.result
    probability = result["probabilities"][result["grade"]]
    parts = [f"{row.slide}: grade {result['grade_name']}, probability {probability:.2f}"]
    if card.evidence is not None and result["grade_set"]:
        names = dict.fromkeys(card.grades[grade] for grade in result["grade_set"])
        coverage = card.describe_coverage(result["novelty"])
        parts.append(f"set of grades{coverage and f', {coverage}'}: {' to '.join(names)}")
    parts.append(card.describe_score(result["expected_grade"]))
    spec = card.tile_spec
    parts.append(
        f"{result['mask_ml']:.0f} ml ({'all' if spec.mask == 'none' else spec.mask})"
        if spec.is_volume
        else f"{result['tissue_mm2']:.3g} mm2 of tissue"
    )
    if result["novelty"] is not None:
        parts.append(f"novelty {card.format_novelty(result['novelty'])}")
    if row.rates:
        parts.append(str(row.rates))
    return "; ".join(parts)


@contextlib.contextmanager
def results_folder(folder: Path, report: bool) -> Iterator[None]:
    """Keeps a folder of results to this run while the context is open.

    Raises:
        UsageError: another run is writing there, or it has a table or a page of another origin under the name
            of one to be written.
        OutputError: nothing can be written there.
    """
    busy = UsageError(
        f"{folder}: another 'slidetl grade' is writing there; wait for its end, or name another --output"
    )
    with only_process(folder, busy):
        table, page = folder / "results.csv", folder / "index.html"
        foreign = [table] if table.exists() and not _is_results(table) else []
        if report and has_foreign_page(folder, page.stem):
            foreign.append(page)
        if foreign:
            raise UsageError(
                f"{', '.join(map(str, foreign))}: not written by 'slidetl grade', which would replace it; "
                "move it, or name another --output"
            )
        yield


def _is_results(table: Path) -> bool:
    try:
        with table.open(newline="", encoding="utf-8") as file:
            return {"slide", "status", "grade_name", "model_sha256"} <= set(next(csv.reader(file), ()))
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def read_earlier(folder: Path, names: Mapping[Path, str]) -> dict[str, GradeRow]:
    """Reads the results of earlier runs in a folder, of other slides and under other names than ``names``.

    Returns:
        The rows by the names of their files, sorted.
    """
    slides, taken = {str(path) for path in names}, set(map(clash_key, names.values()))
    found = {}
    for path in sorted(folder.glob("*.json")):
        if clash_key(path.stem) in taken:
            continue
        with contextlib.suppress(Exception):  # a file of another kind
            result = _parsed(path)
            if result["slide"] not in slides:
                found[path.stem] = GradeRow(Path(result["slide"]), GRADED, result)
    return found


def _parsed(path: Path) -> dict[str, Any]:
    """Reads the result of a slide or series; raises any error for a file that is none."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # refuses NaN
    kinds = _RESULT if "mask_ml" in result else _RESULT | _OF_SLIDES
    if not all(isinstance(result[key], kind) for key, kind in kinds.items()):
        raise TypeError(f"{path}: not the result of a slide")
    return result


def join_rows(
    earlier: Mapping[str, GradeRow], rows: Iterable[GradeRow], names: Mapping[Path, str], model: ModelFile
) -> dict[str, GradeRow]:
    """Joins the rows of earlier runs and of this one, by the names of their files.

    Their notes get spacings that are far from the others, and doubts that results by this model of an earlier
    version of slidetl do not state.
    """
    every = {**earlier, **{names[row.slide]: row for row in rows}}
    far = cohort_notes({name: row.result.get("mpp_level0", 0.0) for name, row in every.items()})
    return {
        name: replace(
            row,
            later_notes=(*_unstated_doubts(row.result, model), *([far[name]] if name in far else [])),
        )
        for name, row in every.items()
    }


def _unstated_doubts(result: Mapping[str, Any], model: ModelFile) -> tuple[str, ...]:
    """Lists the doubts about a slide or series by this model of which its result has no note."""
    if result.get("model_sha256") != model.sha256:
        return ()
    stated = {tuple(note.split()[:2]) for note in result["notes"]}  # the numbers after it may be rounded
    doubts = model.card.doubts_about(result["novelty"], result.get("tissue_mm2"))
    return tuple(doubt for doubt in doubts if tuple(doubt.split()[:2]) not in stated)


def write_results(path: Path, rows: Sequence[GradeRow], n_grades: int) -> None:
    """Writes the table of results, whole or not at all; it may have rows of several models."""
    results = [row.result for row in rows if row.result]
    are_volumes = {"mask_ml" in result for result in results} or {False}
    unused = set() if len(are_volumes) > 1 else _NOT_OF_VOLUMES if are_volumes == {True} else {"mask_ml"}
    n_grades = max(n_grades, *(len(result.get("probabilities", ())) for result in results), 0)
    more = [name for name in _MORE if name not in unused]
    columns = [*_COLUMNS, *(f"probability_{grade}" for grade in range(n_grades)), *more]
    write_csv(path, columns, ({name: _cells(row).get(name) for name in columns} for row in rows))


def _cells(row: GradeRow) -> dict[str, Any]:
    lowest, highest = row.result.get("grade_set") or (None, None)
    odds = enumerate(row.result.get("probabilities") or ())
    about = {"slide": str(row.slide), "status": row.status, "reason": row.reason}
    about |= {"notes": "; ".join(row.notes)}
    about |= {f"probability_{grade}": probability for grade, probability in odds}
    return {**row.result, "set_lowest": lowest, "set_highest": highest, **about}


def write_index_page(folder: Path, rows: Mapping[str, GradeRow], model: ModelFile) -> None:
    """Writes ``index.html``: the results by this model, with a link to each slide's page.

    ``rows`` are from :func:`join_rows`.
    """
    entries = [
        IndexEntry(row.slide, name, row.result, row.reason, row.notes)
        for name, row in rows.items()
        if row.result.get("model_sha256", model.sha256) == model.sha256
    ]
    write_index(folder, entries, model.card)


def read_finished(
    folder: Path,
    names: dict[Path, str],
    model: ModelFile,
    options: GradeOptions,
    spacings: Mapping[Path, float],
) -> dict[Path, GradeRow]:
    """Finds the slides with results in a folder, as this model and these options would grade them.

    ``names`` are from :func:`output_names`. Content, spacing, its tolerance and channels must be equal; with
    a report, a slide without its page is not finished, nor is one that needed ``force``, without it, nor one
    with parts that could not be read then. One of another precision is not either, and a warning counts them.
    The result of a slide that has moved gets its new path.
    """
    precision, others = chosen_precision(model, options.precision), 0
    finished = {}
    for path, name in names.items():
        mpp = spacings.get(path, options.mpp_replace)
        result = _read_result(folder, name, path, model, options, mpp)
        if result is None or (options.report and not has_slide_report(folder, name, result)):
            continue
        if result.get("tiles_unreadable") or result.get("areas_unreadable"):
            continue
        if result.get("precision") != precision:
            others += 1
            continue
        with contextlib.suppress(Exception):  # the slide is unreadable now
            if _identify(path, model, options, mpp) == (result["fingerprint"], result.get("mpp_level0")):
                finished[path] = GradeRow(path, GRADED, {**result, "slide": str(path)})
        if path in finished and result["slide"] != str(path):  # it has moved; the next run goes by its path
            _write_result(folder, name, finished[path].result)
    if others:
        warnings.warn(
            f"{folder}: {others} of {len(names)} slides were not graded in {precision}, or by an earlier "
            "version, which does not say; they are graded again",
            stacklevel=2,
        )
    return finished


def _read_result(
    folder: Path, name: str, path: Path, model: ModelFile, options: GradeOptions, mpp: float | None
) -> dict[str, Any] | None:
    """Reads the result of a slide by this model and, as far as a result says them, these options."""
    spec = model.card.tile_spec
    tolerance = spec.mpp_tolerance if options.mpp_tolerance is None else options.mpp_tolerance
    try:
        result = _parsed(folder / f"{name}.json")
        same = result["model_sha256"] == model.sha256
        same = same and (options.force or not _needs_force(result, model.card))
        if same and not spec.is_volume:
            wanted = (options.channels or spec.channels, tolerance)
            same = (result["channels"], result["mpp_tolerance"]) == wanted
            same = same and mpp in (None, result["mpp_level0"])
    except Exception:  # missing, cut off, or of another form
        return None
    return result if same else None


def _identify(
    path: Path, model: ModelFile, options: GradeOptions, mpp: float | None
) -> tuple[str, float | None]:
    """Opens a slide as it is graded; returns its fingerprint, and the spacing of its level 0."""
    spec = model.card.tile_spec
    if spec.is_volume:
        return open_series(path).fingerprint, None
    channels = options.channels or spec.channels
    with open_slide(path, options.mpp_override, mpp_replace=mpp, channels=channels) as slide:
        return slide.info.fingerprint, max(slide.info.mpp_level0)


def _needs_force(result: Mapping[str, Any], card: ModelCard) -> bool:
    """Tells if a slide is refused without ``force``, or so near the limit that rounding hides it."""
    least = round(card.training.least_tissue_mm2 / 2, 4) if card.training else 0.0
    return (result["novelty"] or 0) >= 1 or (least > 0 and result["tissue_mm2"] <= least)


_RESULT: dict[str, Any] = {
    **dict.fromkeys(("slide", "fingerprint", "grade_name", "model_sha256"), str),
    **dict.fromkeys(("grade", "tiles"), int),
    "expected_grade": int | float,
    **dict.fromkeys(("probabilities", "notes"), list),
    "grade_set": list | None,
    "novelty": int | float | None,
}
_OF_SLIDES: dict[str, Any] = {
    "tiles_unreadable": int,
    **dict.fromkeys(("tissue_mm2", "mpp_level0"), int | float),
}
_NOT_OF_VOLUMES = {*_OF_SLIDES, "areas_unreadable", *_LEFT_OUT}


def output_names(slides: Sequence[Path], folder: Path | None = None) -> dict[Path, str]:
    """Names the output files of each slide: its own name, if taken with its folder's, then numbered.

    No two are equal, even on a file system without case. In ``folder`` they replace neither the results of
    another slide, nor one of the slides, nor a JSON, picture or page of another origin; a warning counts
    those that are named otherwise for it.
    """
    names: dict[Path, str] = {}
    taken = {"index"}  # the page of all slides
    lowest: dict[str, int] = defaultdict(lambda: 2)  # number that is not taken, by name
    target = folder.resolve() if folder is not None else None
    # Unlike Path.resolve, realpath takes a loop of links, which fails as a slide.
    files = {Path(os.path.realpath(path)) for path in slides} if folder is not None else set()

    def is_free(name: str, path: Path) -> bool:
        if target is None or clash_key(name) in taken:
            return clash_key(name) not in taken
        replaced = (target / f"{name}{suffix}" for suffix in (*_RESULTS, *PAGE))
        if not files.isdisjoint(replaced) or has_foreign_page(target, name):
            return False
        drawn = target / f"{name}.png"
        if drawn.exists() and not (is_map(drawn) or (target / f"{name}.json").exists()):
            return False
        return not (target / f"{name}.json").exists() or _is_of(_recorded(target, name), path)

    def numbered(name: str) -> Iterator[str]:
        while clash_key(f"{name}_{lowest[name]}") in taken:
            lowest[name] += 1
        yield from (f"{name}_{n}" for n in itertools.count(lowest[name]))

    for path in dict.fromkeys(slides):
        is_uid = re.fullmatch(r"\.\d+", path.suffix) is not None  # as a folder of DICOM is named
        short = safe_slide_id(path.name if is_uid else path.stem) or "slide"
        long = safe_slide_id("_".join(path.parts[-2:])) or short
        candidates = itertools.chain((short, long), numbered(long))
        names[path] = next(name for name in candidates if is_free(name, path))
        taken.add(clash_key(names[path]))
    moved = [path for path, name in output_names(slides).items() if names[path] != name] if folder else []
    if moved:
        warnings.warn(
            f"{folder}: files of {len(moved)} slides are named otherwise, not to replace those of another "
            f"slide or program: {listed([f'{path} is {names[path]}.json' for path in moved], 3)}",
            stacklevel=2,
        )
    return names


_RESULTS = (".json", ".png", ".patches.csv")


def _recorded(folder: Path, name: str) -> tuple[Path, object] | None:
    """Returns the slide with results of a name in a folder, and its fingerprint; None if there are none."""
    try:
        result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return Path(result["slide"]), result.get("fingerprint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_of(recorded: tuple[Path, object] | None, path: Path) -> bool:
    """Tells if results are of a slide: by its path, or by its content if none is found at theirs any more.

    A relative path, of an earlier version, was relative to a folder that is not known.
    """
    if recorded is None:
        return False
    slide, fingerprint = recorded
    if slide.is_absolute():
        if os.path.realpath(slide) == os.path.realpath(path):
            return True
        if file_state(slide) is not None:
            return False
    with contextlib.suppress(Exception):  # it cannot be opened
        if is_volume_file(path) or is_series(path):
            return open_series(path).fingerprint == fingerprint
        # No pixel is read: neither spacing nor channel matters.
        with open_slide(path, mpp_replace=1.0, channels="0") as opened:
            return opened.info.fingerprint == fingerprint
    return False


def _remove_results(folder: Path, task: Task, model: ModelFile, options: GradeOptions) -> None:
    """Removes the results of an earlier run, which would pass for those of today's if that fails.

    Those of this model and these options stay if the slide cannot be opened (its disk is away), unless it was
    changed since; then the error of opening is raised.
    """
    path, name, _, mpp = task
    if _read_result(folder, name, path, model, options, mpp) is not None:
        try:
            _identify(path, model, options, mpp)
        except Exception as error:
            state = file_state(path)
            if state is None or state[1] <= (folder / f"{name}.json").stat().st_mtime:
                error.add_note("its results of an earlier run are kept")
                raise
    if _recorded(folder, name) is not None:
        for suffix in _RESULTS:  # the JSON first: without it a slide is not finished
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    if is_map(folder / f"{name}.png"):  # of a run that ended before it wrote the JSON
        (folder / f"{name}.png").unlink()
    remove_page(folder, name)


def _grade(
    model: ModelFile,
    task: Task,
    options: GradeOptions,
    runner: Runner,
    threads: int,
    readers: Readers | None = None,
) -> GradeRow:
    path = task.slide
    try:
        if options.output is not None:
            _remove_results(options.output, task, model, options)
        result = (
            grade_series(model, path, threads=threads, force=options.force, runner=runner)
            if model.card.tile_spec.is_volume
            else grade_slide(
                model,
                path,
                options.mpp_override,
                threads=threads,
                force=options.force,
                profile=options.profile,
                runner=runner,
                readers=readers,
                mpp_replace=task.mpp,
                mpp_tolerance=options.mpp_tolerance,
                channels=options.channels,
            )
        )
        hand_back_memory()  # of embeddings and activations; a report needs some
        if options.output is not None:
            with _drawing:
                _write(result, model, options, options.output, task, threads)
    except Exception as error:  # of a decoder, a bug, or lack of memory: the other slides go on
        if isinstance(error, SlidetlError) and not isinstance(error, SlideError):
            raise
        reason = describe_failure(error, "lower --batch-size or --jobs")
        reason = "; ".join([reason, *getattr(error, "__notes__", ())])
        return GradeRow(path, FAILED, {}, reason if str(path) in reason else one_line(f"{path}: {reason}"))
    rates = result.rates if isinstance(result, SlideGrade) else None
    return GradeRow(path, GRADED, result.to_dict(), rates=rates)


def _write(
    result: SlideGrade | SeriesGrade,
    model: ModelFile,
    options: GradeOptions,
    folder: Path,
    task: Task,
    threads: int,
) -> None:
    name, title = task.name, task.title
    if isinstance(result, SlideGrade):
        draw_map(result, model.card, folder / f"{name}.png", title)
        if options.report:
            write_slide_report(result, model.card, folder, name, title=title, threads=threads)
    elif options.report:
        write_series_report(result, model.card, folder, name, title)
    else:
        patches = result.patch_rows()
        write_csv(folder / f"{name}.patches.csv", list(patches[0]), patches)
    _write_result(folder, name, result.to_dict())  # last: a resumed run takes a slide with it as finished


def _write_result(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    write_whole(folder / f"{name}.json", json.dumps(result, allow_nan=False) + "\n")


# Suffixes of manifests, and of tables refused with a clear message.
_TABLES = frozenset([".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods"])

_drawing = threading.Lock()  # matplotlib takes one thread at a time


def _grade_apart(
    model: Path, sha256: str, places: Sequence[str], tasks: Sequence[Task], options: GradeOptions
) -> Iterator[GradeRow]:
    """Grades slides in a process for each place, which asks for the next when it has room for it.

    What a process had begun when it was ended is tried again, one slide alone in a process.

    Raises:
        SlidetlError: as of a process; it concerns all slides.
        ProcessEnded: a process was ended before it asked for a slide.
    """
    threads = max(1, usable_cores() // len(places))
    waiting, begun_twice, asked = deque(tasks), list[Task](), set[Connection]()
    busy: dict[Connection, tuple[Child, str, dict[Path, Task]]] = {}
    most = -(-len(tasks) // len(places))

    def start(place: str) -> None:
        child = start_child(_serve, model, sha256, place, options, most, threads, has_children=True)
        busy[child.connection] = child, place, {}

    try:
        for place in places:
            start(place)
        while busy:
            for ready in connection.wait(list(busy)):
                assert isinstance(ready, Connection)  # from `busy`
                child, place, begun = busy[ready]
                try:
                    found = ready.recv()
                except (EOFError, ConnectionError):
                    del busy[ready]
                    reason = child.cause_of_death("graded")
                    if not begun and ready not in asked:
                        raise ProcessEnded(f"on {place}: {reason}; use fewer --jobs or --devices") from None
                    if len(tasks) > 1:
                        begun_twice += begun.values()
                    elif begun:
                        yield GradeRow(
                            tasks[0].slide, FAILED, {}, f"{tasks[0].slide}: {reason}; use fewer --jobs"
                        )
                    if waiting:
                        start(place)
                    continue
                if isinstance(found, Exception):
                    raise found
                if isinstance(found, GradeRow):
                    del begun[found.slide]
                    yield found
                    continue
                asked.add(ready)
                task = waiting.popleft() if waiting else None
                with contextlib.suppress(BrokenPipeError):  # its end is found above
                    ready.send(task)
                if task is not None:
                    begun[task.slide] = task
    finally:  # if no more can be written, the others need not be graded
        for child, _, _ in busy.values():
            child.end()
    for task in begun_twice:
        yield from _grade_apart(model, sha256, places[:1], [task], options)


def _serve(
    parent: Connection, path: Path, sha256: str, place: str, options: GradeOptions, most: int, threads: int
) -> None:
    """Grades the slides that it asks for, in a process of its own."""

    def asked() -> Iterator[Task]:
        while True:
            parent.send(None)
            task: Task | None = parent.recv()
            if task is None:
                return
            yield task

    torch.set_num_threads(threads)
    if place.startswith("cuda:"):
        see_one_card(int(place.removeprefix("cuda:")))
        place = "cuda"
    try:
        loaded = load_model(path, place)
        if loaded.sha256 != sha256:
            raise ModelFileError(
                f"{path}: replaced during the run, which began with SHA-256 {sha256[:12]}..., by one with "
                f"{loaded.sha256[:12]}...; grade all slides again by one of them"
            )
        model = _ready(loaded, options)
        for row in _grade_here(model, asked(), options, most, threads):
            parent.send(row)
    except SlidetlError as error:
        parent.send(error)
