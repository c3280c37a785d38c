"""Shows what the atlas finds where the truth is drawn or labelled.

    python tools/bench_atlas.py synthetic --folder atlas-demo
    python tools/bench_atlas.py labelled --tiles FOLDER_OF_LABELLED_TILES

``synthetic`` draws, cuts and embeds slides once, then compares clusters and search with the drawn truth;
``labelled`` takes a folder of tiles by class. Means and deviations of colours are the baseline of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from slidetl.analysis.clusters import principal_components
from slidetl.analysis.neighbours import best_of, cosines
from slidetl.atlas.cluster import cluster_points
from slidetl.atlas.collection import Collection, open_collection
from slidetl.atlas.options import ClusterOptions, Selection
from slidetl.cli import main as slidetl
from slidetl.models.backbones import Backbone
from slidetl.models.spec import BackboneSpec

_BACKBONE = "tf_efficientnet_lite0"
_QUERIES = 200

Rows = NDArray[np.float32]


def colours(tiles: NDArray[np.uint8]) -> Rows:
    """Means and deviations of the absorbed colour, [n, 6]: directions differ by hue."""
    flat = 1 - tiles.reshape(len(tiles), -1, 3).astype(np.float32) / 255
    return np.concatenate([flat.mean(1), flat.std(1)], 1)


def unit(rows: NDArray[Any]) -> Rows:
    values = rows.astype(np.float32)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def drawn_shares(collection: Collection, truth: Path) -> NDArray[np.float64]:
    """Share of a tile that is collagen, and share that is lesion: [N, 2]."""
    rows = []
    for slide in collection.slides:
        cache = slide.cache
        with np.load(truth / f"{slide.row.slide_id}.npz") as file:
            maps = [file[name].astype(float) for name in ("collagen_fraction", "lesion_fraction")]
            cell = float(file["cell_um"])
        side = round(cache.extent_level0[0] * cache.mpp_level0[0] / cell)
        for x, y in np.round(cache.origins_level0 * cache.mpp_level0 / cell).astype(int).tolist():
            rows.append([values[y : y + side, x : x + side].mean() for values in maps])
    return np.array(rows)


def synthetic(folder: Path) -> tuple[dict[str, Rows], NDArray[np.int64], NDArray[Any], list[str]]:
    manifest, cache = folder / "data" / "manifest.csv", folder / "cache"
    if not manifest.exists():
        drawn = ["--slides", "24", "--patients", "20", "--sites", "3", "--size", "2048", "--mpp", "2"]
        assert slidetl(["synth", str(folder / "data"), *drawn, "--stain", "he", "--seed", "0"]) == 0
    assert slidetl(["tile", str(manifest), "--cache", str(cache), "--mpp", "2", "--tile-size", "128"]) == 0
    assert slidetl(["embed", str(cache), "--backbone", _BACKBONE, "--pretrained", "imagenet"]) == 0
    collection = open_collection(Selection(cache, _BACKBONE, manifest))
    shares = drawn_shares(collection, folder / "data" / "truth")
    truth = np.where(shares[:, 0] > 0.5, 2, np.where(shares[:, 1] > 0.5, 1, 0))
    seen = [colours(slide.cache.read(np.arange(len(slide.cache)))) for slide in collection.slides]
    features = {
        "colour": np.concatenate(seen),
        _BACKBONE: np.concatenate([unit(rows) for rows in collection]),
    }
    return features, truth, collection.patients[collection.slide_of], ["other", "cellular lesion", "collagen"]


def labelled(folder: Path) -> tuple[dict[str, Rows], NDArray[np.int64], NDArray[Any], list[str]]:
    """Reads tiles of equal size, one folder a class; each tile counts as a patient."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(path, n) for n, name in enumerate(classes) for path in sorted((folder / name).iterdir())]

    def parts() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(files), 64):
            yield np.stack(
                [np.asarray(Image.open(path).convert("RGB")) for path, _ in files[start : start + 64]]
            )

    backbone = Backbone(BackboneSpec(_BACKBONE, "imagenet"))
    backbone.load_pretrained()
    backbone.eval()
    seen, embedded = [], []
    with torch.inference_mode():
        for tiles in parts():
            seen.append(colours(tiles))
            embedded.append(backbone(torch.from_numpy(tiles).permute(0, 3, 1, 2)).float().numpy())
    features = {"colour": np.concatenate(seen), _BACKBONE: np.concatenate(embedded)}
    return features, np.array([n for _, n in files]), np.arange(len(files)), classes


def precision(
    rows: Rows, truth: NDArray[np.int64], patients: NDArray[Any], queries: NDArray[np.int64], k: int = 10
) -> tuple[float, float]:
    """Precision at k of the nearest tiles of other patients, and of tiles drawn at random."""
    similarity = cosines(rows[queries], [rows])
    group = np.unique(patients, return_inverse=True)[1]
    found, chance = [], []
    for query, row in zip(queries.tolist(), similarity, strict=True):
        is_allowed = patients != patients[query]
        hits = best_of(row, group, is_allowed, k, 3)
        found.append(float((truth[hits] == truth[query]).mean()))
        chance.append(float((truth[is_allowed] == truth[query]).mean()))
    return float(np.mean(found)), float(np.mean(chance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=("synthetic", "labelled"))
    parser.add_argument("--folder", type=Path, default=Path("atlas-demo"), help="of synthetic slides")
    parser.add_argument("--tiles", type=Path, help="of labelled tiles: one folder a class")
    options = parser.parse_args()
    if options.kind == "labelled" and options.tiles is None:
        parser.error("labelled needs --tiles")
    made = synthetic(options.folder) if options.kind == "synthetic" else labelled(options.tiles)
    features, truth, patients, classes = made
    counts = ", ".join(f"{name} {count}" for name, count in zip(classes, np.bincount(truth), strict=True))
    print(f"{len(truth)} tiles: {counts}\n{'features':<24}{'method':<30}{'clusters':>9}{'Rand':>8}")
    for name, rows in features.items():
        points = unit(rows)
        points = np.asarray(principal_components(points, 16)(points), np.float32)
        for title, how in (
            ("mean shift, as by default", ClusterOptions()),
            ("mean shift, median", ClusterOptions(quantile=0.5)),
            ("mean shift, Gaussian", ClusterOptions(kernel="gaussian")),
            (f"k-means, {len(classes)}", ClusterOptions("k-means", clusters=len(classes))),
            ("HDBSCAN, 20 at least", ClusterOptions("hdbscan", least=20)),
        ):
            try:
                found = cluster_points(points, how)[0]
            except ValueError as error:
                print(f"{name:<24}{title:<30}{error}")
                continue
            rand = adjusted_rand_score(truth, found.labels)
            print(f"{name:<24}{title:<30}{len(found.centres):>9}{rand:>8.3f}", flush=True)
    print(f"{'features':<24}{'tiles searched by':<30}{'P at 10':>9}{'chance':>8}")
    for name, rows in features.items():
        for number, title in enumerate(classes):
            queries = np.random.default_rng(0).permutation(np.flatnonzero(truth == number))[:_QUERIES]
            hits, chance = precision(rows, truth, patients, queries)
            print(f"{name:<24}{title:<30}{hits:>9.3f}{chance:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
