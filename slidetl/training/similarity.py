"""Compares the representations of each layer before and after training."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slidetl.analysis.similarity import Similarity, linear_cka, merge_layers, pwcca, rbf_cka, svcca
from slidetl.data.datasets import network_input
from slidetl.data.study import common_spec, find_slides, open_listed
from slidetl.errors import CacheMismatchError, CheckpointError, UsageError
from slidetl.files import replaced, write_csv
from slidetl.models.backbones import Backbone, without_downloads
from slidetl.models.precision import chosen_device
from slidetl.models.spec import BackboneSpec
from slidetl.text import plot_label, short_names
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import SlideCache, describe_difference
from slidetl.training.checkpoint import load_grader
from slidetl.training.embed import BlockEmbedder
from slidetl.training.options import SimilarityOptions

RANDOM, PRETRAINED = "random", "pretrained"
_MARKERS = "osD^vPX"  # of ten curves each, as there are ten colours
EMBEDDING = "embedding"  # output of the whole backbone, beside its blocks

Layers = dict[str, NDArray[np.float32]]
Measure = Callable[[NDArray[np.float32], NDArray[np.float32], int, int], Similarity]

MEASURES: dict[str, Measure] = {
    "svcca": lambda x, y, permutations, seed: svcca(x, y, permutations=permutations, seed=seed),
    "pwcca": lambda x, y, permutations, seed: pwcca(x, y, permutations=permutations, seed=seed),
    "linear_cka": lambda x, y, permutations, seed: linear_cka(x, y, permutations=permutations, seed=seed),
    "rbf_cka": lambda x, y, permutations, seed: rbf_cka(x, y, permutations=permutations, seed=seed),
}
_TITLES = {
    "svcca": "SVCCA (99 % of the variance)",
    "pwcca": "PWCCA (weighted by the first network)",
    "linear_cka": "CKA, linear, unbiased",
    "rbf_cka": "CKA, Gaussian, unbiased",
}
_COLUMNS = (
    *("first", "second", "layer", "depth", "measure", "value", "noise_floor", "noise_floor_highest"),
    *("permutations", "tiles", "channels_first", "channels_second"),
)


@dataclass(frozen=True)
class LayerSimilarity:
    """One point of one curve.

    Attributes:
        first, second: names of the networks, as given.
        layer: a block's name in timm's network, or ``embedding``.
        depth: 0 for the lowest layer.
        measure: a key of :data:`MEASURES`.
        similarity: the value with its noise floor.
        tiles: number of tiles compared.
        channels: channels of the layer in both networks.
    """

    first: str
    second: str
    layer: str
    depth: int
    measure: str
    similarity: Similarity
    tiles: int
    channels: tuple[int, int]


def compare_networks(
    before: Sequence[str],
    after: Sequence[str],
    cache_dir: Path,
    options: SimilarityOptions = SimilarityOptions(),  # noqa: B008  # frozen
    *,
    spec: BackboneSpec | None = None,
    on_step: Callable[[str], None] = lambda message: None,
) -> list[LayerSimilarity]:
    """Compares networks before and after training on the same tiles, layer by layer.

    There is a curve from each ``before`` to its ``after``, one from each ``after`` to a random network, and
    one between each two of ``after``: with one training from pretrained and one from random weights, these
    are the comparisons of Raghu et al., "Transfusion", NeurIPS 2019, section 4. Maps are averaged over space
    (the paper takes some channels at every position instead), tokens without the class token.

    A network is a checkpoint of ``slidetl fit`` (``.ckpt``), a file of weights (``.safetensors``, ``.pth``),
    ``pretrained`` (the weights of the specification) or ``random``, drawn from ``seed``: with the
    ``seed_everything`` of a training from scratch, its initial weights. All networks are in evaluation mode;
    batch norm of a random one has mean 0 and variance 1.

    Args:
        before: networks, one for each of ``after``.
        after: networks.
        cache_dir: the folder written by ``slidetl tile``.
        options: tiles, seed and noise floor.
        spec: the backbone of ``pretrained`` and ``random``; None takes the one of the checkpoints.
        on_step: called with a progress message for each network and comparison.

    Returns:
        Points, curve by curve, lowest layer first.

    Raises:
        UsageError: no or unequally many networks, no checkpoint or specification, checkpoints of several
            backbones without one, no common layer, or no such slide.
        CacheError: there is no cache, or its tiles differ from a checkpoint's.
        CheckpointError, WeightsError: a network cannot be loaded, or did not begin from its ``pretrained``.
    """
    if not after or len(before) != len(after):
        raise UsageError(
            f"expected one network before training for each one after it, "
            f"found {len(before)} and {len(after)}; repeat --before and --after in pairs"
        )
    seed = options.seed
    caches = [open_listed(cache_dir, *found) for found in find_slides(cache_dir, options.slides).items()]
    tile_spec = common_spec(caches)
    if tile_spec.is_volume:
        raise UsageError(f"{cache_dir} has patches of volumes; networks are compared on tiles of slides")
    names = list(dict.fromkeys([*before, *after, RANDOM]))
    checkpoints = {
        name: _load_checkpoint(name, tile_spec, options.allow) for name in names if name.endswith(".ckpt")
    }
    offline: AbstractContextManager[None] = nullcontext()
    if spec is None:
        if not checkpoints:
            raise UsageError("without a checkpoint it is not known which network is meant; give --backbone")
        trained = _only_kind(checkpoints, PRETRAINED in names)
        spec, offline = trained.spec, without_downloads({"architecture": trained.architecture})
    tiles = _draw_tiles(caches, options.tiles, seed)
    layers: dict[str, Layers] = {}
    with offline:
        for name in names:
            on_step(f"embedding {len(tiles)} tiles with {name}")
            backbone = checkpoints.get(name) or _build(name, spec, seed)
            backbone.check_network()
            if name == PRETRAINED:
                pairs = zip(before, after, strict=True)
                _check_beginning(
                    backbone, {b: checkpoints[b] for a, b in pairs if a == name and b in checkpoints}
                )
            layers[name] = embed_layers(backbone, tiles, tile_spec, options.batch_size)
    curves = [
        *zip(before, after, strict=True),
        *((name, RANDOM) for name in after),
        *itertools.combinations(after, 2),
    ]
    points = []
    for first, second in dict.fromkeys(curves):
        if first == second or ((second, first) in curves and second == RANDOM):
            continue  # a training from random weights has that curve already
        on_step(f"comparing {first} with {second}")
        common = [layer for layer in layers[first] if layer in layers[second]]
        if common in ([], [EMBEDDING]):
            raise UsageError(f"{first} and {second} have no layer in common; compare networks of one kind")
        for depth, layer in enumerate(common):
            x, y = layers[first][layer], layers[second][layer]
            points += [
                LayerSimilarity(
                    first,
                    second,
                    layer,
                    depth,
                    measure,
                    compute(x, y, options.permutations, seed),
                    len(tiles),
                    (x.shape[1], y.shape[1]),
                )
                for measure, compute in MEASURES.items()
            ]
    return points


def embed_layers(
    backbone: Backbone,
    tiles: NDArray[Any],
    spec: TileSpec,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> Layers:
    """Embeds tiles by each block of a backbone, averaged over space.

    Args:
        backbone: put into evaluation mode.
        tiles: ``[n, S, S, 3] uint8``, or patches ``[n, S, S, S] int16``, as a cache reads them.
        spec: their specification.
        batch_size: tiles in one pass.
        device: where; by default a GPU if there is one.

    Returns:
        ``[n, D] float32`` by block, lowest first, and ``embedding`` last.
    """
    device = device or chosen_device()
    backbone = backbone.eval().to(device)
    blocks = tuple(backbone.blocks())
    parts: dict[str, list[Tensor]] = {name: [] for name in (*blocks, "")}
    with BlockEmbedder(backbone, blocks) as embedder, torch.inference_mode():
        for first in range(0, len(tiles), batch_size):
            batch = network_input(tiles[first : first + batch_size], spec).to(device)
            for name, values in embedder(batch).items():
                parts[name].append(values.cpu())
    return {name or EMBEDDING: torch.cat(values).numpy() for name, values in parts.items()}


def write_curves(points: Sequence[LayerSimilarity], path: Path) -> None:
    """Writes one CSV row per point."""
    rows = []
    for point in points:
        found = point.similarity
        figures = (f"{x:.6f}" for x in (found.value, found.noise_floor, found.noise_floor_highest))
        cells = (
            *(point.first, point.second, point.layer, point.depth, point.measure, *figures),
            *(found.permutations, point.tiles, *point.channels),
        )
        rows.append(dict(zip(_COLUMNS, cells, strict=True)))
    write_csv(path, _COLUMNS, rows)


def draw_curves(points: Sequence[LayerSimilarity], path: Path) -> None:
    """Draws one panel per measure, one line per pair of networks, and noise floors dashed."""
    from matplotlib.figure import Figure

    curves = list(dict.fromkeys((point.first, point.second) for point in points))
    layers = merge_layers([p.layer for p in points if (p.first, p.second) == curve] for curve in curves)
    short = short_names(name for curve in curves for name in curve)
    figure = Figure(
        figsize=(max(9.0, 2.4 + 0.9 * len(layers)), 7.2 + 0.25 * len(curves)), layout="constrained"
    )
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for panel, measure in zip(panels, MEASURES, strict=True):
        panel.set(title=_TITLES[measure], ylim=(-0.05, 1.05))
        panel.grid(alpha=0.3)
        for number, (first, second) in enumerate(curves):
            line = [
                point
                for point in points
                if (point.first, point.second, point.measure) == (first, second, measure)
            ]
            places = [layers.index(point.layer) for point in line]
            label = plot_label(f"{short[first]}  and  {short[second]}")
            values = [point.similarity.value for point in line]
            look: dict[str, Any] = {
                "color": f"C{number % 10}",
                "marker": _MARKERS[number // 10 % len(_MARKERS)],
            }
            panel.plot(places, values, "-", label=label, **look)
            floors = [point.similarity.noise_floor for point in line]
            panel.plot(places, floors, "--", markersize=3, alpha=0.6, **look)
        panel.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    panel.plot(
        [], [], "--", color="grey", label="same colour and marker, dashed: noise floor (tiles shuffled)"
    )
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    figure.suptitle(f"Similarity of representations, {points[0].tiles} tiles", fontsize=11)
    with replaced(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _load_checkpoint(name: str, tile_spec: TileSpec, allow: Sequence[str]) -> Backbone:
    grader = load_grader(Path(name), allow)
    if grader.tile_spec is not None and grader.tile_spec != tile_spec:
        difference = describe_difference(tile_spec, grader.tile_spec)
        raise CacheMismatchError(f"{name} was trained on other tiles: {difference}")
    return grader.network.backbone


def _only_kind(checkpoints: Mapping[str, Backbone], same_weights: bool) -> Backbone:
    """Returns a backbone of the checkpoints if one built like it stands for all of them before training."""
    (name, first), *others = checkpoints.items()

    def kind(backbone: Backbone) -> tuple[BackboneSpec, object]:
        weights = backbone.spec.pretrained if same_weights else PRETRAINED
        alike = replace(backbone.spec, pretrained=weights, channels_last=True, gradient_checkpointing=False)
        return alike, backbone.architecture

    for other, backbone in others:
        if kind(backbone) != kind(first):
            raise UsageError(
                f"expected checkpoints of one backbone, as '{PRETRAINED}' and '{RANDOM}' are one network: "
                f"{name} has {first.spec.name} from {first.spec.pretrained!r}, {other} {backbone.spec.name} "
                f"from {backbone.spec.pretrained!r}, or other options of it; compare one at a time, or give "
                "--backbone"
            )
    return first


def _check_beginning(pretrained: Backbone, trained: Mapping[str, Backbone]) -> None:
    """Checks that trainings began from these weights, of which the file may have changed since."""
    own = pretrained.lineage[0]
    for name, backbone in trained.items():
        about = f"'{PRETRAINED}' is {pretrained.spec.pretrained!r} with sha256 {own[:12]}..., and {name} "
        if not backbone.lineage:
            warnings.warn(f"{about}records none: nothing shows that it began there", stacklevel=3)
        elif own not in backbone.lineage:
            raise CheckpointError(
                f"{about}began from weights with {backbone.lineage[0][:12]}...; name their file in its place"
            )


def _build(name: str, spec: BackboneSpec, seed: int) -> Backbone:
    if name == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Backbone(spec)
    if name != PRETRAINED:
        if Path(name).suffix not in (".safetensors", ".pth", ".pt"):
            raise UsageError(
                f"expected a network to be 'random', 'pretrained', a .ckpt of 'slidetl fit', or a "
                f".safetensors or .pth file, found {name!r}"
            )
        spec = replace(spec, pretrained=name)
    backbone = Backbone(spec)
    backbone.load_pretrained()
    return backbone


def _draw_tiles(caches: Sequence[SlideCache], n_tiles: int, seed: int) -> NDArray[np.uint8]:
    """Draws tiles ``[n, S, S, 3]`` evenly from all tiles of all slides."""
    ends = np.cumsum([len(cache) for cache in caches])
    drawn = np.random.default_rng(seed).permutation(ends[-1])[:n_tiles]
    drawn.sort()  # neighbours share a shard
    slides = np.searchsorted(ends, drawn, side="right")
    return np.concatenate(
        [
            cache.read(drawn[slides == number] - (ends[number] - len(cache)))
            for number, cache in enumerate(caches)
        ]
    )
