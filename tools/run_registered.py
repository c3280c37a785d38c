"""Runs the registered experiment on slides built from labelled tiles, and writes its page.

    python tools/run_registered.py --tiles TILES --external-tiles OTHER --output runs/collage --page PAGE.md

For each redraw it builds the slides (tools/make_collage.py), tiles and embeds them, computes the arms of
configs/compare/collage.yaml, and combines the redraws. It refuses a configuration with a hash that is not
registered (docs/evidence/registered.md). The same command resumes a run; --hours ends it between two jobs.
Results of trained arms are kept under --results too, without embeddings: a machine that builds the same
slides computes none of them again, and anyone can recompute the statistics.
Jobs are computed in the order of --stages: arms without training (frozen), the primary pair on all training
slides (primary), the other arms on all of them (others), the primary pair on fewer (sizes); within a stage
redraw by redraw. The report of each redraw is written after the page.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import os
import platform
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from slidetl.cli import main as slidetl
from slidetl.cli.shipped import find_config
from slidetl.compare.config import Comparison, read_comparison
from slidetl.compare.plan import Job
from slidetl.compare.pool import Workplace, run_here
from slidetl.compare.records import JobResult, read_result, result_from, values_of, write_result
from slidetl.compare.run import Plan, plan_comparison, record_registration, report_comparison
from slidetl.errors import SlidetlError, UsageError
from slidetl.evaluation.bootstrap import Metric, resampled_metric
from slidetl.evaluation.calibration import recalibrate, with_temperature
from slidetl.evaluation.comparison import PatientResults, patient_results
from slidetl.evaluation.metrics import accuracy, difference, qwk
from slidetl.evaluation.redraws import RedrawnEffect, combine_redraws
from slidetl.files import write_whole
from slidetl.training.predictions import SlidePrediction
from slidetl.version import VERSION

BACKBONE = "tf_efficientnet_lite0"
TARGET = "AC"
FIRST, REDRAWS = 1, 5  # as registered
TILING = ["--mpp", "1.75", "--tile-size", "64", "--min-tissue", "0"]
STAGES = ("frozen", "primary", "others", "sizes")
ABOUT = """
Slides are mosaics of 40 real H&E tiles of colorectal tissue in five classes. The grade 0 to 4 is the share
of adenocarcinoma, 0, 10, 20, 30 and 40 %; the rest is a Dirichlet draw. Networks see the grade of a slide,
never the class of a tile. **It shows transfer to real texture from slide-level labels, not patients**:
their differences, readers and scanners are not in it, and which tiles are of one patient is not known.

{redraws} of {registered} redraws of everything (tiles, slides, initial weights), each with {train} training
slides, {home} test slides from other tiles, and {external} external slides from tiles of another source.
Numbers are means over redraws with 95 % intervals, redraw as a random effect
([why](../design/statistics.md)), cut at the range of the metric, which t does not know; the error of a
redraw is over its slides. The redraws share one pool of tiles, so the intervals are about other draws from
it. [What was registered](registered.md), and when; the hashes of the configurations {declared}.

