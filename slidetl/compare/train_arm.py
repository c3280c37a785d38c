"""Trains an arm: chooses in the inner folds, then trains once on the whole training part.

Each training equals ``slidetl fit`` with the same configuration and the fold as the manifest's ``split``
column. A killed job resumes after its last whole training.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback

from slidetl.analysis.similarity import linear_cka
from slidetl.compare.config import EPOCHS, LENGTH, OF_TILES, PLATEAU, with_values
from slidetl.compare.plan import Job
from slidetl.compare.records import (
    CurvePoint,
    JobResult,
    is_of_tiles,
    predictions_from,
    read_data,
    read_recipe,
)
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import network_input
from slidetl.data.record import read_record
from slidetl.errors import UsageError, WeightsError
from slidetl.evaluation.calibration import fit_temperature, with_temperature
from slidetl.evaluation.comparison import Unit, patient_results
from slidetl.evaluation.metrics import accuracy, log_loss, qwk, rps
from slidetl.files import write_whole
from slidetl.models.backbones import read_pretrained, without_downloads
from slidetl.models.blocks import pretrained_backbone
from slidetl.models.network import GradingNetwork
from slidetl.models.spec import PUBLISHED, BackboneSpec
from slidetl.models.tensors import save_tensors
from slidetl.text import listed
from slidetl.tiles.features import read_features
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import SlideCache, describe_difference
from slidetl.training.checkpoint import read_checkpoint
from slidetl.training.configured import build_grader, build_trainer, parse_training, quiet
from slidetl.training.drift import distances
from slidetl.training.evaluation import NOT_FINITE, ChunkedEvaluation, Evaluation
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import SlidePrediction
from slidetl.training.similarity import embed_layers

_SIMILARITY_TILES, _SIMILARITY_PASS = 512, 64
_DATA_OF_A_NETWORK = ("bag_size", "batch_size", "augmentation", "sampling", "features", "tasks")
_SPEED = ("channels_last", "gradient_checkpointing")  # options of a backbone that leave its result
_NAME, _WEIGHTS = "model.backbone.name", "model.backbone.pretrained"
_START, _LAST = "start", "last"  # names of the weights that are kept


def check_recipes(recipes: Mapping[str, Mapping[str, Any]], allow: Sequence[str] = ()) -> None:
    """Checks the configurations of arms and of all their trials before hours are spent on them.

    Args:
        recipes: by the names of the arms; each has ``fit`` and ``trials``.
        allow: names outside slidetl that they may import.

    Raises:
        UsageError: ``slidetl fit`` would refuse one of them.
    """
    for arm, recipe in recipes.items():
        for trial in ({}, *filter(None, recipe["trials"])):
            try:
                parsed = parse_training(with_values(recipe["fit"], trial), ("0", "1"), 0, allow)
                BackboneSpec(**parsed.model.backbone.as_dict())
            except UsageError as error:
                raise UsageError(f"arm {arm!r}: {error}") from error


def check_arm(table: Path, arm: str, checkpoints: Sequence[Path], allow: Sequence[str] = ()) -> bool:
    """Refuses predictions of an arm that says nothing of checkpoints: its networks are others.

    Args:
        table: predictions in the folder of a comparison.
        arm: its name.
        checkpoints: of ``slidetl fit``, each with the model and data options of a trial of the arm, its
            length of training as far as the checkpoint says, and its tiles and slides.
        allow: names outside slidetl that these may import.

    Returns:
        True if the tiles and slides are the same, False if the comparison does not tell its own.

    Raises:
        UsageError: there is no record of the arm, or it has other options, slides or tiles, or no network.
    """
    recipe = read_recipe(table, arm)
    if "fit" not in recipe:
        raise UsageError(
            f"{table}: arm {arm!r} is no network that 'slidetl fit' trains: it says nothing of a checkpoint"
        )
    compared = read_data(table)
    if compared is None:
        warnings.warn(
            f"{table}: nothing beside it says of which slides and tiles, so the card does not call the "
            f"networks of arm {arm!r} trained alike; 'slidetl compare --report-only' records them",
            stacklevel=2,
        )
    weights = cache(_weights_sha256)
    for path in checkpoints:
        checkpoint = read_checkpoint(path, allow)
        if compared is not None:
            _check_data(f"{table}: arm {arm!r} says nothing of {path}", checkpoint, *compared)
        model, options = checkpoint["hyper_parameters"], checkpoint.get("options")
        lineage = [str(sha256) for sha256 in checkpoint.get("lineage", ())]
        data = options["data"] if options else None  # an older checkpoint has none
        found = _deciding(model, data or {}, model, allow) | _length_of(checkpoint)
        trials = [with_values(recipe["fit"], trial) for trial in recipe["trials"]]
        deciding = (
            _deciding(trial["model"], trial["data"], model, allow) | _length(trial["trainer"])
            for trial in trials
        )
        wanted = [_spelled_like(found, one, lineage, weights) for one in deciding]
        differences = [
            [
                f"{name} {found[name]}, the arm {one[name]}"
                for name in one
                if name in found
                and found[name] != one[name]
                and (data is not None or not name.startswith("data."))
            ]
            for one in wanted
        ]
        if fewest := min(differences, key=len):
            raise UsageError(
                f"{table}: arm {arm!r} says nothing of {path}, which has {'; '.join(fewest):.500}; train it "
                "with the options of the arm, or name another arm"
            )
    return compared is not None


def _deciding(
    model: Mapping[str, Any], data: Mapping[str, Any], like: Mapping[str, Any], allow: Sequence[str]
) -> dict[str, Any]:
    """Returns the options of a training that decide on its network, with their defaults, by dotted name."""
    kept = {name: data[name] for name in _DATA_OF_A_NETWORK if name in data}
    grades = like.get("grades", ("0", "1"))
    config = _without_unused({"model": model, "data": kept, "trainer": {}})
    parsed = parse_training(config, grades, 0, allow)
    options = {f"model.{name}": value for name, value in parsed.model.as_dict().items()}
    options |= {f"data.{name}": parsed.data.as_dict()[name] for name in _DATA_OF_A_NETWORK}
    backbone = options.pop("model.backbone")
    options |= {f"model.backbone.{name}": value for name, value in backbone.items() if name not in _SPEED}
    return options


def _length(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a trainer that decide on steps and their size, with their defaults."""
    usual = {"max_epochs": EPOCHS, "max_steps": -1, "limit_train_batches": 1.0, "gradient_clip_val": None}
    given = {name: value for name, value in trainer.items() if value is not None}  # null: the default
    options = {f"trainer.{name}": given.get(name, value) for name, value in usual.items()}
    return {**options, "batches per step": given.get("accumulate_grad_batches", 1)}


