"""Searches for the tiles most similar to some tiles or to a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.analysis.neighbours import best_of, concept, cosines
from slidetl.atlas.collection import Collection
from slidetl.atlas.options import SimilarOptions
from slidetl.data.study import check_duplicates
from slidetl.errors import UsageError, WeightsError
from slidetl.tiles.features import FeatureSource, read_features
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
    random: int
    random_rank: int
    random_distance: float
    quantiles: tuple[float, ...]
    left_out: tuple[str, ...]


def find_similar(collection: Collection, options: SimilarOptions) -> Similar:
    """Searches all tiles of a collection, exactly.

    The examples' directions are averaged, and those of ``minus`` subtracted. Tiles of the examples' patients
    are left out unless asked for, the tiles searched by always.

    Raises:
        UsageError: an unknown slide or tile, no tile left to search, or two patients share a slide.
        WeightsError: the picture's network is not that of the features.
        SlidetlError: the features cannot be read.
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
    distances = 1 - cosines(direction[None], collection)[0]

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
    hits = best_of(-distances, collection.slide_of, is_allowed, options.count, options.most_each)
    random = int(np.random.default_rng(options.seed).choice(allowed))
    return Similar(
        examples,
        minus,
        picture,
        hits,
        distances[hits],
        len(allowed),
        random,
        1 + int((distances[allowed] < distances[random]).sum()),
        float(distances[random]),
        tuple(np.quantile(distances[allowed], (0.01, 0.05, 0.5, 0.95)).tolist()),
        () if options.same_patient else tuple(sorted(own)),
    )


def _vector(collection: Collection, tile: int) -> NDArray[np.float16]:
    slide, number = collection.place(tile)
    vector: NDArray[np.float16] = read_features(slide.cache, collection.features)[number]
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

    from slidetl.data.datasets import channels_first
    from slidetl.models.backbones import Backbone, weights_sha256
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
        values = embedder(channels_first(tiles))[source.block]
    return np.asarray(values.numpy(), np.float16)
