"""Builds a training from ``model``, ``data`` and ``trainer`` of a configuration of ``slidetl fit``."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentError
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LightningArgumentParser

from slidetl.data.datamodule import SlideDataModule
from slidetl.errors import UsageError
from slidetl.models.precision import has_bfloat16
from slidetl.text import first_lines
from slidetl.training.grader import SlideGrader
from slidetl.training.slots import own_error, parse

_ANY_DEVICES = (None, "auto")  # nobody has chosen
_OF_MANY: dict[str, Any] = {  # without logs, bars and checkpoints
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_SET = ("default_root_dir", "callbacks", *_OF_MANY)  # by build_trainer


def parse_training(
    config: Mapping[str, Any], grades: Sequence[str], seed: int, allow: Sequence[str] = ()
) -> Any:
    """Parses and checks the configuration of a training.

    Args:
        config: ``model``, ``data`` without manifest and cache, and ``trainer``.
        grades: names, lowest first.
        seed: of the data.
        allow: names outside slidetl that it may import.

    Raises:
        UsageError: ``slidetl fit`` would refuse it, or it has options that :func:`build_trainer` sets, or
            takes several devices.
    """
    for name in _SET:
        if name in config["trainer"]:
            raise UsageError(f"trainer.{name} is set by the command itself; leave it out")
    tasks = config["model"].get("tasks", [])  # given once, as to 'slidetl fit'
    data = {"tasks": tasks, **config["data"], "grades": list(grades), "seed": seed}
    model = {**config["model"], "grades": list(grades)}
    try:
        parsed = parse(_parser(), {"model": model, "data": data, "trainer": config["trainer"]}, allow)
    except ArgumentError as error:
        raise UsageError(first_lines(str(error))) from error
    _check_alone(parsed.trainer)
    return parsed


def build_grader(parsed: Any) -> tuple[SlideGrader, dict[str, Any]]:
    """Builds the network of a parsed configuration; returns it with the options of its data."""
    with own_error():
        ready = _parser().instantiate_classes(parsed)
    return ready.model, dict(ready.data)


def default_precision(accelerator: object, devices: object) -> str:
    """Returns Lightning's name of the devices' number format: bfloat16 on GPUs that have it, or float32."""
    numbers = [card for card in _listed(devices) or [0] if str(card).strip().isdecimal()]  # it refuses others
    cards = [torch.device("cuda", int(number)) for number in numbers]
    return "bf16-mixed" if accelerator != "cpu" and all(map(has_bfloat16, cards)) else "32-true"


def _listed(devices: object) -> list[Any] | None:
    """Returns the devices that ``trainer.devices`` lists, as ``[1]`` or ``"1,"``; None if it lists none."""
    if isinstance(devices, str) and "," in devices:
        return devices.strip(", ").split(",")
    return devices if isinstance(devices, list) else None


def build_trainer(options: Mapping[str, Any], folder: Path, callbacks: Sequence[Callback]) -> pl.Trainer:
    """Builds a trainer without logs, bars and checkpoints, for one of many trainings.

    Args:
        options: of Lightning's trainer, as :func:`parse_training` allows them; they go before our defaults.
        folder: its ``default_root_dir``.
        callbacks: what watches the training.
    """
    return pl.Trainer(
        **{
            "deterministic": "warn",
            "precision": default_precision(options.get("accelerator", "auto"), options.get("devices")),
            **options,
            "devices": 1 if options.get("devices") in _ANY_DEVICES else options["devices"],
            # One process, however many tasks its Slurm job has; Lightning refuses some of these.
            "plugins": [LightningEnvironment(), *(options.get("plugins") or [])],
        },
        default_root_dir=folder,
        callbacks=list(callbacks),
        **_OF_MANY,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences messages of Lightning, repeated in each of many trainings."""
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*LeafSpec.*is deprecated.*",
            ".*number of training batches.*is smaller than the logging interval.*",
            ".*Checkpoint directory.*exists.*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _check_alone(trainer: Any) -> None:
    """Refuses several devices: Lightning would start the whole command again for each further one."""
    devices, nodes = trainer.devices, trainer.num_nodes
    listed = _listed(devices)
    is_one = len(listed) == 1 if listed is not None else devices in (*_ANY_DEVICES, 1, "1")
    if not is_one or nodes not in (None, 1):
        raise UsageError(
            "expected one device for each of many trainings, not "
            f"trainer.devices {devices!r} with trainer.num_nodes {nodes}; leave both out, or name one card, "
            "as in trainer.devices: [1]"
        )


@cache
def _parser() -> LightningArgumentParser:
    """Builds the parser of a training's configuration, once for all trainings of a process."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(SlideGrader, "model")
    parser.add_class_arguments(SlideDataModule, "data", skip={"manifest", "cache"}, instantiate=False)
    parser.add_class_arguments(pl.Trainer, "trainer", instantiate=False)
    return parser
