"""``slidetl augment``."""

from __future__ import annotations

from pathlib import Path


def augment(
    cache: Path,
    *,
    output: Path,
    config: Path | None = None,
    tile: int = 0,
    rows: int = 4,
    columns: int = 6,
    seed: int = 0,
) -> int:
    """Draws a contact sheet: one tile as it is, and as trainings see it.

    Args:
        cache: the cache of one slide, CACHE/SLIDE.zarr.
        output: the PNG to write.
        config: a configuration of 'slidetl fit'; its data.augmentation is drawn, by default slidetl's own.
        tile: number of the tile.
        rows: rows of the sheet.
        columns: columns of the sheet; the first tile, framed in black, is unchanged.
        seed: seed of the changes.
    """
    import yaml
    from PIL import Image

    from slidetl.cli.shipped import find_config
    from slidetl.data.augment import draw_sheet, read_augmentation
    from slidetl.errors import UsageError
    from slidetl.tiles.store import SlideCache

    if min(rows, columns) < 1 or seed < 0:
        raise UsageError(f"expected --rows, --columns >= 1 and --seed >= 0, not {rows}, {columns}, {seed}")
    text = find_config(config).read_text(encoding="utf-8") if config is not None else "{}"
    try:
        augmentation = read_augmentation(yaml.safe_load(text))
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UsageError(f"{config}: expected data.augmentation: {' '.join(str(error).split())}") from error
    opened = SlideCache.open(cache)
    if opened.spec.is_volume:
        raise UsageError(f"{cache} has patches of volumes; a sheet is drawn of tiles of slides")
    if not 0 <= tile < len(opened):
        raise UsageError(f"{cache} has tiles 0 to {len(opened) - 1}, not {tile}")
    Image.fromarray(draw_sheet(opened.read([tile])[0], augmentation, rows, columns, seed)).save(output)
    print(f"written to {output}")
    return 0
