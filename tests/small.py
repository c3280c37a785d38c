"""A small network with seeded random weights: most tests embed and train with it, since it is fast."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from slidetl.models.spec import BackboneSpec

SMALL = "mobilenetv3_small_050"


@cache
def small_weights() -> Path:
    """A file of weights for :data:`SMALL`, the same in every process."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = Path(tempfile.mkdtemp(prefix="slidetl-weights-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1905)  # no test draws its own network with this seed
        network = timm.create_model(SMALL, num_classes=0).train()
        for value in network.parameters():
            if value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
        for _ in range(20):  # statistics of batch norm that are not those of a fresh network
            network(torch.randn(16, 3, 32, 32))
        save_file(network.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def small_spec(**changes: Any) -> BackboneSpec:
    """The network with these weights."""
    return BackboneSpec(SMALL, str(small_weights()), **changes)


def small_backbone() -> list[str]:
    """Options of the training commands for it."""
    return [f"--model.backbone.name={SMALL}", f"--model.backbone.pretrained={small_weights()}"]


def small_embed() -> list[str]:
    """Options of ``slidetl embed`` for it."""
    return ["--backbone", SMALL, "--pretrained", str(small_weights())]
