"""Asks on phantoms if local labels of one study help to grade the patients of another, and writes the page.

    python tools/run_volumes.py --output runs/volumes --page docs/evidence/volumes.md

Each redraw draws phantoms (tools/make_ct.py), and runs the commands of a user on them: tile, fit on places
in the source patients (nodule or not, malignancy by its readers, diameter), embed every overlapping patch of
the target patients, pool by maximum, boosted trees; beside trainings end to end on the target patients alone,
from scratch and from the source network. docs/evidence/registered.md has the question and the primary
comparison. The same command resumes; --hours ends it between two steps, never by a result.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from slidetl.cli import main as slidetl
from slidetl.data.study import read_study
from slidetl.errors import SlidetlError, UsageError
from slidetl.evaluation.bootstrap import Interval, Metric, bca_interval_if_defined
from slidetl.evaluation.classical import fit_grader
from slidetl.evaluation.comparison import sign_flip_test
from slidetl.evaluation.metrics import Weights, auroc_metric, difference, log_loss
from slidetl.files import write_csv, write_whole
from slidetl.version import VERSION

FIRST, REDRAWS = 1, 3  # as registered
REGISTERED = range(FIRST, FIRST + REDRAWS)
DRAWN = ["--source", "80", "--target", "100", "--size", "80", "--slices", "40", "--body", "0.5"]
DRAWN += ["--field-mm", "180", "--length-mm", "140", "--shifted", "1", "--shift-mm", "10"]
DRAWN += ["--least-readers", "3"]
PATCHES = ["--spacing-mm", "2", "--tile-size", "32"]
STRIDE = ["--stride", "16"]
NETWORK = "conv3d_32"
GRADES = ["0", "1"]
RATE, SCALE = 3.0e-3, 0.3
SOURCE_EPOCHS, TARGET_EPOCHS = 30, 20
PRIMARY = ("local-trees", "scratch-max")
AGGREGATORS = {"max": "MaxPooling", "attention": "GatedAttention"}
ARMS = {
    "local-trees": "source labels, then the maximum over patches and boosted trees",
    "local-warm": "source labels, then end to end on patients, maximum",
    "scratch-max": "patient labels alone, end to end, maximum",
    "scratch-attention": "patient labels alone, end to end, gated attention",
    "random-trees": "no source labels: random network, maximum, boosted trees",
    "hu-volume": "mean Hounsfield units and volume of the lungs, logistic",
    "prior": "share of the training patients",
}
ABOUT = """
**Nothing here is claimed of real scans.** The patients are phantoms (`tools/make_ct.py`): drawn chests that
carry the nodules of LIDC-IDRI by shape, texture and ratings, marked by three readers or four. A patient's
label is whether the worst nodule, by its readers' mean with an error of half a step, is above 3 of 5.
Source patients have labels of places, target patients only their own; no patient of LIDC-IDRI is in both.
The chests are drawn at half size to have few patches, and networks are small, for two cores.
"""


@dataclass(frozen=True, eq=False)
class Graded:
    """Test patients of one redraw, and the probability of grade 1 that an arm gives each."""

    patients: tuple[str, ...]
    true: NDArray[np.int64]
    scores: NDArray[np.float64]


def fit_config(folder: Path, part: str, seed: int, aggregator: str, pretrained: str = "") -> Path:
    """Writes the configuration of a training, and returns its path.

    Args:
        folder: of the redraw.
        part: ``source`` or the name of an arm.
        seed: of initial weights and bags.
        aggregator: key of :data:`AGGREGATORS`.
        pretrained: checkpoint to start from; empty: from scratch.
    """
    is_source = part == "source"
    start = {"class_path": "slidetl.models.transfer.Scratch"}
    if pretrained:
        start = {
            "class_path": "slidetl.models.transfer.WarmRestart",
            "init_args": {"backbone_lr_scale": SCALE},  # type: ignore[dict-item]
        }
    model = {
        "backbone": {"name": NETWORK, **({"pretrained": pretrained} if pretrained else {})},
        "aggregator": {"class_path": f"slidetl.models.aggregators.{AGGREGATORS[aggregator]}"},
        "head": {"class_path": "slidetl.models.heads.CumulativeLink"},
        "transfer": start,
        "lr": RATE,
    }
    if is_source:
        model["tasks"] = [
            {
                "name": "malignancy",
                "column": "malignancy",
                "grades": ["1", "2", "3", "4", "5"],
                "readers": True,
            },
            {"name": "diameter", "column": "diameter_mm", "numeric": True, "weight": 0.5},
        ]
    config = {
        "seed_everything": seed,
        "data": {
            "manifest": str(folder / ("nodules.csv" if is_source else "series.csv")),
            "cache": str(folder / ("cache-source" if is_source else "cache-target")),
            "grades": GRADES,
            "bag_size": 1 if is_source else 64,
            "batch_size": 16 if is_source else 4,
            "num_workers": 0,
            "seed": seed,
        },
        "model": model,
        "trainer": {
            "default_root_dir": str(folder / part),
            "max_epochs": SOURCE_EPOCHS if is_source else TARGET_EPOCHS,
            "check_val_every_n_epoch": SOURCE_EPOCHS if is_source else TARGET_EPOCHS,  # the last state counts
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    path = folder / f"{part}.yaml"
    write_whole(path, yaml.safe_dump(config, sort_keys=False))
    return path


def steps_of(folder: Path, redraw: int, drawn: Sequence[str]) -> dict[str, tuple[Path, Callable[[], int]]]:
    """Lists the steps of a redraw in order: the file that ends each, and the commands."""
    cache = folder / "cache-target"

    def commands(*lines: Sequence[str]) -> Callable[[], int]:
        return lambda: next((code for line in lines if (code := slidetl(list(line)))), 0)

    def train(part: str, aggregator: str, warm: bool = False) -> Callable[[], int]:
        def run() -> int:
            pretrained = str(best_checkpoint(folder / "source")) if warm else ""
            config = str(fit_config(folder, part, redraw, aggregator, pretrained))
            return slidetl(["fit", "--config", config]) or slidetl(["test", "--config", config])

        return run

    def embed(name: str, pretrained: Callable[[], str]) -> Callable[[], int]:
        def run() -> int:
            about = ["embed", str(cache), "--backbone", NETWORK, "--pretrained", pretrained(), "--name", name]
            trees = ["fit-features", str(folder / "series.csv"), "--cache", str(cache), "--features", name]
            trees += ["--grades", *GRADES, "--pool", "max", "--model", "trees", "--seed", str(redraw)]
            trees += ["--output", str(folder / f"{name}-trees")]
            return slidetl(about) or slidetl(trees)

        return run

    def tile(manifest: str, to: str, *more: str) -> list[str]:
        return [
            "tile",
            str(folder / manifest),
            "--cache",
            str(folder / to),
            *PATCHES,
            *more,
            "--workers",
            "1",
        ]

    def draw() -> int:
        phantoms = importlib.import_module(f"{__package__}.make_ct" if __package__ else "make_ct")
        return int(phantoms.main([str(folder), "--seed", str(redraw), *DRAWN, *drawn]))

    def done(part: str) -> Path:
        return folder / part / "test" / "predictions.csv"

    return {
        "draw": (folder / "series.csv", draw),
        "tile": (
            folder / "tiled",
            _marked(
                folder / "tiled",
                commands(
                    tile("nodules.csv", "cache-source", "--mask", "none"),
                    tile("series.csv", "cache-target", *STRIDE),
                ),
            ),
        ),
        "source": (done("source"), train("source", "max")),
        "local-trees": (
            folder / "local-trees" / "predictions.csv",
            embed("local", lambda: str(best_checkpoint(folder / "source"))),
        ),
        "scratch-max": (done("scratch-max"), train("scratch-max", "max")),
        "baselines": (folder / "baselines" / "prior.csv", lambda: write_baselines(folder)),
        "local-warm": (done("local-warm"), train("local-warm", "max", warm=True)),
        "random-trees": (
            folder / "random-trees" / "predictions.csv",
            embed("random", lambda: str(random_weights(folder, redraw))),
        ),
        "scratch-attention": (done("scratch-attention"), train("scratch-attention", "attention")),
    }


def _marked(mark: Path, run: Callable[[], int]) -> Callable[[], int]:
    def marked() -> int:
        code = run()
        if not code:
            write_whole(mark, "")
        return code

    return marked


def best_checkpoint(folder: Path) -> Path:
    """Finds the checkpoint of a training.

    Raises:
        UsageError: there is none, or several.
    """
    found = sorted(folder.rglob("best.ckpt"))
    if len(found) != 1:
        raise UsageError(
            f"{folder}: expected one best.ckpt, found {len(found)}; remove the folder, run again"
        )
    return found[0]


def random_weights(folder: Path, redraw: int) -> Path:
    """Writes a network as it is before training."""
    import torch
    from safetensors.torch import save

    from slidetl.models.volumes import Conv3dNetwork

    torch.manual_seed(redraw)
    path = folder / "random.safetensors"
    state = Conv3dNetwork(NETWORK).state_dict()
    write_whole(path, save({name: value.contiguous() for name, value in state.items()}))
    return path


def write_baselines(folder: Path) -> int:
    """Grades the test patients by the share of the training ones, and by two numbers of their lungs."""
    slides = read_study(folder / "series.csv", folder / "cache-target", len(GRADES)).slides
    train = [slide for slide in slides if slide.row.split != "test"]
    test = [slide for slide in slides if slide.row.split == "test"]
    grades = [slide.row.grade or 0 for slide in train]

    def numbers(slide: object) -> list[float]:
        cache = slide.cache  # type: ignore[attr-defined]
        mask = cache.overview_mask
        return [float(cache.overview_hu[mask].mean()), float(mask.sum()) * cache.overview_mm**3 / 1000]

    patients = [slide.row.patient_id for slide in train]
    grader = fit_grader(
        "logistic", np.array([numbers(one) for one in train]), grades, patients, len(GRADES), 0
    )
    found = {
        "hu-volume": grader.probabilities(np.array([numbers(one) for one in test]))[:, 1],
        "prior": np.full(len(test), np.mean(grades)),
    }
    for name, scores in found.items():
        rows = [
            {
                "slide_id": slide.row.slide_id,
                "patient_id": slide.row.patient_id,
                "grade": slide.row.grade,
                "probability_0": 1 - score,
                "probability_1": score,
            }
            for slide, score in zip(test, scores, strict=True)
        ]
        write_csv(folder / "baselines" / f"{name}.csv", list(rows[0]), rows)
    return 0


def read_graded(path: Path) -> Graded:
    """Reads the probabilities of test patients, ordered by patient."""
    with path.open(encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["patient_id"])
    return Graded(
        tuple(row["patient_id"] for row in rows),
        np.array([int(row["grade"]) for row in rows]),
        np.array([float(row["probability_1"]) for row in rows]),
    )


def graded_by(folder: Path) -> dict[str, Graded]:
    """Reads the arms of a redraw that are done.

    Raises:
        UsageError: arms have graded different patients.
    """
    places = {arm: folder / arm / "test" / "predictions.csv" for arm in ARMS}
    places |= {arm: folder / arm / "predictions.csv" for arm in ("local-trees", "random-trees")}
    places |= {arm: folder / "baselines" / f"{arm}.csv" for arm in ("hu-volume", "prior")}
    found = {arm: read_graded(path) for arm, path in places.items() if path.exists()}
    if len({one.patients for one in found.values()}) > 1:
        raise UsageError(f"{folder}: the arms have graded different patients; remove the folder, run again")
    return found


def metric_of(graded: Sequence[Graded], name: str) -> Metric:
    """Makes the mean over redraws of AUROC or log loss a function of all patients' weights."""
    ends = np.cumsum([len(one.true) for one in graded])[:-1]
    single: list[Metric] = []
    for one in graded:
        if name == "AUROC":
            single.append(auroc_metric(one.true == 1, one.scores))
        else:
            rows = np.stack([1 - one.scores, one.scores], axis=1)
            single.append(partial(log_loss, one.true, rows))

    def mean(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        parts = np.split(weights, ends, axis=1)
        return np.asarray(np.mean([of(part) for of, part in zip(single, parts, strict=True)], axis=0))

    return mean


def estimate(graded: Sequence[Graded], name: str, against: Sequence[Graded] = ()) -> Interval | None:
    """Estimates a metric, or its paired difference, with its interval over the patients of each redraw."""
    metric = metric_of(graded, name)
    if against:
        metric = difference(metric, metric_of(against, name))
    redraws = [number for number, one in enumerate(graded) for _ in one.patients]
    patients = [f"{number} {who}" for number, one in enumerate(graded) for who in one.patients]
    return bca_interval_if_defined(metric, patients, strata=redraws)


def flips_p(first: Sequence[Graded], second: Sequence[Graded]) -> float:
    """Tests the difference of AUROC by exchange of the two arms' probabilities of patients."""
    redraw = np.concatenate([np.full(len(one.true), number) for number, one in enumerate(first)])
    twice = np.concatenate([redraw, redraw])  # the test puts one arm after the other

    def auroc(true: ArrayLike, scores: ArrayLike, weights: Weights = None) -> NDArray[np.float64]:
        truth, rows, drawn = np.asarray(true), np.asarray(scores)[0], np.asarray(weights)
        parts = [twice == number for number in range(len(first))]
        found = [auroc_metric(truth[part] == 1, rows[part])(drawn[:, part]) for part in parts]
        return np.asarray(np.mean(found, axis=0))

    true, one, other = (
        np.concatenate(values)
        for values in (
            [graded.true for graded in first],
            [graded.scores for graded in first],
            [graded.scores for graded in second],
        )
    )
    return sign_flip_test(auroc, true, one, other, np.arange(len(true))).p


def as_text(found: Interval | None, form: str = ".2f") -> str:
    """Formats an estimate with its interval."""
    return "undefined" if found is None else format(found, form)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)


