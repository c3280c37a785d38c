"""``slidetl synth``: slides whose grade is known, to try everything else on."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from slidetl.cli.progress import Progress

SUMMARY = "draw synthetic lung slides of known grade, with their manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``slidetl synth``."""
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to write slides/, truth/ and manifest.csv into"
    )
    parser.add_argument("--slides", type=int, default=60, help="number of slides")
    parser.add_argument(
        "--patients",
        type=int,
        default=argparse.SUPPRESS,
        help="number of patients, at most as many as slides (default: 48, or as many as slides)",
    )
    parser.add_argument(
        "--sites",
        type=int,
        default=argparse.SUPPRESS,
        help="number of sites, each with its stain and scanner (default: 3, or as many as patients)",
    )
    parser.add_argument("--size", type=int, default=4096, help="width and height of a slide, pixels")
    parser.add_argument(
        "--mpp", type=float, default=0.5, help="spacing of the finest level, micrometres per pixel"
    )
    parser.add_argument("--stain", default="he", help="he, trichrome or sirius")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument(
        "--share-per-grade",
        type=float,
        default=0.12,
        help="fibrotic share of the section that a grade adds, from 0.01 to 0.12; the less, the harder",
    )
    parser.add_argument("--reader-sd", type=float, default=0.4, help="standard deviation of a reader, grades")
    parser.add_argument(
        "--label",
        default="truth",
        help="grade in the manifest: truth (as drawn), or consensus (what the two noisy readers agree on)",
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that draw"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier cohort in OUT")


def run(options: argparse.Namespace) -> int:
    """Writes the cohort, then prints how far colour and area alone get."""
    from slidetl.synthetic.cohort import SyntheticCohort, write_cohort

    patients = getattr(options, "patients", min(48, options.slides))
    cohort = SyntheticCohort(
        slides=options.slides,
        patients=patients,
        sites=getattr(options, "sites", min(3, patients)),
        size_px=options.size,
        mpp=options.mpp,
        stain=options.stain,
        seed=options.seed,
        share_per_grade=options.share_per_grade,
        reader_sd=options.reader_sd,
        label=options.label,
    )
    with Progress("drawing", options.slides) as progress:

        def report(done: int, total: int) -> None:
            progress.advance()
            if done * 10 // total > (done - 1) * 10 // total:
                progress.show("drawn")

        colours = write_cohort(
            cohort, options.out, workers=options.workers, overwrite=options.overwrite, progress=report
        )
    print(f"{options.slides} slides of {patients} patients: {options.out / 'manifest.csv'}")
    if options.slides >= 30 and patients >= 10:
        from slidetl.evaluation.baselines import colour_baseline

        planned = cohort.plan()
        baseline = colour_baseline(
            [[*colour.mean_rgb, colour.stained_share] for colour in colours],
            [entry.grade for entry in planned],
            [entry.patient_id for entry in planned],
            seed=options.seed,
        )
        print(
            f"mean colour and stained area alone: {baseline.accuracy:.0%} accuracy (the best of three "
            f"classifiers, {baseline.name}, 5 folds over patients; it should be at most 40 %)"
        )
    return 0
