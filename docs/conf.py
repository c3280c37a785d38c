"""Configuration of the documentation site; ``scripts/docs`` builds it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import slidetl
from slidetl.cli import COMMANDS, TRAINING_COMMANDS, _parser

project = "slidetl"
author = copyright = "The slidetl authors"
version = release = slidetl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"slidetl {version}"
html_theme_options = {"top_of_page_buttons": []}  # one would edit on a server
myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # a report of `slidetl compare` may skip a level
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
exclude_patterns = ["_build"]

HERE = Path(__file__).parent


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Lists the commands below a parser that has subcommands, or the parser itself."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [found for child in action.choices.values() for found in _commands(child)]
    return [parser]


def write_command_line(app: Any) -> None:
    """Writes the page of the command line from the help of each command."""
    os.environ["COLUMNS"] = "100"
    lines = [
        "# Command line",
        "",
        "As `slidetl COMMAND --help` prints it. The training commands (`fit`, `find-lr`, `validate`, `test`, "
        "`predict`) are Lightning's: their options are the keys of [the configuration](configuration.md).",
        "",
        "| command | |",
        "|---|---|",
        *(f"| `slidetl {name}` | {text} |" for name, text in COMMANDS.items()),
    ]
    for name in COMMANDS:
        if name not in TRAINING_COMMANDS:
            for parser in _commands(_parser(name)):
                if len(parser._actions) > 1:
                    lines += ["", f"## {parser.prog}", "", "```text", parser.format_help().rstrip(), "```"]
    (HERE / "reference" / "command-line.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app: Any) -> None:
    """Has the generated page written before the sources are read."""
    app.connect("builder-inited", write_command_line)
