"""Distances of each layer from the pretrained weights during a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from slidetl.files import replaced, write_csv
from slidetl.models.blocks import pretrained_backbone
from slidetl.models.lora import merged_parameters
from slidetl.training.grader import SlideGrader


def distances(network: nn.Module, anchors: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Measures the distance of each layer with a kernel from its pretrained weights w0.

    Args:
        network: the layers.
        anchors: w0 by parameter name. Layers with another shape, or with w0 = 0, are left out.

    Returns:
        ``||w - w0||`` and ``||w0||`` by layer name, in the order of the network.
    """
    names, norms = [], []
    for name, parameter in merged_parameters(network):
        anchor = anchors.get(name)
        if parameter.ndim > 1 and anchor is not None and anchor.shape == parameter.shape and anchor.any():
            here, there = parameter.detach(), anchor.detach().to(parameter.device)
            names.append(name.removesuffix(".weight"))
            norms += [vector_norm(here - there, dtype=torch.float64), vector_norm(there, dtype=torch.float64)]
    if not names:
        return {}
    pairs = torch.stack(norms).view(-1, 2).tolist()  # copied from a GPU at once
    return {name: (apart, size) for name, (apart, size) in zip(names, pairs, strict=True)}


class DriftReport(pl.Callback):
    """Measures the drift of the backbone's layers before training and after each epoch.

    It writes ``drift.csv`` (``epochs`` done, ``layer``, ``relative_distance``) and, at the end, ``drift.png``
    into the log folder, and logs the distance of the backbone as ``drift/backbone``; strategies without
    pretrained weights get no report.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []
        self._anchors: Mapping[str, Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the pretrained weights, and takes the first measurement."""
        self.rows, self._anchors = [], None
        if not isinstance(pl_module, SlideGrader) or not pl_module.transfer.from_pretrained:
            return
        backbone = pl_module.network.backbone
        if pl_module.reference is not None:
            self._anchors = pl_module.reference.weights
        elif backbone.starts_pretrained and trainer.ckpt_path is None:  # read before
            weights = merged_parameters(backbone.net)
            self._anchors = {name: weight.detach().to("cpu", copy=True) for name, weight in weights}
        else:
            self._anchors = dict(pretrained_backbone(backbone).net.named_parameters())
        self._measure(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures, logs and writes the distances."""
        if self._anchors is None or not isinstance(pl_module, SlideGrader):
            return
        found = self._measure(trainer, pl_module, trainer.current_epoch + 1).values()
        if found:
            apart, size = (math.hypot(*norms) for norms in zip(*found, strict=True))
            pl_module.log("drift/backbone", apart / size)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws ``drift.png``."""
        folder = trainer.log_dir  # every process must read it: they synchronise on it
        if self.rows and trainer.is_global_zero and folder:
            draw_drift(Path(folder) / "drift.png", self.rows)

    def _measure(
        self, trainer: pl.Trainer, grader: SlideGrader, epochs: int
    ) -> dict[str, tuple[float, float]]:
        found = distances(grader.network.backbone.net, self._anchors or {})
        self.rows += [(epochs, layer, apart / size) for layer, (apart, size) in found.items()]
        folder = trainer.log_dir  # every process must read it: they synchronise on it
        if trainer.is_global_zero and folder:
            write_drift(Path(folder) / "drift.csv", self.rows)
        return found


def write_drift(path: Path, rows: list[tuple[int, str, float]]) -> None:
    """Writes a CSV with ``epochs``, ``layer`` and ``relative_distance``."""
    columns = ("epochs", "layer", "relative_distance")
    cells = ((epochs, layer, f"{distance:.6g}") for epochs, layer, distance in rows)
    write_csv(path, columns, (dict(zip(columns, row, strict=True)) for row in cells))


def draw_drift(path: Path, rows: list[tuple[int, str, float]]) -> None:
    """Draws the distance over depth, one line per epoch."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = list(dict.fromkeys(layer for _, layer, _ in rows))
    when = sorted({epochs for epochs, _, _ in rows})
    colours = ScalarMappable(Normalize(when[0], max(when[-1], when[0] + 1)), colormaps["viridis_r"])
    figure = Figure(figsize=(max(5.0, 2 + 0.16 * len(layers)), 4.5), layout="constrained")
    axes = figure.add_subplot(
        title="Distance of each layer from its pretrained weights",
        ylabel="||w - w0|| / ||w0||",
        xlim=(-0.5, len(layers) - 0.5),
    )
    for epochs in when:
        line = {layer: value for epoch, layer, value in rows if epoch == epochs}
        heights = [line.get(layer, float("nan")) for layer in layers]
        axes.plot(heights, color=colours.to_rgba(np.array(epochs)), marker=".", markersize=4, linewidth=1)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    figure.colorbar(colours, ax=axes, label="epochs of training", ticks=MaxNLocator(integer=True))
    with replaced(path) as file:
        figure.savefig(file, dpi=120, format="png")
