"""The whole of ``slidetl compare``: plan, audit, compute what is not there yet, and take it together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import slidetl
from slidetl.compare.aggregate import ComparisonResult, combine
from slidetl.compare.config import Comparison
from slidetl.compare.plan import Unit, plan_and_audit, plan_units, read_slides
from slidetl.compare.pool import run_here, run_on_cluster
from slidetl.compare.records import UnitResult
from slidetl.compare.tables import write_tables
from slidetl.compare.unit import job_of, read_unit
from slidetl.data.study import Study
from slidetl.errors import UsageError
from slidetl.evaluation.protocol import Fold, folds_to_json, splits_sha256
from slidetl.files import write_whole
from slidetl.processor import postpone_collection
from slidetl.tiles.lock import slide_lock


@dataclass(frozen=True, eq=False)
class Plan:
    """The units of a comparison and the study that they need.

    Attributes:
        comparison: as configured.
        study: its slides.
        folds: audited.
        units: all that is to be there in the end.
    """

    comparison: Comparison
    study: Study
    folds: tuple[Fold, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Options:
    """Options of the computation; none of them changes a result.

    Attributes:
        jobs: units at a time on this machine.
        scheduler: address of a Dask scheduler; empty to compute on this machine.
        allow: names outside slidetl that the arms may import.
        on_start: called once with the units that are there already, and those to be computed.
        on_done: called with each unit that was computed, and why it failed; empty if it did not.
    """

    jobs: int = 1
    scheduler: str = ""
    allow: tuple[str, ...] = ()
    on_start: Callable[[Sequence[Unit], Sequence[Unit]], None] = field(default=lambda there, to_do: None)
    on_done: Callable[[Unit, str, UnitResult | None], None] = field(default=lambda unit, reason, result: None)


def plan_comparison(comparison: Comparison, only: Sequence[str] = ()) -> Plan:
    """Plans a comparison, and refuses one that leaks or lacks something.

    Raises:
        SlidetlError: the manifest, the cache, the splits or an arm will not do; the message says why.
    """
    study, folds = plan_and_audit(comparison, read_slides(comparison))
    return Plan(comparison, study, folds, plan_units(comparison, study, folds, only))


def run_comparison(
    plan: Plan, output: Path, options: Options = Options()
) -> tuple[ComparisonResult, dict[str, str]]:
    """Computes every unit that is not there yet, and takes all together.

    What was computed before is used if nothing that it depends on has changed; a run that was killed so goes
    on. Two runs into one folder wait for each other.

    Args:
        plan: of :func:`plan_comparison`.
        output: for the report, the tables and the units, as docs/design/compare.md lists them.
        options: how.

    Returns:
        All figures of the arms that are complete, and why units failed, by their labels.

    Raises:
        UsageError: no arm is complete; every reason stands in the message.
        SlidetlError: as :func:`plan_comparison`.
    """
    output = output.absolute()
    folder = output / "units"
    folder.mkdir(parents=True, exist_ok=True)
    trained = {unit.arm: unit.recipe["fit"] for unit in plan.units if "fit" in unit.recipe}
    if trained:  # imported here: it takes seconds
        with postpone_collection():
            from slidetl.compare.train_arm import check_configs

        check_configs(trained, options.allow)
    failed: dict[str, str] = {}
    with _alone(folder):
        write_splits(plan.folds, output / "splits.json")
        found = {unit.key: read_unit(folder, unit.key) for unit in plan.units}
        # Two arms of one configuration are one unit.
        to_do = list({unit.key: unit for unit in plan.units if found[unit.key] is None}.values())
        options.on_start([unit for unit in plan.units if found[unit.key] is not None], to_do)
        threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
        jobs = [
            job_of(unit, plan.study, plan.comparison.grades, folder, threads, options.allow) for unit in to_do
        ]
        done = run_on_cluster(jobs, options.scheduler) if options.scheduler else run_here(jobs, options.jobs)
        for job, reason in done if jobs else ():
            if reason:
                failed[job.unit.label] = reason
            found[job.unit.key] = read_unit(folder, job.unit.key)
            options.on_done(job.unit, reason, found[job.unit.key])
        if failed and not any(found.values()):
            raise UsageError(
                f"all {len(failed)} units failed, the first for this: {next(iter(failed.values()))}"
            )
        result = _take_together(plan, output, found, failed)
    return result, failed


def report_comparison(plan: Plan, output: Path) -> ComparisonResult:
    """Takes together what is there, and computes nothing; a run may be at work in the same folder.

    Args:
        plan: of :func:`plan_comparison`.
        output: as for :func:`run_comparison`.

    Raises:
        UsageError: no arm is complete.
    """
    found = {unit.key: read_unit(output / "units", unit.key) for unit in plan.units}
    return _take_together(plan, output, found, {})


def _take_together(
    plan: Plan, output: Path, found: Mapping[str, UnitResult | None], failed: Mapping[str, str]
) -> ComparisonResult:
    """Writes tables and report of the units, by their keys."""
    from slidetl.compare.report.page import write_report  # imported here: it draws

    units = [(unit, found[unit.key]) for unit in plan.units]
    result = combine(plan.comparison, plan.study, plan.folds, units)
    write_tables(result, output)
    write_report(result, output, failed)
    return result


def write_splits(folds: Sequence[Fold], path: Path) -> None:
    """Writes who is where, with the hash of it."""
    about = {
        "sha256": splits_sha256(folds),
        "software": f"slidetl {slidetl.__version__}",
        "folds": folds_to_json(folds),
    }
    write_whole(path, json.dumps(about, indent=1) + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with slide_lock(folder, "comparison"):
        yield
