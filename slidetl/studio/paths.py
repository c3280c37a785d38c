"""Confines every path of a request to the root folder."""

from __future__ import annotations

import re
from pathlib import Path

from slidetl.errors import UsageError

# Of projects, runs and models: no dot at the start, no separator.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


class Refused(UsageError):
    """A request is refused; the page says why.

    Args:
        message: for the reader.
        status: of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def check_name(name: str, what: str) -> str:
    """Returns a name fit for a folder; raises Refused for any other."""
    if not _NAME.fullmatch(name):
        raise Refused(
            f"the name of a {what} has letters, digits, - and _ only, at most 40, "
            "and begins with a letter or digit"
        )
    return name


def is_text(path: Path) -> bool:
    """Tells if a page and a table can have a path; old shares have names that are not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


class Root:
    """The folder that the studio may read and write; symbolic links are resolved before a path is judged.

    Args:
        folder: an existing folder.

    Attributes:
        folder: without links.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve(strict=True)
        if not is_text(self.folder):
            raise Refused("the path of the studio's folder must be UTF-8; rename it")

    def find(self, text: str | Path) -> Path:
        """Resolves a path, relative to the root or absolute.

        Raises:
            Refused: it leads out of the root, itself or by a link.
        """
        try:
            path = (self.folder / text).resolve()
            path.exists()  # raises for a name that no file system takes
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
            raise Refused("not a path") from error
        if not is_text(path):  # by a link
            raise Refused("this path is not UTF-8; rename it")
        if not self.holds(path):
            raise Refused("this path leads out of the folder of the studio", 403)
        return path

    def holds(self, path: Path) -> bool:
        """Tells if a path, its links resolved, lies in the root."""
        try:
            return path.resolve().is_relative_to(self.folder)
        except (OSError, RuntimeError, ValueError):
            return False

    def show(self, path: Path) -> str:
        """Returns a path relative to the root, as the pages show it."""
        return str(path.relative_to(self.folder))
