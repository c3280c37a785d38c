"""Files of tensors: read without running or growing anything, written whole or not at all."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from slidetl.errors import WeightsError
from slidetl.files import check_stored, write_whole


def load_tensors(path: Path) -> Any:
    """Reads a file of ``torch.save`` as plain values and tensors, no larger than the file.

    Raises:
        ValueError: it holds other objects, is damaged, or would grow; the message is one line.
    """
    try:
        size = path.stat().st_size
        if not size:
            raise ValueError("the file is empty, as a full disk may leave it")
        if zipfile.is_zipfile(path):
            check_stored(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        storages = {}
        for tensor in _tensors(loaded):
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise ValueError(f"it has a tensor of an unusual kind: {tensor.layout}, {tensor.dtype}")
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if tensor.numel() * tensor.element_size() > storage.nbytes():
                raise ValueError(f"a tensor {list(tensor.shape)} would be larger than the file")
        if sum(storages.values()) > size:
            raise ValueError("its tensors would be larger than the file")
    except Exception as error:  # torch.load raises any kind of error for a foreign file
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    return loaded


def save_tensors(path: Path, value: Any) -> None:
    """Writes a value with ``torch.save``, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    content = io.BytesIO()  # on a full disk torch would leave half a file, or end the process
    torch.save(value, content)
    write_whole(path, content.getbuffer())


def is_state(value: object) -> TypeGuard[dict[str, Tensor]]:
    """Tells if a value is a dictionary of tensors by their names."""
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )


def check_finite(state: Mapping[str, Tensor], of: str) -> None:
    """Refuses weights with NaN or infinite values: the argmax of NaN would be grade 0.

    Raises:
        WeightsError: a value is NaN or infinite.
    """
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WeightsError(f"{of}: {key} has values that are not finite; its training went astray")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields every tensor in nested lists, tuples and dictionaries."""
    pending, seen = [value], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value
