"""Grading of CT series by an exported model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slidetl.cli import main
from slidetl.errors import UnfitSlideError, UsageError
from slidetl.grading.batch import find_slides, output_names
from slidetl.grading.grade import grade_series, grade_slide
from slidetl.grading.report.series import write_series_report
from slidetl.grading.series import shown_patches
from slidetl.models.aggregators import MaxPooling
from slidetl.models.spec import BackboneSpec
from slidetl.models.volumes import unit_window
from slidetl.publish.export import build_network, export_model
from slidetl.publish.model_file import ModelFile, load_model
from slidetl.publish.onnx import export_onnx
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache
from slidetl.tiles.tile import SlideSource
from slidetl.training.grader import SlideGrader
from tests.volumes.phantom import chest
from tests.volumes.series import write_series as write_dicom
from tests.volumes.studies import VolumeStudy

SPEC = TileSpec(spacing_mm=1.0, tile_size_px=16, stride_px=8, mask="none", min_tissue=0.0)


def grader(**options: object) -> SlideGrader:
    torch.manual_seed(0)
    made = SlideGrader(BackboneSpec("conv3d_8"), grades=["benign", "malignant"], **options)  # type: ignore[arg-type]
    made.tile_spec = SPEC
    return made.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    export_model(*build_network([grader()]), path)
    return load_model(path)


def test_the_file_takes_hounsfield_units_and_says_their_window_and_spacing(model: ModelFile) -> None:
    card = model.card
    assert (card.tile_spec.spacing_mm, card.tile_spec.window_hu) == (1.0, (-1000.0, 400.0))
    assert card.architecture["name"] == "conv3d_8" and card.normalisation == {"mean": [0.5], "std": [0.5]}
    patches = torch.randint(-1500, 900, (3, 1, 16, 16, 16), dtype=torch.int16)
    with torch.inference_mode():
        expected = grader().network.backbone(unit_window(patches, -1000, 400))
        torch.testing.assert_close(model.network.embed(patches), expected)
        assert torch.equal(
            model.network.embed(patches), model.network.embed(patches.clamp(-1000, 400).float())
        )


def test_a_series_is_graded_as_its_cache_is(model: ModelFile, scans: VolumeStudy) -> None:
    graded = grade_series(model, scans.manifest.parent / "s02.mha", threads=2)
    cache = SlideCache.open(scans.cache / "s02.zarr")
    network = grader().network
    with torch.inference_mode():
        embeddings = network.backbone(
            unit_window(torch.from_numpy(cache.read(range(8))).unsqueeze(1), -1000, 400)
        )
        logits, attention, explained = network.explain(embeddings[None], torch.ones(1, 8, dtype=torch.bool))
        probabilities = network.head.probabilities(logits)[0]
    np.testing.assert_allclose(graded.probabilities, probabilities, atol=1e-6)
    np.testing.assert_allclose(graded.attention, attention[0, 0], atol=1e-6)
    assert explained is not None
    np.testing.assert_allclose(graded.explanation.contributions, explained[1][0], atol=1e-6)
    np.testing.assert_array_equal(graded.plan.origins_voxel, cache.origins_voxel)
    frame = graded.plan.volume.frame
    np.testing.assert_allclose(frame.to_patient_mm(graded.centres_voxel), cache.centres_mm)
    kinds = shown_patches(graded.explanation.contributions, graded.attention)
    shown = [patch for kind in kinds.values() for patch in kind]
    assert shown and np.flatnonzero(np.isfinite(graded.points_voxel[:, 0])).tolist() == sorted(shown)
    within = graded.points_voxel[shown] - cache.origins_voxel[shown]
    assert (within >= 0).all() and (within < cache.spec.tile_size_px).all()
    assert graded.fingerprint == cache.fingerprint and graded.grade == int(probabilities.argmax())
    rows = graded.patch_rows()
    assert [row["rank"] for row in rows] == list(range(1, 9))
    total = graded.explanation.score - (graded.explanation.baseline or 0)
    assert sum(row["contribution"] for row in rows) == pytest.approx(total, abs=1e-4)


def test_a_graded_series_has_the_notes_of_a_tiled_one(model: ModelFile, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "P1", chest((4.0, 4.0, 25.0))[0])
    spec = TileSpec(spacing_mm=4.0, tile_size_px=16, stride_px=16, mask="lung", min_tissue=0.5)
    card = dataclasses.replace(model.card, tile_spec=spec)
    graded = grade_series(dataclasses.replace(model, card=card), folder, force=True)
    (tiled,) = tile_slides([SlideSource("P1", folder)], tmp_path / "cache", spec, 0)
    assert graded.to_dict()["notes"] == tiled.note.split("; ")
    thick, lost = graded.to_dict()["notes"]
    assert thick == "slices or pixels are 25 mm apart, interpolated to 4 mm"
    assert re.fullmatch(r"\d+% of the lung is in no patch \(min_tissue 0\.5, stride 16\)", lost)
    text = write_series_report(graded, card, tmp_path, "P1").read_text("utf-8")
    assert thick in text and lost in text


def test_without_a_sum_over_patches_they_are_left_out_in_turn(scans: VolumeStudy, tmp_path: Path) -> None:
    export_model(*build_network([grader(aggregator=MaxPooling)]), tmp_path / "model.pt")
    graded = grade_series(load_model(tmp_path / "model.pt"), scans.manifest.parent / "s02.mha")
    assert graded.explanation.to_dict()["method"] == "occlusion"
    assert len(graded.explanation.contributions) == 8 and graded.explanation.contributions.any()


def test_a_series_of_one_patch_shows_it(model: ModelFile, scans: VolumeStudy, tmp_path: Path) -> None:
    card = dataclasses.replace(model.card, tile_spec=dataclasses.replace(SPEC, tile_size_px=24, stride_px=24))
    graded = grade_series(dataclasses.replace(model, card=card), scans.manifest.parent / "s02.mha")
    assert graded.explanation.contributions.tolist() == [0] and np.isfinite(graded.points_voxel).all()
    (patch,) = graded.to_dict()["patches"]
    assert patch["place_x_mm"] is not None
    text = write_series_report(graded, card, tmp_path, "s02").read_text("utf-8")
    assert text.count("<img src") == 3 and "<h2>Patches</h2>" in text and "the score most" not in text


def test_patches_in_the_result_have_a_place_if_equal_ones_have_none(
    model: ModelFile, scans: VolumeStudy, tmp_path: Path
) -> None:
    class Even:
        """Explains by equal contributions, as occlusion does within a group of patches."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model.network, name)

        def grade(self, embeddings: torch.Tensor) -> Any:
            score = embeddings.new_ones(())
            return *model.network.grade(embeddings)[:3], (score, embeddings.new_ones(len(embeddings)))

    graded = grade_series(dataclasses.replace(model, network=Even()), scans.manifest.parent / "s02.mha")
    patches = graded.to_dict()["patches"]
    assert len(patches) == 5 < len(graded.attention)
    assert all(patch["place_x_mm"] is not None for patch in patches)


