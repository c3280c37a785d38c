"""What ``slidetl.processor`` gains: networks with and without it, each in a process of its own.

Ordinary and prepared processes take turns, and the gain is the median of the ratios of neighbours. A training
step is forward, backward and SGD on 32 tiles of 224 px, a forward pass takes 16; weights are random. Page
faults are those of the process, of its start too.

    python -m tools.bench_processor --output docs/evidence/processor.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from slidetl.processor import prepare_for_networks
from tools.bench_tiling import processor


def measure(backbone: str, seconds: float) -> dict[str, float]:
    """Tiles per second of training and of the forward pass, page faults, and the most memory held, MiB."""
    import timm
    import torch

    torch.manual_seed(0)
    network = timm.create_model(backbone, num_classes=5).eval().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)

    def rate(tiles: torch.Tensor, grades: torch.Tensor | None) -> float:
        done = 0
        for _ in range(2):
            step(tiles, grades)
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            step(tiles, grades)
            done += len(tiles)
        return done / (time.perf_counter() - started)

    def step(tiles: torch.Tensor, grades: torch.Tensor | None) -> None:
        if grades is None:
            with torch.inference_mode():
                network(tiles)
            return
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(tiles), grades).backward()  # type: ignore[no-untyped-call] # torch's
        optimizer.step()

    tiles = torch.rand(32, 3, 224, 224).to(memory_format=torch.channels_last)
    forward = rate(tiles[:16], None)  # first: training leaves a large heap behind
    network.train()
    training = rate(tiles, torch.arange(32) % 5)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "training": training,
        "forward": forward,
        "faults": used.ru_minflt,
        "mib": used.ru_maxrss / 1024,
    }


def compare(backbone: str, runs: int, seconds: float) -> list[dict[str, dict[str, float]]]:
    """So many neighbours, each an ordinary process and a prepared one."""
    pairs = []
    for run in range(runs):
        pair = {}
        for how in ("ordinary", "prepared")[:: 1 if run % 2 else -1]:
            command = [
                sys.executable,
                "-m",
                "tools.bench_processor",
                "--measure",
                backbone,
                how,
                str(seconds),
            ]
            pair[how] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(backbone, pair, file=sys.stderr)
        pairs.append(pair)
    return pairs


def run(options: argparse.Namespace) -> list[str]:
    lines = [
        "# What a process that runs a network gains by keeping its memory",
        "",
        f"`python -m tools.bench_processor`, {date.today().isoformat()}, {processor()}, "
        f"{len(os.sched_getaffinity(0))} core(s), {' '.join(platform.libc_ver())}, torch {version('torch')}, "
        f"timm {version('timm')}; medians of {options.runs} pairs of processes.",
        "",
        "| backbone | work | tiles/s, ordinary | prepared | gain | page faults, 1,000s | prepared "
        "| peak MiB | prepared |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for backbone in options.backbones:
        pairs = compare(backbone, options.runs, options.seconds)
        for work in ("training", "forward"):

            def median(how: str, of: str) -> float:
                return statistics.median(pair[how][of] for pair in pairs)  # noqa: B023 # called right here

            gain = statistics.median(pair["prepared"][work] / pair["ordinary"][work] for pair in pairs)
            process = [f"{median(how, 'faults') / 1e3:.0f}" for how in ("ordinary", "prepared")]
            process += [f"{median(how, 'mib'):.0f}" for how in ("ordinary", "prepared")]
            rest = " | ".join(process) if work == "training" else " | | | "
            rates = f"{median('ordinary', work):.1f} | {median('prepared', work):.1f}"
            lines.append(f"| {backbone} | {work} | {rates} | {gain:.2f} x | {rest} |")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        backbone, how, seconds = sys.argv[2:]
        if how == "prepared":
            prepare_for_networks()
        print(json.dumps(measure(backbone, float(seconds))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbones", nargs="+", default=["mobilenetv3_small_050", "mobilenetv2_100", "resnet18", "resnet50"]
    )
    parser.add_argument("--runs", type=int, default=3, help="pairs of processes for each backbone")
    parser.add_argument("--seconds", type=float, default=4.0, help="that each kind of work is measured for")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    text = "\n".join(run(options)) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
