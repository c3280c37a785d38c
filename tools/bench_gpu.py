"""Measures what a GPU gets from each command that runs a network, beside the network alone.

Everything is made here and needs no download: slides of JPEG tiles (256 px, 4:2:0, 0.25 um per pixel), a
cache of them, and networks of random weights; rates do not depend on the weights. *Typical* tiles are 224 px
at 0.5 um per pixel, *aligned* ones 256 px at 0.25, which coincide with the slide's own. The network alone
runs on a batch that lies on the card, in the same process, right before or after. A row that misses its bound
is marked, and then the exit code is 1. A rate is held to 85 % of the slower of the network and of reading.

    python -m tools.bench_gpu --output tools/bench_gpu.txt
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from slidetl.cli import main as slidetl
from slidetl.tiles.readers import Readers
from slidetl.tiles.store import SlideCache, groups
from tools.bench_tiling import JPEG_TILE_PX, WORKS, Work, write_slide

Precision = Literal["float32", "bfloat16"]
PARTS = ["fit", "test", "export", "grade", "embed", "ready", "penalties"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
GRADED: tuple[tuple[str, Precision], ...] = (
    ("typical", "bfloat16"),
    ("aligned", "float32"),
    ("aligned", "bfloat16"),
)
LEAST = 0.85  # of the network's own rate, or of reading


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        work: its name.
        seen: rate or seconds.
        beside: rate of the network alone, or the limit.
        note: the rest.
        least, most: bounds of ``seen`` as a share of ``beside``, or of ``reading`` if that is slower.
        reading: rate of reading alone.
        digits: decimals of both numbers.
    """

    work: str
    seen: float
    beside: float
    note: str = ""
    least: float | None = None
    most: float | None = None
    reading: float = math.inf
    digits: int = 0

    @property
    def missed(self) -> str:
        """The bound that it misses; empty if none."""
        share = self.seen / min(self.beside, self.reading)
        if self.least is not None and not share >= self.least:
            return f"MISSES at least {self.least:.0%}"
        return f"MISSES at most {self.most:.0%}" if self.most is not None and not share <= self.most else ""

    def text(self, is_held: bool) -> str:
        """The line, with a mark of the bound that it misses."""
        numbers = " | ".join(f"{number:,.{self.digits}f}" for number in (self.seen, self.beside))
        marks = "; ".join(filter(None, (self.note, self.missed if is_held else "")))
        return f"| {self.work} | {numbers} | {self.seen / self.beside:.0%} | {marks} |"


def exit_code(rows: Iterable[Row], is_held: bool) -> int:
    """Returns 1 if bounds are held to and a row misses one."""
    return int(is_held and any(row.missed for row in rows))


def grade_rows(scratch: Path, backbone: str, slides: list[Path], device: str) -> list[Row]:
    """Grades all slides, once the first pass is done; the network alone runs before, in the same process."""
    from slidetl.grading.batch import grade_slides, output_names
    from slidetl.grading.options import GradeOptions
    from slidetl.publish.model_file import load_model
    from tools.bench_grading import export

    rows, readings = [], dict[str, float]()
    for kind, precision in GRADED:
        work, path = WORKS[kind], scratch / f"{backbone}.{kind}.pt"
        if kind not in readings:
            export(backbone, work, path)
            readings[kind] = reading_rate(slides, work)
        model = load_model(path, device, trusted=True)
        started = time.perf_counter()
        options = GradeOptions(force=True, precision=precision, profile=True)
        graded = list(grade_slides(model, output_names(slides), options))
        seconds = time.perf_counter() - started
        assert not any(one.reason for one in graded), graded
        rates = graded[-1].rates
        assert rates is not None  # asked for
        tiles = sum(one.result["tiles"] for one in graded)
        spoken = f"{kind} tiles of {work.side_px} px"
        what = f"`grade`, {len(slides)} slides, {tiles} {spoken}, {backbone}, {precision}"
        note = (
            f"reading alone {readings[kind]:,.0f}; first pass {rates.first_pass_s:.1f} s of {seconds:.1f} s"
        )
        pair = rates.everything, rates.network_alone
        rows.append(Row(what, *pair, note, least=LEAST, reading=readings[kind]))
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


def embed_rows(cache: Path, backbone: str, device: Literal["cpu", "cuda"]) -> list[Row]:
    """Embeds a whole cache."""
    import torch

    from slidetl.models.backbones import Backbone
    from slidetl.models.runner import Runner
    from slidetl.models.spec import BackboneSpec
    from slidetl.tiles.grid import TileSpec
    from slidetl.training.embed import embed_cache
    from slidetl.training.options import EmbedOptions
    from tools.bench_loader import save_weights

    rows = []
    caches = [SlideCache.open(path) for path in groups(cache)]
    place = torch.device(device)
    tiles, side = sum(len(opened) for opened in caches), caches[0].spec.tile_size_px
    weights = cache.parent / f"{backbone}.safetensors"
    network = Backbone(BackboneSpec(backbone, str(save_weights(backbone, weights)))).eval()
    reading, said = cache_rates(caches)
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
        note = f"{said}; first batch after {first:.1f} s of {ended - started:.1f} s"
        rows.append(Row(what, warm, alone, note, least=LEAST, reading=reading))
    return rows