def test_what_is_no_series_and_what_is_unlike_is_refused(
    model: ModelFile, scans: VolumeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = scans.manifest.parent / "s02.mha"
    with pytest.raises(UsageError, match=r"model\.pt grades CT series; use grade_series"):
        grade_slide(model, series)
    strict = dataclasses.replace(SPEC, mask="lung", min_tissue=1.0)
    of_lungs = dataclasses.replace(model, card=dataclasses.replace(model.card, tile_spec=strict))
    with pytest.raises(UnfitSlideError, match=r"no lung is found in it \(patches of 16 voxels at 1 mm\);"):
        grade_series(of_lungs, series)
    unlike = dataclasses.replace(model, card=dataclasses.replace(model.card, novelty_limit=1e-9))
    monkey = dataclasses.replace(unlike, network=_FarAway(model.network))
    with pytest.raises(
        UnfitSlideError,
        match=r"unlike the series that the model was trained on.* check scanner, contrast, organ and",
    ):
        grade_series(monkey, series)
    assert grade_series(monkey, series, force=True).novelty == pytest.approx(1e9)
    with pytest.raises(UsageError, match="exported as TorchScript alone; leave out --format onnx"):
        export_onnx(build_network([grader()])[0], model.card, tmp_path / "m.onnx")
    (tmp_path / "slide.tiff").write_bytes(b"no series")
    assert main(["grade", str(model.path), str(tmp_path / "slide.tiff")]) == 1
    assert "slide.tiff" in capsys.readouterr().err
    assert main(["grade", str(model.path), str(series), "--mpp-override", "0.5"]) != 0
    assert "grades CT series, which have a spacing of their own; leave out" in capsys.readouterr().err


class _FarAway:
    """A network whose every series is unlike those of the training."""

    def __init__(self, network: object) -> None:
        self._network = network

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def novelty(self, embeddings: torch.Tensor) -> torch.Tensor:
        return torch.ones(())


def test_a_run_is_resumed_and_has_pages(
    model: ModelFile, scans: VolumeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(scans.manifest.parent / f"s0{number}.mha") for number in (2, 3)]
    words = ["--output", str(tmp_path), "--report", "--device", "cpu"]
    assert main(["grade", str(model.path), files[0], *words]) == 0
    capsys.readouterr()
    assert main(["grade", str(model.path), *files, *words, "--resume"]) == 0
    assert "1 of 2 slides are graded already" in capsys.readouterr().err
    assert {"s02.html", "s03.html", "s02.patches.csv", "index.html", "results.csv"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert "Volume, ml" in (tmp_path / "index.html").read_text()
    result = json.loads((tmp_path / "s03.json").read_text())
    header, *rows = (tmp_path / "results.csv").read_text().splitlines()
    assert "mask_ml" in header and "tissue_mm2" not in header and len(rows) == 2
    assert result["spacing_mm"] == 1.0 and result["precision"] == "float32"


def test_places_in_series_are_refused(scans: VolumeStudy, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    series = scans.manifest.parent / "s02.mha"
    manifest.write_text(f"slide_id,path,patient_id,grade,x_mm,y_mm,z_mm\nn1,{series},p,0,1,2,3\n")
    with pytest.raises(UsageError, match=r"x_mm, y_mm and z_mm name a place in a series \(n1\)"):
        find_slides([manifest])


def test_a_dicom_series_is_named_by_its_folder(tmp_path: Path) -> None:
    folders = [write_dicom(tmp_path / "study" / name, series=name[1]) for name in ("P7", "P8")]
    assert find_slides([folders[0]])[0] == folders[:1]
    found, _ = find_slides([tmp_path / "study"])
    assert sorted(found) == folders
    named = [*found, tmp_path / "1.2.840.10", tmp_path / "1.2.840.11"]  # by a UID
    assert output_names(named) == {folder: folder.name for folder in named}
    write_dicom(folders[0], series="9")  # two in one folder
    assert [path.parent for path in find_slides([folders[0]])[0]] == [folders[0]] * 2


def test_a_pattern_finds_slides_in_linked_folders_once(tmp_path: Path) -> None:
    site, away = tmp_path / "study" / "a", tmp_path / "away" / "deep"
    site.mkdir(parents=True)
    away.mkdir(parents=True)
    (tmp_path / "study" / "b").symlink_to(tmp_path / "away")
    (site / "again").symlink_to(tmp_path / "study")
    (site / "above").symlink_to(tmp_path)
    slides = (tmp_path / "5.svs", tmp_path / "study" / "1.svs", site / "2.svs", away / "3.svs")
    for path in (*slides, away / "4.txt"):
        path.touch()
    found, _ = find_slides([tmp_path / "study" / "**" / "*.svs"])
    assert sorted(path.name for path in found) == ["1.svs", "2.svs", "3.svs"]
    assert [path.name for path in find_slides([tmp_path / "s*" / "**" / "deep" / "*.svs"])[0]] == ["3.svs"]
    assert [path.name for path in find_slides([site / "**" / "*.svs"])[0]] == ["2.svs"]
    for pattern in ("**", "**/deep/**/*.svs"):
        with pytest.raises(UsageError, match=r"expected one \*\*, and a name after it"):
            find_slides([tmp_path / pattern])