Redraw 0 is not among them: with an earlier configuration its warm network died (QWK .00, one grade for all
slides; scratch .79, a difference of -.79), and the cause was looked for on its slides
([the account](registered.md)).
"""
TRIVIAL = """
Trivial are prior (a constant grade has a QWK of 0), colour-area, and random-ridge (frozen random weights).
Recalibrated: by an ordinal regression on the grades of four fifths of the external slides; it turns a score
round that falls with the grade.
"""
_EPOCHS = "trainer.max_epochs"
N_DRAWS = 2000  # resamples of the patients of a redraw, for the error of its effect

Key = tuple[str, int | None]  # an arm, and its number of training slides; None for all of them
Effect = tuple[float, float]  # an estimate and its standard error over patients


@dataclass(frozen=True, eq=False)
class Redrawn:
    """The results of one redraw, by arm and number of training slides.

    Attributes:
        home: test slides of the source of the training slides.
        external: external slides, as they come.
        again: external slides, recalibrated.
        jobs: with choices and curves.
    """

    home: dict[Key, PatientResults]
    external: dict[Key, PatientResults]
    again: dict[Key, PatientResults]
    jobs: dict[Key, JobResult]


def prepare(home: Path, external: Path, folder: Path, collage: Sequence[str]) -> None:
    """Builds, tiles and embeds the slides of a redraw, as far as they are not there.

    Raises:
        UsageError: a step failed; its own message is on stderr.
    """

    def step(code: int, what: str) -> None:
        if code:
            raise UsageError(f"{folder.name}: {what} failed; the lines above say why")

    if not (folder / "manifest.csv").exists():  # it is written last
        shutil.rmtree(folder, ignore_errors=True)
        words = [str(home), str(folder), "--external", str(external), "--redraw", str(number_of(folder))]
        collages = importlib.import_module(f"{__package__}.make_collage" if __package__ else "make_collage")
        step(collages.main([*words, "--target", TARGET, *collage]), "make_collage")
    cache = folder / "cache"
    step(slidetl(["tile", str(folder / "manifest.csv"), "--cache", str(cache), *TILING]), "slidetl tile")
    weights = folder.parent / "random.safetensors"
    if not weights.exists():
        _write_random_weights(weights)
    for words in embed(cache, weights):
        step(slidetl(words), "slidetl embed")


def embed(cache: Path, random_weights: Path) -> list[list[str]]:
    """Lists the commands to store the features that the frozen arms read."""
    common = ["embed", str(cache), "--backbone", BACKBONE, "--precision", "float32"]
    sources = {"lite0": "imagenet", "lite0-random": str(random_weights)}
    return [[*common, "--pretrained", source, "--name", name] for name, source in sources.items()]


def number_of(folder: Path) -> int:
    """Returns the number of a redraw from the name of its folder."""
    return int(folder.name.removeprefix("redraw-"))


def comparisons_of(configured: Comparison, folders: Sequence[Path]) -> list[Comparison]:
    """Configures a redraw for each folder: its slides, and its seed of folds, initial weights and bags."""
    return [
        replace(
            configured,
            manifest=str(folder / "manifest.csv"),
            cache=str(folder / "cache"),
            protocol=replace(configured.protocol, seed=configured.protocol.seed + number_of(folder)),
        )
        for folder in folders
    ]


def restore(plan: Plan, folder: Path, results: Path) -> None:
    """Puts the results that were kept of the jobs of a redraw beside those computed here."""
    jobs = folder / "compare" / "jobs"
    for job in plan.jobs:
        kept = results / f"{job.key}.json.gz"
        if kept.exists() and read_result(jobs, job) is None:
            jobs.mkdir(parents=True, exist_ok=True)
            result = result_from(json.loads(gzip.decompress(kept.read_bytes())))
            write_result(job, result, jobs, jobs / job.key)


def keep(plan: Plan, folder: Path, results: Path) -> None:
    """Keeps the results of the trained arms of a redraw."""
    for job in plan.jobs:
        found = read_result(folder / "compare" / "jobs", job) if "fit" in job.recipe else None
        kept = results / f"{job.key}.json.gz"
        if found is not None and not kept.exists():
            results.mkdir(parents=True, exist_ok=True)
            write_whole(kept, gzip.compress(json.dumps(values_of(found)).encode(), mtime=0))


def in_order(plans: Sequence[Plan], stages: Sequence[str]) -> list[tuple[int, Job]]:
    """Lists the jobs of some stages with the number of their redraw, in the order of computation."""
    listed = []
    for stage in stages:
        for redraw, plan in enumerate(plans):
            listed += [(redraw, job) for job in plan.jobs if stage_of(plan.comparison, job) == stage]
    return listed


def stage_of(comparison: Comparison, job: Job) -> str:
    """Returns the stage of a job."""
    if "fit" not in job.recipe:
        return "frozen"
    if job.n_slides is not None:
        return "sizes"
    return "primary" if job.arm in (comparison.primary.arm, comparison.primary.against) else "others"


def compute(
    plans: Sequence[Plan], folders: Sequence[Path], stages: Sequence[str], deadline: float, processes: int
) -> dict[str, str]:
    """Computes the missing jobs, starts none after the deadline, and returns the reasons of failed ones."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    places = [Workplace(folder / "compare" / "jobs", threads) for folder in folders]
    to_do = [
        (redraw, job)
        for redraw, job in in_order(plans, stages)
        if read_result(places[redraw].folder, job) is None
    ]
    print(f"{len(to_do)} jobs to compute", file=sys.stderr)
    labels = {job.key: f"redraw {number_of(folders[redraw])}: {job.label}" for redraw, job in to_do}

    def in_time() -> Iterator[tuple[Job, Workplace]]:
        while to_do and time.monotonic() < deadline:
            redraw, job = to_do.pop(0)
            places[redraw].folder.mkdir(parents=True, exist_ok=True)
            yield job, places[redraw]

    failed = {}
    for done, (job, reason) in enumerate(run_here(in_time(), processes), 1):
        print(f"[{done}] {labels[job.key]} {reason or 'done'}", file=sys.stderr)
        if reason:
            failed[labels[job.key]] = reason
    if to_do:
        print(f"the time is up: {len(to_do)} jobs are left; the same command resumes", file=sys.stderr)
    return failed


