"""``slidetl compare``: arms against each other, on the same splits."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

SUMMARY = "compare arms (scratch, transfer, classical) by cross-validation over patients"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    # SUPPRESS: else the help of an option without a default says "(default: None)".
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        metavar="YAML",
        help="what is compared; configs/compare/fibrosis_quick.yaml and its neighbours come with slidetl",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="for the report, the tables and the units; the same command goes on where it was ended",
    )
    parser.add_argument("--manifest", default=argparse.SUPPRESS, help="instead of the configuration's")
    parser.add_argument(
        "--cache", default=argparse.SUPPRESS, metavar="FOLDER", help="instead of the configuration's"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="trainings at a time on this machine, which share its cores",
    )
    parser.add_argument(
        "--scheduler",
        default=argparse.SUPPRESS,
        metavar="ADDRESS",
        help="tcp://HOST:PORT of a Dask scheduler, whose workers train instead of this machine",
    )
    parser.add_argument(
        "--only", nargs="+", default=argparse.SUPPRESS, metavar="ARM", help="arms to compute; else all"
    )
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="compute nothing, write the report of what is there, and stop",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="plan, audit the splits, say what would be computed, and stop"
    )


def run(options: argparse.Namespace) -> int:
    """Compares; 1 where a unit failed."""
    import sys
    from dataclasses import replace

    from slidetl.cli.shipped import find_config
    from slidetl.compare.config import read_comparison
    from slidetl.compare.progress import UnitProgress
    from slidetl.compare.report.page import describe
    from slidetl.compare.run import Options, plan_comparison, report_comparison, run_comparison

    given = {name: getattr(options, name) for name in ("manifest", "cache") if name in options}
    comparison = replace(read_comparison(find_config(options.config)), **given)
    plan = plan_comparison(comparison, getattr(options, "only", ()))
    if options.dry_run:
        arms = len({unit.arm for unit in plan.units})
        print(f"{len(plan.study.rows)} slides, {len(plan.folds)} folds, {arms} arms, {len(plan.units)} units")
        return 0
    if options.report_only:
        result = report_comparison(plan, options.output)
        print(f"{describe(result)}\nwritten to {options.output}, report.html first")
        return 0
    scheduler = getattr(options, "scheduler", "")
    with UnitProgress(options.jobs) as progress:
        result, failed = run_comparison(
            plan, options.output, Options(options.jobs, scheduler, progress.start, progress.done)
        )
    print(f"{describe(result)}\nwritten to {options.output}, report.html first")
    for label, reason in failed.items():
        print(f"failed: {label}: {reason}", file=sys.stderr)
    return 1 if failed else 0
