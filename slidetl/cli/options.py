"""Makes the options of a command from the signature and the docstring of its function.

Parameters before the ``*`` are positional arguments, those after it are options. A parameter of a dataclass
type stands for its fields: options, but for the first field of one before the ``*``. The metadata ``option``
of a field renames its option; an empty one leaves it out. Types, defaults and help are written there and
nowhere else (docs/design/command-line.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse

Command = Callable[..., int]
_EXPECTED = {int: "a whole number", float: "a number"}


def add_command(parser: argparse.ArgumentParser, command: Command) -> None:
    """Adds the arguments of a command; ``options.run(options)`` of the parsed options calls it.

    Args:
        parser: takes the text of the docstring as its description.
        command: a function with a Google-style docstring; returns the exit code. A ``bool`` is a flag, a
            ``tuple[T, ...]`` takes several values, a ``Literal`` is a choice, ``None`` by default leaves an
            option without a default.
    """
    _, parser.description = _read_docstring(command, {})
    _add_parameters(parser, parser, command)
    parser.add_argument("--status", metavar="FILE", help="keep the progress in this small JSON file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=partial(_call, command))


def _add_parameters(
    parser: argparse.ArgumentParser,
    group: argparse._ActionsContainer,
    source: Callable[..., Any],
    key: str = "",
    leads: bool = False,
) -> None:
    parameters = _parameters(source)
    hints = get_type_hints(source)
    positional = [name for name, of in parameters.items() if not key and of.kind is not of.KEYWORD_ONLY]
    positional += list(parameters)[:leads]
    renamed = _option_names(source)
    spelled = {
        name: name.upper() if name in positional else _flag(renamed.get(name, name)) for name in parameters
    }
    texts, _ = _read_docstring(source, spelled)
    for name, parameter in parameters.items():
        hint, default, text = hints[name], parameter.default, texts[name]
        if dataclasses.is_dataclass(hint):
            fields = parser.add_argument_group(text)
            _add_parameters(parser, fields, cast(type, hint), f"{name}.", name in positional)
            continue
        takes = _values(hint, default)
        if name in positional:
            if default is not parameter.empty:
                takes |= {"nargs": "*" if takes.get("nargs") == "+" else "?", "default": default}
            dest = f"{key}{name}"
            group.add_argument(dest, metavar=_metavar(name, hint), help=text, **takes)
            continue
        if takes.get("nargs") == "+" and any(
            action.nargs == "+" for action in parser._positionals._group_actions
        ):
            takes["nargs"] = 1  # several would swallow the positional arguments
            text += "; may be repeated"
        if "choices" not in takes and hint is not bool:
            takes["metavar"] = _metavar(name, hint)
        if default is parameter.empty:
            takes["required"] = True
            text += " (required)"
        else:
            takes["default"] = default
            if hint is not bool and default not in (None, "", ()):
                shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
                text += f" (default: {shown})"
        group.add_argument(spelled[name], dest=f"{key}{name}", help=text, **takes)


def _option_names(source: Callable[..., Any]) -> dict[str, str]:
    """Returns the names of a dataclass's options, if they differ from the fields."""
    fields = dataclasses.fields(source) if dataclasses.is_dataclass(source) else ()
    return {field.name: field.metadata["option"] for field in fields if "option" in field.metadata}


def _parameters(source: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters for the command line, by name."""
    left_out = [name for name, option in _option_names(source).items() if not option]
    parameters = inspect.signature(source).parameters
    return {name: of for name, of in parameters.items() if name not in left_out}


def _flag(name: str) -> str:
    """Spells a parameter as an option; the unit of pixels is its metavariable instead.

    The underscore after a keyword of Python (``from_``) is left out.
    """
    return "--" + name.removesuffix("_px").rstrip("_").replace("_", "-")


def _metavar(name: str, hint: Any) -> str:
    if name.endswith("_px"):
        return "PX"
    kinds = get_args(hint) or (hint,)
    name = name.rstrip("_")
    word = name.upper()
    if get_origin(hint) is tuple and not word.endswith("US"):
        word = word.removesuffix("S")
    return "N" if int in kinds else "X" if float in kinds else word


def _read_docstring(source: Callable[..., Any], spelled: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Returns the texts of the parameters, and the description, without markup."""

    def plain(text: str | None) -> str:
        words = " ".join((text or "").split()).removesuffix(".").replace("%", "%%")
        words = re.sub(":[a-z]+:`~?(?:[^`]*[.])?([^`]+)`", r"\1", words)
        return re.sub("``(.+?)``", lambda found: spelled.get(found[1], found[1]), words)

    doc = parse(inspect.getdoc(source) or "", DocstringStyle.GOOGLE)
    texts = {entry.arg_name: plain(entry.description) for entry in doc.params}
    return texts, plain(f"{doc.short_description} {doc.long_description or ''}") + "."


def _values(hint: Any, default: object = None) -> dict[str, Any]:
    """Returns argparse's arguments for values of a type."""
    arguments = get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if default is True else "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": arguments}
    if get_origin(hint) is tuple:
        return {**_values(arguments[0]), "nargs": "+", "action": _Gather}
    if type(None) in arguments:
        return _values(arguments[0])
    return {"type": partial(_number, hint) if hint in _EXPECTED else hint}


def _number(kind: type[int] | type[float], text: str) -> float:
    try:
        value = kind(text)
        if math.isfinite(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"expected {_EXPECTED[kind]}, not {text!r}")


class _Gather(argparse.Action):
    """Collects the values of a repeatable option, in place of its default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        before: Sequence[Any] = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if before is self.default else before), *values))


def _call(command: Command, options: argparse.Namespace) -> int:
    """Calls a command with its options, those of a dataclass as one."""

    def build(source: Callable[..., Any], key: str = "") -> Any:
        hints = get_type_hints(source)
        return source(
            **{
                name: build(hints[name], f"{name}.")
                if dataclasses.is_dataclass(hints[name])
                else getattr(options, f"{key}{name}")
                for name in _parameters(source)
            }
        )

    code: int = build(command)
    return code
