"""Exports a trained network as ONNX, for machines without torch, and as a successor of TorchScript.

An ONNX file is one graph with one set of inputs, so there are two: ``MODEL.onnx`` takes all tiles of a slide,
and ``MODEL.grade.onnx`` embeddings by the first, of one part of a large slide after another.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slidetl.errors import ModelFileError, UsageError
from slidetl.library.model_card import METADATA, ModelCard
from slidetl.publish.export import ExportedNetwork, random_tiles

_GRADED = ["probabilities", "expected_grade", "attention"]
_EXPLAINED = ["score", "contributions"]
_MOST_INSIDE = (
    1536 * 2**20
)  # bytes of weights in a graph: protobuf ends at 2 GiB, and torch's own limit is this
PARITY_TOLERANCE = 1e-4  # other kernels sum in another order


class _Second(nn.Module):
    """Computes :meth:`ExportedNetwork.grade` of embeddings ``[N, D]``."""

    def __init__(self, network: ExportedNetwork) -> None:
        super().__init__()
        self.network = network
        # The k highest of fewer than k tiles would be a graph of another shape: masked rows are added.
        self.spare = max(int(getattr(member.aggregator, "k", 0)) for member in network.networks)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        n_tiles = embeddings.shape[0]
        mask = functional.pad(torch.ones(n_tiles, dtype=torch.bool), (0, self.spare))
        bag = functional.pad(embeddings, (0, 0, 0, self.spare))
        probabilities, attention, explained = self.network.vote(bag.unsqueeze(0), mask.unsqueeze(0))
        graded = (probabilities[0], self.network.expected_grade(probabilities)[0], attention[0, :n_tiles])
        return graded if explained is None else (*graded, explained[0][0], explained[1][0, :n_tiles])


class _Whole(nn.Module):
    """Computes embeddings of tiles ``[N, C, H, W]``, and their grade."""

    def __init__(self, network: ExportedNetwork) -> None:
        super().__init__()
        self.network = network
        self.second = _Second(network)

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        embeddings = self.network.embed(tiles)
        return embeddings, *self.second(embeddings)


def export_onnx(network: ExportedNetwork, card: ModelCard, path: Path) -> dict[str, float]:
    """Writes a network as two ONNX files, and compares them with it.

    ========================== =========================== ==========================================
    file                       input                       outputs
    ========================== =========================== ==========================================
    ``MODEL.onnx``             ``tiles [N, 3, H, W]``       ``embeddings [N, D]``, and those below
                               uint8
    ``MODEL.grade.onnx``       ``embeddings [N, D]``        ``probabilities [K]``, ``expected_grade``,
                               float32                     ``attention [N]``, and where the card has a
                                                           ``score_unit``, ``score`` and
                                                           ``contributions [N]``, all float32
    ========================== =========================== ==========================================

    The weights of a network above 1.5 GiB lie in ``MODEL.onnx.data``, which belongs beside ``MODEL.onnx``.
    The card is the property ``slidetl.json`` of either.

    Args:
        network: of :func:`slidetl.publish.export.build_network`.
        card: of the same.
        path: ``MODEL.onnx``; the other lies beside it.

    Returns:
        The greatest difference of any probability or contribution from the network's, for either file.

    Raises:
        UsageError: the extra ``slidetl[onnx]`` is not installed, or the path does not end in ``.onnx``.
        ModelFileError: the files do not compute the same; they are not written then.
    """
    if path.suffix != ".onnx":
        raise UsageError(f"expected the name of an ONNX file to end in .onnx, not {path.name!r}")
    if card.tile_spec.is_volume:
        raise UsageError("a model of volumes is exported as TorchScript alone; leave out --format onnx")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it, and says so in many lines)
    except ImportError as error:
        raise UsageError(f"ONNX needs more packages ({error.name}): pip install 'slidetl[onnx]'") from error

    tiles = random_tiles(network, card.tile_spec, 5, torch.Generator().manual_seed(0))
    second = path.with_name(f"{path.stem}.grade.onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under their own names, since a graph names the file of its weights.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.partial-") as folder:
        partial, partial_second = (Path(folder) / file.name for file in (path, second))
        with torch.no_grad():
            embeddings = network.embed(tiles)
            expected, *_, explained = network.grade(embeddings)
            alone = network(tiles[:1])
        outputs = _GRADED if explained is None else [*_GRADED, *_EXPLAINED]
        _write(_Whole(network), "tiles", tiles, ["embeddings", *outputs], card, partial)
        _write(_Second(network), "embeddings", embeddings, outputs, card, partial_second)
        whole = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        of_embeddings = onnxruntime.InferenceSession(str(partial_second), providers=["CPUExecutionProvider"])
        found = whole.run(None, {"tiles": tiles.numpy()})
        one = whole.run(["probabilities"], {"tiles": tiles[:1].numpy()})[0]
        graded = of_embeddings.run(None, {"embeddings": found[0]})
        single = _difference([one], alone, None)
        worst = {
            path.name: float(np.max([_difference(found[1:], expected, explained), single])),
            second.name: _difference(graded, expected, explained),
        }
        for name, difference in worst.items():
            if not difference <= PARITY_TOLERANCE:
                raise ModelFileError(
                    f"{name} differs from the network by {difference:.1e} in a probability or a tile's "
                    f"contribution, more than {PARITY_TOLERANCE:.0e}; it was not written"
                )
        del whole, of_embeddings  # they have the files open
        for file in (path, second):  # of an earlier, larger network
            file.with_name(f"{file.name}.data").unlink(missing_ok=True)
        for written in sorted(Path(folder).iterdir(), key=lambda file: file.suffix != ".data"):
            written.replace(path.with_name(written.name))
    return worst


def _difference(outputs: list[Any], probabilities: Tensor, explained: tuple[Tensor, Tensor] | None) -> float:
    """Returns the greatest difference of a probability, or of a contribution as a share of the greatest."""
    differences = abs(outputs[0] - probabilities.numpy())
    if explained is not None:
        contributions = explained[1].numpy()
        scale = max(1.0, abs(contributions).max())
        differences = np.append(differences, abs(outputs[4] - contributions) / scale)
    return float(differences.max())  # NaN where any is


def _write(
    module: nn.Module, name: str, example: Tensor, outputs: list[str], card: ModelCard, path: Path
) -> None:
    any_number = torch.export.Dim("tiles", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations between torch and its exporter
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        traced = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: any_number},))
        program: Any = torch.onnx.export(
            traced, (example,), input_names=[name], output_names=outputs, dynamo=True, verbose=False
        )
    program.model.metadata_props[METADATA] = card.to_json()
    weights = (value.const_value for value in program.model.graph.initializers.values())
    size = sum(value.nbytes for value in weights if value is not None)
    program.save(str(path), external_data=size > _MOST_INSIDE)
