from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from slidetl.cli import COMMANDS, TRAINING_COMMANDS, _parser, main
from slidetl.cli.options import add_command
from slidetl.errors import UsageError
from slidetl.grading.options import GradeOptions
from slidetl.models.spec import BackboneSpec
from slidetl.synthetic.cohort import SyntheticCohort
from slidetl.tiles.grid import TileSpec
from slidetl.training.options import EmbedOptions, FeatureStudy, SimilarityOptions

OURS = [name for name in COMMANDS if name not in TRAINING_COMMANDS]


@dataclass(frozen=True)
class Frame:
    """A frame.

    Attributes:
        side_px: side of the frame, pixels.
        kind: shape, for a ``side_px`` of 100 % or more.
        weight: mass, grams; by default it is not known.

    Raises:
        UsageError: a side below 1.
    """

    side_px: int
    kind: Literal["round", "square"] = "square"
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.side_px < 1:
            raise UsageError(f"side must be at least 1 pixel, not {self.side_px}")


def hang(
    wall: Path,
    pictures: tuple[Path, ...],
    *,
    frame: Frame,
    names: tuple[str, ...] = ("a", "b"),
    is_straight: bool = False,
) -> int:
    """Hangs pictures on a wall.

    All of them.

    Args:
        wall: where they go.
        pictures: what hangs there.
        frame: the frame of each.
        names: what they are called.
        is_straight: mind the ``frame``.
    """
    CALLS.append((wall, pictures, frame, names, is_straight))
    return 7


def count(folder: Path | None = None, *, names: tuple[str, ...] = ()) -> int:
    """Counts.

    Args:
        folder: where.
        names: of what.
    """
    CALLS.append((folder, names))
    return 0


CALLS: list[tuple[object, ...]] = []


def run(command: object, words: str) -> tuple[object, ...]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_command(parser, command)  # type: ignore[arg-type]
    options = parser.parse_args(words.split())
    code = options.run(options)
    assert code == (7 if command is hang else 0)
    return CALLS.pop()


def test_the_function_gets_what_was_given_and_the_defaults_of_the_rest() -> None:
    wall, pictures = Path("w"), (Path("p"), Path("q"))
    assert run(hang, "w p q --side 3") == (wall, pictures, Frame(3), ("a", "b"), False)
    words = "--side 3 --kind round --weight 2.5 --is-straight --names x --names y w p q"
    assert run(hang, words) == (wall, pictures, Frame(3, "round", 2.5), ("x", "y"), True)
    assert run(count, "") == (None, ())
    assert run(count, "f --names x y --names z") == (Path("f"), ("x", "y", "z"))


@dataclass(frozen=True)
class Hook:
    """A hook.

    Attributes:
        place: where it is.
        load: how much it bears, as a :class:`~of.some.Number`.
        is_firm: fixed with a screw.
        patience: not an option.
    """

    place: Path
    load: int = field(default=2, metadata={"option": "bears"})
    is_firm: bool = True
    patience: int = field(default=3, metadata={"option": ""})


def test_a_dataclass_may_lead_rename_and_leave_out(capsys: pytest.CaptureFixture[str]) -> None:
    def drive(hook: Hook, *, is_quiet: bool = False) -> int:
        """Drives a hook.

        Args:
            hook: the hook.
            is_quiet: make no noise.
        """
        CALLS.append((hook, is_quiet))
        return 0

    assert run(drive, "wall") == (Hook(Path("wall")), False)
    assert run(drive, "wall --bears 5 --no-is-firm --is-quiet") == (Hook(Path("wall"), 5, False), True)
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_command(parser, drive)
    text = parser.format_help()
    assert "how much it bears, as a Number" in text and "patience" not in text and "--load" not in text


def test_a_dataclass_checks_its_values() -> None:
    with pytest.raises(UsageError, match="side must be at least 1 pixel, not 0"):
        run(hang, "w p --side 0")


def test_the_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="hang")
    add_command(parser, hang)
    text = " ".join(parser.format_help().split())
    for part in (
        "Hangs pictures on a wall. All of them.",
        "WALL where they go",
        "PICTURE what hangs there",
        "the frame of each: --side PX side of the frame, pixels (required)",
        "--kind {round,square} shape, for a --side of 100 % or more (default: square)",
        "--weight X mass, grams; by default it is not known",
        "--names NAME what they are called; may be repeated (default: a b)",
        "--is-straight mind the --frame",
    ):
        assert part in text
    assert "None" not in text and "``" not in text


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields a parser and those of its subcommands, without those that are not filled."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from commands(child)
            return
    if len(parser._actions) > 1:
        yield parser


@pytest.mark.parametrize("command", OURS)
def test_every_option_is_described(command: str) -> None:
    filled = list(commands(_parser(command)))
    assert filled
    for parser in filled:
        assert parser.description
        for action in parser._actions:
            assert action.help and len(action.help.split()) >= 2, f"{parser.prog} {action.dest}"
        text = parser.format_help()
        assert "None" not in text and "SUPPRESS" not in text and "``" not in text and ":func:" not in text


@pytest.mark.parametrize("command", OURS)
def test_a_wrong_value_is_one_line_that_names_the_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for parser in commands(_parser(command)):
        for action in parser._actions:
            takes_text = action.choices is None and action.type in (None, str, Path)
            if takes_text or not action.option_strings:
                continue
            option = action.option_strings[0]
            for wrong in ("x", "nan"):
                with pytest.raises(SystemExit) as ended:
                    main([*parser.prog.split()[1:], option, wrong])
                (line,) = capsys.readouterr().err.splitlines()
                assert ended.value.code == 2
                assert f"{option}: " in line and f"'{wrong}'" in line, line
                assert "expected a" in line or "choose from" in line


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("tile", TileSpec),
        ("synth", SyntheticCohort),
        ("embed", EmbedOptions),
        ("embed", BackboneSpec),
        ("fit_features", FeatureStudy),
        ("similarity", SimilarityOptions),
        ("grade", GradeOptions),
    ],
)
def test_fields_are_options_and_are_not_written_again(command: str, options: type) -> None:
    (parser,) = commands(_parser(command.replace("_", "-")))
    there = {action.dest.rpartition(".")[2] for action in parser._actions}
    names = {item.name for item in fields(options) if item.metadata.get("option") != ""}
    assert names <= there
    module = Path(add_command.__code__.co_filename).with_name(f"{command}.py")
    arguments = {node.arg for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.arg)}
    assert not names & arguments
