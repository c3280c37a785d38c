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
    from PIL import Image

    from slidetl.cli.shipped import find_config
    from slidetl.data.augment import draw_sheet, read_augmentation
    from slidetl.errors import UsageError
    from slidetl.files import read_yaml, replaced
    from slidetl.tiles.store import SlideCache

    if min(rows, columns) < 1 or seed < 0:
        raise UsageError(f"expected --rows, --columns >= 1 and --seed >= 0, not {rows}, {columns}, {seed}")
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output must be a file with the ending .png, not {output}")
    values = {}
    if config is not None:
        values = read_yaml(find_config(config), "a training", "data.augmentation; see configs/augmentation/")
    try:
        augmentation = read_augmentation(values)
    except (AttributeError, TypeError) as error:
        raise UsageError(f"{config}: expected data.augmentation: {' '.join(str(error).split())}") from error
    opened = SlideCache.open(cache)
    if opened.spec.is_volume:
        raise UsageError(f"{cache} has patches of volumes; a sheet is drawn of tiles of slides")
    if not 0 <= tile < len(opened):
        raise UsageError(f"{cache} has tiles 0 to {len(opened) - 1}, not {tile}")
    sheet = draw_sheet(opened.read([tile])[0], augmentation, rows, columns, seed)
    with replaced(output) as file:
        Image.fromarray(sheet).save(file, format="PNG")
    print(f"written to {output}")
    return 0
