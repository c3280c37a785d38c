"""Allowed classes of configurations and checkpoints, slot by slot.

Building classes by name imports modules and calls them, so a file could run any code. This table lists the
classes allowed in each slot; all others need the user's ``--allow``.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.strategies import Strategy

from slidetl.data.sampling import Sampling
from slidetl.data.tasks import Task
from slidetl.errors import UsageError
from slidetl.models.aggregators import Pooling
from slidetl.models.heads import Head
from slidetl.models.transfer import TransferStrategy
from slidetl.training.schedules import Schedule

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Slot:
    """A place for a class in a configuration.

    Attributes:
        base: base class, or a protocol.
        homes: allowed modules, packages and classes.
    """

    base: type
    homes: tuple[str, ...]


# The others send logs to a server.
_LOGGERS = ("CSVLogger", "csv_logs", "TensorBoardLogger", "tensorboard")

SLOTS: Mapping[str, Slot] = {
    "model.aggregator": Slot(Pooling, ("slidetl.models.aggregators",)),
    "model.head": Slot(Head, ("slidetl.models.heads",)),
    "model.transfer": Slot(TransferStrategy, ("slidetl.models.transfer",)),
    "model.schedule": Slot(Schedule, ("slidetl.training.schedules",)),
    # Base classes of transforms are checked on building: a check here would import albumentations every time.
    "data.augmentation": Slot(
        object,
        ("slidetl.data.augment.Augmentation", "slidetl.data.augment.VolumeAugmentation", "albumentations"),
    ),
    "data.sampling": Slot(Sampling, ("slidetl.data.sampling",)),
    "model.tasks": Slot(Task, ("slidetl.data.tasks.Task",)),
    "data.tasks": Slot(Task, ("slidetl.data.tasks.Task",)),
    "trainer.callbacks": Slot(Callback, ("pytorch_lightning.callbacks",)),
    "trainer.logger": Slot(Logger, tuple(map("pytorch_lightning.loggers.{}".format, _LOGGERS))),
    "trainer.profiler": Slot(Profiler, ("pytorch_lightning.profilers",)),
    "trainer.strategy": Slot(Strategy, ("pytorch_lightning.strategies",)),
}
# It calls any function named by its arguments.
_NEVER = ("pytorch_lightning.callbacks.lambda_function", "pytorch_lightning.callbacks.LambdaCallback")

_permitted: set[str] = set()


def permit(allow: Sequence[str] = ()) -> None:
    """Restricts the imports of jsonargparse to :data:`SLOTS` and the user's names, from now on.

    Args:
        allow: classes or packages outside slidetl.

    Raises:
        UsageError: one is no dotted name.
    """
    # Comparisons and federations in the same process parse their own dataclasses.
    ours = {"slidetl.compare.config", "slidetl.federation.config", "slidetl.federation.combine"}
    wanted = {home for slot in SLOTS.values() for home in slot.homes} | ours | {*allow}
    for name in allow:
        if not _NAME.fullmatch(name) or name.split(".")[0] == "jsonargparse":
            raise UsageError(
                f"--allow: expected the name of a package or class, such as mylab.heads, not {name!r}"
            )
    set_parsing_settings(
        import_path_denylist=["*", *{*_NEVER, *_permitted} - wanted], import_path_allowlist=sorted(wanted)
    )
    _permitted.update(allow)


def parse(parser: ArgumentParser, values: Mapping[str, Any], allow: Sequence[str] = ()) -> Namespace:
    """Parses the values of a file, and checks every named class before calling any.

    Args:
        parser: with ``model``, ``data`` or ``trainer``.
        values: for the parser.
        allow: as for :func:`permit`.

    Raises:
        UsageError: a class is not allowed, or not of its slot.
        ArgumentError: the parser refuses a value.
    """
    permit(allow)
    try:
        config: Namespace = parser.parse_object(deepcopy(dict(values)))  # it changes lists in place
    except ArgumentError as error:
        check_import(error)
        raise
    check_classes(config.as_dict(), allow)
    return config


@contextmanager
def own_error() -> Iterator[None]:
    """Raises a UsageError in place of the parser's error caused by it, e.g. for a value of two types."""
    try:
        yield
    except ValueError as error:
        if not isinstance(error, UsageError) and isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        raise


