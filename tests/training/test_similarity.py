from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from slidetl.analysis.similarity import Similarity, linear_cka
from slidetl.errors import CacheMismatchError, CheckpointError, UsageError
from slidetl.models.backbones import Backbone
from slidetl.models.spec import BackboneSpec
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import SlideCache
from slidetl.training.checkpoint import write_grader
from slidetl.training.grader import SlideGrader
from slidetl.training.options import SimilarityOptions
from slidetl.training.similarity import (
    EMBEDDING,
    MEASURES,
    LayerSimilarity,
    _draw_tiles,
    compare_networks,
    draw_curves,
    embed_layers,
)
from tests.conftest import Study
from tests.small import small_spec

SPEC = small_spec()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cbr_tiny_published", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_layers_are_averaged_over_space_whatever_their_form(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(name))
    tiles = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    layers = embed_layers(backbone, tiles, TileSpec(0.5, 64), batch_size=2)
    assert list(layers) == [*backbone.blocks(), EMBEDDING]
    assert {values.shape[0] for values in layers.values()} == {5}
    widths = [entry["num_chs"] for entry in backbone.net.feature_info]  # type: ignore[union-attr]
    assert [values.shape[1] for values in layers.values()] == [*widths, backbone.num_features]
    with torch.inference_mode():
        whole = backbone(torch.from_numpy(tiles).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(layers[EMBEDDING], whole, atol=1e-5)


def test_tiles_are_drawn_evenly_seeded_and_in_place(study_caches: list[SlideCache]) -> None:
    caches = study_caches[:3]
    total = sum(len(cache) for cache in caches)
    everything = np.concatenate([cache.read(range(len(cache))) for cache in caches])
    np.testing.assert_array_equal(_draw_tiles(caches, 10**6, 0), everything)
    some = _draw_tiles(caches, total // 2, 1)
    assert len(some) == total // 2
    np.testing.assert_array_equal(some, _draw_tiles(caches, total // 2, 1))
    places = {tile.tobytes() for tile in everything}
    assert {tile.tobytes() for tile in some} <= places
    assert not np.array_equal(some, _draw_tiles(caches, total // 2, 2))


@pytest.fixture(scope="session")
def study_caches(study: Study) -> list[SlideCache]:
    return [SlideCache.open(path) for path in sorted(study.cache.glob("*.zarr"))]


def packed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in state.items()}


@pytest.mark.slow
def test_curves_of_two_trainings(study: Study, tmp_path: Path) -> None:
    cache = study.cache
    torch.manual_seed(1)
    other = Backbone(SPEC)
    save_file(packed(other.net.state_dict()), tmp_path / "a.safetensors")
    torch.manual_seed(0)
    started = Backbone(SPEC)  # what 'random' is with seed 0
    state = started.net.state_dict()
    changed = "blocks.5.0.conv.weight"  # only the last block was trained
    state[changed] = torch.randn_like(state[changed])
    save_file(packed(state), tmp_path / "b.safetensors")
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    points = compare_networks(
        [a, "random"], [a, b], cache, SimilarityOptions(tiles=200, permutations=2), spec=SPEC
    )
    curves = list(dict.fromkeys((point.first, point.second) for point in points))
    # a with itself says nothing; b began at random, and has that curve once.
    assert curves == [("random", b), (a, "random"), (a, b)]
    layers = [*started.blocks(), EMBEDDING]
    for curve in curves:
        for measure in MEASURES:
            line = [p for p in points if (p.first, p.second) == curve and p.measure == measure]
            assert [(p.layer, p.depth) for p in line] == [(name, i) for i, name in enumerate(layers)]
            assert all(p.similarity.value <= 1 + 1e-9 for p in line)
            if "cka" in measure:  # CCA of more channels than tiles is 1, and so is its floor
                assert all(p.similarity.noise_floor < p.similarity.value for p in line)
                if curve == ("random", b):
                    same = [p.similarity.value > 1 - 1e-6 for p in line]
                    assert same == [True, True, True, True, False, False]
    tiles = _draw_tiles([SlideCache.open(path) for path in sorted(cache.glob("*.zarr"))], 200, 0)
    spec = SlideCache.open(next(cache.glob("*.zarr"))).spec
    one, two = (embed_layers(network, tiles, spec)["blocks.1"] for network in (other, started))
    by_hand = linear_cka(one, two, permutations=2)
    (found,) = (
        p
        for p in points
        if (p.first, p.second, p.layer, p.measure) == (a, "random", "blocks.1", "linear_cka")
    )
    assert found.similarity.value == pytest.approx(by_hand.value, abs=1e-6)
    assert found.tiles == len(tiles) and found.channels == (16, 16)


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(study: Study, trained: Path, tmp_path: Path) -> None:
    cache = study.cache
    for before, after, said in (
        (["random"], [], "one network before training for each one after it, found 1 and 0"),
        (["random"], ["pretrained"], "give --backbone"),
    ):
        with pytest.raises(UsageError, match=said):
            compare_networks(before, after, cache)
    with pytest.raises(UsageError, match=r"expected a network to be 'random', .* found 'nothing'"):
        compare_networks(["random"], ["nothing"], cache, SimilarityOptions(tiles=8), spec=small_spec())
    (checkpoint,) = trained.glob("logs/*/checkpoints/best*.ckpt")
    with pytest.raises(UsageError, match="have no layer in common"):
        other = BackboneSpec("cbr_tiny_published")
        compare_networks(["random"], [str(checkpoint)], cache, SimilarityOptions(tiles=8), spec=other)
    with pytest.raises(UsageError, match="at least 4 tiles"):
        compare_networks(["random"], ["pretrained"], cache, SimilarityOptions(tiles=3), spec=small_spec())


@pytest.mark.slow
def test_pretrained_is_what_each_training_began_from(study: Study, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(packed(Backbone(SPEC).net.state_dict()), tmp_path / "other.safetensors")
    of_other = replace(SPEC, pretrained=str(tmp_path / "other.safetensors"))

    def trained_from(name: str, spec: BackboneSpec, starts: bool = True) -> str:
        grader = SlideGrader(spec)
        if starts:
            grader.network.backbone.load_pretrained()
        write_grader(tmp_path / name, grader, {"backbone": asdict(spec)})
        return str(tmp_path / name)

    a, b = trained_from("a.ckpt", SPEC), trained_from("b.ckpt", of_other)
    scratch = trained_from("scratch.ckpt", SPEC, starts=False)
    grey = trained_from("grey.ckpt", replace(SPEC, in_channels=1))

    def compare(
        before: list[str], after: list[str], spec: BackboneSpec | None = None
    ) -> set[tuple[str, str]]:
        options = SimilarityOptions(tiles=8, permutations=1)
        points = compare_networks(before, after, study.cache, options, spec=spec)
        return {(point.first, point.second) for point in points}

    with pytest.raises(UsageError, match=r"expected checkpoints of one backbone, .*b\.ckpt mobilenet"):
        compare(["pretrained", "pretrained"], [a, b])
    with pytest.raises(UsageError, match="expected checkpoints of one backbone"):
        compare(["random", "random"], [a, grey])
    assert compare(["random", "random"], [a, b]) == {("random", a), ("random", b), (a, b)}
    assert ("pretrained", a) in compare(["pretrained", "random"], [a, b], SPEC)
    with pytest.warns(UserWarning, match=r"scratch\.ckpt records none"):
        assert ("pretrained", scratch) in compare(["pretrained", "random"], [scratch, a])
    with pytest.raises(CheckpointError, match=r"b\.ckpt began from weights with"):
        compare(["pretrained"], [b], SPEC)
    save_file(packed(Backbone(SPEC).net.state_dict()), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.ckpt began from weights with"):
        compare(["pretrained"], [b])


@pytest.mark.slow
def test_tiles_unlike_those_of_the_training_are_refused(study: Study, trained: Path, tmp_path: Path) -> None:
    from slidetl.cli import main

    options = ["--cache", str(tmp_path), "--mpp", "8", "--tile-size", "64", "--workers", "1"]
    assert main(["tile", str(study.manifest), *options]) == 0
    (checkpoint,) = trained.glob("logs/*/checkpoints/best*.ckpt")
    with pytest.raises(CacheMismatchError, match=r"trained on other tiles: .* mpp 8\.0 \(wanted: 4\.0\)"):
        compare_networks(["pretrained"], [str(checkpoint)], tmp_path, SimilarityOptions(tiles=8))


def points_of(curves: dict[tuple[str, str], list[str]]) -> list[LayerSimilarity]:
    """Curves by their networks and layers."""
    return [
        LayerSimilarity(first, second, layer, depth, measure, Similarity(0.9, 0.1, 0.2, 2), 8, (4, 4))
        for (first, second), layers in curves.items()
        for depth, layer in enumerate(layers)
        for measure in MEASURES
    ]


def test_layers_of_one_curve_alone_are_drawn_at_their_depth(tmp_path: Path, drawn: list[Figure]) -> None:
    points = points_of({("a", "b"): ["stem", "layer1", EMBEDDING], ("a", "c"): ["stem", "layer0", EMBEDDING]})
    draw_curves(points, tmp_path / "similarity.png")
    labels = [label.get_text() for label in drawn[0].axes[-1].get_xticklabels()]
    assert labels == ["stem", "layer0", "layer1", EMBEDDING]
    for line in drawn[0].axes[0].get_lines():
        assert (np.diff(np.asarray(line.get_xdata(), float)) > 0).all()


def test_many_curves_differ_in_look(tmp_path: Path, drawn: list[Figure]) -> None:
    after = [f"after-{number}" for number in range(4)]
    pairs = [*((f"before-{name}", name) for name in after), *((name, "random") for name in after)]
    pairs += itertools.combinations(after, 2)
    draw_curves(points_of({pair: ["stem", EMBEDDING] for pair in pairs}), tmp_path / "similarity.png")
    for axes in drawn[0].axes:
        lines = [line for line in axes.get_lines() if len(np.asarray(line.get_xdata()))]
        looks = Counter((line.get_color(), line.get_marker()) for line in lines)
        assert list(looks.values()) == [2] * 14  # with its noise floor