def _length_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of :func:`_length` that a checkpoint has; one of an older version has none."""
    found = {f"trainer.{name}": value for name, value in (checkpoint.get("trainer") or {}).items()}
    if step := checkpoint.get("step"):
        found["batches per step"] = math.prod(step.values())
    return found


def _check_data(
    what: str, checkpoint: Mapping[str, Any], spec: TileSpec, fingerprints: Mapping[str, str]
) -> None:
    """Refuses a checkpoint of other tiles or slides than a comparison; ``what`` begins the message."""
    if checkpoint.get("tile_spec"):
        trained_on = TileSpec.from_dict(checkpoint["tile_spec"])
        if trained_on != spec:
            difference = describe_difference(spec, trained_on)
            raise UsageError(f"{what}, trained on other tiles than those compared: {difference}")
    record = read_record(checkpoint)
    others = [
        slide.slide_id
        for slide in (record.slides if record is not None else ())
        if fingerprints.get(slide.slide_id, slide.fingerprint) != slide.fingerprint
    ]
    if others:
        raise UsageError(
            f"{what}: {len(others)} slides had another content in the comparison: {listed(others)}; compare "
            "and train on the same scans"
        )


def _without_unused(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out options of tiles where none is read: a base may have them for other arms or trials."""
    data = config["data"]
    unused = OF_TILES if data.get("bag_size") == 0 else ()
    return {**config, "data": {name: value for name, value in data.items() if name not in unused}}


