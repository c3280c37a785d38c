"""Makes foreign text harmless for a terminal, a spreadsheet and a plot, and compares names typed by hand.

Jinja escapes text for pages.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

_Path = TypeVar("_Path", str, Path)

# A spreadsheet takes a cell with such a beginning for a formula, blanks before it or not; the rest is for
# what a mark of text before it would be taken for.
_MARKED = re.compile(r"[\s']*[=+\-@]|''")


def one_line(text: str) -> str:
    """Makes one line of a text: white space becomes a space, a control character its escape."""
    return "".join(
        letter if letter.isprintable() else " " if letter.isspace() else ascii(letter)[1:-1]
        for letter in text
    )


def csv_cell(value: Any) -> Any:
    """Makes one line of text, never a spreadsheet's formula; None and NaN are empty, numbers stay.

    A formula gets a ``'`` before it, a spreadsheet's mark of text; :func:`plain_cell` takes it away.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        return value
    line = one_line(value)
    try:
        float(line)
    except ValueError:
        return f"'{line}" if _MARKED.match(line) else line
    return line  # a negative number begins as a formula does


def plain_cell(cell: str) -> str:
    """Inverts :func:`csv_cell` of one line of text."""
    return cell[1:] if cell[:1] == "'" and _MARKED.match(cell) else cell


def format_warning(message: Warning | str, *_: object, **__: object) -> str:
    """Formats a Python warning for a user of the command line."""
    return f"slidetl: warning: {message}\n"


def plot_label(text: str) -> str:
    """Makes one line of text for matplotlib, with escaped ``$``: text between two would be a formula."""
    return one_line(text).replace("$", r"\$")


def with_digits(form: str, limit: float, *values: float, most: int = 12) -> str:
    """Returns a format such as ``.3g``, with more digits if it would show a value as a limit that it is not.

    Args:
        form: a format specification of a float.
        limit: the number to tell the values from.
        values: to be formatted.
        most: number of digits at most; differences below 1e-12 do not count.
    """
    sign, rest = form.split(".")
    digits, kind = int(rest[:-1]), rest[-1]

    def hides(value: float) -> bool:
        return abs(value - limit) > 1e-12 and float(format(value, form)) == float(format(limit, form))

    while digits < most and any(map(hides, values)):
        digits += 1
        form = f"{sign}.{digits}{kind}"
    return form


def short_names(paths: Iterable[_Path]) -> dict[_Path, str]:
    """Shortens paths to their names; those of one name to as many last parts as distinguish them."""
    alike: dict[str, list[_Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        alike[Path(path).name].append(path)
    short: dict[_Path, str] = {}
    for group in alike.values():
        for count in range(1, 2 + max(len(Path(path).parts) for path in group)):
            names = [str(Path(*Path(path).parts[-count:])) for path in group]
            if len(set(names)) == len(group):
                break
        short |= dict(zip(group, names, strict=True))
    return short


def cut_names(names: Iterable[str], most: int) -> dict[str, str]:
    """Cuts names for a plot to ``most`` letters, with an ellipsis in the middle.

    All are cut at the place next to the middle that keeps them different, or less if there is none.
    """
    names = list(dict.fromkeys(names))
    for length in range(most, max(map(len, names), default=most)):
        for head in sorted(range(length), key=lambda head: abs(2 * head + 1 - length)):
            tail = length - 1 - head
            short = [
                name if len(name) <= length else f"{name[:head]}…{name[len(name) - tail :]}" for name in names
            ]
            if len(set(short)) == len(names):
                return dict(zip(names, short, strict=True))
    return dict(zip(names, names, strict=True))


def listed(names: Sequence[str], most: int = 10) -> str:
    """Formats the first names of a list for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def first_lines(message: str) -> str:
    """Shortens a parser's message, which may quote pages of input."""
    lines = [line.strip(" -:") for line in message.splitlines() if line.strip(" -:")]
    lines = [line for line in lines if not line.startswith(("Given value", "Expected a <class 'NoneType'"))]
    return " ".join(lines[:6])


def spelling(name: str) -> str:
    """Normalises the spelling of a name: 12, '12, 012 and 12.0, P7 and p7, composed or not."""
    letters = (
        "-" if unicodedata.category(letter) == "Pd" else letter
        for letter in unicodedata.normalize("NFKC", name).casefold()
        if not letter.isspace() and unicodedata.category(letter) != "Cf"
    )
    # A spreadsheet's mark of text may come along.
    text = re.sub(r"(?<![\d.,])0+(?=\d)", "", "".join(letters).removeprefix("'"))
    return re.sub(r"(\d+)[.,]0*", r"\1", text) if re.fullmatch(r"\d+[.,]0*", text) else text


def spelled_twice(names: Iterable[str]) -> list[tuple[str, str]]:
    """Finds names that may be one: each spelled otherwise than an earlier one, after that."""
    first: dict[str, str] = {}
    pairs = ((first.setdefault(spelling(name), name), name) for name in dict.fromkeys(names))
    return [(one, two) for one, two in pairs if one != two]


def distinct(one: str, two: str) -> tuple[str, str]:
    """Quotes two names, escaped if they look equal."""
    look_equal = unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", two)
    return (ascii(one), ascii(two)) if look_equal else (repr(one), repr(two))
