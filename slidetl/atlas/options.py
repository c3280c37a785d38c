"""Options of the atlas; loads no torch, to keep its help fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slidetl.errors import UsageError, refuse_unused

_BANDWIDTH = ("neighbour_share", "quantile")
# Options without an effect, by method.
_UNUSED = {
    "mean-shift": ("clusters",),
    "k-means": ("kernel", "bandwidth", *_BANDWIDTH, "seeds", "neighbours", "least", "device"),
    "hdbscan": ("kernel", "bandwidth", *_BANDWIDTH, "seeds", "neighbours", "clusters", "device"),
}


@dataclass(frozen=True)
class Selection:
    """The tiles of an atlas.

    Attributes:
        cache: folder of 'slidetl tile' and 'slidetl embed'.
        features: name of the stored features.
        manifest: manifest of the study, for patients, sites and grades; without one each slide counts as a
            patient of its own.
        slides: identifiers of the slides to take, instead of all.
    """

    cache: Path
    features: str
    manifest: Path | None = None
    slides: tuple[str, ...] = ()


@dataclass(frozen=True)
class SimilarOptions:
    """Options of a search for similar tiles.

    Attributes:
        tile: tiles to search by, SLIDE@x,y: the tile at this point (level-0 pixels); several are averaged.
        minus: tiles to subtract, likewise.
        image: a picture to search by, taken for one tile: its middle square is scaled to a tile's size.
        pretrained: weights for ``image``, as of 'slidetl embed'; they must be those of the features.
        count: number of tiles to show.
        most_each: at most so many of one slide.
        same_patient: also show tiles of the patients searched by.
        index: file of an index, built at its first use and kept for the next questions, much faster over
            millions of tiles; it misses some of the nearest, the share is measured and told. Needs the extra
            slidetl[atlas]. Without one all tiles are compared.
        seed: of the random tile.

    Raises:
        UsageError: nothing to search by, or a number below 1.
    """

    tile: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()
    image: Path | None = None
    pretrained: str = "imagenet"
    count: int = 24
    most_each: int = 3
    same_patient: bool = False
    index: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tile and self.image is None:
            raise UsageError("give a tile to search by, --tile SLIDE@x,y, or a picture, --image FILE")
        if self.count < 1 or self.most_each < 1:
            raise UsageError(
                f"--count and --most-each must be at least 1, not {self.count} and {self.most_each}"
            )
        if self.image is None:
            refuse_unused(SimilarOptions, {"pretrained": self.pretrained}, "without --image")


@dataclass(frozen=True)
class ClusterOptions:
    """Options of clustering.

    Attributes:
        method: mean-shift finds the number of clusters, k-means is given it, hdbscan also leaves tiles out.
        components: principal components to cluster, of the features scaled to length 1; 0 for all features.
        kernel: of mean shift.
        bandwidth: radius of mean shift; by default from the next two.
        neighbour_share: of the tiles: the bandwidth is a distance to the neighbour of this rank, so this is
            about the size of the smallest cluster.
        quantile: of these distances over tiles, 0..1: the denser places decide if it is low.
        seeds: tiles that mean shift starts from; 0 for all.
        neighbours: approximate mean shift over so many nearest tiles; 0 for the exact one.
        clusters: number of clusters of k-means.
        least: tiles in the smallest cluster of mean shift and HDBSCAN.
        store: name to store the clusters of tiles under, as features for 'fit-features' and 'compare'.
        seed: of draws and starts.
        device: of mean shift; auto takes a GPU if there is one.

    Raises:
        UsageError: a number out of range, or an option of another method.
    """

    method: Literal["mean-shift", "k-means", "hdbscan"] = "mean-shift"
    components: int = 16
    kernel: Literal["flat", "gaussian"] = "flat"
    bandwidth: float | None = None
    neighbour_share: float = 0.01
    quantile: float = 0.1
    seeds: int = 2000
    neighbours: int = 0
    clusters: int = 12
    least: int = 10
    store: str = ""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for names, why in (
            (_UNUSED[self.method], f"with --method {self.method}"),
            (_BANDWIDTH if self.bandwidth is not None else (), "with --bandwidth"),
        ):
            refuse_unused(ClusterOptions, {name: getattr(self, name) for name in names}, why)
        lowest = min(self.components, self.seeds, self.neighbours)
        is_share = 0 < self.neighbour_share < 1 and 0 <= self.quantile <= 1
        if lowest < 0 or not is_share or self.clusters < 2 or self.least < 2:
            raise UsageError(
                "expected --components, --seeds and --neighbours of at least 0, --clusters and --least of at "
                "least 2, and --neighbour-share and --quantile between 0 and 1"
            )