def _spelled_like(
    found: Mapping[str, Any], arm: Mapping[str, Any], lineage: Sequence[str], weights: Callable[..., str]
) -> dict[str, Any]:
    """Names the network and the weights of an arm as a checkpoint does, where they are the same.

    Args:
        found: options of the checkpoint, by dotted name.
        arm: those of the arm.
        lineage: of the checkpoint.
        weights: computes the hash of a specification's weights.
    """
    spelled = dict(arm)
    if _path_in(arm[_NAME]) == _path_in(found[_NAME]):
        spelled[_NAME] = found[_NAME]
    sources = arm[_WEIGHTS], found[_WEIGHTS]
    are_published = [source in PUBLISHED for source in sources]
    if spelled[_NAME] == found[_NAME] and (
        all(are_published)
        or (not any(are_published) and Path(sources[0]).resolve() == Path(sources[1]).resolve())
        or (lineage and sources[0] != sources[1] and weights(arm[_NAME], sources[0]) == lineage[0])
    ):
        spelled[_WEIGHTS] = found[_WEIGHTS]
    return spelled


def _path_in(name: str) -> str | Path:
    """Returns the folder of a network in one, or the name of another."""
    return Path(name.removeprefix("local-dir:")).resolve() if name.startswith("local-dir:") else name


def _weights_sha256(name: str, pretrained: str) -> str:
    """Hashes the weights of a specification; empty if they are not on this machine."""
    try:
        with without_downloads({}):
            return read_pretrained(BackboneSpec(name, pretrained)).lineage[0]
    except WeightsError:
        return ""


def train_job(
    job: Job, folder: Path, threads: int = 1, allow: Sequence[str] = (), readers: int | None = None
) -> JobResult:
    """Chooses in the inner folds, trains on the training part, and predicts the test part.

    Args:
        job: its recipe has ``fit``, ``trials`` and ``validate_every``.
        folder: keeps each finished training, to resume a killed job.
        threads: to compute with.
        allow: as for :func:`check_recipes`.
        readers: as for :class:`slidetl.compare.pool.Workplace`.
    """
    fold, recipe = job.fold, job.recipe
    torch.set_num_threads(threads)
    chosen: dict[str, Any] = {}
    temperature, curves = 1.0, list[CurvePoint]()
    if fold.inner:
        trained: dict[int, list[_Training]] = {}
        for trial, values in enumerate(recipe["trials"]):
            for number, inner in enumerate(fold.inner):
                place = folder / f"trial-{trial}-inner-{number}"
                fit = _Fit(job, place, values, inner.train, inner.validation, allow, readers)
                trained.setdefault(trial, []).append(fit.run(f"inner-{number}", trial))
        curves = [point for trainings in trained.values() for one in trainings for point in one.points]
        trial = choose(recipe["trials"], curves)
        chosen = recipe["trials"][trial]
        held_out = [row for one in trained[trial] for row in one.predictions[-1]]
        temperature = fit_temperature(
            [row.grade for row in held_out if row.grade is not None],
            [row.probabilities for row in held_out],
            [row.patient_id for row in held_out],
        )
    final = _Fit(job, folder / "final", chosen, fold.train, fold.test, allow, readers, fold.external)
    curves = [*curves, *final.run("test", 0, keep_weights=True).points]
    predictions = final.predict()
    draws, pooled = final.examine(
        recipe["tile_draws"],
        temperature,
        pool=len({row.site for row in job.part((*fold.train, *fold.test))}) > 1,
    )
    slides = (*fold.train, *fold.test) if pooled else ()
    return JobResult(
        predictions=predictions,
        curves=tuple(curves),
        draws=draws,
        drift=final.drift(),
        similarity=final.similarity(),  # the last, since it may leave the network on a GPU
        embeddings=np.stack([pooled[slide] for slide in slides]) if slides else np.empty((0, 0), np.float32),
        chosen={**chosen, "epochs": final.max_epochs},
        temperature=temperature,
        nested=bool(fold.inner),
    )


