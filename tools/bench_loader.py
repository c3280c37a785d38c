"""How fast bags of tiles come out of the training loader, and how long a training waits for them.

    python tools/bench_loader.py CACHE
    python tools/bench_loader.py CACHE --device cuda --backbone resnet18

CACHE is a folder that ``slidetl tile`` wrote; where there is none, synthetic slides are drawn and tiled
into it. First the loader alone: whole epochs are timed after one that starts the workers; the ways take
turns, and the medians are printed. With a backbone, then ``slidetl fit`` with the same loader, from random
weights, in bfloat16 on a GPU, with its logs and checkpoints and a validation after each epoch. The share of
waiting is that of its own report (:class:`~slidetl.training.waiting.WaitingReport`), over whole epochs after
the first, with what is done between epochs; validation is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from slidetl.cli import main as slidetl
from slidetl.data.augment import Augmentation, Pipeline
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import Bag, BagDataset, EpochBatches, EpochSampler, collate_bags
from slidetl.data.manifest import ManifestRow
from slidetl.data.resuming import ResumableLoader
from slidetl.data.study import CachedSlide
from slidetl.models.backbones import Backbone
from slidetl.models.spec import BackboneSpec
from slidetl.tiles.store import SlideCache, groups
from slidetl.training.grader import SlideGrader
from slidetl.training.waiting import EpochTimes

N_GRADES = 5


# The same changes both ways: the symmetries, then brightness, contrast and saturation of most tiles.
AUGMENTED: dict[Literal["", "default", "albumentations"], Callable[[], Augmentation | Pipeline | None]] = {
    "": lambda: None,
    "default": Augmentation,
    "albumentations": lambda: Pipeline(
        [
            {"class_path": "albumentations.D4"},
            {
                "class_path": "albumentations.ColorJitter",
                "init_args": {
                    "brightness": (0.85, 1.15),
                    "contrast": (0.85, 1.15),
                    "saturation": (0.85, 1.15),
                    "hue": (0, 0),
                    "p": 0.8,
                },
            },
        ]
    ),
}


@dataclass(frozen=True, order=True)
class Way:
    """How bags are read: the change of tiles, processes, and threads in each."""

    augmented: Literal["", "default", "albumentations"]
    workers: int
    threads: int


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    some = [workers for workers in (0, 1, 2, 4, 8, 16) if workers <= cores]
    parser.add_argument("cache", type=Path, help="folder of a cache")
    parser.add_argument("--epoch", type=int, default=100, help="bags in an epoch, of slides in turn (100)")
    parser.add_argument("--bag-size", type=int, default=48, help="tiles in a bag (48)")
    parser.add_argument("--batch-size", type=int, default=4, help="bags in a batch (4)")
    parser.add_argument("--workers", type=int, nargs="+", default=some, help=f"processes ({some})")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="in each process (1 2)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs that are timed (5)")
    parser.add_argument("--backbone", help="also train this model of timm, e.g. resnet18")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="to train on (cpu)")
    parser.add_argument("--slides", type=int, default=8, help="to draw, where there is no cache (8)")
    parser.add_argument("--slide-px", type=int, default=4096, help="side of a drawn slide at 2 um/px (4096)")
    parser.add_argument("--keep", type=Path, help="folder for the logs and checkpoints of one training")
    parser.add_argument("--only-train", action="store_true", help="leave out the loader alone")
    parser.add_argument("--tile-px", type=int, default=224, help="side of its tiles (224)")
    options = parser.parse_args(args)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    if not options.cache.exists():
        draw(options.cache, options.slides, options.slide_px, options.tile_px)

    caches = [SlideCache.open(path) for path in groups(options.cache)]
    if options.backbone and min(len(caches), options.epoch) < 2:
        parser.error(
            f"training needs two different slides to validate on; there are {len(caches)} in {options.cache} "
            f"and {options.epoch} in --epoch: take more, or leave out --backbone"
        )
    slides = named(caches, options.epoch)
    spec = caches[0].spec
    print(
        f"{options.epoch} bags of {options.bag_size} tiles of {spec.tile_size_px} px ({spec.codec}) from "
        f"{len(caches)} slides, {options.batch_size} in a batch, median of {options.repeats} epochs; "
        f"{cores} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    ways = [
        Way(augmented, workers, threads)
        for augmented, workers, threads in itertools.product(AUGMENTED, options.workers, options.threads)
    ]
    print(f"\n{'the loader alone':22}{'workers':>9}{'threads':>9}{'tiles/s':>9}{'per core':>10}")
    timed = {} if options.only_train else time_loaders(slides, ways, options)
    for way, (rate, alone) in timed.items():
        name = f"read, {way.augmented}" if way.augmented else "read"
        # Of other processes the time is not known until they end; this one is not slowed by its neighbours.
        per_core = f"{alone:10.0f}" if not way.workers else ""
        print(f"{name:22}{way.workers:9}{way.threads:9}{rate:9.0f}{per_core}")
    if options.backbone:
        name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
        print(f"\ntraining {options.backbone} on {name}")
        print(
            f"{'workers':>9}{'threads':>9}{'tiles/s':>9}{'the step alone':>16}"
            f"{'waiting':>9}{'ready, s':>9}{'batch, s':>9}{'step, s':>9}"
        )
        for way in ways:
            if way.augmented == "default":
                rate, alone, share, first = train(slides, way, options)
                line = f"{way.workers:9}{way.threads:9}{rate:9.0f}{alone:16.0f}{share:9.1%}"
                print(line + "".join(f"{seconds:9.1f}" for seconds in first), flush=True)
    return 0


def draw(cache: Path, n_slides: int, slide_px: int, tile_px: int) -> None:
    """Makes a cache of synthetic slides at 2 um/px; they lie beside it."""
    data = cache.with_name(f"{cache.name}-slides")
    drawn = ["--slides", str(n_slides), "--patients", str(n_slides), "--size", str(slide_px), "--mpp", "2"]
    tiled = ["--cache", str(cache), "--mpp", "2", "--tile-size", str(tile_px)]
    for words in (["synth", str(data), *drawn], ["tile", str(data / "manifest.csv"), *tiled]):
        if slidetl(words):
            raise SystemExit(f"'slidetl {' '.join(words)}' failed")


def time_loaders(
    slides: list[CachedSlide], ways: list[Way], options: argparse.Namespace
) -> dict[Way, tuple[float, float]]:
    """Tiles per second of the loader alone, by the clock and by the processor time of this process."""
    loaders: dict[Way, ResumableLoader[Bag]] = {}
    for way in ways:
        augmentation = AUGMENTED[way.augmented]()
        loaders[way] = ResumableLoader(
            BagDataset(slides, options.bag_size, augmentation, seed=0, threads=way.threads),
            EpochBatches(EpochSampler(len(slides), seed=0), options.batch_size),
            num_workers=way.workers,
            persistent_workers=way.workers > 0,
            collate_fn=collate_bags,
        )
    rates: dict[Way, list[float]] = {way: [] for way in ways}
    alone: dict[Way, list[float]] = {way: [] for way in ways}
    for repeat in range(options.repeats + 1):
        for way, loader in loaders.items():
            loader.batch_sampler.sampler.set_epoch(repeat)
            started, computed = time.perf_counter(), time.process_time()
            tiles = sum(int(batch["mask"].sum()) for batch in loader)
            if repeat:  # the first starts the workers
                rates[way].append(tiles / (time.perf_counter() - started))
                alone[way].append(tiles / (time.process_time() - computed))
    return {way: (statistics.median(rates[way]), statistics.median(alone[way])) for way in ways}


class FirstStep(pl.Callback):
    """Takes the time until the trainer is set up, the first batch is there, and its step is done."""

    def __init__(self) -> None:
        self._started = 0.0
        self.seconds: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Waits for the card, and starts the clock."""
        torch.zeros(1, device=trainer.strategy.root_device)
        self._started = time.perf_counter()

    def _mark(self, number: int) -> None:
        if len(self.seconds) == number:
            if number and torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._started)

    def on_train_start(self, *_: object) -> None:
        """Notes when the trainer is set up."""
        self._mark(0)

    def on_train_batch_start(self, *_: object) -> None:
        """Notes the first."""
        self._mark(1)

    def on_train_batch_end(self, *_: object) -> None:
        """Notes the first."""
        self._mark(2)


