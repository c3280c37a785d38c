"""``slidetl backbones``."""

from __future__ import annotations


def backbones(pattern: str | None = None, *, pathology: bool = False) -> int:
    """Lists networks for embedding tiles.

    Columns: parameters in millions, length of an embedding, side in pixels of the training tiles (others
    are possible), and place of the weights.

    Args:
        pattern: part of a name, or a name with * and ?, among all of timm's; without it, those with weights
            on this machine, and a few recommended ones.
        pathology: list published pathology backbones instead, which --preset takes; with a pattern, all that
            is known of each, and its sources.
    """
    from slidetl.errors import UsageError
    from slidetl.models.catalogue import MOST_COUNTED, list_backbones

    if pathology:
        return _list_pathology(pattern)
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


def _list_pathology(pattern: str | None) -> int:
    from slidetl.errors import UsageError
    from slidetl.models.catalogue import list_presets

    found = list_presets(pattern)
    if not found:
        raise UsageError(f"no preset is called anything like {pattern!r}; leave the pattern out to see all")
    access = {True: "on request", False: "open", None: "not stated"}
    if pattern is None:
        print(
            f"{'preset':<13}  {'parameters':>10}  {'embedding':>9}  {'tile':>6}  {'mpp':<14}  "
            f"{'access':<10}  {'licence':<30}  name"
        )
    for preset, entry in found:
        spacing = " ".join(f"{mpp:g}" for mpp in preset.mpp) or "not stated"
        millions = "-" if entry.parameters is None else f"{entry.parameters / 1e6:.1f} M"
        if pattern is None:
            print(
                f"{preset.key:<13}  {millions:>10}  {entry.features or '-':>9}  {preset.tile_px:>3} px  "
                f"{spacing:<14}  {access[preset.is_gated]:<10}  {preset.licence:<30}  {preset.name}"
            )
            continue
        normalisation = "not stated; of config.json at the hub"
        if preset.normalisation:
            mean, std = (" ".join(map(str, statistic)) for statistic in preset.normalisation)
            normalisation = f"mean {mean}, std {std}"
        arguments = " ".join(f"{key}={value}" for key, value in preset.arguments.items())
        print(f"{preset.key}\n  {'name':<13}  {preset.name}")
        for label, value in (
            ("network", f"{preset.architecture} {arguments}"),
            ("gated_mlp", str(preset.gated_mlp).lower()),
            ("layer_scale", str(preset.layer_scale).lower()),
            ("pooling", preset.pooling),
            ("embedding", entry.features or "-"),
            ("parameters", millions),
            ("normalisation", normalisation),
            ("spacing", f"{spacing} micrometres per pixel" if preset.mpp else spacing),
            ("tile", f"{preset.tile_px} px"),
            ("licence", preset.licence),
            ("access", access[preset.is_gated]),
            ("weights", entry.weights),
        ):
            print(f"  {label:<13}  {value}")
        for source in preset.sources:
            print(f"  {'source':<13}  {source}")
    return 0
