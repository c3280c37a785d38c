"""How fast ``slidetl grade`` is beside its own network, and how much memory a huge slide takes.

Each rate is ``slidetl grade --profile`` in a process of its own, on a drawn slide of JPEG tiles (256 px,
4:2:0, 0.25 um per pixel): reading, compressing as a cache would, decompressing and the network, beside the
network alone on tiles that lie in memory. *Typical* tiles are 224 px at 0.5 um per pixel; *aligned* ones, 256
px at 0.25, coincide with the slide's own and are copied. Weights are random: the rate does not depend on
them. Memory is the most that the process held (``ru_maxrss``) while it graded the typical tiles of a slide of
100,000 x 100,000 pixels and wrote its report.

    python -m tools.bench_grading --output docs/evidence/grading.md
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tools.bench_tiling import HUGE_PX, WORKS, Work, processor, write_slide

_RATES = re.compile(
    r"([\d.]+) tiles/s with everything on, ([\d.]+) by the network alone.*; (\d+)% of the processor time"
)


def export(backbone: str, work: Work, path: Path) -> int:
    """Writes a model file of a network that was never trained; returns the length of its embeddings."""
    from slidetl.models.spec import BackboneSpec
    from slidetl.publish.export import build_network, export_model
    from slidetl.tiles.grid import TileSpec
    from slidetl.training.grader import SlideGrader

    grader = SlideGrader(BackboneSpec(backbone)).eval()
    grader.tile_spec = TileSpec(work.mpp, work.side_px)
    export_model(*build_network([grader]), path)
    return grader.network.backbone.num_features


def grade(*arguments: str) -> tuple[str, float, float]:
    """Runs ``slidetl grade``; returns what it said, its seconds, and the most memory that it held, MiB."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "slidetl", "grade", *arguments], stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise SystemExit(f"slidetl grade {' '.join(arguments)}: {text}")
    return text, seconds, used.ru_maxrss / 1024


def rates(model: Path, slide: Path, runs: int) -> tuple[float, float, int]:
    """Of the run with the median share: tiles per second with everything on, and of the network alone, and
    the network's part of the processor time, in percent.
    """
    found = []
    for _ in range(runs):
        match = _RATES.search(grade(str(model), str(slide), "--profile")[0])
        assert match is not None  # --profile asks for it
        found.append((float(match[1]), float(match[2]), int(match[3])))
        print(model.stem, *found[-1], file=sys.stderr)
    return sorted(found, key=lambda one: one[0] / one[1])[statistics.median_low(range(runs))]


def run(options: argparse.Namespace, scratch: Path) -> list[str]:
    os.environ["SLIDETL_HOME"] = str(scratch / "home")  # the user's list of trusted files stays as it is
    names = ("torch", "timm", "numpy", "openslide-bin", "simplejpeg", "imagecodecs")
    lines = [
        "# Grading: how fast beside the network alone, and in how much memory",
        "",
        f"`python -m tools.bench_grading`, {date.today().isoformat()}, {processor()}, "
        f"{len(os.sched_getaffinity(0))} core(s), Python {platform.python_version()}, "
        f"{', '.join(f'{name} {version(name)}' for name in names)}.",
        "",
    ]
    if options.runs:
        slide = scratch / "slide.tiff"
        write_slide(slide, options.side)
        lines += [
            f"## Rates on a slide of {options.side} px a side",
            "",
            f"`slidetl grade --profile`; of {options.runs} runs that with the median share. The network "
            "alone runs in as many threads, on tiles that lie in memory.",
            "",
            "| backbone | tiles | tiles/s with everything on | tiles/s by the network alone | share "
            "| processor time in the network |",
            "|---|---|---|---|---|---|",
        ]
        for name, (kind, work) in itertools.product(options.backbones, WORKS.items()):
            model = scratch / f"{name}.{kind}.pt"
            export(name, work, model)
            everything, alone, percent = rates(model, slide, options.runs)
            share = f"{everything / alone:.0%} | {percent}%"
            lines.append(f"| {name} | {kind} | {everything:.1f} | {alone:.1f} | {share} |")
        lines.append("")
        slide.unlink()
    if options.memory:
        slide = scratch / "huge.tiff"
        write_slide(slide, options.huge_side)
        lines += [
            f"## Memory on a slide of {options.huge_side} x {options.huge_side} px",
            "",
            "`slidetl grade --output DIR --report`; typical tiles; all but a margin is tissue.",
            "",
            "| backbone | features of a tile | peak MiB | minutes | page, MB |",
            "|---|---|---|---|---|",
        ]
        for name in options.huge_backbones:
            model, out = scratch / f"{name}.pt", scratch / name
            features = export(name, WORKS["typical"], model)
            said, seconds, mib = grade(str(model), str(slide), "--output", str(out), "--report")
            page = (out / "huge.html").stat().st_size
            lines.append(f"| {name} | {features} | {mib:.0f} | {seconds / 60:.1f} | {page / 1e6:.1f} |")
            print(said, file=sys.stderr)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=20480, help="width of the slide, pixels")
    parser.add_argument("--runs", type=int, default=3, help="of each backbone; 0 leaves the rates out")
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=["mobilenetv2_100", "mobilenetv3_small_050", "resnet18"],
        help="timm's names",
    )
    parser.add_argument("--huge-side", type=int, default=HUGE_PX, help="width of the huge slide, pixels")
    parser.add_argument(
        "--huge-backbones", nargs="+", default=["mobilenetv2_100", "resnet14t"], help="those that grade it"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the huge slide out")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = "\n".join(run(options, Path(scratch)))
    print(text)
    if options.output:
        options.output.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
