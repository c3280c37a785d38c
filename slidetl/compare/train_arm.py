"""An arm with epochs: choices in the inner folds, then one training on the whole training part.

Each fit is what ``slidetl fit`` does with the same configuration and a manifest whose ``split`` column is the
fold. A unit that was killed goes on after its last whole fit.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentError
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LightningArgumentParser

from slidetl.analysis.similarity import linear_cka
from slidetl.compare.config import EPOCHS, with_values
from slidetl.compare.records import CurvePoint, Job, UnitResult
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import channels_first
from slidetl.data.manifest import ManifestRow
from slidetl.errors import UsageError
from slidetl.evaluation.calibration import fit_temperature, with_temperature
from slidetl.evaluation.comparison import PatientResults, patient_results
from slidetl.evaluation.comparison import Unit as ResultUnit
from slidetl.evaluation.metrics import accuracy, log_loss, qwk, rps
from slidetl.models.blocks import pretrained_backbone
from slidetl.models.network import GradingNetwork
from slidetl.tiles.store import SlideCache
from slidetl.training.drift import distances
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import SlidePrediction, read_predictions
from slidetl.training.similarity import embed_layers

# The earliest epoch counts whose score in the inner folds is this close to the best one, relatively: on
# twenty slides a smaller difference says nothing, and the earlier epoch has drifted less.
_PLATEAU = 0.02
_SIMILARITY_TILES = 512
_START, _LAST = "start", "last"  # names of the weights that are kept


def check_configs(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks configurations of arms before hours are spent on them.

    Raises:
        UsageError: what ``slidetl fit`` would say of one of them.
    """
    for arm, config in configs.items():
        try:
            _parse(config, Path("manifest.csv"), Path("cache"), ("0", "1"), 0)
        except UsageError as error:
            raise UsageError(f"arm {arm!r}: {error}") from error


def train_unit(job: Job, folder: Path) -> UnitResult:
    """Chooses in the inner folds, trains on the training part, and predicts the test part.

    Args:
        job: the unit; its recipe has ``fit``, ``trials`` and ``validate_every``.
        folder: for what is needed on the way.
    """
    fold, recipe = job.unit.fold, job.unit.recipe
    torch.set_num_threads(job.threads)
    chosen: dict[str, Any] = {}
    epochs: int | None = None
    temperature, curves = 1.0, list[CurvePoint]()
    if fold.inner:
        trials = recipe["trials"]
        for trial, values in enumerate(trials):
            for number, inner in enumerate(fold.inner):
                fit = _Fit(job, folder / f"trial-{trial}-inner-{number}", values)
                curves += fit.run(inner.train, inner.validation, f"inner-{number}", trial, keep=True)
        trial, epochs = choose(curves)
        chosen = trials[trial]
        held_out = list[SlidePrediction]()
        for number, inner in enumerate(fold.inner):
            fit = _Fit(job, folder / f"trial-{trial}-inner-{number}", chosen)
            held_out += fit.predict(inner.validation, epochs)
        temperature = fit_temperature(
            [row.grade for row in held_out if row.grade is not None],
            [row.probabilities for row in held_out],
        )
    final = _Fit(job, folder / "final", chosen)
    curve = final.run(fold.train, fold.test, "test", 0, epochs=epochs)
    draws, drift = final.examine(fold.test, recipe["tile_draws"], temperature)
    several_sites = len({row.site for row in job.rows}) > 1
    return UnitResult(
        predictions=tuple(final.predict(fold.test)),
        curves=tuple(curves + curve),
        draws=draws,
        drift=drift,
        similarity=final.similarity(fold.test),
        embeddings=final.embed((*fold.train, *fold.test) if several_sites else ()),
        chosen={**chosen, "epochs": epochs or final.max_epochs},
        temperature=temperature,
        nested=bool(fold.inner),
    )


