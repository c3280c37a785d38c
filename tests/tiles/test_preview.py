from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from slidetl.slides import SlideInfo
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.plan import TilePlan
from slidetl.tiles.preview import COLOURS, KEPT, draw_preview
from slidetl.tiles.tissue import TissueMask


def draw(path: Path, kept: list[list[int]], left_out: dict[str, list[list[int]]], side: int = 100) -> None:
    mask = np.zeros((side, side), bool)
    mask[10:60, 10:60] = True
    origins = np.array(kept, np.int32).reshape(-1, 2)
    plan = TilePlan(
        spec=TileSpec(0.5, 320),
        info=SlideInfo(Path("s.svs"), "", "", (3200, 3200), (0.5, 0.5), (0.5,), (255, 255, 255), None),
        mpp_read=(0.5, 0.5),
        origins_level0=origins,
        extent_level0=(320.0, 320.0),
        tissue_fraction=np.ones(len(origins), np.float32),
        tiles_without_tissue=0,
        thumbnail=np.full((side, side, 3), 240, np.uint8),
        tissue_mask=TissueMask(mask, 16.0),
        quality={},
        left_out_level0={
            reason: np.array(places, np.int32).reshape(-1, 2) for reason, places in left_out.items()
        },
    )
    draw_preview(path, plan, "slide ł")  # a letter that Pillow's own font lacks


def seen(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def colours(path: Path) -> dict[tuple[int, int, int], int]:
    pixels = seen(path).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return {(int(r), int(g), int(b)): int(n) for (r, g, b), n in zip(values, counts, strict=True)}


def test_tiles_are_drawn_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "previews" / "S.png"
    draw(path, [[640, 640]], {"pen": [[960, 640]], "unheard-of": []})
    image = seen(path)
    # 100 pixels of 16 um were enlarged six times; a tile of 160 um is 60 pixels wide there.
    assert image.shape[1] == 600
    assert tuple(image[150, 120]) == COLOURS[KEPT]  # its left side, 20 pixels of 16 um from the corner
    assert tuple(image[120, 200]) == COLOURS["pen"]
    assert tuple(image[150, 150]) == (240, 240, 240)
    tinted = image[150, 210].astype(int)
    assert tinted[2] > tinted[0] + 50  # the pen's blue over the grey
    assert (image[600:] != 255).any()  # the legend


@pytest.mark.slow
def test_colours_appear_only_with_their_reason(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", [], {})
    draw(tmp_path / "b.png", [], {"fold": [[0, 0]]})
    assert COLOURS["fold"] not in colours(tmp_path / "a.png")
    assert COLOURS["fold"] in colours(tmp_path / "b.png")


def test_a_large_thumbnail_is_reduced_and_nothing_else_is_left_behind(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", [[0, 0]], {}, side=3000)
    assert seen(tmp_path / "a.png").shape[1] == 2000
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, [[0, 0]], {"air": [[640, 0]]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