def redrawn(plan: Plan, folder: Path) -> Redrawn:
    """Reads the finished jobs of a redraw; an arm with an unfinished job is left out."""
    one = Redrawn({}, {}, {}, {})
    for job in plan.jobs:  # of a single fold: one job for each arm and size
        found = read_result(folder / "compare" / "jobs", job)
        if found is None:
            continue
        key, outside = (job.arm, job.n_slides), set(job.fold.external)
        one.jobs[key] = found
        home = [row for row in found.predictions if row.slide_id not in outside]
        one.home[key] = _results(home, found.temperature)
        away = _results([row for row in found.predictions if row.slide_id in outside], found.temperature)
        one.external[key] = away
        again = recalibrate(away.true, away.probabilities[0], away.patients)
        one.again[key] = patient_results(away.true, again, away.patients, "slide")
    return one


def _results(rows: Sequence[SlidePrediction], temperature: float) -> PatientResults:
    calibrated = with_temperature([row.probabilities for row in rows], temperature)
    true = [row.grade for row in rows if row.grade is not None]  # a comparison has graded slides only
    return patient_results(true, calibrated, [row.patient_id for row in rows], "slide")


def metric_of(results: PatientResults, name: str) -> Metric:
    """Returns QWK, or accuracy, of the results of a single model."""
    n_grades = results.probabilities.shape[2]
    if name == "qwk":
        return partial(qwk, results.true, results.predicted[0], n_grades)
    return partial(accuracy, results.true, results.predicted[0])


def effect(results: PatientResults, name: str, against: PatientResults | None = None) -> Effect:
    """Estimates a metric, or its paired difference from another arm, with its error over patients."""
    metric = metric_of(results, name)
    if against is not None:
        metric = difference(metric, metric_of(against, name))
    drawn = resampled_metric(metric, results.patients, n_draws=N_DRAWS)
    return float(metric(np.ones((1, len(results.true))))[0]), float(np.nanstd(drawn, ddof=1))


def combined(effects: Sequence[Effect]) -> RedrawnEffect | None:
    """Combines the effects of redraws; None for fewer than two, and if all are one constant.

    If an arm gives one grade to all slides of a redraw, that redraw has no error: then all count the same,
    with the mean of the other errors.
    """
    values, errors = np.array(effects).reshape(-1, 2).T
    if len(values) < 2 or not np.isfinite([values, errors]).all() or not errors.any():
        return None
    return combine_redraws(
        values, errors if errors.all() else np.full(len(errors), errors[errors > 0].mean())
    )


def as_text(effects: Sequence[Effect], form: str = ".2f", least: float = -1.0, most: float = 1.0) -> str:
    """Formats the mean over redraws with its interval, cut at the range of the metric; by default QWK's."""
    if not effects:
        return "not run"
    found = combined(effects)
    if found is None:
        return f"{np.mean([estimate for estimate, _ in effects]):{form}}"
    low, high = max(found.interval.low, least), min(found.interval.high, most)
    return f"{found.interval.estimate:{form}} [{low:{form}}, {high:{form}}]"


def as_difference(effects: Sequence[Effect]) -> str:
    """Formats a mean difference of QWK."""
    return as_text(effects, "+.2f", -2.0, 2.0)


def effects_of(
    redraws: Sequence[Redrawn], part: str, key: Key, name: str = "qwk", against: Key | None = None
) -> list[Effect]:
    """Lists the effect of each redraw that has the arm, and the arm it is compared with."""
    found = []
    for one in redraws:
        results: Mapping[Key, PatientResults] = getattr(one, part)
        if key in results and (against is None or against in results):
            found.append(effect(results[key], name, None if against is None else results[against]))
    return found


