"""Writes small slides of vendors whose real files are too large to keep, as OpenSlide reads them."""

from __future__ import annotations

import io
import struct
from collections.abc import Collection
from pathlib import Path

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
