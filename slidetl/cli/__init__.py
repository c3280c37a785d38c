"""The command line: ``slidetl COMMAND``, the same as ``python -m slidetl COMMAND``.

Each command is a module with a function of its name, its signature and docstring being the options, or
with ``COMMANDS``, such functions by the names of its subcommands; the training commands are Lightning's.
A user's mistake ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import slidetl
from slidetl.errors import OutputError, SlidetlError, describe_failure, is_out_of_memory
from slidetl.files import describe_full, is_full
from slidetl.processor import postpone_collection, prepare_for_networks
from slidetl.status import show_end, status_file
from slidetl.text import format_warning, one_line

TRAINING_COMMANDS = {
    "fit": "train a network (LightningCLI; see 'slidetl fit --help')",
    "find-lr": "try growing learning rates, and plot the loss to choose one by",
    "validate": "evaluate a checkpoint on the validation part",
    "test": "evaluate a checkpoint on the test part: accuracy, QWK, MAE, confusion matrix, predictions",
    "predict": "predict every slide of a manifest or folder",
}
# In the order of the help; each is a module, except the training commands.
COMMANDS = {
    "synth": "draw synthetic lung slides of known grade",
    "tile": "cut slides into a tile cache",
    "cache": "look into a tile cache, verify it, or mend it",
    "augment": "draw a contact sheet of a tile as trainings see it",
    "embed": "store the features of every tile of a cache",
    "features": "exchange stored features with CLAM, TRIDENT, STAMP and AnnData",
    "fit-features": "grade slides by classical models on stored features",
    **TRAINING_COMMANDS,
    "backbones": "list networks, their size, and whether their weights are at hand",
    "atlas": "find recurring patterns and similar tiles in stored features",
    "compare": "compare arms (scratch, transfer, classical) by cross-validation over patients",
    "federate": "train one grader over several sites whose slides stay there",
    "similarity": "compare the layers of networks before and after training",
    "export": "write a checkpoint as one TorchScript file",
    "grade": "grade slides with an exported file",
    "doctor": "examine the installation, the machine and file systems",
    "zoo": "publish models to a library, and build on those of others",
    "studio": "open a page in the browser that does all this without a command line",
}
_ELSEWHERE = {"studio": "slidetl.studio.command"}  # it stands above the command line
_TRAINING_MEMORY = (
    "lower --data.bag_size, --data.batch_size, --data.chunk_size (of validation) or --data.num_workers, "
    "or use a smaller backbone"
)
_EVALUATION_MEMORY = "lower --data.chunk_size or --data.num_workers"
# Advice for each command that runs out of memory.
_LESS_MEMORY = {
    **dict.fromkeys(COMMANDS, "use a machine with more memory, or fewer slides at a time"),
    **dict.fromkeys(("validate", "test", "predict"), _EVALUATION_MEMORY),
    **dict.fromkeys(("fit", "find-lr"), _TRAINING_MEMORY),
    **dict.fromkeys(
        ("export", "similarity"),
        "free the card's, or hide it with CUDA_VISIBLE_DEVICES= before the command; else use a machine with "
        "more",
    ),
    "tile": "use fewer --workers, or a machine with more",
    "embed": "lower --batch-size",
    "federate": "lower bag_size, batch_size, chunk_size or num_workers in its configuration",
    "compare": "use fewer --jobs, or lower bag_size, batch_size and chunk_size in its configuration",
    "grade": "lower --batch-size or --jobs",
}
NETWORK_COMMANDS = {
    *TRAINING_COMMANDS,
    "embed",
    "atlas",
    "compare",
    "federate",
    "similarity",
    "export",
    "grade",
}
_TRAINS_HERE = {*TRAINING_COMMANDS, "federate"}  # by Lightning, in the process of the command


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: the words after ``slidetl``; those of the process by default.

    Returns:
        The exit code: 0 done, 1 some slides failed, 2 a user's mistake, 130 interrupted by Ctrl-C, 143 by
        SIGTERM.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _stay_offline()
    words, status = _take_status(words)
    command = words[0] if words else ""
    try:
        with status_file(status, command):
            return _run(command, words, debug)
    except OutputError as error:  # of the status file, before anything is done
        _complain(str(error))
        return 2


def _run(command: str, words: list[str], debug: bool) -> int:
    """Runs one command, and reports its end to the status file."""
    try:
        with _interrupted_by_sigterm(command in _TRAINS_HERE) as was_terminated:
            code = _exit_code(command, words, debug, was_terminated)
    except SystemExit as end:
        show_end(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
        raise
    show_end(code)
    return code


@contextmanager
def _interrupted_by_sigterm(trains: bool) -> Iterator[Callable[[], bool]]:
    """Ends a training on the first SIGTERM as Ctrl-C does, since Lightning's own way has exit code 0.

    Other commands die of it at once.

    Yields:
        Tells whether SIGTERM has come. The exception alone does not: raised within a ``__del__`` it is lost.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not (trains and mine and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield lambda: False
        return
    is_ending = False

    def end(*_: object) -> None:
        nonlocal is_ending
        if not is_ending:  # timeout(1) sends it twice
            is_ending = True
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's workers may die of it, too
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)  # Lightning calls it after its own
    try:
        yield lambda: is_ending
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _led_to(error: BaseException | None) -> Iterator[BaseException]:
    """Lists an exception and what led to it: to Lightning's exit, or the death of a worker."""
    while error is not None:
        yield error
        error = error.__context__


