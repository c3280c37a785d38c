"""Publishes models to a library, and pulls models from it to build on.

A library is a folder, or anything in reach of fsspec (file://, s3://, ...). Pulled files are checked by
their hashes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slidetl.publish.library import Library


def publish(
    model: Path,
    *,
    to: str | None = None,
    name: str | None = None,
    description: str = "",
    intended_use: str = "",
    contact: str = "",
    trust: bool = False,
) -> int:
    """Adds an exported model to a library.

    Args:
        model: file of 'slidetl export'; it is run.
        to: folder or URL of the library; by default the environment variable SLIDETL_ZOO.
        name: name of the new entry, e.g. lung-fibrosis-2: small letters, digits, '.', '_', '-'; by default
            the file's. A name in use is refused.
        description: purpose of the model, for its card.
        intended_use: intended uses, and uses to avoid.
        contact: a person to ask.
        trust: vouch for a model file exported elsewhere.
    """
    library, name = _library(to, "--to"), model.stem if name is None else name
    about = {"description": description, "intended_use": intended_use, "contact": contact}
    about = {key: " ".join(text.split()) for key, text in about.items()}
    card = library.publish(model, name, **about, trusted=trust)
    print(f"{name}: published; 'slidetl zoo pull {name} --from {library.url}' gets it")
    print(f"sha256 of its card {card.sha256}")
    for key in ("description", "intended_use"):
        if not about[key]:
            words, flag = key.replace("_", " "), f"--{key.replace('_', '-')}"
            print(f"slidetl: warning: its card has no {words}; {flag} gives one", file=sys.stderr)
    return 0


def list_models(*, from_: str | None = None) -> int:
    """Lists the models of a library.

    Exit code 1 if one is damaged.

    Args:
        from_: folder or URL of the library; by default the environment variable SLIDETL_ZOO, or if it is not
            set the models pulled to this machine.
    """
    from rich.console import Console
    from rich.table import Table

    from slidetl.errors import SlidetlError
    from slidetl.text import one_line

    library = _library(from_)
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("backbone")
    for number in ("grades", "um/px", "QWK"):
        table.add_column(number, justify="right")
    table.add_column("licence")
    table.add_column("description")
    damaged = 0
    names = library.names()
    for name in names:
        try:
            card = library.read(name)
        except SlidetlError as error:  # one of them stops neither the list nor its reader
            table.add_row(one_line(name), "", "", "", "", "", one_line(str(error)))
            damaged += 1
            continue
        model = card.model
        qwk = model.evidence.figures.get("QWK") if model.evidence else None
        table.add_row(
            name,
            model.backbone,
            str(len(model.grades)),
            f"{model.tile_spec.mpp:g}",
            f"{qwk[0]:.2f}" if qwk else "",
            model.licence,
            card.description,
        )
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)
    print(f"{len(names)} models in {library.url}{f', {damaged} damaged' if damaged else ''}")
    return 1 if damaged else 0


def show(name: str, *, from_: str | None = None) -> int:
    """Prints a model's card.

    Args:
        name: name of the model, e.g. lung-fibrosis-2.
        from_: folder or URL of the library; by default the environment variable SLIDETL_ZOO, or if it is not
            set the models pulled to this machine.
    """
    card = _library(from_).read(name)
    print(_yaml(json.loads(card.to_bytes())), end="")
    print(f"sha256 of the card {card.sha256}")
    return 0


def pull(name: str, *, from_: str | None = None, sha256: str | None = None) -> int:
    """Copies a model to this machine, checks it, and trusts its model file from then on.

    Args:
        name: name of the model, e.g. lung-fibrosis-2.
        from_: folder or URL of the library; by default the environment variable SLIDETL_ZOO.
        sha256: SHA-256 of its card, given by its publisher; another card is refused.
    """
    folder = _library(from_, "--from").pull(name, sha256)
    print(f"{name}: checked, and in {folder}")
    return use(name)


def use(name: str) -> int:
    """Prints the path of a pulled model, and the configuration of a training from it.

    Args:
        name: name of the model, e.g. lung-fibrosis-2.
    """
    from slidetl.library.card import MODEL, WEIGHTS
    from slidetl.library.local import pulled_card, pulled_file

    card = pulled_card(name)
    path = pulled_file(name, MODEL)
    pulled_file(name, WEIGHTS)
    print(f"grade slides:\n  slidetl grade {path} SLIDE ...\nbegin a training from it, in its configuration:")
    print(_yaml({"model": {"backbone": card.backbone()}}), end="")
    return 0


COMMANDS = {"publish": publish, "list": list_models, "show": show, "pull": pull, "use": use}


def _library(place: str | None, flag: str = "") -> Library:
    """Opens the named library, or pulled models; with the option ``flag`` a name is required."""
    from slidetl.errors import UsageError
    from slidetl.library.local import pulled_folder
    from slidetl.publish.library import Library

    place = place or os.environ.get("SLIDETL_ZOO", "")
    if not place and flag:
        raise UsageError(f"no library is named; give {flag} DIR_OR_URL, or set SLIDETL_ZOO")
    return Library(place or str(pulled_folder()))


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    return text
