"""``slidetl grade``."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

SUMMARY = (
    "Grade slides with an exported model: one JSON line each on stdout. "
    "Exit code 1 when any slide failed, after all the others are done."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "model", metavar="MODEL.pt", type=Path, help="file that 'slidetl export' wrote; it is run"
    )
    parser.add_argument(
        "slides", metavar="SLIDE", type=Path, nargs="+", help="slides in any supported format"
    )
    # SUPPRESS, here and below: else the help of an option without a default says "(default: None)".
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=argparse.SUPPRESS,
        help="write for each slide an attention map (PNG) and the result (JSON) here",
    )
    parser.add_argument(
        "--mpp-override",
        metavar="UM",
        type=float,
        default=argparse.SUPPRESS,
        help="micrometres per level-0 pixel, instead of the metadata's",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one"
    )
    parser.add_argument("--batch-size", metavar="TILES", type=int, default=64, help="tiles per pass")


def run(options: argparse.Namespace) -> int:
    """Grades every slide; a bad one costs itself alone."""
    import torch

    from slidetl.errors import SlideError, UsageError
    from slidetl.export import load_model
    from slidetl.inference import draw_map, grade_slide

    if options.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1 tile, not {options.batch_size}")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.model, device)
    output: Path | None = getattr(options, "output", None)
    mpp_override: float | None = getattr(options, "mpp_override", None)
    names = output_names(options.slides)
    failed = 0
    for path in options.slides:
        try:
            result = grade_slide(model, path, mpp_override, options.batch_size)
        except SlideError as error:
            failed += 1
            print(f"slidetl: failed: {error}", file=sys.stderr)
            continue
        line = json.dumps(result.to_dict())
        if output is not None:
            draw_map(result, output / f"{names[path]}.png")
            (output / f"{names[path]}.json").write_text(line + "\n", encoding="utf-8")
        print(line, flush=True)
    if failed:
        print(f"slidetl: {failed} of {len(options.slides)} slides failed", file=sys.stderr)
    return 1 if failed else 0


def output_names(slides: Sequence[Path]) -> dict[Path, str]:
    """Names for the files written for each slide: its own, if taken its folder's as well, then numbered.

    No two are equal, even on a file system that does not tell ``A`` from ``a``.
    """
    from slidetl.data.manifest import safe_slide_id

    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in dict.fromkeys(slides):
        short = safe_slide_id(path.stem) or "slide"
        long = safe_slide_id("_".join(path.parts[-2:])) or short
        candidates = itertools.chain((short, long), (f"{long}_{n}" for n in itertools.count(2)))
        names[path] = next(name for name in candidates if name.lower() not in taken)
        taken.add(names[path].lower())
    return names
