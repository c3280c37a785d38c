"""``slidetl export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal


def export(
    checkpoints: tuple[Path, ...],
    *,
    output: Path,
    format: Literal["torchscript", "onnx"] = "torchscript",
    config: tuple[Path, ...] = (),
    no_training_data: bool = False,
    evidence: Path | None = None,
    arm: str | None = None,
    coverage: float = 0.9,
    licence: str = "",
    allow: tuple[str, ...] = (),
) -> int:
    """Writes a checkpoint, or an ensemble of several, as one file for grading slides.

    TorchScript needs torch alone, ONNX any runtime of it.

    Args:
        checkpoints: folders of 'slidetl fit', each for the best checkpoint of its latest fit as in 'slidetl
            test', or files; several, of the folds of a cross-validation, vote.
        output: file to write, e.g. MODEL.pt.
        format: onnx writes FILE.onnx (whole slides) and FILE.grade.onnx (stored embeddings), not for volumes;
            'slidetl grade' reads torchscript.
        config: config.yaml of the fit, with the training slides; by default the one beside the checkpoint's
            folder.
        no_training_data: export without the training slides; the file then cannot detect unfamiliar slides.
        evidence: predictions (CSV) of slides kept from the training ('slidetl test', or one arm of
            'slidetl compare' with the same model and data options, its table being in the folder of the
            comparison): metrics, temperature and sets of grades are computed from them.
        arm: the arm of ``evidence``, if it has several.
        coverage: wanted share of patients with their grade in the set of grades, 0..1.
        licence: licence of the weights.
        allow: package or class outside slidetl, for the checkpoint and its config.yaml to import.
    """
    from slidetl.errors import SlidetlError, UsageError, refuse_unused
    from slidetl.files import check_writable
    from slidetl.library.trust import check_record
    from slidetl.processor import postpone_collection

    with postpone_collection(of_a_command=True):
        from slidetl.compare.train_arm import check_arm
        from slidetl.models.backbones import weights_sha256
        from slidetl.publish.evidence import check_today, evidence_from
        from slidetl.publish.export import build_network, export_model
        from slidetl.publish.model_file import load_model
        from slidetl.publish.training_data import (
            describe_training,
            learn_familiar,
            training_slides,
            training_studies,
        )
        from slidetl.training.checkpoint import find_checkpoint, load_grader

    if evidence is None:
        refuse_unused(export, {"arm": arm, "coverage": coverage}, "without --evidence")
    if no_training_data:
        refuse_unused(export, {"config": config}, "with --no-training-data")
    if format == "torchscript":
        check_record()
    check_writable(output)
    given, checkpoints = checkpoints, tuple(find_checkpoint(path, allow) for path in checkpoints)
    for path in checkpoints:
        if path not in given:
            print(f"checkpoint: {path}")
    graders = [load_grader(path, allow) for path in checkpoints]
    graders[0].network.backbone.check_network()
    training = familiar = None
    hashes = [weights_sha256(grader.network) for grader in graders]
    records = {sha256: grader.record for sha256, grader in zip(hashes, graders, strict=True)}
    kept = (
        evidence_from(evidence, records, len(graders[0].grades), coverage, arm)
        if evidence is not None
        else None
    )
    if evidence is not None and kept is not None and kept.arm:
        kept = replace(kept, is_alike=check_arm(evidence, kept.arm, checkpoints, allow))
    if evidence is not None and no_training_data:
        check_today(evidence, graders[0].grades, {}, records)
    if not no_training_data:
        try:
            studies = training_studies(config or _configs(checkpoints), graders, allow)
            slides = training_slides(studies, graders)
        except SlidetlError as error:
            raise UsageError(
                f"the training slides are not at hand ({error}); name the fit's configuration with --config, "
                "or add --no-training-data"
            ) from error
        if evidence is not None:
            check_today(evidence, graders[0].grades, dict(zip(hashes, studies, strict=True)), records)
        training = describe_training(slides)
        if training.patients >= 5:
            familiar = learn_familiar(build_network(graders)[0], slides)
        else:
            print("training slides of fewer than 5 patients: the file cannot tell slides unlike them")
    network, card = build_network(graders, training, familiar, kept, licence)
    if format == "onnx":
        from slidetl.publish.onnx import export_onnx

        worst = export_onnx(network, card, output)
    else:
        worst = export_model(network, card, output)
    spec = card.tile_spec
    tiles = f"tiles of {spec.tile_size_px} px at {spec.mpp:g} um/px"
    if spec.is_volume:
        low, high = spec.window_hu
        tiles = f"patches of {spec.tile_size_px} voxels at {spec.spacing_mm:g} mm, {low:g} to {high:g} HU"
    print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, {card.members} x {card.backbone}, "
        f"grades {', '.join(card.grades)}, {tiles}"
    )
    if training:
        print(f"trained on {training.slides} slides of {training.patients} patients")
    if kept:
        metrics = (
            f"{name} {a:.3f} ({low:.3f} to {high:.3f})" for name, (a, low, high) in kept.figures.items()
        )
        about = f"{kept.slides} slides of {kept.patients} patients {card.describe_test()}"
        print(f"{about}: {', '.join(metrics)}")
    for name, difference in worst.items():
        print(f"greatest difference of a probability from the checkpoint, {name}: {difference:.1e}")
    if format == "torchscript":
        print(f"sha256 {load_model(output).sha256}, recorded here as trusted")
    return 0


def _configs(checkpoints: Sequence[Path]) -> list[Path]:
    """Returns the configurations of fits, beside the folders of their checkpoints."""
    return [path.absolute().parent.parent / "config.yaml" for path in checkpoints]
