"""Exceptions of slidetl.

Each inherits a fitting builtin, and each message states the expected and the found value, and a remedy::

    SlidetlError
    |-- UsageError (ValueError)             an invalid option or argument
    |-- ManifestError (ValueError)          faults in a manifest, all of them, with line numbers
    |-- AnnotationError (ValueError)        a file of annotations is damaged, or does not fit its slide
    |-- SlideError (OSError)
    |   |-- SlideOpenError                  not a slide, or an unreadable one
    |   |-- SlideReadError                  opened, but a region of it is damaged
    |   |-- SpacingError (ValueError)       no physical spacing, or coarser than asked for
    |   |-- UnfitSlideError (ValueError)    readable, but too little tissue or unlike the training slides
    |   `-- VolumeError (ValueError)        not one CT volume in Hounsfield units
    |-- CacheError (OSError)
    |   |-- CacheMissingError (FileNotFoundError)
    |   |-- CacheMismatchError (ValueError) made with other parameters or from another slide
    |   `-- CacheCorruptError               wrong checksum
    |-- ProcessEnded (RuntimeError)         a worker process ended before its work was done
    |-- WeightsError (ValueError)           weights do not fit, or cannot be found
    |-- CheckpointError (ValueError)        a foreign checkpoint, or forbidden content
    |-- ModelFileError (ValueError)         a foreign or damaged exported model
    |-- FederationError (RuntimeError)      too few sites are left in a round
    `-- OutputError (OSError)               a result cannot be written: no room, no permission
        `-- FileHeldError                   the file to replace is open in another program
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slidetl.text import one_line

# Messages of a GPU: torch's, which TorchScript raises as a RuntimeError, and those of cuDNN and cuBLAS. Where
# no plan of cuDNN has room, torch says "GET (or FIND) was unable to find an engine".
_GPU_FULL = re.compile("out of memory|STATUS_ALLOC_FAILED|unable to find an engine", re.IGNORECASE)
# Messages of libraries instead of MemoryError: torch, OpenCV, C++, a DataLoader with a killed worker.
_NO_MEMORY = re.compile(
    "(can.?t|cannot|unable to) allocate|(not enough|insufficient|out of) (shared )?memory|bad_alloc"
    "|can.?t start new thread|failed to map segment|killed by signal: (killed|bus)",
    re.IGNORECASE,
)


class SlidetlError(Exception):
    """Base class of all exceptions raised by slidetl on purpose."""


class UsageError(SlidetlError, ValueError):
    """An option or argument is invalid."""


class ManifestError(SlidetlError, ValueError):
    """Faults in a manifest: all of them together, each with its line number.

    Args:
        message: for the reader.
        faults: line and text of each fault of a line.
    """

    def __init__(self, message: str, faults: Sequence[tuple[int, str]] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class AnnotationError(SlidetlError, ValueError):
    """A file of annotations is damaged, or does not fit its slide."""


class SlideError(SlidetlError, OSError):
    """Something is wrong with one slide; the others are unharmed."""


class SlideOpenError(SlideError):
    """The file is not a slide, or an unreadable one."""


class SlideReadError(SlideError):
    """The slide opened, but a region of it cannot be decoded."""


class SpacingError(SlideError, ValueError):
    """The slide has no physical spacing, or is coarser than the spacing asked for."""


class UnfitSlideError(SlideError, ValueError):
    """The slide has too little tissue, or is unlike the training slides."""


class VolumeError(SlideError, ValueError):
    """A series is not one CT volume in Hounsfield units, or its file is damaged."""


class CacheError(SlidetlError, OSError):
    """Something is wrong with a tile cache."""


class CacheMissingError(CacheError, FileNotFoundError):
    """There is no finished cache where one was expected."""


class CacheMismatchError(CacheError, ValueError):
    """The cache was made with other parameters, or from another slide."""


class CacheCorruptError(CacheError):
    """Bytes in the cache fail their checksum."""


class ProcessEnded(SlidetlError, RuntimeError):
    """A worker process ended before its work was done."""


class WeightsError(SlidetlError, ValueError):
    """Pretrained weights cannot be found, or do not fit the network."""


class CheckpointError(SlidetlError, ValueError):
    """The checkpoint is not from slidetl, or names something forbidden."""


class ModelFileError(SlidetlError, ValueError):
    """The exported model is not from slidetl, or is damaged."""


class FederationError(SlidetlError, RuntimeError):
    """Too few sites of a federation are left, or its network is no longer usable."""


class OutputError(SlidetlError, OSError):
    """A file cannot be written; its earlier version is kept."""


class FileHeldError(OutputError):
    """A file cannot be replaced, as it is open in another program."""


def refuse_unused(source: Callable[..., Any], values: Mapping[str, Any], why: str) -> None:
    """Raises a UsageError if options that have no effect differ from their defaults.

    Args:
        source: function or dataclass with the defaults; metadata ``option`` of a field is its name as option.
        values: of the options, by the names of the parameters.
        why: the reason, such as "without --evidence".
    """
    parameters = inspect.signature(source).parameters
    fields = dataclasses.fields(source) if dataclasses.is_dataclass(source) else ()
    names = {field.name: field.metadata.get("option", field.name) for field in fields}
    if given := [name for name, value in values.items() if value != parameters[name].default]:
        options = ", ".join("--" + names.get(name, name).replace("_", "-") for name in given)
        raise UsageError(f"{options} would have no effect {why}; change one of them")


@contextlib.contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Tells how to install a package whose import fails within."""
    try:
        yield
    except ImportError as error:
        raise UsageError(f"{what}: pip install 'slidetl[{extra}]'") from error


def is_gpu_full(error: BaseException) -> bool:
    """Tells if an error is a GPU's lack of memory, for which a smaller batch is a remedy."""
    return _GPU_FULL.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Tells if an error, or its cause, is a lack of memory, of a GPU or of the machine."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SlidetlError):
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if is_gpu_full(cause) or _NO_MEMORY.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def describe_failure(error: BaseException, less_memory: str) -> str:
    """Describes the failure of a job in one line.

    ``less_memory`` is the remedy for lack of memory, an infinitive with its options.
    """
    text = one_line(str(error))[:500]
    if is_out_of_memory(error):
        return f"out of memory: {less_memory}" + (f" ({text[:200]})" if text else "")
    return text if isinstance(error, (SlidetlError, OSError)) else f"{type(error).__name__}: {text}"
