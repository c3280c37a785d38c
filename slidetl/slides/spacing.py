"""Spacing of level 0: the file's own or the user's, and its plausibility."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from slidetl.errors import SpacingError, UsageError

# Micrometres in the lengths of OME-XML (schema 2016-06, UnitsLength); pixel and reference frame are none.
UM_PER_UNIT = dict(
    zip(
        "pm Å nm µm μm um mm cm dm m thou li in ft pt".split(),  # noqa: SIM905 (reads better)
        (1e-6, 1e-4, 1e-3, 1, 1, 1, 1e3, 1e4, 1e5, 1e6, 25.4, 25400 / 12, 25400, 304800, 25400 / 72),
        strict=True,
    )
)
Pair = tuple[float, float]

# Bounds of a spacing. Coarse ones are for pictures with pixels as the user's unit.
_BOUNDS_UM = (0.01, 1e5)
# Coarser is the resolution of a printer: 1200 dpi are 21.2 um, 72 dpi 352.8.
PRINTER_UM = 20.0

# Micrometres times magnification: 10 with the usual cameras (40x: 0.25 um). A second lens or binning makes it
# 4.5 (20x: 0.23 um on MIRAX and Zeiss scanners) or up to 16.
_PRODUCT_OF_POWER = (4.0, 16.0)
# Finer than 100x with oil.
_FINEST_UM = 0.06
# Line scanners differ by a few percent along x and y.
_SQUARE = 1.25
# Relative difference of equal spacings, written with other digits.
_SAME = 0.01

REMEDY = "correct it in the manifest's mpp column or with --mpp-replace"


def check_given(option: str, mpp: float | None) -> None:
    """Refuses an impossible spacing from the user.

    Raises:
        UsageError: it is not a number of micrometres from 0.01 to 100,000.
    """
    if mpp is not None and not _is_within(mpp, _BOUNDS_UM):
        low, high = _BOUNDS_UM
        raise UsageError(f"{option} must be from {low:g} to {high:,.0f} micrometres per pixel, not {mpp:g}")


def settle_spacing(
    path: Path,
    stated: Pair | None,
    mpp_override: float | None,
    mpp_replace: float | Pair | None,
    objective_power: float | None = None,
) -> tuple[Pair, tuple[str, ...]]:
    """Chooses the spacing of level 0.

    Args:
        path: the slide, for the message.
        stated: of the file, along x and y; None if it has none.
        mpp_override: for a file without a spacing.
        mpp_replace: instead of the file's, along both axes or along x and y.
        objective_power: nominal magnification, if the file has it.

    Returns:
        Micrometres per level-0 pixel along x and y, and notes on doubts about them.

    Raises:
        SpacingError: the file has no plausible one for a microscope, and none is given; or the one given is
            impossible.
    """
    instead = mpp_replace if isinstance(mpp_replace, tuple | None) else (mpp_replace, mpp_replace)
    try:
        check_given("--mpp-override", mpp_override)
        for axis in instead or ():
            check_given("the spacing given in its place", axis)
    except UsageError as error:
        raise SpacingError(f"{path}: {error}") from error
    hint = f"its objective power is {objective_power:g}" if objective_power else ""
    if stated is not None and not all(_is_within(mpp, _BOUNDS_UM) for mpp in stated):
        hint = f"it says {min(stated):.6g}, which cannot be"
        stated = None
    notes = []
    if instead is not None:
        mpp = instead
        if stated is not None and differ(stated, mpp):
            notes.append(f"the spacing given, {max(mpp):g} um per pixel, replaces the file's own")
    elif stated is not None:
        mpp = stated
        if mpp_override is not None and differ(stated, (mpp_override, mpp_override)):
            notes.append("the file's own spacing is kept, --mpp-override fills gaps (--mpp-replace replaces)")
    elif mpp_override is not None:
        mpp = (mpp_override, mpp_override)
    else:
        raise SpacingError(
            f"{path}: the slide does not say how many micrometres a pixel is; give it with --mpp-override or "
            "in the manifest's mpp column (to take pixels as the unit: --mpp 1 --mpp-override 1)"
            + (f"; {hint}" if hint else "")
        )
    if max(mpp) > _SQUARE * min(mpp):
        notes.append(
            f"pixels of {mpp[0]:.4g} by {mpp[1]:.4g} um are far from square, {REMEDY} if that is wrong"
        )
    if objective_power and not _is_within(math.sqrt(mpp[0] * mpp[1]) * objective_power, _PRODUCT_OF_POWER):
        notes.append(
            f"{max(mpp):.4g} um per pixel contradicts the objective of {objective_power:g}x (about "
            f"{10 / objective_power:.3g}), {REMEDY} if it is wrong"
        )
    elif min(mpp) < _FINEST_UM:
        notes.append(f"{min(mpp):.4g} um per pixel is finer than lenses resolve, {REMEDY} if it is wrong")
    elif max(mpp) > PRINTER_UM and mpp == stated:
        notes.append(f"{max(mpp):.4g} um per pixel may be a printer's, {REMEDY} if it is wrong")
    return mpp, tuple(notes)


def cohort_notes(spacings: Mapping[str, float]) -> dict[str, str]:
    """Notes slides far from a cohort's median spacing (micrometres per level-0 pixel), by name."""
    believed = {name: mpp for name, mpp in spacings.items() if 0 < mpp <= PRINTER_UM}
    middle = median(believed.values()) if believed else 1.0
    return {
        name: f"{mpp:.4g} um per pixel is far from the median of {middle:.4g}, {REMEDY} if it is wrong"
        for name, mpp in believed.items()
        # Of 40x, 20x and 10x in one cohort none is further from the median than four times.
        if max(mpp / middle, middle / mpp) > 4.5
    }


def request_note(mpp: float, mpp_level0: float) -> str | None:
    """Notes a request (``mpp`` of the tiles) far coarser than the slide; None if it is not."""
    if mpp < 19.5 * mpp_level0:
        return None
    return f"--mpp {mpp:g} is 20 times the slide's own or more (it is um per pixel, not a magnification)"


def _is_within(value: float, bounds: Pair) -> bool:
    return math.isfinite(value) and bounds[0] <= value <= bounds[1]


def differ(one: Pair, other: Pair) -> bool:
    """Tells if two spacings differ by more than their digits: by 1 %."""
    return any(abs(a / b - 1) > _SAME for a, b in zip(one, other, strict=True))
