"""Makes foreign text harmless for a terminal, a spreadsheet and a plot; Jinja escapes it for pages."""

from __future__ import annotations

import math
from typing import Any

# A spreadsheet takes a cell that starts like this for a formula.
_FORMULA = ("=", "+", "-", "@")


def one_line(text: str) -> str:
    """Makes one line of a text: white space becomes a space, a control character its escape."""
    return "".join(
        letter if letter.isprintable() else " " if letter.isspace() else ascii(letter)[1:-1]
        for letter in text
    )


def csv_cell(value: Any) -> Any:
    """Makes one line of text, never a spreadsheet's formula; None and NaN are empty, numbers stay."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        return value
    line = one_line(value)
    try:
        float(line)
    except ValueError:
        return f"'{line}" if line.lstrip().startswith(_FORMULA) else line
    return line  # a negative number begins as a formula does


def format_warning(message: Warning | str, *_: object, **__: object) -> str:
    """Formats a Python warning for a user of the command line."""
    return f"slidetl: warning: {message}\n"


def plot_label(text: str) -> str:
    """Makes one line of text for matplotlib, with escaped ``$``: text between two would be a formula."""
    return one_line(text).replace("$", r"\$")


def first_lines(message: str) -> str:
    """Shortens a parser's message, which may quote pages of input."""
    lines = [line.strip(" -:") for line in message.splitlines() if line.strip(" -:")]
    lines = [line for line in lines if not line.startswith(("Given value", "Expected a <class 'NoneType'"))]
    return " ".join(lines[:6])
