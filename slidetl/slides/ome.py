"""OME-XML in a TIFF: its one image, the planes of its channels, and its spacing (schema 2016-06)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from slidetl.errors import SlideOpenError
from slidetl.files import parse_xml
from slidetl.slides.spacing import UM_PER_UNIT, Pair
from slidetl.text import listed

_ROOT = re.compile(r"<(\w+:)?OME[\s>]")
_RGB_NAMES = ({"r", "red"}, {"g", "green"}, {"b", "blue"})
# Signed RGBA without alpha.
_RGB_COLOURS = (0xFF0000, 0x00FF00, 0x0000FF)
# Least share of the first picture's area for another picture; a level has a quarter at most.
_AS_LARGE = 0.3
_SHOWN = 12  # channels listed in a message


@dataclass(frozen=True)
class OmeImage:
    """The first image of an OME-XML.

    Attributes:
        mpp: micrometres per pixel along x and y; None if missing.
        objective_power: nominal magnification, if present.
        significant_bits: bits of a sample with values, if present.
        channels: name of each plane; the empty string if it has none.
        directories: of each plane, counted from 0.
        rgb: the planes of red, green and blue by names or colours; None if unknown.
        sizes_px: width and height of each picture of the file, its own first.
    """

    mpp: Pair | None
    objective_power: float | None
    significant_bits: int | None
    channels: tuple[str, ...]
    directories: tuple[int, ...]
    rgb: tuple[int, int, int] | None
    sizes_px: tuple[tuple[int, int], ...]


def is_ome(description: str) -> bool:
    """Tells if the description of a TIFF is OME-XML."""
    return _ROOT.search(description) is not None


def read_ome(xml: str, name: str, samples: int, n_directories: int) -> OmeImage:
    """Reads the first image of an OME-XML.

    Args:
        xml: the description of the file's first directory.
        name: of the file.
        samples: per pixel of the file's first directory.
        n_directories: number in the file; larger ones in the XML are refused.

    Raises:
        SlideOpenError: it is damaged, its pixels are in other files, or it has depth or time.
        ValueError: a number in it is none.
    """
    try:
        root = parse_xml(xml)
    except ValueError as error:
        raise SlideOpenError(str(error).replace("XML", "OME-XML", 1)) from error
    if next(_find(root, "BinaryOnly"), None) is not None:
        raise SlideOpenError("its OME-XML is in another file; one file is read: convert it to one")
    image = next(_find(root, "Image"), None)
    pixels = None if image is None else next(_find(image, "Pixels"), None)
    if image is None or pixels is None:
        raise SlideOpenError("its OME-XML describes no image")
    depth, times = (_whole(pixels, f"Size{axis}", 1) for axis in "ZT")
    if (depth, times) != (1, 1):
        raise SlideOpenError(
            f"expected one plane, found {depth} in depth and {times} in time; write the one that is meant to "
            "a file of its own"
        )
    for element in _find(pixels, "UUID"):
        other = element.get("FileName", name)
        if other != name and (element.text or "").strip() != root.get("UUID", ""):
            raise SlideOpenError(
                f"its OME-XML says that pixels are in {other[:80]!r}; one file is read: convert it to one"
            )
    channels = list(_find(pixels, "Channel"))
    n_planes = max(1, _whole(pixels, "SizeC", 1) // samples)
    if n_planes > n_directories:
        raise SlideOpenError(
            f"its OME-XML describes {n_planes} planes, the file has {n_directories}: planes are missing"
        )
    directories = _directories(pixels, n_planes, n_directories)
    names = tuple(channel.get("Name", "").strip() for channel in channels[:n_planes])
    bits = _whole(pixels, "SignificantBits", 0)
    return OmeImage(
        mpp=_spacing(pixels),
        objective_power=_objective(root, image),
        significant_bits=bits or None,
        channels=names + ("",) * (n_planes - len(names)),
        directories=directories,
        rgb=rgb_planes(names, list(map(_colour, channels))) if n_planes == len(channels) else None,
        sizes_px=tuple(
            (_whole(other, "SizeX", 0), _whole(other, "SizeY", 0)) for other in _find(root, "Pixels")
        ),
    )


def note_of_others(
    sizes_px: Sequence[tuple[int, int]], remedy: str = "write the one that is meant to a file of its own"
) -> tuple[str, ...]:
    """Notes pictures that are not read, of a size similar to the first's; labels and previews are smaller.

    Args:
        sizes_px: width and height of each picture, except levels and masks; the first is read.
        remedy: for a preview before the slide.

    Raises:
        SlideOpenError: another is larger than the first, a preview of other scale.
    """
    areas = [width * height for width, height in sizes_px]
    if areas and (most := max(areas)) > areas[0]:
        (width, height), (wider, higher) = sizes_px[0], sizes_px[areas.index(most)]
        raise SlideOpenError(
            f"expected the slide as its first picture, found one of {width} x {height} pixels before one of "
            f"{wider} x {higher}; {remedy}"
        )
    others = sum(area > _AS_LARGE * areas[0] for area in areas[1:])
    return (f"of {others + 1} pictures in it the first alone is read",) if others else ()


def choose_channels(wanted: str, names: tuple[str, ...], rgb: tuple[int, int, int] | None) -> tuple[int, ...]:
    """Chooses the planes to read: one, or three as red, green and blue.

    Args:
        wanted: numbers from 0 or names, separated by commas; the empty string leaves it to the file.
        names: of the planes.
        rgb: the planes of red, green and blue, if known from the file.

    Raises:
        SlideOpenError: there is no such channel, or the file leaves the choice open.
    """
    if len(names) == 1 or (not wanted and rgb is not None):
        return rgb or (0,)
    shown = listed([f"{number} {name}".strip() for number, name in enumerate(names)], _SHOWN)
    if not wanted:
        raise SlideOpenError(
            f"expected one grey or RGB image, found {len(names)} channels ({shown}); choose one, or three "
            "for red, green and blue, with --channels"
        )
    by_name = {name.casefold(): number for number, name in reversed(list(enumerate(names))) if name}
    chosen = []
    for word in (part.strip() for part in wanted.split(",")):
        number = by_name.get(word.casefold(), int(word) if word.isdecimal() and len(word) < 6 else -1)
        if not 0 <= number < len(names):
            raise SlideOpenError(f"--channels: no channel {word!r}; there are {shown}")
        chosen.append(number)
    return tuple(chosen)


def _find(root: ElementTree.Element, tag: str) -> Iterator[ElementTree.Element]:
    return (element for element in root.iter() if element.tag.rpartition("}")[2] == tag)


def _whole(element: ElementTree.Element, attribute: str, default: int) -> int:
    text = element.get(attribute, str(default))
    value = int(text) if len(text) < 19 else -1
    if value < 0:
        raise ValueError(f"{attribute} of its OME-XML is {text[:20]!r}")
    return value


def _directories(pixels: ElementTree.Element, n_planes: int, n_directories: int) -> tuple[int, ...]:
    """Finds the directory of each plane."""
    found: dict[int, int] = {}
    for element in _find(pixels, "TiffData"):
        first, directory = _whole(element, "FirstC", 0), _whole(element, "IFD", 0)
        is_open = "IFD" not in element.attrib and "PlaneCount" not in element.attrib
        count = _whole(element, "PlaneCount", n_planes if is_open else 1)
        for plane in range(min(count, n_planes)):
            found.setdefault(first + plane, directory + plane)
    places = tuple(found.get(plane, plane if not found else -1) for plane in range(n_planes))
    if not all(0 <= place < n_directories for place in places):
        raise SlideOpenError(
            f"its OME-XML names directory {max(places)}, the file has {n_directories}: planes are missing"
        )
    return places


def _spacing(pixels: ElementTree.Element) -> Pair | None:
    spacing = []
    for axis in "XY":
        unit = UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        try:
            value = float(pixels.get(f"PhysicalSize{axis}", "nan"))
        except ValueError:
            return None
        if unit is None:
            return None
        spacing.append(value * unit)
    return (spacing[0], spacing[1]) if all(value > 0 for value in spacing) else None


def _objective(root: ElementTree.Element, image: ElementTree.Element) -> float | None:
    settings = next(_find(image, "ObjectiveSettings"), None)
    named = None if settings is None else settings.get("ID")
    objectives = [o for o in _find(root, "Objective") if named is None or o.get("ID") == named]
    if len(objectives) != 1:
        return None
    try:
        power = float(objectives[0].get("NominalMagnification", "nan"))
    except ValueError:
        return None
    return power if 0 < power < 1000 else None


def rgb_planes(names: Sequence[str], colours: Sequence[int | None]) -> tuple[int, int, int] | None:
    """Finds red, green and blue among three planes by their names, or by colours if they have no names."""
    if len(names) != 3:
        return None
    if any(names):
        keys = [name.casefold() for name in names]
        found = [[n for n, key in enumerate(keys) if key in colour] for colour in _RGB_NAMES]
    else:
        found = [[n for n, colour in enumerate(colours) if colour == wanted] for wanted in _RGB_COLOURS]
    if not all(len(places) == 1 for places in found):
        return None
    return found[0][0], found[1][0], found[2][0]


def _colour(channel: ElementTree.Element) -> int | None:
    try:
        return (int(channel.get("Color", "")) & 0xFFFFFFFF) >> 8
    except ValueError:
        return None
