"""Measures what a GPU gets from each command that runs a network, beside the network alone.

Everything is made here and needs no download: slides of JPEG tiles (256 px, 4:2:0, 0.25 um per pixel), a
cache of them, and networks of random weights; rates do not depend on the weights. *Typical* tiles are 224 px
at 0.5 um per pixel, *aligned* ones 256 px at 0.25, which coincide with the slide's own. The network alone
runs on a batch that lies on the card, in the same process, right after.

    python -m tools.bench_gpu --output tools/bench_gpu.txt
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slidetl.cli import main as slidetl
from slidetl.tiles.readers import Readers
from slidetl.tiles.store import SlideCache, groups
from tools.bench_tiling import WORKS, Work, write_slide

Precision = Literal["float32", "bfloat16"]
PARTS = ["fit", "grade", "embed", "ready", "penalties"]
_DRAWN = 4  # slides; the others are further names of theirs
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def row(work: str, seen: float, beside: float, note: str = "") -> str:
    """A line of the table, which is also shown at once."""
    line = f"| {work} | {seen:,.0f} | {beside:,.0f} | {seen / beside:.0%} | {note} |"
    print(line, file=sys.stderr, flush=True)
    return line


def grade_rows(scratch: Path, backbone: str, slides: list[Path], device: str) -> list[str]:
    """Grades all slides, once the first pass is done; the network alone runs before, in the same process."""
    from slidetl.grading.batch import grade_slides
    from slidetl.grading.options import GradeOptions
    from slidetl.publish.model_file import load_model
    from tools.bench_grading import export

    rows = []
    for kind, work in sorted(WORKS.items(), reverse=True):
        path = scratch / f"{backbone}.{kind}.pt"
        export(backbone, work, path)
        model = load_model(path, device, trusted=True)
        reading, spoken = reading_rate(slides, work), f"{kind} tiles of {work.side_px} px"
        for precision in PRECISIONS:
            started = time.perf_counter()
            options = GradeOptions(force=True, precision=precision, profile=True)
            graded = list(grade_slides(model, slides, options))
            seconds = time.perf_counter() - started
            assert not any(one.reason for one in graded), graded
            rates = graded[-1].rates
            assert rates is not None  # asked for
            tiles = sum(one.result["tiles"] for one in graded)
            note = f"reading alone {reading:,.0f}; first pass {rates.first_pass_s:.1f} s of {seconds:.1f} s"
            what = f"`grade`, {len(slides)} slides, {tiles} {spoken}, {backbone}, {precision}"
            rows.append(row(what, rates.everything, rates.network_alone, note))
    return rows


def reading_rate(slides: list[Path], work: Work) -> float:
    """Reads the slides in as many processes as ``grade`` does, without a network; tiles per second."""
    from slidetl.tiles.cut import slide_parts
    from slidetl.tiles.grid import TileSpec

    spec = TileSpec(work.mpp, work.side_px)
    count = min(len(slides), max(1, len(os.sched_getaffinity(0)) - 2))
    with Readers(slide_parts, count, 32, work.side_px, 2) as readers, ThreadPoolExecutor(count) as pool:

        def read(path: Path) -> int:
            with readers.stream(path, None, None, spec, 32, 1) as parts:
                return sum(len(tiles) for _, tiles in parts if tiles is not None)

        with readers.stream(slides[0], None, None, spec, 32, 1) as parts:
            next(parts)  # they are there
        started = time.perf_counter()
        return sum(pool.map(read, slides)) / (time.perf_counter() - started)


def embed_rows(cache: Path, backbone: str, device: Literal["cpu", "cuda"]) -> list[str]:
    """Embeds a whole cache."""
    import torch

    from slidetl.models.runner import Runner
    from slidetl.models.spec import BackboneSpec
    from slidetl.tiles.grid import TileSpec
    from slidetl.training.embed import embed_cache
    from slidetl.training.options import EmbedOptions

    rows = []
    caches = [SlideCache.open(path) for path in groups(cache)]
    place = torch.device(device)
    tiles, side = sum(len(opened) for opened in caches), caches[0].spec.tile_size_px
    weights = cache.parent / f"{backbone}.safetensors"
    network = _save_weights(backbone, weights)
    reading = cache_rates(caches)
    for precision in PRECISIONS:
        options = EmbedOptions(device=device, precision=precision, batch_size=256, overwrite=True)
        marks: list[tuple[float, int]] = []
        started = time.perf_counter()
        found = embed_cache(
            cache,
            BackboneSpec(backbone, str(weights)),
            options,
            on_batch=partial(_mark, marks),
        )
        ended = time.perf_counter()
        assert not any(slide.reason for slide in found), found
        warm = sum(done for _, done in marks[1:]) / (ended - marks[0][0])
        network.to(place)
        noise = np.random.default_rng(0).integers(0, 256, (256, side, side, 3), np.uint8)
        with Runner(_in(precision, network), place, 256, TileSpec(1.0, side)) as runner:
            alone = runner.rate(noise)
        what = f"`embed`, {len(caches)} slides, {tiles} tiles of {side} px, {backbone}, {precision}"
        first = marks[0][0] - started
        rows.append(
            row(what, warm, alone, f"{reading}; first batch after {first:.1f} s of {ended - started:.1f} s")
        )
    return rows


def cache_rates(caches: list[SlideCache]) -> str:
    """Reads a cache in threads and in processes, without a network; tiles per second."""
    cores, found = len(os.sched_getaffinity(0)), []
    parts = [(cache, start) for cache in caches for start in range(0, len(cache), 128)]

    def read(part: tuple[SlideCache, int]) -> int:
        return len(part[0].read(np.arange(part[1], min(part[1] + 128, len(part[0])))))

    for threads in sorted({1, min(4, cores), min(16, cores)}):
        some = parts[: 40 * threads]
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            rate = sum(pool.map(read, some)) / (time.perf_counter() - started)
        found.append(f"{rate:,.0f} in {threads}")
    count = min(len(caches), max(1, cores - 2))
    with Readers(cache_parts, count, 64, caches[0].spec.tile_size_px, 2) as readers:

        def drain(cache: SlideCache) -> int:
            with readers.stream(cache, 64) as tiles:
                return sum(len(t) for _, t in tiles if t is not None)

        drain(caches[0])
        with ThreadPoolExecutor(count) as pool:
            started = time.perf_counter()
            rate = sum(pool.map(drain, caches)) / (time.perf_counter() - started)
    return f"reading alone {', '.join(found)} threads, {rate:,.0f} in {count} processes"


def cache_parts(cache: SlideCache, size: int) -> Generator[tuple[Any, NDArray[np.uint8] | None], None, None]:
    for start in range(0, len(cache), size):
        yield start, cache.read(np.arange(start, min(start + size, len(cache))))


def _mark(marks: list[tuple[float, int]], done: int) -> None:
    marks.append((time.perf_counter(), done))


def _in(precision: str, network: Any) -> Callable[[Any], Any]:
    """The network's forward pass in a number format."""
    import torch

    def run(batch: Any) -> Any:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return network(batch)

    return run