def cache_rates(caches: list[SlideCache]) -> tuple[float, str]:
    """Reads a cache without a network: tiles per second in processes, and in words in threads, too."""
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
    return rate, f"reading alone {', '.join(found)} threads, {rate:,.0f} in {count} processes"


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


def penalty_rows(scratch: Path, device: str) -> list[Row]:
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
    beside = 1e3 * plain[1]
    return [
        Row(
            f"step with {name}, ms",
            1e3 * seconds,
            beside,
            "a step without it",
            most=1 + LIMITS[name],
            digits=1,
        )
        for name, seconds in others
    ]


def ready_rows(scratch: Path) -> list[Row]:
    """Processor seconds until commands read their first tile, on a CPU; the less of two runs."""
    from tools.bench_grading import export
    from tools.bench_loader import save_weights

    model, weights, slides = scratch / "ready.pt", scratch / "ready.safetensors", scratch / "cohort"
    export("resnet18", WORKS["typical"], model)
    save_weights("resnet18", weights)
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
        found = [_ready(command, more) for _ in range(2)]
        what = f"`{command}` ready to read, s of a processor"
        note = f"at most; {max(found):.1f} in the other run"
        rows.append(Row(what, min(found), most, note, most=1.0, digits=1))
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


def fit_rows(cache: Path, root: Path, device: str) -> list[Row]:
    """Trains a ResNet-18 by ``slidetl fit``, in epochs of a second; logs and checkpoints stay in ``root``."""
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    words = [sys.executable, "-m", "tools.bench_loader", str(cache), "--backbone", "resnet18"]
    words += ["--device", device, "--workers", str(workers), "--threads", "1", "--keep", str(root)]
    epochs, slides, bag = (5, 160, 48) if device == "cuda" else (1, 5, 2)
    words += ["--repeats", str(epochs), "--epoch", str(slides), "--bag-size", str(bag)]
    said = subprocess.run([*words, "--only-train"], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [float(word) for word in said.split("step, s")[-1].replace(",", "").replace("%", "").split()]
    _, _, rate, alone, waiting, ready, batch, step = found
    what = f"`fit`, resnet18, bags of {bag}, {workers} workers"
    note = f"trainer {ready:.1f} s, first batch {batch:.1f} s"
    return [
        Row(what, rate, alone, f"waiting {waiting:.1f} % (at most 10)", least=0.9),
        Row("first step of it, s after the card is ready", step, 3.0, note, most=1.0, digits=1),
    ]


def test_rows(cache: Path, root: Path, device: str) -> list[Row]:
    """Tests the checkpoint of the fit on slides of the cache by ``slidetl test``."""
    import torch

    from slidetl.models.precision import has_bfloat16
    from slidetl.training.grader import SlideGrader
    from tools.bench_loader import named, run

    caches = [SlideCache.open(path) for path in groups(cache)]
    slides = named(caches, len(caches))
    steps: list[tuple[float, int]] = []
    own = SlideGrader.test_step

    def step(grader: SlideGrader, batch: Any, batch_idx: int) -> None:
        own(grader, batch, batch_idx)
        steps.append((time.perf_counter(), len(batch["tiles"])))

    started = time.perf_counter()
    with mock.patch.object(SlideGrader, "test_step", step):
        run("test", cache, root, {"test": slides}, f"--trainer.accelerator={device}", "--trainer.devices=1")
    seconds, (begun, first) = time.perf_counter() - started, steps[0]
    tiles = sum(count for _, count in steps)
    note = f"first chunk after {begun - started:.1f} s of {seconds:.1f} s"
    # The grade of a slide is copied to the host, so that the last step ends with the card's work.
    rate = (tiles - first) / (steps[-1][0] - begun)
    precision: Precision = "bfloat16" if has_bfloat16(torch.device(device)) else "float32"
    what = f"`test`, {len(slides)} slides, {tiles} tiles, resnet18, {precision}"
    return [Row(what, rate, network_rate(root, caches, device, precision), note)]


def export_rows(cache: Path, root: Path, device: str) -> list[Row]:
    """Exports the checkpoint of the fit by ``slidetl export``, with slides of the cache as the training's."""
    from slidetl.publish import training_data
    from tools.bench_loader import named

    caches = [SlideCache.open(path) for path in groups(cache)]
    slides, spent, own = named(caches, max(5, len(caches))), [0.0], training_data.learn_familiar

    def learn(*given: Any) -> Any:
        begun = time.perf_counter()
        found = own(*given)
        spent[0] = time.perf_counter() - begun
        return found

    started = time.perf_counter()
    with (
        mock.patch.object(training_data, "training_studies", lambda *_: ()),
        mock.patch.object(training_data, "training_slides", lambda *_: tuple(slides)),
        mock.patch.object(training_data, "learn_familiar", learn),
        contextlib.redirect_stdout(sys.stderr),
    ):
        if slidetl(["export", str(_best(root)), "--output", str(root / "model.pt")]):
            raise SystemExit("'slidetl export' failed")
    seconds, tiles = time.perf_counter() - started, sum(min(64, len(slide.cache)) for slide in slides)
    what = f"`export`, {tiles} tiles of {len(slides)} training slides, resnet18, float32"
    note = f"with the first pass; {spent[0]:.1f} s of {seconds:.1f} s"
    return [Row(what, tiles / spent[0], network_rate(root, caches, device, "float32"), note)]


def network_rate(root: Path, caches: list[SlideCache], device: str, precision: Precision) -> float:
    """Measures the network of the fit alone; tiles per second. Its float32 is without TF32."""
    import torch

    from slidetl.models.precision import exact_float32
    from slidetl.models.runner import Runner
    from slidetl.tiles.grid import TileSpec
    from slidetl.training.checkpoint import load_grader

    place, side = torch.device(device), caches[0].spec.tile_size_px
    network = load_grader(_best(root)).network.backbone.eval().to(place)
    count = 256 if device == "cuda" else 8
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    with exact_float32(place), Runner(_in(precision, network), place, count, TileSpec(1.0, side)) as runner:
        return runner.rate(noise)


def _best(root: Path) -> Path:
    return root / "logs" / "version_0" / "checkpoints" / "best.ckpt"


def draw(folder: Path, count: int, side: int) -> list[Path]:
    """Draws slides, each larger than the one before and of another texture."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"slide{number:02d}.tiff" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    sides = [side + JPEG_TILE_PX * number for number in missing]
    context = multiprocessing.get_context("spawn")  # torch may hold threads here
    with ProcessPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 2), context) as pool:
        list(pool.map(write_slide, [paths[number] for number in missing], sides, missing))
    return paths


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda",
        help="cpu tries the program without a card, and holds to no bound",
    )
    parser.add_argument("--side", type=int, default=10240, help="of the smallest slide, pixels")
    parser.add_argument("--slides", type=int, default=28, help="that are graded and embedded")
    parser.add_argument("--backbone", default="mobilenetv2_100", help="timm's name")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="only these; test and export need fit"
    )
    parser.add_argument("--report-only", action="store_true", help="exit with 0 in spite of missed bounds")
    parser.add_argument(
        "--keep", type=Path, help="folder for slides and cache, which another run finds there"
    )
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(args)
    parts = set(options.parts)
    if {"test", "export"} & parts and "fit" not in parts:
        parser.error("the parts test and export need fit, for a checkpoint")
    if "fit" in parts and options.slides < 2:
        parser.error(f"the part fit needs at least 2 --slides to tell apart, not {options.slides}")
    import torch

    cores, started = len(os.sched_getaffinity(0)), time.perf_counter()
    card = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    is_held, rows = options.device == "cuda", list[Row]()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scratch = options.keep or Path(folder)
        # The user's list of trusted files stays as it is.
        with mock.patch.dict(os.environ, {"SLIDETL_HOME": str(scratch / "home")}):
            slides = draw(scratch / "slides", options.slides, options.side)
            cache, root = scratch / "cache", Path(folder) / "fit"
            if {"fit", "embed"} & parts:
                slidetl(["tile", str(scratch / "slides"), "--cache", str(cache), "--mpp", "0.5"])
            print(f"drawn and tiled in {time.perf_counter() - started:.0f} s", file=sys.stderr)
            measures: dict[str, Callable[[], list[Row]]] = {
                "fit": lambda: fit_rows(cache, root, options.device),
                "test": lambda: test_rows(cache, root, options.device),
                "export": lambda: export_rows(cache, root, options.device),
                "grade": lambda: grade_rows(scratch, options.backbone, slides, options.device),
                "embed": lambda: embed_rows(cache, options.backbone, options.device),
                "ready": lambda: ready_rows(scratch),
                "penalties": lambda: penalty_rows(scratch, options.device),
            }
            for part in (part for part in PARTS if part in parts):
                begun, found = time.perf_counter(), measures[part]()
                rows += found
                print(*(one.text(is_held) for one in found), sep="\n", file=sys.stderr)
                print(f"{part} in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    lines = [
        "# A GPU, beside its network alone",
        "",
        f"`python -m tools.bench_gpu`, {date.today().isoformat()}, {card}, {cores} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, timm {version('timm')}, pytorch-lightning "
        f"{version('pytorch-lightning')}; in {time.perf_counter() - started:.0f} s.",
        "",
        "| work | seen, tiles/s | network alone, or limit | share | |",
        "|---|---|---|---|---|",
        *(one.text(is_held) for one in rows),
    ]
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if options.report_only else exit_code(rows, is_held)


if __name__ == "__main__":
    sys.exit(main())
