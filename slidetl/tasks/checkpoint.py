"""Reading a checkpoint without running anything that it brings along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from slidetl.errors import CheckpointError
from slidetl.tasks.slide import SlideGrader


def read_checkpoint(path: Path, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a checkpoint as plain values and tensors, and checks the names in its hyper-parameters.

    Building the module imports every class that they name, and an import runs code. So only names
    below ``slidetl.`` are accepted, and those that the user allows.

    Args:
        path: a ``.ckpt`` file.
        allow: further names or packages whose classes may be imported, e.g. ``mylab.heads``.

    Raises:
        CheckpointError: unreadable without unpickling objects, or it names a class not allowed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets in a foreign file
        raise CheckpointError(
            f"{path}: not loaded, holds more than plain values and tensors: {str(error).splitlines()[0]}"
        ) from error
    if (
        not isinstance(checkpoint, dict)
        or "hyper_parameters" not in checkpoint
        or "state_dict" not in checkpoint
    ):
        raise CheckpointError(f"{path}: expected a checkpoint of 'slidetl fit', found something else")
    for name in _class_paths(checkpoint["hyper_parameters"]):
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in ("slidetl", *allow)):
            raise CheckpointError(
                f"{path}: it would import {name!r}, which is neither slidetl's nor allowed; "
                f"if you trust it, add --allow {name}"
            )
    return checkpoint


def load_grader(path: Path, allow: Sequence[str] = ()) -> SlideGrader:
    """Builds the grader that a checkpoint holds, on the CPU, in evaluation mode.

    Args:
        path: a ``.ckpt`` file.
        allow: as for :func:`read_checkpoint`.

    Raises:
        CheckpointError: see :func:`read_checkpoint`; or the state does not fit.
    """
    read_checkpoint(path, allow)
    try:
        grader = SlideGrader.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its state does not fit: {str(error).splitlines()[0]}") from error
    return grader.eval()


def _class_paths(values: Any) -> Iterator[str]:
    """Every name that would be imported: ``class_path`` entries, and bare names of callables."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key == "_instantiator":
                if value != "pytorch_lightning.cli.instantiate_module":
                    yield str(value)
            elif key in ("class_path", "_class_path", "aggregator", "head", "transfer") and isinstance(
                value, str
            ):
                yield value
            else:
                yield from _class_paths(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _class_paths(value)
