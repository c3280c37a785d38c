"""``slidetl zoo``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUMMARY = (
    "A library of models, to build on each other's: a folder, or anything that fsspec reaches (file://, "
    "s3://, ...). What is pulled is checked by its hashes."
)
_LIBRARY = "folder or URL of the library; by default the environment variable SLIDETL_ZOO"
_OR_PULLED = f"{_LIBRARY}, or if that is not set what was pulled to this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions, each with its arguments."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    publish = _add_action(actions, "publish", _publish, "Add an exported model to a library.")
    publish.add_argument(
        "model", metavar="MODEL.pt", type=Path, help="file that 'slidetl export' wrote; it is run"
    )
    _add_place(publish, "--to", _LIBRARY)
    publish.add_argument(
        "--name",
        default=argparse.SUPPRESS,  # here and below: else the help says "(default: None)"
        help="of the new entry, e.g. lung-fibrosis-2: small letters, digits, '.', '_', '-'; by default the "
        "file's. A name that is taken is refused",
    )
    publish.add_argument(
        "--description", metavar="TEXT", default="", help="what the model does, for its card"
    )
    publish.add_argument(
        "--intended-use", metavar="TEXT", default="", help="what it was made for, and for what it was not"
    )
    publish.add_argument("--contact", metavar="TEXT", default="", help="whom to ask")
    publish.add_argument(
        "--trust", action="store_true", help="vouch for a model file that was exported elsewhere"
    )

    listing = _add_action(
        actions, "list", _list, "List the models of a library. Exit code 1 if one is damaged."
    )
    _add_place(listing, "--from", _OR_PULLED)

    show = _add_action(actions, "show", _show, "Print a model's card.")
    _add_name(show)
    _add_place(show, "--from", _OR_PULLED)

    pull = _add_action(
        actions,
        "pull",
        _pull,
        "Copy a model to this machine, check it, and trust its model file from then on.",
    )
    _add_name(pull)
    _add_place(pull, "--from", _LIBRARY)
    pull.add_argument(
        "--sha256",
        metavar="HASH",
        default=argparse.SUPPRESS,
        help="SHA-256 of its card, as its publisher told it; another card is refused",
    )

    use = _add_action(
        actions, "use", _use, "Say where a pulled model lies, and how the next training begins from it."
    )
    _add_name(use)


def run(options: argparse.Namespace) -> int:
    """Does what was asked for."""
    code: int = options.act(options)
    return code


def _publish(options: argparse.Namespace) -> int:
    from slidetl.publish.library import Library

    name = getattr(options, "name", options.model.stem)
    library = Library(_place(options, "--to"))
    card = library.publish(
        options.model,
        name,
        description=" ".join(options.description.split()),
        intended_use=" ".join(options.intended_use.split()),
        contact=" ".join(options.contact.split()),
        trusted=options.trust,
    )
    print(f"{name}: published; 'slidetl zoo pull {name} --from {library.url}' gets it")
    print(f"sha256 of its card {card.sha256}")
    for key, flag in (("description", "--description"), ("intended_use", "--intended-use")):
        if not getattr(card, key):
            print(
                f"slidetl: warning: its card has no {key.replace('_', ' ')}; {flag} gives one",
                file=sys.stderr,
            )
    return 0


def _list(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from slidetl.errors import SlidetlError
    from slidetl.publish.library import Library

    library = Library(_place(options, "--from", pulled=True))
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("backbone")
    table.add_column("grades", justify="right")
    table.add_column("um/px", justify="right")
    table.add_column("QWK", justify="right")
    table.add_column("licence")
    table.add_column("description")
    damaged = 0
    names = library.names()
    for name in names:
        try:
            card = library.read(name)
        except SlidetlError as error:  # one of them stops neither the list nor its reader
            table.add_row(name, "", "", "", "", "", str(error))
            damaged += 1
            continue
        model = card.model
        figure = model.evidence.figures.get("QWK") if model.evidence else None
        table.add_row(
            name,
            model.backbone,
            str(len(model.grades)),
            f"{model.tile_spec.mpp:g}",
            f"{figure[0]:.2f}" if figure else "",
            model.licence,
            card.description,
        )
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)
    print(f"{len(names)} models in {library.url}{f', {damaged} damaged' if damaged else ''}")
    return 1 if damaged else 0


def _show(options: argparse.Namespace) -> int:
    from slidetl.publish.library import Library

    card = Library(_place(options, "--from", pulled=True)).read(options.name)
    print(_yaml(json.loads(card.to_bytes())), end="")
    print(f"sha256 of the card {card.sha256}")
    return 0


def _pull(options: argparse.Namespace) -> int:
    from slidetl.publish.library import Library

    library = Library(_place(options, "--from"))
    folder = library.pull(options.name, getattr(options, "sha256", None))
    print(f"{options.name}: checked, and in {folder}")
    return _use(options)


def _use(options: argparse.Namespace) -> int:
    from slidetl.library.card import MODEL, WEIGHTS
    from slidetl.library.local import pulled_card, pulled_file

    card = pulled_card(options.name)
    path = pulled_file(options.name, MODEL)
    pulled_file(options.name, WEIGHTS)
    print(f"grade slides:\n  slidetl grade {path} SLIDE ...\nbegin a training from it, in its configuration:")
    print(_yaml({"model": {"backbone": card.backbone()}}), end="")
    return 0


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    act: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=f"{summary[0].lower()}{summary[1:].partition('.')[0]}",
        description=summary,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(act=act)
    return parser


def _add_place(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, dest="place", metavar="DIR_OR_URL", default=argparse.SUPPRESS, help=text)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the model, e.g. lung-fibrosis-2")


def _place(options: argparse.Namespace, flag: str, pulled: bool = False) -> str:
    from slidetl.errors import UsageError
    from slidetl.library.local import pulled_folder

    place: str = getattr(options, "place", "") or os.environ.get("SLIDETL_ZOO", "")
    if not place and pulled:
        place = str(pulled_folder())
    if not place:
        raise UsageError(f"no library is named; give {flag} DIR_OR_URL, or set SLIDETL_ZOO")
    return place


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    return text
