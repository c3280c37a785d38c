"""How fast bags of tiles come out of the training loader, and how long a training waits for them.

    python tools/bench_loader.py CACHE
    python tools/bench_loader.py CACHE --device cuda --backbone resnet18

CACHE is a folder that ``slidetl tile`` wrote; where there is none, synthetic slides are drawn and tiled
into it. First the loader alone: whole epochs are timed after one that starts the workers; the ways take
turns, and the medians are printed. With a backbone, then the training step of ``slidetl fit`` beside the
same loader: all layers from random weights, in bfloat16 on a GPU. The share of waiting is that of the
callback that ``fit`` has (:class:`~slidetl.training.waiting.WaitingReport`), over whole epochs after the
first.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch

from slidetl.cli import main as slidetl
from slidetl.data.augment import Augmentation, Pipeline
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import Bag, BagDataset, EpochBatches, EpochSampler, collate_bags
from slidetl.data.manifest import ManifestRow
from slidetl.data.resuming import ResumableLoader
from slidetl.data.study import CachedSlide
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import Scratch
from slidetl.tiles.store import SlideCache, groups
from slidetl.training.grader import SlideGrader
from slidetl.training.schedules import Constant
from slidetl.training.waiting import WaitingReport

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
    parser.add_argument("--only-train", action="store_true", help="leave out the loader alone")
    parser.add_argument("--tile-px", type=int, default=224, help="side of its tiles (224)")
    options = parser.parse_args(args)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    if not options.cache.exists():
        draw(options.cache, options.slides, options.slide_px, options.tile_px)

    caches = [SlideCache.open(path) for path in groups(options.cache)]
    slides = [
        CachedSlide(ManifestRow(0, cache.slide_id, cache.path, cache.slide_id, number % N_GRADES), cache)
        for number, cache in zip(range(options.epoch), itertools.cycle(caches), strict=False)
    ]
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
    """Takes the time until the first batch is there, and until its step is done."""

    def __init__(self, device: str) -> None:
        torch.zeros(1, device=device)  # the card is ready
        self._started = time.perf_counter()
        self.seconds: list[float] = []

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


def train(
    slides: list[CachedSlide], way: Way, options: argparse.Namespace
) -> tuple[float, float, float, list[float]]:
    """Trains as ``slidetl fit`` does.

    Returns:
        Medians over the epochs: tiles per second of training; as many as it would be without any waiting;
        and the share of waiting. And the seconds from the device being ready until the trainer is set up, the
        first batch is there, and its step is done.
    """
    data = SlideDataModule(
        "",
        str(options.cache),
        bag_size=options.bag_size,
        batch_size=options.batch_size,
        num_workers=way.workers,
        decode_threads=way.threads,
    )
    # What its setup would find.
    data.slides = {"train": tuple(slides), "val": (), "test": (), "predict": tuple(slides)}
    data.tile_spec = slides[0].cache.spec
    torch.manual_seed(0)
    grader = SlideGrader(BackboneSpec(options.backbone), transfer=Scratch(), schedule=Constant())
    report = WaitingReport()
    on_gpu = options.device == "cuda"
    first = FirstStep(options.device)  # ``fit``, too, builds its network before it takes the card
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers and logs; this is about nothing else
        pl.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            precision="bf16-mixed" if on_gpu else "32-true",
            deterministic="warn",
            max_epochs=options.repeats + 1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[report, first],
            default_root_dir=folder,
        ).fit(grader, data)
    tiles = sum(min(options.bag_size, len(slide.cache)) for slide in slides)
    timed = report.epochs[1:]  # the first starts the workers, and the libraries of the device
    return (
        statistics.median(tiles / (times.data_wait_s + times.compute_s) for times in timed),
        statistics.median(tiles / times.compute_s for times in timed),
        statistics.median(times.share for times in timed),
        first.seconds,
    )


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its news would stand within the table
    sys.exit(main())
