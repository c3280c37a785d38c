"""A trained network leaves as one TorchScript file, which needs neither slidetl nor timm to run.

TorchScript is deprecated upstream; everything that touches it is in this file.
"""

import hashlib
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slidetl
from slidetl.card import ModelCard
from slidetl.errors import ModelFileError, UsageError
from slidetl.models.backbones import weights_sha256
from slidetl.models.network import GradingNetwork
from slidetl.tasks.slide import SlideGrader

_METADATA = "slidetl.json"  # its name inside the file, under `_extra_files`
# Greatest difference of a probability between the file and the network it was made from.
PARITY_TOLERANCE = 1e-5


class ExportedNetwork(nn.Module):
    """The network as the file offers it: one slide at a time, no mask, chunks inside.

    Args:
        network: trained, in evaluation mode.
        chunk_size: tiles per pass through the backbone in :meth:`forward`.
    """

    def __init__(self, network: GradingNetwork, chunk_size: int = 64) -> None:
        super().__init__()
        self.network = network
        self.chunk_size = chunk_size

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles of one slide ``[N, 3, H, W] uint8`` -> probabilities ``[K] float32``."""
        chunks = [self.embed(chunk) for chunk in torch.split(tiles, self.chunk_size)]
        return self.grade(torch.cat(chunks))[0]

    @torch.jit.export
    def embed(self, tiles: Tensor) -> Tensor:
        """Tiles ``[N, 3, H, W] uint8`` -> embeddings ``[N, D] float32``."""
        embeddings: Tensor = self.network.backbone(tiles)
        return embeddings.to(torch.float32)

    @torch.jit.export
    def grade(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of one slide ``[N, D]`` -> probabilities ``[K]``, expected grade, attention ``[N]``."""
        mask = torch.ones(1, embeddings.shape[0], dtype=torch.bool, device=embeddings.device)
        logits, attention = self.network.grade(embeddings.unsqueeze(0), mask)
        probabilities: Tensor = self.network.head.probabilities(logits)[0]
        grades = torch.arange(probabilities.shape[0], dtype=torch.float32, device=probabilities.device)
        return probabilities, (probabilities * grades).sum(), attention[0].mean(0)

    @torch.jit.export
    def grade_tiles(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``[N, D]`` -> the grade ``[N]`` expected if a slide had that tile alone; for maps."""
        mask = torch.ones(embeddings.shape[0], 1, dtype=torch.bool, device=embeddings.device)
        logits, _ = self.network.grade(embeddings.unsqueeze(1), mask)
        probabilities: Tensor = self.network.head.probabilities(logits)
        grades = torch.arange(probabilities.shape[1], dtype=torch.float32, device=probabilities.device)
        return probabilities @ grades


@dataclass(frozen=True)
class ModelFile:
    """An exported model, loaded.

    Attributes:
        network: with the methods of :class:`ExportedNetwork`.
        card: what the file says of itself.
        sha256: of the whole file, hexadecimal.
    """

    network: Any
    card: ModelCard
    sha256: str


def export_model(grader: SlideGrader, path: Path) -> float:
    """Writes a trained grader as one file, and checks that the file computes the same.

    Args:
        grader: as :func:`slidetl.tasks.checkpoint.load_grader` returns it.
        path: where to; written under another name first, so a file that is there is whole.

    Returns:
        The greatest difference of any probability between file and network, on random tiles.

    Raises:
        ModelFileError: the grader was never trained on tiles, or the file does not compute the same.
    """
    import timm

    if grader.tile_spec is None:
        raise ModelFileError(
            "it does not say what tiles it was trained on; 'slidetl fit' makes one that does"
        )
    network = ExportedNetwork(grader.network).eval()
    backbone = grader.network.backbone
    card = ModelCard(
        grades=grader.grades,
        tile_spec=grader.tile_spec,
        backbone=backbone.spec.name,
        normalisation={"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()},
        versions={"slidetl": slidetl.__version__, "torch": str(torch.__version__), "timm": timm.__version__},
        weights_sha256=weights_sha256(network),
    )
    with _without_deprecation():
        scripted = torch.jit.script(network)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        torch.jit.save(scripted, str(partial), _extra_files={_METADATA: card.to_json()})
    _leave_out_source_paths(partial)
    try:
        worst = _parity(network, load_model(partial), grader.tile_spec.tile_size_px)
        if not worst <= PARITY_TOLERANCE:
            raise ModelFileError(
                f"the exported file differs from the network by {worst:.1e} in a probability, more than "
                f"{PARITY_TOLERANCE:.0e}; it was not written"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return worst


def load_model(path: Path, device: str = "cpu") -> ModelFile:
    """Loads an exported model and checks it against its own hash.

    A TorchScript file is a program: load only files whose origin is known.

    Args:
        path: a file that :func:`export_model` wrote.
        device: where it will run, e.g. ``cpu`` or ``cuda``.

    Raises:
        ModelFileError: no such file, not one of ours, or damaged.
        UsageError: no such device here.
    """
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file; 'slidetl export' writes one")
    extra = {_METADATA: ""}
    try:
        with _without_deprecation():
            network = torch.jit.load(str(path), "cpu", _extra_files=extra)
    except (RuntimeError, ValueError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), "unreadable")
        raise ModelFileError(f"{path}: not a TorchScript file, or damaged: {first_line}") from error
    if not extra[_METADATA]:
        raise ModelFileError(f"{path}: TorchScript, but not one of slidetl's files: no {_METADATA} inside")
    text = extra[_METADATA]
    card = ModelCard.from_json(text if isinstance(text, str) else bytes(text).decode())
    network.eval()
    if weights_sha256(network) != card.weights_sha256:
        raise ModelFileError(f"{path}: its weights do not match the hash inside; it is damaged, get it again")
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter: a build without CUDA
        raise UsageError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}; try cpu"
        ) from error
    with path.open("rb") as file:
        return ModelFile(network, card, hashlib.file_digest(file, "sha256").hexdigest())


def _leave_out_source_paths(path: Path) -> None:
    """Drops the debug records, in which TorchScript notes where on this machine each source file lies."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".debug_pkl")}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def _parity(network: ExportedNetwork, loaded: ModelFile, tile_size_px: int) -> float:
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for n_tiles in (1, 5):
        shape = (n_tiles, 3, tile_size_px, tile_size_px)
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        with torch.inference_mode():
            worst = max(worst, (network(tiles) - loaded.network(tiles)).abs().max().item())
    return worst


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """TorchScript is deprecated; that is known, and a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated.*")
        yield