def check_import(error: ArgumentError) -> None:
    """Raises a UsageError if jsonargparse refused an import, or an allowed module is not there."""
    if missing := re.search(r"No module named '?(\w+)", str(error)):
        raise UsageError(
            f"there is no Python module {missing[1]!r}; install it, or set PYTHONPATH to the folder that "
            "it is in"
        ) from error
    if denied := re.search(r"Importing '(.+?)' is not allowed", str(error)):
        raise UsageError(
            f"it would import {denied[1]!r:.100}, which is neither slidetl's nor allowed; "
            f"if you trust it, add --allow {denied[1]}"
        ) from error


def check_classes(config: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
    """Checks every class named by a parsed configuration, before calling any.

    Args:
        config: with ``model``, ``data`` and ``trainer``, as parsed by jsonargparse.
        allow: as for :func:`permit`.

    Raises:
        UsageError: a class is not allowed, or not of its slot.
    """
    for part in ("model", "data", "trainer"):
        for key, value in (config.get(part) or {}).items():
            if value is None and part == "model":  # jsonargparse takes it for any type
                raise UsageError(f"model.{key}: expected a value, found none; leave it out for its default")
            _check(f"{part}.{key}", SLOTS.get(f"{part}.{key}"), value, allow)


def check_name(place: str, name: object, allow: Sequence[str] = ()) -> str:
    """Checks if a slot allows a class, without importing it.

    Args:
        place: key of the slot, as in :data:`SLOTS`.
        name: dotted name of the class.
        allow: as for :func:`permit`.

    Raises:
        UsageError: the slot refuses it.
    """
    slot = SLOTS.get(place)
    homes = slot.homes if slot else ()
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"expected the class_path of {place} to be the name of a class, found {name!r:.100}")
    if not is_under(name, allow) and (is_under(name, _NEVER) or not is_under(name, homes)):
        expected = f"expected a class of {', '.join(homes)}" if homes else "expected no class"
        raise UsageError(
            f"{place} would import {name!r:.100}, which is neither slidetl's nor allowed: {expected}; "
            f"if you trust it, add --allow {name}"
        )
    return name


def _check(place: str, slot: Slot | None, value: Any, allow: Sequence[str]) -> None:
    if isinstance(value, Mapping):
        if "class_path" in value:
            _check_class(place, slot, value["class_path"], allow)
        for entry in value.values():
            _check(place, slot, entry, allow)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check(place, slot, entry, allow)
    elif callable(value):
        name = check_name(place, _defined_as(value), allow)
        if not isinstance(value, type) and not is_under(name, allow):
            raise UsageError(
                f"{place}: expected a class, {name!r} is none; if you trust it, add --allow {name}"
            )


def _check_class(place: str, slot: Slot | None, name: object, allow: Sequence[str]) -> None:
    module, _, attribute = check_name(place, name, allow).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{place}: there is no class {name!r}: {error}") from error
    if not isinstance(found, type):
        raise UsageError(f"{place}: expected a class, {name!r} is none")
    check_name(place, _defined_as(found), allow)
    if slot is not None and not _derives(found, slot.base):
        raise UsageError(
            f"{place}: expected a class that derives from {slot.base.__name__}, {name!r} does not"
        )


def _derives(found: type, base: type) -> bool:
    if base in found.__mro__:
        return True
    methods = [name for name, value in vars(base).items() if inspect.isfunction(value) and name[0] != "_"]
    return bool(getattr(base, "_is_protocol", False)) and all(hasattr(found, name) for name in methods)


def _defined_as(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def is_under(name: str, homes: Sequence[str]) -> bool:
    """Tells if a dotted name is one of some modules, packages and classes, or is in one."""
    return any(name == home or name.startswith(f"{home}.") for home in homes)
