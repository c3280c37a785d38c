from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile

from slidetl.errors import SlideOpenError
from slidetl.slides import open_slide
from slidetl.slides.ome import is_ome, note_of_others, read_ome


def xml(pixels: str = "", inside: str = "<TiffData/>", root: str = "", before: str = "") -> str:
    return (
        f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" {root}>{before}'
        f'<Image ID="Image:0"><ObjectiveSettings ID="Objective:1"/>'
        f'<Pixels SizeX="9" SizeY="9" SizeZ="1" SizeT="1" {pixels}>{inside}</Pixels></Image></OME>'
    )


def channels(*attributes: str) -> str:
    return "".join(f"<Channel {text}/>" for text in attributes)


def test_a_comment_may_come_first_and_prefixes_are_known() -> None:
    assert is_ome('<?xml version="1.0"?><!-- Warning: ... --><OME xmlns="x">')
    assert is_ome('<ome:OME xmlns:ome="x"/>') and not is_ome("Aperio <OMENTUM>") and not is_ome("")


@pytest.mark.parametrize(
    ("attributes", "rgb"),
    [
        (('Name="red"', 'Name="GREEN"', 'Name="Blue"'), (0, 1, 2)),
        (('Name="B"', 'Name="G"', 'Name="R"'), (2, 1, 0)),
        (('Color="-16776961"', 'Color="16711935"', 'Color="65535"'), (0, 1, 2)),
        # Stains shown in these colours are no RGB, nor is what has no names at all.
        (
            ('Name="TRITC" Color="-16776961"', 'Name="FITC" Color="16711935"', 'Name="DAPI" Color="65535"'),
            None,
        ),
        (('ID="a"', 'ID="b"', 'ID="c"'), None),
        (('Name="Red"', 'Name="Red"', 'Name="Blue"'), None),
    ],
)
def test_red_green_and_blue_are_told_by_names_or_colours(
    attributes: tuple[str, ...], rgb: tuple[int, int, int] | None
) -> None:
    text = xml('SizeC="3"', channels(*attributes) + "<TiffData/>")
    assert read_ome(text, "a.tif", 1, 3).rgb == rgb


def test_planes_lie_where_tiff_data_says() -> None:
    parts = '<TiffData FirstC="0" IFD="2"/><TiffData FirstC="1" IFD="0" PlaneCount="2"/>'
    assert read_ome(xml('SizeC="3"', parts), "a.tif", 1, 3).directories == (2, 0, 1)
    assert read_ome(xml('SizeC="3"', ""), "a.tif", 1, 3).directories == (0, 1, 2)
    assert read_ome(xml('SizeC="3"'), "a.tif", 3, 1).channels == ("",)  # interleaved


def test_the_objective_of_the_image_is_read() -> None:
    instrument = "".join(
        f'<Objective ID="Objective:{n}" NominalMagnification="{power}"/>' for n, power in ((0, 4), (1, 20))
    )
    text = xml('SizeC="1" SignificantBits="12"', before=f"<Instrument>{instrument}</Instrument>")
    found = read_ome(text, "a.tif", 1, 1)
    assert (found.objective_power, found.significant_bits, found.sizes_px) == (20.0, 12, ((9, 9),))


def test_another_scene_is_noted_and_a_label_is_not() -> None:
    scene = '<Image><Pixels SizeX="8" SizeY="9"/></Image><Image><Pixels SizeX="4" SizeY="4"/></Image></OME>'
    sizes = read_ome(xml().replace("</OME>", scene), "a.tif", 1, 1).sizes_px
    assert sizes == ((9, 9), (8, 9), (4, 4))
    assert note_of_others(sizes) == ("of 2 pictures in it the first alone is read",)
    assert note_of_others(sizes[::2]) == note_of_others([]) == ()


def test_a_preview_before_the_slide_is_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        for side in (64, 256):
            picture = np.zeros((side, side, 3), np.uint8)
            file.write(picture, tile=(64, 64), photometric="rgb", metadata={"axes": "YXS"})
    with pytest.raises(SlideOpenError, match=r"a.ome.tif: .* one of 64 x 64 pixels before one of 256 x 256"):
        open_slide(tmp_path / "a.ome.tif", 0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            xml('SizeC="1"').replace('SizeT="1"', 'SizeT="1000000000"'),
            "one plane, found 1 in depth and 1000000000",
        ),
        (xml('SizeC="1"').replace('SizeZ="1"', 'SizeZ="5"'), "one plane, found 5 in depth"),
        (xml('SizeC="1000000000"'), "1000000000 planes, the file has 3"),
        (xml('SizeC="3"', '<TiffData IFD="7"/>'), "planes are missing"),
        (
            xml('SizeC="1"', '<TiffData><UUID FileName="../../x.tif">urn:uuid:2</UUID></TiffData>'),
            "one file is read",
        ),
        (xml(before='<BinaryOnly MetadataFile="x.ome"/>'), "one file is read"),
        (xml().replace("<OME", "<!DOCTYPE x [<!ENTITY y 'z'>]><OME"), "document type"),
        (xml()[:-9], "is damaged"),
        ("<OME/>", "describes no image"),
    ],
)
def test_what_one_file_does_not_hold_is_refused(text: str, says: str) -> None:
    with pytest.raises(SlideOpenError, match=re.escape(says)):
        read_ome(text, "a.tif", 1, 3)


def test_a_file_that_was_renamed_is_its_own() -> None:
    inside = '<TiffData IFD="0"><UUID FileName="old.ome.tif">urn:uuid:1</UUID></TiffData>'
    assert read_ome(xml('SizeC="1"', inside, 'UUID="urn:uuid:1"'), "new.ome.tif", 1, 1).directories == (0,)
    assert read_ome(xml('SizeC="1"', inside), "old.ome.tif", 1, 1).directories == (0,)


def test_no_other_file_is_opened_and_no_room_is_made(tmp_path: Path) -> None:
    """200 kB that count a thousand million planes took 8 GB."""
    inside = '<TiffData><UUID FileName="../other.tif">urn:uuid:2</UUID></TiffData>'
    for name, text in {
        "many": xml('SizeC="1"').replace('SizeT="1"', 'SizeT="1000000000"'),
        "other": xml('SizeC="1"', inside),
    }.items():
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, np.zeros((32, 32), np.uint8), tile=(16, 16), description=text, metadata=None)
        with pytest.raises(SlideOpenError, match=rf"{name}\.tif: .*(one plane|one file)"):
            open_slide(path, 0.5)
