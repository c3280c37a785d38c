"""Reads checkpoints without running code from them."""

from __future__ import annotations

import inspect
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytorch_lightning
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser

from slidetl.data.tasks import Task
from slidetl.errors import CheckpointError, SlidetlError, UsageError, WeightsError
from slidetl.models import transfer
from slidetl.models.backbones import without_downloads
from slidetl.models.spec import BackboneSpec
from slidetl.models.targets import Targets
from slidetl.models.tensors import check_finite, is_state, load_tensors, save_tensors
from slidetl.training.best import BestCheckpoint, fits
from slidetl.training.grader import SlideGrader
from slidetl.training.slots import check_name, is_under, parse

_CLASSES = ("aggregator", "head", "transfer", "schedule")
_VALUES = {"backbone": BackboneSpec, "targets": Targets}
_MOST_VALUES = 1000  # of a list, which the parser would take minutes for
_PARAMETERS = frozenset(inspect.signature(SlideGrader).parameters)
# Lightning needs these to resume a training.
_TRAINING_STATE = {
    "loops",
    "optimizer_states",
    "lr_schedulers",
    "epoch",
    "global_step",
    "pytorch-lightning_version",
}


def read_checkpoint(path: Path, allow: Sequence[str] = (), resumable: bool = False) -> dict[str, Any]:
    """Reads a checkpoint as plain values and tensors, and checks its hyper-parameters.

    Building a module imports every class named by them, and an import runs code. So they must have exactly
    the form written by ``slidetl fit``, and name only classes allowed by their slot
    (:data:`slidetl.training.slots.SLOTS`) or by the user.

    Args:
        path: a ``.ckpt`` file.
        allow: further classes or packages to import from, e.g. ``mylab.heads``.
        resumable: whether it must hold the state of a training too.

    Returns:
        The checkpoint. Its ``hyper_parameters`` are the arguments of
        :class:`~slidetl.training.grader.SlideGrader`, as plain values.

    Raises:
        CheckpointError: it is unreadable without unpickling objects, has another form, or names a forbidden
            class.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checkpoint = load_tensors(path)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not loaded, damaged or holds more than plain values and tensors: {error}"
        ) from error
    is_ours = isinstance(checkpoint, dict) and {"hyper_parameters", "state_dict"} <= checkpoint.keys()
    if not is_ours or not isinstance(checkpoint["hyper_parameters"], dict):
        raise CheckpointError(f"{path}: expected a checkpoint of 'slidetl fit', found something else")
    loops = checkpoint.get("loops")
    missing = _TRAINING_STATE - checkpoint.keys()
    if resumable and (
        missing or not isinstance(loops, dict) or "epoch_progress" not in loops.get("fit_loop", ())
    ):
        named = ", ".join(sorted(missing)) or "the progress of its loops"
        raise CheckpointError(
            f"{path}: no training can resume from it, it lacks {named}; take another checkpoint"
        )
    loaded: dict[str, Any] = checkpoint
    values = loaded["hyper_parameters"]
    values.pop("_instantiator", None)  # Lightning builds modules by it; we build them ourselves
    try:
        check_hyper_parameters(values, allow)
        _check_state(loaded["state_dict"])
        _check_callbacks(loaded.get("callbacks", {}))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return loaded


def find_checkpoint(path: Path, allow: Sequence[str] = ()) -> Path:
    """Finds the best checkpoint of the latest fit below a run's folder; a file stands for itself.

    The last checkpoint of that fit names the best.

    Raises:
        UsageError: the folder has no checkpoint, the best one is gone, or the latest fit has not ended.
        CheckpointError: as :func:`read_checkpoint`.
    """
    if not path.is_dir():
        return path
    last, is_complete = next(fits(path), (None, False))
    if last is None:
        raise UsageError(f"no checkpoint of 'slidetl fit' below {path.absolute()}; name a file")
    log = last.parents[1]
    if not last.is_file():
        raise UsageError(
            f"{log}: the latest fit has not ended its first epoch, or its last.ckpt is gone; run it again, "
            "remove its folder, or name a checkpoint"
        )
    checkpoint = read_checkpoint(last, allow)
    if not is_complete:
        raise UsageError(
            f"{log}: the latest fit is not marked as complete: it is running, was interrupted after epoch "
            f"{checkpoint.get('epoch', 0) + 1}, or is of an older version of slidetl; resume it with "
            f"--ckpt_path {last}, or name a checkpoint"
        )
    states = checkpoint.get("callbacks", {})
    # Further checkpoints of a user have a path too, and may have a metric; the command's own come last.
    ours = [state for name, state in states.items() if name.startswith(f"{BestCheckpoint.__name__}{{")]
    names = [
        Path(state["best_model_path"]).name
        for state in ours or states.values()
        if state.get("best_model_path") and state.get("monitor")
    ]
    best = last.with_name(names[-1]) if names else last
    if not best.is_file():
        raise UsageError(f"{best}: the best checkpoint of that fit is gone; name another file")
    return best


def load_grader(path: str | Path, allow: Sequence[str] = ()) -> SlideGrader:
    """Builds the grader of a checkpoint, on the CPU, in evaluation mode.

    Called with bags of tiles it returns probabilities (:meth:`SlideGrader.forward
    <slidetl.training.grader.SlideGrader.forward>`)::

        grader = slidetl.load_grader("runs/fibrosis")
        cache = slidetl.open_cache("cache/case-17.zarr")
        tiles = torch.from_numpy(cache.read(range(len(cache)))).permute(0, 3, 1, 2)  # [N, 3, S, S]
        with torch.inference_mode():
            probabilities = grader(tiles[None], torch.ones(1, len(tiles), dtype=torch.bool))  # [1, K]

    Args:
        path: a ``.ckpt`` file, or the folder of a run, for the best of its latest fit.
        allow: as for :func:`read_checkpoint`.

    Raises:
        UsageError: as :func:`find_checkpoint`.
        CheckpointError: as :func:`read_checkpoint`, or the state does not fit.
    """
    path = find_checkpoint(Path(path), allow)
    checkpoint = read_checkpoint(path, allow)
    check_network(path, checkpoint, allow)
    try:
        grader = _build(checkpoint, allow)
        grader.load_state_dict(checkpoint["state_dict"])
        grader.on_load_checkpoint(checkpoint)
    except (ArgumentError, RuntimeError, KeyError, TypeError, ValueError, SlidetlError) as error:
        raise _unbuildable(path, error) from error
    return grader.eval()


def write_grader(path: Path, grader: SlideGrader, hyper_parameters: Mapping[str, Any]) -> None:
    """Writes a grader as a checkpoint to test and export, without the state of a training to resume.

    Args:
        path: the file.
        grader: with its record and tile specification.
        hyper_parameters: its arguments, as plain values.

    Raises:
        OutputError: the file cannot be written.
    """
    checkpoint = {
        "pytorch-lightning_version": pytorch_lightning.__version__,  # type: ignore[attr-defined]
        "hyper_parameters": dict(hyper_parameters),
        "state_dict": {name: value.detach().cpu() for name, value in grader.state_dict().items()},
    }
    grader.on_save_checkpoint(checkpoint)
    save_tensors(path, checkpoint)


def check_network(path: Path, checkpoint: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
    """Compares the network named by a checkpoint with its weights, without allocating memory.

    Raises:
        CheckpointError: names or shapes differ.
    """
    try:
        with torch.device("meta"):
            expected = _build(checkpoint, allow).state_dict()
    except (ArgumentError, RuntimeError, KeyError, TypeError, ValueError, SlidetlError) as error:
        if isinstance(error, RuntimeError) and "meta" in str(error):
            return  # building it reads values, and meta tensors have none
        raise _unbuildable(path, error) from error
    state = checkpoint["state_dict"]
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    if wrong:
        raise CheckpointError(
            f"{path}: no network can be built from it: its weights are of another one, {len(wrong)} of "
            f"{len(expected)} differ, first {wrong[0]!r}"
        )


def _build(checkpoint: Mapping[str, Any], allow: Sequence[str]) -> SlideGrader:
    parsed = parse(_parser(), {"model": checkpoint["hyper_parameters"]}, allow)
    with without_downloads(checkpoint):
        grader: SlideGrader = _parser().instantiate_classes(parsed).model
    return grader


@cache
def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SlideGrader, "model")
    return parser


def _unbuildable(path: Path, error: Exception) -> CheckpointError:
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error)).strip()
    return CheckpointError(f"{path}: no network can be built from it: {reason}")


def _check_state(state: object) -> None:
    """Checks that the state of the network maps names to finite tensors."""
    if not is_state(state):
        raise CheckpointError("expected its state_dict to have tensors by their names")
    try:
        check_finite(state, "state_dict")
    except WeightsError as error:
        raise CheckpointError(str(error)) from error


def _check_callbacks(states: object) -> None:
    """Checks the states of callbacks: Lightning deletes checkpoints by paths in them."""
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise CheckpointError("expected its callbacks to have their states by name")
    for state in states.values():
        models = state.get("best_k_models", {})
        if not isinstance(models, dict):
            raise CheckpointError(f"expected best_k_models to be paths with scores, found {models!r:.100}")
        for path in (*models, *(value for key, value in state.items() if key.endswith("_path"))):
            if not isinstance(path, str) or ".." in Path(path.lstrip("./")).parts:
                raise CheckpointError(f"expected a plain path of a checkpoint, found {path!r:.100}")


def check_resumable(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Checks that a training can resume from a checkpoint, before Lightning restores it.

    Raises:
        CheckpointError: it lacks the progress of the training, or the state of the optimiser.
    """
    expected: dict[str, Any] = {"epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}
    if checkpoint.get("step") is not None:
        expected["step"] = {"processes": 1, "accumulate_grad_batches": 1}
    expected["loops"] = {"fit_loop": trainer.fit_loop.state_dict()}
    if wrong := _differs(expected, checkpoint, "the checkpoint"):
        raise CheckpointError(f"no training can go on from it: {wrong}")


def _differs(expected: Any, found: Any, place: str) -> str:
    """Describes the first missing key or wrong type in a nested value; empty if it agrees."""
    if isinstance(expected, dict) and isinstance(found, Mapping):
        lacking = [key for key in expected if key not in found]
        if lacking:
            return f"{place} has no {lacking[0]!r}"
        parts = (_differs(value, found[key], f"its {key!r}") for key, value in expected.items())
        return next(filter(None, parts), "")
    fits = isinstance(found, int if isinstance(expected, int) else type(expected))
    return "" if fits else f"{place} is {found!r:.60}, expected {type(expected).__name__}"


def check_hyper_parameters(values: Mapping[Any, Any], allow: Sequence[str] = ()) -> None:
    """Checks for the form of hyper-parameters that :func:`read_checkpoint` accepts.

    Args:
        values: the arguments of :class:`~slidetl.training.grader.SlideGrader`, as plain values.
        allow: as for :func:`read_checkpoint`.

    Raises:
        CheckpointError: they have another form, or name a forbidden class.
    """
    unknown = [key for key in values if key not in _PARAMETERS]
    if unknown:
        raise CheckpointError(
            f"unknown hyper-parameter {unknown[0]!r}; it is not from this version of slidetl fit"
        )
    for key, value in values.items():
        if key in _CLASSES:
            _check_class(key, value, allow)
        elif key in _VALUES:
            _check_values(key, value, _VALUES[key])
        elif key == "tasks":
            for task in value if isinstance(value, list) else [value]:
                _check_values(key, task, Task)
        elif not _is_plain(value):
            raise CheckpointError(f"expected a plain value for {key}, found {value!r:.200}")


def _check_values(key: str, value: Any, of: type[Any]) -> None:
    """Checks the fields of a frozen dataclass, each a plain value or a list of them."""
    known = {field.name for field in fields(of)}
    if (
        not isinstance(value, dict)
        or not value.keys() <= known
        or not all(_is_plain(content) for content in value.values())
    ):
        raise CheckpointError(f"expected {key} to have {', '.join(sorted(known))}, found {value!r}")


def _check_class(key: str, value: Any, allow: Sequence[str]) -> None:
    """Checks for exactly ``{class_path: NAME, init_args: {NAME: plain value}}``, with an allowed name."""
    if (
        not isinstance(value, dict)
        or not value.keys() <= {"class_path", "init_args"}
        or "class_path" not in value
    ):
        raise CheckpointError(f"expected {key} to be a class_path with init_args, found {value!r}")
    arguments = value.get("init_args", {})
    try:
        name = check_name(f"model.{key}", value["class_path"], allow)
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(arguments, dict):
        raise CheckpointError(f"expected the init_args of {key} to be names and values, found {arguments!r}")
    is_trusted, texts = is_under(name, allow), _text_arguments(name)
    for argument, content in arguments.items():
        # A text could name a class or a configuration file, except in arguments declared as text, and of a
        # class whose code the user trusts.
        is_text = is_trusted or argument in texts
        is_plain = _is_plain(content) if is_text else _is_scalar(content, text=False)
        if not isinstance(argument, str) or not argument.isidentifier() or not is_plain:
            kind = "values, or lists of them," if is_trusted else "numbers"
            raise CheckpointError(
                f"expected plain {kind} as init_args of {key}, found {argument!r}: {content!r:.200}"
            )


def _text_arguments(class_path: str) -> frozenset[str]:
    """Lists the arguments of slidetl's own strategies declared as text or a choice of words."""
    module, _, name = class_path.rpartition(".")
    strategy = getattr(transfer, name, None) if module == transfer.__name__ else None
    if not is_dataclass(strategy):
        return frozenset()
    types = get_type_hints(strategy)
    is_text = {
        key: types[key] in (str, tuple[str, ...]) or get_origin(types[key]) is Literal for key in types
    }
    return frozenset(key for key in is_text if is_text[key])


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return len(values) <= _MOST_VALUES and all(map(_is_scalar, values))


def _is_scalar(value: Any, text: bool = True) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (text and isinstance(value, str))
