"""Writes what slidetl sees on a slide as PNGs for people to look at: tissue, tiles, and what spoils them.

Example::

    python tools/show_tissue.py OUT slide.svs other.ndpi --mpp 0.5 --tile-size 224
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from slidetl.errors import SlideError
from slidetl.slides import open_slide
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.plan import plan_tiles
from slidetl.tiles.preview import draw_preview
from slidetl.tiles.quality import measure_quality


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the PNGs")
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--mpp", type=float, default=0.5, help="spacing of the tiles, micrometres per pixel")
    parser.add_argument("--tile-size", type=int, default=224, help="side of a tile, pixels")
    parser.add_argument("--mpp-override", type=float, help="micrometres per level-0 pixel")
    parser.add_argument("--most", type=float, default=0.25, help="share of a tile from which it is spoilt")
    options = parser.parse_args(words)
    spec = TileSpec(options.mpp, options.tile_size)
    for path in options.slides:
        try:
            with open_slide(path, options.mpp_override) as slide:
                plan = plan_tiles(slide, spec)
        except SlideError as error:
            print(f"{path.name}: {error}")
            continue
        maps = measure_quality(
            plan.thumbnail, plan.tissue_mask.mpp, plan.tissue_mask.mask, plan.info.background_rgb
        )
        where = (plan.origins_level0, plan.extent_level0, plan.info.mpp_level0)
        is_kept = np.ones(len(plan), bool)
        left_out = {}
        for reason, mask in maps.items():
            is_spoilt = (mask.fraction(*where) > options.most) & is_kept
            left_out[reason] = plan.origins_level0[is_spoilt]
            is_kept &= ~is_spoilt
        shown = replace(plan, origins_level0=plan.origins_level0[is_kept], left_out_level0=left_out)
        draw_preview(options.out / f"{path.stem}.png", shown, path.name)
        counts = ", ".join(f"{len(places)} {reason}" for reason, places in left_out.items())
        print(f"{path.name}: {is_kept.sum()} tiles, {plan.tissue_mask.mask.mean():.0%} tissue; {counts}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
