"""Searches for the tiles most similar to some tiles or to a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.analysis.index import Index, open_index
from slidetl.analysis.neighbours import best_of, concept, cosines
from slidetl.atlas.collection import Collection
from slidetl.atlas.options import SimilarOptions
from slidetl.data.study import check_duplicates
from slidetl.errors import UsageError, WeightsError
from slidetl.tiles.features import FeatureSource
from slidetl.tiles.grid import TileSpec


@dataclass(frozen=True, eq=False)
class Similar:
    """The answer of a search.

    Attributes:
        examples, minus: numbers of the tiles searched by.
        picture: ``[S, S, 3] uint8``, of ``--image``, as the network saw it; None without.
        hits: numbers of the tiles found, nearest first.
        distances: ``[k] float32``, 1 less the cosine, 0..2.
        searched: number of tiles that could have been found.
        recall: of the index, a sentence; empty if all tiles were compared.
        sampled: number of tiles drawn at random for ``random_rank`` and ``quantiles``; all if ``recall`` is
            empty.
        random: number of a tile drawn from these.
        random_rank, random_distance: its rank among them, 1 for the nearest, and its distance.
        quantiles: distance of the nearest 1, 5, 50 and 95 % of these.
        left_out: patients whose tiles were left out.
    """

    examples: tuple[int, ...]
    minus: tuple[int, ...]
    picture: NDArray[np.uint8] | None
    hits: NDArray[np.int64]
    distances: NDArray[np.float32]
    searched: int
    recall: str
    sampled: int
    random: int
    random_rank: int
    random_distance: float
    quantiles: tuple[float, ...]
    left_out: tuple[str, ...]


def find_similar(
    collection: Collection, options: SimilarOptions, say: Callable[[str], None] = lambda _: None
) -> Similar:
    """Searches all tiles of a collection, exactly or by an index.

    The examples' directions are averaged, and those of ``minus`` subtracted. Tiles of the examples' patients
    are left out unless asked for, the tiles searched by always. Distances of the tiles found are exact in
    any case; where the index does not fill the answer, all tiles are compared.

    Raises:
        UsageError: an unknown slide or tile, no tile left to search, or two patients share a slide.
        WeightsError: the picture's network is not that of the features.
        SlidetlError: the features or the index cannot be read.
    """
    if collection.has_manifest:
        check_duplicates(collection.slides)
    examples = tuple(dict.fromkeys(collection.find(name) for name in options.tile))
    minus = tuple(dict.fromkeys(collection.find(name, "--minus") for name in options.minus))
    vectors = [_vector(collection, tile) for tile in examples]
    picture = None
    if options.image is not None:
        spec = collection.slides[0].cache.spec
        picture = read_picture(options.image, spec)
        vectors.append(embed_tiles(picture[None], collection.source, options.pretrained)[0])
    subtracted = np.stack([_vector(collection, tile) for tile in minus]) if minus else None
    direction = concept(np.stack(vectors), subtracted)

    patients = collection.patients
    own = {str(patients[collection.slide_of[tile]]) for tile in examples}
    is_allowed = np.ones(len(collection), bool)
    if not options.same_patient:
        is_allowed = ~np.isin(patients, list(own))[collection.slide_of]
    is_allowed[[*examples, *minus]] = False
    allowed = np.flatnonzero(is_allowed)
    if not len(allowed):
        raise UsageError(
            f"no tile is left to search: all are of {', '.join(sorted(own)) or 'one slide'}; add slides of "
            "other patients, or give --same-patient"
        )
    random = int(np.random.default_rng(options.seed).choice(allowed))
    recall, hits = "", np.zeros(0, np.int64)
    if options.index is not None:
        owner = np.unique(patients, return_inverse=True)[1][collection.slide_of]
        index = open_index(
            options.index,
            collection.identity,
            collection,
            collection.slide_of,
            owner,
            SimilarOptions.most_each,
            say,
        )
        hits = index.best(direction, collection.slide_of, is_allowed, options.count, options.most_each)
        recall = _describe_recall(index, options.count)
    if len(hits) == options.count:
        background = 1 - index.sample(direction, is_allowed, options.seed)
        of_hits = _distances(collection, direction, hits)
        order = np.argsort(of_hits, kind="stable")
        hits, of_hits = hits[order], of_hits[order]
        of_random = float(_distances(collection, direction, np.array([random]))[0])
    else:
        recall = ""
        distances = 1 - cosines(direction[None], collection)[0]
        hits = best_of(-distances, collection.slide_of, is_allowed, options.count, options.most_each)
        of_hits, of_random, background = distances[hits], float(distances[random]), distances[allowed]
    return Similar(
        examples,
        minus,
        picture,
        hits,
        of_hits,
        len(allowed),
        recall,
        len(background),
        random,
        1 + round(float((background < of_random).mean()) * len(allowed)),
        of_random,
        tuple(np.quantile(background, (0.01, 0.05, 0.5, 0.95)).tolist()),
        () if options.same_patient else tuple(sorted(own)),
    )


def _describe_recall(index: Index, count: int) -> str:
    k = min(count, len(index.recalls))
    return (
        f"An index was searched. When built, it found {index.recalls[k - 1]:.1%} of the exact {k} "
        f"nearest tiles of other patients, at most {SimilarOptions.most_each} of a slide, for "
        f"{index.checked} tiles drawn at random"
    )


def _distances(
    collection: Collection, direction: NDArray[np.float32], tiles: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Computes the exact distances of some tiles, reading their slides alone."""
    distances = np.zeros(len(tiles), np.float32)
    slides = collection.slide_of[tiles]
    for number in np.unique(slides):
        rows = collection.read(collection.slides[number])
        chosen = slides == number
        places = tiles[chosen] - collection.starts[number]
        distances[chosen] = 1 - cosines(direction[None], [rows[places]])[0]
    return distances


