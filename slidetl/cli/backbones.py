"""``slidetl backbones``."""

from __future__ import annotations


def backbones(pattern: str | None = None) -> int:
    """Lists networks for embedding tiles.

    Columns: parameters in millions, length of an embedding, side in pixels of the training tiles (others
    are possible), and place of the weights.

    Args:
        pattern: part of a name, or a name with * and ?, among all of timm's; without it, the bundled ones,
            those with weights on this machine, and a few recommended ones.
    """
    from slidetl.errors import UsageError
    from slidetl.models.catalogue import MOST_COUNTED, list_backbones

    entries = list_backbones(pattern)
    if not entries:
        raise UsageError(f"no backbone is called anything like {pattern!r}; try a shorter part of the name")
    width = max(len(entry.name) for entry in entries)
    print(f"{'name':<{width}}  {'parameters':>10}  {'embedding':>9}  {'tile':>6}  weights")
    for entry in entries:
        counted = (
            f"{entry.parameters / 1e6:>8.2f} M" if entry.parameters is not None else f"{'-':>10}",
            f"{'-' if entry.features is None else entry.features:>9}",
            f"{'-' if entry.input_size_px is None else f'{entry.input_size_px} px':>6}",
        )
        print(f"{entry.name:<{width}}  {'  '.join(counted)}  {entry.weights}")
    if len(entries) > MOST_COUNTED:
        print(f"{len(entries)} names; those after the first {MOST_COUNTED} were not counted")
    return 0