def choose(curves: Sequence[CurvePoint]) -> tuple[int, int]:
    """The trial and the number of epochs by the ranked probability score, averaged over the inner folds.

    The trial is the one whose best epoch is best; of its epochs the earliest that comes within two per cent
    of that. The score is smooth where a kappa of twenty results jumps.

    Returns:
        Trial, from 0, and epochs, from 1.
    """
    scores: dict[tuple[int, int], list[float]] = {}
    for point in curves:
        scores.setdefault((point.trial, point.epoch), []).append(point.rps)
    means = {at: float(np.mean(values)) for at, values in scores.items()}
    trial, _ = min(means, key=lambda at: (means[at], at))
    best = min(score for at, score in means.items() if at[0] == trial)
    plateau = [
        epoch for (of, epoch), score in means.items() if of == trial and score <= best * (1 + _PLATEAU)
    ]
    return trial, min(plateau)


def results_of(predictions: Sequence[SlidePrediction], unit: ResultUnit) -> PatientResults:
    """One result for each patient, or slide, of those that have a grade."""
    graded = [(row.grade, row) for row in predictions if row.grade is not None]
    return patient_results(
        [grade for grade, _ in graded],
        [row.probabilities for _, row in graded],
        [row.patient_id for _, row in graded],
        unit,
    )