def cell(
    redraws: Sequence[Redrawn], part: str, key: Key, name: str = "qwk", against: Key | None = None
) -> str:
    """Formats the mean of an arm's effects over redraws, with their number if some have none."""
    effects = effects_of(redraws, part, key, name, against)
    if against is not None:
        text = as_difference(effects)
    else:
        text = as_text(effects, least=0.0 if name == "accuracy" else -1.0)
    return f"{text} ({len(effects)} of {len(redraws)})" if 0 < len(effects) < len(redraws) else text


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)


def write_page(redraws: Sequence[Redrawn], plans: Sequence[Plan], command: str) -> str:
    """Writes the page of the experiment: what was run, what it shows, and what was not run."""
    comparison = plans[0].comparison
    primary, arms = comparison.primary, list(comparison.arms)
    trained = [name for name in arms if comparison.arms[name].fit is not None]
    n_train = len(plans[0].folds[0].train)
    n_home, n_external = len(plans[0].folds[0].test), len(plans[0].folds[0].external)
    complete = {name: sum((name, None) in one.home for one in redraws) for name in arms}
    missing = [name for name in trained if complete[name] < REDRAWS]
    missing += [
        f"{name} on {size} slides"
        for name in comparison.sizes.arms
        for size in comparison.sizes.slides
        if name in trained and sum((name, size) in one.home for one in redraws) < REDRAWS
    ]
    gaps = effects_of(redraws, "home", (primary.arm, None), against=(primary.against, None))

    declared = all(plan.comparison.is_declared for plan in plans)
    about = ABOUT.format(
        redraws=len(plans),
        registered=REDRAWS,
        train=n_train,
        home=n_home,
        external=n_external,
        declared="are there" if declared else "are NOT there",
    )
    parts = [
        "# Real texture, slide-level labels, redrawn",
        *about.strip().split("\n\n"),
        "## The primary comparison",
    ]
    title = f"QWK, best-tuned {primary.arm} minus best-tuned {primary.against}, at {n_train} slides: "
    found = combined(gaps)
    state = "" if len(gaps) == REDRAWS else f"{len(gaps)} of {REDRAWS} redraws, so not yet the answer: "
    if not gaps:
        parts.append(f"{title}**not run yet** (0 of {REDRAWS} redraws).")
    elif found is None:
        why = "One redraw has no" if len(gaps) == 1 else "Without any error over slides there is no"
        parts.append(f"{title}{state}{as_difference(gaps)}. {why} interval over redraws.")
    else:
        spread = f"p = {found.p:.3f}; between redraws, a standard deviation of {found.between:.2f}."
        parts.append(f"{title}{state}**{as_difference(gaps)}**, {spread}")
    if gaps:
        pair = [(name, None) for name in (primary.arm, primary.against)]
        rows = [
            [number, *(f"{effect(one.home[key], 'qwk')[0]:.2f}" for key in pair), f"{gap:+.2f} ({error:.2f})"]
            for number, one in enumerate(redraws, FIRST)
            if all(key in one.home for key in pair)
            for gap, error in [effect(one.home[pair[0]], "qwk", one.home[pair[1]])]
        ]
        columns = ["redraw", primary.arm, primary.against, "difference (standard error over slides)"]
        parts.append(markdown(columns, rows))
        n_longest, n_chosen = _longest(redraws, comparison)
        if 2 * n_longest > n_chosen:
            parts.append(
                f"In {n_longest} of {n_chosen} redraws the inner folds chose the longest schedule for "
                f"{primary.against}: it may not be at its plateau, and the difference is then an upper bound "
                "(as registered)."
            )
    if missing:
        state = (
            "Not run in every redraw" if any(map(complete.get, trained)) else "No trained arm has been run"
        )
        parts.append(f"**{state}: {', '.join(missing)}.** This command runs and resumes them:")
        parts.append(f"```console\n$ {command}\n```")
    rows = [
        [
            name,
            f"{complete[name]} of {REDRAWS}",
            cell(redraws, "home", (name, None)),
            cell(redraws, "home", (name, None), "accuracy"),
            *(cell(redraws, part, (name, None)) for part in ("external", "again")),
        ]
        for name in arms
    ]
    parts += [
        f"## All arms, {n_train} training slides",
        markdown(
            [
                *("arm", "redraws", f"QWK, {n_home} test slides", "accuracy"),
                *(f"QWK, {n_external} external", "external, recalibrated"),
            ],
            rows,
        ),
        TRIVIAL,
    ]
    sized = comparison.sizes
    rows = [
        [
            name,
            *(cell(redraws, "home", (name, size)) for size in (*sized.slides, None)),
        ]
        for name in sized.arms
    ]
    rows.append(
        [
            f"{primary.arm} minus {primary.against}",
            *(
                cell(redraws, "home", (primary.arm, size), against=(primary.against, size))
                for size in (*sized.slides, None)
            ),
        ]
    )
    parts += [
        "## QWK by the number of training slides",
        markdown(["arm", *map(str, sized.slides), str(n_train)], rows),
        "On fewer slides trained arms have a fixed rate and as many steps; ridges choose their penalty. "
        "(n of N): cells of fewer redraws than the page has; they differ from others in more than the arm.",
    ]
    frozen = [name for name in arms if name not in trained]
    reference = next((name for name in frozen if comparison.arms[name].classical is not None), None)
    if reference is not None:
        rows = [
            [
                name,
                *(
                    cell(redraws, part, (name, None), against=(reference, None))
                    for part in ("home", "external", "again")
                ),
            ]
            for name in arms
            if name != reference
        ]
        parts += [
            f"## QWK minus that of {reference}, paired",
            markdown(["arm", "test", "external", "external, recalibrated"], rows),
        ]
    parts += ["## Speed", *_speed(redraws, comparison)]
    seconds = dict.fromkeys(arms, 0.0)
    for one in redraws:
        for (name, _), job in one.jobs.items():
            seconds[name] += job.seconds
    spent = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value)
    parts += [
        "## How it was run",
        f"slidetl {VERSION}, Python {platform.python_version()}, {os.cpu_count()} cores. "
        f"Configuration of the first redraw: {comparison.sha256}. Seconds of jobs, without building, tiling "
        f"and embedding: {spent}.",
        "The pictures are not here, since their licence is not stated.",
    ]
    plain = ("#", "|", "`")  # not to be wrapped
    wrapped = [
        part if part.startswith(plain) else textwrap.fill(part.strip(), 120, break_on_hyphens=False)
        for part in parts
    ]
    return "\n\n".join(wrapped) + "\n"


