"""``slidetl grade``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

_BATCH_SIZE = {"cpu": 16, "cuda": 64}

SUMMARY = (
    "Grade slides with an exported model: a line each for people on stderr, one of JSON on stdout (unless "
    "that is a terminal), and a table of all in DIR/results.csv. Exit code 1 when any slide failed, after "
    "all the others are done."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "model", metavar="MODEL.pt", type=Path, help="file that 'slidetl export' wrote; it is run"
    )
    parser.add_argument(
        "slides",
        metavar="SLIDE",
        type=Path,
        nargs="+",
        help="slides in any supported format, folders of them, or patterns such as 'study/*.svs'",
    )
    # SUPPRESS, here and below: else the help of an option without a default says "(default: None)".
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=argparse.SUPPRESS,
        help="write results.csv here, and for each slide a map (PNG) and the result (JSON)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write a page for each slide into DIR too (HTML that needs nothing else), a map that QuPath "
        "reads (GeoJSON), and index.html over all slides",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out slides whose results by this model are in DIR already",
    )
    parser.add_argument(
        "--mpp-override",
        metavar="UM",
        type=float,
        default=argparse.SUPPRESS,
        help="micrometres per level-0 pixel, instead of the metadata's",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="grade slides too that have too little tissue or are unlike those of the training",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="vouch for a model file that was made elsewhere: it is a program. Its hash is recorded",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one"
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="slides graded at a time")
    parser.add_argument(
        "--batch-size",
        metavar="TILES",
        type=int,
        default=argparse.SUPPRESS,
        help=f"tiles per pass; without it {_BATCH_SIZE['cpu']} on a CPU, where more cost memory and gain "
        f"nothing, else {_BATCH_SIZE['cuda']}",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print tiles per second with everything on, and of the network alone",
    )


def run(options: argparse.Namespace) -> int:
    """Grades every slide; a bad one costs itself alone."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from slidetl.errors import UsageError
    from slidetl.grading.batch import (
        GRADED,
        GradeOptions,
        describe,
        find_slides,
        grade_slides,
        output_names,
        read_finished,
        write_index_page,
        write_results,
    )
    from slidetl.library.trust import trust
    from slidetl.publish.model_file import load_model

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = getattr(options, "batch_size", _BATCH_SIZE["cpu" if device == "cpu" else "cuda"])
    for flag, value in (("--batch-size", batch_size), ("--jobs", options.jobs)):
        if value < 1:
            raise UsageError(f"{flag} must be at least 1, not {value}")
    output: Path | None = getattr(options, "output", None)
    if options.resume and output is None:
        raise UsageError("--resume needs --output, the folder with the results so far")
    if options.report and output is None:
        raise UsageError("--report needs --output, the folder for the pages")
    model = load_model(options.model, device, options.trust)
    if options.trust:
        trust(model.sha256, options.model.name)
    slides = find_slides(options.slides)
    rows = []
    if output is not None and options.resume:
        finished_rows = read_finished(output, output_names(slides), model.sha256, options.report)
        rows = list(finished_rows.values())
        print(f"slidetl: {len(rows)} of {len(slides)} slides are graded already", file=sys.stderr)
    finished = {row.slide for row in rows}
    chosen = GradeOptions(
        model=options.model,
        trusted=options.trust,
        device=device,
        output=output,
        mpp_override=getattr(options, "mpp_override", None),
        batch_size=batch_size,
        threads=max(1, len(os.sched_getaffinity(0)) // options.jobs),
        force=options.force,
        profile=options.profile,
        report=options.report,
    )
    failed = 0
    console = Console(stderr=True)
    for row in track(
        grade_slides(model, slides, chosen, options.jobs, finished),
        "slides",
        total=len(slides) - len(finished),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        rows.append(row)
        if output is not None:
            write_results(output / "results.csv", rows, len(model.card.grades))
        if row.status != GRADED:
            failed += 1
            print(f"slidetl: failed: {row.reason}", file=sys.stderr, flush=True)
            continue
        if not sys.stdout.isatty():
            print(json.dumps(row.result), flush=True)
        print(f"slidetl: {describe(row, model.card)}", file=sys.stderr, flush=True)
    if output is not None and options.report:
        write_index_page(output, rows, output_names(slides), model)
    if failed:
        print(f"slidetl: {failed} of {len(slides)} slides failed", file=sys.stderr)
    return 1 if failed else 0
