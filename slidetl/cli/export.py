"""``slidetl export``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

SUMMARY = (
    "Write a checkpoint, or an ensemble of several, as one file that grades slides by itself: TorchScript, "
    "which needs torch alone, or ONNX."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "checkpoints",
        metavar="CKPT",
        type=Path,
        nargs="+",
        help="checkpoint that 'slidetl fit' wrote; several, of the folds of a cross-validation, vote",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,  # else its help says "(default: None)"
        help="file to write, e.g. MODEL.pt",
    )
    parser.add_argument(
        "--format",
        choices=("torchscript", "onnx"),
        default="torchscript",
        help="onnx writes FILE.onnx (whole slides) and FILE.grade.onnx (stored embeddings); 'slidetl grade' "
        "reads torchscript",
    )
    parser.add_argument(
        "--config",
        metavar="YAML",
        type=Path,
        action="append",
        default=[],
        help="config.yaml of the fit, which names the training slides; without it, the one that lies where "
        "the fit left it. May be repeated",
    )
    parser.add_argument(
        "--no-training-data",
        action="store_true",
        help="the training slides are not at hand: the file then cannot tell slides unlike them",
    )
    parser.add_argument(
        "--evidence",
        metavar="CSV",
        type=Path,
        default=argparse.SUPPRESS,
        help="predictions.csv of slides that were kept from the training ('slidetl test', or one arm of "
        "'slidetl compare'): figures, temperature and sets of grades are computed from it",
    )
    parser.add_argument(
        "--arm", metavar="NAME", default=argparse.SUPPRESS, help="the arm of that table, if it has several"
    )
    parser.add_argument(
        "--coverage",
        metavar="SHARE",
        type=float,
        default=0.9,
        help="share of patients whose grade shall lie in the set of grades, 0..1",
    )
    parser.add_argument("--licence", metavar="TEXT", default="", help="licence of the weights")
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="package or class outside slidetl that the checkpoint may import; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Exports, and prints what came out."""
    from slidetl.errors import SlidetlError, UsageError
    from slidetl.publish.evidence import evidence_from
    from slidetl.publish.export import build_network, export_model
    from slidetl.publish.model_file import load_model
    from slidetl.publish.training_data import describe_training, learn_familiar, training_slides
    from slidetl.training.checkpoint import load_grader

    graders = [load_grader(path, options.allow) for path in options.checkpoints]
    training = familiar = evidence = None
    if getattr(options, "evidence", None) is not None:
        evidence = evidence_from(options.evidence, options.coverage, getattr(options, "arm", None))
    if not options.no_training_data:
        try:
            slides = training_slides(options.config or _configs(options.checkpoints))
        except SlidetlError as error:
            raise UsageError(
                f"the training slides are not at hand ({error}); name the fit's configuration with --config, "
                "or add --no-training-data"
            ) from error
        training = describe_training(slides)
        if training.patients >= 5:
            familiar = learn_familiar(build_network(graders)[0], slides)
        else:
            print("training slides of fewer than 5 patients: the file cannot tell slides unlike them")
    network, card = build_network(graders, training, familiar, evidence, options.licence)
    if options.format == "onnx":
        from slidetl.publish.onnx import export_onnx

        worst = export_onnx(network, card, options.output)
    else:
        worst = export_model(network, card, options.output)
    spec = card.tile_spec
    print(
        f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, {card.members} x {card.backbone}, "
        f"grades {', '.join(card.grades)}, tiles of {spec.tile_size_px} px at {spec.mpp:g} um/px"
    )
    if training:
        print(f"trained on {training.slides} slides of {training.patients} patients")
    if evidence:
        figures = (
            f"{name} {a:.3f} ({low:.3f} to {high:.3f})" for name, (a, low, high) in evidence.figures.items()
        )
        print(f"{evidence.slides} slides of {evidence.patients} patients kept from it: {', '.join(figures)}")
    for name, difference in worst.items():
        print(f"greatest difference of a probability from the checkpoint, {name}: {difference:.1e}")
    if options.format == "torchscript":
        print(f"sha256 {load_model(options.output).sha256}, recorded here as trusted")
    return 0


def _configs(checkpoints: Sequence[Path]) -> list[Path]:
    """Where a fit leaves its configuration: beside the folder of its checkpoints."""
    return [path.absolute().parent.parent / "config.yaml" for path in checkpoints]