def choose(trials: Sequence[Mapping[str, Any]], curves: Sequence[CurvePoint]) -> int:
    """Chooses a trial by the ranked probability score at the end of its trainings in the inner folds.

    Of the trials that differ from the best in the number of epochs alone, the shortest within two per cent of
    its score is chosen. The score is smooth, while a kappa of twenty results jumps. Earlier points of a curve
    choose nothing: there the rate is still high, and a training of so many epochs has another schedule.

    Args:
        trials: values by dotted name, :data:`LENGTH` perhaps among them.
        curves: of all trials and inner folds.

    Returns:
        Number of the trial.
    """
    ends: dict[tuple[int, str], CurvePoint] = {}
    for point in sorted(curves, key=lambda point: point.epoch):
        ends[point.trial, point.part] = point
    means = [
        float(np.mean([end.rps for (of, _), end in ends.items() if of == trial]))
        for trial in range(len(trials))
    ]
    best = int(np.argmin(means))
    alike = [
        number
        for number, trial in enumerate(trials)
        if {**trial, LENGTH: 0} == {**trials[best], LENGTH: 0}
        and means[number] <= means[best] * (1 + PLATEAU)
    ]
    return min(alike, key=lambda number: trials[number].get(LENGTH, 0))


def _all_graded(evaluation: Evaluation | None) -> tuple[SlidePrediction, ...]:
    """Returns the predictions, and refuses a network that does not grade every slide."""
    assert evaluation is not None
    if lost := evaluation.not_graded:
        raise UsageError(f"{len(lost)} slides are not graded ({listed(lost)}): {NOT_FINITE}; lower model.lr")
    return evaluation.predictions


