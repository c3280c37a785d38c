"""Finds the configurations shipped with slidetl by their names in the README."""

from __future__ import annotations

import sys
from pathlib import Path

import slidetl


def find_config(path: str | Path) -> Path:
    """Finds a configuration: the file itself, or else the shipped one of that name, with a message.

    Args:
        path: a YAML file; ``configs/...`` names a shipped one, unless there is such a file here.
    """
    path = Path(path)
    shipped = Path(slidetl.__file__).parent / path
    if path.exists() or path.parts[:1] != ("configs",) or ".." in path.parts or not shipped.is_file():
        return path
    print(f"slidetl: no {path} here; using the one shipped with slidetl: {shipped}", file=sys.stderr)
    return shipped


def with_shipped_configs(words: list[str]) -> list[str]:
    """Replaces the values of ``--config`` and ``-c`` in the words of a command by the paths found."""
    found = list(words)
    for place, word in enumerate(words):
        if word.startswith("--config="):
            found[place] = f"--config={find_config(word.removeprefix('--config='))}"
        elif place and words[place - 1] in ("--config", "-c"):
            found[place] = str(find_config(word))
    return found
