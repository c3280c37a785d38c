"""Transfer learning that grades gigapixel histology slides.

The package reads downwards as one story; imports run one way, towards the ground::

    slides/        read anything at a physical spacing
    synthetic/     draw lung sections and cohorts whose grade is known
    tiles/         grid, tissue, quality -> plan -> cut -> store; features; ledger
    evaluation/    metrics, intervals, tests, folds, calibration, sets, agreement
    analysis/      representation similarity, novelty
    library/       model cards, what is trusted, local files
    data/          from a study (manifest, ledger, cache) to batches
    models/        tile -> embedding -> slide -> grade, as plain modules
    training/      LightningModule, schedules, checkpoints, embeddings
    compare/       arms on the same folds: jobs, records, report/
    publish/       export (TorchScript, ONNX), evidence, model library
    grading/       model file + slide -> grade, map, report/
    cli/           the same from the command line
    studio/        the same from a page in the browser

Importing the package imports nothing heavy. The names in ``__all__`` are the stable public API; each is
imported from its module when it is first used::

    import slidetl

    cache = slidetl.open_cache("cache/case-17.zarr")
    tiles = cache.read([0, 1, 2])  # [3, size, size, 3] uint8
    model = slidetl.load_model("model.pt")
    print(slidetl.grade_slide(model, "new/case-18.svs").grade_name)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slidetl.version import VERSION as __version__

if TYPE_CHECKING:
    from slidetl.data.study import Study as Study
    from slidetl.data.study import read_study as read_study
    from slidetl.errors import SlidetlError as SlidetlError
    from slidetl.evaluation.metrics import accuracy as accuracy
    from slidetl.evaluation.metrics import confusion_matrix as confusion_matrix
    from slidetl.evaluation.metrics import log_loss as log_loss
    from slidetl.evaluation.metrics import mae as mae
    from slidetl.evaluation.metrics import qwk as qwk
    from slidetl.evaluation.metrics import rps as rps
    from slidetl.grading.grade import SlideGrade as SlideGrade
    from slidetl.grading.grade import grade_slide as grade_slide
    from slidetl.publish.model_file import ModelFile as ModelFile
    from slidetl.publish.model_file import load_model as load_model
    from slidetl.slides import Slide as Slide
    from slidetl.slides import open_slide as open_slide
    from slidetl.tiles.features import list_features as list_features
    from slidetl.tiles.features import read_features as read_features
    from slidetl.tiles.grid import TileSpec as TileSpec
    from slidetl.tiles.store import SlideCache as SlideCache
    from slidetl.tiles.store import open_cache as open_cache
    from slidetl.tiles.tile import SlideSource as SlideSource
    from slidetl.tiles.tile import tile_slide as tile_slide
    from slidetl.training.checkpoint import load_grader as load_grader
    from slidetl.volumes import read_volume as read_volume
    from slidetl.volumes.volume import Volume as Volume


# Not the strategies, nor what else a class_path names: jsonargparse would write the shorter name into
# configurations and checkpoints.
_MODULES = {
    "data.study": ("Study", "read_study"),
    "errors": ("SlidetlError",),
    "evaluation.metrics": ("accuracy", "confusion_matrix", "log_loss", "mae", "qwk", "rps"),
    "grading.grade": ("SlideGrade", "grade_slide"),
    "publish.model_file": ("ModelFile", "load_model"),
    "slides": ("Slide", "open_slide"),
    "tiles.features": ("list_features", "read_features"),
    "tiles.grid": ("TileSpec",),
    "tiles.store": ("SlideCache", "open_cache"),
    "tiles.tile": ("SlideSource", "tile_slide"),
    "training.checkpoint": ("load_grader",),
    "volumes": ("read_volume",),
    "volumes.volume": ("Volume",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'slidetl' has no attribute {name!r}")
    return getattr(import_module(f"slidetl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted({*globals(), *_HOME})