def _speed(redraws: Sequence[Redrawn], comparison: Comparison) -> list[str]:
    """Tells the QWK of each whole schedule in the inner folds, its best rate, and its seconds."""
    primary = comparison.primary
    points: dict[tuple[str, int], dict[int, list[tuple[float, float]]]] = {}
    for one in redraws:
        for (arm, n_slides), found in one.jobs.items():
            if n_slides is None:
                ends: dict[tuple[int, str], tuple[int, float, float]] = {}
                for point in found.curves:
                    if point.part != "test":
                        ends[point.trial, point.part] = (point.epoch, point.qwk, point.seconds)
                for (trial, _), (epoch, value, seconds) in ends.items():
                    points.setdefault((arm, epoch), {}).setdefault(trial, []).append((value, seconds))
    best = {}
    for key, trials in points.items():
        means = [np.mean(values, axis=0) for values in trials.values()]
        if defined := [pair for pair in means if np.isfinite(pair[0])]:
            best[key] = max(defined, key=lambda pair: float(pair[0]))
    of_scratch = [pair[0] for (name, _), pair in best.items() if name == primary.against]
    if not of_scratch or not any(name == primary.arm for name, _ in best):
        return ["Not run: speed is that of trained arms."]
    goal = max(of_scratch)
    rows = []
    for name in dict.fromkeys(name for name, _ in best):
        mine = sorted((epoch, pair) for (arm, epoch), pair in best.items() if arm == name)
        first = next((f"{epoch} epochs, {pair[1]:.0f} s" for epoch, pair in mine if pair[0] >= goal), "never")
        shown = ", ".join(f"{pair[0]:.2f} after {epoch} ({pair[1]:.0f} s)" for epoch, pair in mine)
        rows.append([name, shown, first])
    columns = ["arm", "QWK of whole schedules in the inner folds (seconds of one)", f"reaches {goal:.2f}"]
    about = (
        f"{goal:.2f} is the best of {primary.against}. The better rate; means over inner folds and redraws."
    )
    return [markdown(columns, rows), about, _choices(redraws)]