def _exit_code(command: str, words: list[str], debug: bool, was_terminated: Callable[[], bool]) -> int:
    if command in NETWORK_COMMANDS:
        prepare_for_networks()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter missing in the terminal must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = format_warning
    try:
        if command in TRAINING_COMMANDS:
            with postpone_collection(of_a_command=True):
                from slidetl.cli import training

            return training.run(command, words[1:])
        parser = _parser(command)
        options = parser.parse_args(words)
        code: int = options.run(options)
        return code
    except BaseException as error:  # other than mistakes and lack of memory: a bug, with its traceback
        led = list(_led_to(error))
        if was_terminated() or any(isinstance(one, KeyboardInterrupt) for one in led):
            notes = dict.fromkeys(note for one in led for note in getattr(one, "__notes__", []))
            print("; ".join(["slidetl: interrupted", *notes]), file=sys.stderr)
            return 143 if was_terminated() else 130
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, e.g. `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        is_memory = isinstance(error, Exception) and is_out_of_memory(error)
        if debug or not (is_memory or isinstance(error, (SlidetlError, OSError))):
            raise
        if isinstance(error, OSError) and is_full(error) and not isinstance(error, SlidetlError):
            said = f"{error.filename or 'a result'}: {describe_full(error)}"
        elif is_memory:
            said = describe_failure(error, _LESS_MEMORY.get(command, ""))
        else:
            said = _cause(str(error))
        _complain(said)
        return 2


def _parser(command: str) -> argparse.ArgumentParser:
    """Builds the parser, and imports the requested command only, so that help answers at once."""
    parser = _OneLineParser(
        prog="slidetl",
        description="Transfer learning that grades gigapixel slides. For research; not a medical device.",
        epilog="Every command takes --help, --status FILE to keep its progress in a small JSON file, and "
        "--debug to show the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"slidetl {slidetl.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        child = commands.add_parser(name, help=summary)
        if name == command and name not in TRAINING_COMMANDS:
            _add_command(child, name.replace("-", "_"))
    return parser


def _add_command(parser: argparse.ArgumentParser, name: str) -> None:
    from slidetl.cli.options import add_command

    module = importlib.import_module(_ELSEWHERE.get(name, f"slidetl.cli.{name}"))
    if not hasattr(module, "COMMANDS"):
        add_command(parser, getattr(module, name))
        return
    parser.description = module.__doc__
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for action, command in module.COMMANDS.items():
        summary = command.__doc__.partition(".")[0]
        add_command(commands.add_parser(action, help=summary[0].lower() + summary[1:]), command)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"{self.prog}: error: {message} (see '{self.prog} --help')", file=sys.stderr)
        sys.exit(2)


def _take_status(words: list[str]) -> tuple[list[str], Path | None]:
    """Takes ``--status FILE`` out of the words of any command; the last one counts."""
    parser = _OneLineParser(prog=f"slidetl {' '.join(words[:1])}".strip(), add_help=False, allow_abbrev=False)
    parser.add_argument("--status", type=Path)
    found, rest = parser.parse_known_args(words)
    return rest, found.status


def _complain(message: str) -> None:
    """Prints an error; the names in it may be a stranger's."""
    lines = map(one_line, message.splitlines() or [""])
    print("slidetl: error: " + "\n".join(lines), file=sys.stderr)


def _cause(message: str) -> str:
    """Extracts the error from a message of a DataLoader's worker, which includes the traceback."""
    if message.startswith("Caught ") and "Traceback" in message:
        return message.strip().splitlines()[-1].partition(": ")[2]
    return message


def _stay_offline() -> None:
    """Switches off the update checks and telemetry of dependencies; patient data lives here."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