def draw_evenly(tiles: Sequence[int], n: int, seed: int) -> dict[int, NDArray[np.int64]]:
    """Draws about as many tiles from each slide, ``n`` in all at most, if need be from ``n`` slides only.

    ``tiles`` is the number of tiles of each slide. Returns numbers of tiles, rising, by the number of their
    slide.
    """
    rng = np.random.default_rng(seed)
    slides = np.sort(rng.permutation(len(tiles))[:n])
    return {int(slide): np.sort(rng.permutation(tiles[slide])[: n // len(slides)]) for slide in slides}


@dataclass(frozen=True)
class _Training:
    """The learning curve of a training, and the predictions of the monitored slides at its points."""

    points: tuple[CurvePoint, ...]
    predictions: tuple[tuple[SlidePrediction, ...], ...]


class _Fit:
    """One training of the job's configuration; the network and the data are built once, when needed.

    Args:
        job: its recipe has the configuration.
        folder: for this training alone.
        chosen: values to change in the configuration, by dotted name.
        train: slides.
        monitored: slides to grade now and then; they do not influence the training.
        allow: as for :func:`check_recipes`.
        readers: as for :func:`train_job`.
        external: slides to predict beside the monitored ones; None for a training that predicts none.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        chosen: Mapping[str, Any],
        train: Sequence[str],
        monitored: Sequence[str],
        allow: Sequence[str],
        readers: int | None = None,
        external: Sequence[str] | None = None,
    ) -> None:
        self._job, self._folder, self._allow, self._readers = job, folder, allow, readers
        self._config = _without_unused(with_values(job.recipe["fit"], chosen))
        self._train, self._monitored = job.open(train), job.open(monitored)
        self._tested = () if external is None else (*self._monitored, *job.open(external))
        self._weights = folder / "weights"
        self.max_epochs = int(self._config["trainer"].get("max_epochs", EPOCHS))

    @cached_property
    def _built(self) -> tuple[SlideGrader, SlideDataModule]:
        seed = self._job.fold.seed
        pl.seed_everything(seed, workers=True, verbose=False)
        config = parse_training(self._config, self._job.grades, seed, self._allow)
        model, data = build_grader(config)
        parts = {"train": self._train, "val": self._monitored, "test": self._tested}
        module = SlideDataModule.from_slides(**parts, **data)
        module.cores = self._readers
        return model, module

    def run(self, part: str, trial: int, *, keep_weights: bool = False) -> _Training:
        """Trains, unless that was done before.

        Args:
            part: name of the monitored slides in the curve.
            trial: number in the curve.
            keep_weights: keep the first and the last weights, for the other methods.
        """
        done = self._folder / "training.json"
        found = json.loads(done.read_text(encoding="utf-8")) if done.exists() else None
        if found is not None and is_of_tiles(found, self._job):
            return _Training(
                tuple(CurvePoint(**point) for point in found["points"]),
                tuple(predictions_from(rows) for rows in found["predictions"]),
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        self._weights.mkdir(parents=True)
        recipe = self._job.recipe
        weights = self._weights if keep_weights else None
        watch = _Watch(weights, part, trial, recipe["unit"])
        with quiet():
            trainer = self._trainer(min(recipe["validate_every"], self.max_epochs), [watch])
            trainer.fit(*self._built)
            if not watch.points or watch.points[-1].epoch < trainer.current_epoch:  # between two points
                trainer.validate(*self._built, verbose=False)
                watch.add_point(trainer.current_epoch, self._built[0])
        training = _Training(tuple(watch.points), tuple(watch.predictions))
        self._job.check()  # a later run takes it by the key, which names data and weights
        write_whole(done, json.dumps({**asdict(training), "tiles": self._job.tiles}))
        return training

    def predict(self) -> tuple[SlidePrediction, ...]:
        """Predicts the monitored and the external slides by the last weights."""
        with quiet():
            model = self._loaded(_LAST)
            self._trainer(1, []).test(model, self._built[1], verbose=False)
        assert model.tested is not None
        return _all_graded(model.tested)

    def drift(self) -> dict[str, float]:
        """Measures the relative distance of each layer from its pretrained weights, if any."""
        with quiet():
            model = self._loaded(_LAST)
        if not model.transfer.from_pretrained:
            return {}
        backbone = model.network.backbone
        anchors = dict(pretrained_backbone(backbone).net.named_parameters())
        return {layer: apart / size for layer, (apart, size) in distances(backbone.net, anchors).items()}

    def examine(
        self, draws: int, temperature: float, *, pool: bool
    ) -> tuple[dict[str, list[float]], dict[str, NDArray[np.float32]]]:
        """Embeds every tile once, with the last weights.

        Args:
            draws: gradings of each monitored slide by as many tiles as it has, drawn from them with
                replacement; slides of one tile are left out.
            temperature: of these gradings.
            pool: pool the slides, too.

        Returns:
            The expected grades of each slide's draws; and the embedding ``[D]`` of each slide, or none.
        """
        scores: dict[str, list[float]] = {}
        pooled: dict[str, NDArray[np.float32]] = {}
        rng = np.random.default_rng(self._job.fold.seed)
        with quiet(), self._embedding() as (network, embed), torch.inference_mode():
            for slide in (*self._train, *self._monitored) if pool else self._monitored:
                n_tiles = len(slide.cache)
                drawn = draws if slide in self._monitored and n_tiles > 1 else 0
                if not (pool or drawn):
                    continue
                tiles = embed(slide.cache)
                mask = torch.ones((1, n_tiles), dtype=torch.bool)
                if pool:
                    embedding = network.aggregator(tiles[None], mask).embedding[0]
                    pooled[slide.row.slide_id] = embedding.float().numpy()
                if drawn:
                    graded = [  # one after the other: a slide's embeddings may be hundreds of megabytes
                        network.grade(tiles[rng.integers(n_tiles, size=n_tiles)][None], mask)[0]
                        for _ in range(drawn)
                    ]
                    rows = network.head.probabilities(torch.cat(graded).double()).numpy()
                    tempered = with_temperature(rows, temperature)
                    scores[slide.row.slide_id] = (tempered @ np.arange(rows.shape[1])).tolist()
        return scores, pooled

    @contextmanager
    def _embedding(self) -> Iterator[tuple[GradingNetwork, Callable[[SlideCache], torch.Tensor]]]:
        """Yields the network with the last weights, and a function that embeds all tiles of a slide.

        The latter returns ``[N, D]`` on the CPU. If the training had a GPU, the backbone computes there, as
        in a validation; the rest of the network stays on the CPU.
        """
        model = self._loaded(_LAST)
        network, data = model.network.eval(), self._built[1]
        trainer, evaluation = self._trainer(1, []), ChunkedEvaluation(network, model.tasks)
        device = trainer.strategy.root_device
        on_gpu = device.type == "cuda"

        def embed(cache: SlideCache) -> torch.Tensor:
            if data.features_instead:
                return torch.from_numpy(read_features(cache, data.features_instead)).float()
            parts = np.array_split(np.arange(len(cache)), -(-len(cache) // data.pass_size))
            inputs = (network_input(cache.read(part), cache.spec).to(device) for part in parts)
            with trainer.precision_plugin.forward_context() if on_gpu else nullcontext():
                return torch.cat([evaluation.embed(tiles, data.pass_size).cpu() for tiles in inputs])

        if on_gpu:
            network.backbone.to(device)
        try:
            yield network, embed
        finally:
            network.backbone.cpu()

    def similarity(self) -> dict[str, float]:
        """Computes the linear CKA of each block before and after training on monitored tiles, unbiased.

        Blocks of constant output are left out; with fewer than four tiles all are.
        """
        data, caches = self._built[1], [slide.cache for slide in self._monitored]
        if data.features_instead and any(cache.header.imported for cache in caches):
            return {}  # no tiles, and a frozen backbone is the same before and after
        drawn = draw_evenly([len(cache) for cache in caches], _SIMILARITY_TILES, self._job.fold.seed)
        tiles = np.concatenate([caches[number].read(part) for number, part in drawn.items()])
        if len(tiles) < 4:
            return {}
        with quiet():
            before, after = (
                embed_layers(
                    self._loaded(name).network.backbone,
                    tiles,
                    caches[0].spec,
                    min(_SIMILARITY_PASS, data.pass_size),
                    self._trainer(1, []).strategy.root_device,
                )
                for name in (_START, _LAST)
            )
        found = {
            layer: linear_cka(values, after[layer], permutations=1).value for layer, values in before.items()
        }
        return {layer: value for layer, value in found.items() if np.isfinite(value)}

    def _loaded(self, name: str) -> SlideGrader:
        """Returns the network with the weights saved under a name."""
        model, _ = self._built
        weights = torch.load(self._weights / f"{name}.pt", weights_only=True, map_location="cpu")
        model.network.load_state_dict(weights)
        return model

    def _trainer(self, every: int, callbacks: list[Callback]) -> pl.Trainer:
        options = {
            **self._config["trainer"],
            "max_epochs": self.max_epochs,
            "check_val_every_n_epoch": every,
        }
        return build_trainer(options, self._folder, callbacks)


class _Watch(Callback):
    """Keeps the curve, the predictions, and the first and the last weights."""

    def __init__(self, weights: Path | None, part: str, trial: int, unit: Unit) -> None:
        self.points: list[CurvePoint] = []
        self.predictions: list[tuple[SlidePrediction, ...]] = []
        self._weights, self._part, self._trial = weights, part, trial
        self._unit: Unit = unit
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
        if done % trainer.check_val_every_n_epoch == 0:  # type: ignore[operator] # always a number here
            assert isinstance(pl_module, SlideGrader)
            self.add_point(done, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(pl_module, _LAST)

    def add_point(self, epoch: int, grader: SlideGrader) -> None:
        """Adds the grader's latest validation to the curve."""
        self.predictions.append(_all_graded(grader.validated))
        self.points.append(self._point(epoch, len(grader.grades)))

    def _point(self, epoch: int, n_grades: int) -> CurvePoint:
        graded = [(row.grade, row) for row in self.predictions[-1] if row.grade is not None]
        results = patient_results(
            [grade for grade, _ in graded],
            [row.probabilities for _, row in graded],
            [row.patient_id for _, row in graded],
            self._unit,
        )
        return CurvePoint(
            *(self._part, self._trial, epoch, len(results.true), round(self._seconds, 3)),
            train_loss=float(torch.stack(self._losses).mean()),
            accuracy=float(accuracy(results.true, results.predicted)),
            qwk=float(qwk(results.true, results.predicted, n_grades)),
            rps=float(rps(results.true, results.probabilities)),
            log_loss=float(log_loss(results.true, results.probabilities)),
        )

    def _stop_clock(self) -> None:
        if self._started:
            self._seconds += time.perf_counter() - self._started
        self._started = 0.0

    def _save(self, module: pl.LightningModule, name: str) -> None:
        assert isinstance(module, SlideGrader)
        if self._weights is not None:
            save_tensors(self._weights / f"{name}.pt", module.network.state_dict())