def _choices(redraws: Sequence[Redrawn]) -> str:
    """Counts the choices of the inner folds: an arm that chose the longest may not be at its plateau."""
    chosen: dict[str, Counter[str]] = {}
    for one in redraws:
        for (arm, n_slides), found in one.jobs.items():
            if n_slides is None and found.chosen is not None:
                values = [f"{name.split('.')[-1]} {value}" for name, value in found.chosen.items()]
                chosen.setdefault(arm, Counter())[", ".join(values)] += 1
    lines = [
        f"{arm}: " + "; ".join(f"{choice} ({count} times)" for choice, count in counts.most_common())
        for arm, counts in chosen.items()
    ]
    return "Chosen in the inner folds. " + ". ".join(lines) + "."


def _longest(redraws: Sequence[Redrawn], comparison: Comparison) -> tuple[int, int]:
    """Counts the redraws that chose the longest schedule for the reference, and those that chose any."""
    name = comparison.primary.against
    offered = comparison.arms[name].choices.get(_EPOCHS, ())
    jobs = [one.jobs[name, None] for one in redraws if (name, None) in one.jobs]
    chosen = [found.chosen[_EPOCHS] for found in jobs if found.chosen and _EPOCHS in found.chosen]
    return sum(epochs == max(offered) for epochs in chosen), len(chosen)


def _write_random_weights(path: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save

    torch.manual_seed(0)
    network = timm.create_model(BACKBONE, pretrained=False, num_classes=0)
    write_whole(path, save({name: value.contiguous() for name, value in network.state_dict().items()}))


def main(arguments: Sequence[str] | None = None, collage: Sequence[str] = ()) -> int:
    """Runs the experiment; ``collage`` are further options of make_collage, for a smaller one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiles", type=Path, required=True, help="folder of tiles, CLASS/*.jpg or *.png")
    parser.add_argument("--external-tiles", type=Path, required=True, help="tiles of another source")
    parser.add_argument("--output", type=Path, required=True, help="folder for slides, caches and jobs")
    parser.add_argument("--page", type=Path, required=True, help="Markdown to write")
    config = Path("configs/compare/collage.yaml")
    parser.add_argument("--config", type=Path, default=config, help="a comparison (default: %(default)s)")
    parser.add_argument(
        "--redraws", type=int, metavar="N", default=REDRAWS, help="redraws to run (default: %(default)s)"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="jobs to compute (default: all)"
    )
    results = Path("docs/evidence/collage")
    about = "results of trained arms: read from there, and kept there (default: %(default)s)"
    parser.add_argument("--results", type=Path, default=results, metavar="FOLDER", help=about)
    about = "start no job after so many hours (default: %(default)s)"
    parser.add_argument("--hours", type=float, default=8.0, metavar="X", help=about)
    about = "jobs at a time; they share the cores (default: %(default)s)"
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help=about)
    given = parser.parse_args(arguments)
    if min(given.redraws, given.jobs) < 1:
        parser.error("--redraws and --jobs must be at least 1")
    deadline = time.monotonic() + given.hours * 3600
    try:
        folders = [given.output / f"redraw-{FIRST + number}" for number in range(given.redraws)]
        comparisons = comparisons_of(read_comparison(find_config(given.config)), folders)
        for comparison in comparisons:
            if not comparison.is_declared:
                seed = comparison.protocol.seed
                raise UsageError(
                    f"{comparison.sha256}, the hash of {given.config} with protocol.seed {seed}, is not in "
                    f"{comparison.registered}: register it, commit that, and run afterwards"
                )
        plans = []
        for folder, comparison in zip(folders, comparisons, strict=True):
            prepare(given.tiles, given.external_tiles, folder, collage)
            plans.append(plan_comparison(comparison))
            restore(plans[-1], folder, given.results)
            record_registration(comparison, folder / "compare")
        failed = compute(plans, folders, given.stages, deadline, given.jobs)
        for plan, folder in zip(plans, folders, strict=True):
            keep(plan, folder, given.results)
        redraws = [redrawn(plan, folder) for plan, folder in zip(plans, folders, strict=True)]
        command = (
            "python tools/run_registered.py --tiles data/crc5_112/train --external-tiles data/crc5_112/test "
        )
        command += "\\\n    --output runs/collage --page docs/evidence/collage.md"
        write_whole(given.page, write_page(redraws, plans, command))
        print(f"written to {given.page}")
        for plan, folder in zip(plans, folders, strict=True):
            report_comparison(plan, folder / "compare")
            print(f"the report of this redraw: {folder / 'compare' / 'report.html'}")
    except SlidetlError as error:
        print(f"run_registered: {error}", file=sys.stderr)
        return 1
    for label, reason in failed.items():
        print(f"failed: {label}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
