"""The LightningModule for training and testing a slide grader."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from slidetl.data.datamodule import DEFAULT_BATCH_SIZE, SlideDataModule
from slidetl.data.datasets import Bag, Chunk, with_stored
from slidetl.data.manifest import FIVE_GRADES, check_scale
from slidetl.data.record import StudyRecord, read_record
from slidetl.data.tasks import Task
from slidetl.errors import CacheMismatchError, UsageError
from slidetl.models.aggregators import GatedAttention, Pooling
from slidetl.models.backbones import Backbone, architecture_sha256, read_pretrained, weights_sha256
from slidetl.models.heads import CumulativeLink, Head
from slidetl.models.lora import without_low_rank
from slidetl.models.network import GradingNetwork
from slidetl.models.penalties import Batch, Reference, Seen, recorded
from slidetl.models.spec import BackboneSpec
from slidetl.models.targets import Targets, balanced_weights
from slidetl.models.transfer import TransferStrategy, WarmRestart
from slidetl.text import listed
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import describe_difference
from slidetl.training.evaluation import (
    NOT_FINITE,
    SAME_FOR_ALL,
    ChunkedEvaluation,
    Evaluation,
    GradedSlide,
    evaluate,
    gather,
    gather_slides,
)
from slidetl.training.means import EpochMeans
from slidetl.training.multitask import TaskHeads
from slidetl.training.room import RoomOnDevice
from slidetl.training.schedules import OneCycle, Schedule, rate_for_batch

_WARM_RESTART = WarmRestart()
_ONE_CYCLE = OneCycle()
_LENGTH = ("max_epochs", "max_steps", "limit_train_batches", "gradient_clip_val")  # of a trainer


class SlideGrader(pl.LightningModule):
    """Grades slides end to end: bags of tiles in training, every tile in evaluation.

    Args:
        backbone: the network that embeds a tile, and its pretrained weights.
        aggregator: builds an :class:`~slidetl.models.aggregators.Aggregator` for a length of embedding.
        head: builds a head for a length of embedding and a number of grades.
        transfer: strategy for using the pretrained weights.
        grades: names of the grades, lowest first; set by ``data.grades``.
        lr: peak learning rate of the new layers; the strategy scales the rate of the backbone.
        weight_decay: decoupled decay (AdamW) of kernels.
        schedule: learning rate at each step, relative to its peak.
        lr_scale_with_batch: take ``lr`` as the rate for a global batch of the default ``data.batch_size``,
            and scale it in proportion to the real one: processes x accumulation x slides.
        targets: training targets of a slide: smoothing, readers, bootstrapping.
        balance: weight all grades equally in the loss, however rare they are in the training part.
        tasks: label scales to learn beside the grade, by their own heads on the same backbone; their losses
            are added, each with its weight. ``targets`` and ``balance`` apply to the grade alone.

    Attributes:
        validated, tested: the latest evaluation of the validation and the test part; None before the first.
        told_apart: whether any two slides had different probabilities in any evaluation of the training;
            None before the first.
        predicted: the slides of the latest prediction.
        whole_epochs: length of the training that this fit is a part of, in epochs; 0 if it is the whole one.
    """

    validated: Evaluation | None = None
    tested: Evaluation | None = None
    predicted: tuple[GradedSlide, ...] = ()
    whole_epochs = 0
    told_apart: bool | None = None

    def __init__(
        self,
        backbone: BackboneSpec = BackboneSpec(),  # noqa: B008 (frozen)
        aggregator: Callable[[int], Pooling] = GatedAttention,
        head: Callable[[int, int], Head] = CumulativeLink,
        transfer: TransferStrategy = _WARM_RESTART,
        grades: list[str] = list(FIVE_GRADES),  # noqa: B006 (never changed)
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
        self.record: StudyRecord | None = None
        self._first_step: float = 0.0
        self._total_steps: float = 1.0
        self._class_weight: Tensor | None  # [K]; a buffer, since a copy to a GPU in each step waits for it
        self.register_buffer("_class_weight", None, persistent=False)
        self._means = EpochMeans(self)
        self._kept_means: dict[str, Any] = {}  # of the epoch of the checkpoint
        self._seed = 0
        self._step: dict[str, int] | None = None  # numbers whose product is the batches of a step
        self._features_sha256 = ""  # of the network behind the stored features; empty without them
        self._evaluation = ChunkedEvaluation(self.network, self.tasks)

    def forward(self, tiles: Tensor, mask: Tensor) -> Tensor:
        """Grades bags of tiles.

        Args:
            tiles: ``[B, N, 3, S, S] uint8`` RGB, of the size and spacing of :attr:`tile_spec`; for volumes
                ``[B, N, 1, S, S, S] float``, 0..1 over the window.
            mask: ``[B, N]`` bool, False for padding.

        Returns:
            Probabilities of the grades ``[B, K]``; each row sums to one. NaN for a slide without tiles.

        Raises:
            UsageError: tiles of another kind or shape, or the network only stands for stored features.
        """
        backbone = self.network.backbone
        backbone.check_network()
        if not backbone.takes_volumes and tiles.dtype != torch.uint8:
            raise UsageError(f"expected tiles of uint8, as SlideCache.read returns them, not {tiles.dtype}")
        logits, _ = self.network(tiles, mask)
        return self.network.head.probabilities(logits)

    def setup(self, stage: str) -> None:
        """Reads the tile specification from the data, and initialises the backbone by the strategy."""
        if self._data is not None and stage != "fit" and self.record is not None:
            self._data.follow(self.record, stage)
        # Deterministic operations would fill each new tensor first, some 800 a step of a ResNet-18.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a property
        if stage == "fit":
            self.record = self._data.record if self._data is not None else None
            self.tile_spec = self._data.tile_spec if self._data is not None else None
            self._check_tiles()
            self._check_precision()
            self._count_batches()
            self._weigh_grades()
            if self.trainer.ckpt_path is None:  # a resumed training loads its weights
                if self._data is not None and self.trainer.limit_train_batches:
                    self._data.read_ahead()
                self.transfer.start(self.network.backbone)
                self._warn_of_tiles()
                self.check_features(self._data)
            self.reference = self.transfer.reference(self.network.backbone)
            if self.reference is not None:  # equal in all processes; DDP need not broadcast it each step
                names = [f"reference.{name}" for name, _ in self.reference.named_buffers()]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)  # type: ignore[no-untyped-call] # torch's
        if self._data is not None and self.trainer.ckpt_path is None:
            self._data.start_from(self._origins)
            if stage == "fit":
                self.record = self._data.record

    @property
    def origin(self) -> StudyRecord | None:
        """The record of the checkpoint that a new training starts from; None for other initial weights."""
        return record_behind(self.network.backbone.spec) if self.transfer.from_pretrained else None

    @property
    def _origins(self) -> list[StudyRecord]:
        """The records of the checkpoints that the initial weights, and those of the reference, come from."""
        backbones = [self.network.backbone]
        if self.reference is not None:
            backbones.append(self.reference.backbone)
        return [StudyRecord.from_dict(backbone.record) for backbone in backbones if backbone.record]

    def _check_tiles(self) -> None:
        """Checks that the tiles fit the backbone."""
        backbone, tiles = self.network.backbone, self.tile_spec
        if tiles is None or (
            self._data is not None and self._data.feature_source and not self._data.bag_size
        ):
            return
        backbone.check_tiles(tiles)

    def _warn_of_tiles(self) -> None:
        """Warns if the weights were trained on other tiles."""
        is_read = self._data is None or not self._data.feature_source or self._data.bag_size
        if self.tile_spec is not None and is_read:
            for line in self.network.backbone.describe_other_tiles(self.tile_spec):
                rank_zero_warn(line)

    def _check_precision(self) -> None:
        """Refuses bfloat16 for volumes on a CPU: torch 2.15 gives gradients of 2 x 2 x 2 maps up to 1e36."""
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if self.network.backbone.takes_volumes and on_cpu and "bf16" in str(self.trainer.precision):
            raise UsageError(
                f"trainer.precision {self.trainer.precision}: on a CPU, gradients of 3-D convolutions are "
                "wrong in it; use 32"
            )

    def _count_batches(self) -> None:
        """Notes the batches of a step as configured: callbacks may change them for some epochs.

        Raises:
            UsageError: a callback schedules them.
        """
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # set elsewhere
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
            raise UsageError(
                "expected no GradientAccumulationScheduler in trainer.callbacks: rates and penalties "
                "would go by other steps than those made; set trainer.accumulate_grad_batches instead"
            )
        accumulated = self.trainer.accumulate_grad_batches
        self._step = {"processes": self.trainer.world_size, "accumulate_grad_batches": accumulated}

    def _weigh_grades(self) -> None:
        """Computes the weights of the grades, the scale of numbers, and checks the readers' grades."""
        slides = self._data.slides["train"] if self._data is not None else ()
        rows = [slide.row for slide in slides]
        if slides:
            self.tasks.standardise([slide.labels for slide in slides])
        self.targets.check_readers(row.reader_grades for row in rows)
        if self.balance:
            counts = Counter(row.grade for row in rows)
            weights = balanced_weights([counts[grade] for grade in range(len(self.grades))])
            self._class_weight = weights.to(self.device)

    def check_features(self, data: SlideDataModule | None, sha256: str | None = None) -> None:
        """Refuses stored features of other weights than the initial ones of the training, if it reads any.

        Args:
            data: where they are stored.
            sha256: of the initial weights; by default of those that the backbone has.

        Raises:
            UsageError: the features come from other weights, or would keep the backbone from training.
        """
        if data is None or data.feature_source is None:
            return
        backbone = self.network.backbone
        if sha256 is None:
            with without_low_rank(backbone):  # its updates are 0 at the start
                sha256 = "" if backbone.is_stored else weights_sha256(backbone)
        trains = any(weight.requires_grad for weight in backbone.parameters())
        network = None if backbone.is_stored else (backbone.spec.name, architecture_sha256(backbone))
        self._features_sha256 = data.check_features(sha256, trains, backbone.num_features, network)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Adds the callbacks of every training."""
        return [RoomOnDevice()]

    def on_train_start(self) -> None:
        """Prepares the penalties of the strategy on training data."""
        if self.reference is not None and self.trainer.ckpt_path is None:
            self.transfer.prepare(self.network, self.reference, self._training_batches())
            self.reference.attention = {  # each process used different slides
                layer: self.trainer.strategy.reduce(weights, reduce_op="mean")
                for layer, weights in self.reference.attention.items()
            }
        self._seed = torch.initial_seed()
        self._means.load_state_dict(self._kept_means)
        if self.trainer.ckpt_path is not None:
            self._enter_epoch()  # Lightning skips this hook on resuming within an epoch

    def on_train_batch_start(self, batch: Bag, batch_idx: int) -> None:
        """Seeds dropout by seed, step and process alone, so that resuming changes nothing."""
        place = (self._seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def on_train_epoch_start(self) -> None:
        """Updates the attention for sampling, and switches to training mode."""
        self._attend()
        self._enter_epoch()

    def _enter_epoch(self) -> None:
        """Switches to training mode, except frozen parts; Lightning leaves modes as they are."""
        self.train()
        self.transfer.set_training_mode(self.network.backbone, self.current_epoch)
        if self.trainer.world_size == 1:  # DDP expects a gradient of every trained parameter
            frozen = set(self._frozen())
            for group in self.trainer.optimizers[0].param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(parameter not in frozen)

    def _attend(self) -> None:
        """Computes the attention for every training tile, if the sampling uses it."""
        every = self._data.sampling.attends_every if self._data is not None else 0
        if self._data is None or not every or not self.current_epoch or self.current_epoch % every:
            return
        self.eval()
        self._evaluation.start()
        mine: dict[str, NDArray[np.float32]] = {}
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for chunk in self._data.attention_dataloader():
                mine |= self._evaluation.attention(self.trainer.strategy.batch_to_device(chunk, self.device))
        self._data.training_bags.attend({name: row for part in gather(mine) for name, row in part.items()})

    def configure_optimizers(self) -> Any:
        """Builds AdamW with the strategy's parameter groups, and the schedule stepped per batch."""
        lr = self.peak_lr
        if self.lr_scale_with_batch:
            batch = round(lr / self.lr * DEFAULT_BATCH_SIZE)
            rank_zero_info(
                f"learning rate {lr:g}: model.lr {self.lr:g} is meant for {DEFAULT_BATCH_SIZE} slides per "
                f"step, and there are {batch}"
            )
        elif self._data is not None and (processes := self.trainer.world_size) > 1:
            rank_zero_info(
                f"{processes} processes, {processes} x {self._data.batch_size} slides per step, at the "
                f"learning rate {lr:g} of one process; model.lr_scale_with_batch scales it with the slides"
            )
        optimizer = torch.optim.AdamW(self.parameter_groups(lr), lr=lr)
        self._total_steps = self.trainer.estimated_stepping_batches
        accumulated = self.trainer.accumulate_grad_batches
        per_epoch = -(-self.trainer.num_training_batches // accumulated)
        if self.whole_epochs:
            self._first_step = self.trainer.current_epoch * per_epoch
            self._total_steps = self.whole_epochs * per_epoch
        first = self._first_step
        self._check_end()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: self.schedule.rate((first + step) / per_epoch, self._total_steps / per_epoch),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _check_end(self) -> None:
        """Refuses options that follow the progress of a training if no end is planned: it would stay at 0."""
        if not math.isinf(self._total_steps):
            return
        ramps = {name: value for name, value in vars(self.transfer).items() if name.endswith("_end")}
        waits = [f"model.transfer.{name}" for name, value in ramps.items() if value is not None]
        if self.targets.bootstrap != "none" and self.targets.bootstrap_after:
            waits.append("model.targets.bootstrap_after")
        if waits:
            raise UsageError(
                f"{', '.join(waits)} would have no effect in a training without a planned end; set "
                "trainer.max_epochs or max_steps"
            )

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Returns the optimiser's parameter groups for a peak rate ``lr``."""
        groups = self.transfer.parameter_groups(self.network, lr, self.weight_decay)
        return [*groups, *self.tasks.parameter_groups(lr, self.weight_decay)]

    @property
    def peak_lr(self) -> float:
        """The peak rate of the new layers: ``lr``, scaled with the batch on request."""
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
        """Computes the loss of a batch of bags, penalties included."""
        tiles, mask, backbone = batch["tiles"], batch["mask"], self.network.backbone
        with recorded(backbone, self._watched) as activations:
            embeddings = self.network.embed(tiles) if tiles.shape[1] else None
        if "stored" in batch:
            embeddings, batch = with_stored(embeddings, batch)
        assert embeddings is not None  # a bag without tiles has stored features
        logits, of_tasks = self._evaluation.grade(embeddings, batch["mask"])
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
        """Computes the loss of the grade."""
        head, target = self.network.head, batch["grade"]
        if self.targets != Targets():
            probabilities = head.probabilities(logits.detach())
            target = self.targets(target, batch["readers"], probabilities, self._progress)
        return self._mean(*head.summed_loss(logits, target, class_weight=self._class_weight))

    def _task_losses(self, logits: dict[str, Tensor], batch: Bag) -> Tensor:
        """Sums the weighted losses of all tasks beside the grade."""
        total = torch.zeros((), device=self.device)
        summed = self.tasks.summed_losses(logits, batch["labels"], batch.get("votes"))
        for task in self.tasks.tasks:
            loss = self._mean(*summed[task.name])
            self._means.add({f"train/{task.name}/loss": loss}, summed[task.name][1])
            total = total + task.weight * loss
        return total

    def _mean(self, summed: Tensor, weight: Tensor) -> Tensor:
        """Divides by the mean weight of all processes: DDP's averaging then gives the global mean."""
        if self._trainer is not None:
            weight = self.trainer.strategy.reduce(weight.clone(), reduce_op="mean")
        return summed / torch.where(weight > 0, weight, torch.ones_like(weight))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops the gradients of parameters frozen in this epoch; DDP computes them."""
        for parameter in self._frozen():
            parameter.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Steps, then applies the strategy's penalties decoupled from the optimiser's moments."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.reference is not None:
            applied = self.transfer.after_step(
                self.network, self.reference, optimizer.param_groups, self._progress
            )
            self._add_penalties(applied, 1)

    def on_train_epoch_end(self) -> None:
        """Logs the mean losses and penalties of the epoch."""
        for name, value in self._means.take().items():
            self.log(name, value, prog_bar=name == "train/loss", batch_size=1)

    @property
    def _watched(self) -> tuple[str, ...]:
        return self.transfer.watched(self.network.backbone) if self.reference is not None else ()

    @property
    def _progress(self) -> float:
        return (self._first_step + self.global_step) / self._total_steps

    def _frozen(self) -> list[torch.nn.Parameter]:
        return self.transfer.frozen(self.network.backbone, self.current_epoch)

    def _add_penalties(self, penalties: dict[str, Tensor], slides: int) -> None:
        self._means.add({f"penalty/{name}": value for name, value in penalties.items()}, slides)

    def _training_batches(self) -> Iterator[Batch]:
        for batch in self.trainer.train_dataloader or ():
            moved = self.trainer.strategy.batch_to_device(batch, self.device)
            yield moved["tiles"], moved["mask"], moved["grade"]

    def validation_step(self, batch: Chunk, batch_idx: int) -> None:
        """Evaluates one chunk of a slide."""
        if "stored" in batch and not self._features_sha256:
            self.check_features(self._data)
        self._evaluation.take(batch, self._data.fold if self._data is not None else "")

    test_step = predict_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Discards the remains of an interrupted evaluation."""
        self._evaluation.start()

    def on_test_epoch_start(self) -> None:
        """Records the SHA-256 of the predicting weights."""
        self._evaluation.start(weights_sha256(self.network))

    on_predict_epoch_start = on_test_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Scores and logs the validation part."""
        self.validated = self._scored("val")

    def on_test_epoch_end(self) -> None:
        """Scores and logs the test part."""
        self.tested = self._scored("test")

    def on_predict_epoch_end(self) -> None:
        """Gathers the predictions."""
        self.predicted = gather_slides(self._evaluation.slides, "predict")

    def _scored(self, part: str) -> Evaluation:
        evaluation = evaluate(
            gather_slides(self._evaluation.slides, part), self.tasks.tasks, len(self.grades)
        )
        self.told_apart = bool(self.told_apart) or evaluation.tells_apart
        if not evaluation.tells_apart:
            rank_zero_warn(f"all {len(evaluation.slides)} slides of the {part} part {SAME_FOR_ALL}")
        if part == "val" and (lost := evaluation.not_graded):
            rank_zero_warn(
                f"{len(lost)} slides of the val part are not graded ({listed(lost)}), so this epoch is not "
                f"chosen: {NOT_FINITE}"
            )
        shown = ("accuracy", "qwk", "loss") if part == "val" else ()
        # Every process computes the same metrics from all predictions: no reduction needed.
        for name, value in evaluation.scalars(self.tasks.tasks).items():
            if (
                part == "val" and evaluation.not_graded
            ):  # the rest would flatter this epoch in the choice of the best
                value = float("nan")
            self.log(f"{part}/{name}", value, prog_bar=name in shown, rank_zero_only=False, batch_size=1)
        return evaluation

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the tile specification, the study record and hashes, to refuse other data on loading."""
        checkpoint["record"] = self.record.to_dict() if self.record is not None else None
        checkpoint["tile_spec"] = self.tile_spec.to_dict() if self.tile_spec else None
        checkpoint["epoch_means"] = self._means.state_dict()
        checkpoint["told_apart"] = self.told_apart
        checkpoint["features_sha256"] = self._features_sha256
        checkpoint["options"] = self._data.options if self._data is not None else {}
        if self._trainer is not None:
            checkpoint["step"] = self._step
            metrics = self.trainer.callback_metrics  # to tell a best epoch without the states of callbacks
            checkpoint["metrics"] = {name: float(value) for name, value in metrics.items()}
            checkpoint["trainer"] = {name: getattr(self.trainer, name) for name in _LENGTH}
        checkpoint["architecture"] = self.network.backbone.architecture
        checkpoint["lineage"] = list(self.network.backbone.lineage)
        if self.reference is not None:  # its weights come from a file, identified by the hash
            checkpoint["reference"] = self.reference.to_checkpoint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the values of :meth:`on_save_checkpoint`, and refuses data tiled differently."""
        trained_on = TileSpec.from_dict(checkpoint["tile_spec"]) if checkpoint.get("tile_spec") else None
        data_spec = self._data.tile_spec if self._data is not None else None
        if trained_on and data_spec and trained_on != data_spec:
            difference = describe_difference(data_spec, trained_on)
            raise CacheMismatchError(
                f"the checkpoint was trained on other tiles: {difference}; use its cache"
            )
        self.tile_spec = trained_on
        self.record = read_record(checkpoint)
        if self._data is not None and self.record is not None:
            self._data.follow(self.record, str(self.trainer.state.fn))
            if self.trainer.training:  # the record may divide the study differently
                self._weigh_grades()
                self.record = self._data.record
        self._kept_means = checkpoint.get("epoch_means", {})
        self.told_apart = checkpoint.get("told_apart", True)  # older ones do not say
        self.network.backbone.lineage = tuple(str(sha256) for sha256 in checkpoint.get("lineage", []))
        features = checkpoint.get("features_sha256", "")
        if self._data is not None and self.trainer.training:
            self._check_step(checkpoint)
            self._data.check_same_features(bool(features))
        if features:
            self.check_features(self._data, features)
        if self.reference is not None:
            self.reference.restore(checkpoint.get("reference") or {})

    def _check_step(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume with other batches per step; older checkpoints do not say.

        The schedule counts steps, and within an epoch the loader of each process its batches.
        """
        then, now = checkpoint.get("step"), self._step
        if then is None or now is None or then == now:
            return
        is_equal = math.prod(then.values()) == math.prod(now.values())
        if is_equal and checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]:
            return
        was, has = (
            f"{of['processes']} as trainer.devices x num_nodes and {of['accumulate_grad_batches']} as "
            "accumulate_grad_batches"
            for of in (then, now)
        )
        raise UsageError(
            f"the checkpoint was trained with {was}, this training has {has}: it would go on at another "
            f"place of its {'epoch' if is_equal else 'schedule'}; set trainer.devices and the others as they "
            "were"
        )

    @property
    def _data(self) -> SlideDataModule | None:
        data = getattr(self._trainer, "datamodule", None)
        return data if isinstance(data, SlideDataModule) else None


def record_behind(spec: BackboneSpec) -> StudyRecord | None:
    """Reads the record of the checkpoint that pretrained weights come from; None for other weights."""
    record = read_pretrained(spec).record if spec.pretrained.endswith(".ckpt") else None
    return StudyRecord.from_dict(record) if record else None