def _vector(collection: Collection, tile: int) -> NDArray[np.float16]:
    slide, number = collection.place(tile)
    vector: NDArray[np.float16] = collection.read(slide)[number]
    if not np.isfinite(vector).all():
        raise UsageError(
            f"features of tile {number} of slide {slide.row.slide_id!r} are not finite; "
            "make them again with 'slidetl embed --overwrite'"
        )
    return vector


def read_picture(path: Path, spec: TileSpec) -> NDArray[np.uint8]:
    """Reads the middle square of a picture, scaled to the size of a tile: ``[S, S, 3] uint8``.

    Raises:
        SlideError: it cannot be read, or is smaller than a tile.
    """
    from slidetl.slides import open_slide

    with open_slide(path, mpp_replace=1.0) as slide:
        width, height = slide.info.size_level0
        side = min(width, height)
        if side < spec.tile_size_px:
            raise UsageError(
                f"{path}: {width} x {height} pixels, expected at least {spec.tile_size_px} each way, the "
                "size of a tile; give a larger picture"
            )
        corner = ((width - side) // 2, (height - side) // 2)
        return slide.read(corner, (spec.tile_size_px,) * 2, side / spec.tile_size_px, 0.0)


def embed_tiles(
    tiles: NDArray[np.uint8], source: FeatureSource, pretrained: str = "imagenet"
) -> NDArray[np.float16]:
    """Embeds tiles ``[n, S, S, 3]`` by the network of stored features: ``[n, D]``.

    Raises:
        WeightsError: the weights cannot be found, or are not those of the features.
    """
    import torch

    from slidetl.models.backbones import Backbone, weights_sha256
    from slidetl.models.runner import channels_first
    from slidetl.models.spec import BackboneSpec
    from slidetl.training.embed import BlockEmbedder

    if not source.weights_sha256:
        raise WeightsError(
            f"the features were imported ({source.identity}): no network here makes them of a picture"
        )
    pooling: Any = source.pooling  # checked by the specification
    backbone = Backbone(BackboneSpec(source.backbone, pretrained, pooling=pooling))
    backbone.load_pretrained()
    backbone.eval()
    found = weights_sha256(backbone)
    if found != source.weights_sha256:
        raise WeightsError(
            f"the features are of {source.backbone} with weights {source.short_identity}, --pretrained "
            f"{pretrained} has {found[:12]}...; give the --pretrained of 'slidetl embed'"
        )
    blocks = (source.block,) if source.block else ()
    with BlockEmbedder(backbone, blocks) as embedder, torch.inference_mode():
        values = embedder(channels_first(torch.from_numpy(tiles)))[source.block]
    return np.asarray(values.numpy(), np.float16)
