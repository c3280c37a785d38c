"""Measures what a GPU gets from each command that runs a network, beside the network alone.

Everything is made here and needs no download: slides of JPEG tiles (256 px, 4:2:0, 0.25 um per pixel), a
cache of them, and networks of random weights; rates do not depend on the weights. *Typical* tiles are 224 px
at 0.5 um per pixel, *aligned* ones 256 px at 0.25, which coincide with the slide's own. The network alone
runs on a batch that lies on the card, in the same process, right after.

    python -m tools.bench_gpu --output docs/evidence/gpu.md
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tools.bench_tiling import WORKS, write_slide

Precision = Literal["float32", "bfloat16"]
PRECISIONS: dict[Precision, int] = {"float32": 64, "bfloat16": 256}  # tiles in a pass
ROW = "| {} | {} | {:.0f} | {:.0f} | {:.0%} |"


def grade_rows(scratch: Path, backbone: str, slides: list[Path], device: str) -> list[str]:
    """Grades all slides with one runner: tiles per second from the first read to the last grade."""
    from slidetl.grading.batch import grade_slides
    from slidetl.grading.grade import start_runner
    from slidetl.grading.options import GradeOptions
    from slidetl.publish.model_file import load_model
    from tools.bench_grading import export

    rows = []
    for kind, work in WORKS.items():
        path = scratch / f"{backbone}.{kind}.pt"
        export(backbone, work, path)
        model = load_model(path, device, trusted=True)
        for precision, batch_size in PRECISIONS.items():
            options = GradeOptions(force=True, batch_size=batch_size, precision=precision)
            list(grade_slides(model, slides[:1], options))  # fills the disk's cache
            started = time.perf_counter()
            graded = list(grade_slides(model, slides, options))
            seconds = time.perf_counter() - started
            assert not any(row.reason for row in graded), graded
            tiles = sum(row.result["tiles"] for row in graded)
            shape = (batch_size, work.side_px, work.side_px, 3)
            noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            with start_runner(model.frozen(), batch_size, precision=precision) as runner:
                alone = runner.rate(noise)
                first = runner.first_pass_s
            what = f"`grade`, {len(slides)} slides, {tiles} {kind} tiles, {backbone}, {precision}"
            rows.append(ROW.format(what, batch_size, tiles / seconds, alone, tiles / seconds / alone))
            print(rows[-1], f"first pass {first:.2f} s", file=sys.stderr, flush=True)
    return rows


def embed_rows(cache: Path, backbone: str, device: Literal["cpu", "cuda"]) -> list[str]:
    """Embeds a whole cache."""
    import torch

    from slidetl.models.backbones import Backbone
    from slidetl.models.runner import Runner
    from slidetl.models.spec import BackboneSpec
    from slidetl.tiles.store import SlideCache, groups
    from slidetl.training.embed import embed_cache
    from slidetl.training.options import EmbedOptions

    rows = []
    caches = [SlideCache.open(path) for path in groups(cache)]
    place = torch.device(device)
    tiles, side = sum(len(opened) for opened in caches), caches[0].spec.tile_size_px
    weights = cache.parent / f"{backbone}.safetensors"
    from safetensors.torch import save_file

    network = Backbone(BackboneSpec(backbone)).eval()
    save_file({name: value.contiguous() for name, value in network.net.state_dict().items()}, weights)
    for precision, batch_size in PRECISIONS.items():
        options = EmbedOptions(device=device, precision=precision, batch_size=batch_size, overwrite=True)
        for _ in range(2):  # the first fills the disk's cache
            started = time.perf_counter()
            found = embed_cache(cache, BackboneSpec(backbone, str(weights)), options)
            seconds = time.perf_counter() - started
        assert not any(slide.reason for slide in found), found
        network.to(place)
        noise = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), np.uint8)
        with Runner(_in(precision, network), place, batch_size, side) as runner:
            alone = runner.rate(noise)
        what = f"`embed`, {len(caches)} slides, {tiles} tiles of {side} px, {backbone}, {precision}"
        rows.append(ROW.format(what, batch_size, tiles / seconds, alone, tiles / seconds / alone))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _in(precision: str, network: Any) -> Callable[[Any], Any]:
    """The network's forward pass in a number format."""
    import torch

    def run(batch: Any) -> Any:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return network(batch)

    return run


def ready_rows(scratch: Path) -> list[str]:
    """Processor seconds until commands have imported what they need."""
    rows = []
    for command, module in (("grade", "slidetl.grading.batch"), ("fit", "slidetl.cli.training")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        rows.append(f"| `{command}` imported | {spent:.1f} | {time.perf_counter() - started:.1f} |")
    return rows


def fit_text(cache: Path, device: str, workers: list[int]) -> str:
    """Trains a ResNet-18 as ``slidetl fit`` does; the table of tools/bench_loader.py."""
    words = [sys.executable, "-m", "tools.bench_loader", str(cache), "--backbone", "resnet18"]
    words += ["--device", device, "--workers", *map(str, workers), "--threads", "1", "--repeats", "4"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda", help="cpu tries the program without a card"
    )
    parser.add_argument("--side", type=int, default=16384, help="of a slide, pixels")
    parser.add_argument("--slides", type=int, default=6, help="that are graded and embedded")
    parser.add_argument("--backbone", default="mobilenetv2_100", help="timm's name")
    parser.add_argument("--parts", nargs="+", default=["grade", "embed", "ready", "fit"], help="only these")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    import torch

    from slidetl.cli import main as slidetl

    cores = len(os.sched_getaffinity(0))
    card = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    lines = [
        "# A GPU, beside its network alone",
        "",
        f"`python -m tools.bench_gpu`, {date.today().isoformat()}, {card}, {cores} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, timm {version('timm')}, pytorch-lightning "
        f"{version('pytorch-lightning')}.",
        "",
        "| work | batch | tiles/s | network alone | share |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scratch = Path(folder)
        os.environ["SLIDETL_HOME"] = str(scratch / "home")  # the user's list of trusted files stays as it is
        (scratch / "slides").mkdir()
        slides = [scratch / "slides" / f"slide{number}.tiff" for number in range(options.slides)]
        for number, path in enumerate(slides):
            write_slide(path, options.side + 256 * number)  # no two alike
        if "grade" in options.parts:
            lines += grade_rows(scratch, options.backbone, slides, options.device)
        cache = scratch / "cache"
        if {"embed", "fit"} & set(options.parts):
            started = time.perf_counter()
            slidetl(["tile", str(scratch / "slides"), "--cache", str(cache), "--mpp", "0.5"])
            print(f"tiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        if "embed" in options.parts:
            lines += embed_rows(cache, options.backbone, options.device)
        if "ready" in options.parts:
            lines += ["", "| ready | processor s | s |", "|---|---|---|", *ready_rows(scratch)]
        if "fit" in options.parts:
            some = sorted({max(1, cores // 2), max(1, cores - 2)})
            lines += ["", "```", fit_text(cache, options.device, some).rstrip(), "```"]
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
