import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # drawing, and two trainings

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "slidetl/models/weights/procedural_mobilenetv3_small_050.safetensors"


def _load_tool() -> ModuleType:
    # tools/ holds programs, not a package: it is loaded by path.
    spec = importlib.util.spec_from_file_location(
        "pretrain_procedural", ROOT / "tools/pretrain_procedural.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


tool = _load_tool()
NAMES = list(tool.CLASSES)


def _field(name: str, seed: int) -> NDArray[Any]:
    drawn: NDArray[Any] = tool.CLASSES[name](np.random.default_rng(seed), tool.IMAGE_SIZE_PX)
    return drawn


def _images(name: str, count: int) -> list[NDArray[np.uint8]]:
    start = NAMES.index(name)
    return [tool.draw_image(5, start + i * len(NAMES))[0] for i in range(count)]


def _coherence(field: NDArray[Any]) -> float:
    """Coherence of the structure tensor over the whole frame: 1 for one direction, 0 for all alike."""
    gy, gx = np.gradient(field.astype(float))
    xx, yy, xy = (gx * gx).sum(), (gy * gy).sum(), (gx * gy).sum()
    return float(np.hypot(xx - yy, 2 * xy) / (xx + yy))


def _roughness(field: NDArray[Any]) -> float:
    """Mean squared gradient over the variance: grows as the period falls."""
    gy, gx = np.gradient(field.astype(float))
    return float((gx**2 + gy**2).mean() / field.var())


# -- what is drawn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_class_draws_a_field_with_something_in_it(name: str) -> None:
    for seed in range(4):
        field = _field(name, seed)
        assert field.shape == (96, 96)
        assert np.isfinite(field).all()
        assert field.min() >= 0 and field.max() <= 1
        assert field.std() > 0.005


def test_an_image_is_rgb_bytes_with_its_label_in_turn() -> None:
    for index in range(0, 3 * len(NAMES), 7):
        image, label = tool.draw_image(1, index)
        assert (image.shape, image.dtype) == ((96, 96, 3), np.uint8)
        assert label == index % len(NAMES)
        assert image.std(axis=(0, 1)).max() > 1


def test_an_image_depends_on_seed_and_index_alone() -> None:
    for index in range(0, len(NAMES), 5):
        first, _ = tool.draw_image(1, index)
        tool.draw_image(1, index + 1)  # a draw in between changes nothing
        np.testing.assert_array_equal(first, tool.draw_image(1, index)[0])
        assert (first != tool.draw_image(2, index)[0]).any()
        assert (first != tool.draw_image(1, index + len(NAMES))[0]).any()


def test_the_number_of_classes_is_what_was_meant_and_names_do_not_clash() -> None:
    assert 60 <= len(NAMES) <= 120
    assert len({name.lower() for name in NAMES}) == len(NAMES)


def test_mean_colour_does_not_tell_the_class() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    drawn = [tool.draw_image(3, i) for i in range(8 * len(NAMES))]
    colours = np.array([image.mean(axis=(0, 1)) for image, _ in drawn])
    labels = np.array([label for _, label in drawn])
    half = len(labels) // 2
    accuracy = KNeighborsClassifier(5).fit(colours[:half], labels[:half]).score(colours[half:], labels[half:])
    assert accuracy < 4 / len(NAMES)  # chance is 1 / classes; the margin is sampling error


def test_segments_are_ordered_by_coherence() -> None:
    for density in ("sparse", "dense"):
        means = [
            np.mean([_coherence(_field(f"segments-{name}-{density}", seed)) for seed in range(12)])
            for name in ("parallel", "combed", "ruffled", "tangled")
        ]
        assert means == sorted(means, reverse=True)
        assert means[0] > 2 * means[3]


def test_textures_are_ordered_by_period() -> None:
    def roughness(name: str) -> float:
        return float(np.mean([_roughness(_field(name, seed)) for seed in range(12)]))

    assert roughness("grating-fine") > 2 * roughness("grating-medium") > 4 * roughness("grating-coarse")
    for texture in ("labyrinth", "spots"):
        assert roughness(f"{texture}-fine") > 2 * roughness(f"{texture}-coarse")
    spectra = [roughness(f"noise-{exponent}") for exponent in (0.8, 1.8, 2.8, 3.8)]
    assert spectra == sorted(spectra, reverse=True)
    assert spectra[0] > 5 * spectra[3]


def test_marble_is_ordered_by_turbulence() -> None:
    calm, stirred, wild = (
        np.mean([_coherence(_field(f"marble-{name}", seed)) for seed in range(12)])
        for name in ("calm", "stirred", "wild")
    )
    assert calm > stirred + 0.2 > wild + 0.4


def test_no_noise_has_a_direction() -> None:
    # Noise with a direction beside noise without one is what the synthetic slides' grade rests on.
    names = [name for name in NAMES if name.startswith(("noise", "labyrinth", "spots", "coast", "ridged"))]
    assert len(names) == 11
    for name in names:
        assert np.mean([_coherence(_field(name, seed)) for seed in range(12)]) < 0.2, name


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_counts_are_counts(number: int) -> None:
    found = []
    for seed in range(12):
        marks = cv2.GaussianBlur(_field(f"count-{number}", seed).astype(np.float32), (0, 0), 0.8) > 0.5
        _, _, statistics, _ = cv2.connectedComponentsWithStats(marks.astype(np.uint8))
        found.append(int((statistics[1:, cv2.CC_STAT_AREA] >= 9).sum()))
    assert np.median(found) == number


def test_shares_are_ordered() -> None:
    means = []
    for share in (15, 38, 62, 85):
        fields = [_field(f"textured-{share}", seed) for seed in range(16)]
        energy = [np.hypot(*np.gradient(field)) > 0.02 for field in fields]
        means.append(np.mean(energy))
    assert means == sorted(means)
    assert means[3] > 2 * means[0]


def test_shapes_and_glyphs_stay_inside_every_crop() -> None:
    margin = (tool.IMAGE_SIZE_PX - tool.WHOLE_SIZE_PX) // 2
    for name in NAMES:
        if not name.startswith(("shape-", "glyph-")):
            continue
        for seed in range(3):
            # Smoothing leaves the figure and takes most of the ground's texture.
            field = cv2.GaussianBlur(_field(name, seed).astype(np.float32), (0, 0), 1.5)
            inside = field[margin:-margin, margin:-margin]
            rim = np.concatenate([field[0], field[-1], field[:, 0], field[:, -1]])
            assert inside.max() > np.median(rim) + 0.12


# -- training ---------------------------------------------------------------------------------------------


def _settings(**changes: Any) -> Any:
    small = {"steps": 10, "batch": 14, "pool": 90, "heldout": 90, "refresh": 0.3, "seed": 4}
    return tool.Settings(**{**small, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    tool.train(_settings(), folder)
    return folder


def test_a_short_training_writes_what_timm_loads_strictly(trained: Path) -> None:
    network: Any = timm.create_model(tool.ARCHITECTURE, num_classes=0)
    state = load_file(trained / "backbone.safetensors")
    network.load_state_dict(state, strict=True)
    assert set(state) == set(network.state_dict())
    with safe_open(trained / "backbone.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == NAMES
    assert json.loads(metadata["mean"]) == list(network.default_cfg["mean"])
    assert json.loads(metadata["std"]) == list(network.default_cfg["std"])
    assert json.loads(metadata["settings"])["steps"] == 10
    assert metadata["step"] == "10"
    confusion = np.load(trained / "confusion.npy")
    assert (confusion.sum(axis=1) == confusion.sum() // len(NAMES)).all()
    assert float(metadata["heldout_accuracy"]) == pytest.approx(confusion.trace() / confusion.sum(), abs=1e-4)


def test_a_run_in_two_sittings_equals_one_run(trained: Path, tmp_path: Path) -> None:
    whole = load_file(trained / "backbone.safetensors")
    tool.train(_settings(), tmp_path, minutes=0)  # stops after the first pass of six steps
    halfway = load_file(tmp_path / "backbone.safetensors")
    assert any(not torch.equal(halfway[name], whole[name]) for name in whole)
    tool.train(_settings(), tmp_path)
    resumed = load_file(tmp_path / "backbone.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_another_runs_checkpoint_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="other settings"):
        tool.train(_settings(seed=5), trained)
    with pytest.raises(SystemExit) as stop:
        tool.main(["--output", str(trained), "--steps", "3"])
    assert stop.value.code == 2
    assert "choose another --output" in capsys.readouterr().err


def test_training_lowers_the_loss_on_its_own_images() -> None:
    settings = _settings(peak_rate=2e-3)
    pool = tool.Pool(settings)
    torch.manual_seed(0)
    network = tool._network()
    optimizer = tool._optimizer(network, settings)
    losses = []
    for turn in range(16):
        network.train()
        for images, labels in pool.batches(np.random.default_rng(turn), 46):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-4:]) < np.log(len(NAMES)) - 0.5  # the logarithm is what guessing costs


def test_a_refreshed_pool_equals_one_drawn_later() -> None:
    settings = _settings(refresh=0.4)
    pool = tool.Pool(settings)
    first = pool.images.copy()
    for passes in (1, 2, 3):
        pool.refresh(passes)
    np.testing.assert_array_equal(pool.images, tool.Pool(settings, passes=3).images)
    changed = (pool.images != first).any(axis=(1, 2, 3))
    assert changed.all()  # three times 0.4 goes once round


def test_batches_cover_the_pool_once_with_matching_labels() -> None:
    pool = tool.Pool(_settings())
    seen = torch.cat([labels for _, labels in pool.batches(np.random.default_rng(0), 23)])
    assert sorted(seen.tolist()) == list(range(len(NAMES)))


def test_the_rate_rises_once_and_falls() -> None:
    settings = _settings(steps=200, peak_rate=1e-2)
    rates = [tool.rate(step, settings) for step in range(200)]
    top = int(np.argmax(rates))
    assert top == 20 and rates[top] == pytest.approx(1e-2)
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 200}, {"refresh": 1.5}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        _settings(**wrong)


# -- the bundled file -------------------------------------------------------------------------------------


def test_the_bundled_weights_load_and_agree_with_their_card() -> None:
    state = load_file(WEIGHTS)
    timm.create_model(tool.ARCHITECTURE, num_classes=0).load_state_dict(state, strict=True)
    assert WEIGHTS.stat().st_size <= 4_000_000
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    # BatchNorm counts its batches in int64.
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    card = WEIGHTS.with_suffix(".md").read_text()
    digest = re.search(r"[0-9a-f]{64}", card)
    assert digest is not None and digest.group() == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == NAMES
    assert f"{len(NAMES)} classes" in card
    assert f"{100 * float(metadata['heldout_accuracy']):.1f} %" in card
    assert f"--steps {json.loads(metadata['settings'])['steps']}" in card


def test_the_bundled_weights_separate_textures_that_a_probe_has_not_seen(tmp_path: Path) -> None:
    for name in ("segments-parallel-dense", "segments-tangled-dense"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(_images(name, 20)):
            cv2.imwrite(str(tmp_path / name / f"{i}.png"), image)
    scores = tool.probe(tmp_path, WEIGHTS)
    assert scores["pretrained"][0] >= 0.9
    assert scores["pretrained"][0] > scores["random"][0]


def test_the_probe_names_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.txt is not an image"):
        tool.probe(tmp_path, WEIGHTS)


def test_the_sheet_shows_every_class(tmp_path: Path) -> None:
    assert tool.main(["--sheet", str(tmp_path / "sheet.png"), "--seed", "2"]) == 0
    page = cv2.cvtColor(np.asarray(cv2.imread(str(tmp_path / "sheet.png")), np.uint8), cv2.COLOR_BGR2RGB)
    last = len(NAMES) - 1
    y, x = (96 * place for place in divmod(last, 12))
    np.testing.assert_array_equal(page[y : y + 96, x : x + 96], tool.draw_image(2, last)[0])
