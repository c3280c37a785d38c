"""Loads a model file, to grade slides. Needs torch, but neither Lightning nor timm.

Separate from :mod:`slidetl.publish.export`, since Lightning and timm would double the start of ``slidetl
grade`` and add a third of a gigabyte.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slidetl.errors import ModelFileError, UsageError, WeightsError
from slidetl.files import file_sha256
from slidetl.library.model_card import ModelCard
from slidetl.library.trust import is_trusted
from slidetl.models.backbones import weights_sha256
from slidetl.models.tensors import check_finite


@dataclass(frozen=True)
class ModelFile:
    """An exported model, loaded.

    Attributes:
        network: with the methods of :class:`slidetl.publish.export.ExportedNetwork`.
        card: the card inside the file.
        sha256: of the whole file, hexadecimal.
        device: of the network.
        path: the file.
    """

    network: Any
    card: ModelCard
    sha256: str
    device: torch.device
    path: Path

    def frozen(self) -> ModelFile:
        """Freezes the network for grading: weights are constants, batch norm is part of its convolution.

        Mobile networks grade a fifth faster so, in 0.2 GiB less; a grade differs in the seventh decimal
        (docs/design/loading.md).
        """
        with without_deprecation():
            network = torch.jit.freeze(self.network, ["embed", "grade", "novelty"])
        return replace(self, network=network)


def load_model(path: str | Path, device: str = "cpu", trusted: bool = False) -> ModelFile:
    """Loads an exported model and checks it against its own hash.

    A TorchScript file is a program: it is run only if its hash was recorded on this machine, at its export or
    by a person who vouched for it.

    Args:
        path: a file of :func:`slidetl.publish.export.export_model`.
        device: to run on, e.g. ``cpu`` or ``cuda``.
        trusted: vouch for it here and now.

    Raises:
        ModelFileError: no such file, not trusted, not one of ours, or damaged.
        UsageError: no such device here.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file; 'slidetl export' writes one")
    sha256 = file_sha256(path)
    card = ModelCard.of_file(path)
    if not trusted and not is_trusted(sha256):
        raise ModelFileError(
            f"{path}: not run, since a model file is a program and none with SHA-256 {sha256} was exported "
            "or pulled here; compare the hash with its sender's, then add --trust"
        )
    try:
        with without_deprecation():
            network = torch.jit.load(str(path), "cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), "unreadable")
        raise ModelFileError(f"{path}: not a TorchScript file, or damaged: {first_line}") from error
    network.eval()
    if weights_sha256(network) != card.weights_sha256:
        raise ModelFileError(f"{path}: its weights do not match the hash inside; it is damaged, get it again")
    try:
        check_finite(dict(network.named_parameters()), str(path))
    except WeightsError as error:
        raise ModelFileError(str(error)) from error
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter: a build without CUDA
        raise UsageError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}; try cpu"
        ) from error
    return ModelFile(network, card, sha256, torch.device(device), path)


@contextmanager
def without_deprecation() -> Iterator[None]:
    """Silences the deprecation of TorchScript: users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated.*")
        yield
