"""The device of a network, and number formats of its forward pass on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from slidetl.errors import UsageError


def chosen_device(name: str = "auto", devices: int = 1) -> torch.device:
    """Returns the device that a user names: ``auto`` takes a GPU if there is one.

    Args:
        name: ``auto``, ``cpu`` or ``cuda``.
        devices: GPUs to use, from the first on.

    Raises:
        UsageError: another name, or there are not so many GPUs.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    place = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    if place.type == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"--devices {devices}: there are {torch.cuda.device_count()} GPUs here")
    return place


def has_bfloat16(device: torch.device) -> bool:
    """Returns True if it is a GPU of this machine that computes in bfloat16.

    Older ones (V100, T4) emulate it, slowly.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    is_there = on_gpu and (device.index or 0) < torch.cuda.device_count()
    # torch.cuda.is_bf16_supported asks the same, but only of the current device.
    return is_there and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Computes float32 on a GPU in float32, where torch's default for convolutions is TF32: 10 bits for 23.

    So is that of matrix products in some containers (``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``). In TF32 a folded
    batch norm, or another batch length, changes a probability by up to 1e-3. The setting is
    the whole process's, so only one thread may use it at a time; on a CPU nothing is set.
    """
    if device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # Torch 2.9 renamed these settings. Its old names raise an error once a process has used the new ones, and
    # do not restore what torch.set_float32_matmul_precision chose.
    kinds: tuple[Any, ...]
    exact: str | bool
    if hasattr(matmul, "fp32_precision"):
        kinds, name, exact = (matmul, cudnn.conv, cudnn.rnn), "fp32_precision", "ieee"
    else:
        kinds, name, exact = (matmul, cudnn), "allow_tf32", False
    before = [getattr(kind, name) for kind in kinds]
    for kind in kinds:
        setattr(kind, name, exact)
    try:
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            setattr(kind, name, value)
