"""Fixtures that more than one part of the tests needs."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before NumPy and torch are loaded, which read it: the threads of OpenMP spin while they wait, and networks
# this small take three times the processor time on two of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from xdist.scheduler import LoadFileScheduling

from tests.small import small_backbone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tests.volumes.studies import VolumeStudy

# "check", the default, draws the same examples in each run, so that a change is judged by what it changes.
# SLIDETL_HYPOTHESIS=explore, or pytest --hypothesis-profile=explore, searches for new ones (a nightly run):
# add what it finds as an @example. No deadline: the time of an example depends on what else the machine does.
settings.register_profile("check", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("SLIDETL_HYPOTHESIS", "check"))

PATIENCE_S = 900  # a busy machine starts Python with torch in a minute

# Whole comparisons, and trainings in several processes.
SLOW_FIXTURES = {"compared", "runs", "together_and_alone"}


@cache
def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests of slow fixtures, skips those of an absent GPU, and puts files with slow tests first."""
    slow: Counter[Path] = Counter()
    for item in items:
        if item.get_closest_marker("gpu") is not None and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU here"))
        if not SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        slow[item.path] += item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Keeps the tests of a file in one process, as they share what its fixtures made, and in their order."""
    config.option.loadscopereorder = False  # it would put a long file of few tests last
    return LoadFileScheduling(config, log)


Picture = NDArray[np.uint8]
PyramidTiff = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patient data lies on these machines: a connection to anywhere fails the test that opens it."""

    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:  # how processes of one machine talk
            pytest.fail(f"a connection to {address} that nobody asked for")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests record the models that they export in a list of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDETL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real files: ``SLIDETL_TEST_DATA``, or ``../shared/data`` beside the repository."""
    named = os.environ.get("SLIDETL_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"SLIDETL_TEST_DATA names {folder}, which is not a folder")
        pytest.skip("no real files: SLIDETL_TEST_DATA is not set and ../shared/data is not there")
    return folder


@pytest.fixture
def pyramid_tiff(tmp_path: Path) -> PyramidTiff:
    """Writes a picture as a slide that OpenSlide opens: a tiled pyramid with resolution tags.

    ``pyramid_tiff(picture, mpp=0.5, factors=(4,), name="slide", jpeg=False, tile_px=256)``: ``mpp`` is one
    number or ``(x, y)``; every factor adds a level of block means, what is left over dropped.
    """

    def write(
        picture: Picture,
        mpp: float | tuple[float, float] | None = 0.5,
        factors: tuple[int, ...] = (),
        name: str = "slide",
        jpeg: bool = False,
        tile_px: int = 256,
    ) -> Path:
        # Imported here: the learning wing's tests share this file.
        import tifffile

        path = tmp_path / f"{name}.tiff"
        x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        with tifffile.TiffWriter(path) as file:
            for factor in (1, *factors):
                file.write(
                    block_means(picture, factor),
                    tile=(tile_px, tile_px),
                    photometric="rgb",
                    compression="jpeg" if jpeg else "deflate",
                    compressionargs={"level": 90} if jpeg else {},
                    subfiletype=0 if factor == 1 else 1,
                    resolution=(1e4 / (x * factor), 1e4 / (y * factor)) if x and y else None,
                    resolutionunit="CENTIMETER" if x else None,
                    software="test",  # nothing that depends on the clock or the version
                )
        return path

    return write


def block_means(picture: Picture, factor: int) -> Picture:
    height, width = picture.shape[0] // factor, picture.shape[1] // factor
    blocks = picture[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.asarray(blocks.mean(axis=(1, 3)) + 0.5, dtype=np.float64).astype(np.uint8)


@pytest.fixture(scope="session")
def tissue_picture() -> Callable[[int, int], Picture]:
    """``tissue_picture(side_px, seed)``: textured pink tissue, white glass on the right quarter."""

    def draw(side_px: int, seed: int = 0) -> Picture:
        rng = np.random.default_rng(seed)
        coarse = rng.integers(-40, 40, (side_px // 8 + 1, side_px // 8 + 1, 3))
        texture = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)[:side_px, :side_px]
        picture = np.clip(np.array([200, 120, 170]) + texture, 0, 255).astype(np.uint8)
        picture[:, side_px * 3 // 4 :] = 255
        return picture

    return draw


@dataclass(frozen=True)
class Study:
    """Synthetic slides with their manifest and tile cache, made once by the real commands."""

    manifest: Path
    cache: Path

    def options(self, root: Path) -> list[str]:
        """Options of the training commands: this study, a small backbone, outputs below ``root``."""
        return [
            f"--data.manifest={self.manifest}",
            f"--data.cache={self.cache}",
            "--data.bag_size=8",
            "--data.num_workers=0",
            f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *small_backbone(),
        ]


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twenty small slides of five grades, tiled at 4 um/px in tiles of 64 px."""
    from slidetl.cli import main

    folder = tmp_path_factory.mktemp("study")
    drawn = [
        "--slides",
        "20",
        "--patients",
        "20",
        "--sites",
        "2",
        "--size",
        "512",
        "--mpp",
        "4",
        "--seed",
        "3",
    ]
    assert main(["synth", str(folder / "data"), *drawn, "--workers", "1"]) == 0
    study = Study(folder / "data" / "manifest.csv", folder / "cache")
    options = ["--cache", str(study.cache), "--mpp", "4", "--tile-size", "64", "--workers", "1"]
    assert main(["tile", str(study.manifest), *options]) == 0
    return study


@pytest.fixture(scope="session")
def nodules(tmp_path_factory: pytest.TempPathFactory) -> VolumeStudy:
    """A patch with a nodule and one without, of 16 voxels a side, of each of ten patients."""
    from tests.volumes.studies import source_rows, write_study

    return write_study(tmp_path_factory.mktemp("nodules"), "patches", source_rows(10))


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> VolumeStudy:
    """Series of eight overlapping patches, of sixteen patients, one of them with two."""
    from tests.volumes.studies import target_rows, write_study

    return write_study(tmp_path_factory.mktemp("scans"), "series", target_rows(16))


@pytest.fixture(scope="session")
def trained(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short ``slidetl fit`` and ``slidetl test`` on the study."""
    from slidetl.cli import main

    root = tmp_path_factory.mktemp("trained")
    kept = ["--status", str(root / "status.json")]
    assert main(["fit", *study.options(root), "--trainer.max_epochs=2", *kept]) == 0
    assert main(["test", *study.options(root)]) == 0
    return root


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures
