"""Writes stored features in the files of other tools: TRIDENT's and CLAM's HDF5, and AnnData."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import OutputError, needs_extra
from slidetl.files import replaced_path
from slidetl.tiles.features import FeatureSource, feature_checksum, read_features, read_source
from slidetl.tiles.store import SlideCache

Form = Literal["hdf5", "anndata"]
SUFFIXES: dict[Form, str] = {"hdf5": ".h5", "anndata": ".h5ad"}
OURS = "slidetl"  # the attribute, or the entry of ``uns``, with all that is known here, as JSON

# A magnification is 10 / micrometres per pixel; 20 is written as a whole number.
_UM_TIMES_POWER = 10.0

NEEDS_FORMATS = ("files of other tools need h5py and anndata", "formats")


def export_features(
    cache: SlideCache, name: str, path: Path, form: Form = "hdf5", overwrite: bool = False
) -> bool:
    """Writes the features of a slide to a file, whole or not at all.

    ``hdf5`` is the layout of TRIDENT (``WSI.extract_patch_features``), which CLAM reads: ``features [N, D]
    float32`` and ``coords [N, 2] int64``, upper-left corners in level-0 pixels. ``anndata`` has the features
    in ``X``, and in ``obsm["spatial"]`` the centres of the tiles in level-0 pixels, as Squidpy plots them.

    Args:
        cache: the slide.
        name: of its features.
        path: the file.
        form: its layout.
        overwrite: replace an existing file of other content.

    Returns:
        False if the file was there already, with the same features.

    Raises:
        CacheError: there are no such features, they are damaged, or were imported without the size of a tile,
            as ``anndata`` needs it.
        OutputError: the file cannot be written, or has other content.
        UsageError: h5py or anndata is not installed.
    """
    source = read_source(cache, name)
    about = {
        "header": cache.header.to_attributes(),
        "name": name,
        "features": source.to_attributes(),
        "checksum": feature_checksum(cache, name),  # imported features have no hash of their weights
    }
    if path.exists() and not overwrite:
        then = _about(path, form)
        has_hash = "checksum" in then or bool(then and source.weights_sha256)
        if has_hash and _agrees(then, json.loads(json.dumps(about))):
            return False
        raise OutputError(f"{path}: it is there with other content; name another folder, or use --overwrite")
    values = read_features(cache, name).astype(np.float32)
    write: Callable[[Path, SlideCache, FeatureSource, NDArray[np.float32], str], None]
    write = _write_hdf5 if form == "hdf5" else _write_anndata
    with replaced_path(path) as partial:
        write(partial, cache, source, values, json.dumps(about, sort_keys=True))
    return True


def _agrees(then: Any, now: Any) -> bool:
    """Tells if values are those of an earlier description, which may lack some that were added since."""
    if isinstance(then, dict) and isinstance(now, dict):
        return all(key in now and _agrees(value, now[key]) for key, value in then.items())
    return bool(then == now)


def _about(path: Path, form: Form) -> dict[str, Any]:
    """Reads the description that :func:`export_features` wrote; empty for a file of another origin."""
    with needs_extra(*NEEDS_FORMATS):
        import h5py
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = json.loads(file.attrs[OURS] if form == "hdf5" else file[f"uns/{OURS}"][()])
    except (OSError, KeyError, ValueError, TypeError, RuntimeError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_hdf5(
    path: Path, cache: SlideCache, source: FeatureSource, values: NDArray[np.float32], about: str
) -> None:
    with needs_extra(*NEEDS_FORMATS):
        import h5py
    with h5py.File(path, "x", locking=False) as file:  # nobody else knows its name
        features = file.create_dataset("features", data=values)
        coords = file.create_dataset("coords", data=cache.origins_level0.astype(np.int64))
        features.attrs.update({"name": cache.slide_id, "encoder": source.backbone})
        coords.attrs.update(_coords_attributes(cache))
        file.attrs[OURS] = about


def _coords_attributes(cache: SlideCache) -> dict[str, Any]:
    """Returns TRIDENT's attributes of ``coords``, as far as the cache knows them."""
    header = cache.header
    spec = header.spec
    attributes: dict[str, Any] = {"name": cache.slide_id}
    if spec.tile_size_px:
        attributes |= {"patch_size": spec.tile_size_px, "overlap": spec.tile_size_px - spec.stride_px}
    if all(header.extent_level0):
        attributes["patch_size_level0"] = round(header.extent_level0[0])
    if all(header.mpp_level0) and all(header.mpp_read):
        attributes["level0_magnification"] = _magnification(header.mpp_level0[0])
        attributes["target_magnification"] = _magnification(header.mpp_read[0])
    if all(header.size_level0):
        attributes |= {"level0_width": header.size_level0[0], "level0_height": header.size_level0[1]}
    return attributes


def _magnification(mpp: float) -> int | float:
    power = _UM_TIMES_POWER / mpp
    return round(power) if abs(power - round(power)) < 1e-6 else power


def _write_anndata(
    path: Path, cache: SlideCache, source: FeatureSource, values: NDArray[np.float32], about: str
) -> None:
    with needs_extra(*NEEDS_FORMATS):
        import anndata
        import pandas as pd
    origins = cache.origins_level0
    names = [f"{cache.slide_id}_{tile}" for tile in range(len(origins))]
    obs = pd.DataFrame(
        {"x_level0": origins[:, 0], "y_level0": origins[:, 1], "tissue_fraction": cache.tissue_fraction},
        index=names,
    )
    var = pd.DataFrame(index=[str(number) for number in range(values.shape[1])])
    extent = np.asarray(cache.extent_level0)
    spots = {"scalefactors": {"spot_diameter_fullres": float(extent[0])}}
    data = anndata.AnnData(
        X=values,
        obs=obs,
        var=var,
        obsm={"spatial": origins + extent / 2},
        uns={OURS: about, "backbone": source.backbone, "spatial": {cache.slide_id: spots}},
    )
    data.write_h5ad(path)
