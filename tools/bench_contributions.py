"""How well contributions and attention find the collagen that was drawn into synthetic slides.

The truth of a tile is the share of its area that is drawn fibrosis; a tile counts as fibrotic from a quarter.
On each slide of the test part with at least five tiles of either kind, the AUROC of fibrotic against other
tiles is computed for a tile's contribution to the score, for its attention, and for the map that slidetl
once drew, the grade of the tile by itself. First for the network of a checkpoint; then aggregators are
trained on the embeddings of its backbone and the slides it saw, several seeds each. What does not add tiles
up is explained by occlusion, as in ``slidetl grade``.

    scripts/demo
    python -m tools.bench_contributions demo --output docs/evidence/contributions.md
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slidetl.evaluation.metrics import auroc, qwk
from slidetl.grading.explain import Explanation, explain_by_occlusion
from slidetl.models import aggregators
from slidetl.models.heads import CumulativeLink
from slidetl.models.network import GradingNetwork
from slidetl.synthetic.section import TRUTH_CELL_UM
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.training.checkpoint import load_grader
from slidetl.training.predictions import read_predictions
from tools.bench_tiling import processor

FIBROTIC = 0.25  # share of a tile
BAG = 64  # tiles of each slide in a step
LEAST = 5  # tiles of either kind on a slide
MAPS = ("contribution", "attention", "tile by itself")
NAMES = (
    "MeanPooling",
    "Attention",
    "GatedAttention",
    "MultiHopAttention",
    "AdditiveAttention",
    "MaxPooling",
    "TopKPooling",
)


@dataclass(frozen=True, eq=False)
class Slide:
    """A slide's tiles: embeddings ``[N, D]``, grid places ``[N, 2]`` and drawn collagen ``[N]``, 0..1."""

    slide_id: str
    grade: int
    embeddings: Tensor
    places: NDArray[np.int64]
    collagen: NDArray[np.float64]

    @property
    def is_fibrotic(self) -> NDArray[np.bool_]:
        """``[N]``, True for the tiles to find."""
        return self.collagen >= FIBROTIC

    @property
    def has_both(self) -> bool:
        """True where an AUROC says something."""
        count = int(self.is_fibrotic.sum())
        return LEAST <= count <= len(self.collagen) - LEAST


def drawn_collagen(
    truth: NDArray[np.floating], origins_um: NDArray[np.float64], side_um: float
) -> NDArray[np.float64]:
    """Averages the truth's cells whose centres lie in each tile, ``[N]``.

    Args:
        truth: ``[rows, columns]`` of cells of ``TRUTH_CELL_UM``, 0..1.
        origins_um: ``[N, 2]`` upper-left corners ``(x, y)``, micrometres.
        side_um: of a tile.
    """
    first = np.ceil(origins_um / TRUTH_CELL_UM - 0.5).astype(int)
    last = np.ceil((origins_um + side_um) / TRUTH_CELL_UM - 0.5).astype(int)
    return np.array(
        [truth[y0:y1, x0:x1].mean(dtype=float) for (x0, y0), (x1, y1) in zip(first, last, strict=True)]
    )


def read_slide(folder: Path, slide_id: str, grade: int, network: GradingNetwork) -> Slide:
    """Embeds the tiles of a slide and reads the truth of each."""
    cache = SlideCache.open(cache_path(folder / "cache", slide_id))
    with np.load(folder / "data" / "truth" / f"{slide_id}.npz") as file:
        truth = file["collagen_fraction"]
    mpp, extent = np.array(cache.mpp_level0), np.array(cache.extent_level0)
    origins = np.asarray(cache.origins_level0, float)
    tiles = torch.from_numpy(cache.read(range(len(cache)))).permute(0, 3, 1, 2)
    with torch.inference_mode():
        embeddings = torch.cat([network.embed(part[None])[0] for part in torch.split(tiles, 64)])
    collagen = drawn_collagen(truth, origins * mpp, float(extent[0] * mpp[0]))
    return Slide(slide_id, grade, embeddings, np.round(origins / extent).astype(np.int64), collagen)


def maps_of(network: GradingNetwork, slide: Slide) -> tuple[float, dict[str, NDArray[np.float32]]]:
    """Returns the expected grade of a slide, and each of ``MAPS``, ``[N]``."""

    def expected(embeddings: Tensor) -> float:
        logits, _ = network.grade(embeddings[None], torch.ones(1, len(embeddings), dtype=torch.bool))
        return float(network.head.expected_grade(logits))

    with torch.inference_mode():
        mask = torch.ones(1, len(slide.embeddings), dtype=torch.bool)
        logits, attention, explained = network.explain(slide.embeddings[None], mask)
        if explained is None:
            contributions = explain_by_occlusion(
                lambda selections: np.array(
                    [expected(slide.embeddings), *(expected(slide.embeddings[kept]) for kept in selections)]
                ),
                slide.places,
            ).contributions
        else:
            contributions = explained[1][0].numpy()
        alone, _ = network.grade(slide.embeddings.unsqueeze(1), mask.T)
        tile_grades = network.head.expected_grade(alone).numpy()
        found = (contributions, attention[0].mean(0).numpy(), tile_grades)
        return float(network.head.expected_grade(logits)), dict(zip(MAPS, found, strict=True))


