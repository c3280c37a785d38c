"""Writes small slides of vendors whose real files are too large to keep, as OpenSlide reads them."""

from __future__ import annotations

import io
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image

from tests.conftest import Picture, block_means


def write_mirax(
    path: Path,
    picture: Picture,
    absent: Collection[tuple[int, int]] = (),
    levels: int = 2,
    image_px: int = 64,
) -> Path:
    """A slide of lossless images side by side, at mpp 0.5; ``absent`` ones (column, row) were not scanned.

    Every level halves the one before. An image of a coarser level stands where any of its own was scanned;
    what was not is of the fill colour (250, 240, 230) there.
    """
    across, down = picture.shape[1] // image_px, picture.shape[0] // image_px
    filled = picture.copy()
    for column, row in absent:
        filled[row * image_px : (row + 1) * image_px, column * image_px : (column + 1) * image_px] = FILL
    folder = path.with_suffix("")
    folder.mkdir()
    slide_id = "0123456789ABCDEF"
    pages, data = [], b""
    for level in range(levels):
        factor = 2**level
        reduced = block_means(filled, factor)
        entries = b""
        for row in range(0, down, factor):
            for column in range(0, across, factor):
                covered = {(c, r) for c in range(column, column + factor) for r in range(row, row + factor)}
                if covered <= set(absent):
                    continue
                y, x = row // factor * image_px, column // factor * image_px
                file = io.BytesIO()
                Image.fromarray(reduced[y : y + image_px, x : x + image_px]).save(file, "PNG")
                entries += struct.pack("<4i", row * across + column, len(data), file.tell(), 0)
                data += file.getvalue()
        pages.append(struct.pack("<2i", len(entries) // 16, 0) + entries)
    (folder / "Data0000.dat").write_bytes(data)
    head = b"01.02" + slide_id.encode()
    table = len(head) + 8  # after it, for each level a pointer to its record, which points to its page
    index = head + struct.pack("<2i", table, 0)
    at = table + 12 * levels
    records = b""
    for page in pages:
        records += struct.pack("<2i", 0, at)
        at += len(page)
    index += struct.pack(f"<{levels}i", *(table + 4 * levels + 8 * level for level in range(levels)))
    (folder / "Index.dat").write_bytes(index + records + b"".join(pages))
    lines = ["[GENERAL]", f"SLIDE_ID={slide_id}", "CURRENT_SLIDE_VERSION=01.02", "OBJECTIVE_MAGNIFICATION=20"]
    lines += [f"IMAGENUMBER_X={across}", f"IMAGENUMBER_Y={down}", "CameraImageDivisionsPerSide=1"]
    lines += ["[HIERARCHICAL]", "HIER_COUNT=1", "NONHIER_COUNT=0", "INDEXFILE=Index.dat"]
    lines += ["HIER_0_NAME=Slide zoom level", f"HIER_0_COUNT={levels}"]
    lines += [f"HIER_0_VAL_{level}_SECTION=LEVEL_{level}" for level in range(levels)]
    lines += ["[DATAFILE]", "FILE_COUNT=1", "FILE_0=Data0000.dat"]
    fill_bgr = FILL[2] << 16 | FILL[1] << 8 | FILL[0]
    for level in range(levels):
        lines += [f"[LEVEL_{level}]", "OVERLAP_X=0", "OVERLAP_Y=0", f"IMAGE_FILL_COLOR_BGR={fill_bgr}"]
        lines += [f"MICROMETER_PER_PIXEL_{axis}={0.5 * 2**level}" for axis in "XY"]
        lines += [f"IMAGE_CONCAT_FACTOR={int(level > 0)}", "IMAGE_FORMAT=PNG"]
        lines += [f"DIGITIZER_{side}={image_px}" for side in ("WIDTH", "HEIGHT")]
    (folder / "Slidedat.ini").write_text("\n".join(lines) + "\n")
    path.write_bytes(b"")
    return path


FILL = (250, 240, 230)


def write_philips(path: Path, picture: Picture, mpp: tuple[float, float] = (0.25, 0.26)) -> Path:
    """A tiled TIFF with a level of half the size, whose spacing stands in XML, in millimetres, rows first."""
    import tifffile

    def attribute(name: str, value: str) -> str:
        return f'<Attribute Name="{name}">{value}</Attribute>'

    def spaced(factor: int) -> str:
        return attribute(
            "DICOM_PIXEL_SPACING", f'"{factor * mpp[1] / 1000:.8f}" "{factor * mpp[0] / 1000:.8f}"'
        )

    levels = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spaced(factor)}</DataObject>' for factor in (1, 2)
    )
    image = attribute("PIM_DP_IMAGE_TYPE", "WSI") + spaced(1)
    image += attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", f"<Array>{levels}</Array>")
    scanned = attribute("PIM_DP_SCANNED_IMAGES", f"<Array><DataObject>{image}</DataObject></Array>")
    xml = f'<DataObject ObjectType="DPUfsImport">{scanned}</DataObject>'
    with tifffile.TiffWriter(path) as file:
        for factor in (1, 2):
            file.write(
                np.ascontiguousarray(block_means(picture, factor)),
                tile=(128, 128),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(factor > 1),
                software="Philips DP v1.0",
                description=xml if factor == 1 else "level=1",
                metadata=None,
            )
    return path


