"""What leaning on a pretrained network costs: training steps with and without penalties, in one run.

The kinds of step take turns, each round beginning with another, and a cost is the median over the rounds of
the ratio within one round: so whatever else the machine does falls on all of them alike. On a machine that is
shared the time of the processor says more than that of the clock; both are shown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from slidetl.models.aggregators import GatedAttention
from slidetl.models.backbones import Backbone
from slidetl.models.heads import CumulativeLink
from slidetl.models.network import GradingNetwork
from slidetl.models.penalties import Seen, recorded
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import SharedActivations, SharedWeights, TransferStrategy, WarmRestart

Step = Callable[[], None]
LIMITS = {"weights (L2-SP, decoupled)": 0.05, "weights (L2-SP, in the loss)": 0.05, "activations": 0.45}


def make_step(strategy: TransferStrategy, spec: BackboneSpec, tiles: torch.Tensor) -> Step:
    """A training step as the task does it; ``spec.pretrained`` must be a file of weights."""
    torch.manual_seed(0)
    backbone = Backbone(spec)
    network = GradingNetwork(
        backbone, GatedAttention(backbone.num_features), CumulativeLink(backbone.num_features, 5)
    )
    strategy.start(backbone)
    network.train().to(tiles.device)
    strategy.set_training_mode(backbone)
    reference = strategy.reference(backbone)
    if reference is not None:
        reference.to(tiles.device)
    optimizer = torch.optim.AdamW(strategy.parameter_groups(network, lr=1e-4, weight_decay=0.01))
    bags = tiles.view(4, -1, *tiles.shape[1:])
    mask = torch.ones(bags.shape[:2], dtype=torch.bool, device=tiles.device)
    grades = torch.arange(4, device=tiles.device)
    watched = strategy.watched(backbone) if reference is not None else ()

    def step() -> None:
        with recorded(backbone, watched) as activations:
            logits, _ = network(bags, mask)[:2]
        loss = network.head.loss(logits, grades)
        if reference is not None:
            seen = Seen(bags, mask, activations)
            loss = loss + sum(strategy.penalties(network, reference, seen, 0.5).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # torch's
        optimizer.step()
        if reference is not None:
            strategy.after_step(network, reference, optimizer.param_groups, 0.5)
        if tiles.is_cuda:
            torch.cuda.synchronize()

    return step


def resnet_steps(spec: BackboneSpec, tiles: torch.Tensor) -> dict[str, Step]:
    """A step without penalties, and those whose cost has a limit."""
    strategies: dict[str, TransferStrategy] = {
        "fine-tuning": WarmRestart(),
        "weights (L2-SP, decoupled)": SharedWeights(),
        "weights (L2-SP, in the loss)": SharedWeights(decoupled=False),
        "activations": SharedActivations(),
    }
    return {name: make_step(strategy, spec, tiles) for name, strategy in strategies.items()}


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of the processor for each step in each round, after one for warming up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            clock, processor = time.perf_counter(), time.process_time()
            steps[name]()
            if number:
                seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return seconds


def table(title: str, seconds: dict[str, list[tuple[float, float]]], limits: dict[str, float]) -> list[str]:
    """Medians, and of the costs relative to the first kind of step."""
    lines = [
        f"## {title}",
        "",
        "| step | clock, ms | cost | processor, ms | cost | limit |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(seconds.values()))
    for name, rows in seconds.items():
        cells = []
        for kind in (0, 1):
            median = statistics.median(row[kind] for row in rows)
            cost = statistics.median(
                row[kind] / base[kind] - 1 for row, base in zip(rows, first, strict=True)
            )
            cells.append(f"{1e3 * median:.0f} | {cost:+.1%}")
        limit = f"{limits[name]:+.0%}" if name in limits else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {limit} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each kind")
    parser.add_argument("--tiles", type=int, default=16, help="tiles of 224 px per step, a multiple of 4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="for weights made up for the test")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tiles = torch.randint(0, 256, (options.tiles, 3, 224, 224), dtype=torch.uint8).to(options.device)

    def spec(name: str, channels_last: bool = True) -> BackboneSpec:
        path = options.folder / f"{name}.pth"  # what the weights are makes no difference to the time
        if not path.exists():
            torch.save(timm.create_model(name, num_classes=0).state_dict(), path)
        return BackboneSpec(name, str(path), channels_last)

    steps = resnet_steps(spec("resnet18"), tiles)
    device = (
        torch.cuda.get_device_name() if tiles.is_cuda else f"{platform.processor() or platform.machine()} CPU"
    )
    lines = [
        "# What transfer costs",
        "",
        f"`tools/bench_transfer.py`, {options.tiles} tiles of 224 px, {options.rounds} rounds in turns; "
        f"{device}, {torch.get_num_threads()} threads; torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}.",
        "",
        *table("ResNet-18: a training step", measure(steps, options.rounds), LIMITS),
    ]
    layouts = {
        f"channels last {'on' if on else 'off'}": make_step(WarmRestart(), spec("mobilenetv2_100", on), tiles)
        for on in (True, False)
    }
    lines += table("MobileNetV2: memory layout", measure(layouts, options.rounds), {})
    text = "\n".join(lines).rstrip() + "\n"
    sys.stdout.write(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
