"""The LightningModule that trains and tests the grading of slides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined] # not in its __all__
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from slidetl.data.datasets import Bag, Chunk
from slidetl.data.manifest import check_scale
from slidetl.errors import CheckpointError, UsageError
from slidetl.evaluation.metrics import GradeMetrics, ProbabilityMetrics, grade_metrics, probability_metrics
from slidetl.grid import TileSpec
from slidetl.models.aggregators import GatedAttention, Pooling
from slidetl.models.backbones import Backbone, BackboneSpec, weights_sha256
from slidetl.models.heads import CumulativeLink, Head
from slidetl.models.network import GradingNetwork
from slidetl.models.penalties import Batch, Reference, Seen, recorded
from slidetl.models.transfer import TransferStrategy, WarmRestart
from slidetl.tasks.predictions import SlidePrediction, write_predictions
from slidetl.tasks.schedules import one_cycle

# The form in which jsonargparse takes an instance as the default of a protocol.
_WARM_RESTART = lazy_instance(WarmRestart)


class SlideGrader(pl.LightningModule):
    """Grades slides end to end: bags of tiles in training, every tile in evaluation.

    The rate follows one cycle: a linear warm-up, then a cosine down to nearly zero.

    Args:
        backbone: which network embeds a tile, and its pretrained weights.
        aggregator: makes an :class:`~slidetl.models.aggregators.Aggregator` for a length of embedding.
        head: makes a head for a given length of embedding and number of grades.
        transfer: how the pretrained weights are leaned on.
        grades: names of the grades, lowest first; set by ``data.grades``.
        lr: peak learning rate of the new layers; the strategy scales that of the backbone.
        weight_decay: of kernels, decoupled (AdamW).
        warmup_fraction: share of all training steps in which the rate rises, 0..1.
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
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not lr > 0 or weight_decay < 0 or not 0 < warmup_fraction < 1:
            raise UsageError(
                f"expected model.lr > 0, model.weight_decay >= 0 and model.warmup_fraction between 0 and 1, "
                f"not {lr}, {weight_decay}, {warmup_fraction}"
            )
        check_scale(grades)
        self.grades = tuple(grades)
        self.transfer = transfer
        self.lr, self.weight_decay, self.warmup_fraction = lr, weight_decay, warmup_fraction
        embedder = Backbone(backbone)
        transfer.adapt(embedder)
        pooling = aggregator(embedder.num_features)
        self.network = GradingNetwork(embedder, pooling, head(pooling.out_features, len(grades)))
        self.reference: Reference | None = None
        self.tile_spec: TileSpec | None = None
        self._total_steps = 1.0
        self._applied: dict[str, Tensor] = {}  # penalties of the step just done, outside the loss
        self._checkpoint = ""  # SHA-256 of the weights that predict
        self._embeddings: list[Tensor] = []  # of the slide whose chunks are coming in
        self._predictions: list[SlidePrediction] = []

    def setup(self, stage: str) -> None:
        """Takes the tiles' specification from the data, and starts the backbone where the strategy says."""
        if stage == "fit":
            self.tile_spec = self._data_spec()
            if self.trainer.ckpt_path is None:  # a training that goes on has its weights already
                self.transfer.start(self.network.backbone)
            self.reference = self.transfer.reference(self.network.backbone)
            if self.reference is not None:  # it is the same everywhere; DDP need not send it around each step
                names = [f"reference.{name}" for name, _ in self.reference.named_buffers()]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)  # type: ignore[no-untyped-call] # torch's

    def on_train_start(self) -> None:
        """Lets the strategy learn from training data what its penalties need."""
        if self.reference is not None and self.trainer.ckpt_path is None:
            self.transfer.prepare(self.network, self.reference, self._training_batches())
            self.reference.attention = {  # every process has seen slides of its own
                layer: self.trainer.strategy.reduce(weights, reduce_op="mean")
                for layer, weights in self.reference.attention.items()
            }

    def on_train_epoch_start(self) -> None:
        """Switches to training, all but what the strategy keeps still; Lightning leaves modes as they are."""
        self.train()
        self.transfer.set_training_mode(self.network.backbone, self.current_epoch)
        if self.trainer.world_size == 1:  # DDP has counted on a gradient of everything that trains
            frozen = set(self._frozen())
            for group in self.trainer.optimizers[0].param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(parameter not in frozen)

    def configure_optimizers(self) -> Any:
        """AdamW with the strategy's parameter groups, under one cycle stepped per batch."""
        groups = self.transfer.parameter_groups(self.network, self.lr, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        self._total_steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: one_cycle(step / self._total_steps, self.warmup_fraction)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Bag, batch_idx: int) -> Tensor:
        """Loss of a batch of bags, with the strategy's penalties."""
        tiles, mask, backbone = batch["tiles"], batch["mask"], self.network.backbone
        with recorded(backbone, self._watched) as activations:
            embeddings = self.network.embed(tiles)
        logits = self._grade(embeddings, mask)
        loss = self.network.head.loss(logits, batch["grade"])
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(logits), prog_bar=True)
        if self.reference is None:
            return loss
        seen = Seen(tiles, mask, activations)
        penalties = self.transfer.penalties(self.network, self.reference, seen, self._progress)
        self._log_penalties(penalties, len(logits))
        return loss + sum(penalties.values())

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
            self._applied = self.transfer.after_step(
                self.network, self.reference, optimizer.param_groups, self._progress
            )

    def on_train_batch_end(self, outputs: Any, batch: Bag, batch_idx: int) -> None:
        """Logs what the step has applied; within the step Lightning takes no figures."""
        self._log_penalties(self._applied, len(batch["mask"]))
        self._applied = {}

    @property
    def _watched(self) -> tuple[str, ...]:
        return self.transfer.watched(self.network.backbone) if self.reference is not None else ()

    @property
    def _progress(self) -> float:
        return self.global_step / self._total_steps

    def _frozen(self) -> list[torch.nn.Parameter]:
        return self.transfer.frozen(self.network.backbone, self.current_epoch)

    def _log_penalties(self, penalties: dict[str, Tensor], batch_size: int) -> None:
        figures = {f"penalty/{name}": value.detach() for name, value in penalties.items()}
        self.log_dict(figures, on_step=False, on_epoch=True, batch_size=batch_size)

    def _training_batches(self) -> Iterator[Batch]:
        for batch in self.trainer.datamodule.train_dataloader():  # type: ignore[attr-defined] # set by fit
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
        self._embeddings, self._predictions = [], []

    def on_test_epoch_start(self) -> None:
        """Notes which weights it is that predict."""
        self.on_validation_epoch_start()
        self._checkpoint = weights_sha256(self.network)

    on_predict_epoch_start = on_test_epoch_start

    def _grade(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits, in float32 also where the backbone runs in a lower precision."""
        with torch.autocast(embeddings.device.type, enabled=False):
            logits, _ = self.network.grade(embeddings.float(), mask)
        return logits

    def _evaluate(self, chunk: Chunk) -> None:
        self._embeddings.append(self.network.backbone(chunk["tiles"]).float())
        if not chunk["last"]:
            return
        embeddings = torch.cat(self._embeddings).unsqueeze(0)  # [1, N, D]
        self._embeddings = []
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        probabilities = self.network.head.probabilities(self._grade(embeddings, mask))[0].tolist()
        self._predictions.append(
            SlidePrediction(
                slide_id=chunk["slide_id"],
                patient_id=chunk["patient_id"],
                grade=None if chunk["grade"] < 0 else chunk["grade"],
                probabilities=tuple(probabilities),
                tiles=embeddings.shape[1],
                site=chunk["site"],
                checkpoint=self._checkpoint,
            )
        )

    def on_validation_epoch_end(self) -> None:
        """Logs the figures of the validation part."""
        self._log_metrics("val", self._take_predictions())

    def on_test_epoch_end(self) -> None:
        """Logs, prints and saves the figures and predictions of the test part."""
        predictions = self._take_predictions()
        metrics, quality = self._log_metrics("test", predictions)
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir) / "test"
            write_predictions(folder / "predictions.csv", predictions)
            figures = {**asdict(quality), **asdict(metrics), "grades": self.grades}
            (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            draw_confusion(folder / "confusion.png", metrics, self.grades)
            rank_zero_info(f"{describe_metrics(metrics, self.grades)}\nwritten to {folder}")

    def on_predict_epoch_end(self) -> None:
        """Saves the predictions."""
        predictions = self._take_predictions()
        if self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / "predict" / "predictions.csv"
            write_predictions(path, predictions)
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

    def _log_metrics(
        self, part: str, predictions: list[SlidePrediction]
    ) -> tuple[GradeMetrics, ProbabilityMetrics]:
        if not predictions:
            raise UsageError(
                f"the {part} part ended before a slide was complete; raise trainer.limit_{part}_batches"
            )
        true = [prediction.grade for prediction in predictions if prediction.grade is not None]
        metrics = grade_metrics(
            true, [prediction.predicted_grade for prediction in predictions], len(self.grades)
        )
        quality = probability_metrics(true, [row.probabilities for row in predictions])
        figures = {
            f"{part}/accuracy": metrics.accuracy,
            f"{part}/balanced_accuracy": metrics.balanced_accuracy,
            f"{part}/qwk": metrics.qwk,
            f"{part}/mae": metrics.mae,
            f"{part}/macro_f1": metrics.macro_f1,
            f"{part}/rps": quality.rps,
            f"{part}/calibration_error": quality.calibration_error,
            f"{part}/loss": quality.log_loss,
        }
        for threshold, value in enumerate(quality.auroc):
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
        f"{metrics.n} slides: accuracy {metrics.accuracy:.3f}, QWK {metrics.qwk:.3f}, "
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
        title=f"{metrics.n} slides: accuracy {metrics.accuracy:.2f}, QWK {metrics.qwk:.2f}",
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