def named(caches: Sequence[SlideCache], count: int) -> list[CachedSlide]:
    """Makes ``count`` graded slides of the caches in turn, each of its own name."""
    several = zip(range(count), itertools.cycle(caches), strict=False)
    names = ((number, f"{cache.slide_id}-{number}", cache) for number, cache in several)
    return [
        CachedSlide(ManifestRow(0, name, cache.path, name, number % N_GRADES), cache)
        for number, name, cache in names
    ]


def run(command: str, cache: Path, root: Path, parts: dict[str, list[CachedSlide]], *words: str) -> None:
    """Runs a command of training as ``slidetl`` does, on slides that stand for a manifest's."""

    def read(data: SlideDataModule, _: str | None) -> None:
        data.slides = {part: tuple(parts.get(part, ())) for part in ("train", "val", "test")}
        data.slides["predict"] = tuple(slide for several in data.slides.values() for slide in several)

    options = [f"--data.manifest={cache}", f"--data.cache={cache}", f"--trainer.default_root_dir={root}"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    with (
        mock.patch.object(SlideDataModule, "_read", read),
        contextlib.redirect_stdout(sys.stderr),  # its results would stand within the table
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # advice on workers and logs; this is about nothing else
        if slidetl([command, *options, *words]):
            raise SystemExit(f"'slidetl {command}' failed")


def save_weights(backbone: str, path: Path) -> Path:
    """Writes random weights of a network; rates do not depend on them."""
    network = Backbone(BackboneSpec(backbone))
    save_file({name: value.contiguous() for name, value in network.net.state_dict().items()}, path)
    return path


def newest_table(root: Path) -> Path:
    """Returns the metrics of the last training in a folder, which may have those of earlier ones."""
    tables = root.glob("logs/version_*/metrics.csv")
    return max(tables, key=lambda path: int(path.parent.name.removeprefix("version_")))


def train(
    slides: list[CachedSlide], way: Way, options: argparse.Namespace
) -> tuple[float, float, float, list[float]]:
    """Trains by ``slidetl fit``: with validation on four slides, logs, checkpoints and the report of drift.

    Returns:
        Medians over the epochs: tiles per second of training; as many as it would be without any waiting;
        and the share of waiting. And the seconds from the device being ready until the trainer is set up, the
        first batch is there, and its step is done.
    """
    first = FirstStep()
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        weights = save_weights(options.backbone, Path(folder) / "weights.safetensors")
        words = [f"--model.backbone.name={options.backbone}", f"--model.backbone.pretrained={weights}"]
        words += [f"--data.bag_size={options.bag_size}", f"--data.batch_size={options.batch_size}"]
        words += [f"--data.num_workers={way.workers}", f"--data.decode_threads={way.threads}"]
        words += [f"--trainer.max_epochs={options.repeats + 1}", f"--trainer.accelerator={options.device}"]
        words.append("--trainer.devices=1")
        parts = {"train": slides, "val": named([slide.cache for slide in slides], 4)}
        own = SlideGrader.configure_callbacks
        with mock.patch.object(SlideGrader, "configure_callbacks", lambda grader: [*own(grader), first]):
            run("fit", options.cache, root, parts, *words)
        with newest_table(root).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["time/compute"]]
    tiles = sum(min(options.bag_size, len(slide.cache)) for slide in slides)
    spent = [(float(row["time/data_wait"]), float(row["time/compute"])) for row in rows]
    # The first starts the workers, and the libraries of the device.
    timed = [EpochTimes(number, *pair) for number, pair in enumerate(spent)][1:]
    return (
        statistics.median(tiles / (times.data_wait_s + times.compute_s) for times in timed),
        statistics.median(tiles / times.compute_s for times in timed),
        statistics.median(times.share for times in timed),
        first.seconds,
    )


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its news would stand within the table
    sys.exit(main())
