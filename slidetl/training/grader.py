"""The LightningModule that trains and tests the grading of slides."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined] # not in its __all__
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from slidetl.data.datamodule import DEFAULT_BATCH_SIZE, SlideDataModule
from slidetl.data.datasets import Bag, Chunk
from slidetl.data.manifest import check_scale
from slidetl.data.tasks import Task
from slidetl.errors import CheckpointError, UsageError
from slidetl.evaluation.calibration import judged_probabilities
from slidetl.evaluation.metrics import GradeMetrics, grade_metrics
from slidetl.models.aggregators import GatedAttention, Pooling
from slidetl.models.backbones import Backbone, BackboneSpec, weights_sha256
from slidetl.models.heads import CumulativeLink, Head
from slidetl.models.network import GradingNetwork
from slidetl.models.penalties import Batch, Reference, Seen, recorded
from slidetl.models.targets import Targets, balanced_weights
from slidetl.models.transfer import TransferStrategy, WarmRestart
from slidetl.tiles.features import FeatureSource
from slidetl.tiles.grid import TileSpec
from slidetl.training.means import EpochMeans
from slidetl.training.multitask import TaskHeads, TaskOutcome, task_metrics
from slidetl.training.predictions import SlidePrediction, write_predictions
from slidetl.training.schedules import OneCycle, Schedule, rate_for_batch

_T = TypeVar("_T")

# The form in which jsonargparse takes an instance as the default of a protocol.
_WARM_RESTART = lazy_instance(WarmRestart)
_ONE_CYCLE = lazy_instance(OneCycle)


# Logged of the probabilities, beside the loss.
_QUALITY = ("rps", "calibration_error", "calibration_error_if_calibrated")


class SlideGrader(pl.LightningModule):
    """Grades slides end to end: bags of tiles in training, every tile in evaluation.

    Args:
        backbone: which network embeds a tile, and its pretrained weights.
        aggregator: makes an :class:`~slidetl.models.aggregators.Aggregator` for a length of embedding.
        head: makes a head for a given length of embedding and number of grades.
        transfer: how the pretrained weights are leaned on.
        grades: names of the grades, lowest first; set by ``data.grades``.
        lr: peak learning rate of the new layers; the strategy scales that of the backbone.
        weight_decay: of kernels, decoupled (AdamW).
        schedule: how the rate goes from step to step, relative to its peak.
        lr_scale_with_batch: whether ``lr`` is meant for a global batch of the default
            ``data.batch_size`` and grows in proportion to the real one: processes x accumulation x slides.
        targets: what counts as the truth of a training slide: smoothing, readers, bootstrapping.
        balance: whether each grade has the same weight in the loss, however rare it is in the training part.
        tasks: what is learned beside the grade, by heads of their own on the same backbone; their losses are
            added, each with its weight. ``targets`` and ``balance`` are about the grade alone.
    """

    def __init__(
        self,
        backbone: BackboneSpec = BackboneSpec(),  # noqa: B008 (frozen)
        aggregator: Callable[[int], Pooling] = GatedAttention,
        head: Callable[[int, int], Head] = CumulativeLink,
        transfer: TransferStrategy = _WARM_RESTART,
        grades: list[str] = ["0", "1", "2", "3", "4"],  # noqa: B006 (never changed)
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = _ONE_CYCLE,
        lr_scale_with_batch: bool = False,
        targets: Targets = Targets(),  # noqa: B008 (frozen)
        balance: bool = False,
        tasks: list[Task] = [],  # noqa: B006 (never changed)
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not lr > 0 or weight_decay < 0:
            raise UsageError(f"expected model.lr > 0 and model.weight_decay >= 0, not {lr}, {weight_decay}")
        check_scale(grades)
        self.grades = tuple(grades)
        self.transfer = transfer
        self.lr, self.weight_decay = lr, weight_decay
        self.schedule, self.lr_scale_with_batch = schedule, lr_scale_with_batch
        self.targets, self.balance = targets, balance
        embedder = Backbone(backbone)
        transfer.adapt(embedder)
        pooling = aggregator(embedder.num_features)
        self.network = GradingNetwork(embedder, pooling, head(pooling.out_features, len(grades)))
        self.tasks = TaskHeads(tasks, embedder.num_features, pooling.out_features)
        self.reference: Reference | None = None
        self.tile_spec: TileSpec | None = None
        self._total_steps = 1.0
        self._class_weight: Tensor | None = None  # [K]
        self._means = EpochMeans(self)
        self._kept_means: dict[str, Any] = {}  # of the epoch that a training is resumed in
        self._seed = 0
        self._features_sha256 = ""  # of the network that made the stored features, where some are used
        self._checkpoint = ""  # SHA-256 of the weights that predict
        self._embeddings: list[Tensor] = []  # of the slide whose chunks are coming in
        self._labels: list[dict[str, int | Tensor]] = []  # of its tasks, likewise
        self.validated: tuple[SlidePrediction, ...] = ()  # of the validation part, when it was last graded
        self._predictions: list[SlidePrediction] = []
        self._outcomes: dict[str, dict[str, TaskOutcome]] = {}  # by slide and task

    def setup(self, stage: str) -> None:
        """Takes the tiles' specification from the data, and starts the backbone where the strategy says."""
        if stage == "fit":
            self.tile_spec = self._data_spec()
            self._look_at_labels()
            if self.trainer.ckpt_path is None:  # a training that goes on has its weights already
                self.transfer.start(self.network.backbone)
                self._check_features(weights_sha256(self.network.backbone))
            self.reference = self.transfer.reference(self.network.backbone)
            if self.reference is not None:  # it is the same everywhere; DDP need not send it around each step
                names = [f"reference.{name}" for name, _ in self.reference.named_buffers()]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)  # type: ignore[no-untyped-call] # torch's

    def _check_features(self, sha256: str) -> None:
        """Refuses stored features of other weights than those that the training starts from."""
        data = getattr(self._trainer, "datamodule", None)
        source: FeatureSource | None = getattr(data, "feature_source", None)
        if data is None or source is None:
            return
        if not data.bag_size and any(weight.requires_grad for weight in self.network.backbone.parameters()):
            raise UsageError(
                "with data.bag_size 0 nothing goes through the backbone, but the strategy trains it; use "
                "slidetl.models.transfer.FrozenFeatures, or a bag_size above 0"
            )
        if source.weights_sha256 != sha256:
            raise UsageError(
                f"data.features {data.features!r} are of weights {source.weights_sha256[:12]}..., the "
                f"training starts from {sha256[:12]}...; run 'slidetl embed' with the same backbone and "
                "pretrained weights, and let the strategy start from them"
            )
        self._features_sha256 = sha256

    def _look_at_labels(self) -> None:
        """Counts the grades to balance them, and refuses to learn from labels that are not there."""
        if not (self.balance or self.targets.readers):
            return
        rows = [slide.row for slide in self.trainer.datamodule.slides["train"]]  # type: ignore[attr-defined] # set by fit
        if self.balance:
            counts = Counter(row.grade for row in rows)
            self._class_weight = balanced_weights([counts[grade] for grade in range(len(self.grades))])
        if self.targets.readers and all(grade is None for row in rows for grade in row.reader_grades):
            raise UsageError(
                "model.targets.readers needs readers' grades, and no training slide has any; give the "
                "manifest the columns grade_reader1, grade_reader2, ..."
            )

    def on_train_start(self) -> None:
        """Lets the strategy learn from training data what its penalties need."""
        if self.reference is not None and self.trainer.ckpt_path is None:
            self.transfer.prepare(self.network, self.reference, self._training_batches())
            self.reference.attention = {  # every process has seen slides of its own
                layer: self.trainer.strategy.reduce(weights, reduce_op="mean")
                for layer, weights in self.reference.attention.items()
            }
        self._seed = torch.initial_seed()
        self._means.load_state_dict(self._kept_means)
        if self.trainer.ckpt_path is not None:
            self._enter_epoch()  # Lightning does not say so when it goes on in the middle of one

    def on_train_batch_start(self, batch: Bag, batch_idx: int) -> None:
        """Has chance (dropout) depend on seed, step and process alone, whenever a training was resumed."""
        place = (self._seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def on_train_epoch_start(self) -> None:
        """Looks where the bags of the epoch shall come from, and switches to training."""
        self._attend()
        self._enter_epoch()

    def _enter_epoch(self) -> None:
        """Switches to training, all but what the strategy keeps still; Lightning leaves modes as they are."""
        self.train()
        self.transfer.set_training_mode(self.network.backbone, self.current_epoch)
        if self.trainer.world_size == 1:  # DDP has counted on a gradient of everything that trains
            frozen = set(self._frozen())
            for group in self.trainer.optimizers[0].param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(parameter not in frozen)

    def _attend(self) -> None:
        """Gives the attention for every tile of the training slides to the data, where it is asked for."""
        data = getattr(self.trainer, "datamodule", None)
        every = data.sampling.attends_every if isinstance(data, SlideDataModule) else 0
        if data is None or not every or not self.current_epoch or self.current_epoch % every:
            return
        self.eval()
        self._embeddings = []
        mine: dict[str, NDArray[np.float32]] = {}
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for chunk in data.attention_dataloader():
                embeddings = self._take_chunk(self.trainer.strategy.batch_to_device(chunk, self.device))
                if embeddings is None:
                    continue
                mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
                with torch.autocast(embeddings.device.type, enabled=False):
                    attention = self.network.aggregator(embeddings, mask).attention  # [1, H, N]
                mine[chunk["slide_id"]] = attention[0].mean(0).cpu().numpy()
        data.training_bags.attend({name: row for part in self._of_all(mine) for name, row in part.items()})

    def _of_all(self, mine: _T) -> list[_T]:
        """What each process has; every one must ask."""
        if self.trainer.world_size == 1:
            return [mine]
        everyone = [mine] * self.trainer.world_size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def configure_optimizers(self) -> Any:
        """AdamW with the strategy's parameter groups, under the schedule stepped per batch."""
        lr = self.peak_lr
        if self.lr_scale_with_batch:
            batch = round(lr / self.lr * DEFAULT_BATCH_SIZE)
            rank_zero_info(
                f"learning rate {lr:g}: model.lr {self.lr:g} is meant for {DEFAULT_BATCH_SIZE} slides per "
                f"step, and there are {batch}"
            )
        optimizer = torch.optim.AdamW(self.parameter_groups(lr), lr=lr)
        self._total_steps = self.trainer.estimated_stepping_batches
        accumulated = self.trainer.accumulate_grad_batches
        per_epoch = -(-self.trainer.num_training_batches // accumulated)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule.rate(step / per_epoch, self._total_steps / per_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The optimiser's parameter groups at a peak rate of ``lr``."""
        groups = self.transfer.parameter_groups(self.network, lr, self.weight_decay)
        for decays in (True, False):
            parameters = [weight for weight in self.tasks.parameters() if (weight.ndim > 1) == decays]
            if parameters:
                decay = self.weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": lr, "weight_decay": decay})
        return groups

    @property
    def peak_lr(self) -> float:
        """The rate of the new layers at the schedule's peak: ``lr``, scaled with the batch if asked for."""
        if not self.lr_scale_with_batch:
            return self.lr
        return rate_for_batch(
            self.lr,
            DEFAULT_BATCH_SIZE,
            devices=self.trainer.world_size,
            accumulation=self.trainer.accumulate_grad_batches,
            bags=self.trainer.datamodule.batch_size,  # type: ignore[attr-defined] # set by fit
        )

    def training_step(self, batch: Bag, batch_idx: int) -> Tensor:
        """Loss of a batch of bags, with the strategy's penalties."""
        tiles, mask, backbone = batch["tiles"], batch["mask"], self.network.backbone
        with recorded(backbone, self._watched) as activations:
            embeddings = self.network.embed(tiles) if tiles.shape[1] else None
        if "stored" in batch:
            embeddings, batch = _with_stored(embeddings, batch)
        assert embeddings is not None  # a bag without tiles has stored features
        logits, of_tasks = self._grade(embeddings, batch["mask"])
        loss = self._loss(logits, batch)
        self._means.add({"train/loss": loss}, len(logits))
        if of_tasks:
            loss = loss + self._task_losses(of_tasks, batch)
        if self.reference is None:
            return loss
        seen = Seen(tiles, mask, activations)
        penalties = self.transfer.penalties(self.network, self.reference, seen, self._progress)
        self._add_penalties(penalties, len(logits))
        return loss + sum(penalties.values())

    def _loss(self, logits: Tensor, batch: Bag) -> Tensor:
        """Of the grade."""
        head, target = self.network.head, batch["grade"]
        if self.targets != Targets():
            probabilities = head.probabilities(logits.detach())
            target = self.targets(target, batch["readers"], probabilities, self._progress)
        weight = self._class_weight.to(logits.device) if self._class_weight is not None else None
        return self._mean(*head.summed_loss(logits, target, class_weight=weight))

    def _task_losses(self, logits: dict[str, Tensor], batch: Bag) -> Tensor:
        """Of all further tasks, each with its weight."""
        total = torch.zeros((), device=self.device)
        summed = self.tasks.summed_losses(logits, batch["labels"])
        for task in self.tasks.tasks:
            loss = self._mean(*summed[task.name])
            self._means.add({f"train/{task.name}/loss": loss}, int(summed[task.name][1]))
            total = total + task.weight * loss
        return total

    def _mean(self, summed: Tensor, weight: Tensor) -> Tensor:
        """The mean over the batches of all processes, in the share that DDP's averaging makes whole."""
        if self._trainer is not None:
            weight = self.trainer.strategy.reduce(weight.clone(), reduce_op="mean")
        return summed / torch.where(weight > 0, weight, torch.ones_like(weight))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops the gradients that DDP made of what rests in this epoch."""
        for parameter in self._frozen():
            parameter.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Steps, and lets the strategy apply what is decoupled from the optimiser's moments."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.reference is not None:
            applied = self.transfer.after_step(
                self.network, self.reference, optimizer.param_groups, self._progress
            )
            self._add_penalties(applied, 1)

    def on_train_epoch_end(self) -> None:
        """Logs the losses and penalties, each the mean over the epoch."""
        for name, value in self._means.take().items():
            self.log(name, value, prog_bar=name == "train/loss", batch_size=1)

    @property
    def _watched(self) -> tuple[str, ...]:
        return self.transfer.watched(self.network.backbone) if self.reference is not None else ()

    @property
    def _progress(self) -> float:
        return self.global_step / self._total_steps

    def _frozen(self) -> list[torch.nn.Parameter]:
        return self.transfer.frozen(self.network.backbone, self.current_epoch)

    def _add_penalties(self, penalties: dict[str, Tensor], slides: int) -> None:
        self._means.add({f"penalty/{name}": value for name, value in penalties.items()}, slides)

    def _training_batches(self) -> Iterator[Batch]:
        for batch in self.trainer.train_dataloader or ():
            moved = self.trainer.strategy.batch_to_device(batch, self.device)
            yield moved["tiles"], moved["mask"], moved["grade"]

    def validation_step(self, batch: Chunk, batch_idx: int) -> None:
        """Takes one chunk of a slide."""
        self._evaluate(batch)

    def test_step(self, batch: Chunk, batch_idx: int) -> None:
        """Takes one chunk of a slide."""
        self._evaluate(batch)

    def predict_step(self, batch: Chunk, batch_idx: int) -> None:
        """Takes one chunk of a slide."""
        self._evaluate(batch)

    def on_validation_epoch_start(self) -> None:
        """Forgets what an evaluation that was cut short has left behind."""
        self._embeddings, self._labels, self._predictions, self._outcomes = [], [], [], {}

    def on_test_epoch_start(self) -> None:
        """Notes which weights it is that predict."""
        self.on_validation_epoch_start()
        self._checkpoint = weights_sha256(self.network)

    on_predict_epoch_start = on_test_epoch_start

    def _grade(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the grade and of the tasks, in float32 also where the backbone's precision is lower."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            pooled = self.network.aggregator(embeddings, mask).embedding
            return self.network.head(pooled), self.tasks(embeddings, pooled)

    def _take_chunk(self, chunk: Chunk) -> Tensor | None:
        """The embeddings ``[1, N, D]`` of the slide that the chunk ends, or None."""
        if "stored" in chunk:
            self._embeddings.append(chunk["stored"].float())
        else:
            self._embeddings.append(self.network.backbone(chunk["tiles"]).float())
        if not chunk["last"]:
            return None
        embeddings, self._embeddings = torch.cat(self._embeddings).unsqueeze(0), []
        return embeddings

    def _evaluate(self, chunk: Chunk) -> None:
        if "stored" in chunk and not self._features_sha256:
            self._check_features(weights_sha256(self.network.backbone))
        self._labels.append(chunk["labels"])
        embeddings = self._take_chunk(chunk)
        if embeddings is None:
            return
        labels, self._labels = self._labels, []
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        logits, of_tasks = self._grade(embeddings, mask)
        probabilities = self.network.head.probabilities(logits)[0].tolist()
        self._outcomes[chunk["slide_id"]] = self.tasks.outcomes(of_tasks, labels)
        self._predictions.append(
            SlidePrediction(
                slide_id=chunk["slide_id"],
                patient_id=chunk["patient_id"],
                grade=None if chunk["grade"] < 0 else chunk["grade"],
                probabilities=tuple(probabilities),
                tiles=embeddings.shape[1],
                site=chunk["site"],
                fold=getattr(getattr(self._trainer, "datamodule", None), "fold", ""),
                checkpoint=self._checkpoint,
            )
        )

    def on_validation_epoch_end(self) -> None:
        """Logs the figures of the validation part."""
        self.validated = tuple(self._take_predictions())
        self._log_metrics("val", self.validated)
        self._log_tasks("val", self._take_outcomes())

    def on_test_epoch_end(self) -> None:
        """Logs, prints and saves the figures and predictions of the test part."""
        predictions = self._take_predictions()
        outcomes = self._take_outcomes()
        metrics, quality = self._log_metrics("test", predictions)
        of_tasks = self._log_tasks("test", outcomes)
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir) / "test"
            write_predictions(folder / "predictions.csv", predictions)
            self._write_tasks(folder, predictions, outcomes)
            figures = {**quality, **metrics.to_json(), "grades": self.grades}
            if of_tasks:
                figures["tasks"] = {name: found.to_json() for name, found in of_tasks.items()}
            (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            draw_confusion(folder / "confusion.png", metrics, self.grades)
            rank_zero_info(f"{describe_metrics(metrics, self.grades)}\nwritten to {folder}")

    def on_predict_epoch_end(self) -> None:
        """Saves the predictions."""
        predictions, outcomes = self._take_predictions(), self._take_outcomes()
        if self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / "predict" / "predictions.csv"
            write_predictions(path, predictions)
            self._write_tasks(path.parent, predictions, outcomes)
            rank_zero_info(f"{len(predictions)} slides predicted, written to {path}")

    def _take_predictions(self) -> list[SlidePrediction]:
        """The predictions of all processes, each slide once."""
        mine, self._predictions = self._predictions, []
        everyone = [mine]
        if self.trainer.world_size > 1:
            everyone = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(everyone, mine)
        by_slide = {prediction.slide_id: prediction for part in everyone for prediction in part}
        return [by_slide[slide_id] for slide_id in sorted(by_slide)]

    def _take_outcomes(self) -> dict[str, dict[str, TaskOutcome]]:
        """Those of the further tasks, of all processes, by slide and task."""
        mine, self._outcomes = self._outcomes, {}
        everyone = [mine]
        if self.trainer.world_size > 1 and self.tasks.tasks:
            everyone = [{} for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(everyone, mine)
        return {slide_id: found for part in everyone for slide_id, found in part.items()}

    def _log_tasks(self, part: str, outcomes: dict[str, dict[str, TaskOutcome]]) -> dict[str, GradeMetrics]:
        """Logs the figures of each further task that has a label there."""
        found = {}
        for task in self.tasks.tasks:
            metrics = task_metrics(task, [of_slide[task.name] for of_slide in outcomes.values()])
            if metrics is None:
                continue
            found[task.name] = metrics
            shown = ("accuracy", "balanced_accuracy", *(("qwk", "mae") if task.ordinal else ()))
            for name in shown:
                value = getattr(metrics, name)
                self.log(f"{part}/{task.name}/{name}", value, rank_zero_only=False, batch_size=1)
        return found

    def _write_tasks(
        self,
        folder: Path,
        predictions: list[SlidePrediction],
        outcomes: dict[str, dict[str, TaskOutcome]],
    ) -> None:
        """Writes a table of predictions for each further scale of slides."""
        for task in self.tasks.tasks:
            if task.of_tiles:
                continue
            rows = []
            for row in predictions:
                outcome = outcomes[row.slide_id][task.name]
                grade = None if outcome.labels[0] < 0 else int(outcome.labels[0])
                rows.append(replace(row, grade=grade, probabilities=tuple(outcome.probabilities[0].tolist())))
            write_predictions(folder / f"predictions-{task.name}.csv", rows)

    def _log_metrics(
        self, part: str, predictions: Sequence[SlidePrediction]
    ) -> tuple[GradeMetrics, dict[str, Any]]:
        if not predictions:
            raise UsageError(
                f"the {part} part ended before a slide was complete; raise trainer.limit_{part}_batches"
            )
        true = [prediction.grade for prediction in predictions if prediction.grade is not None]
        metrics = grade_metrics(
            true, [prediction.predicted_grade for prediction in predictions], len(self.grades)
        )
        quality = judged_probabilities(true, [row.probabilities for row in predictions])
        figures = {
            f"{part}/accuracy": metrics.accuracy,
            f"{part}/balanced_accuracy": metrics.balanced_accuracy,
            f"{part}/qwk": metrics.qwk,
            f"{part}/mae": metrics.mae,
            f"{part}/macro_f1": metrics.macro_f1,
            f"{part}/loss": quality["log_loss"],
            **{f"{part}/{name}": quality[name] for name in _QUALITY},
        }
        for threshold, value in enumerate(quality["auroc"]):
            if value is not None:  # a part with no slide on one side of it has none
                figures[f"{part}/auroc_above_{threshold}"] = value
        # Every process computed the same figures from all predictions: nothing is left to reduce.
        shown = {f"{part}/{name}" for name in ("accuracy", "qwk", "loss")} if part == "val" else set()
        for name, value in figures.items():
            self.log(name, value, prog_bar=name in shown, rank_zero_only=False, batch_size=1)
        return metrics, quality

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the tiles were like; a network graded on others would be wrong without a word."""
        checkpoint["tile_spec"] = self.tile_spec.to_dict() if self.tile_spec else None
        checkpoint["epoch_means"] = self._means.state_dict()
        checkpoint["features_sha256"] = self._features_sha256
        checkpoint["lineage"] = list(self.network.backbone.lineage)
        if self.reference is not None:  # its weights are those of a file; the hash says which
            checkpoint["reference"] = {
                "sha256": self.reference.sha256,
                "attention": self.reference.attention,
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what :meth:`on_save_checkpoint` kept, and refuses data tiled otherwise."""
        trained_on = TileSpec.from_dict(checkpoint["tile_spec"]) if checkpoint.get("tile_spec") else None
        data_spec = self._data_spec()
        if trained_on and data_spec and trained_on != data_spec:
            _refuse_other_tiles(trained_on, data_spec)
        self.tile_spec = trained_on
        self._kept_means = checkpoint.get("epoch_means", {})
        self.network.backbone.lineage = tuple(str(sha256) for sha256 in checkpoint.get("lineage", []))
        if checkpoint.get("features_sha256"):
            self._check_features(checkpoint["features_sha256"])
        if self.reference is not None:
            self._restore_reference(self.reference, checkpoint.get("reference") or {})

    def _restore_reference(self, reference: Reference, kept: dict[str, Any]) -> None:
        if kept.get("sha256") != reference.sha256:
            raise CheckpointError(
                f"the training leaned on pretrained weights with sha256 {str(kept.get('sha256'))[:12]}, "
                f"those of {self.network.backbone.spec.pretrained!r} now have {reference.sha256[:12]}; "
                "go on with the weights of then"
            )
        reference.attention = kept["attention"]

    def _data_spec(self) -> TileSpec | None:
        return getattr(getattr(self._trainer, "datamodule", None), "tile_spec", None)


def _with_stored(embeddings: Tensor | None, batch: Bag) -> tuple[Tensor, Bag]:
    """Embeddings ``[B, N + M, D]``, those stored behind those computed, and the batch with their mask."""
    stored, missing = batch["stored"].float(), batch["stored"].shape[1]
    joined = stored if embeddings is None else torch.cat([embeddings.float(), stored], dim=1)
    labels = {  # those of tiles are padded: what is stored is there for the slide
        name: functional.pad(label, (0, missing), value=-1) if label.ndim == 2 else label
        for name, label in batch["labels"].items()
    }
    mask = torch.cat([batch["mask"], batch["stored_mask"]], dim=1)
    return joined, {**batch, "mask": mask, "labels": labels}


def _refuse_other_tiles(trained_on: TileSpec, found: TileSpec) -> None:
    ours, theirs = trained_on.to_dict(), found.to_dict()
    differences = ", ".join(f"{key} {ours[key]} -> {theirs[key]}" for key in ours if ours[key] != theirs[key])
    raise UsageError(
        f"the checkpoint was trained on other tiles ({differences}); use the cache that it was trained on"
    )


def describe_metrics(metrics: GradeMetrics, grades: tuple[str, ...]) -> str:
    """The figures and the confusion matrix as lines of text."""
    width = max(5, *(len(name) + 1 for name in grades))
    lines = [
        f"{metrics.n} slides: accuracy {metrics.accuracy:.3f}, QWK {metrics.format_qwk(3)}, "
        f"mean absolute error {metrics.mae:.3f} grades",
        "true \\ predicted".ljust(18) + "".join(name.rjust(width) for name in grades),
    ]
    for name, counts in zip(grades, metrics.confusion, strict=True):
        lines.append(name.rjust(17) + " " + "".join(str(count).rjust(width) for count in counts))
    return "\n".join(lines)


def draw_confusion(path: Path, metrics: GradeMetrics, grades: tuple[str, ...]) -> None:
    """Draws the confusion matrix as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.add_subplot(
        title=f"{metrics.n} slides: accuracy {metrics.accuracy:.2f}, QWK {metrics.format_qwk(2)}",
        xlabel="predicted grade",
        ylabel="true grade",
        xticks=range(len(grades)),
        yticks=range(len(grades)),
        xticklabels=grades,
        yticklabels=grades,
    )
    highest = max(max(row) for row in metrics.confusion)
    axes.imshow(metrics.confusion, cmap="Blues", vmin=0)
    for row, counts in enumerate(metrics.confusion):
        for column, count in enumerate(counts):
            axes.text(
                column, row, str(count), ha="center", va="center", color="w" if count > highest / 2 else "k"
            )
    figure.savefig(path, dpi=120)
