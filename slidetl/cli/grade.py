"""``slidetl grade``."""

from __future__ import annotations

import argparse
import json
import sys
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
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="write for each slide an attention map (PNG) and the result (JSON) here",
    )
    parser.add_argument(
        "--mpp-override",
        metavar="UM",
        type=float,
        help="micrometres per level-0 pixel, instead of the metadata's",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one"
    )
    parser.add_argument("--batch-size", metavar="TILES", type=int, default=64, help="tiles per pass")


def run(options: argparse.Namespace) -> int:
    """Grades every slide; a bad one costs itself alone."""
    import torch

    from slidetl.data.manifest import safe_slide_id
    from slidetl.errors import SlideError, UsageError
    from slidetl.export import load_model
    from slidetl.inference import draw_map, grade_slide

    if options.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1 tile, not {options.batch_size}")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.model, device)
    names: dict[str, Path] = {}
    failed = 0
    for path in options.slides:
        try:
            result = grade_slide(model, path, options.mpp_override, options.batch_size)
        except SlideError as error:
            failed += 1
            print(f"slidetl: failed: {error}", file=sys.stderr)
            continue
        line = json.dumps(result.to_dict())
        if options.output is not None:
            name = safe_slide_id(path.stem) or "slide"
            if names.setdefault(name, path) != path:
                name = safe_slide_id("_".join(path.parts[-2:]))
            draw_map(result, options.output / f"{name}.png")
            (options.output / f"{name}.json").write_text(line + "\n", encoding="utf-8")
        print(line, flush=True)
    if failed:
        print(f"slidetl: {failed} of {len(options.slides)} slides failed", file=sys.stderr)
    return 1 if failed else 0
