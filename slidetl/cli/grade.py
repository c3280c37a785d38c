"""``slidetl grade``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slidetl.cli.progress import Progress
from slidetl.grading.options import GradeOptions

if TYPE_CHECKING:
    from slidetl.grading.batch import GradeRow
    from slidetl.publish.model_file import ModelFile


def grade(
    model: Path,
    slides: tuple[Path, ...],
    *,
    options: GradeOptions,
    resume: bool = False,
    trust: bool = False,
    device: str = "auto",
    jobs: int = 1,
) -> int:
    """Grades slides, or CT series, with an exported model.

    Prints a line for each slide on stderr, and one of JSON on stdout unless that is a terminal. Exit code 1
    if any slide failed, after all the others are graded.

    Args:
        model: file of 'slidetl export'; it is run.
        slides: slides in any supported format, folders of them, patterns such as 'study/*.svs', or manifests
            (CSV); their mpp column gives slides their spacing. For a model of volumes CT series: folders of
            DICOM, NIfTI or MetaImage.
        options: of grading and its output.
        resume: leave out slides with results in the output folder by this model and these options.
        trust: vouch for a model file from elsewhere: it is a program. Its hash is recorded.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        jobs: slides graded at a time.
    """
    from slidetl.errors import UsageError
    from slidetl.grading.batch import find_slides, places_of, results_folder
    from slidetl.grading.grade import chosen_precision
    from slidetl.library.trust import trust as record_trust
    from slidetl.models.precision import chosen_device
    from slidetl.publish.model_file import load_model

    if device == "auto":
        device = chosen_device().type
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {jobs}")
    output = options.output
    if resume and output is None:
        raise UsageError("--resume needs --output, the folder with the results so far")
    places = places_of(device, options.devices, jobs)
    loaded = load_model(model, device if len(places) == 1 else "cpu", trust)
    if trust:
        record_trust(loaded.sha256, model.name)
    options = replace(options, precision=chosen_precision(loaded, options.precision, device))
    found, spacings = find_slides(slides)
    with contextlib.nullcontext() if output is None else results_folder(output, options.report):
        return _grade_found(loaded, found, spacings, options, places, resume)


def _grade_found(
    loaded: ModelFile,
    found: list[Path],
    spacings: dict[Path, float],
    options: GradeOptions,
    places: list[str],
    resume: bool,
) -> int:
    from slidetl.files import paced
    from slidetl.grading.batch import (
        GRADED,
        describe,
        grade_slides,
        join_rows,
        output_names,
        read_earlier,
        read_finished,
        write_index_page,
        write_results,
    )
    from slidetl.grading.report.slide import remove_page
    from slidetl.text import one_line

    output, n_grades = options.output, len(loaded.card.grades)
    names = output_names(found, output)
    earlier = {} if output is None else read_earlier(output, names)
    others = [row.slide for row in earlier.values()]
    rows: list[GradeRow] = []
    if output is not None and resume:
        finished_rows = read_finished(output, names, loaded, options, spacings)
        rows = list(finished_rows.values())
        print(f"slidetl: {len(rows)} of {len(found)} slides are graded already", file=sys.stderr)
    finished = {row.slide for row in rows}
    failed = 0

    def write() -> None:
        if output is not None and rows:
            every = join_rows(earlier, rows, names, loaded)
            write_results(output / "results.csv", list(every.values()), n_grades)

    write_now_and_then = paced(write)
    with contextlib.ExitStack() as stack:
        stack.callback(write)  # also if none was left to grade, or something ends the run
        for row in _with_progress(
            grade_slides(loaded, names, options, places, finished, spacings, others),
            len(found) - len(finished),
        ):
            rows.append(row)
            write_now_and_then()
            if row.status != GRADED:
                failed += 1
                print(f"slidetl: failed: {row.reason}", file=sys.stderr, flush=True)
                continue
            if not sys.stdout.isatty():
                print(json.dumps(row.result, allow_nan=False), flush=True)
            print(f"slidetl: {one_line(describe(row, loaded.card))}", file=sys.stderr, flush=True)
            for note in row.result["notes"]:
                print(one_line(f"slidetl: warning: {row.slide}: {note}"), file=sys.stderr, flush=True)
    every = join_rows(earlier, rows, names, loaded)
    for row in every.values():
        for note in row.later_notes if row.slide in names else ():
            print(one_line(f"slidetl: warning: {row.slide}: {note}"), file=sys.stderr)
    if output is not None:
        if earlier:
            print(f"slidetl: results.csv has {len(earlier)} slides of earlier runs as well", file=sys.stderr)
        if options.report:
            write_index_page(output, every, loaded)
        else:
            remove_page(output, "index")
    if failed:
        print(f"slidetl: {failed} of {len(found)} slides failed", file=sys.stderr)
    return 1 if failed else 0


def _with_progress(rows: Iterator[GradeRow], total: int) -> Iterator[GradeRow]:
    """Counts rows as they are used, on a terminal and in the file of ``--status``."""
    with Progress("slides", total, stage="grading") as progress:
        for row in rows:
            yield row
            progress.advance()