def verdict(found: Interval | None, redraws: Sequence[int]) -> str:
    """Tells what follows from the primary comparison of some redraws by the registered rule."""
    if list(redraws) != [*REGISTERED]:
        return (
            f"**Not decided, with {state_of(redraws)}.** What is here shows that the recipe runs, and how "
            "large a difference might be."
        )
    if found is None:
        return (
            "**The registered rule cannot be applied**: the difference is undefined on these patients, or on "
            "most resamples of them."
        )
    if found.low > 0:
        return (
            "By the registered rule local labels help on these phantoms: the interval excludes 0 from below."
        )
    return "By the registered rule it is **not shown** that local labels help: the interval holds 0 or less."


def state_of(redraws: Sequence[int]) -> str:
    """Tells in words how far some redraws are those registered."""
    if set(redraws) <= set(REGISTERED):
        return f"{len(redraws)} of {len(REGISTERED)} redraws"
    names, registered = (", ".join(map(str, numbers)) for numbers in (redraws, REGISTERED))
    return f"redraws {names}, not the registered {registered}"


def write_page(redraws: Mapping[int, dict[str, Graded]], command: str) -> str:
    """Writes the page: the primary comparison, all arms, and what was not run."""
    first, second = PRIMARY

    def pair(arm: str, against: str) -> tuple[list[Graded], list[Graded]]:
        both = [one for one in redraws.values() if arm in one and against in one]
        return [one[arm] for one in both], [one[against] for one in both]

    both = [number for number, one in redraws.items() if first in one and second in one]
    rows: list[list[object]] = []
    for arm, about in ARMS.items():
        own, other = pair(arm, second)
        alone = [one[arm] for one in redraws.values() if arm in one]
        cells: list[object] = [arm, about, len(alone)]
        cells += [as_text(estimate(alone, name)) if alone else "not run" for name in ("AUROC", "log loss")]
        cells += [as_text(estimate(own, "AUROC", other), "+.2f") if own and arm != second else ""]
        rows.append(cells)
    each = [
        [arm, *(f"{_auroc(one[arm]):.2f}" if arm in one else "not run" for one in redraws.values())]
        for arm in ARMS
    ]
    own, other = pair(first, second)
    told = f"AUROC of {first} minus {second}, {state_of(both)}: "
    if own:
        n_test, n_positive = (
            sum(int(value) for value in values)
            for values in ([len(one.true) for one in own], [one.true.sum() for one in own])
        )
        p = flips_p(own, other)
        tested = "the test could not be computed" if np.isnan(p) else f"p = {p:.3f} by sign flips"
        told += (
            f"**{as_text(estimate(own, 'AUROC', other), '+.2f')}**, {tested}; {n_test} test patients, "
            f"{n_positive} of grade 1."
        )
    else:
        told += "**not run yet**."
    missing = [row[0] for row in rows if row[2] != len({*redraws, *REGISTERED})]
    parts = [
        "# Transfer of local labels on phantoms of CT",
        f"`{command}`: no figure on this page is typed in. [What was registered](registered.md).",
        *ABOUT.strip().split("\n\n"),
        "## The primary comparison",
        told,
        verdict(estimate(own, "AUROC", other) if own else None, both),
        "AUROC is computed within each redraw and averaged. Intervals are 95 % BCa over the test patients, "
        "resampled within each redraw, both arms on the same ones; flips exchange the two probabilities "
        "of a patient. Both are about other patients given these trainings; how trainings on other phantoms "
        "differ stands in the last table.",
        "## All arms",
        markdown(
            ["arm", "what it learns from", "redraws", "AUROC", "log loss", f"AUROC minus {second}"], rows
        ),
        "A constant has an AUROC of 0.5. A log loss above the prior's is that of probabilities that mislead, "
        "whatever the order of patients. All but the primary comparison are secondary, without correction.",
        "## AUROC of each redraw",
        markdown(["arm", *map(str, redraws)], each),
    ]
    if missing:
        parts.append(
            f"**Not run in every redraw: {', '.join(map(str, missing))}.** The command resumes them."
        )
    parts += [
        "## How it was run",
        f"slidetl {VERSION}, Python {platform.python_version()}, {os.cpu_count()} cores. Phantoms: "
        f"`make_ct {' '.join(DRAWN)}`, the seed being the redraw. Patches: `{' '.join(PATCHES)}`, of "
        f"whole series `{' '.join(STRIDE)}`. Network {NETWORK}; rate {RATE:g}, {SCALE:g} of it for a "
        f"pretrained backbone; {SOURCE_EPOCHS} epochs on places, {TARGET_EPOCHS} on patients, the last state "
        "counts. Scratch is not tuned: a difference may be a matter of its schedule. Trees also learn from "
        "the few patients of the validation part, which trainings leave out.",
    ]
    return (
        "\n\n".join(
            part if part.startswith(("#", "|")) else textwrap.fill(part, 120, break_on_hyphens=False)
            for part in parts
        )
        + "\n"
    )


