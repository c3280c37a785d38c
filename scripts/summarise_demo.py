"""The last step of scripts/demo: sets the figures of the run against the same network from scratch,
mean colour and chance.

Usage: summarise_demo.py DEMO_FOLDER. Writes summary.json there, prints a table. Exit code 1 where the network
does not beat colour and chance (paired patient bootstrap, lower 90 % bound), or 'grade' and 'test' disagree.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from slidetl.compare.colour import colour_features
from slidetl.data.manifest import read_manifest
from slidetl.evaluation.baselines import fit_best
from slidetl.evaluation.bootstrap import Interval, Metric, resampled_metric, share_interval
from slidetl.evaluation.metrics import difference, qwk
from slidetl.tiles.store import SlideCache
from slidetl.training.predictions import read_predictions

N_GRADES = 5


def main(folder: Path) -> int:
    """Summarises one run."""
    predictions = read_predictions(folder / "predictions.csv")
    patients = [row.patient_id for row in predictions]
    true = np.array([row.grade for row in predictions])
    model = np.array([row.predicted_grade for row in predictions])
    without = {
        row.slide_id: row.predicted_grade
        for row in read_predictions(folder / "scratch" / "test" / "predictions.csv")
    }
    scratch = np.array([without[row.slide_id] for row in predictions])

    rows = read_manifest(folder / "data" / "manifest.csv", N_GRADES).rows
    features = colour_features(SlideCache.open(folder / "cache" / f"{row.slide_id}.zarr") for row in rows)
    # Out of fold over all slides of the demo, training slides included: more than the network had.
    grades = [row.grade for row in rows if row.grade is not None]
    baseline = fit_best(features, grades, [row.patient_id for row in rows], N_GRADES)
    by_slide = dict(zip((row.slide_id for row in rows), baseline.predictions.tolist(), strict=True))
    colour = np.array([by_slide[row.slide_id] for row in predictions])
    tested = {row.slide_id for row in predictions}
    others = Counter(row.grade for row in rows if row.slide_id not in tested)
    chance = np.full(len(true), others.most_common(1)[0][0])

    def interval(metric: Metric, level: float = 0.95) -> Interval:
        """Computes a percentile bootstrap over patients; draws without a value are left out."""
        drawn = resampled_metric(metric, patients)
        low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(metric(np.ones((1, len(true))))[0]), float(low), float(high), level)

    def share(predicted: NDArray[np.int64]) -> Interval:
        return share_interval(predicted == true, patients)

    def kappa(predicted: NDArray[np.int64]) -> Interval:
        return interval(partial(qwk, true, predicted, N_GRADES))

    def gain(predicted: NDArray[np.int64]) -> Interval:
        of_model, of_other = (partial(qwk, true, graded, N_GRADES) for graded in (model, predicted))
        return interval(difference(of_model, of_other), level=0.9)

    table = Table(title=f"{len(true)} test slides of {len(set(patients))} patients, none seen in training")
    for heading in ("", "accuracy [95 %]", "QWK [95 %]", "QWK of slidetl minus this [90 %]"):
        table.add_column(heading)
    arms = {
        "slidetl, from ImageNet weights": model,
        "the same network from scratch, as many epochs": scratch,
        f"mean colour and tissue area ({baseline.grader.model})": colour,
        "chance (the most common grade)": chance,
    }
    for name, predicted in arms.items():
        table.add_row(
            name,
            f"{share(predicted):.2f}",
            f"{kappa(predicted):.2f}",
            "" if predicted is model else f"{gain(predicted):.2f}",
        )
    console = Console(width=120)
    console.print(table)

    graded = [json.loads(line) for line in (folder / "grades.jsonl").read_text(encoding="utf-8").splitlines()]
    by_stem = {Path(row["slide"]).stem: row["probabilities"] for row in graded}
    furthest = max(
        float(np.abs(np.subtract(row.probabilities, by_stem[row.slide_id])).max()) for row in predictions
    )
    seconds = dict(line.split() for line in (folder / "seconds.txt").read_text(encoding="utf-8").splitlines())
    console.print(
        "Intervals are over patients, exact of accuracies and bootstraps of QWK, given this one training.\n"
        f"slidetl grade and slidetl test differ by at most {furthest:.1e} in a probability.\n"
        f"Heat maps: {folder / 'maps'}/*.png   model: {folder / 'model.pt'}   logs: {folder / 'logs'}"
    )
    estimates = {
        "accuracy": share(model),
        "qwk": kappa(model),
        "scratch_accuracy": share(scratch),
        "scratch_qwk": kappa(scratch),
        "mean_colour_accuracy": share(colour),
        "mean_colour_qwk": kappa(colour),
        "chance": share(chance),
        "qwk_gain_over_scratch": gain(scratch),
        "qwk_gain_over_mean_colour": gain(colour),
        "qwk_gain_over_chance": gain(chance),
    }
    summary = {
        **{name: round(found.estimate, 4) for name, found in estimates.items()},
        "intervals": {
            name: {"low": round(found.low, 4), "high": round(found.high, 4), "level": found.level}
            for name, found in estimates.items()
        },
        "greatest_probability_difference_grade_test": furthest,
        "test_slides": len(true),
        "test_patients": len(set(patients)),
        "seconds": {step: int(value) for step, value in seconds.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if min(gain(colour).low, gain(chance).low) <= 0 or furthest > 1e-4:
        console.print("[bold red]The demo did not show what it should: see the table above.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
