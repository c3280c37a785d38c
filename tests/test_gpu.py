"""Whole commands on a card, beside each other; ``scripts/check-gpu`` runs these.

Where nothing but the device differs, the test runs on a processor too, for it not to rot.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from slidetl.analysis.clusters import Kernel, bandwidth_of, mean_shift
from slidetl.cli import main
from slidetl.compare.pool import Workplace, run_job
from slidetl.compare.records import read_result
from slidetl.data.datasets import Bag
from slidetl.doctor import examine
from slidetl.grading import grade
from slidetl.models.backbones import Backbone
from slidetl.models.precision import has_bfloat16
from slidetl.models.targets import Targets
from slidetl.publish.model_file import load_model
from slidetl.tiles.features import read_features
from slidetl.tiles.store import SlideCache
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import read_predictions
from tests.compare.test_run import SCRATCH, planned
from tests.conftest import Study
from tests.small import small_embed, small_spec
from tests.volumes.studies import VolumeStudy

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
CLOSE = 1e-4  # of probabilities by two commands at equal precision
VOLUMES = Path(__file__).parents[1] / "configs" / "volumes"


def on_gpu(study: Study, root: Path) -> list[str]:
    return [word for word in study.options(root) if "accelerator" not in word]


@pytest.fixture(scope="module")
def fitted(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training on the card, and its model file."""
    root = tmp_path_factory.mktemp("fitted")
    assert main(["fit", *on_gpu(study, root), "--trainer.max_epochs=2", "--data.num_workers=auto"]) == 0
    best = root / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    assert main(["export", str(best), "--output", str(root / "model.pt")]) == 0
    return root


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_grade_equals_test(
    study: Study, fitted: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", *on_gpu(study, fitted), "--precision", precision]) == 0
    rows = read_predictions(fitted / "test" / "predictions.csv")
    slides = [str(study.manifest.parent / "slides" / f"{row.slide_id}.tiff") for row in rows]
    capsys.readouterr()
    words = ["grade", str(fitted / "model.pt"), *slides, "--precision", precision, "--force"]
    assert main(words) == 0
    graded = {
        Path(line["slide"]).stem: line for line in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert {line["precision"] for line in graded.values()} == {precision}
    apart = max(
        np.abs(np.subtract(graded[row.slide_id]["probabilities"], row.probabilities)).max() for row in rows
    )
    print(f"grade and test differ by {apart:.2e} in {precision}")
    assert apart < CLOSE


@pytest.mark.gpu
def test_grade_takes_the_precision_of_test_by_default(
    study: Study, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    model = load_model(fitted / "model.pt")
    assert {"cuda float32", "cpu float32"} <= set(model.card.precisions)
    usual = "bfloat16" if has_bfloat16(torch.device("cuda")) else "float32"
    for words, precision in (([], usual), (["--device", "cpu"], "float32")):
        capsys.readouterr()
        assert main(["grade", str(model.path), str(slide), "--force", *words]) == 0
        assert json.loads(capsys.readouterr().out)["precision"] == precision


@pytest.mark.gpu
def test_an_export_describes_the_training_as_on_a_processor(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_model(fitted / "model.pt").card
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    best = fitted / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    assert main(["export", str(best), "--output", str(tmp_path / "model.pt")]) == 0
    there = load_model(tmp_path / "model.pt").card
    assert here.novelty_limit is not None
    assert here.novelty_limit == pytest.approx(there.novelty_limit, rel=1e-3)


@pytest.mark.gpu
def test_features_in_bfloat16_are_those_in_float32(study: Study, tmp_path: Path) -> None:
    for path in sorted(study.cache.glob("*.zarr"))[:3]:
        shutil.copytree(path, tmp_path / path.name)
    for precision in ("float32", "bfloat16"):
        words = ["embed", str(tmp_path), *small_embed(), "--name", precision]
        assert main([*words, "--precision", precision]) == 0
    caches = [SlideCache.open(path) for path in sorted(tmp_path.glob("*.zarr"))]
    whole, half = (
        np.concatenate([read_features(cache, name) for cache in caches]).astype(np.float64)
        for name in ("float32", "bfloat16")
    )
    relative = np.abs(half - whole).mean() / np.abs(whole).mean()
    correlation = np.corrcoef(whole.ravel(), half.ravel())[0, 1]
    print(f"mean relative difference {relative:.2%}, correlation {correlation:.4f}")
    assert relative < 0.06 and correlation > 0.998


@pytest.mark.gpu
def test_a_card_without_room_says_the_batch_that_fits(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + 600 * 2**20) / total)
    try:
        words = ["--data.bag_size=32", "--data.batch_size=10", "--model.backbone.name=resnet18"]
        words += ["--model.transfer=slidetl.models.transfer.Scratch"]
        words += ["--trainer.precision=32-true"]
        assert main(["fit", *on_gpu(study, tmp_path), *words]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err
    assert "has no room for --data.batch_size 10" in said and "this fits: --data.batch_size" in said


def trained_on(device: str, options: list[str], root: Path) -> Path:
    """Fits for an epoch in float32 and tests, on a device; returns the model file."""
    words = [word for word in options if "accelerator" not in word]
    words.append(f"--trainer.accelerator={'cpu' if device == 'cpu' else 'gpu'}")
    words.append("--trainer.precision=32-true")
    assert main(["fit", *words, "--trainer.max_epochs=1"]) == 0
    assert main(["test", *words]) == 0
    best = root / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    assert main(["export", str(best), "--output", str(root / "model.pt")]) == 0
    return root / "model.pt"


def graded_on(device: str, model: Path, slide: Path, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """Grades a slide or series in float32; returns its probabilities."""
    capsys.readouterr()
    words = ["--force", "--precision", "float32", "--device", device]
    assert main(["grade", str(model), str(slide), *words]) == 0
    found: list[float] = json.loads(capsys.readouterr().out.splitlines()[-1])["probabilities"]
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_low_rank_updates_train_leave_in_a_file_and_grade_as_tested(
    study: Study, tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, weights = "test_vit", tmp_path / "vit.safetensors"
    state = timm.create_model(name, num_classes=0).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, weights)
    options = [*study.options(tmp_path), "--model.transfer=slidetl.models.transfer.LoRA"]
    options += [f"--model.backbone.name={name}", f"--model.backbone.pretrained={weights}"]
    model = trained_on(device, options, tmp_path)
    with (tmp_path / "logs" / "version_0" / "drift.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epochs"] == "1"]
    moved = {row["layer"] for row in rows if float(row["relative_distance"])}
    assert moved and all("attn" in layer for layer in moved)
    row = read_predictions(tmp_path / "test" / "predictions.csv")[0]
    slide = study.manifest.parent / "slides" / f"{row.slide_id}.tiff"
    assert graded_on(device, model, slide, capsys) == pytest.approx(row.probabilities, abs=CLOSE)
    best, output = tmp_path / "logs" / "version_0" / "checkpoints" / "best.ckpt", tmp_path / "similar"
    words = ["--before", "pretrained", "--after", str(best), "--data", str(study.cache)]
    assert main(["similarity", *words, "--output", str(output), "--tiles", "60", "--permutations", "2"]) == 0
    with (output / "similarity.csv").open(newline="") as file:
        values = [float(row["value"]) for row in csv.DictReader(file) if row["measure"] == "linear_cka"]
    assert values and max(values) > 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_volumes_train_embed_and_grade(
    scans: VolumeStudy, tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config", str(VOLUMES / "attention.yaml"), *scans.options(tmp_path), "--data.bag_size=4"]
    model = trained_on(device, [*options, "--model.transfer=slidetl.models.transfer.Scratch"], tmp_path)
    row = read_predictions(tmp_path / "test" / "predictions.csv")[0]
    series = scans.manifest.parent / f"{row.slide_id}.mha"
    assert graded_on(device, model, series, capsys) == pytest.approx(row.probabilities, abs=CLOSE)
    shutil.copytree(scans.cache / "s01.zarr", tmp_path / "cache" / "s01.zarr")
    best = tmp_path / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    words = ["embed", str(tmp_path / "cache"), "--backbone", "conv3d_8", "--pretrained", str(best)]
    for place in {device, "cpu"}:
        assert main([*words, "--name", place, "--device", place, "--precision", "float32"]) == 0
    (cache,) = map(SlideCache.open, (tmp_path / "cache").glob("*.zarr"))
    here, there = (read_features(cache, place).astype(np.float64) for place in (device, "cpu"))
    assert np.abs(here).max() > 0
    np.testing.assert_allclose(here, there, atol=2e-2 * np.abs(there).max())  # a card multiplies in TF32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("neighbours", [None, 50])
@pytest.mark.parametrize("kernel", ["flat", "gaussian"])
def test_clusters_of_an_atlas(device: str, kernel: Kernel, neighbours: int | None) -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3), 80)
    points = (8.0 * np.eye(3, 6)[truth] + rng.normal(0, 0.5, (240, 6))).astype(np.float32)
    found = mean_shift(
        points, 2.0, kernel=kernel, seeds=60, neighbours=neighbours, device=torch.device(device)
    )
    pairs = set(zip(truth.tolist(), found.labels.tolist(), strict=True))
    assert len(pairs) == 3 == len({label for _, label in pairs})
    found_on = bandwidth_of(points, 10, device=torch.device(device))
    assert found_on == pytest.approx(bandwidth_of(points, 10), rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_doctor_names_the_cards(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    card, *_ = (check for check in examine() if check.topic == "GPU" and "card" in check.name)
    if device == "cpu":
        assert card.value == "none that torch sees" and card.state == "slow"
    else:
        assert card.name == "card 0" and torch.cuda.get_device_name(0) in card.value and "GiB" in card.value


@pytest.mark.gpu
def test_grading_halves_the_batches_of_a_card_without_room(
    study: Study, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = str(next((study.manifest.parent / "slides").glob("*.tiff")))
    words = ["grade", str(fitted / "model.pt"), slide, "--force", "--precision", "float32"]
    assert main(words) == 0
    expected = json.loads(capsys.readouterr().out)["probabilities"]
    torch.cuda.empty_cache()
    total, used = torch.cuda.get_device_properties(0).total_memory, torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + 300 * 2**20) / total)
    try:
        with pytest.warns(UserWarning, match="tiles at once; it takes"):
            assert main([*words, "--batch-size", "4096"]) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert json.loads(capsys.readouterr().out)["probabilities"] == pytest.approx(expected, abs=CLOSE)


@pytest.mark.gpu
def test_embeddings_of_a_large_slide_wait_in_host_memory(
    study: Study, fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = next((study.manifest.parent / "slides").glob("*.tiff"))
    on_card = graded_on("cuda", fitted / "model.pt", slide, capsys)
    devices, of_all = [], grade._Embeddings.of_all

    def noted(kept: grade._Embeddings) -> torch.Tensor:
        devices.append(of_all(kept).device.type)
        return of_all(kept)

    monkeypatch.setattr(grade, "_IN_MEMORY", 1000)
    monkeypatch.setattr(grade._Embeddings, "of_all", noted)
    assert graded_on("cuda", fitted / "model.pt", slide, capsys) == pytest.approx(on_card, abs=1e-5)
    assert devices == ["cpu"]


@pytest.mark.gpu
def test_grading_a_slide_does_not_wait_for_the_card(fitted: Path) -> None:
    """The thread that owns the card pools slides between passes."""
    network = load_model(fitted / "model.pt", "cuda").network
    with torch.inference_mode():
        rows = torch.rand(300, sum(network.widths), device="cuda")
        kept = [torch.arange(n, device="cuda") for n in (40, 30)]
        grade._pool(network, rows, True)  # loads kernels
        grade._expected_grades(network, rows, kept)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in (50, 70, 299):
                grade._pool(network, rows[:number], True)
                grade._expected_grades(network, rows[:number], kept)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_training_step_does_not_wait_for_the_card() -> None:
    grader = SlideGrader(small_spec(), targets=Targets(smoothing=0.1)).cuda().train()
    bag: Bag = {
        "tiles": torch.randint(0, 256, (2, 8, 3, 64, 64), dtype=torch.uint8, device="cuda"),
        "mask": torch.ones(2, 8, dtype=torch.bool, device="cuda"),
        "grade": torch.tensor([3, -1], device="cuda"),
        "readers": torch.zeros(2, 0, dtype=torch.long, device="cuda"),
        "labels": {},
    }
    grader.training_step(bag, 0).backward()  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        grader.training_step(bag, 0).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_a_job_of_a_comparison_embeds_its_tiles_where_it_trains(
    study: Study, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, forward = set(), Backbone.forward

    def noted(backbone: Backbone, tiles: torch.Tensor) -> torch.Tensor:
        devices.add(tiles.device.type)
        return forward(backbone, tiles)

    monkeypatch.setattr(Backbone, "forward", noted)
    trainer = {"accelerator": "cpu" if device == "cpu" else "gpu", "max_epochs": 1}
    _, job = planned(study, tmp_path, {"fit": {**SCRATCH, "trainer": trainer}})
    run_job(job, Workplace(tmp_path))
    result = read_result(tmp_path, job)
    assert result is not None and devices == {device}
    for row in result.predictions:  # gradings by tiles drawn from a slide lie about that of the slide
        assert abs(np.mean(result.draws[row.slide_id]) - row.expected_grade) < 0.5