def penalty_rows(scratch: Path, device: str) -> list[str]:
    """Steps of a ResNet-18 on 192 tiles with each penalty, beside the step without."""
    import timm
    import torch

    from slidetl.models.spec import BackboneSpec
    from tools.bench_transfer import LIMITS, measure, resnet_steps

    weights = scratch / "resnet18.pth"
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), weights)
    tiles = torch.randint(0, 256, (192, 3, 224, 224), dtype=torch.uint8, device=device)
    steps = resnet_steps(BackboneSpec("resnet18", str(weights)), tiles)

    def waited(step: Callable[[], None]) -> None:
        step()
        if device != "cpu":
            torch.cuda.synchronize()

    found = measure({name: partial(waited, step) for name, step in steps.items()}, 15)
    plain, *others = ((name, median(clock for clock, _ in rows)) for name, rows in found.items())
    return [
        f"| step with {name}, ms | {1e3 * seconds:.1f} | {1e3 * plain[1]:.1f} | {seconds / plain[1]:.0%} "
        f"| a step without it; at most {1 + LIMITS[name]:.0%} |"
        for name, seconds in others
    ]


def ready_rows(scratch: Path) -> list[str]:
    """Processor seconds until commands read their first tile, on a CPU; medians of three."""
    from tools.bench_grading import export

    model, weights, slides = scratch / "ready.pt", scratch / "ready.safetensors", scratch / "cohort"
    export("resnet18", WORKS["typical"], model)
    _save_weights("resnet18", weights)
    if not (scratch / "cohort-cache").exists():
        slidetl(["synth", str(slides), "--slides", "16", "--patients", "16", "--size", "1024", "--mpp", "2"])
        words = ["--cache", str(scratch / "cohort-cache"), "--mpp", "2", "--tile-size", "128"]
        slidetl(["tile", str(slides / "manifest.csv"), *words])
    cache, manifest = scratch / "cohort-cache", slides / "manifest.csv"
    words = [f"--data.manifest={manifest}", f"--data.cache={cache}", "--data.num_workers=0"]
    words += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={scratch}"]
    embed = [str(cache), "--backbone", "resnet18", "--pretrained", str(weights), "--device", "cpu"]
    rows = []
    for command, more, most in (
        ("fit", words, 6),
        ("grade", [str(model), str(next((slides / "slides").iterdir())), "--device", "cpu"], 4),
        ("embed", embed, 4),
    ):
        found = [_ready(command, more) for _ in range(4)][1:]  # the first reads the files into memory
        spent = median(found)
        what = f"| `{command}` ready to read, s of a processor | {spent:.1f} | {most:.1f} "
        rows.append(f"{what}| {spent / most:.0%} | at most; {min(found):.1f} to {max(found):.1f} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _ready(command: str, words: list[str]) -> float:
    said = subprocess.run(
        [sys.executable, "-m", "tools.ready", command, *words],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    return float(said.split()[-1])


def _save_weights(backbone: str, path: Path) -> Any:
    """Writes random weights of a network, and returns it."""
    from safetensors.torch import save_file

    from slidetl.models.backbones import Backbone
    from slidetl.models.spec import BackboneSpec

    network = Backbone(BackboneSpec(backbone)).eval()
    save_file({name: value.contiguous() for name, value in network.net.state_dict().items()}, path)
    return network


def fit_rows(cache: Path, device: str, workers: list[int]) -> list[str]:
    """Trains a ResNet-18 as ``slidetl fit`` does, in epochs of a second."""
    rows = []
    for number in workers:
        words = [sys.executable, "-m", "tools.bench_loader", str(cache), "--backbone", "resnet18"]
        words += ["--device", device, "--workers", str(number), "--threads", "1", "--repeats", "5"]
        words += ["--epoch", "160", "--only-train"]
        said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = [float(word) for word in said.split("step, s")[-1].replace(",", "").replace("%", "").split()]
        _, _, rate, alone, waiting, ready, batch, step = found
        what = f"`fit`, resnet18, bags of 48, {number} workers"
        rows.append(row(what, rate, alone, f"waiting {waiting:.1f} % (at most 10)"))
        note = f"trainer {ready:.1f} s, first batch {batch:.1f} s"
        first = "| first step of it, s after the card is ready"
        rows.append(f"{first} | {step:.1f} | 3.0 | {step / 3:.0%} | {note} |")
        print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda", help="cpu tries the program without a card"
    )
    parser.add_argument("--side", type=int, default=16384, help="of a slide, pixels")
    parser.add_argument("--slides", type=int, default=28, help="that are graded and embedded")
    parser.add_argument("--backbone", default="mobilenetv2_100", help="timm's name")
    parser.add_argument("--parts", nargs="+", default=PARTS, help="only these")
    parser.add_argument(
        "--keep", type=Path, help="folder for slides and cache, which another run finds there"
    )
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    import torch

    cores = len(os.sched_getaffinity(0))
    card = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    lines = [
        "# A GPU, beside its network alone",
        "",
        f"`python -m tools.bench_gpu`, {date.today().isoformat()}, {card}, {cores} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, timm {version('timm')}, pytorch-lightning "
        f"{version('pytorch-lightning')}.",
        "",
        "| work | seen, tiles/s | network alone, or limit | share | |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scratch = options.keep or Path(folder)
        os.environ["SLIDETL_HOME"] = str(scratch / "home")  # the user's list of trusted files stays as it is
        (scratch / "slides").mkdir(parents=True, exist_ok=True)
        slides = [scratch / "slides" / f"slide{number}.tiff" for number in range(options.slides)]
        for number, path in enumerate(slides):
            if path.exists():
                continue
            if number < _DRAWN:
                write_slide(path, options.side + 256 * number)
            else:
                path.hardlink_to(slides[number % _DRAWN])
        cache = scratch / "cache"
        if {"embed", "fit"} & set(options.parts):
            started = time.perf_counter()
            slidetl(["tile", str(scratch / "slides"), "--cache", str(cache), "--mpp", "0.5"])
            print(f"tiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        if "fit" in options.parts:
            lines += fit_rows(cache, options.device, [max(1, cores - 2)])
        if "grade" in options.parts:
            lines += grade_rows(scratch, options.backbone, slides, options.device)
        if "embed" in options.parts:
            lines += embed_rows(cache, options.backbone, options.device)
        if "ready" in options.parts:
            lines += ready_rows(scratch)
        if "penalties" in options.parts:
            lines += penalty_rows(scratch, options.device)
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
