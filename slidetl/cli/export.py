"""``slidetl export``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Write a checkpoint as one TorchScript file that grades slides by itself."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint that 'slidetl fit' wrote")
    parser.add_argument(
        "--output",
        metavar="MODEL.pt",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,  # else its help says "(default: None)"
        help="file to write",
    )
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="package or class outside slidetl that the checkpoint may import; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Exports, and prints what came out."""
    from slidetl.export import export_model, load_model
    from slidetl.tasks.checkpoint import load_grader

    worst = export_model(load_grader(options.checkpoint, options.allow), options.output)
    model = load_model(options.output)
    spec = model.card.tile_spec
    print(
        f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, {model.card.backbone}, "
        f"grades {', '.join(model.card.grades)}, tiles of {spec.tile_size_px} px at {spec.mpp:g} um/px\n"
        f"greatest difference from the checkpoint: {worst:.1e}\nsha256 {model.sha256}"
    )
    return 0