def train(network: GradingNetwork, slides: Sequence[Slide], steps: int) -> GradingNetwork:
    """Trains aggregator and head; each step takes some tiles of every slide, drawn with replacement."""
    grades = torch.tensor([slide.grade for slide in slides])
    mask = torch.ones(len(slides), BAG, dtype=torch.bool)
    parameters = [*network.aggregator.parameters(), *network.head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    for _ in range(steps):
        bags = [slide.embeddings[torch.randint(len(slide.embeddings), (BAG,))] for slide in slides]
        optimiser.zero_grad()
        logits, _ = network.grade(torch.stack(bags), mask)
        network.head.loss(logits, grades).backward()  # type: ignore[no-untyped-call] # torch's
        optimiser.step()
    return network.eval()


def spread(values: Sequence[float]) -> str:
    """Formats mean, standard deviation and range over slides."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} [{min(values):.3f}, {max(values):.3f}]"


def areas(network: GradingNetwork, slides: Sequence[Slide]) -> tuple[float, dict[str, list[float]]]:
    """Returns the QWK on slides, and for each map the AUROC on those that have both kinds of tiles."""
    found: dict[str, list[float]] = {name: [] for name in MAPS}
    predicted = []
    for slide in slides:
        expected, maps = maps_of(network, slide)
        predicted.append(round(expected))
        if slide.has_both:
            for name, values in maps.items():
                found[name].append(auroc(slide.is_fibrotic, values))
    return float(qwk([slide.grade for slide in slides], predicted, 5)), found


def false_alarms(network: GradingNetwork, slides: Sequence[Slide]) -> tuple[float, float]:
    """Returns the shares of tiles without collagen that look fibrotic on the former map and on the new one.

    On the former that is an expected grade of 1.5 or more, on the new one the class that raises the score.
    """
    former, new = [], []
    for slide in slides:
        _, maps = maps_of(network, slide)
        is_clear = slide.collagen == 0
        former.append((maps["tile by itself"] >= 1.5)[is_clear])
        shades = Explanation(maps["contribution"], "", 0.0, None).shades
        new.append((shades // 86 == 2)[is_clear])
    return float(np.concatenate(former).mean()), float(np.concatenate(new).mean())


def run(folder: Path, seeds: int, steps: int) -> list[str]:
    """Returns the lines of the page."""
    grader = load_grader(folder / "logs" / "version_0" / "checkpoints" / "best.ckpt").eval()
    network = grader.network
    tested = {row.slide_id for row in read_predictions(folder / "test" / "predictions.csv")}
    with (folder / "data" / "manifest.csv").open() as file:
        rows = [(row["slide_id"], int(row["grade"])) for row in csv.DictReader(file)]
    slides = [read_slide(folder, name, grade, network) for name, grade in rows]
    seen = [slide for slide in slides if slide.slide_id not in tested]
    kept = [slide for slide in slides if slide.slide_id in tested]
    both = [slide for slide in kept if slide.has_both]
    score, own = areas(network, kept)
    former, new = false_alarms(network, kept)
    lines = [
        "# Contributions: do they find what was drawn?",
        "",
        f"`python -m tools.bench_contributions demo`, {date.today().isoformat()}, {processor()}, "
        f"{len(os.sched_getaffinity(0))} core(s), Python {platform.python_version()}, torch "
        f"{version('torch')}. Slides, network and split are those of `scripts/demo` (seed 0): {len(seen)} "
        f"slides to train and choose on, {len(kept)} for the test, in tiles of 192 µm. A tile is fibrotic if "
        f"at least {FIBROTIC:.0%} of it is drawn fibrosis. The AUROC is that of fibrotic against other "
        f"tiles of one slide, on the {len(both)} test slides with at least {LEAST} of either; then mean ± "
        "standard deviation over slides [least, greatest].",
        "",
        "## The network of the demo",
        "",
        f"Gated attention under a cumulative link, trained with its backbone; QWK {score:.3f} on the test.",
        "",
        "| map | AUROC |",
        "|---|---|",
        *(f"| {name} | {spread(own[name])} |" for name in MAPS),
        "",
        f"Of the tiles without any collagen, on all {len(kept)} test slides, the map of tiles by themselves "
        f"drew {former:.1%} as grade 2 or more; {new:.1%} are shown to raise the score.",
        "",
        "| slide | grade | tiles | fibrotic | " + " | ".join(MAPS) + " |",
        "|---" * (4 + len(MAPS)) + "|",
    ]
    for number, slide in enumerate(both):
        each = " | ".join(f"{own[name][number]:.3f}" for name in MAPS)
        count = int(slide.is_fibrotic.sum())
        lines.append(f"| {slide.slide_id} | {slide.grade} | {len(slide.collagen)} | {count} | {each} |")
    lines += [
        "",
        "## Other aggregators on the same embeddings",
        "",
        f"Under a cumulative link; {steps} steps of AdamW (rate 0.003, decay 0.01) with {BAG} tiles of every "
        "slide of the training in each, nothing searched. Contributions are exact for the first five, "
        "occlusion for the rest.",
        "",
        "| aggregator | seed | QWK | " + " | ".join(MAPS) + " |",
        "|---" * (3 + len(MAPS)) + "|",
    ]
    for name in NAMES:
        for seed in range(seeds):
            torch.manual_seed(seed)
            aggregator = getattr(aggregators, name)(slides[0].embeddings.shape[1])
            head = CumulativeLink(aggregator.out_features, 5)
            score, found = areas(train(GradingNetwork(network.backbone, aggregator, head), seen, steps), kept)
            flat = {key: np.isclose(values, 0.5).all() for key, values in found.items()}
            cells = " | ".join("even" if flat[key] else spread(values) for key, values in found.items())
            lines.append(f"| {name} | {seed} | {score:.3f} | {cells} |")
            print(lines[-1], file=sys.stderr)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="the folder that scripts/demo made")
    parser.add_argument("--seeds", type=int, default=2, help="of each aggregator: 0, 1, ...")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="Markdown; by default it is printed")
    options = parser.parse_args(arguments)
    text = "\n".join(run(options.demo, options.seeds, options.steps)) + "\n"
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
