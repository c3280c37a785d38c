"""``slidetl compare``."""

from __future__ import annotations

import sys
from pathlib import Path


def compare(
    *,
    config: Path,
    output: Path,
    manifest: str | None = None,
    cache: str | None = None,
    jobs: int | None = None,
    scheduler: str = "",
    only: tuple[str, ...] = (),
    report_only: bool = False,
    dry_run: bool = False,
    allow: tuple[str, ...] = (),
) -> int:
    """Compares arms (scratch, transfer, classical) by cross-validation over patients.

    Exit code 1 if any job failed. The same command resumes an interrupted run.

    Args:
        config: the comparison (YAML); configs/compare/fibrosis_quick.yaml and others
            come with slidetl.
        output: folder for the report, the tables and the jobs.
        manifest: a manifest (CSV), instead of the configuration's.
        cache: folder of 'slidetl tile', instead of the configuration's.
        jobs: trainings at a time on this machine; they share its cores and GPUs. By default as many as it
            has GPUs, if an arm trains on one, or else cores.
        scheduler: address of a Dask scheduler, tcp://HOST:PORT; its workers train instead of this machine.
        only: arms to compute, instead of all.
        report_only: compute nothing, write the report of the finished jobs.
        dry_run: plan, audit the splits, and print the number of jobs and the SHA-256 of the configuration (to
            register before the run), without computing any job.
        allow: package or class outside slidetl, for the configuration to import, which runs its code.
    """
    from dataclasses import replace

    from slidetl.cli.shipped import find_config
    from slidetl.compare.config import read_comparison
    from slidetl.compare.progress import JobProgress
    from slidetl.compare.report.page import describe
    from slidetl.compare.run import Options, cards_for, plan_comparison, report_comparison, run_comparison
    from slidetl.errors import refuse_unused
    from slidetl.processor import usable_cores
    from slidetl.text import one_line

    if dry_run:
        refuse_unused(compare, {"report_only": report_only}, "with --dry-run")
    configured = read_comparison(find_config(config))
    comparison = replace(
        configured, manifest=manifest or configured.manifest, cache=cache or configured.cache
    )
    plan = plan_comparison(comparison, only)
    if dry_run:
        arms = len({job.arm for job in plan.jobs})
        print(f"{len(plan.study.rows)} slides, {len(plan.folds)} folds, {arms} arms, {len(plan.jobs)} jobs")
        state = f"the hash is in {comparison.registered}" if comparison.is_declared else "not declared"
        print(f"configuration {comparison.sha256}: {state}")
        return 0
    if report_only:
        result = report_comparison(plan, output)
        print(f"{describe(result)}\nwritten to {output}, report.html first")
        return 0
    if jobs is None:
        jobs = (0 if scheduler else cards_for(plan)) or usable_cores()
    with JobProgress(jobs) as progress:
        result, failed = run_comparison(
            plan, output, Options(jobs, scheduler, allow, progress.start, progress.done)
        )
    print(f"{describe(result)}\nwritten to {output}, report.html first")
    for label, reason in failed.items():
        print(one_line(f"failed: {label}: {reason}"), file=sys.stderr)
    return 1 if failed else 0
