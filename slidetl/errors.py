"""Every error that slidetl raises on purpose.

Each inherits the builtin that a caller would catch, and each message says what was
expected, what came, and what to do about it::

    SlidetlError
    |-- UsageError (ValueError)             an option or argument that cannot be meant
    |-- ManifestError (ValueError)          faults in a manifest, all of them, with line numbers
    |-- SlideError (OSError)
    |   |-- SlideOpenError                  not a slide, or not one that can be read
    |   |-- SlideReadError                  opened, but a region of it is damaged
    |   |-- SpacingError (ValueError)       no physical spacing, or coarser than asked for
    |   `-- UnfitSlideError (ValueError)    readable, but not one that the model can be trusted on
    |-- CacheError (OSError)
    |   |-- CacheMissingError (FileNotFoundError)
    |   |-- CacheMismatchError (ValueError) made with other parameters or from another slide
    |   `-- CacheCorruptError               bytes that fail their checksum
    |-- ProcessEnded (RuntimeError)         a process that did a part of the work ended before it was done
    |-- WeightsError (ValueError)           weights that do not fit, or cannot be found
    |-- CheckpointError (ValueError)        a checkpoint that is not ours, or not allowed
    |-- ModelFileError (ValueError)         an exported model that is not ours, or damaged
    `-- OutputError (OSError)               a result that cannot be written: no room, no permission
"""

from __future__ import annotations

import errno
import re

from slidetl.text import one_line

# What libraries say instead of raising MemoryError: torch, OpenCV, C++, a DataLoader whose worker was killed.
_NO_MEMORY = re.compile(
    "(can.?t|cannot|unable to) allocate|(not enough|insufficient|out of) (shared )?memory|bad_alloc"
    "|can.?t start new thread|failed to map segment|killed by signal: (killed|bus)",
    re.IGNORECASE,
)


class SlidetlError(Exception):
    """Base class: catch this to catch whatever slidetl raises on purpose."""


class UsageError(SlidetlError, ValueError):
    """An option or argument that cannot be meant."""


class ManifestError(SlidetlError, ValueError):
    """Faults in a manifest: all of them together, each with its line number."""


class SlideError(SlidetlError, OSError):
    """Something is wrong with one slide; the others are unharmed."""


class SlideOpenError(SlideError):
    """The file is not a slide, or not one that can be read."""


class SlideReadError(SlideError):
    """The slide opened, but a region of it cannot be decoded."""


class SpacingError(SlideError, ValueError):
    """The slide has no physical spacing, or is coarser than the spacing asked for."""


class UnfitSlideError(SlideError, ValueError):
    """Too little tissue, or unlike the slides that the model was trained on."""


class CacheError(SlidetlError, OSError):
    """Something is wrong with a tile cache."""


class CacheMissingError(CacheError, FileNotFoundError):
    """There is no finished cache where one was expected."""


class CacheMismatchError(CacheError, ValueError):
    """The cache was made with other parameters, or from another slide."""


class CacheCorruptError(CacheError):
    """Bytes in the cache fail their checksum."""


class ProcessEnded(SlidetlError, RuntimeError):
    """A process that did a part of the work ended before it was done."""


class WeightsError(SlidetlError, ValueError):
    """Pretrained weights cannot be found, or do not fit the network."""


class CheckpointError(SlidetlError, ValueError):
    """The checkpoint is not one of ours, or names something that is not allowed."""


class ModelFileError(SlidetlError, ValueError):
    """The exported model is not one of ours, or is damaged."""


class OutputError(SlidetlError, OSError):
    """A file cannot be written; the one that was there before is kept."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tells if an error, or the one that it came from, is want of memory."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SlidetlError):
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if _NO_MEMORY.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def describe_failure(error: BaseException, less_memory: str) -> str:
    """Describes in one line what ended one piece of work, whatever was raised.

    Args:
        error: of slidetl, of the machine, or of a library.
        less_memory: what to do about want of memory, an infinitive with its options.
    """
    text = one_line(str(error))[:500]
    if is_out_of_memory(error):
        return f"out of memory: {less_memory}" + (f" ({text[:200]})" if text else "")
    return text if isinstance(error, (SlidetlError, OSError)) else f"{type(error).__name__}: {text}"