def draw_evenly(tiles: Sequence[int], n: int, seed: int) -> dict[int, NDArray[np.int64]]:
    """Draws about as many tiles from each slide, ``n`` at most; of more slides than that, from ``n``.

    Args:
        tiles: how many each slide has.
        n: tiles in all.
        seed: of the draw.

    Returns:
        Numbers of tiles, rising, by the number of their slide.
    """
    rng = np.random.default_rng(seed)
    slides = np.sort(rng.permutation(len(tiles))[:n])
    return {int(slide): np.sort(rng.permutation(tiles[slide])[: n // len(slides)]) for slide in slides}


class _Fit:
    """One training of the unit's configuration, in a folder of its own."""

    def __init__(self, job: Job, folder: Path, chosen: Mapping[str, Any]) -> None:
        self._job, self._folder = job, folder
        self._config = with_values(job.unit.recipe["fit"], chosen)
        self._weights = folder / "weights"
        self.max_epochs = int(self._config["trainer"].get("max_epochs", EPOCHS))

    def run(
        self,
        train: Sequence[str],
        monitored: Sequence[str],
        part: str,
        trial: int,
        *,
        epochs: int | None = None,
        keep: bool = False,
    ) -> list[CurvePoint]:
        """Trains, unless that was done, and returns the curve of the monitored part.

        Args:
            train: slides.
            monitored: slides that are graded now and then; nothing in the training looks at them.
            part: their name in the curve.
            trial: likewise.
            epochs: to stop after, on the schedule of ``trainer.max_epochs``; all of them by default.
            keep: keep the weights of each point of the curve, not only the last ones.
        """
        done = self._folder / "curve.json"
        if done.exists():
            return [CurvePoint(**point) for point in json.loads(done.read_text(encoding="utf-8"))]
        shutil.rmtree(self._folder, ignore_errors=True)
        self._weights.mkdir(parents=True)
        recipe = self._job.unit.recipe
        watch = _Watch(self._weights, part, trial, epochs, keep, recipe["unit"])
        every = min(recipe["validate_every"], epochs or self.max_epochs)
        with _quiet():
            model, data = self._build({"train": train, "val": monitored})
            self._trainer(every, [watch]).fit(model, data)
        text = json.dumps([asdict(point) for point in watch.points])
        (self._folder / "curve.tmp").write_text(text, encoding="utf-8")
        (self._folder / "curve.tmp").rename(done)
        return watch.points

    def predict(self, slides: Sequence[str], epochs: int | None = None) -> list[SlidePrediction]:
        """What the network says of slides, by its weights after so many epochs; the last by default."""
        name = _LAST if epochs is None else f"epoch-{epochs}"
        with _quiet():
            model, data = self._trained(slides, name)
            self._trainer(1, []).test(model, data, verbose=False)
        return read_predictions(self._folder / "test" / "predictions.csv")

    def examine(
        self, slides: Sequence[str], draws: int, temperature: float
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Looks closer at the trained network.

        Returns:
            Expected grades of slides, calibrated, each draw by as many tiles as the slide has, drawn from
            them with replacement; and how far each layer is from its pretrained weights, where the strategy
            uses them. Slides of one tile are left out.
        """
        with _quiet():
            model, data = self._trained(slides, _LAST)
            data.setup("test")
        network = model.network.eval()
        drift = {}
        if model.transfer.from_pretrained:
            anchors = dict(pretrained_backbone(network.backbone).net.named_parameters())
            found = distances(network.backbone.net, anchors)
            drift = {layer: apart / size for layer, (apart, size) in found.items()}
        rng = np.random.default_rng(self._job.unit.fold.seed)
        scores: dict[str, list[float]] = {}
        for slide in data.slides["test"] if draws else ():
            n_tiles = len(slide.cache)
            if n_tiles < 2:
                continue
            with torch.inference_mode():
                embeddings = _tile_embeddings(network, slide.cache, data.chunk_size)
                mask = torch.ones((1, n_tiles), dtype=torch.bool)
                graded = [  # one after the other: a slide's embeddings may be hundreds of megabytes
                    network.grade(embeddings[rng.integers(n_tiles, size=n_tiles)][None], mask)[0]
                    for _ in range(draws)
                ]
                probabilities = network.head.probabilities(torch.cat(graded)).double().numpy()
            grades = np.arange(probabilities.shape[1])
            scores[slide.row.slide_id] = (with_temperature(probabilities, temperature) @ grades).tolist()
        return scores, drift

    def embed(self, slides: Sequence[str]) -> NDArray[np.float32]:
        """Slides as the trained network pools them, ``[n, D]`` in their order."""
        pooled: dict[str, NDArray[np.float32]] = {}
        if not slides:
            return np.empty((0, 0), np.float32)
        with _quiet(), torch.inference_mode():
            model, data = self._trained(slides, _LAST)
            data.setup("test")
            network = model.network.eval()
            for slide in data.slides["test"]:
                tiles = _tile_embeddings(network, slide.cache, data.chunk_size)[None]
                mask = torch.ones(tiles.shape[:2], dtype=torch.bool)
                pooled[slide.row.slide_id] = network.aggregator(tiles, mask).embedding[0].float().numpy()
        return np.stack([pooled[slide] for slide in slides])

    def similarity(self, slides: Sequence[str]) -> dict[str, float]:
        """How alike each block is before and after training: linear CKA on tiles of the slides, unbiased.

        A block that makes the same of every tile is left out; nothing can be said from fewer than four tiles.
        """
        layers = []
        with _quiet():
            _, data = self._trained(slides, _START)
            data.setup("test")
            caches = [slide.cache for slide in data.slides["test"]]
            drawn = draw_evenly([len(cache) for cache in caches], _SIMILARITY_TILES, self._job.unit.fold.seed)
            tiles = np.concatenate([caches[number].read(part) for number, part in drawn.items()])
            if len(tiles) < 4:
                return {}
            for name in (_START, _LAST):
                model, _ = self._trained(slides, name)
                layers.append(embed_layers(model.network.backbone, tiles))
        before, after = layers
        found = {
            layer: linear_cka(values, after[layer], permutations=1).value for layer, values in before.items()
        }
        return {layer: value for layer, value in found.items() if np.isfinite(value)}

    def _trained(self, slides: Sequence[str], name: str) -> tuple[SlideGrader, SlideDataModule]:
        """The network as it was saved under a name, with slides as its test part."""
        model, data = self._build({"test": slides})
        weights = torch.load(self._weights / f"{name}.pt", weights_only=True, map_location="cpu")
        model.network.load_state_dict(weights)
        return model, data

    def _build(self, parts: Mapping[str, Sequence[str]]) -> tuple[SlideGrader, SlideDataModule]:
        manifest = self._folder / f"{'-'.join(parts)}.csv"
        of = {slide: part for part, slides in parts.items() for slide in slides}
        write_manifest(manifest, self._job.part(of), of)
        seed = self._job.unit.fold.seed
        pl.seed_everything(seed, workers=True, verbose=False)
        parser, config = _parse(self._config, manifest, self._job.cache, self._job.grades, seed)
        ready = parser.instantiate_classes(config)
        return ready.model, ready.data

    def _trainer(self, every: int, callbacks: list[Callback]) -> pl.Trainer:
        options = {
            "deterministic": "warn",
            "precision": "bf16-mixed" if torch.cuda.is_available() else "32-true",
            **self._config["trainer"],
            "max_epochs": self.max_epochs,
        }
        return pl.Trainer(
            **options,
            default_root_dir=self._folder,
            callbacks=callbacks,
            check_val_every_n_epoch=every,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def _tile_embeddings(network: GradingNetwork, cache: SlideCache, chunk: int) -> torch.Tensor:
    """``[N, D]`` of all tiles of a slide, so many at a time."""
    parts = np.array_split(np.arange(len(cache)), -(-len(cache) // chunk))
    return torch.cat([network.backbone(channels_first(cache.read(part))) for part in parts])


class _Watch(Callback):
    """Writes the curve and the weights, and stops after so many epochs."""

    def __init__(
        self, weights: Path, part: str, trial: int, epochs: int | None, keep: bool, unit: ResultUnit
    ) -> None:
        self.points: list[CurvePoint] = []
        self._unit: ResultUnit = unit
        self._weights, self._part, self._trial = weights, part, trial
        self._epochs, self._keep = epochs, keep
        self._seconds, self._started = 0.0, 0.0
        self._losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(pl_module, _START)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        self._losses = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()
        done = trainer.current_epoch + 1
        is_last = done == (self._epochs or trainer.max_epochs)
        if done % trainer.check_val_every_n_epoch == 0:  # type: ignore[operator] # always a number here
            assert isinstance(pl_module, SlideGrader)
            results = results_of(pl_module.validated, self._unit)
            self.points.append(
                CurvePoint(
                    part=self._part,
                    trial=self._trial,
                    epoch=done,
                    n=len(results.true),
                    seconds=round(self._seconds, 3),
                    train_loss=float(torch.stack(self._losses).mean()),
                    accuracy=float(accuracy(results.true, results.predicted)),
                    qwk=float(qwk(results.true, results.predicted, len(pl_module.grades))),
                    rps=float(rps(results.true, results.probabilities)),
                    log_loss=float(log_loss(results.true, results.probabilities)),
                )
            )
            if self._keep:
                self._save(pl_module, f"epoch-{done}")
        if is_last:
            self._save(pl_module, _LAST)
            trainer.should_stop = True

    def _stop_clock(self) -> None:
        if self._started:
            self._seconds += time.perf_counter() - self._started
        self._started = 0.0

    def _save(self, module: pl.LightningModule, name: str) -> None:
        assert isinstance(module, SlideGrader)
        torch.save(module.network.state_dict(), self._weights / f"{name}.pt")


def write_manifest(path: Path, rows: Sequence[ManifestRow], split: Mapping[str, str]) -> None:
    """Writes slides with their part in the ``split`` column, as ``slidetl fit`` reads it."""
    readers = max((len(row.reader_grades) for row in rows), default=0)
    columns = ["slide_id", "path", "patient_id", "grade", "site", "scanner", "stain", "block", "mpp", "split"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *(f"grade_reader{number + 1}" for number in range(readers))])
        for row in rows:
            values = [row.slide_id, row.path, row.patient_id, row.grade]
            values += [row.site, row.scanner, row.stain, row.block]
            values += [row.mpp, split[row.slide_id], *row.reader_grades]
            writer.writerow(["" if value is None else value for value in values])


def _parse(
    config: Mapping[str, Any], manifest: Path, cache: Path, grades: Sequence[str], seed: int
) -> tuple[LightningArgumentParser, Any]:
    """The parser of a training's configuration, and the configuration as it understands it."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(SlideGrader, "model")
    parser.add_lightning_class_args(SlideDataModule, "data")
    parser.add_class_arguments(pl.Trainer, "trainer", instantiate=False)
    data = {**config["data"], "manifest": str(manifest), "cache": str(cache)}
    data |= {"grades": list(grades), "seed": seed}
    model = {**config["model"], "grades": list(grades)}
    try:
        return parser, parser.parse_object({"model": model, "data": data, "trainer": dict(config["trainer"])})
    except ArgumentError as error:
        lines = [line.strip(" -:") for line in str(error).splitlines() if line.strip(" -:")]
        raise UsageError(" ".join(lines[:4])) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what Lightning says of every training: there are hundreds."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*LeafSpec.*is deprecated.*",
            ".*number of training batches.*is smaller than the logging interval.*",
            ".*Checkpoint directory.*exists.*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
