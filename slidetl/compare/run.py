"""Runs a comparison: plans and audits it, computes the missing jobs, and aggregates all results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slidetl.compare.aggregate import ComparisonResult, combine
from slidetl.compare.config import Comparison
from slidetl.compare.plan import Job, plan_and_audit, plan_jobs, read_slides, refuse_seen
from slidetl.compare.pool import Workplace, run_here, run_on_cluster
from slidetl.compare.records import JOBS, SPLITS, JobResult, has_results, read_result
from slidetl.compare.tables import write_tables
from slidetl.data.study import Study
from slidetl.errors import UsageError
from slidetl.evaluation.protocol import Fold, folds_to_json, splits_sha256
from slidetl.files import write_whole
from slidetl.processor import postpone_collection, usable_cores
from slidetl.tiles.lock import slide_lock
from slidetl.version import VERSION

_REGISTRATION = "registration.json"
_LATE_S = 60.0  # a shared file system may keep the absence of a file for as long


@dataclass(frozen=True, eq=False)
class Plan:
    """The jobs of a comparison, on audited folds of a study."""

    comparison: Comparison
    study: Study
    folds: tuple[Fold, ...]
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Options:
    """Options of the computation; none of them changes a result.

    Attributes:
        processes: jobs at a time on this machine.
        scheduler: address of a Dask scheduler; empty to compute on this machine.
        allow: names outside slidetl that the arms may import.
        on_start: called once with the finished jobs and the jobs to be computed.
        on_done: called with each job, the reason of its failure (empty for success), and its result.

    Raises:
        UsageError: ``processes`` is below 1.
    """

    processes: int = 1
    scheduler: str = ""
    allow: tuple[str, ...] = ()
    on_start: Callable[[Sequence[Job], Sequence[Job]], None] = field(default=lambda finished, to_do: None)
    on_done: Callable[[Job, str, JobResult | None], None] = field(default=lambda job, reason, result: None)

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UsageError(f"--jobs must be at least 1, not {self.processes}")


def plan_comparison(comparison: Comparison, only: Sequence[str] = ()) -> Plan:
    """Plans a comparison of all arms, or ``only`` some, and refuses one that leaks or lacks something.

    Raises:
        SlidetlError: the manifest, the cache, the splits or an arm will not do; the message says why.
    """
    study, folds = plan_and_audit(comparison, read_slides(comparison))
    return Plan(comparison, study, folds, plan_jobs(comparison, study, folds, only))


def run_comparison(
    plan: Plan, output: Path, options: Options = Options()
) -> tuple[ComparisonResult, dict[str, str]]:
    """Computes every missing job, aggregates all, and writes report and tables.

    A result is used again if nothing that it depends on has changed; so a killed run resumes. Two runs into
    one folder wait for each other.

    Args:
        plan: of :func:`plan_comparison`.
        output: for the report, the tables and the jobs, as docs/design/compare.md lists them.
        options: of the computation.

    Returns:
        The results of all complete arms, and the reasons of failed jobs, by their labels.

    Raises:
        UsageError: no arm is complete; the message has every reason.
        SlidetlError: as :func:`plan_comparison`.
    """
    output = output.absolute()
    folder = output / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    trained = {job.arm: job.recipe for job in plan.jobs if "fit" in job.recipe}
    if trained:  # imported here: it takes seconds
        with postpone_collection():
            from slidetl.compare.train_arm import check_recipes

        check_recipes(trained, options.allow)
    refuse_seen(plan.comparison, plan.jobs, plan.study, options.allow)
    failed: dict[str, str] = {}
    with slide_lock(folder, "comparison"):
        if not _has_splits(plan, output):  # else they may tell the data behind the tables of an earlier run
            _write_splits(plan, output)
        record_registration(plan.comparison, output)
        found = {job.key: read_result(folder, job) for job in plan.jobs}
        # Two arms of one configuration share a job.
        to_do = list({job.key: job for job in plan.jobs if found[job.key] is None}.values())
        options.on_start([job for job in plan.jobs if found[job.key] is not None], to_do)
        threads = max(1, usable_cores() // options.processes)
        place = Workplace(folder, threads, options.allow, None if options.scheduler else threads)
        done = (
            run_on_cluster(to_do, place, options.scheduler)
            if options.scheduler
            else run_here([(job, place) for job in to_do], options.processes, cards_for(plan))
        )
        for job, reason, result in _outcomes(done if to_do else (), folder):
            if reason:
                failed[job.label] = reason
            found[job.key] = result
            options.on_done(job, reason, result)
        lacking = {job.arm for job in plan.jobs if _is_of_arm(job) and found[job.key] is None}
        if failed and all(job.arm in lacking for job in plan.jobs):
            first = {reason: label for label, reason in reversed(failed.items())}  # each reason once
            raise UsageError(
                f"no arm is complete, since {len(failed)} jobs failed: "
                + "; ".join(f"{label}: {reason}" for reason, label in reversed(first.items()))
            )
        return _aggregate(plan, output, found, failed), failed


def _outcomes(done: Iterable[tuple[Job, str]], folder: Path) -> Iterator[tuple[Job, str, JobResult | None]]:
    """Reads the results of computed jobs; those that are not to be read yet come last, or failed."""
    late = []
    for job, reason in done:
        result = read_result(folder, job)
        if result is None and not reason:
            late.append(job)
        else:
            yield job, reason, result
    deadline = time.monotonic() + _LATE_S
    for job in late:
        while (result := read_result(folder, job)) is None and time.monotonic() < deadline:
            time.sleep(1)
        reason = (
            f"it was computed, but {folder / job.key} cannot be read as a result of slidetl {VERSION}; give "
            "all workers this version and one file system, and run again"
        )
        yield job, "" if result is not None else reason, result


def _is_of_arm(job: Job) -> bool:
    """Returns True for a job of an arm as it is, on all training slides and by the labels."""
    return job.n_slides is None and job.permutation is None


def cards_for(plan: Plan) -> int:
    """Counts the GPUs of this machine, if an arm trains on one; 0 otherwise."""
    trainers = [job.recipe["fit"]["trainer"] for job in plan.jobs if "fit" in job.recipe]
    if all(trainer.get("accelerator") == "cpu" for trainer in trainers):
        return 0
    import torch  # it takes seconds

    return torch.cuda.device_count()


def report_comparison(plan: Plan, output: Path) -> ComparisonResult:
    """Aggregates the finished jobs without computing any; a run may be at work in the same folder.

    Raises:
        UsageError: no arm is complete.
    """
    found = {job.key: read_result(output / JOBS, job) for job in plan.jobs}
    return _aggregate(plan, output, found, {})


def record_registration(comparison: Comparison, output: Path) -> None:
    """Records if the configuration is registered, unless a job or a training has a result already.

    So the record tells the state before the first result; a comparison that is registered later stays
    undeclared.

    Raises:
        UsageError: the registered file is there, but cannot be read; or it lies in the output folder.
    """
    registered, found = comparison.registered, comparison.is_declared  # unreadable: before anything runs
    if registered is not None and Path(registered).resolve().is_relative_to(output.resolve()):
        raise UsageError(
            f"registered: expected a file outside the output folder, not {registered}: the run writes the "
            "SHA-256 there itself; name a file that you commit before the run"
        )
    if not has_results(output / JOBS):
        about = {"sha256": comparison.sha256, "registered": registered, "found": found}
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / _REGISTRATION, json.dumps(about, indent=1) + "\n")


def _was_registered(comparison: Comparison, output: Path) -> bool | None:
    """Reads the record of this configuration and registered file; None if there is none."""
    try:
        about = json.loads((output / _REGISTRATION).read_text(encoding="utf-8"))
        if (about["sha256"], about["registered"]) != (comparison.sha256, comparison.registered):
            return None
        return bool(about["found"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _aggregate(
    plan: Plan, output: Path, found: Mapping[str, JobResult | None], failed: Mapping[str, str]
) -> ComparisonResult:
    """Aggregates results, by the keys of their jobs, and writes tables and report."""
    from slidetl.compare.report.page import write_report  # imported here: it draws

    jobs = [(job, found[job.key]) for job in plan.jobs]
    result = combine(plan.comparison, plan.study, plan.folds, jobs)
    result = replace(result, was_registered=_was_registered(plan.comparison, output))
    _write_splits(plan, output)  # not yet of these tables, should they not be written as a whole
    write_tables(result, output)
    _write_splits(plan, output, are_tables_whole=True)
    write_report(result, output, failed)
    return result


def _has_splits(plan: Plan, output: Path) -> bool:
    """Returns True if the folds of the plan are those on disk."""
    try:
        about = json.loads((output / SPLITS).read_text(encoding="utf-8"))
        return bool(about["folds"] == folds_to_json(plan.folds))
    except (OSError, KeyError, TypeError, ValueError):
        return False


def _write_splits(plan: Plan, output: Path, *, are_tables_whole: bool = False) -> None:
    """Writes the folds, and the data behind the tables once these are there, for the export of a network."""
    study = plan.study
    data = {
        "manifest": str(Path(plan.comparison.manifest).absolute()),
        "spec": study.caches[0].spec.to_dict(),
        "fingerprints": {cache.slide_id: cache.fingerprint for cache in study.caches},
    }
    about = {
        "sha256": splits_sha256(plan.folds),
        "software": f"slidetl {VERSION}",
        **(data if are_tables_whole else {}),
        "folds": folds_to_json(plan.folds),
    }
    write_whole(output / SPLITS, json.dumps(about, indent=1) + "\n")