CZI_PLAIN, CZI_JPEG, CZI_JPEG_XR, CZI_ZSTD = 0, 1, 4, 5
_CZI_GREY, _CZI_BGR = 0, 3
_CZI_XML = """<ImageDocument><Metadata><Information><Image><SizeX>{}</SizeX><SizeY>{}</SizeY><SizeS>1</SizeS>
<ObjectiveSettings><ObjectiveRef Id="Objective:1"/></ObjectiveSettings></Image><Instrument><Objectives>
<Objective Id="Objective:1"><NominalMagnification>20</NominalMagnification></Objective></Objectives>
</Instrument></Information><Scaling><Items><Distance Id="X"><Value>{}</Value></Distance>
<Distance Id="Y"><Value>{}</Value>
</Distance></Items></Scaling></Metadata></ImageDocument>"""


def write_czi(
    path: Path,
    picture: Picture,
    mpp: float = 0.5,
    factors: tuple[int, ...] = (2,),
    compression: int = CZI_PLAIN,
    tile_px: int = 128,
    is_grey: bool = False,
) -> Path:
    """A Zeiss CZI with levels of block means, by the structures of openslide-vendor-zeiss.c."""
    height, width = picture.shape[:2]
    body, entries = bytearray(_segment("ZISRAWFILE", bytes(512))), []
    for factor in (1, *factors):
        level = picture if factor == 1 else block_means(picture, factor)
        for x, y, tile in _tiles(level, tile_px):
            stored = tile[..., :1] if is_grey else tile[..., ::-1]
            data = np.ascontiguousarray(stored).tobytes()
            data = bytes(imagecodecs.zstd_encode(data)) if compression == CZI_ZSTD else data
            at = len(body)
            entry = struct.pack(
                "<2siqiib5xi", b"DV", _CZI_GREY if is_grey else _CZI_BGR, at, 0, compression, 0, 4
            )
            for name, start, stored_px in (("X", x, tile.shape[1]), ("Y", y, tile.shape[0])):
                entry += struct.pack(
                    "<4siifi", name.encode(), start * factor, stored_px * factor, 0.0, stored_px
                )
            for name in ("C", "S"):
                entry += struct.pack("<4siifi", name.encode(), 0, 1, 0.0, 1)
            entries.append(entry)
            head = struct.pack("<iiq", 0, 0, len(data)) + entry
            body += _segment("ZISRAWSUBBLOCK", head.ljust(256, b"\0") + data)
    places = []
    listed = struct.pack("<i124x", len(entries)) + b"".join(entries)
    xml = _CZI_XML.format(width, height, mpp * 1e-6, mpp * 1e-6).encode()
    for name, content in (
        ("ZISRAWDIRECTORY", listed),
        ("ZISRAWMETADATA", struct.pack("<ii248x", len(xml), 0) + xml),
        ("ZISRAWATTDIR", struct.pack("<i252x", 0)),
    ):
        places.append(len(body))
        body += _segment(name, content)
    guid = bytes(range(16))
    about = struct.pack("<iiii16s16siqqiq", 1, 0, 0, 0, guid, guid, 0, places[0], places[1], 0, places[2])
    body[32 : 32 + len(about)] = about
    path.write_bytes(body)
    return path


def _segment(name: str, content: bytes) -> bytes:
    return struct.pack("<16sqq", name.encode(), len(content), len(content)) + content


def _tiles(picture: Picture, side: int) -> Iterator[tuple[int, int, Picture]]:
    for y in range(0, picture.shape[0], side):
        for x in range(0, picture.shape[1], side):
            yield x, y, picture[y : y + side, x : x + side]
