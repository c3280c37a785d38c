"""Records the hashes of trusted model files: only these are run on this machine.

A model file is a program. ``slidetl export`` and ``slidetl zoo pull`` record the files they write, and
``slidetl grade --trust`` a file that a person vouches for; a changed file is no longer trusted.
"""

from __future__ import annotations

import os
from pathlib import Path

from slidetl.errors import UsageError
from slidetl.files import is_sha256


def record_path() -> Path:
    """Returns the path of the list: ``trusted_models.txt`` in ``$SLIDETL_HOME``, or in ``~/.slidetl``."""
    return Path(os.environ.get("SLIDETL_HOME") or Path.home() / ".slidetl") / "trusted_models.txt"


def is_trusted(sha256: str) -> bool:
    """Tells if the file with this SHA-256 (hexadecimal) was recorded."""
    try:
        lines = record_path().read_text(encoding="utf-8").splitlines()
    except OSError:  # no list, or an unreadable one: nothing is trusted
        return False
    return any(line.split()[:1] == [sha256] for line in lines)


def trust(sha256: str, name: str) -> None:
    """Records a file.

    Args:
        sha256: of the whole file, hexadecimal.
        name: for readers of the list.

    Raises:
        UsageError: the list cannot be written, or the hash is not valid.
    """
    if not is_sha256(sha256):
        raise UsageError(f"expected a SHA-256 of 64 hexadecimal digits, not {sha256!r}")
    if is_trusted(sha256):
        return
    _append(f"{sha256}  {' '.join(name.split())}\n")


def check_record() -> None:
    """Checks, before long work, that a file can be recorded as trusted.

    Raises:
        UsageError: the list cannot be written.
    """
    _append("")


def _append(line: str) -> None:
    path = record_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One short write in append mode: several processes may record at the same time.
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot record that the model is trusted ({error.strerror}); "
            "set SLIDETL_HOME to a folder that can be written"
        ) from error