def _auroc(graded: Graded) -> float:
    return float(metric_of([graded], "AUROC")(np.ones((1, len(graded.true))))[0])


def main(arguments: Sequence[str] | None = None, drawn: Sequence[str] = ()) -> int:
    """Runs the experiment; ``drawn`` are further options of make_ct, for a smaller one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for series, caches and trainings")
    parser.add_argument("--page", type=Path, required=True, help="Markdown to write")
    about = "redraws to run (default: %(default)s)"
    parser.add_argument("--redraws", type=int, metavar="N", default=REDRAWS, help=about)
    about = "number of the first redraw, which is its seed (default: %(default)s, as registered)"
    parser.add_argument("--first", type=int, metavar="N", default=FIRST, help=about)
    about = "start no step after so many hours (default: %(default)s)"
    parser.add_argument("--hours", type=float, default=8.0, metavar="X", help=about)
    given = parser.parse_args(arguments)
    if given.redraws < 1 or given.first < 0:
        parser.error("--redraws must be at least 1, --first 0 or more")
    deadline = time.monotonic() + given.hours * 3600
    numbers = range(given.first, given.first + given.redraws)
    folders = {number: given.output / f"redraw-{number}" for number in numbers}
    try:
        for number, folder in folders.items():
            for step, (end, run) in steps_of(folder, number, drawn).items():
                if end.exists() or time.monotonic() > deadline:
                    continue
                print(f"redraw {number}: {step}", file=sys.stderr, flush=True)
                if run():
                    raise UsageError(f"redraw {number}: {step} failed; the lines above say why")
        command = "python tools/run_volumes.py --output runs/volumes --page docs/evidence/volumes.md"
        command += f" --first {given.first}" * (given.first != FIRST)
        command += f" --redraws {given.redraws}" * (given.redraws != REDRAWS)
        write_whole(given.page, write_page({n: graded_by(folder) for n, folder in folders.items()}, command))
    except SlidetlError as error:
        print(f"run_volumes: {error}", file=sys.stderr)
        return 1
    print(f"written to {given.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
